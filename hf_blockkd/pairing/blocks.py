"""The cut of a student's and a teacher's layers into the same number of blocks: `BlockMap`."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

BLOCKS_NAME = "blocks.json"


@dataclass(frozen=True)
class BlockMap:
    """Both stacks of layers, cut into `n` blocks of consecutive layers.

    Block `i` (counted from 1) of the student ends before layer `student[i - 1]`, and that of the teacher before layer
    `teacher[i - 1]`; so the last entries are the depths of the two models. Build one with `BlockMap.even` or
    `BlockMap.from_boundaries`; `print` shows it as a table.

    Attributes:
        student: Exclusive end layer of each student block.
        teacher: Exclusive end layer of each teacher block.

    Example:
        ```python
        >>> from hf_blockkd import BlockMap
        >>> print(BlockMap.even(student_layers=3, teacher_layers=8, num_blocks=3))
        block  student layers  teacher layers  stepping stone
            1  0               0-1             student 1 layer -> teacher 6 layers
            2  1               2-4             student 2 layers -> teacher 3 layers
            3  2               5-7             student 3 layers -> teacher head

        ```
    """

    student: tuple[int, ...]
    teacher: tuple[int, ...]

    def __post_init__(self) -> None:
        for who, boundaries in (("student", self.student), ("teacher", self.teacher)):
            rises = all(a < b for a, b in zip((0, *boundaries), boundaries, strict=False))
            if not boundaries or not rises:
                raise ValueError(
                    f"`{who}_boundaries` must be a rising list of exclusive end layers, each at least 1, "
                    f"but got {list(boundaries)}; for example [2, 4, 6] cuts 6 layers into 3 blocks."
                )
        if len(self.student) != len(self.teacher):
            raise ValueError(
                f"`student_boundaries` {list(self.student)} makes {len(self.student)} blocks and `teacher_boundaries` "
                f"{list(self.teacher)} makes {len(self.teacher)}; give both the same number of entries."
            )

    def __len__(self) -> int:
        return len(self.student)

    @classmethod
    def even(cls, student_layers: int, teacher_layers: int, num_blocks: int) -> BlockMap:
        """Cut both stacks as evenly as their depths allow.

        Block `i` ends at `layers * i // num_blocks`, so where a depth does not divide, the later blocks are the longer
        ones.

        Args:
            student_layers: Depth of the student.
            teacher_layers: Depth of the teacher.
            num_blocks: Number of blocks, at least 1 and at most the smaller depth.

        Raises:
            ValueError: If there are more blocks than layers, or fewer than one block.
        """
        if num_blocks < 1:
            raise ValueError(f"`num_blocks` must be at least 1, but got {num_blocks}.")
        for who, layers in (("student", student_layers), ("teacher", teacher_layers)):
            if num_blocks > layers:
                raise ValueError(
                    f"`num_blocks` is {num_blocks}, but the {who} has only {layers} layer{'s' * (layers != 1)}; "
                    f"set `num_blocks` to {layers} or less."
                )
        return cls(_even_ends(student_layers, num_blocks), _even_ends(teacher_layers, num_blocks))

    @classmethod
    def from_boundaries(cls, student: Sequence[int], teacher: Sequence[int]) -> BlockMap:
        """Take the cut as given.

        Args:
            student: Exclusive end layer of each student block; the last one is the student's depth.
            teacher: Likewise for the teacher.

        Raises:
            ValueError: If a list does not rise, starts below 1, is empty, or the lengths differ.
        """
        return cls(tuple(student), tuple(teacher))

    @classmethod
    def cut(
        cls,
        student_layers: int,
        teacher_layers: int,
        num_blocks: int,
        student_boundaries: Sequence[int] | None = None,
        teacher_boundaries: Sequence[int] | None = None,
    ) -> BlockMap:
        """Cut by boundaries where they are given (they then set the number of blocks), and evenly elsewhere.

        Raises:
            ValueError: As `even` and `from_boundaries`, and if boundaries do not end at the depth of their model.
        """
        given = student_boundaries or teacher_boundaries
        if student_boundaries and teacher_boundaries:
            block_map = cls.from_boundaries(student_boundaries, teacher_boundaries)
        else:
            even = cls.even(student_layers, teacher_layers, len(given) if given else num_blocks)
            block_map = cls.from_boundaries(student_boundaries or even.student, teacher_boundaries or even.teacher)
        block_map.check_depths(student_layers, teacher_layers)
        return block_map

    def save(self, folder: str | Path) -> None:
        """Write `blocks.json`."""
        text = json.dumps(dataclasses.asdict(self))
        (Path(folder) / BLOCKS_NAME).write_text(text + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: str | Path) -> BlockMap | None:
        """Read `blocks.json`; `None` where there is none.

        Raises:
            ValueError: If it is no cut into blocks.
        """
        path = Path(folder) / BLOCKS_NAME
        if not path.is_file():
            return None
        try:
            return cls(**{who: tuple(ends) for who, ends in json.loads(path.read_text(encoding="utf-8")).items()})
        except (AttributeError, TypeError, ValueError) as error:
            raise ValueError(f"{path} holds no cut into blocks ({error}); delete it.") from error

    def check_depths(self, student_layers: int, teacher_layers: int) -> None:
        """Raise a `ValueError` unless the last boundaries are the depths of the two models."""
        for who, boundaries, layers in (
            ("student", self.student, student_layers),
            ("teacher", self.teacher, teacher_layers),
        ):
            if boundaries[-1] != layers:
                raise ValueError(
                    f"`{who}_boundaries` {list(boundaries)} ends at layer {boundaries[-1]}, but the {who} has "
                    f"{layers} layers; make {layers} the last entry."
                )

    def __str__(self) -> str:
        rows = [("block", "student layers", "teacher layers", "stepping stone")]
        depth = self.teacher[-1]
        spans = zip((0, *self.student), self.student, (0, *self.teacher), self.teacher, strict=False)
        for i, (student_start, student_end, teacher_start, teacher_end) in enumerate(spans, start=1):
            suffix = _count(depth - teacher_end) if teacher_end < depth else "head"
            rows.append(
                (
                    str(i),
                    _span(student_start, student_end),
                    _span(teacher_start, teacher_end),
                    f"student {_count(student_end)} -> teacher {suffix}",
                )
            )
        widths = [max(len(row[column]) for row in rows) for column in range(4)]
        lines = (
            f"{block:>{widths[0]}}  {student:<{widths[1]}}  {teacher:<{widths[2]}}  {stone}"
            for block, student, teacher, stone in rows
        )
        return "\n".join(line.rstrip() for line in lines)


def _even_ends(layers: int, num_blocks: int) -> tuple[int, ...]:
    return tuple(layers * i // num_blocks for i in range(1, num_blocks + 1))


def _span(start: int, end: int) -> str:
    return str(start) if end - start == 1 else f"{start}-{end - 1}"


def _count(layers: int) -> str:
    return f"{layers} layer{'s' * (layers != 1)}"
