"""A `Trainer` that evaluates the teacher and the stepping stones as it does the student: `EvaluatingTrainer`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader
from transformers.trainer_utils import EvalLoopOutput
from transformers.utils import logging

from ..data.seeding import restored_random_states
from ..losses.learners import STUDENT
from ..losses.rows import IGNORED, RowLosses
from ..routing.forwards import in_eval_mode, untracked
from .diagnostics import block_alignment
from .evaluation import TEACHER, Evaluated, evaluated_vectors, predictions, roles_of, run_hybrid, stone_logits
from .faults import nan_filter
from .generated import generated_tokens
from .loading_trainer import LoadingTrainer
from .one_block import OneBlock, fitted_paths
from .own_loss import TaskLosses

logger = logging.get_logger(__name__)


class EvaluatingTrainer(LoadingTrainer):
    """Runs `Trainer`'s own loop over the student, the teacher, or a hybrid of both, whichever is being evaluated.

    Attributes:
        task_losses: What both models have for a loss, as in training.
        evaluated: The student, or the hybrid that stands in its place.
    """

    task_losses: TaskLosses
    evaluated: Evaluated = STUDENT
    _filters_evaluation = False  # in a run, in which the filter is off

    def evaluation_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool,
        num_items_in_batch: torch.Tensor | int | None,
    ) -> torch.Tensor | tuple[torch.Tensor, Any]:
        """The own loss of whichever of student, teacher and stones is being evaluated; nothing is distilled."""
        ranks, averages = self.accelerator.num_processes, self.args.average_tokens_across_devices
        if num_items_in_batch is not None:  # labels, of starts and ends of answers together
            given = torch.as_tensor(num_items_in_batch)
            num_items_in_batch = (given[0] if given.ndim > 1 else given).sum()
        # A function of the person's knows the labels of all ranks.
        has_function = self.task_losses.function is not None
        num_items = num_items_in_batch if has_function else None
        if self.evaluated == STUDENT and self.task_losses.smoother is None:
            own_inputs = self.pair.inputs_for("student", inputs, labels=True)
            loss, outputs = super().compute_loss(model, own_inputs, True, num_items)
            loss = self.task_losses.of_labelled(self.pair, outputs, inputs, loss)
        else:
            with self.accelerator.autocast():
                if self.evaluated == STUDENT:  # with smoothed labels, shifted as in training
                    outputs = model(**self.pair.inputs_for("student", inputs, labels=True))
                else:
                    outputs = run_hybrid(self.pair, model, inputs, self.evaluated, labels=True)
            loss = self.task_losses.in_evaluation(self.pair, outputs, inputs, num_items)
            loss = self.task_losses.of_labelled(self.pair, outputs, inputs, loss)
            loss = loss * ranks if has_function and averages and num_items is not None else loss
            outputs = outputs if self.evaluated == STUDENT else predictions(outputs, loss)
        if ranks > 1 and num_items_in_batch is not None and averages and not has_function:
            # A mean over the labels of this rank; the mean over ranks is to be that over the labels of all.
            scale = self.pair.task.count(inputs).sum() / num_items_in_batch * ranks
            loss = torch.where(scale > 0, loss * scale.to(loss.dtype), 0.0)
        return (loss, outputs) if return_outputs else loss

    def evaluate(
        self,
        eval_dataset: Any = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        if self.has_no_labels(eval_dataset):
            logger.warning(f"The rows of `{metric_key_prefix}_dataset` have no labels: there is nothing to evaluate.")
            return {}
        metrics = super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        has_several = isinstance(self.eval_dataset if eval_dataset is None else eval_dataset, dict)
        if self.args.eval_stepping_stones and not has_several:
            metrics.update(self.evaluate_stepping_stones(eval_dataset, ignore_keys, metric_key_prefix))
        return metrics

    def evaluate_stepping_stones(
        self,
        eval_dataset: Any = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Evaluate the teacher and the stones as `evaluate` does the student, and the likeness of the blocks.

        The stones are those that train, or all of them where none does.

        Args:
            eval_dataset: A data set, or several by name; default: that of the trainer.
            ignore_keys: As in `Trainer.evaluate`.
            metric_key_prefix: Begins the names of the metrics.

        Returns:
            `{prefix}_teacher_{metric}`, `{prefix}_stone_{i}_{metric}` and `{prefix}_block_{i}_cka`, the alignment of a
            student's block with the teacher's (`hf_blockkd.training.diagnostics`); they are logged, too.
        """
        # A connector that no stone trains says nothing, but where no stone trains at all they are what was asked for.
        stones = self.pair.trained_stones or range(1, len(self.pair.block_map) + 1)
        hybrids = {"teacher": TEACHER, **{f"stone_{i}": i for i in stones}}

        def likeness(dataloader: DataLoader[Any]) -> dict[str, float]:
            with in_eval_mode(self.model), self.accelerator.autocast():
                batches = map(self._prepare_inputs, dataloader)
                alignment = block_alignment(self.pair, batches, self.accelerator.gather_for_metrics)
            return {f"block_{i}_cka": value for i, value in alignment.items()}

        return self._evaluate_hybrids(hybrids, eval_dataset, ignore_keys, metric_key_prefix, likeness)

    def evaluate_blocks(
        self,
        eval_dataset: Any = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Evaluate the teacher with one block of the student's at a time, which tells what each block costs.

        A block costs what the teacher has behind the maps into the student's states and back (of the first block, what
        it has) less what it has with the student's block there. The maps are fitted to 256 training examples, or all
        where there are fewer, and kept nowhere; nothing is trained.

        Args:
            eval_dataset: A data set, or several by name; default: that of the trainer.
            ignore_keys: As in `Trainer.evaluate`.
            metric_key_prefix: Begins the names of the metrics.

        Returns:
            `{prefix}_teacher_{metric}`, `{prefix}_block_{i}_{metric}` with the student's block i, and, from the second
            one on, `{prefix}_block_{i}_entry_{metric}` with the maps before it; they are logged, too, for `hf-blockkd
            report` and `hf-blockkd plan --rebalance`.

        Raises:
            ValueError: If there is no training set to fit the maps to, or the models are sharded over processes.
        """
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise ValueError(
                "`evaluate_blocks` runs single blocks of whole models, but these are sharded over processes; load the "
                "saved student and its teacher in one process."
            )
        if not len(self.calibration_rows()):
            raise ValueError(
                "`evaluate_blocks` fits maps between both models to training examples, but `train_dataset` has none; "
                "give the trainer one."
            )
        with restored_random_states(self.accelerator.device), untracked(self.model):
            paths = fitted_paths(self.pair, self.model, self.calibration_batches(), self.accelerator)
        hybrids: dict[str, Evaluated] = {"teacher": TEACHER}
        for i in range(1, len(self.pair.block_map) + 1):
            hybrids |= {f"block_{i}_entry": OneBlock(paths, i, is_entry=True)} if i > 1 else {}
            hybrids[f"block_{i}"] = OneBlock(paths, i)
        return self._evaluate_hybrids(hybrids, eval_dataset, ignore_keys, metric_key_prefix)

    def _evaluate_hybrids(
        self,
        hybrids: Mapping[str, Evaluated],
        eval_dataset: Any,
        ignore_keys: list[str] | None,
        metric_key_prefix: str,
        others: Callable[[DataLoader[Any]], dict[str, float]] = lambda dataloader: {},
    ) -> dict[str, float]:
        """Metrics of hybrids by name, and others of the same rows; they are logged."""
        eval_dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        if isinstance(eval_dataset, dict):
            metrics = {}
            for name, one in eval_dataset.items():
                prefix = f"{metric_key_prefix}_{name}"
                metrics |= self._evaluate_hybrids(hybrids, one, ignore_keys, prefix, others)
            return metrics
        metrics, usually = {}, self.evaluated
        # What training draws does not depend on whether, and how often, they are evaluated.
        with restored_random_states(self.accelerator.device):
            dataloader = self.get_eval_dataloader(eval_dataset)
            try:
                for name, self.evaluated in hybrids.items():
                    loop = self.evaluation_loop(
                        dataloader,
                        description=f"Evaluation of {name}",
                        prediction_loss_only=True if self.compute_metrics is None else None,
                        ignore_keys=ignore_keys,
                        metric_key_prefix=f"{metric_key_prefix}_{name}",
                    )
                    metrics |= loop.metrics
                    # Closes the progress bar.
                    self.control = self.callback_handler.on_predict(self.args, self.state, self.control, loop.metrics)
            finally:
                self.evaluated = usually
            metrics |= {f"{metric_key_prefix}_{name}": value for name, value in others(dataloader).items()}
        self.log(metrics)
        return metrics

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        # Also before the first step, and where a callback evaluates in the midst of a run.
        is_on = self.args.logging_nan_inf_filter or (self.is_in_train and self._filters_evaluation)
        with nan_filter(self.args, is_on):
            return super().evaluation_loop(*args, **kwargs)

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
        if self.pair.embeddings is not None:
            return self._embedding_step(model, inputs, prediction_loss_only)

        def run(**batch: Any) -> Any:
            """What is evaluated, on rows without labels, which never get to `compute_loss`."""
            if self.evaluated == STUDENT:
                return model(**self.pair.inputs_for("student", batch, labels=True))
            with self.accelerator.autocast():
                return predictions(run_hybrid(self.pair, model, batch, self.evaluated))

        if self.args.predict_with_generate and not prediction_loss_only and self.evaluated == STUDENT:
            loss, _, _ = self.prediction_step(model, inputs, True, ignore_keys)
            inputs = self._prepare_inputs(inputs)
            with self.accelerator.autocast():
                tokens = generated_tokens(self.model, self.pair, inputs, self.args, self.accelerator.device)
            return loss, tokens, inputs.get("labels")
        has_labels = all(inputs.get(name) is not None for name in self.pair.task.label_names)
        if not has_labels:
            self.pair.check_tables(inputs, roles_of(self.evaluated))
        return super().prediction_step(model if has_labels else run, inputs, prediction_loss_only, ignore_keys)

    @torch.no_grad()
    def _embedding_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """The loss of vectors, the vectors, and the teacher's, which stand where labels do."""
        self.pair.check_tables(inputs)
        inputs = self._prepare_inputs(inputs)
        with self.accelerator.autocast():
            vectors, compared, targets = evaluated_vectors(self.pair, model, inputs, self.evaluated)
            labels = torch.full((len(targets),), IGNORED, device=targets.device)
            losses = RowLosses("embedding", labels, divergence=self.args.embedding_loss)
            loss = losses.distill(compared, targets)
        return (loss, None, None) if prediction_loss_only else (loss, vectors, targets)

    def stepping_stone_logits(self, inputs: Mapping[str, Any]) -> dict[int, torch.Tensor]:
        """Logits of every stepping stone for a batch, with the student in eval mode.

        Args:
            inputs: A batch as the data collator makes it; labels are not needed.

        Returns:
            Stone i -> logits in the shape of the teacher's own, for i from 1 to n; question answering stacks start and
            end logits in a last dimension, and models without a head have their vectors. Gradients are tracked unless
            the caller disables them.
        """
        inputs = self._prepare_inputs(dict(inputs))
        with in_eval_mode(self.model), self.accelerator.autocast():
            return stone_logits(self.pair, self.model, inputs)
