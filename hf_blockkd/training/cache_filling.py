"""The pass of the teacher over the training data that fills its cache: `fill_cache`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from ..config import BlockwiseDistillConfig
from ..data.example_keys import data_fingerprint
from ..data.teacher_cache import TeacherCache
from ..losses.top_k import TopK
from ..pairing.pair import Pair
from ..routing.entering import Extras
from ..routing.errors import UnsupportedArchitectureError
from ..routing.examples import has_tensors
from .faults import check_teacher
from .step import Step


def fill_cache(
    cache: TeacherCache,
    pair: Pair,
    args: BlockwiseDistillConfig,
    loader: DataLoader,
    prepare: Callable[[dict[str, Any]], dict[str, Any]],
    accelerator: Accelerator,
) -> None:
    """Run the teacher on every training example that its cache does not know, each rank on its own ones.

    Args:
        cache: The cache.
        pair: The models.
        args: The configuration.
        loader: All of the training set, of a `KeyedCollator`.
        prepare: Brings its batches to the device.
        accelerator: Of the run.
    """

    def outputs(inputs: dict[str, Any]) -> tuple[list[int], torch.Tensor | TopK]:
        pair.check_batch(inputs)
        step = Step(pair, args, inputs)
        with accelerator.autocast():
            step.teach()
        check_teacher(step, "a training batch")
        check_extras(pair, step.extras["T"])
        with accelerator.autocast():
            return step.losses.counts(), cache.compress(step.teacher_rows, step.logits.teacher_head)

    def batches() -> Iterator[dict[str, Any]]:
        yield from map(prepare, tqdm(loader, "Teacher cache", disable=args.disable_tqdm))

    cache.fill(batches(), outputs, accelerator, data_fingerprint(loader))


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
