"""The pass of the teacher over the training data that fills its cache: `fill_cache`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from tqdm.auto import tqdm

from ..data.teacher_cache import TeacherCache, open_cache
from ..losses.top_k import TopK
from ..pairing.pair import Pair
from ..routing.entering import Extras, has_tensors
from ..routing.errors import UnsupportedArchitectureError
from .step import Step

if TYPE_CHECKING:
    from ..trainer import BlockwiseDistillTrainer


def fill_cache(trainer: BlockwiseDistillTrainer) -> TeacherCache:
    """Run the teacher on every training example that its cache does not know, each rank on its own ones.

    Args:
        trainer: Its collator is a `KeyedCollator` by now.
    """
    args, pair = trainer.args, trainer.pair
    cache = open_cache(args, pair, trainer.accelerator.mixed_precision)
    drop_last, args.dataloader_drop_last = args.dataloader_drop_last, False
    try:
        batches = trainer.get_test_dataloader(trainer.train_dataset)
    finally:
        args.dataloader_drop_last = drop_last

    def outputs(inputs: dict[str, Any]) -> tuple[list[int], torch.Tensor | TopK]:
        pair.check_batch(inputs)
        step = Step(pair, args, inputs)
        trainer._teach(step, "a training batch")
        check_extras(pair, step.extras["T"])
        with trainer.accelerator.autocast():
            head = None if step.chunk_size is None else pair.teacher_head
            return step.losses.counts(), cache.compress(step.teacher_rows, head)

    batches = tqdm(batches, "Teacher cache", disable=args.disable_tqdm)
    cache.fill((trainer._prepare_inputs(batch) for batch in batches), outputs, trainer.accelerator)
    return cache


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
