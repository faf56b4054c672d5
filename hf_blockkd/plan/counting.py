"""Counting what a training step takes, by computing one: what `make_plan` is made of."""

from __future__ import annotations

import copy
import logging
import tempfile
import warnings
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch.nn.modules.batchnorm import _BatchNorm
from transformers import PreTrainedModel

from ..config import BlockwiseDistillConfig
from ..connectors.geometry import IMAGES, resize
from ..data.calibration import NUM_EXAMPLES
from ..models.flops import flop_counter
from ..routing.dummy_inputs import dummy_inputs
from ..trainer import BlockwiseDistillTrainer
from ..training.connector_start import stones_to_fit
from ..training.step import Step

SEQUENCE_LENGTH = 128
"""Tokens per example where none are asked for; less where a model has fewer positions."""


@contextmanager
def quietly() -> Iterator[None]:
    """Without warnings: what they would say of a run does not matter where nothing trains."""
    loggers = {logger: logger.level for logger in map(logging.getLogger, ("hf_blockkd", "transformers"))}
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in loggers.items():
            logger.setLevel(level)


@contextmanager
def counting_trainer(
    student: PreTrainedModel, teacher: PreTrainedModel, args: BlockwiseDistillConfig, **changes: Any
) -> Iterator[BlockwiseDistillTrainer]:
    """A trainer which leaves nothing on the disk, on the hub, or on the student.

    Args:
        student: The student.
        teacher: The teacher.
        args: The configuration that will train.
        **changes: Fields in which that of the trainer differs.
    """
    args = copy.copy(args)
    args.push_to_hub, args.report_to = False, []
    args.teacher_cache = args.captured_columns = None  # which no dummy batch has
    args.eval_strategy, args.load_best_model_at_end, args.activation_checkpointing = "no", False, False
    for name, value in changes.items():
        setattr(args, name, value)
    was_training = student.training
    try:
        with quietly(), tempfile.TemporaryDirectory() as args.output_dir:
            trainer = BlockwiseDistillTrainer(model=student, teacher_model=teacher, args=args)
            trainer.pair.prefix.limit = 0  # what it saves depends on the stones
            yield trainer
    finally:
        student.train(was_training)


def assume_fitted(trainer: BlockwiseDistillTrainer, args: BlockwiseDistillConfig) -> None:
    """Let a trainer go on as in a run with examples enough to fit connectors to.

    Args:
        trainer: From `counting_trainer`.
        args: What that was given.
    """
    enough = partial(range, NUM_EXAMPLES)
    start = args.connector_start, enough, trainer.teacher_is_base
    trainer.pair.fitted_stones = [] if args.stores_teacher else stones_to_fit(trainer.pair, *start)


def count_stones(
    trainer: BlockwiseDistillTrainer,
    stones: Sequence[int],
    batch: dict[str, torch.Tensor],
    stone_weight: float = 1.0,
    state_weight: float = 0.0,
) -> tuple[int, int]:
    """What `count_step` counts with some stones of a trainer with all of them, with errors of states or without."""
    # All that sets the settings apart.
    trainer.pair.trained_stones, trainer.args.stepping_stones = list(stones), list(stones) or "none"
    trainer.args.stone_weight, trainer.args.state_weight = stone_weight, state_weight
    return count_step(trainer, batch)


def count_step(trainer: BlockwiseDistillTrainer, batch: dict[str, torch.Tensor]) -> tuple[int, int]:
    """FLOPs of the trainer's loss, forward and backward, and the bytes that the forward keeps for the backward."""
    models = (trainer.model, trainer.teacher, trainer.pair.all_connectors)
    # By the storage itself: without values, no tensor has an address.
    weights = {p.untyped_storage()._cdata for model in models for p in (*model.parameters(), *model.buffers())}
    saved: list[weakref.ref[torch.Tensor]] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(weakref.ref(tensor))
        return tensor

    with flop_counter() as counter:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), trainer.accelerator.autocast():
            loss = trainer.compute_loss(training_model(trainer), batch)
        # Not those that were freed on the way: a chunked loss differentiates the logits of each chunk at once.
        storages = [tensor.untyped_storage() for reference in saved if (tensor := reference()) is not None]
        kept = {storage._cdata: storage.nbytes() for storage in storages}
        loss.backward()
    for model in models:
        model.zero_grad(set_to_none=True)
    return counter.get_total_flops(), sum(size for pointer, size in kept.items() if pointer not in weights)


