"""What a whole checkpoint is, and how the last one is found: `seal`, `flaw`, `find_checkpoint`."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import logging

MANIFEST_NAME = "checkpoint_manifest.json"
"""Holds size and hash of every other file of a checkpoint, and is written last."""
CHECKPOINT = re.compile(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)")
UNFINISHED, REPLACED, DELETED, KEPT = "_unfinished-", "_replaced-", "_deleted-", "_kept-"
"""Begin the names of folders that nothing must take for a checkpoint; the hub leaves them out, too.

What is being written, what gives way to another checkpoint of its step, what is being deleted, and what is not ours to
delete but was in the way.
"""

RESUME = "go on with `trainer.train(resume_from_checkpoint=True)`"

logger = logging.get_logger(__name__)


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


def flaw(folder: Path, contents: bool = True, files: Iterable[str] = ("*",)) -> str | None:
    """What keeps a checkpoint from being whole, `None` if nothing does.

    Args:
        folder: The checkpoint.
        contents: Whether to hash every file, which also finds those of the right size that hold something else.
        files: Patterns of the names that matter.

    Example:
        ```python
        >>> import tempfile
        >>> from pathlib import Path
        >>> from hf_blockkd.saving.checkpoints import flaw, seal
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
        entries = json.loads((folder / MANIFEST_NAME).read_text(encoding="utf-8"))["files"]
        expected = {name: (entry["size"], entry["sha256"]) for name, entry in entries.items()}
    except FileNotFoundError:
        return f"{MANIFEST_NAME} is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return f"{MANIFEST_NAME} cannot be read"
    for name, (size, digest) in expected.items():
        path = folder / name
        if not any(fnmatch(name, pattern) for pattern in files):
            continue
        try:
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != size:
                return f"{name} has {path.stat().st_size} bytes instead of {size}"
            if contents:
                with path.open("rb") as file:
                    if hashlib.file_digest(file, "sha256").hexdigest() != digest:
                        return f"{name} does not hold what was written"
        except OSError:
            return f"{name} cannot be read"
    return None


def checkpoints(run_dir: Path) -> list[Path]:
    """The folders named `checkpoint-N`, from the latest step to the first."""
    steps = {path: CHECKPOINT.fullmatch(path.name) for path in run_dir.glob("*/")}
    return sorted((path for path, step in steps.items() if step), key=lambda path: -int(steps[path][1]))


def restore_replaced(run_dir: Path) -> None:
    """Give a checkpoint its name back where a process was killed when it was about to replace it by another."""
    for replaced in run_dir.glob(f"{REPLACED}*/"):
        folder = replaced.with_name(replaced.name.removeprefix(REPLACED))
        is_free = CHECKPOINT.fullmatch(folder.name) and not os.path.lexists(folder)
        if is_free and not replaced.is_symlink() and flaw(replaced, contents=False) is None:
            try:
                replaced.rename(folder)
            except OSError as error:
                logger.warning(f"{replaced} could not be named {folder.name} again ({error}); rename it yourself.")


def find_checkpoint(
    run_dir: str | os.PathLike[str], wanted: str | os.PathLike[str] | bool, searches: bool = True
) -> str | None:
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
        restore_replaced(Path(run_dir) if wanted is True else Path(wanted).parent)
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
