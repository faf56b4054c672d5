"""Where a step has the teacher's rows from: a clean pass, its cache, or columns that were captured."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from ..config import BlockwiseDistillConfig
from ..data.captured import captured_rows
from ..data.example_keys import data_fingerprint
from ..data.teacher_cache import TeacherCache, open_cache
from ..losses.top_k import TopK
from ..pairing.pair import Pair
from ..routing.entering import Extras
from ..routing.errors import UnsupportedArchitectureError
from ..routing.examples import has_tensors
from .faults import check_teacher
from .step import Step


class TeacherRows:
    """Gives steps the teacher's rows, of which a cache and captured columns spare the clean pass.

    Args:
        pair: The models.
        args: The configuration.
        accelerator: Of the run.
        is_needed: Whether the objective looks at the teacher at all.
    """

    def __init__(self, pair: Pair, args: BlockwiseDistillConfig, accelerator: Accelerator, is_needed: bool) -> None:
        self.pair, self.args, self.accelerator, self.is_needed = pair, args, accelerator, is_needed
        self._cache: TeacherCache | None = None
        self._extras: Extras = {}

    @property
    def are_entered(self) -> bool:
        """Whether the teacher runs in training at all, if only from its middle."""
        is_captured = self.args.captured_columns is not None
        return self.is_needed and not (is_captured and not self.pair.trained_stones)

    def give(self, step: Step, keys: torch.Tensor | None, with_states: bool) -> None:
        """Give a step the teacher's rows.

        Args:
            step: On which nothing has run yet.
            keys: Of its examples, where there is a cache.
            with_states: Whether its states at the ends of blocks are asked for, too, which only a clean pass has.
        """
        if keys is not None:
            step.teacher_rows = self._cache.rows(keys.tolist(), step.losses.counts(), keys.device)
            step.extras["T"] = self._extras
        elif self.args.captured_columns is not None:
            step.teacher_rows = captured_rows(step.inputs, step.losses, self.pair.common_classes)
            step.extras["T"] = self._extras
        elif self.is_needed:
            with self.accelerator.autocast():
                step.teach(with_states)

    def keep(self, extras: Extras) -> None:
        """Keep what the teacher's layers hand on besides states, where no clean pass will say it again.

        Raises:
            UnsupportedArchitectureError: If it depends on the batch.
        """
        if self.args.stores_teacher:
            self._extras = check_extras(self.pair, extras)

    def fill(self, loader: Callable[[], DataLoader[Any]], prepare: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
        """Run the teacher on every training example that its cache does not know, if there is one.

        Each rank runs it on its own ones.

        Args:
            loader: Gives all of the training set, of a `KeyedCollator`.
            prepare: Brings its batches to the device.
        """
        self._cache = None
        if self.args.teacher_cache is None:
            return
        pair, args, accelerator = self.pair, self.args, self.accelerator
        cache = open_cache(args, pair, accelerator.mixed_precision)

        def outputs(inputs: dict[str, Any]) -> tuple[list[int], torch.Tensor | TopK]:
            pair.check_batch(inputs)
            step = Step(pair, args, inputs)
            with accelerator.autocast():
                step.teach()
            check_teacher(step, "a training batch")
            check_extras(pair, step.extras["T"])
            with accelerator.autocast():
                return step.losses.counts(), cache.compress(step.teacher_rows, step.logits.teacher_head)

        batches = loader()
        shown = map(prepare, tqdm(batches, "Teacher cache", disable=args.disable_tqdm))
        cache.fill(shown, outputs, accelerator, data_fingerprint(batches))
        self._cache = cache


def check_extras(pair: Pair, extras: Extras) -> Extras:
    """What the layers hand on, which must not depend on the batch where there is no clean pass to read it off.

    Raises:
        UnsupportedArchitectureError: If it does, and there are stepping stones.
    """
    if pair.trained_stones and has_tensors(extras):
        raise UnsupportedArchitectureError(
            f"The layers of {type(pair.teacher).__name__} hand on more than hidden states, which stepping stones need "
            "of the clean pass that `teacher_cache` saves; set it to None, or `stepping_stones` to 'none'."
        )
    return extras