def training_model(trainer: BlockwiseDistillTrainer) -> PreTrainedModel:
    """The student in train mode, but for batch norms: one example is no batch, and their statistics are to stay."""
    model = trainer.model.train()
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            module.eval()
    return model


def prepare_batches(
    trainer: BlockwiseDistillTrainer, batch_size: int, length: int | None
) -> list[dict[str, torch.Tensor]]:
    """Batches of one and of two examples, whose loss is computed in chunks if, and only if, that of `batch_size` is."""
    batches = [labelled_batch(trainer, size, length) for size in (1, 2)]
    _chunk_as_at(trainer, batch_size, batches[0])
    return batches


def _chunk_as_at(trainer: BlockwiseDistillTrainer, batch_size: int, example: dict[str, torch.Tensor]) -> None:
    """Let the trainer compute the loss of one example in chunks if, and only if, it does so at `batch_size`."""
    if trainer.pair.task.form is not None:
        return
    batch = {name: torch.cat([tensor] * batch_size) for name, tensor in example.items()}
    size = Step(trainer.pair, trainer.args, batch).logits.chunk_size
    trainer.args.loss_chunk_size = 0 if size is None else min(size, trainer.pair.task.labels(example).numel() - 1)


def labelled_batch(trainer: BlockwiseDistillTrainer, batch_size: int, length: int | None) -> dict[str, torch.Tensor]:
    """A batch with labels, on which the trainer has passed its self-test."""
    models = (trainer.teacher, trainer.model)  # images are the student's
    inputs: dict[str, torch.Tensor] = {}
    # The model with fewer tokens has the last word: its ids are known to both.
    for model in sorted(models, key=lambda model: -(getattr(model.config.get_text_config(), "vocab_size", None) or 0)):
        inputs |= dummy_inputs(model, batch_size)
    if trainer.pair.geometry.size is not None:
        inputs[IMAGES] = resize(inputs[IMAGES], trainer.pair.geometry.size)
    if "input_ids" in inputs:
        limits = [getattr(model.config.get_text_config(), "max_position_embeddings", None) for model in models]
        length = min([SEQUENCE_LENGTH, *filter(None, limits)]) if length is None else length
        inputs = {name: _of_length(tensor, length) for name, tensor in inputs.items()}
    elif length is not None:
        raise ValueError(
            f"`sequence_length` is {length}, but {type(trainer.model).__name__} takes images; leave it out."
        )
    try:
        shape = trainer.stepping_stone_logits(inputs)[1].shape
    except (IndexError, RuntimeError) as error:
        if "input_ids" not in inputs:
            raise
        raise ValueError(
            f"The models do not run on examples of {length} tokens ({str(error).splitlines()[0]}); set "
            "`sequence_length` to what their position embeddings allow."
        ) from error
    device = trainer.model.device
    if trainer.pair.task.form is not None:  # what a loss of its own costs is next to nothing
        inputs["labels"] = trainer.pair.task.form.missing(batch_size)
    elif trainer.pair.task.problem_type in ("regression", "multi_label_classification"):
        inputs["labels"] = torch.zeros(shape, device=device)
    elif len(trainer.pair.task.label_names) > 1:
        inputs |= {
            name: torch.zeros(batch_size, dtype=torch.long, device=device) for name in trainer.pair.task.label_names
        }
    else:
        inputs["labels"] = torch.zeros(shape[:-1], dtype=torch.long, device=device)
    with torch.no_grad():
        trainer.compute_loss(training_model(trainer), inputs)
    return inputs


def _of_length(tensor: torch.Tensor, length: int) -> torch.Tensor:
    """Texts of `length` tokens, by repeating the given ones; what is no text stays as it is."""
    if tensor.is_floating_point():
        return tensor
    repeats = -(-length // tensor.shape[-1])
    return torch.cat([tensor] * repeats, dim=-1)[..., :length]
