"""A `Trainer` that saves, and measures, a student and its stepping stones as models of their own: `SavingTrainer`."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from ..connectors.attached import detached, load_connectors
from ..models.adapters import is_peft, merged_base
from ..objectives.base import Objective
from ..pairing.blocks import BlockMap
from ..pairing.pair import Pair
from ..saving.model_card import write_card
from ..saving.settings import save_settings
from ..saving.writing import save_student
from ..training.evaluating_trainer import EvaluatingTrainer
from .costs import model_costs
from .loading import load_stepping_stone
from .making import stone_model
from .stone_model import DESCRIPTION

LADDER_NAME = "ladder.jsonl"
"""Of the file that says what every model between student and teacher is worth, and costs."""


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
        self._refuse_shards("A stepping stone of models that are sharded over processes cannot be saved")
        if not self.args.should_save:
            return
        with detached(self.model):
            stone = self._stone_model(self._pair_as_saved(), index)
        (Path(folder) / DESCRIPTION).unlink(missing_ok=True)  # of a stone of two models that lies there
        stone.save_pretrained(folder)
        if self._processing is not None:
            self._processing.save_pretrained(folder)

    def evaluate_ladder(self, eval_dataset: Any = None, metric: str | None = None) -> list[dict[str, Any]]:
        """Evaluate student, stepping stones and teacher, and measure what each costs as a model of its own.

        It is written to `ladder.jsonl` in `output_dir`, which `hf-blockkd report` draws. Costs are those of the first
        batch of the evaluation, on this device, adapters merged; for a latency to rely on, let nothing run beside it.

        Args:
            eval_dataset: Default: that of the trainer.
            metric: Of those that an evaluation gives. Default: `"accuracy"`, where that is there, or else `"loss"`.

        Returns:
            From the student (unless the objective trains no head of its) over the stones that the objective runs (else
            those whose connectors train, or all) to the teacher: `rung`, `metric`, `test` (its value), `flops` of an
            example, `parameters`, `time` (seconds of a batch, the median of seven), `objective` and `seed`.

        Raises:
            ValueError: If an evaluation gives no such metric, the data has no labels, several data sets are given, or
                the models are sharded over processes.
            UnsupportedArchitectureError: As in `save_stepping_stone`.
        """
        self._refuse_shards("The costs of models that are sharded over processes cannot be told")
        eval_dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        if isinstance(eval_dataset, dict):
            raise ValueError(
                f"`eval_dataset` is a dict of {', '.join(map(repr, eval_dataset))}, but a ladder is measured on one "
                "data set; give one of them."
            )
        if self.has_no_labels(eval_dataset):
            raise ValueError("`eval_dataset` has no labels, so no model can be told how good it is; give one that has.")
        found = self.evaluate(eval_dataset)
        if not self.args.eval_stepping_stones:
            found |= self.evaluate_stepping_stones(eval_dataset)
        known = [name.removeprefix("eval_teacher_") for name in found if name.startswith("eval_teacher_")]
        known = [name for name in known if name != "model_preparation_time"]
        metric = ("accuracy" if "accuracy" in known else "loss") if metric is None else metric.removeprefix("eval_")
        if metric not in known:
            raise ValueError(f"`metric` is {metric!r}, which no evaluation gives; choose one of {', '.join(known)}.")
        batch = self._prepare_inputs(next(iter(self.get_eval_dataloader(eval_dataset))))
        # A stone sees the images as they come, and brings them to the size of the teacher's itself.
        teachers = self.pair.inputs_for("teacher", batch)
        stones = {name: batch.get(name, value) for name, value in teachers.items()}
        rungs = []

        def measure(rung: str, key: str, model: PreTrainedModel, inputs: dict[str, Any]) -> None:
            value, costs = found[f"eval_{key}{metric}"], model_costs(model, inputs, self.accelerator.autocast)
            run = {"objective": self.args.objective, "seed": self.args.seed}
            rungs.append({**run, "rung": rung, "metric": metric, "test": value, **costs})

        with detached(self.model):
            pair, trained = self._pair_as_saved(), self.pair.trained_stones
            if not self.objective.deploys_last_stone:
                measure("student", "", pair.student, pair.inputs_for("student", batch))
            for i in reversed(self.objective.stones(pair) or trained or range(1, len(self.block_map) + 1)):
                measure(f"stone {i}", f"stone_{i}_", self._stone_model(pair, i), stones)
            measure("teacher", "teacher_", self.teacher, teachers)
        if self.args.should_save:
            path = Path(self.args.output_dir, LADDER_NAME)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("".join(json.dumps(rung) + "\n" for rung in rungs), encoding="utf-8")
        return rungs

    def _pair_as_saved(self) -> Pair:
        """The pair with a student into which its adapter is merged."""
        student = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        return self.pair.with_student(merged_base(student)) if is_peft(student) else self.pair

    def _stone_model(self, pair: Pair, index: int) -> PreTrainedModel:
        with self.accelerator.autocast():  # in which the student runs anyway, and whose bits are compared
            return stone_model(pair, index, self.args.connector)

    def _refuse_shards(self, what: str) -> None:
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise ValueError(
                f"{what}; save the student, and make the stone of it and the teacher in one process "
                "(`hf_blockkd.ladder.making.stone_model`)."
            )

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if self.is_fsdp_enabled:  # whose checkpoints hold the connectors beside the student
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        # The connectors first: those of another run are refused before anything of the student is overwritten.
        load_connectors(self.pair.all_connectors, resume_from_checkpoint)
        with detached(self.model):
            if not self._loads_stone(resume_from_checkpoint):
                super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            super()._load_best_model()
            return
        best = self.state.best_model_checkpoint
        with detached(self.model):
            if not self._loads_stone(best):
                super()._load_best_model()
        load_connectors(self.pair.all_connectors, best)

    def _loads_stone(self, checkpoint: str) -> bool:
        """Load a student that is a stepping stone itself, which the stock trainer cannot read; whether it is one."""
        if not Path(checkpoint, DESCRIPTION).is_file():
            return False
        student = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        student.load_state_dict(load_stepping_stone(checkpoint).state_dict())
        return True
