"""Clean teacher outputs, computed once and kept on disk: `TeacherCache`."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from transformers import PreTrainedModel

from ..config import BlockwiseDistillConfig
from ..losses.chunked_loss import default_chunk_size
from ..losses.top_k import TopK, top_k
from ..models.heads import Head
from ..models.loading import weights_of
from ..pairing.pair import Pair
from ..pairing.tasks import Task
from .example_keys import HASH, KEYS, bytes_of
from .mapped_rows import MappedRows, replace
from .seeding import restored_random_states

DESCRIPTION = "teacher_cache.json"


class TeacherCache:
    """A folder with the teacher's outputs for the rows that count of each example.

    An example is known by the hash of what the collator makes of it, labels included and padding at its end left out.
    So other data, or other preprocessing, is never taken for what was computed; only another teacher could be, and a
    folder that another teacher, precision, temperature or k filled is refused. Rows lie in files that are mapped into
    memory and never read as a whole (see `MappedRows`), to which several processes may write.

    Args:
        folder: Where it lies; made where it is missing.
        teacher: The frozen teacher.
        num_classes: Width of its logits; over vocabularies, what it has in common with the student.
        top_k: Number of classes that are kept of each row, with the mass of the others, in float16 and int32; `None`
            keeps all logits in float32.
        temperature: At which the k are compared.
        precision: Mixed precision that the teacher runs in.
        image_size: Size that all images are brought to for it, if they are.
        distill_on: Which tokens are kept of texts with labels.
        pooling: How the states of a teacher without a head become what is kept.

    Raises:
        ValueError: If the folder was filled by another teacher, or in another way.
    """

    def __init__(
        self,
        folder: str | Path,
        teacher: PreTrainedModel,
        num_classes: int,
        top_k: int | None = None,
        temperature: float = 1.0,
        precision: str = "no",
        image_size: tuple[int, int] | None = None,
        distill_on: str = "labelled",
        pooling: str | None = None,
    ) -> None:
        self.folder = Path(folder)
        self.num_classes, self.top_k, self.temperature = num_classes, top_k, temperature
        description = {"keys": HASH, "teacher": fingerprint(teacher), "precision": precision}
        description |= {"num_classes": num_classes, "top_k": top_k}
        description |= {"image_size": None if image_size is None else list(image_size)}
        description |= {} if top_k is None else {"temperature": temperature}
        description |= {} if distill_on == "labelled" else {"distill_on": distill_on}
        description |= {} if pooling is None else {"pooling": pooling}
        self._describe(description)
        self._rows = MappedRows(folder)
        self._record: Path | None = None
        self._was_passed = False

    def _describe(self, description: dict[str, Any]) -> None:
        path = self.folder / DESCRIPTION
        self.folder.mkdir(parents=True, exist_ok=True)
        if not path.is_file():
            replace(path, lambda temporary: temporary.write_text(json.dumps(description, indent=2) + "\n", "utf-8"))
        # Which hash the first versions used is not in their folders.
        found = {"keys": "blake2b"} | json.loads(path.read_text(encoding="utf-8"))
        for name, value in description.items():
            if found.get(name) != value:
                raise ValueError(
                    f"`teacher_cache` {str(self.folder)!r} was filled with {name} {found.get(name)}, but this run has "
                    f"{value}; delete the folder, or name another one."
                )

    def __len__(self) -> int:
        """Number of examples."""
        return len(self._rows)

    def compress(self, rows: torch.Tensor, head: Head | None) -> torch.Tensor | TopK:
        """What is kept of a batch.

        Args:
            rows: Of logits, or of what enters `head`.
            head: The teacher's head, where it is called by itself.
        """
        if self.top_k is None:
            return rows
        size = default_chunk_size(self.num_classes, rows.device)
        pieces = [
            top_k(piece if head is None else head(piece), self.top_k, self.temperature, self.num_classes)
            for piece in rows.split(size)
        ]
        return TopK(
            torch.cat([piece.log_probs for piece in pieces]),
            torch.cat([piece.indices for piece in pieces]),
            self.num_classes,
        )

    def add(self, keys: Sequence[int], counts: Sequence[int], rows: torch.Tensor | TopK) -> None:
        """Take in the rows of a batch.

        Args:
            keys: Of its examples.
            counts: Number of rows of each.
            rows: All of them, example after example.
        """
        if isinstance(rows, TopK):
            kept = {"log_probs": rows.log_probs.to(torch.float16), "indices": rows.indices.to(torch.int32)}
        else:
            kept = {"logits": rows.float()}
        self._rows.add(keys, counts, kept)

    def fill(
        self,
        batches: Iterable[dict[str, Any]],
        outputs: Callable[[dict[str, Any]], tuple[Sequence[int], torch.Tensor | TopK]],
        accelerator: Accelerator,
        data: str | None = None,
    ) -> None:
        """Take in what is not known yet of a data set that every rank sees a part of.

        What was computed when an error or the keyboard interrupts it is written. A data set that can tell what it is
        made of is gone through once, and not again as long as all files are there that it was found in.

        Args:
            batches: Of a `KeyedCollator`.
            outputs: From a batch, the number of rows of each example, and what is kept of them.
            accelerator: Of the run.
            data: Fingerprint of all batches, see `data_fingerprint`.

        Raises:
            ValueError: If the ranks do not share the folder.
        """
        self._record = self.folder / f"passed-{data}.json" if data else None
        passed = accelerator.gather(torch.tensor([int(self._has_passed())], device=accelerator.device))
        self._was_passed = bool(passed.all())
        if not self._was_passed:
            # The pass over the data leaves the random states to the training.
            with restored_random_states():
                try:
                    for batch in batches:
                        keys = batch.pop(KEYS).tolist()
                        if any(key not in self._rows for key in keys):
                            self.add(keys, *outputs(batch))
                finally:
                    self._rows.write()
        accelerator.wait_for_everyone()
        self._rows.read()
        lengths = accelerator.gather(torch.tensor([len(self)], device=accelerator.device)).tolist()
        if len(set(lengths)) > 1:
            raise ValueError(
                f"The processes find {lengths} examples in `teacher_cache` {str(self.folder)!r}; name a folder that "
                "all of them share."
            )
        if self._record is not None and accelerator.is_main_process and not self._was_passed:
            replace(self._record, lambda temporary: temporary.write_text(json.dumps(self._rows.shards), "utf-8"))

    def _has_passed(self) -> bool:
        """Whether all files are there that lay here after a pass over the same data."""
        if self._record is None or not self._record.is_file():
            return False
        return set(json.loads(self._record.read_text(encoding="utf-8"))) <= set(self._rows.shards)

    def write(self) -> None:
        """Write what was added and is not on disk yet."""
        self._rows.write()

    def rows(
        self, keys: Sequence[int], counts: Sequence[int], device: torch.device | str = "cpu"
    ) -> torch.Tensor | TopK:
        """The rows of a batch, example after example.

        Args:
            keys: Of its examples.
            counts: Number of rows of each.
            device: Where they go.

        Raises:
            ValueError: If an example is unknown.
        """
        found = self._rows.counts(keys)
        unknown = [position for position, count in enumerate(counts) if found[position] != count]
        if unknown:
            if self._record is not None:
                self._record.unlink(missing_ok=True)
            raise ValueError(
                f"Examples {unknown} of a batch are not in `teacher_cache` {str(self.folder)!r}: "
                + (
                    "what the rows of the data set are made of has changed since it was filled; start again, and it is "
                    "gone through once more."
                    if self._was_passed
                    else "the data changes from epoch to epoch (augmentation, random masking, padding on the left to "
                    "the longest of a batch), so its teacher outputs cannot be kept; set `teacher_cache` to None, or "
                    "pad to one length."
                )
            )
        rows = {name: tensor.to(device) for name, tensor in self._rows.take(keys).items()}
        return rows["logits"] if self.top_k is None else TopK(**rows, num_classes=self.num_classes)


def check_cacheable(
    args: BlockwiseDistillConfig, task: Task, dataset: Any, needs_teacher: bool = True, needs_states: bool = False
) -> None:
    """Raise a `ValueError` if `teacher_cache` is set and cannot be filled for this run.

    Args:
        args: The configuration.
        task: Of both models.
        dataset: The training set.
        needs_teacher: Whether the objective runs the teacher.
        needs_states: Whether it reads the teacher's hidden states.
    """
    if args.teacher_cache is None:
        return
    if not needs_teacher or needs_states:
        raise ValueError(
            f"`teacher_cache` is {args.teacher_cache!r} and keeps the teacher's logits, but objective="
            f"{args.objective!r} needs {'its hidden states' if needs_teacher else 'none'}; set it to None"
            f"{', or `state_weight` to 0' * (args.objective == 'block_kd')}."
        )
    if len(task.label_names) > 1:
        raise ValueError(
            f"`teacher_cache` is {args.teacher_cache!r}, but {task.name} has {len(task.label_names)} heads, which it "
            "cannot keep apart; set it to None."
        )
    if task.form is not None:
        raise ValueError(
            f"`teacher_cache` is {args.teacher_cache!r}, but {task.name} gives as many rows of logits as an input has "
            "frames, pixels or queries, which it does not keep; set it to None."
        )
    if dataset is not None and not hasattr(dataset, "__len__"):
        raise ValueError(
            f"`teacher_cache` is {args.teacher_cache!r}, but the training set has no length, so it may never be full; "
            "set it to None, or load the data without streaming."
        )
    if task.over_vocabulary and (args.divergence == "dkd" or args.standardize_logits):
        option = "divergence='dkd'" if args.divergence == "dkd" else "standardize_logits=True"
        raise ValueError(
            f"`teacher_cache` is {args.teacher_cache!r} and keeps the likeliest tokens only, but {option} needs all of "
            "them; set it to None."
        )


def open_cache(args: BlockwiseDistillConfig, pair: Pair, precision: str) -> TeacherCache:
    """The cache that `teacher_cache` names, for the outputs of a pair."""
    teacher = pair.teacher
    if not pair.task.over_vocabulary:
        return TeacherCache(
            args.teacher_cache,
            teacher,
            teacher.config.num_labels,
            precision=precision,
            image_size=pair.geometry.resized_to,
            distill_on=args.distill_on,
            pooling=None if pair.embeddings is None else str(pair.embeddings.poolings["teacher"]),
        )
    top_k = min(args.teacher_cache_top_k, pair.common_classes - 1)
    options = {"distill_on": args.distill_on}
    return TeacherCache(args.teacher_cache, teacher, pair.common_classes, top_k, args.temperature, precision, **options)


def fingerprint(model: PreTrainedModel) -> str:
    """A hash of a model's class, configuration, weights and buffers."""
    # Models write the problem type into their config when they see the first labels; no output depends on it.
    config = {
        name: value
        for name, value in model.config.to_dict().items()
        if name[0] != "_" and name not in ("transformers_version", "problem_type", "use_cache")
    }
    digest = hashlib.sha256(json.dumps([type(model).__name__, config], sort_keys=True, default=str).encode())
    for name, tensor in sorted(weights_of(model).items()):
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        for part in _parts(tensor):
            digest.update(bytes_of(part))
    return digest.hexdigest()


def _parts(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """A quantized weight may be a tensor that is made of several."""
    if not hasattr(tensor, "__tensor_flatten__"):
        yield tensor
        return
    for name in tensor.__tensor_flatten__()[0]:
        yield from _parts(getattr(tensor, name))
