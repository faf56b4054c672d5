"""Feature hints: connected student states against the teacher's."""

from __future__ import annotations

import torch

from ..connectors.maps import connect
from ..losses.learners import LossWeights
from ..training.step import Step
from .base import Objective


class FeatureHint(Objective):
    """Plain distillation, and the squared error of connected states after every block.

    FitNets (Romero et al., 2015, arXiv 1412.6550, eq. 3) hints at one layer, in a stage of its own; here all blocks are
    hinted at, along with the logits.
    """

    needs_teacher_states = True

    def connectors(self, num_blocks: int) -> list[int]:
        return list(range(1, num_blocks + 1))

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

    def connectors(self, num_blocks: int) -> list[int]:
        return [num_blocks]


def state_error(step: Step, index: int, relative: bool = False) -> torch.Tensor:
    """Squared error between the student's connected states after block `index` and the teacher's.

    The mean over features, and over the positions of an example (padding left out), or, where positions have labels of
    their own, at those that have one; summed over examples or labels and divided by the number of all, as every loss
    is. If `relative`, errors are divided by the mean square of the teacher's state at the same position.
    """
    pair, losses = step.pair, step.losses
    ours = connect(pair.connectors[index - 1], step.states["S"][pair.block_map.student[index - 1]]).float()
    theirs = step.states["T"][pair.block_map.teacher[index - 1]].float()
    errors, sizes = (ours - theirs).square(), theirs.square()
    if errors.ndim == 3:
        errors, sizes = errors.mean(-1), sizes.mean(-1)
    else:  # maps
        errors, sizes = errors.flatten(1), sizes.flatten(1).mean(1, keepdim=True)
    if relative:
        errors = errors / sizes.clamp(min=torch.finfo(sizes.dtype).tiny)
    aligned = pair.task.align(errors[..., None])
    is_class_index = losses.problem_type == "single_label_classification"
    if is_class_index and aligned.shape[:-1] == pair.task.labels(step.inputs).shape:
        return losses.rows(aligned).sum() / losses.num_items
    mask = step.inputs.get("attention_mask")
    if mask is not None and mask.numel() == errors.numel():
        mask = mask.reshape(errors.shape).to(errors)
        errors = errors * mask * (mask.shape[-1] / mask.sum(-1, keepdim=True).clamp(min=1))
    # As many times as the example has labels, by whose number everything is divided.
    return errors.mean() * losses.num_examples * losses.labels_per_example / losses.num_items
