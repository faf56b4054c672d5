"""A `Trainer` whose runs survive what interrupts them: `ResumableTrainer`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from torch import nn
from torch.utils.data import DataLoader
from transformers import Trainer
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_jit_checkpoint import JITCheckpointCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, TrainOutput

from ..data.seeding import begin_epoch, seed_batches
from ..models.loading import WEIGHT_FILES
from .checkpoints import MANIFEST_NAME, find_checkpoint, flaw
from .rotation import protection, rotate
from .sigterm import CheckpointOnSigterm
from .writing import callback_states, made_whole


class ResumableTrainer(Trainer):
    """Checkpoints that are there whole or not at all, and random transforms that come out the same after a resume.

    A run that was killed and resumed ends with the same bits as one that was not interrupted. Nothing here is about
    distillation.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.args.enable_jit_checkpoint:
            self.add_callback(CheckpointOnSigterm(self.pop_callback(JITCheckpointCallback)))

    def find_checkpoint(self, wanted: str | os.PathLike[str] | bool | None) -> str | None:
        """The whole checkpoint that `resume_from_checkpoint` asks for; `None` where it asks for none, or finds none.

        Raises:
            ValueError: If the checkpoint that was named is not whole.
        """
        return find_checkpoint(self.args.output_dir, wanted, self.is_world_process_zero()) if wanted else None

    def get_train_dataloader(self) -> DataLoader[Any]:
        loader = super().get_train_dataloader()
        seed_batches(loader, self.args.seed_of_data)
        return loader

    def _run_epoch(self, *args: Any, epoch: int, train_dataloader: DataLoader[Any], **kwargs: Any) -> None:
        # Resumed from its last checkpoint in the midst of an epoch, a run that is through would go on for a step.
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        begin_epoch(train_dataloader, epoch)
        super()._run_epoch(*args, epoch=epoch, train_dataloader=train_dataloader, **kwargs)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """The stock layout, under its own name only once it is whole; old checkpoints go after that."""
        args, state = self.args, self.state
        run_dir = Path(self._get_output_dir(trial))
        folder = run_dir / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
        self.store_flos()
        if state.best_global_step:
            best = run_dir / f"{PREFIX_CHECKPOINT_DIR}-{state.best_global_step}"
            if best == folder or (best / MANIFEST_NAME).is_file():  # somebody else may have saved at that step
                state.best_model_checkpoint = str(best)
        with made_whole(folder, self.accelerator, args.should_save) as unfinished:
            self.save_model(str(unfinished), _internal_call=True)
            if not args.save_only_model:
                self._save_optimizer_and_scheduler(str(unfinished))
                self._save_scaler(str(unfinished))
                self._save_rng_state(str(unfinished))
            if args.should_save:
                state.stateful_callbacks = callback_states((*self.callback_handler.callbacks, self.control))
                state.save_to_json(str(unfinished / TRAINER_STATE_NAME))
        if args.push_to_hub:
            self.create_model_card()
            self._push_from_checkpoint(str(folder))
        if args.should_save:
            rotate(run_dir, args.save_total_limit, folder, state.best_model_checkpoint)

    def _finalize_training(self, trial: Any, *args: Any) -> TrainOutput:
        """With a limit of 1, the best checkpoint alone stays, but nothing is deleted that is not ours."""
        # The stock trainer would delete whatever is named like a checkpoint.
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            output = super()._finalize_training(trial, *args)
        finally:
            self.args.save_total_limit = limit
        best = self.state.best_model_checkpoint
        is_chosen = self.args.load_best_model_at_end and best is not None and limit == 1
        if self.args.should_save and is_chosen and protection(Path(best)) is None:
            rotate(Path(self._get_output_dir(trial)), limit, Path(best))
        return output

    def _load_best_model(self) -> None:
        # Sharded runs read folders of their own, optimizer included.
        files = ("*",) if self.is_fsdp_enabled or self.is_deepspeed_enabled else (*WEIGHT_FILES, "adapter_config.json")
        problem = flaw(Path(self.state.best_model_checkpoint), files=files)
        if problem:
            raise ValueError(
                f"The best checkpoint {self.state.best_model_checkpoint} is not whole: {problem}; training is over and "
                "its last checkpoint is untouched, so load that one, or train with `load_best_model_at_end=False`."
            )
        super()._load_best_model()
