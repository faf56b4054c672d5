"""With what a run trained, beside its student: its arguments, and what it made of those left to it, `save_settings`."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import TrainingArguments

ARGS_NAME = "training_args.json"
RESOLVED_NAME = "resolved_args.json"


def save_settings(args: TrainingArguments, resolved: Mapping[str, Any], folder: str | os.PathLike[str]) -> None:
    """Write both files.

    Args:
        args: The arguments, as they are.
        resolved: Fields whose defaults depend on the run, as `Objective.resolved` has them.
        folder: Where to.

    Example:
        ```python
        >>> import json, tempfile
        >>> from pathlib import Path
        >>> from hf_blockkd import BlockwiseDistillConfig
        >>> from hf_blockkd.saving.settings import RESOLVED_NAME, save_settings
        >>> folder = tempfile.mkdtemp()
        >>> save_settings(BlockwiseDistillConfig("student"), {"state_weight": 5.0}, folder)
        >>> json.loads(Path(folder, RESOLVED_NAME).read_text())
        {'state_weight': 5.0}

        ```
    """
    Path(folder, ARGS_NAME).write_text(args.to_json_string(), encoding="utf-8")
    Path(folder, RESOLVED_NAME).write_text(json.dumps(dict(resolved), indent=2) + "\n", encoding="utf-8")
