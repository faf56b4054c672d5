"""Clean teacher outputs, computed once and kept on disk: `TeacherCache`."""

from __future__ import annotations

import hashlib
import json
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from ..config import BlockwiseDistillConfig
from ..losses.chunked_loss import default_chunk_size
from ..losses.top_k import TopK, top_k
from ..models.heads import Head
from ..models.loading import weights_of
from ..pairing.pair import Pair
from ..pairing.tasks import Task
from .example_keys import KEYS, bytes_of

DESCRIPTION = "teacher_cache.json"
SHARD_BYTES = 2**28
"""Size at which what was computed is written out, so that an interruption loses no more than that."""


class TeacherCache:
    """A folder with the teacher's outputs for the rows that count of each example.

    An example is known by the hash of what the collator makes of it, labels included and padding at its end left out.
    So other data, or other preprocessing, is never taken for what was computed; only another teacher could be, and a
    folder that another teacher, precision, temperature or k filled is refused.

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
        self._tensors: list[dict[str, torch.Tensor]] = []
        self._places: dict[int, tuple[int, slice]] = {}
        self._new: dict[int, torch.Tensor | TopK] = {}
        self._new_bytes = 0
        self._read: set[str] = set()
        description = {"teacher": fingerprint(teacher), "precision": precision}
        description |= {"num_classes": num_classes, "top_k": top_k}
        description |= {"image_size": None if image_size is None else list(image_size)}
        description |= {} if top_k is None else {"temperature": temperature}
        description |= {} if distill_on == "labelled" else {"distill_on": distill_on}
        description |= {} if pooling is None else {"pooling": pooling}
        self._describe(description)
        self.read()

    def _describe(self, description: dict[str, Any]) -> None:
        path = self.folder / DESCRIPTION
        self.folder.mkdir(parents=True, exist_ok=True)
        if not path.is_file():
            _replace(path, lambda temporary: temporary.write_text(json.dumps(description, indent=2) + "\n", "utf-8"))
        found = json.loads(path.read_text(encoding="utf-8"))
        for name, value in description.items():
            if found.get(name) != value:
                raise ValueError(
                    f"`teacher_cache` {str(self.folder)!r} was filled with {name} {found.get(name)}, but this run has "
                    f"{value}; delete the folder, or name another one."
                )

    def __contains__(self, key: int) -> bool:
        return key in self._places or key in self._new

    def __len__(self) -> int:
        """Number of examples."""
        return len(self._places) + len(self._new)

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
        start = 0
        for key, count in zip(keys, counts, strict=True):
            part = rows[start : start + count]
            start += count
            if key in self:
                continue
            self._new[key] = _to_cpu(part)
            self._new_bytes += self._new[key].nbytes
        if self._new_bytes > SHARD_BYTES:
            self.write()

    def fill(
        self,
        batches: Iterable[dict[str, Any]],
        outputs: Callable[[dict[str, Any]], tuple[Sequence[int], torch.Tensor | TopK]],
        accelerator: Accelerator,
    ) -> None:
        """Take in what is not known yet of a data set that every rank sees a part of.

        Args:
            batches: Of a `KeyedCollator`.
            outputs: From a batch, the number of rows of each example, and what is kept of them.
            accelerator: Of the run.

        Raises:
            ValueError: If the ranks do not share the folder.
        """
        # The pass over the data leaves the random state to the training.
        with torch.random.fork_rng(devices=[]):
            for batch in batches:
                keys = batch.pop(KEYS).tolist()
                if any(key not in self for key in keys):
                    self.add(keys, *outputs(batch))
        self.write()
        accelerator.wait_for_everyone()
        self.read()
        lengths = accelerator.gather(torch.tensor([len(self)], device=accelerator.device)).tolist()
        if len(set(lengths)) > 1:
            raise ValueError(
                f"The processes find {lengths} examples in `teacher_cache` {str(self.folder)!r}; name a folder that "
                "all of them share."
            )

    def write(self) -> None:
        """Write what is not on disk yet."""
        if not self._new:
            return
        keys, parts = list(self._new), list(self._new.values())
        tensors = {
            "keys": torch.tensor(keys, dtype=torch.long),
            "ends": torch.tensor([len(part) for part in parts]).cumsum(0),
        }
        if self.top_k is None:
            tensors["logits"] = torch.cat(parts)
        else:
            tensors["log_probs"] = torch.cat([part.log_probs for part in parts])
            tensors["indices"] = torch.cat([part.indices for part in parts])
        name = hashlib.blake2b(tensors["keys"].numpy().tobytes(), digest_size=8).hexdigest()
        _replace(self.folder / f"{name}.safetensors", lambda temporary: save_file(tensors, temporary))
        self._new, self._new_bytes = {}, 0
        self.read()

    def read(self) -> None:
        """Find what lies in the folder by now, of other processes, too."""
        for path in sorted(self.folder.glob("*.safetensors")):
            if path.name in self._read:
                continue
            tensors = load_file(path)
            starts = [0, *tensors["ends"].tolist()]
            for position, key in enumerate(tensors["keys"].tolist()):
                self._places[key] = len(self._tensors), slice(starts[position], starts[position + 1])
            self._tensors.append(tensors)
            self._read.add(path.name)

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

        def is_known(key: int, count: int) -> bool:
            _, place = self._places.get(key, (0, slice(0, -1)))
            return place.stop - place.start == count

        unknown = [position for position, known in enumerate(map(is_known, keys, counts)) if not known]
        if unknown:
            raise ValueError(
                f"Examples {unknown} of a batch are not in `teacher_cache` {str(self.folder)!r}: the data changes from "
                "epoch to epoch (augmentation, random masking, padding on the left to the longest of a batch), so its "
                "teacher outputs cannot be kept; set `teacher_cache` to None, or pad to one length."
            )

        def gather(name: str) -> torch.Tensor:
            places = (self._places[key] for key in keys)
            return torch.cat([self._tensors[shard][name][rows] for shard, rows in places]).to(device)

        if self.top_k is None:
            return gather("logits")
        return TopK(gather("log_probs"), gather("indices"), self.num_classes)


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


def _to_cpu(rows: torch.Tensor | TopK) -> torch.Tensor | TopK:
    # Clones: a slice would keep all the logits of its batch alive.
    if isinstance(rows, TopK):
        return TopK(
            rows.log_probs.to("cpu", torch.float16, copy=True),
            rows.indices.to("cpu", torch.int32, copy=True),
            rows.num_classes,
        )
    return rows.to("cpu", torch.float32, copy=True)


def _replace(path: Path, write: Callable[[Path], Any]) -> None:
    """Write a file so that it is there whole or not at all."""
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")
    write(temporary)
    temporary.replace(path)
