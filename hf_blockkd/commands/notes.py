"""What a killed `hf-blockkd distill` knows when it is given again: `Notes`."""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from ..models.cut import Cut
from ..models.loading import load_model
from ..saving.checkpoints import checkpoints, flaw
from .cut import holds_something

NOTES_NAME = "distill.json"
"""In the student's folder: what was asked for and found before training, for a command that is given again."""


@dataclass
class Notes:
    """What was asked for, and found before training.

    Attributes:
        folder: Of the student.
        asked: Options and values.
        found: The figures of the student before training.
        checkpoint: The last that is whole.
    """

    folder: Path
    asked: dict[str, Any]
    found: dict[str, Any]
    checkpoint: str | None

    @classmethod
    def of(cls, args: argparse.Namespace) -> Notes:
        """Read them.

        Raises:
            ValueError: If the folder holds something else, or a run with other options.
        """
        asked = {name: value for name, value in vars(args).items() if name != "output"}
        path = args.output / NOTES_NAME
        if not holds_something(args.output, args.teacher):
            return cls(args.output, asked, {}, None)
        if not path.is_file():
            raise ValueError(f"`output` is {str(args.output)!r}, which holds something else; name another folder.")
        try:
            notes = json.loads(path.read_text(encoding="utf-8"))
            before, found = notes["asked"], notes["found"]
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"{path} cannot be read; name another `output`, or delete that folder.") from None
        whole = (str(one) for one in checkpoints(args.output) if flaw(one) is None)
        checkpoint = next(whole, None) if found else None
        if checkpoint is None and not any(args.output.glob("*.safetensors")):
            return cls(args.output, asked, {}, None)  # refused or killed early: nothing to lose, whatever was asked for
        for name, value in asked.items():
            if before.get(name) != value:
                raise ValueError(
                    f"`{name}` is {value!r}, but {before.get(name)!r} in the run that {str(args.output)!r} holds; say "
                    "the same to go on with it, or name another `output`."
                )
        return cls(args.output, asked, found if checkpoint else {}, checkpoint)

    def student(self) -> PreTrainedModel | None:
        """That of the checkpoint, if there is one."""
        if self.checkpoint is None:
            return None
        student = load_model(self.checkpoint)
        student.cut = Cut.load(self.checkpoint)
        student.config.name_or_path = ""  # the card would take that of a checkpoint for a model on the hub
        return student

    def begin(self) -> None:
        """From now on the folder belongs to this run."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self.write()

    def write(self) -> None:
        """Keep them in the folder."""
        text = json.dumps({"asked": self.asked, "found": self.found}, indent=2)
        (self.folder / NOTES_NAME).write_text(text + "\n", encoding="utf-8")
