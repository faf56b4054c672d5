"""The trainer: `BlockwiseDistillTrainer`."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import send_to_device
from torch import nn
from transformers import PreTrainedModel, TrainerCallback
from transformers.trainer_utils import EvalPrediction, TrainOutput
from transformers.utils import ModelOutput, logging

from .config import BlockwiseDistillConfig
from .connectors.attached import attach, attached, join_optimizer, regroup
from .data.checks import check_not_empty, check_padding
from .data.example_keys import KEYS
from .ladder.saving_trainer import SavingTrainer
from .losses.learners import STUDENT
from .models.adapters import adapt, base_as_teacher, check_adapter, check_trains
from .models.compiling import compiled, take_over_compiling
from .models.loading import load_model, place
from .models.stand_in import refuse_to_run, stand_in
from .objectives import make_objective
from .objectives.checks import check_run
from .pairing.blocks import BlockMap
from .pairing.pair import Pair
from .saving.model_card import TAGS
from .scaling.launch import check_launch
from .scaling.sharding import set_up_fsdp
from .scaling.zero import check_whole, set_up_zero
from .training.connector_start import fit_connectors, stones_to_fit
from .training.diagnostics import BlockGradientNorms
from .training.evaluation import roles_of
from .training.faults import LossCheck, dead_workers_explained, nan_filter, warn_of_float16
from .training.first_batch import check_first_batch
from .training.label_watch import LabelWatch
from .training.loss_log import LossLog
from .training.options import check_learns, check_options, labels_alone
from .training.own_loss import TaskLosses
from .training.step import Step
from .training.teacher_rows import TeacherRows

if TYPE_CHECKING:
    from peft import PeftConfig

logger = logging.get_logger(__name__)


class BlockwiseDistillTrainer(SavingTrainer):
    """Trains a student through the frozen layers of its teacher: block-wise logit distillation.

    It is a [`~transformers.Trainer`]: data, optimizer, schedule, logging, evaluation, checkpoints and hub work as
    there. While training, it also compares the student's states with the teacher's through connectors, or runs the
    *stepping stones*: the student's first blocks, a connector, and the teacher's remaining layers and head, for each
    block (Yu et al., 2024, arXiv 2411.01547). Stones are to be kept, as a ladder of models between both; next to
    errors of states they made no student better in any measurement. What it saves is a plain student, with
    `connectors.safetensors` beside it, which only resuming needs.

    Args:
        model: The student, or a name or path of one.
        teacher_model: The teacher, with a head for the same task and classes, or, like the student, without a head:
            then the pooled states of both are compared, and no labels are needed; or a name or path, also of a folder
            of sentence-transformers, which says how states are pooled. It is frozen and kept in eval mode. `None`
            stands for the base of an adapted student without the adapter, whose weights are in memory once then, or,
            with `captured_columns` and no stepping stones, for one that is nowhere at hand.
        args: The configuration; the default trains into `tmp_trainer`.
        data_collator: As in `Trainer`.
        train_dataset: As in `Trainer`. Rows whose label is missing, `None`, NaN or -100 train on the teacher alone.
        eval_dataset: As in `Trainer`.
        processing_class: Tokenizer or image processor, saved with the student.
        compute_metrics: As in `Trainer`; it sees the student's logits alone, or, of models without a head, its vectors
            as predictions and the teacher's as labels.
        callbacks: As in `Trainer`.
        optimizers: As in `Trainer`; the connectors join the group of the optimizer that learns fastest.
        preprocess_logits_for_metrics: As in `Trainer`.
        peft_config: Wraps the student in an adapter; the connectors train beside it, and are saved beside it. A
            `PeftModel` as the student does the same.
        model_init: Refused by name: blocks, connectors and optimizer belong to one student.
        compute_loss_func: As in `Trainer`: the task loss of the student, and of stones, whose logits then exist all at
            once; it gets the labels that count in the whole accumulation window as `num_items_in_batch`.
        optimizer_cls_and_kwargs: As in `Trainer`.

    Attributes:
        teacher: The frozen teacher.
        block_map: The cut of both stacks, a [`BlockMap`].
        connectors: `nn.ModuleList` with the n connectors.
        teacher_is_base: Whether the teacher is the student's own base, without the adapter.

    Raises:
        ValueError: Before any training step, if student, teacher, configuration and data do not fit together.
        UnsupportedArchitectureError: If a model has no stack of layers, or the teacher fails the self-test on the
            first batch.

    Example:
        ```python
        >>> import torch
        >>> from datasets import Dataset
        >>> from transformers import ViTConfig, ViTForImageClassification
        >>> from hf_blockkd import BlockwiseDistillConfig, BlockwiseDistillTrainer
        >>> shape = dict(image_size=8, patch_size=4, num_channels=1, num_attention_heads=2)
        >>> teacher = ViTForImageClassification(ViTConfig(hidden_size=32, num_hidden_layers=4, **shape))
        >>> student = ViTForImageClassification(ViTConfig(hidden_size=16, num_hidden_layers=2, **shape))
        >>> images = Dataset.from_dict({"pixel_values": torch.randn(8, 1, 8, 8).tolist(), "labels": [0, 1] * 4})
        >>> args = BlockwiseDistillConfig("student", num_blocks=2, max_steps=1, report_to="none", disable_tqdm=True)
        >>> trainer = BlockwiseDistillTrainer(
        ...     model=student, teacher_model=teacher, args=args, train_dataset=images.with_format("torch")
        ... )
        >>> sorted(trainer.stepping_stone_logits(images.with_format("torch")[:2]))
        [1, 2]

        ```
    """

    def __init__(
        self,
        model: PreTrainedModel | str | os.PathLike[str],
        teacher_model: PreTrainedModel | str | os.PathLike[str] | None = None,
        args: BlockwiseDistillConfig | None = None,
        data_collator: Callable | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        compute_metrics: Callable[[EvalPrediction], dict] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        preprocess_logits_for_metrics: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
        peft_config: PeftConfig | None = None,
        model_init: Callable | None = None,
        compute_loss_func: Callable | None = None,
        optimizer_cls_and_kwargs: tuple[type[torch.optim.Optimizer], dict[str, Any]] | None = None,
    ) -> None:
        args = BlockwiseDistillConfig("tmp_trainer") if args is None else args
        if not isinstance(args, BlockwiseDistillConfig):
            raise ValueError(f"`args` is a {type(args).__name__}; pass a BlockwiseDistillConfig with the same fields.")
        check_options(args, optimizers, peft_config, model_init)
        check_launch(args)
        check_not_empty(train_dataset)
        student = load_model(os.fspath(model)) if isinstance(model, (str, os.PathLike)) else model
        check_adapter(student, peft_config)
        is_named = isinstance(teacher_model, (str, os.PathLike))
        teacher = load_model(os.fspath(teacher_model)) if is_named else teacher_model
        is_captured = teacher is None and args.captured_columns is not None
        if teacher is None:
            teacher = stand_in(student) if is_captured else base_as_teacher(student, peft_config)
        check_whole(model=student, teacher_model=teacher)
        self.objective = make_objective(args)
        if peft_config is None:
            has_stones = args.stone_weight != 0 and args.stepping_stones != "none"
            teaches_connectors = args.train_connectors and (has_stones or self.objective.needs_teacher_states)
            check_trains(student, may_be_frozen=self.objective.keeps_stones and teaches_connectors)
        self.pair = Pair(student, teacher, processing_class, needs_paths=self.objective.needs_paths, **args.pairing)
        self.pair.train_connectors(self.objective.connectors(len(self.pair.block_map)), args.train_connectors)
        check_run(self.objective, args, self.pair, train_dataset, processing_class, is_captured)
        if is_captured:
            refuse_to_run(teacher)
        self.teacher: PreTrainedModel = self.pair.teacher
        self.block_map: BlockMap = self.pair.block_map
        self.connectors: nn.ModuleList = self.pair.connectors
        self.teacher_is_base: bool = teacher_model is None and not is_captured
        if peft_config is not None:
            student = adapt(student, peft_config, self.teacher)

        super().__init__(
            model=student,
            args=args,
            data_collator=data_collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            compute_metrics=compute_metrics,
            callbacks=callbacks,
            optimizers=optimizers,
            preprocess_logits_for_metrics=preprocess_logits_for_metrics,
            compute_loss_func=compute_loss_func,
            optimizer_cls_and_kwargs=optimizer_cls_and_kwargs,
        )
        self.trains_unlabelled = self.objective.distils
        self.task_losses = TaskLosses(compute_loss_func, self.label_smoother)
        if args.label_names is None:
            # What the task is made of, where `Trainer` would wait for labels of other heads, too.
            self.label_names = list(self.pair.task.label_names)
        check_padding(self.data_collator)
        self.model.add_model_tags([*TAGS])
        if self.optimizer is not None:
            join_optimizer(self.pair.all_connectors, self.optimizer)
        if self.is_fsdp_enabled:
            set_up_fsdp(self.pair, args, self.accelerator.state.fsdp_plugin, self.teacher_is_base)
        else:
            place(self.teacher, self.accelerator.device)
            self.pair.all_connectors.to(self.accelerator.device)
        if self.is_deepspeed_enabled:
            set_up_zero(self.pair, args, self.accelerator.state.deepspeed_plugin, self.teacher_is_base)
        warn_of_float16(self.model, self.accelerator.scaler)
        self._compile_options = take_over_compiling(self.accelerator)
        # Our losses are sums over the whole accumulation window divided by its number of labels.
        self.loss_is_scaled_for_ga = True
        self._first_batch_passed = False
        self._examples_seen = 0  # in the micro-batches of this step so far
        self.teacher_rows = TeacherRows(self.pair, args, self.accelerator, self.objective.needs_teacher)
        # SimKD trains no head of the student's.
        self.evaluated: str | int = len(self.block_map) if self.objective.deploys_last_stone else STUDENT
        self._loss_log, self._gradient_norms = LossLog(), BlockGradientNorms(self.pair)
        self._loss_check = LossCheck(args, is_sharded=self.is_fsdp_enabled or self.is_deepspeed_enabled)
        self._logged_parts: dict[str, float] = {}
        self._label_watch = LabelWatch()
        self.add_callback(self._label_watch)
        logger.info(f"Block map:\n{self.block_map}")

    def train(
        self,
        resume_from_checkpoint: str | os.PathLike[str] | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> TrainOutput:
        """Train, from the beginning or from a checkpoint.

        Args:
            resume_from_checkpoint: `True` goes on from the last checkpoint in `output_dir` that is whole, with a
                warning for those that are not, and starts anew with a warning where there is none, so that a script
                may always say it. A path names a checkpoint.
            trial: As in `Trainer`.
            ignore_keys_for_eval: As in `Trainer`.

        Returns:
            As in `Trainer`.

        Raises:
            ValueError: If the checkpoint that was named is not whole, or of another run.
        """
        resume_from_checkpoint = self.find_checkpoint(resume_from_checkpoint)
        self.pair.fitted_stones = stones_to_fit(
            self.pair, self.args.connector_start, self.calibration_rows, self.teacher_is_base
        )
        weights = self.objective.weights_without_labels(self.pair)
        self.trains_unlabelled = any(weights.values())
        check_learns(self.args, self.pair.task, weights, lambda: self.has_no_labels(self.train_dataset, surely=True))
        self._label_watch.begin(*labels_alone(self.args, weights))
        stacks = self.pair.stones.student_stack, self.pair.stones.teacher_stack
        with self._with_connectors(), dead_workers_explained(), compiled(self._compile_options, *stacks):
            if self.pair.fitted_stones and not resume_from_checkpoint:
                if self.is_fsdp_enabled or self.is_deepspeed_enabled:
                    self.model.to(self.accelerator.device)  # which would else follow when it is sharded
                fit_connectors(self.pair, self.model, self.calibration_batches(), self.accelerator)
            return super().train(resume_from_checkpoint, trial, ignore_keys_for_eval)

    def _with_connectors(self) -> AbstractContextManager:
        """The student with the connectors on it; what shards it keeps them there for good."""
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            attach(self.pair.all_connectors, self.model)
            return nullcontext()
        return attached(self.pair.all_connectors, self.model)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        with self._with_connectors():
            optimizer = super().create_optimizer(model)
        if self.args.connector_learning_rate is not None:
            regroup(self.pair.all_connectors, optimizer, self.args.connector_learning_rate)
        return optimizer

    def hyperparameter_search(self, *args: Any, **kwargs: Any) -> None:
        """Not supported: it would need a new student and new connectors for every trial.

        Raises:
            NotImplementedError: Always.
        """
        raise NotImplementedError(
            "`hyperparameter_search` needs `model_init`, which BlockwiseDistillTrainer does not take: every trial has "
            "to start from a new student and new connectors, so make a new trainer in the objective of your search, "
            "e.g. in that of `optuna.Study.optimize`."
        )

    # ---- The training step ----

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, Any]:
        if not model.training:
            return self.evaluation_loss(model, inputs, return_outputs, num_items_in_batch)
        inputs = dict(inputs)
        keys = inputs.pop(KEYS, None)
        if not self._first_batch_passed:
            self._first_batch_passed = True
            stones, kept = self.objective.stones(self.pair), (self.task_losses, self.teacher_rows)
            check_first_batch(self.pair, self.args, model, inputs, stones, *kept, self.accelerator)
        taught = partial(self._taught, inputs, keys, num_items_in_batch, not return_outputs)
        step = taught()
        outputs, student = step.learn(model, self.objective.student_weights)
        with self.accelerator.autocast():
            learners = {STUDENT: student, **self.objective.learners(step)}
            loss = step.loss(learners, self.objective.terms(step) | step.router_term(outputs))
        # DistributedDataParallel takes the mean over ranks of what is already divided by the labels of all ranks.
        ranks = self.accelerator.num_processes if self.args.average_tokens_across_devices else 1
        weights = self.objective.falling_weights(step)
        parts = self._loss_log.add(loss, learners, ranks, self.state.global_step, weights)
        self._loss_check.add(self.model, step, loss.total, parts, again=taught)
        total = (loss.total + self._touch(model)) * ranks
        if not return_outputs:
            return total
        return total, type(outputs)(**{"loss": total, **outputs}) if isinstance(outputs, ModelOutput) else outputs

    def make_step(
        self, inputs: dict[str, Any], num_items_in_batch: torch.Tensor | int | None = None, in_chunks: bool = True
    ) -> Step:
        """A micro-batch of the current optimizer step, on which nothing has run yet.

        Args:
            inputs: The batch, on the device.
            num_items_in_batch: Number of rows in the whole accumulation window, as `Pair.count` has it; default: those
                of this batch.
            in_chunks: Whether logits may exist a chunk at a time.
        """
        steps = self.state.global_step, max(self.state.max_steps, 1)
        step = Step(self.pair, self.args, inputs, num_items_in_batch, *steps, 0, self.task_losses, in_chunks)
        # The micro-batches of a step follow one another, and in each those of the ranks.
        rank, num_examples = self.accelerator.process_index, step.num_examples
        step.first_example = self._examples_seen * self.accelerator.num_processes + rank * num_examples
        self._examples_seen += num_examples
        return step

    def _taught(self, inputs: dict[str, Any], keys: torch.Tensor | None, num_items: Any, in_chunks: bool) -> Step:
        """A micro-batch after the teacher's clean pass."""
        step = self.make_step(inputs, num_items, in_chunks)
        self.teacher_rows.give(step, keys, self.objective.compares_states(self.pair))
        return step

    def _touch(self, model: nn.Module) -> torch.Tensor | float:
        """Zero, attached to all that trains, also to what does not run: DistributedDataParallel waits for each of it.

        Connectors of stones that are not drawn are of that kind, and parameters that a student has for other uses (the
        mask token of DINOv2).
        """
        if self.is_deepspeed_enabled and self.accelerator.state.deepspeed_plugin.zero_stage == 3:
            return 0.0  # every weight is used (see `check_zero`), and its shard cannot be touched
        is_parallel = isinstance(model, nn.parallel.DistributedDataParallel)
        touched = self.model if is_parallel else self.pair.all_connectors
        return sum(0.0 * parameter.sum() for parameter in touched.parameters() if parameter.requires_grad)

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        inputs = send_to_device(inputs, self.args.device, self.args.accelerator_config.non_blocking)
        return self.pair.complete(super()._prepare_inputs(inputs))

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> torch.Tensor | int | None:
        """Rows of an accumulation window, over all ranks where tokens are averaged across devices: (2, label sets).

        Those with a label first, and those that are distilled; starts and ends of answers are counted apart.
        """
        self._examples_seen = 0
        # The stock trainer counts what it trains on with gradients, before the model is in train mode.
        roles = roles_of(None if torch.is_grad_enabled() else self.evaluated)
        for inputs in batch_samples:
            self.pair.check_batch(inputs, roles)
        everywhere = self.args.distill_on == "all"
        counts = [self.pair.count(inputs, everywhere).to(device, non_blocking=True) for inputs in batch_samples]
        count = sum(counts, torch.zeros((2, len(self.pair.task.label_names)), dtype=torch.long, device=device))
        if self.args.average_tokens_across_devices and self.accelerator.num_processes > 1:
            count = self.accelerator.gather(count[None]).sum(0)
        if torch.is_grad_enabled():  # labels of an evaluation train nothing
            self._label_watch.see(count[0])
        return count.clamp(min=1)

    # ---- Checks on the way ----

    def _get_grad_norm(self, model: nn.Module, grad_norm: torch.Tensor | None = None) -> torch.Tensor | float | None:
        norm = super()._get_grad_norm(model, grad_norm)
        # A scaler skips such updates, and tries again at another scale.
        checked = norm if self.accelerator.scaler is None else None
        self._loss_check.check(self.model, checked, self.state.global_step + 1)
        # DeepSpeed has made its update by now, and dropped the gradients.
        if not self.is_deepspeed_enabled:
            self._gradient_norms.see(self.args, self.state, norm)
        return norm

    # ---- The data of a run ----

    def _inner_training_loop(self, *args: Any, **kwargs: Any) -> TrainOutput:
        # A run begins here: nothing that the last one found out, with other weights or data, holds for it.
        self._first_batch_passed, self._loss_log, self.pair.prefix.depth = False, LossLog(), 0
        self.task_losses.own.clear()
        self._loss_check.forget()
        self.fill_teacher_cache()
        self.begin_run()
        with nan_filter(self.args, is_on=False) as self._filters_evaluation:
            return super()._inner_training_loop(*args, **kwargs)

    def fill_teacher_cache(self) -> None:
        """Run the teacher on every training example that its cache does not know, if there is one: a run begins so."""
        self.is_keyed = self.args.teacher_cache is not None
        self.teacher_rows.fill(self.keyed_batches, self._prepare_inputs)

    # ---- Logging ----

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        # Here, and not in `log`, which a person may call on one rank: parts are averages over all.
        if self.control.should_log and self.state.global_step > self._globalstep_last_logged:
            self._logged_parts = self._loss_log.take(self.accelerator) | self._gradient_norms.take()
        with nan_filter(self.args, self._filters_evaluation):
            super()._maybe_log_save_evaluate(*args, **kwargs)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            logs |= self._logged_parts
            self._logged_parts = {}
        super().log(logs, start_time)
