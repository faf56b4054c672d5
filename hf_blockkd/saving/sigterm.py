"""A checkpoint when the machine is about to be taken away: `CheckpointOnSigterm`."""

from __future__ import annotations

from typing import Any

import torch
from transformers import TrainerControl
from transformers.trainer_jit_checkpoint import JITCheckpointCallback


class CheckpointOnSigterm(JITCheckpointCallback):
    """What `enable_jit_checkpoint` does on SIGTERM, but between two steps, and on all processes after the same step.

    The stock callback mostly saves in the midst of a step, when its dropout has been drawn but its update not been
    made, and each process does so at a step of its own. A run resumed from there would differ from an unbroken one,
    and several processes would wait for each other for ever.

    Args:
        stock: The callback that `Trainer` made; its signal handler is kept.
    """

    def __init__(self, stock: JITCheckpointCallback) -> None:
        super().__init__()
        self.trainer, self.jit_manager = stock.trainer, stock.jit_manager
        self.is_due = False

    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        pass

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        pass

    def on_step_end(self, args: Any, state: Any, control: TrainerControl, **kwargs: Any) -> None:
        accelerator = self.trainer.accelerator
        requested = self.jit_manager.is_checkpoint_requested
        if accelerator.num_processes > 1:
            requested = accelerator.reduce(torch.tensor([float(requested)], device=accelerator.device)).item() > 0
        if requested:
            self.is_due = control.should_save = control.should_training_stop = True

    def on_epoch_end(self, args: Any, state: Any, control: TrainerControl, **kwargs: Any) -> None:
        # An evaluation of `save_strategy="best"` may have found that this step is not worth saving.
        control.should_save = control.should_save or self.is_due

    def on_save(self, *args: Any, **kwargs: Any) -> None:
        self.is_due = self.jit_manager.is_checkpoint_requested = False
