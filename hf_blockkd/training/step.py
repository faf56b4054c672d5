"""One micro-batch on its way through teacher, student and hybrids: `Step`."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack, nullcontext
from typing import Any

import torch
from torch import nn

from ..config import BlockwiseDistillConfig
from ..losses.chunked_loss import chunked_distillation_loss, default_chunk_size
from ..losses.learners import DistillationLoss, Learner, Learners, LossWeights
from ..losses.learners import distillation_loss as plain_distillation_loss
from ..losses.rows import RowLosses
from ..losses.top_k import TopK
from ..objectives.sampling import StoneDraw
from ..pairing.pair import Pair
from ..routing.entering import Extras, capture_states, check_examples, record_extras, take_examples
from ..routing.forwards import untracked


class Step:
    """What an objective works with: the clean passes of a micro-batch, and the means to run hybrids on it.

    Args:
        pair: The models.
        args: The configuration.
        inputs: The batch, with labels.
        num_items: Number of labels in the whole accumulation window; default: those of this batch.
        index: Optimizer steps done so far.
        num_steps: Those of the whole run.
        first_example: Place of the batch's first example among all of the optimizer step.

    Attributes:
        losses: Task and distillation loss of rows of logits.
        student_rows: Rows of the student, as below.
        teacher_rows: Rows of the teacher's logits, or of what enters its head where that waits; `None` without one.
        states: Clean states at the ends of blocks: `"S"` or `"T"` -> end layer -> (B, T, D), the student's with graph.
        extras: What the layers of `"S"` and `"T"` returned besides.
    """

    def __init__(
        self,
        pair: Pair,
        args: BlockwiseDistillConfig,
        inputs: Mapping[str, Any],
        num_items: torch.Tensor | int | None = None,
        index: int = 0,
        num_steps: int = 1,
        first_example: int = 0,
    ) -> None:
        self.pair, self.args, self.inputs = pair, args, inputs
        self.index, self.num_steps, self.first_example = index, num_steps, first_example
        self.losses = RowLosses(
            problem_type=pair.task.problem(inputs),
            labels=pair.task.labels(inputs),
            num_items=num_items,
            divergence=args.divergence,
            temperature=args.temperature,
            standardize=args.standardize_logits,
            label_smoothing=args.label_smoothing_factor,
            num_examples=len(inputs[pair.task.label_names[0]]),
        )
        self.chunk_size = self._chunk_size()
        self.teacher_rows: torch.Tensor | TopK | None = None
        self.states: dict[str, dict[int, torch.Tensor]] = {}
        self.extras: dict[str, Extras] = {}
        self._prefix: dict[int, torch.Tensor] = {}

    def _chunk_size(self) -> int | None:
        """Rows whose logits exist at a time; `None` where all fit, or a model's head cannot be applied by itself."""
        if self.args.loss_chunk_size == 0 or self.pair.student_head is None or self.pair.teacher_head is None:
            return None
        size = self.args.loss_chunk_size or default_chunk_size(self.pair.task.num_classes, self.losses.labels.device)
        return size if len(self.losses) > size else None

    @torch.no_grad()
    def teach(self) -> None:
        """The teacher's clean pass."""
        pair = self.pair
        # Without a weight of their own, errors of states count where connectors were fitted.
        is_compared = pair.objective.needs_teacher_states or (pair.fitted_stones and self.args.state_weight is None)
        ends = pair.block_map.teacher if is_compared else []
        # Plain distillation enters nowhere.
        is_entered = pair.trained_stones or pair.prefix.depth
        with (
            pair.prefix.capture() as self._prefix,
            pair.stones.record() if is_entered else nullcontext({}) as self.extras["T"],
            capture_states(pair.stones.teacher_stack, ends) as self.states["T"],
        ):
            _, self.teacher_rows = self.run("T")

    def learn(self, model: nn.Module) -> tuple[Any, Learner]:
        """The student's pass, through whatever wraps it; its outputs, and the student as a learner."""
        pair = self.pair
        with ExitStack() as stack:
            stack.enter_context(pair.prefix.enter(self._prefix, self.extras.get("T", {})))
            self.states["S"] = stack.enter_context(pair.stones.capture(pair.trained_stones))
            if pair.paths is not None:
                self.extras["S"] = stack.enter_context(record_extras(pair.stones.student_stack))
            outputs, rows = self.run("S", model=model)
        self.student_rows = rows
        return outputs, Learner(rows, pair.objective.student_weights, student_head=True)

    def stone(self, index: int, draw: StoneDraw) -> Learner:
        """Run stepping stone `index` on the examples that were drawn for it."""
        losses, subset = self.losses, None
        weights = LossWeights(*[draw.weight] * 3)
        if draw.examples is not None:
            check_examples(
                self.pair.inputs_for("teacher", self.inputs),
                losses.num_examples,
                "Sharing out examples among stepping stones",
            )
            examples = draw.examples.to(losses.labels.device)
            losses, subset = losses.of_examples(examples)
            if not len(examples):
                return Learner(self.student_rows.detach()[:0], weights, subset, draw.rate)
        with self.pair.stones.enter(index, self.states["S"], self.extras["T"], draw.examples):
            _, rows = self.run("T", losses=losses, examples=draw.examples)
        return Learner(rows, weights, subset, draw.rate)

    def path(self, path: str, weights: LossWeights) -> Learner:
        """Run a mixed path of blocks of both models; one of the student's blocks alone is the student."""
        if set(path) == {"S"}:
            return Learner(self.student_rows, weights, student_head=True)

        def forward(owner: str) -> None:
            self.run(owner)

        # The student is deployed with the statistics of its own states.
        with untracked(self.pair.student), self.pair.paths.enter(path, self.states, self.extras, forward) as owner:
            _, rows = self.run(owner)
        return Learner(rows, weights, student_head=owner == "S")

    def run(
        self,
        owner: str,
        model: nn.Module | None = None,
        losses: RowLosses | None = None,
        examples: torch.Tensor | None = None,
    ) -> tuple[Any, torch.Tensor]:
        """Run student or teacher; its outputs, and the rows of its logits, or of what enters its head where that waits.

        Args:
            owner: `"S"` or `"T"`.
            model: What wraps it; default: the model itself.
            losses: Those of `examples`.
            examples: Indices of the examples that it runs on; default: all.
        """
        pair, losses = self.pair, self.losses if losses is None else losses
        role, head, bare = {
            "S": ("student", pair.student_head, pair.student),
            "T": ("teacher", pair.teacher_head, pair.teacher),
        }[owner]
        model = bare if model is None else model
        inputs = take_examples(pair.inputs_for(role, self.inputs), examples, self.losses.num_examples)
        if self.chunk_size is None:
            outputs = model(**inputs)
            return outputs, losses.rows(pair.task.logits(outputs))
        with head.capture() as captured:
            outputs = model(**inputs)
        return outputs, losses.rows(pair.task.align(captured["states"]))

    def router_term(self, outputs: Any) -> dict[str, tuple[torch.Tensor, float]]:
        """The load-balancing loss of a student of experts whose config asks for it; a mean over the window's labels."""
        loss = getattr(outputs, "aux_loss", None)
        if not isinstance(loss, torch.Tensor) or not loss.requires_grad:
            return {}
        config = self.pair.student.config.get_text_config()
        return {"router": (loss.float() * len(self.losses) / self.losses.num_items, config.router_aux_loss_coef)}

    def loss(self, learners: Learners, terms: Mapping[str, tuple[torch.Tensor, float]]) -> DistillationLoss:
        """The loss of what learns in this step, and of what an objective adds: name -> (loss, weight)."""
        weights = LossWeights(self.args.task_weight, self.args.distill_weight, self.args.cross_weight)
        parts = (self.losses, learners, self.teacher_rows, weights)
        if self.chunk_size is None:
            loss = plain_distillation_loss(*parts)
        else:
            heads = {"student_head": self.pair.student_head, "teacher_head": self.pair.teacher_head}
            loss = chunked_distillation_loss(*parts, **heads, chunk_size=self.chunk_size)
        loss.total = loss.total + sum(weight * term for term, weight in terms.values())
        loss.terms = {name: term for name, (term, _) in terms.items()}
        return loss
