"""What of a teacher a student was cut from: `Cut`, which is kept in `cut.json` beside the student."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

CUT_NAME = "cut.json"


@dataclass(frozen=True)
class Cut:
    """The parts of a teacher that a student is made of.

    Attributes:
        layers: Indices of the teacher's layers that it keeps.
        depth: How many the teacher has.
        channels: Entries of the teacher's hidden states that it keeps, from which its connectors begin; `None` where it
            keeps all, or not the same ones everywhere.
        axes: All that is narrower than in the teacher: a tensor of the teacher's that has it, with the dimension; its
            size there; the entries that are kept; and the scores by which they were chosen.

    Example:
        ```python
        >>> import tempfile
        >>> from hf_blockkd.models.cut import Cut
        >>> folder = tempfile.mkdtemp()
        >>> Cut([0, 5], 6, [0, 2, 3]).save(folder)
        >>> Cut.load(folder)
        Cut(layers=[0, 5], depth=6, channels=[0, 2, 3], axes=[])

        ```
    """

    layers: list[int]
    depth: int
    channels: list[int] | None = None
    axes: list[dict[str, Any]] = field(default_factory=list)

    def save(self, folder: str | Path) -> None:
        """Write `cut.json`."""
        text = json.dumps(dataclasses.asdict(self))
        (Path(folder) / CUT_NAME).write_text(text + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: str | Path) -> Cut | None:
        """Read `cut.json`; `None` where there is none.

        Raises:
            ValueError: If it is no cut.
        """
        path = Path(folder) / CUT_NAME
        if not path.is_file():
            return None
        try:
            cut = cls(**json.loads(path.read_text(encoding="utf-8")))
            for name in ("layers", "channels"):
                own = getattr(cut, name)
                if own is not None and (own != sorted(set(own)) or any(type(index) is not int for index in own)):
                    raise ValueError(f"`{name}` is {own!r}, no rising list of indices")
            return cut
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path} holds no cut ({error}); delete it, or cut the student again.") from error
