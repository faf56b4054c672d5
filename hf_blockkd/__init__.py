"""Block-wise logit distillation for Hugging Face transformers."""

from __future__ import annotations

import importlib
import logging
import os
from typing import TYPE_CHECKING, Any

from .version import __version__ as __version__

if TYPE_CHECKING:
    from .public import *  # noqa: F403

# What every process finds out, the first one says.
if os.environ.get("LOCAL_RANK", "0") != "0":
    logging.getLogger(__name__).setLevel(logging.ERROR)


def __getattr__(name: str) -> Any:
    """Import torch and transformers when a name is first asked for, so that `hf-blockkd --help` need not."""
    public = importlib.import_module(".public", __name__)
    globals().update({one: getattr(public, one) for one in public.__all__}, __all__=public.__all__)
    if name not in globals():
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return globals()[name]


def __dir__() -> list[str]:
    """The same for what lists the names, such as a shell that completes them."""
    return sorted({*globals(), *__getattr__("__all__")})
