"""Feature hints: connected student states against the teacher's."""

from __future__ import annotations

import torch

from ..connectors.maps import connect
from ..losses.learners import LossWeights
from ..pairing.pair import Pair
from ..routing.head_positions import read_by_head
from ..training.step import Step
from .base import Objective


class FeatureHint(Objective):
    """Plain distillation, and the squared error of connected states after every block.

    FitNets (Romero et al., 2015, arXiv 1412.6550, eq. 3) hints at one layer, in a stage of its own; here all blocks are
    hinted at, along with the logits.
    """

    needs_teacher_states = True

    def weights_without_labels(self, pair: Pair) -> dict[str, float]:
        return super().weights_without_labels(pair) | {"hint_weight": self.args.hint_weight}

    def connectors(self, num_blocks: int) -> list[int]:
        return list(range(1, num_blocks + 1))

    def stones(self, pair: Pair) -> list[int]:
        return []

    def terms(self, step: Step) -> dict[str, tuple[torch.Tensor, float]]:
        errors = [state_error(step, i) for i in self.connectors(len(step.pair.block_map))]
        return {"hint": (sum(errors), self.args.hint_weight)}


class SimKD(FeatureHint):
    """The squared error of the last block's connected states alone (Chen et al., CVPR 2022, arXiv 2203.14001, eq. 3).

    What it trains is the student's body with the last connector under the teacher's head: stepping stone n, which is
    what the trainer evaluates. The student's own head gets no gradient, so what is saved is a body without a head
    that fits it; deploying it takes `connectors.safetensors` and the teacher's head.
    """

    student_weights = LossWeights(0.0, 0.0, 0.0)
    deploys_last_stone = True

    def weights_without_labels(self, pair: Pair) -> dict[str, float]:
        return {"hint_weight": self.args.hint_weight}

    def connectors(self, num_blocks: int) -> list[int]:
        return [num_blocks]

    def stones(self, pair: Pair) -> list[int]:
        return [len(pair.block_map)]


def state_error(step: Step, index: int, relative: bool = False) -> torch.Tensor:
    """Squared error between the student's connected states after block `index` and the teacher's.

    Positions count as in the divergences: where they are rows of their own, those that are distilled; elsewhere all of
    an example, padding left out, each example as much as it has rows. The mean over features, and over the positions of
    an example, is summed and divided by the number of rows that are distilled in the whole accumulation window.

    Args:
        step: After the clean passes.
        index: Of the block, from 1.
        relative: Divide each position's error by the mean square of the teacher's state there, and after the last block
            leave out those that its head does not read: that of a classifier may take the first token alone.
    """
    pair, losses = step.pair, step.losses
    ours = connect(pair.connectors[index - 1], step.states["S"][pair.block_map.student[index - 1]]).float()
    theirs = step.states["T"][pair.block_map.teacher[index - 1]].float()
    if ours.ndim == 3:
        is_class_index = losses.problem_type == "single_label_classification" and pair.task.form is None
        if pair.student.config.is_encoder_decoder:  # whose encoder has no labels
            is_class_index &= pair.stones.student_stack.layers in set(pair.student.get_decoder().modules())
        shape = pair.task.align(ours).shape[:-1]
        if is_class_index and shape == pair.task.labels(step.inputs).shape:
            ours, theirs = (losses.rows(pair.task.align(states)) for states in (ours, theirs))
            return _errors(ours, theirs, relative).sum() / losses.distill_mean.num_items
        mask = pair.position_mask(step.inputs, ours)
    else:  # a map is one position
        ours, theirs, mask = ours.flatten(1)[:, None], theirs.flatten(1)[:, None], None
    counts = losses.rows_of_examples()
    real = ours.new_ones(ours.shape[:2]) if mask is None else mask.to(ours)
    if relative and index == len(pair.block_map):
        real = read_by_head(pair.head_positions, real, step.inputs.get("attention_mask"))
    real = real.reshape(len(counts), -1)
    errors = _errors(*(states.flatten(0, 1) for states in (ours, theirs)), relative, real.flatten() > 0)
    per_example = errors.reshape(real.shape).sum(1) / real.sum(1).clamp(min=1)
    return (per_example * counts).sum() / losses.distill_mean.num_items


def _errors(
    ours: torch.Tensor, theirs: torch.Tensor, relative: bool, counts: torch.Tensor | None = None
) -> torch.Tensor:
    """Mean squared error of each row (N, D); 0 in those that do not count, before anything is divided by their size."""
    errors = (ours - theirs).square().mean(-1)
    if counts is not None:
        errors = errors.masked_fill(~counts, 0.0)
    if not relative:
        return errors
    sizes = theirs.square().mean(-1)
    # States of padding are zero in some models; a position that counts and whose state nearly is must not outweigh all.
    least = sizes.mean() * torch.finfo(sizes.dtype).eps if len(sizes) else sizes.new_zeros(())
    return errors / torch.maximum(sizes, least.clamp(min=torch.finfo(sizes.dtype).tiny))
