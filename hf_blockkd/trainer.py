"""The trainer: `BlockwiseDistillTrainer`."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, Trainer, TrainerCallback
from transformers.trainer_jit_checkpoint import JITCheckpointCallback
from transformers.trainer_utils import EvalPrediction, TrainOutput
from transformers.utils import logging

from .config import BlockwiseDistillConfig
from .connectors.maps import attach, detached, join_optimizer, load_connectors
from .data.checks import check_dropped_columns, check_label_column, check_not_empty, check_padding
from .data.seeding import SeededBatches, seed_batches
from .data.teacher_cache import KEYS, KeyedCollator, TeacherCache, check_cacheable
from .losses.learners import STUDENT
from .models.adapters import adapt, base_as_teacher, check_adapter
from .models.compiling import compiled, take_over_compiling
from .models.loading import load_model, place
from .pairing.pair import Pair
from .routing.entering import Extras
from .scaling.launch import check_launch
from .scaling.sharding import set_up_fsdp
from .scaling.zero import check_whole, set_up_zero
from .training.cache_filling import check_extras, fill_cache
from .training.checkpoints import find_checkpoint, flaw, save_checkpoint, save_student
from .training.connector_start import fit_connectors, stones_to_fit
from .training.diagnostics import BlockGradientNorms
from .training.evaluation import evaluate_all, loss_under_teacher, stone_logits
from .training.faults import check_gradients, dead_workers_explained
from .training.loss_log import LossLog
from .training.options import check_options
from .training.self_test import self_test
from .training.sigterm import CheckpointOnSigterm
from .training.step import Step

if TYPE_CHECKING:
    from peft import PeftConfig

logger = logging.get_logger(__name__)


class BlockwiseDistillTrainer(Trainer):
    """Trains a student through the frozen layers of its teacher: block-wise logit distillation.

    It is a [`~transformers.Trainer`]: data, optimizer, schedule, logging, evaluation, checkpoints and hub work as
    there. While training, it also runs the *stepping stones*: the student's first blocks, a connector, and the
    teacher's remaining layers and head, for each block (Yu et al., 2024, arXiv 2411.01547). What it saves is a plain
    student, with `connectors.safetensors` beside it, which only resuming needs.

    Args:
        model: The student, with a head, or a name or path of one.
        teacher_model: The teacher, with a head for the same task and classes, or a name or path. It is frozen and kept
            in eval mode. `None` stands for the base of an adapted student without the adapter, whose weights are in
            memory once then.
        args: The configuration; the default trains into `tmp_trainer`.
        data_collator: As in `Trainer`.
        train_dataset: As in `Trainer`; it needs labels.
        eval_dataset: As in `Trainer`.
        processing_class: Tokenizer or image processor, saved with the student.
        compute_metrics: As in `Trainer`; it sees the student's logits alone.
        callbacks: As in `Trainer`.
        optimizers: As in `Trainer`; the connectors join the first group of the optimizer.
        preprocess_logits_for_metrics: As in `Trainer`.
        peft_config: Wraps the student in an adapter; the connectors train beside it, and are saved beside it. A
            `PeftModel` as the student does the same.

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

    _tag_names: ClassVar[list[str]] = ["knowledge-distillation", "hf-blockkd"]

    def __init__(
        self,
        model: PreTrainedModel | str | os.PathLike,
        teacher_model: PreTrainedModel | str | os.PathLike | None = None,
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
    ) -> None:
        args = BlockwiseDistillConfig("tmp_trainer") if args is None else args
        if not isinstance(args, BlockwiseDistillConfig):
            raise ValueError(f"`args` is a {type(args).__name__}; pass a BlockwiseDistillConfig with the same fields.")
        if args.n_gpu > 1:
            raise ValueError(
                f"{args.n_gpu} GPUs are visible to one process, which would run nn.DataParallel; start the script with "
                f"`accelerate launch --num_processes {args.n_gpu} ...`, or make one GPU visible with "
                "CUDA_VISIBLE_DEVICES=0."
            )
        check_options(args, optimizers, peft_config)
        check_launch(args)
        check_not_empty(train_dataset)
        student = load_model(os.fspath(model)) if isinstance(model, (str, os.PathLike)) else model
        check_adapter(student, peft_config)
        is_named = isinstance(teacher_model, (str, os.PathLike))
        teacher = load_model(os.fspath(teacher_model)) if is_named else teacher_model
        teacher = base_as_teacher(student, peft_config) if teacher is None else teacher
        check_whole(model=student, teacher_model=teacher)
        self.pair = Pair(student, teacher, args, processing_class)
        check_label_column(train_dataset, self.pair.task.num_example_classes)
        check_cacheable(args, self.pair.task, train_dataset)
        self.teacher, self.block_map = self.pair.teacher, self.pair.block_map
        self.connectors = self.pair.connectors
        self.teacher_is_base = teacher_model is None
        if peft_config is not None:
            student = adapt(student, peft_config, self.teacher)
        attach(self.pair.all_connectors, student)

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
        )
        check_padding(self.data_collator)
        if hasattr(self.model, "add_model_tags"):
            self.model.add_model_tags(self._tag_names)
        if self.optimizer is not None:
            join_optimizer(self.pair.all_connectors, self.optimizer)
        if args.enable_jit_checkpoint:
            self.add_callback(CheckpointOnSigterm(self.pop_callback(JITCheckpointCallback)))
        if self.is_fsdp_enabled:
            set_up_fsdp(self)
        else:
            place(self.teacher, self.accelerator.device)
        if self.is_deepspeed_enabled:
            set_up_zero(self)
        self._compile_options = take_over_compiling(self.accelerator)
        # Our losses are sums over the whole accumulation window divided by its number of labels.
        self.loss_is_scaled_for_ga = True
        self._first_batch_passed = False
        self._examples_seen = 0  # in the micro-batches of this step so far
        self._cache: TeacherCache | None = None
        self._batches: SeededBatches | None = None
        self._extras: Extras = {}
        # SimKD trains no head of the student's.
        self.evaluated: str | int = len(self.block_map) if self.pair.objective.deploys_last_stone else STUDENT
        self._loss_log, self._gradient_norms = LossLog(), BlockGradientNorms(self.pair)
        # DeepSpeed has made its update, and dropped the gradients, before a callback could see them.
        if not self.is_deepspeed_enabled:
            self.add_callback(self._gradient_norms)
        logger.info(f"Block map:\n{self.block_map}")

    def train(
        self,
        resume_from_checkpoint: str | os.PathLike | bool | None = None,
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
        if resume_from_checkpoint:
            resume_from_checkpoint = find_checkpoint(self, resume_from_checkpoint)
        self.pair.fitted_stones = stones_to_fit(self)
        if self.pair.fitted_stones and not resume_from_checkpoint:
            fit_connectors(self)
        stacks = self.pair.stones.student_stack, self.pair.stones.teacher_stack
        with dead_workers_explained(), compiled(self._compile_options, *stacks):
            return super().train(resume_from_checkpoint, trial, ignore_keys_for_eval)

    def _run_epoch(self, *args: Any, epoch: int, **kwargs: Any) -> None:
        if self._batches is not None:
            self._batches.epoch.fill_(epoch)
        # Resumed from its last checkpoint in the midst of an epoch, a run that is through would go on for a step.
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, epoch=epoch, **kwargs)

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
            return self._evaluation_loss(model, inputs, return_outputs, num_items_in_batch)
        inputs = dict(inputs)
        keys = inputs.pop(KEYS, None)
        self._check_first_batch(inputs)
        step = self._step(inputs, num_items_in_batch)
        if keys is not None:
            step.teacher_rows = self._cache.rows(keys.tolist(), step.losses.counts(), keys.device)
            step.extras["T"] = self._extras
        elif self.pair.objective.needs_teacher:
            self._teach(step, f"a batch of optimizer step {self.state.global_step + 1}")
        outputs, student = step.learn(model)
        with self.accelerator.autocast():
            learners = {STUDENT: student, **self.pair.objective.learners(step)}
            loss = step.loss(learners, self.pair.objective.terms(step) | step.router_term(outputs))
        # DistributedDataParallel takes the mean over ranks of what is already divided by the labels of all ranks.
        ranks = self.accelerator.num_processes if self.args.average_tokens_across_devices else 1
        self._loss_log.add(loss, learners, ranks, self.state.global_step)
        total = (loss.total + self._touch(model)) * ranks
        return (total, outputs) if return_outputs else total

    def _step(self, inputs: dict[str, Any], num_items_in_batch: torch.Tensor | int | None = None) -> Step:
        step = Step(
            self.pair, self.args, inputs, num_items_in_batch, self.state.global_step, max(self.state.max_steps, 1)
        )
        # The micro-batches of a step follow one another, and in each those of the ranks.
        rank, num_examples = self.accelerator.process_index, step.losses.num_examples
        step.first_example = self._examples_seen * self.accelerator.num_processes + rank * num_examples
        self._examples_seen += num_examples
        return step

    def _teach(self, step: Step, where: str) -> None:
        with self.accelerator.autocast():
            step.teach()
        finite = torch.isfinite(step.teacher_rows)
        if not finite.all():
            raise ValueError(
                f"The teacher gives values that are not finite for examples {step.losses.examples(~finite)} of "
                f"{where}; training stops here, and the last checkpoint is untouched. Check these inputs, or run the "
                "teacher in a wider dtype."
            )

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
        return self.pair.complete(super()._prepare_inputs(inputs))

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> torch.Tensor | int | None:
        """Number of labels in an accumulation window, over all ranks where tokens are averaged across devices."""
        self._examples_seen = 0
        for inputs in batch_samples:
            self.pair.check_batch(inputs)
        count = sum(
            (self.pair.task.count(inputs).to(device) for inputs in batch_samples), torch.tensor(0, device=device)
        )
        if self.args.average_tokens_across_devices and self.accelerator.num_processes > 1:
            count = self.accelerator.gather(count).sum()
        return count.clamp(min=1)

    # ---- Checks on the way ----

    def _get_grad_norm(self, model: nn.Module, grad_norm: torch.Tensor | None = None) -> torch.Tensor | float | None:
        norm = super()._get_grad_norm(model, grad_norm)
        if self.accelerator.scaler is None:  # which skips such updates, and tries again at another scale
            check_gradients(self.model, norm, self.state.global_step + 1)
        return norm

    def _check_first_batch(self, inputs: dict[str, Any]) -> None:
        """Self-test of the routing, and search for a shared prefix, on the first batch of a run."""
        if self._first_batch_passed:
            return
        self._first_batch_passed = True
        if not self.pair.objective.needs_teacher:
            return
        with self.accelerator.autocast():
            extras = self_test(self.pair, inputs, self._takes_examples)
        if self._cache is not None:
            self._extras = check_extras(self.pair, extras)

    @property
    def _takes_examples(self) -> bool:
        return self.args.stepping_stones == "share" or self.args.stone_fraction < 1

    # ---- The teacher cache ----

    def get_train_dataloader(self) -> DataLoader:
        # A run begins here: nothing that the last one found out, with other weights or data, holds for it.
        self._first_batch_passed, self._cache, self._loss_log = False, None, LossLog()
        self.pair.prefix.depth = 0
        collator = self.data_collator
        try:
            if self.args.teacher_cache is not None:
                self.data_collator = KeyedCollator(collator)
                self._cache = fill_cache(self)
            loader = super().get_train_dataloader()
        finally:
            self.data_collator = collator
        self._batches = seed_batches(loader, self.args.seed if self.args.data_seed is None else self.args.data_seed)
        return loader

    # ---- Evaluation ----

    def _evaluation_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool,
        num_items_in_batch: torch.Tensor | int | None,
    ) -> torch.Tensor | tuple[torch.Tensor, Any]:
        """The own loss of whichever of student, teacher and stones is being evaluated; nothing is distilled."""
        if self.evaluated == STUDENT:
            own_inputs = self.pair.inputs_for("student", inputs, labels=True)
            loss, outputs = super().compute_loss(model, own_inputs, return_outputs=True)
        else:
            loss, outputs = loss_under_teacher(self, model, inputs, self.evaluated)
        ranks = self.accelerator.num_processes
        if ranks > 1 and num_items_in_batch is not None and self.args.average_tokens_across_devices:
            # A mean over the labels of this rank; the mean over ranks is to be that over the labels of all.
            scale = self.pair.task.count(inputs) / num_items_in_batch * ranks
            loss = torch.where(scale > 0, loss * scale.to(loss.dtype), 0.0)
        return (loss, outputs) if return_outputs else loss

    def evaluate(
        self,
        eval_dataset: Any = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
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
        eval_dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        if isinstance(eval_dataset, dict):
            metrics = {}
            for name, one in eval_dataset.items():
                metrics |= self.evaluate_stepping_stones(one, ignore_keys, f"{metric_key_prefix}_{name}")
            return metrics
        metrics = evaluate_all(self, eval_dataset, ignore_keys, metric_key_prefix)
        self.log(metrics)
        return metrics

    def stepping_stone_logits(self, inputs: Mapping[str, Any]) -> dict[int, torch.Tensor]:
        """Logits of every stepping stone for a batch, with the student in eval mode.

        Args:
            inputs: A batch as the data collator makes it; labels are not needed.

        Returns:
            Stone i -> logits in the shape of the teacher's own, for i from 1 to n; question answering stacks start and
            end logits in a last dimension. Gradients are tracked unless the caller disables them.
        """
        return stone_logits(self, inputs)

    # ---- Logging ----

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            logs |= self._loss_log.take(self.accelerator) | self._gradient_norms.take()
        super().log(logs, start_time)

    # ---- Checkpoints ----

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        save_checkpoint(self, trial)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        if self.args.should_save:
            save_student(self, self.args.output_dir if output_dir is None else output_dir, state_dict)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if self.is_fsdp_enabled:  # whose checkpoints hold the connectors beside the student
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        # The connectors first: those of another run are refused before anything of the student is overwritten.
        load_connectors(self.pair.all_connectors, resume_from_checkpoint)
        with detached(self.model):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        problem = flaw(Path(self.state.best_model_checkpoint))
        if problem:
            raise ValueError(
                f"The best checkpoint {self.state.best_model_checkpoint} is not whole: {problem}; training is over and "
                "its last checkpoint is untouched, so load that one, or train with `load_best_model_at_end=False`."
            )
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            super()._load_best_model()
            return
        with detached(self.model):
            super()._load_best_model()
        load_connectors(self.pair.all_connectors, self.state.best_model_checkpoint)

    def _remove_unused_columns(self, dataset: Any, description: str | None = None) -> Any:
        kept = super()._remove_unused_columns(dataset, description)
        dropped = [name for name in dataset.column_names or () if name not in (kept.column_names or ())]
        if dropped and hasattr(kept, "__len__") and len(kept):
            check_dropped_columns(kept, self.data_collator, dropped)
        return kept

    def _set_signature_columns_if_needed(self) -> None:
        """Keep the columns that the student or the teacher takes."""
        super()._set_signature_columns_if_needed()
        self._signature_columns += [name for name in self.pair.columns if name not in self._signature_columns]
