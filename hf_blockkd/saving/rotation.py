"""Which checkpoints give way to others, and which are not ours to touch: `rotate`, `put_in_place`."""

from __future__ import annotations

import itertools
import os
import shutil
import stat
from pathlib import Path

from transformers.utils import logging

from .checkpoints import (
    CHECKPOINT,
    DELETED,
    KEPT,
    MANIFEST_NAME,
    REPLACED,
    UNFINISHED,
    checkpoints,
    flaw,
    restore_replaced,
)

logger = logging.get_logger(__name__)


def protection(folder: Path, contents: bool = True) -> str | None:
    """Why a folder is not ours to delete; `None` if it is a checkpoint of ours that nobody has touched since.

    Args:
        folder: Something that is named like a checkpoint.
        contents: As for `flaw`.
    """
    if folder.is_symlink():
        return "it is a link"
    if folder.is_dir() and not folder.stat().st_mode & stat.S_IWUSR:
        return "it is write-protected"
    return flaw(folder, contents)


def rotate(run_dir: Path, limit: int | None, last: Path, best: str | None = None) -> None:
    """Delete the oldest checkpoints of ours until `limit` are left; `last` and `best` always stay.

    What is not ours, or no longer as we wrote it, is neither counted nor deleted, and named in a warning once.

    Args:
        run_dir: Where the checkpoints are.
        limit: `save_total_limit`.
        last: The checkpoint to resume from.
        best: The one with the best metric.
    """
    if not limit or limit < 0:
        return
    ours = [one for one in checkpoints(run_dir) if not _stays(one, limit, protection(one, contents=False))]
    spared = [one for one in ours if any(_same(one, other) for other in (last, best) if other is not None)]
    surplus = len(ours) - max(limit, len(spared))
    for checkpoint in sorted(set(ours) - set(spared), key=_age):
        if surplus <= 0:
            break
        if not _stays(checkpoint, limit, protection(checkpoint)):
            _delete(checkpoint)
        surplus -= 1


def _stays(checkpoint: Path, limit: int, reason: str | None) -> bool:
    if reason is not None:
        logger.warning_once(f"{checkpoint} is kept, and not counted by `save_total_limit={limit}`: {reason}.")
    return reason is not None


def _same(checkpoint: Path, other: str | Path) -> bool:
    return os.path.realpath(checkpoint) == os.path.realpath(other)


def _age(checkpoint: Path) -> tuple[int, int]:
    """When a checkpoint became whole; steps decide where the file system does not tell."""
    return (checkpoint / MANIFEST_NAME).stat().st_mtime_ns, int(CHECKPOINT.fullmatch(checkpoint.name)[1])


def _delete(folder: Path) -> None:
    """Delete a folder, which a process that is killed meanwhile leaves under a name that says so."""
    deleted = folder.with_name(DELETED + CHECKPOINT.search(folder.name)[0])
    shutil.rmtree(deleted, ignore_errors=True)
    try:
        folder.rename(deleted)
    except OSError as error:
        logger.warning_once(f"{folder} could not be deleted ({error}); delete it yourself.")
    shutil.rmtree(deleted, ignore_errors=True)


def clear_left_overs(run_dir: Path) -> None:
    """Delete what a process of ours was writing or deleting when it was killed, and put back what it was replacing."""
    restore_replaced(run_dir)
    for prefix in (UNFINISHED, DELETED, REPLACED):
        for left_over in run_dir.glob(f"{prefix}*/"):
            folder = left_over.with_name(left_over.name.removeprefix(prefix))
            if left_over.is_symlink() or not CHECKPOINT.fullmatch(folder.name):
                continue
            if prefix != REPLACED:
                shutil.rmtree(left_over, ignore_errors=True)
            elif flaw(folder, contents=False) is None:
                _delete(left_over)


def put_in_place(unfinished: Path, folder: Path) -> None:
    """Rename a whole checkpoint, also over an older one of the same step; what is not ours there gets another name."""
    replaced = folder.with_name(REPLACED + folder.name)
    if os.path.lexists(folder):
        reason = protection(folder)
        if reason is None:
            folder.rename(replaced)
        else:
            _put_aside(folder, reason)
    unfinished.rename(folder)
    if replaced.is_dir():
        _delete(replaced)


def _put_aside(folder: Path, reason: str) -> None:
    names = (KEPT + folder.name + (f"-{n}" if n > 1 else "") for n in itertools.count(1))
    aside = next(path for path in map(folder.with_name, names) if not os.path.lexists(path))
    folder.rename(aside)
    logger.warning(f"{folder} is not replaced but kept as {aside.name}: {reason}.")
