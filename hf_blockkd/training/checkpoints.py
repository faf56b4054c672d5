"""Checkpoints that are there whole or not at all, and the student in them: `made_whole`, `find_checkpoint`."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import nn
from transformers import PreTrainedModel
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints
from transformers.utils import logging

from ..connectors.attached import detached, save_connectors, without_connectors
from ..models.adapters import is_peft
from .faults import RESUME, is_dead_worker

if TYPE_CHECKING:
    from peft import PeftModel

MANIFEST_NAME = "checkpoint_manifest.json"
"""Holds size and hash of every other file of a checkpoint, and is written last."""
UNFINISHED, REPLACED = "_unfinished-", "_replaced-"
"""Begin the names of folders that nothing must take for a checkpoint; the hub leaves them out, too."""

logger = logging.get_logger(__name__)


# ---- Writing ----


def save_student(
    student: PreTrainedModel | PeftModel,
    connectors: nn.ModuleList,
    folder: str | os.PathLike,
    processing: Any = None,
    full_state: dict[str, Any] | None = None,
) -> None:
    """Save a student that needs none of our code, its processing class, and the connectors beside it.

    Args:
        student: The student, with the connectors on it.
        connectors: These.
        folder: Where to; made if need be.
        processing: Tokenizer or image processor.
        full_state: Weights of student and connectors, where the student's own are sharded.
    """
    os.makedirs(folder, exist_ok=True)
    # The stock resume reads the file back raw, which fails for models whose hub checkpoints use older key names.
    key_names = {} if is_peft(student) else {"save_original_format": False}
    with detached(student):
        weights = student.state_dict() if full_state is None else without_connectors(full_state)
        student.save_pretrained(folder, state_dict=weights, **key_names)
    if processing is not None:
        processing.save_pretrained(folder)
    save_connectors(connectors, folder, full_state)


@contextmanager
def made_whole(folder: Path, accelerator: Accelerator, writes: bool) -> Iterator[Path]:
    """A folder for all processes to write to, which becomes a checkpoint, under its own name, when it is whole.

    A process that is killed at any moment leaves the checkpoints before it as they were.

    Args:
        folder: The checkpoint.
        accelerator: Of the run; every process enters this context at the same step.
        writes: Whether this process makes the folder and names it.

    Raises:
        OSError: If something cannot be written, for instance because the disk is full. What was written of this
            checkpoint is deleted then, and those before it are untouched.
    """
    unfinished = folder.with_name(UNFINISHED + folder.name)
    try:
        if writes:
            for left_over in (*folder.parent.glob(f"{UNFINISHED}*"), *folder.parent.glob(f"{REPLACED}*")):
                shutil.rmtree(left_over, ignore_errors=True)
            unfinished.mkdir(parents=True)
        accelerator.wait_for_everyone()
        yield unfinished
        accelerator.wait_for_everyone()
        if writes:
            seal(unfinished)
            _put_in_place(unfinished, folder)
    except Exception as error:
        shutil.rmtree(unfinished, ignore_errors=True)
        if is_dead_worker(error):
            raise
        last = next((str(other) for other in checkpoints(folder.parent) if flaw(other, contents=False) is None), None)
        raise OSError(
            f"{folder} could not be written ({error}); "
            + ("no checkpoint was written before it, so " if last is None else f"{last} before it is untouched: ")
            + f"make room or name another `output_dir`, and {RESUME}."
        ) from error


def seal(folder: Path) -> None:
    """Write the manifest of a folder that is complete, after everything else has reached the disk."""
    files = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST_NAME):
        with path.open("rb+") as file:
            os.fsync(file.fileno())
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        files[path.relative_to(folder).as_posix()] = {"size": path.stat().st_size, "sha256": digest}
    with (folder / MANIFEST_NAME).open("w", encoding="utf-8") as file:
        json.dump({"files": files}, file, indent=2)
        file.flush()
        os.fsync(file.fileno())


def _put_in_place(unfinished: Path, folder: Path) -> None:
    """Rename a whole checkpoint, also over an older one of the same step."""
    replaced = folder.with_name(REPLACED + folder.name)
    if folder.exists():
        folder.rename(replaced)
    unfinished.rename(folder)
    shutil.rmtree(replaced, ignore_errors=True)


def callback_states(callbacks: Iterable[Any]) -> dict[str, Any]:
    """The states of callbacks that have one, as `Trainer` keeps them in its own."""
    states: dict[str, Any] = {}
    for callback in callbacks:
        if isinstance(callback, ExportableState):
            states.setdefault(type(callback).__name__, []).append(callback.state())
    return {name: found if len(found) > 1 else found[0] for name, found in states.items()}


def rotate(run_dir: Path, limit: int | None, best: str | None = None) -> None:
    """Delete the oldest checkpoints until `limit` whole ones are left, as `Trainer` does; torn ones go first."""
    if not limit or limit < 0:
        return
    for checkpoint in checkpoints(run_dir):
        if flaw(checkpoint, contents=False):
            shutil.rmtree(checkpoint, ignore_errors=True)
    rotate_checkpoints(str(run_dir), limit, best, use_mtime=True)


# ---- Reading ----


def checkpoints(run_dir: Path) -> list[Path]:
    """The folders named `checkpoint-N`, from the latest step to the first."""
    steps = {path: re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)", path.name) for path in run_dir.glob("*/")}
    return sorted((path for path, step in steps.items() if step), key=lambda path: -int(steps[path][1]))


def flaw(folder: Path, contents: bool = True) -> str | None:
    """What keeps a checkpoint from being whole, `None` if nothing does.

    Args:
        folder: The checkpoint.
        contents: Whether to hash every file, which also finds those of the right size that hold something else.

    Example:
        ```python
        >>> import tempfile
        >>> from pathlib import Path
        >>> from hf_blockkd.training.checkpoints import flaw, seal
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     file = Path(folder, "model.safetensors")
        ...     _ = file.write_text("weights")
        ...     seal(Path(folder))
        ...     _ = file.write_text("wei")
        ...     flaw(Path(folder))
        'model.safetensors has 3 bytes instead of 7'

        ```
    """
    try:
        files = json.loads((folder / MANIFEST_NAME).read_text(encoding="utf-8"))["files"]
        expected = {name: (entry["size"], entry["sha256"]) for name, entry in files.items()}
    except FileNotFoundError:
        return f"{MANIFEST_NAME} is missing"
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{MANIFEST_NAME} cannot be read"
    for name, (size, digest) in expected.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes instead of {size}"
        if contents:
            with path.open("rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != digest:
                    return f"{name} does not hold what was written"
    return None


def find_checkpoint(run_dir: str | os.PathLike, wanted: str | os.PathLike | bool, searches: bool = True) -> str | None:
    """The whole checkpoint to resume from, the same on every process.

    Args:
        run_dir: Where a run writes its checkpoints.
        wanted: A checkpoint, or `True` for the latest whole one.
        searches: Whether this process is the one that looks.

    Returns:
        A path, or `None` where `True` finds no whole checkpoint; a warning names every torn one that was skipped.

    Raises:
        ValueError: If the checkpoint that was named is not whole.
    """
    wanted = wanted if str(wanted).lower() != "true" else True  # as a command line gives it
    found: list[Any] = [None, []]
    if searches:
        candidates = checkpoints(Path(run_dir)) if wanted is True else [Path(wanted)]
        for candidate in candidates:
            problem = flaw(candidate)
            if problem is None:
                found[0] = str(candidate)
                break
            found[1].append(f"{candidate} is not whole: {problem}")
    checkpoint, problems = broadcast_object_list(found)
    if wanted is not True and problems:
        raise ValueError(
            f"{problems[0]}; resume from a checkpoint that BlockwiseDistillTrainer wrote and nobody changed since, or "
            "with `resume_from_checkpoint=True` from the last whole one."
        )
    for problem in problems:
        logger.warning(f"{problem}; it is skipped.")
    if checkpoint is None:
        logger.warning(f"There is no whole checkpoint in {os.fspath(run_dir)!r}; training starts anew.")
    return checkpoint
