"""The trainer: `BlockwiseDistillTrainer`."""

from __future__ import annotations

import inspect
import math
import os
import random
from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import transformers
from torch import nn
from transformers import AutoConfig, PreTrainedModel, Trainer, TrainerCallback
from transformers.trainer_utils import EvalPrediction
from transformers.utils import logging

from .blocks import BlockMap
from .chunked_loss import chunked_block_kd_loss, default_chunk_size
from .compatibility import block_shapes, check_models, check_token_counts
from .config import BlockwiseDistillConfig
from .connectors import attach, detached, load_connectors, make_connectors, save_connectors, without_connectors
from .errors import UnsupportedArchitectureError
from .heads import Head, find_head
from .layers import find_layer_stack
from .losses import BlockKDLoss, RowLosses, block_kd_loss, stone_weights
from .routing import main_outputs, routing_errors
from .stepping_stones import SteppingStones, choose_stones
from .tasks import Task

if TYPE_CHECKING:
    from peft import PeftConfig

logger = logging.get_logger(__name__)

ROUTING_TOLERANCE = 1e-3
"""Largest routing error that is still rounding, relative to the largest logit; a wrong route errs by far more."""


class BlockwiseDistillTrainer(Trainer):
    """Trains a student through the frozen layers of its teacher: block-wise logit distillation.

    It is a [`~transformers.Trainer`]: data, optimizer, schedule, logging, evaluation, checkpoints and hub work as
    there. While training, it also runs the *stepping stones*: the student's first blocks, a connector, and the
    teacher's remaining layers and head, for each block (Yu et al., 2024, arXiv 2411.01547). What it saves is a plain
    student, with `connectors.safetensors` beside it, which only resuming needs.

    Args:
        model: The student, with a head, or a name or path of one.
        teacher_model: The teacher, with a head for the same task and classes, or a name or path. It is frozen and kept
            in eval mode.
        args: The configuration; the default trains into `tmp_trainer`.
        data_collator: As in `Trainer`.
        train_dataset: As in `Trainer`; it needs labels.
        eval_dataset: As in `Trainer`.
        processing_class: Tokenizer or image processor, saved with the student.
        compute_metrics: As in `Trainer`; it sees the student's logits alone.
        callbacks: As in `Trainer`.
        optimizers: As in `Trainer`.
        preprocess_logits_for_metrics: As in `Trainer`.
        peft_config: Wraps the student in an adapter; the connectors train beside it.

    Attributes:
        teacher: The frozen teacher.
        block_map: The cut of both stacks, a [`BlockMap`].
        connectors: `nn.ModuleList` with the n connectors.

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
        model: PreTrainedModel | str,
        teacher_model: PreTrainedModel | str,
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
        if args.fsdp or args.deepspeed:
            raise ValueError(
                f"`{'fsdp' if args.fsdp else 'deepspeed'}` is set, but the teacher cannot be sharded yet; use "
                "DistributedDataParallel, which `accelerate launch --multi_gpu` starts."
            )
        student = _load(model) if isinstance(model, str) else model
        teacher = _load(teacher_model) if isinstance(teacher_model, str) else teacher_model
        base_student = student.get_base_model() if _is_peft(student) else student
        check_models(base_student, teacher)

        student_stack = find_layer_stack(base_student, args.student_layers_path)
        teacher_stack = find_layer_stack(teacher, args.teacher_layers_path)
        self.block_map = BlockMap.cut(
            len(student_stack), len(teacher_stack), args.num_blocks, args.student_boundaries, args.teacher_boundaries
        )
        self._trained_stones = choose_stones(args.stepping_stones, len(self.block_map), args.stones_per_step)
        student_shapes = block_shapes(base_student, student_stack, self.block_map.student)
        teacher_shapes = block_shapes(teacher, teacher_stack, self.block_map.teacher)
        check_token_counts(base_student, teacher, student_shapes, teacher_shapes)

        self.connectors = make_connectors(
            args.connector, [s[-1] for s in student_shapes], [s[-1] for s in teacher_shapes], args.seed
        ).to(student.dtype)
        for index, connector in enumerate(self.connectors, start=1):
            connector.requires_grad_(index in self._trained_stones)
        self.teacher = teacher.requires_grad_(False).eval()
        if hasattr(teacher.config, "use_cache"):
            teacher.config.use_cache = False
        self.stones = SteppingStones(student_stack, teacher, teacher_stack, self.block_map, self.connectors)
        self.task = Task.of(base_student)
        is_language_model = self.task.over_vocabulary
        self.student_head = find_head(base_student) if is_language_model else None
        self.teacher_head = find_head(teacher) if is_language_model else None
        self._forward_parameters = {
            "student": inspect.signature(base_student.forward).parameters,
            "teacher": inspect.signature(teacher.forward).parameters,
        }
        # Encoder-decoders for generation make their decoder's inputs of the labels.
        self._shift_labels = getattr(base_student, "prepare_decoder_input_ids_from_labels", None)
        if peft_config is not None:
            from peft import get_peft_model

            student = get_peft_model(student, peft_config)
        attach(self.connectors, student)

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
        if hasattr(self.model, "add_model_tags"):
            self.model.add_model_tags(self._tag_names)
        self.teacher.to(self.accelerator.device)
        # Our losses are sums over the whole accumulation window divided by its number of labels.
        self.loss_is_scaled_for_ga = True
        self._first_batch_passed = False
        self._evaluated: str | int = "student"
        self._log_sums: dict[str, torch.Tensor] = {}
        self._log_steps: dict[str, set[int]] = defaultdict(set)
        logger.info(f"Block map:\n{self.block_map}")

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
        self._check_first_batch(inputs)
        losses = RowLosses(
            problem_type=self.task.problem(inputs),
            labels=self.task.labels(inputs),
            num_items=num_items_in_batch,
            divergence=self.args.divergence,
            temperature=self.args.temperature,
            standardize=self.args.standardize_logits,
            label_smoothing=self.args.label_smoothing_factor,
        )
        chunk_size = self._chunk_size(losses)
        teacher_head, student_head = (self.teacher_head, self.student_head) if chunk_size else (None, None)
        teacher_inputs = self._inputs_for("teacher", inputs)
        drawn, scale = self._draw_stones()

        with self.accelerator.autocast(), torch.no_grad(), self.stones.record() as extras:
            _, teacher_rows = self._rows(losses, teacher_head, self.teacher, teacher_inputs)
        self._check_finite(losses, teacher_rows)
        with self.stones.capture(drawn) as states:
            outputs, student_rows = self._rows(losses, student_head, model, self._inputs_for("student", inputs))
        with self.accelerator.autocast():
            stone_rows = {}
            for i in drawn:
                with self.stones.enter(i, states, extras):
                    _, stone_rows[i] = self._rows(losses, teacher_head, self.teacher, teacher_inputs)
            weights = stone_weights(drawn, len(self.stones), self.args.stone_weighting)
            parts = {
                "losses": losses,
                "student": student_rows,
                "teacher": teacher_rows,
                "stones": stone_rows,
                "weights": {i: weight * scale for i, weight in weights.items()},
                "task_weight": self.args.task_weight,
                "distill_weight": self.args.distill_weight,
                "cross_weight": self.args.cross_weight,
            }
            if chunk_size is None:
                loss = block_kd_loss(**parts)
            else:
                loss = chunked_block_kd_loss(
                    **parts, student_head=student_head, teacher_head=teacher_head, chunk_size=chunk_size
                )
        # DistributedDataParallel takes the mean over ranks of what is already divided by the labels of all ranks.
        ranks = self.accelerator.num_processes if self.args.average_tokens_across_devices else 1
        self._record(loss, ranks)
        total = (loss.total + self._touch_undrawn(drawn)) * ranks
        return (total, outputs) if return_outputs else total

    def _chunk_size(self, losses: RowLosses) -> int | None:
        """Rows whose logits exist at a time; `None` where all fit, or a model's head cannot be applied by itself."""
        if self.args.loss_chunk_size == 0 or self.student_head is None or self.teacher_head is None:
            return None
        size = self.args.loss_chunk_size or default_chunk_size(self.task.num_classes)
        return size if len(losses) > size else None

    def _rows(
        self, losses: RowLosses, head: Head | None, model: nn.Module, inputs: dict[str, Any]
    ) -> tuple[Any, torch.Tensor]:
        """Run a model; its outputs, and the rows of its logits, or of what enters its head where that waits."""
        if head is None:
            outputs = model(**inputs)
            return outputs, losses.rows(self.task.logits(outputs))
        with head.capture() as captured:
            outputs = model(**inputs)
        return outputs, losses.rows(self.task.align(captured["states"]))

    def _draw_stones(self) -> tuple[list[int], float]:
        """The stones of this optimizer step, and the factor that keeps a sample's weights unbiased.

        The draw depends on seed and step alone, so it is the same on every rank, in every micro-batch, and after a
        resume.
        """
        if self.args.stepping_stones != "sample":
            return self._trained_stones, 1.0
        draw = random.Random(f"{self.args.seed}-{self.state.global_step}")
        drawn = sorted(draw.sample(self._trained_stones, self.args.stones_per_step))
        return drawn, len(self._trained_stones) / len(drawn)

    def _touch_undrawn(self, drawn: list[int]) -> torch.Tensor | float:
        """Zero, attached to the connectors that were not drawn: DistributedDataParallel waits for every gradient."""
        undrawn = (self.connectors[i - 1] for i in self._trained_stones if i not in drawn)
        return sum(0.0 * parameter.sum() for connector in undrawn for parameter in connector.parameters())

    def _inputs_for(self, role: str, inputs: Mapping[str, Any], labels: bool = False) -> dict[str, Any]:
        """What of a batch goes to `"student"` or `"teacher"`: what its forward names, and what neither names."""
        own = self._forward_parameters[role]
        other = self._forward_parameters["teacher" if role == "student" else "student"]
        takes_more = any(parameter.kind is parameter.VAR_KEYWORD for parameter in own.values())
        return {
            name: value
            for name, value in inputs.items()
            if (name in own or (takes_more and name not in other)) and (labels or name not in self.task.label_names)
        }

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Also make the decoder's inputs where the data collator did not: the models run without the labels."""
        inputs = super()._prepare_inputs(inputs)
        if self._shift_labels and inputs.get("labels") is not None and "decoder_input_ids" not in inputs:
            inputs = {**inputs, "decoder_input_ids": self._shift_labels(inputs["labels"])}
        return inputs

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> torch.Tensor | int | None:
        """Number of labels in an accumulation window, over all ranks where tokens are averaged across devices."""
        for inputs in batch_samples:
            # On an accelerator, looking at the labels would stall it at every step.
            if device.type == "cpu" or not self._first_batch_passed:
                self.task.check_labels(inputs)
        count = sum((self.task.count(inputs).to(device) for inputs in batch_samples), torch.tensor(0, device=device))
        if self.args.average_tokens_across_devices and self.accelerator.num_processes > 1:
            count = self.accelerator.gather(count).sum()
        return count.clamp(min=1)

    # ---- Checks on the way ----

    def _check_first_batch(self, inputs: dict[str, Any]) -> None:
        """Self-test of the routing on the first batch of a run, before the first update."""
        if self._first_batch_passed:
            return
        teacher_inputs = self._inputs_for("teacher", inputs)
        with self.accelerator.autocast():
            largest = self.task.logits(self.stones.teach(teacher_inputs)[0]).abs().max().item()
            errors = routing_errors(self.teacher, self.stones.teacher_stack, teacher_inputs, self.block_map.teacher)
        depth, error = max(errors.items(), key=lambda item: item[1])
        # Logits that are not finite are reported as such by the step itself.
        if math.isfinite(largest) and error > ROUTING_TOLERANCE * largest:
            raise UnsupportedArchitectureError(
                f"{type(self.teacher).__name__} entered at layer {depth} from its own hidden states gives logits that "
                f"differ from its own by {error:.3g} (largest logit: {largest:.3g}), so it cannot be a teacher here; "
                "check it with `hf-blockkd check`, or name another stack with `teacher_layers_path`."
            )
        self._first_batch_passed = True

    def _check_finite(self, losses: RowLosses, teacher_rows: torch.Tensor) -> None:
        finite = torch.isfinite(teacher_rows)
        if not finite.all():
            raise ValueError(
                f"The teacher gives values that are not finite for examples {losses.examples(~finite)} of a batch of "
                f"optimizer step {self.state.global_step + 1}; training stops here, and the last checkpoint is "
                "untouched. Check these inputs, or run the teacher in a wider dtype."
            )

    # ---- Evaluation ----

    def _evaluation_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool,
        num_items_in_batch: torch.Tensor | int | None,
    ) -> torch.Tensor | tuple[torch.Tensor, Any]:
        """The own loss of whichever of student, teacher and stones is being evaluated; nothing is distilled."""
        if self._evaluated == "student":
            return super().compute_loss(
                model, self._inputs_for("student", inputs, labels=True), return_outputs, num_items_in_batch
            )
        teacher_inputs = self._inputs_for("teacher", inputs, labels=True)
        with self.accelerator.autocast():
            outputs, extras = self.stones.teach(teacher_inputs)
            if self._evaluated != "teacher":
                with self.stones.capture([self._evaluated]) as states:
                    model(**self._inputs_for("student", inputs))
                outputs = self.stones.run(self._evaluated, states, teacher_inputs, extras)
        logits = main_outputs(outputs)
        return (outputs.loss, {"loss": outputs.loss, **dict(enumerate(logits))}) if return_outputs else outputs.loss

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
        """Evaluate the teacher and every stepping stone as `evaluate` does the student.

        Args:
            eval_dataset: A data set; default: that of the trainer.
            ignore_keys: As in `Trainer.evaluate`.
            metric_key_prefix: Begins the names of the metrics.

        Returns:
            `{prefix}_teacher_{metric}` and `{prefix}_stone_{i}_{metric}`, which are logged, too.
        """
        dataloader = self.get_eval_dataloader(eval_dataset)
        metrics: dict[str, float] = {}
        try:
            for evaluated in ("teacher", *range(1, len(self.stones) + 1)):
                self._evaluated = evaluated
                name = evaluated if evaluated == "teacher" else f"stone_{evaluated}"
                prefix = f"{metric_key_prefix}_{name}"
                loop = self.evaluation_loop(
                    dataloader,
                    description=f"Evaluation of {name}",
                    prediction_loss_only=True if self.compute_metrics is None else None,
                    ignore_keys=ignore_keys,
                    metric_key_prefix=prefix,
                )
                metrics.update(loop.metrics)
                # Closes the progress bar.
                self.control = self.callback_handler.on_predict(self.args, self.state, self.control, loop.metrics)
        finally:
            self._evaluated = "student"
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
        inputs = self._prepare_inputs(dict(inputs))
        teacher_inputs = self._inputs_for("teacher", inputs)
        indices = range(1, len(self.stones) + 1)
        was_training = self.model.training
        self.model.eval()
        try:
            with self.accelerator.autocast():
                _, extras = self.stones.teach(teacher_inputs)
                with self.stones.capture(indices) as states:
                    self.model(**self._inputs_for("student", inputs))
                logits = {i: main_outputs(self.stones.run(i, states, teacher_inputs, extras)) for i in indices}
        finally:
            self.model.train(was_training)
        return {i: heads[0] if len(heads) == 1 else torch.stack(heads, dim=-1) for i, heads in logits.items()}

    # ---- Logging ----

    def _record(self, loss: BlockKDLoss, ranks: int) -> None:
        """Add the parts of a micro-batch's loss to the sums, on the device, for the next logging step."""
        parts = {"loss_task": loss.task, "loss_distill": loss.distill, "loss_cross": loss.cross}
        parts |= {f"stone_{i}/task": value for i, value in loss.stone_task.items()}
        parts |= {f"stone_{i}/distill": value for i, value in loss.stone_distill.items()}
        for name, value in parts.items():
            self._log_sums[name] = self._log_sums.get(name, 0.0) + value.detach() * ranks
            self._log_steps[name].add(self.state.global_step)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs and self._log_sums:
            sums = self.accelerator.gather(torch.stack(list(self._log_sums.values()))[None]).mean(0).tolist()
            # Each part is averaged over the steps that computed it: a sampled stone skips some.
            logs |= {name: value / len(self._log_steps[name]) for name, value in zip(self._log_sums, sums, strict=True)}
            self._log_sums.clear()
            self._log_steps.clear()
        super().log(logs, start_time)

    # ---- Checkpoints ----

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """Save a student that needs none of our code, its processing class, the arguments, and the connectors."""
        if not self.args.should_save:
            return
        output_dir = output_dir if output_dir is not None else self.args.output_dir
        os.makedirs(output_dir, exist_ok=True)
        student = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        state_dict = without_connectors(student.state_dict() if state_dict is None else state_dict)
        # The stock resume reads the file back raw, which fails for models whose hub checkpoints use older key names.
        key_names = {} if _is_peft(student) else {"save_original_format": False}
        student.save_pretrained(output_dir, state_dict=state_dict, **key_names)
        processing = self.processing_class or getattr(self.data_collator, "tokenizer", None)
        if processing is not None:
            processing.save_pretrained(output_dir)
        save_connectors(self.connectors, output_dir)
        with open(os.path.join(output_dir, "training_args.json"), "w", encoding="utf-8") as file:
            file.write(self.args.to_json_string())

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        with detached(self.model):
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        load_connectors(self.connectors, resume_from_checkpoint)

    def _load_best_model(self) -> None:
        with detached(self.model):
            super()._load_best_model()
        load_connectors(self.connectors, self.state.best_model_checkpoint)

    def _set_signature_columns_if_needed(self) -> None:
        """Keep the columns that the student or the teacher takes."""
        super()._set_signature_columns_if_needed()
        more = [name for name in self._forward_parameters["teacher"] if name not in self._signature_columns]
        self._signature_columns += more


def _load(name: str) -> PreTrainedModel:
    """Load a model of the class that its config names."""
    architectures = AutoConfig.from_pretrained(name).architectures or ["nothing"]
    model_class = getattr(transformers, architectures[0], None)
    if model_class is None:
        raise ValueError(
            f"The config of {name!r} names the architecture {architectures[0]!r}, which transformers does not have; "
            "load the model yourself and pass it instead of its name."
        )
    return model_class.from_pretrained(name)


def _is_peft(model: nn.Module) -> bool:
    return hasattr(model, "get_base_model")
