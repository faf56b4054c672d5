"""A `Trainer` that saves a plain student, and its stepping stones as models of their own: `SavingTrainer`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from torch import nn

from ..connectors.attached import detached, load_connectors
from ..models.adapters import is_peft, merged_base
from ..objectives.base import Objective
from ..pairing.blocks import BlockMap
from ..saving.model_card import write_card
from ..saving.settings import save_settings
from ..saving.writing import save_student
from ..training.evaluating_trainer import EvaluatingTrainer
from .making import stone_model
from .stone_model import DESCRIPTION


class SavingTrainer(EvaluatingTrainer):
    """The student that it saves needs none of our code; connectors, settings, blocks and a card stand beside it.

    Attributes:
        objective: What trains.
        block_map: The cut of both stacks.
    """

    objective: Objective
    block_map: BlockMap

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        if not self.args.should_save:
            return
        folder = self.args.output_dir if output_dir is None else output_dir
        student = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        save_student(student, self.pair.all_connectors, folder, self._processing, state_dict, self.pair.pooling)
        save_settings(self.args, self.objective.resolved(self.pair), folder)
        self.block_map.save(folder)  # for `hf-blockkd report`
        write_card(self, folder)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """As in `Trainer`; see `hf_blockkd.saving.model_card.write_card`."""
        if self.is_world_process_zero():
            write_card(self, self.args.output_dir, *args, **kwargs)

    @property
    def _processing(self) -> Any:
        """What is saved beside a model: the processing class, or the collator's tokenizer."""
        return self.processing_class or getattr(self.data_collator, "tokenizer", None)

    def save_stepping_stone(self, index: int, folder: str | os.PathLike[str]) -> None:
        """Save a stepping stone as a model of its own, with the processing class, for [`load_stepping_stone`].

        It holds the student's blocks up to this one, the connector, and the teacher's layers after it with its head.
        Where the connector is the identity (`connector="identity"`, `train_connectors=False`) and both models are of
        one class and shape, it is a plain model of that class, which `from_pretrained` loads without our code.

        Args:
            index: Of the stone, from 1 to n.
            folder: Where to; made if need be.

        Raises:
            ValueError: If there is no such stone, or the models are sharded over processes.
            UnsupportedArchitectureError: If the teacher's layers read more than hidden states of those before them.
        """
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise ValueError(
                "A stepping stone of models that are sharded over processes cannot be saved; save the student, and "
                "make the stone of it and the teacher in one process (`hf_blockkd.ladder.making.stone_model`)."
            )
        if not self.args.should_save:
            return
        student = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        with detached(self.model):
            pair = self.pair.with_student(merged_base(student)) if is_peft(student) else self.pair
            stone = stone_model(pair, index, self.args.connector)
        (Path(folder) / DESCRIPTION).unlink(missing_ok=True)  # of a stone of two models that lies there
        stone.save_pretrained(folder)
        if self._processing is not None:
            self._processing.save_pretrained(folder)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if self.is_fsdp_enabled:  # whose checkpoints hold the connectors beside the student
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        # The connectors first: those of another run are refused before anything of the student is overwritten.
        load_connectors(self.pair.all_connectors, resume_from_checkpoint)
        with detached(self.model):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            super()._load_best_model()
            return
        with detached(self.model):
            super()._load_best_model()
        load_connectors(self.pair.all_connectors, self.state.best_model_checkpoint)
