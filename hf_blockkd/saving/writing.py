"""How a checkpoint is written, whole or not at all, and the student in it: `save_student`, `made_whole`."""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate import Accelerator
from torch import nn
from transformers import PreTrainedModel
from transformers.trainer_callback import ExportableState

from ..connectors.attached import detached, save_connectors, without_connectors
from ..models.adapters import is_peft
from ..models.cut import CUT_NAME, Cut
from ..models.pooling import Pooling, save_pooling
from .checkpoints import RESUME, UNFINISHED, checkpoints, flaw, restore_replaced, seal
from .model_card import CARD_NAME, unchanged
from .rotation import clear_left_overs, put_in_place

if TYPE_CHECKING:
    from peft import PeftModel

CURES = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), "make room"),
    **dict.fromkeys((errno.EROFS, errno.EACCES, errno.EPERM), "make it writable"),
}
"""What helps where a file could not be written; whatever else goes wrong in a save is told as it is."""


def save_student(
    student: PreTrainedModel | PeftModel,
    connectors: nn.ModuleList,
    folder: str | os.PathLike[str],
    processing: Any = None,
    full_state: dict[str, Any] | None = None,
    pooling: Pooling | None = None,
) -> None:
    """Save a student that needs none of our code, its processing class, and beside it the connectors and its cut.

    Args:
        student: The student, with the connectors on it.
        connectors: These.
        folder: Where to; made if need be.
        processing: Tokenizer or image processor.
        full_state: Weights of student and connectors, where the student's own are sharded.
        pooling: Of the states of a student without a head: one of texts becomes a folder of sentence-transformers.
    """
    os.makedirs(folder, exist_ok=True)
    # The stock resume reads the file back raw, which fails for models whose hub checkpoints use older key names.
    key_names = {} if is_peft(student) else {"save_original_format": False}
    with detached(student), unchanged(Path(folder, CARD_NAME)):
        weights = student.state_dict() if full_state is None else without_connectors(full_state)
        student.save_pretrained(folder, state_dict=weights, **key_names)
    if processing is not None:
        processing.save_pretrained(folder)
    cut = getattr(student, "cut", None)
    if isinstance(cut, Cut):
        cut.save(folder)
    else:  # that of an older student would be taken for this one's
        Path(folder, CUT_NAME).unlink(missing_ok=True)
    save_pooling(student, pooling, folder)
    save_connectors(connectors, folder, full_state)


@contextmanager
def made_whole(folder: Path, accelerator: Accelerator, writes: bool) -> Iterator[Path]:
    """A folder for all processes to write to, which becomes a checkpoint, under its own name, when it is whole.

    A process that is killed at any moment leaves the checkpoints before it as they were. So does an exception, after
    which nothing is left of this checkpoint; unless it tells of the disk it goes on as it is, with a note that names
    the last whole checkpoint.

    Args:
        folder: The checkpoint.
        accelerator: Of the run; every process enters this context at the same step.
        writes: Whether this process makes the folder and names it.

    Raises:
        OSError: If the disk is full, or may not be written to.
    """
    unfinished = folder.with_name(UNFINISHED + folder.name)
    try:
        if writes:
            clear_left_overs(folder.parent)
            unfinished.mkdir(parents=True)
        accelerator.wait_for_everyone()
        yield unfinished
        accelerator.wait_for_everyone()
        if writes:
            seal(unfinished)
            put_in_place(unfinished, folder)
    except BaseException as error:
        if writes:
            restore_replaced(folder.parent)
            shutil.rmtree(unfinished, ignore_errors=True)
        whole = (other for other in checkpoints(folder.parent) if flaw(other, contents=False) is None)
        last = next((f"{other} before it is untouched" for other in whole), None)
        cure = CURES.get(_errno(error))
        if cure is None:
            error.add_note(f"{folder} was not written; {last or 'no checkpoint was written before it'}.")
            raise
        raise OSError(
            f"{folder} could not be written ({error}); "
            + ("no checkpoint was written before it, so " if last is None else f"{last}: ")
            + f"{cure} or name another `output_dir`, and {RESUME}."
        ) from error


def _errno(error: BaseException) -> int | None:
    """The error number of the system, wherever a library tells it."""
    if isinstance(error, OSError):
        return error.errno
    # Libraries in Rust (safetensors, tokenizers) tell it in their text, and torch only that it could not write.
    told = re.search(r"\(os error (\d+)\)", str(error))
    if told:
        return int(told[1])
    is_of_writer = re.search("PytorchStreamWriter|inline_container|iostream", str(error))
    return errno.ENOSPC if isinstance(error, RuntimeError) and is_of_writer else None


def callback_states(callbacks: Iterable[Any]) -> dict[str, Any]:
    """The states of callbacks that have one, as `Trainer` keeps them in its own."""
    states: dict[str, Any] = {}
    for callback in callbacks:
        if isinstance(callback, ExportableState):
            states.setdefault(type(callback).__name__, []).append(callback.state())
    return {name: found if len(found) > 1 else found[0] for name, found in states.items()}
