"""One micro-batch on its way through teacher, student and hybrids: `Step`."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack, nullcontext
from functools import cached_property
from typing import Any

import torch
from torch import nn

from ..config import BlockwiseDistillConfig
from ..losses.learners import FULL_WEIGHTS, DistillationLoss, Learner, Learners, LossWeights
from ..losses.rows import IGNORED, RowLosses
from ..losses.top_k import TopK
from ..pairing.gradient_scale import GradientScale
from ..pairing.pair import Pair
from ..routing.entering import Extras, capture_states, record_extras
from ..routing.examples import check_examples, take_examples
from ..routing.forwards import in_eval_mode, untracked
from ..routing.masks import Masks
from .logit_rows import LogitRows
from .own_loss import TaskLosses, loss_of_labelled


class Step:
    """What an objective works with: the clean passes of a micro-batch, and the means to run hybrids on it.

    Args:
        pair: The models.
        args: The configuration.
        inputs: The batch, with labels.
        num_items: Number of rows in the whole accumulation window, as `Pair.count` has it; default: those of this
            batch.
        index: Optimizer steps done so far.
        num_steps: Those of the whole run.
        first_example: Place of the batch's first example among all of the optimizer step.
        task_losses: Where a task loss is not what labels and logits make; default: nowhere.
        in_chunks: Whether logits may exist a chunk at a time.

    Attributes:
        num_examples: Of the batch.
        logits: Where these exist: all at once, or a chunk at a time.
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
        task_losses: TaskLosses | None = None,
        in_chunks: bool = True,
    ) -> None:
        self.pair, self.args, self.inputs = pair, args, inputs
        self.index, self.num_steps, self.first_example = index, num_steps, first_example
        self.num_examples = len(inputs[pair.task.label_names[0]])
        self._num_items = num_items
        self.task_losses = TaskLosses() if task_losses is None else task_losses
        in_chunks = in_chunks and self.task_losses.are_rebuilt
        self.logits = LogitRows(pair, self._make_losses, args.loss_chunk_size if in_chunks else 0)
        self.teacher_rows: torch.Tensor | TopK | None = None
        self.student_task: torch.Tensor | None = None
        self.states: dict[str, dict[int, torch.Tensor]] = {}
        self.extras: dict[str, Extras] = {}
        self._prefix: dict[int, torch.Tensor] = {}
        # Of models that run more than once.
        self._masks = {"T": Masks(pair.stones.teacher_stack)} if pair.trained_stones else {}
        self._masks |= {"S": Masks(pair.stones.student_stack)} if pair.paths is not None else {}

    @property
    def losses(self) -> RowLosses:
        """Task and distillation loss of rows of logits; after the first pass, where it takes logits to know them."""
        return self.logits.losses

    @cached_property
    def scale(self) -> GradientScale:
        """Of the gradients inside the teacher."""
        return GradientScale(self.losses.magnitude)

    def _make_losses(self, logits: torch.Tensor | None) -> RowLosses:
        task, inputs, args = self.pair.task, self.inputs, self.args
        if logits is None:
            labels = task.labels(inputs)
            distilled = self.pair.distilled_rows(inputs, args.distill_on == "all")
        else:
            distilled = self.pair.rows_of_logits(inputs, logits)
            is_two_way = task.problem_type == "multi_label_classification"
            labels = torch.full(logits.shape if is_two_way else distilled.shape, IGNORED, device=logits.device)
        return RowLosses(
            problem_type=task.problem(inputs),
            labels=labels,
            num_items=self._num_items,
            divergence=args.divergence if self.pair.embeddings is None else args.embedding_loss,
            temperature=args.temperature,
            standardize=args.standardize_logits,
            beta=args.beta,
            label_smoothing=args.label_smoothing_factor,
            num_examples=self.num_examples,
            distilled=distilled,
            per_example=logits is not None,
        )

    @torch.no_grad()
    def teach(self, with_states: bool = False) -> None:
        """The teacher's clean pass; its states at the ends of blocks are kept if asked for."""
        pair = self.pair
        # Plain distillation enters nowhere.
        is_entered = pair.trained_stones or pair.prefix.depth
        with (
            pair.prefix.capture() as self._prefix,
            pair.stones.record() if is_entered else nullcontext({}) as self.extras["T"],
            capture_states(pair.stones.teacher_stack, pair.block_map.teacher if with_states else []) as states,
        ):
            _, self.teacher_rows, _ = self.run("T", with_task=False)
        self.states["T"] = states

    def learn(self, model: nn.Module, weights: LossWeights = FULL_WEIGHTS) -> tuple[Any, Learner]:
        """The student's pass, through whatever wraps it; its outputs, and the student as a learner."""
        pair = self.pair
        with ExitStack() as stack:
            if pair.is_student_frozen:  # and is met as it will be deployed
                stack.enter_context(in_eval_mode(pair.student))
            stack.enter_context(pair.prefix.enter(self._prefix, self.extras.get("T", {})))
            self.states["S"] = stack.enter_context(pair.stones.capture(pair.trained_stones))
            if pair.paths is not None:
                self.extras["S"] = stack.enter_context(record_extras(pair.stones.student_stack))
            outputs, self.student_rows, self.student_task = self.run("S", model=model)
        return outputs, Learner(self.student_rows, weights, student_head=True, task=self.student_task)

    def stone(
        self, index: int, weights: LossWeights = FULL_WEIGHTS, examples: torch.Tensor | None = None, rate: float = 1.0
    ) -> Learner:
        """Run a stepping stone; it as a learner.

        Args:
            index: From 1 to n.
            weights: What its losses count.
            examples: Rising indices of the examples that it runs on; default: all.
            rate: Share of all examples that it runs on, in the mean over steps.
        """
        losses, subset = None, None
        if examples is not None:
            check_examples(
                self.pair.inputs_for("teacher", self.inputs),
                self.num_examples,
                "Sharing out examples among stepping stones",
            )
            losses, subset = self.losses.of_examples(examples.to(self.losses.labels.device))
            if not len(examples):
                return Learner(self.student_rows.detach()[:0], weights, subset, rate)
        with self.pair.stones.enter(index, self.states["S"], self.extras["T"], examples, self.scale):
            _, rows, task = self.run("T", losses=losses, examples=examples)
        return Learner(self.scale.leave(rows), weights, subset, rate, task=self.scale.leave(task))

    def path(self, path: str, weights: LossWeights) -> Learner:
        """Run a mixed path of blocks of both models; one of the student's blocks alone is the student."""
        if set(path) == {"S"}:
            return Learner(self.student_rows, weights, student_head=True, task=self.student_task)
        parts = (path, self.states, self.extras, self.run, self.scale)
        # The student is deployed with the statistics of its own states.
        with untracked(self.pair.student), self.pair.paths.enter(*parts) as owner:
            _, rows, task = self.run(owner)
        if owner == "T":
            rows, task = self.scale.leave(rows), self.scale.leave(task)
        return Learner(rows, weights, student_head=owner == "S", task=task)

    def run(
        self,
        owner: str,
        model: nn.Module | None = None,
        losses: RowLosses | None = None,
        examples: torch.Tensor | None = None,
        with_task: bool = True,
    ) -> tuple[Any, torch.Tensor, torch.Tensor | None]:
        """Run student or teacher; its outputs, its rows, and its task loss where that is not made of them.

        Args:
            owner: `"S"` or `"T"`.
            model: What wraps it; default: the model itself.
            losses: Those of `examples`; default: those of the batch.
            examples: Indices of the examples that it runs on; default: all.
            with_task: Whether it has a task loss at all.
        """
        pair = self.pair
        role, bare = {"S": ("student", pair.student), "T": ("teacher", pair.teacher)}[owner]
        given = take_examples(self.inputs, examples, self.num_examples)
        takes_labels = with_task and self.task_losses.takes_labels(role, pair, given)
        inputs = pair.inputs_for(role, given, labels=takes_labels)
        # Masks of all examples are not those of some.
        masks = self._masks.get(owner) if examples is None else None
        with (
            nullcontext() if masks is None else masks.shared(),
            loss_of_labelled(bare, pair.task, given) if takes_labels else nullcontext(),
        ):
            outputs, rows = self.logits.run(bare if model is None else model, role, inputs, losses)
        losses = self.losses if losses is None else losses
        return outputs, rows, self.task_losses.of(role, pair, outputs, given, losses) if with_task else None

    def loss(self, learners: Learners, terms: Mapping[str, tuple[torch.Tensor, float]]) -> DistillationLoss:
        """The loss of what learns in this step, and of what an objective adds: name -> (loss, weight)."""
        weights = LossWeights(self.args.task_weight, self.args.distill_weight, self.args.cross_weight)
        loss = self.logits.loss(learners, self.teacher_rows, weights)
        loss.total = loss.total + sum(weight * term for term, weight in terms.values())
        loss.terms = {name: term for name, (term, _) in terms.items()}
        return loss

    def router_term(self, outputs: Any) -> dict[str, tuple[torch.Tensor, float]]:
        """The load-balancing loss of a student of experts whose config asks for it; a mean over the window's rows.

        A task loss that is not rebuilt has it, or leaves it out on purpose.
        """
        loss = getattr(outputs, "aux_loss", None)
        is_in_task = self.student_task is not None
        if is_in_task or not isinstance(loss, torch.Tensor) or not loss.requires_grad:
            return {}
        config = self.pair.student.config.get_text_config()
        share = len(self.losses) / self.losses.distill_mean.num_items
        return {"router": (loss.float() * share, config.router_aux_loss_coef)}
