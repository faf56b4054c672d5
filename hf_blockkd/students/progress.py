"""How far the cut of a student has come: `bar`, and `bars_shown` for commands that are quiet otherwise."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from transformers.utils import logging


def bar(items: Iterable[Any], done: str, total: int | None = None) -> Iterable[Any]:
    """Show on stderr how many of some items are done, in the first process of a machine.

    transformers' `logging.disable_progress_bar()` switches it off.

    Args:
        items: What is gone through.
        done: What is counted.
        total: How many there are, where their container does not say.

    Example:
        ```python
        >>> from hf_blockkd.students.progress import bar
        >>> list(bar(range(3), "Layers fitted"))
        [0, 1, 2]

        ```
    """
    return logging.tqdm(items, desc=done, total=total, disable=os.environ.get("LOCAL_RANK", "0") != "0")


@contextmanager
def bars_shown() -> Iterator[None]:
    """Let a command that shows no bars, as of the files that it loads, show those in here."""
    logging.enable_progress_bar()
    try:
        yield
    finally:
        logging.disable_progress_bar()
