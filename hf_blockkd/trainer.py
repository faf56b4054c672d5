"""The trainer: `BlockwiseDistillTrainer`."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import PreTrainedModel, Trainer, TrainerCallback
from transformers.trainer_utils import EvalPrediction
from transformers.utils import logging

from .chunked_loss import chunked_block_kd_loss, default_chunk_size
from .config import BlockwiseDistillConfig
from .connectors import attach, detached, load_connectors, save_connectors, without_connectors
from .data_checks import check_dropped_columns, check_label_column, check_not_empty, check_padding
from .errors import UnsupportedArchitectureError
from .heads import Head
from .loading import load_model
from .loss_log import LossLog
from .losses import RowLosses, block_kd_loss, stone_weights
from .pair import Pair, is_peft
from .routing import Extras, check_examples, has_tensors, main_outputs, take_examples
from .sampling import StoneDraw, draw_stones, sampling_shares
from .self_test import self_test
from .stepping_stones import choose_stones
from .teacher_cache import KEYS, KeyedCollator, TeacherCache, check_cacheable, open_cache
from .top_k import TopK

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
        check_not_empty(train_dataset)
        student = load_model(model) if isinstance(model, str) else model
        teacher = load_model(teacher_model) if isinstance(teacher_model, str) else teacher_model
        self.pair = Pair(student, teacher, args, processing_class)
        check_label_column(train_dataset, self.pair.task.num_example_classes)
        check_cacheable(args, self.pair.task, train_dataset)
        self.teacher, self.block_map, self.connectors = teacher, self.pair.block_map, self.pair.connectors
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
        check_padding(self.data_collator)
        if hasattr(self.model, "add_model_tags"):
            self.model.add_model_tags(self._tag_names)
        self.teacher.to(self.accelerator.device)
        # Our losses are sums over the whole accumulation window divided by its number of labels.
        self.loss_is_scaled_for_ga = True
        self._first_batch_passed = False
        self._examples_seen = 0  # in the micro-batches of this step so far
        self._cache: TeacherCache | None = None
        self._extras: Extras = {}
        self._evaluated: str | int = "student"
        self._loss_log = LossLog()
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
        inputs = dict(inputs)
        keys = inputs.pop(KEYS, None)
        self._check_first_batch(inputs)
        losses = self._losses(inputs, num_items_in_batch)
        chunk_size = self._chunk_size(losses)
        teacher_head, student_head = (self.pair.teacher_head, self.pair.student_head) if chunk_size else (None, None)
        teacher_inputs = self.pair.inputs_for("teacher", inputs)
        drawn = self._draw_stones(losses.num_examples)

        prefix: dict[int, torch.Tensor] = {}
        if keys is None:
            with self.pair.prefix.capture() as prefix:
                teacher_rows, extras = self._teach(losses, teacher_head, teacher_inputs)
        else:
            teacher_rows = self._cache.rows(keys.tolist(), losses.counts(), keys.device)
            extras = self._extras
        with self.pair.prefix.enter(prefix, extras), self.pair.stones.capture(drawn) as states:
            outputs, student_rows = self._rows(losses, student_head, model, self.pair.inputs_for("student", inputs))
        with self.accelerator.autocast():
            stone_rows, subsets = {}, {}
            for i, draw in drawn.items():
                own_losses, own_inputs = losses, teacher_inputs
                if draw.examples is not None:
                    check_examples(teacher_inputs, losses.num_examples, "Sharing out examples among stepping stones")
                    examples = draw.examples.to(losses.labels.device)
                    own_losses, subsets[i] = losses.of_examples(examples)
                    own_inputs = take_examples(teacher_inputs, examples, losses.num_examples)
                    if not len(examples):
                        stone_rows[i] = student_rows.detach()[:0]
                        continue
                with self.pair.stones.enter(i, states, extras, draw.examples):
                    _, stone_rows[i] = self._rows(own_losses, teacher_head, self.teacher, own_inputs)
            parts = {
                "losses": losses,
                "student": student_rows,
                "teacher": teacher_rows,
                "stones": stone_rows,
                "weights": {i: draw.weight for i, draw in drawn.items()},
                "subsets": subsets,
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
        self._loss_log.add(loss, ranks, self.state.global_step, {i: draw.rate for i, draw in drawn.items()})
        total = (loss.total + self._touch_idle({i for i, rows in stone_rows.items() if rows.requires_grad})) * ranks
        return (total, outputs) if return_outputs else total

    def _losses(self, inputs: dict[str, Any], num_items_in_batch: torch.Tensor | int | None = None) -> RowLosses:
        return RowLosses(
            problem_type=self.pair.task.problem(inputs),
            labels=self.pair.task.labels(inputs),
            num_items=num_items_in_batch,
            divergence=self.args.divergence,
            temperature=self.args.temperature,
            standardize=self.args.standardize_logits,
            label_smoothing=self.args.label_smoothing_factor,
            num_examples=len(inputs[self.pair.task.label_names[0]]),
        )

    def _chunk_size(self, losses: RowLosses) -> int | None:
        """Rows whose logits exist at a time; `None` where all fit, or a model's head cannot be applied by itself."""
        if self.args.loss_chunk_size == 0 or self.pair.student_head is None or self.pair.teacher_head is None:
            return None
        size = self.args.loss_chunk_size or default_chunk_size(self.pair.task.num_classes, losses.labels.device)
        return size if len(losses) > size else None

    def _teach(
        self, losses: RowLosses, head: Head | None, inputs: dict[str, Any], where: str | None = None
    ) -> tuple[torch.Tensor, Extras]:
        """The teacher's clean pass: its rows, and what the stones need of it."""
        with self.accelerator.autocast(), torch.no_grad(), self.pair.stones.record() as extras:
            _, rows = self._rows(losses, head, self.teacher, inputs)
        self._check_finite(losses, rows, where or f"a batch of optimizer step {self.state.global_step + 1}")
        return rows, extras

    def _rows(
        self, losses: RowLosses, head: Head | None, model: nn.Module, inputs: dict[str, Any]
    ) -> tuple[Any, torch.Tensor]:
        """Run a model; its outputs, and the rows of its logits, or of what enters its head where that waits."""
        if head is None:
            outputs = model(**inputs)
            return outputs, losses.rows(self.pair.task.logits(outputs))
        with head.capture() as captured:
            outputs = model(**inputs)
        return outputs, losses.rows(self.pair.task.align(captured["states"]))

    def _draw_stones(self, num_examples: int) -> dict[int, StoneDraw]:
        """The stones of this micro-batch, and what of it each of them gets."""
        # Read anew at every step, so that a callback may change it; connectors train where it named them at first.
        stones = choose_stones(self.args.stepping_stones, len(self.pair.stones), self.args.stones_per_step)
        stones = [i for i in stones if i in self.pair.trained_stones]
        weights = stone_weights(stones, len(self.pair.stones), self.args.stone_weighting)
        # The micro-batches of a step follow one another, and in each those of the ranks.
        first = self._examples_seen * self.accelerator.num_processes + self.accelerator.process_index * num_examples
        self._examples_seen += num_examples
        return draw_stones(
            self.args.stepping_stones,
            weights,
            sampling_shares(weights, self.pair.stones.suffix_layers, self.args.stone_sampling),
            seed=self.args.seed,
            step=self.state.global_step,
            num_examples=num_examples,
            first_example=first,
            stones_per_step=self.args.stones_per_step,
            fraction=self.args.stone_fraction,
            every=self.args.stones_every,
        )

    def _touch_idle(self, running: Collection[int]) -> torch.Tensor | float:
        """Zero, attached to the connectors that do not run: DistributedDataParallel waits for every gradient."""
        idle = (self.connectors[i - 1] for i in self.pair.trained_stones if i not in running)
        return sum(0.0 * parameter.sum() for connector in idle for parameter in connector.parameters())

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        return self.pair.complete(super()._prepare_inputs(inputs))

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> torch.Tensor | int | None:
        """Number of labels in an accumulation window, over all ranks where tokens are averaged across devices."""
        self._examples_seen = 0
        for inputs in batch_samples:
            # On an accelerator, looking at the labels would stall it at every step.
            self.pair.check_batch(inputs, labels=device.type == "cpu" or not self._first_batch_passed)
        count = sum(
            (self.pair.task.count(inputs).to(device) for inputs in batch_samples), torch.tensor(0, device=device)
        )
        if self.args.average_tokens_across_devices and self.accelerator.num_processes > 1:
            count = self.accelerator.gather(count).sum()
        return count.clamp(min=1)

    # ---- Checks on the way ----

    def _check_first_batch(self, inputs: dict[str, Any]) -> None:
        """Self-test of the routing, and search for a shared prefix, on the first batch of a run."""
        if self._first_batch_passed:
            return
        with self.accelerator.autocast():
            extras = self_test(self.pair, inputs, self._takes_examples)
        if self._cache is not None:
            self._extras = self._cacheable(extras)
        self._first_batch_passed = True

    @property
    def _takes_examples(self) -> bool:
        return self.args.stepping_stones == "share" or self.args.stone_fraction < 1

    def _check_finite(self, losses: RowLosses, teacher_rows: torch.Tensor, where: str) -> None:
        finite = torch.isfinite(teacher_rows)
        if not finite.all():
            raise ValueError(
                f"The teacher gives values that are not finite for examples {losses.examples(~finite)} of {where}; "
                "training stops here, and the last checkpoint is untouched. Check these inputs, or run the teacher in "
                "a wider dtype."
            )

    def _cacheable(self, extras: Extras) -> Extras:
        """What the layers hand on, which must not depend on the batch where there is no clean pass to read it off."""
        if self.pair.trained_stones and has_tensors(extras):
            raise UnsupportedArchitectureError(
                f"The layers of {type(self.teacher).__name__} hand on more than hidden states, which stepping stones "
                "need of the clean pass that `teacher_cache` saves; set it to None, or `stepping_stones` to 'none'."
            )
        return extras

    # ---- The teacher cache ----

    def get_train_dataloader(self) -> DataLoader:
        # A run begins here: nothing that the last one found out, with other weights or data, holds for it.
        self._first_batch_passed, self._cache, self._loss_log = False, None, LossLog()
        self.pair.prefix.depth = 0
        if self.args.teacher_cache is None:
            return super().get_train_dataloader()
        collator, self.data_collator = self.data_collator, KeyedCollator(self.data_collator)
        try:
            self._cache = self._fill_cache()
            return super().get_train_dataloader()
        finally:
            self.data_collator = collator

    def _fill_cache(self) -> TeacherCache:
        """Run the teacher on every training example that its cache does not know, each rank on its own ones."""
        cache = open_cache(self.args, self.pair, self.accelerator.mixed_precision)
        drop_last, self.args.dataloader_drop_last = self.args.dataloader_drop_last, False
        try:
            batches = self.get_test_dataloader(self.train_dataset)
        finally:
            self.args.dataloader_drop_last = drop_last

        def outputs(inputs: dict[str, Any]) -> tuple[list[int], torch.Tensor | TopK]:
            self.pair.check_batch(inputs, labels=True)
            losses, head = self._losses(inputs), self.pair.teacher_head
            rows, extras = self._teach(losses, head, self.pair.inputs_for("teacher", inputs), "a training batch")
            self._cacheable(extras)
            with self.accelerator.autocast():
                return losses.counts(), cache.compress(rows, head)

        batches = tqdm(batches, "Teacher cache", disable=self.args.disable_tqdm)
        cache.fill((self._prepare_inputs(batch) for batch in batches), outputs, self.accelerator)
        return cache

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
                model, self.pair.inputs_for("student", inputs, labels=True), return_outputs, num_items_in_batch
            )
        teacher_inputs = self.pair.inputs_for("teacher", inputs, labels=True)
        with self.accelerator.autocast():
            outputs, extras = self.pair.stones.teach(teacher_inputs)
            if self._evaluated != "teacher":
                with self.pair.stones.capture([self._evaluated]) as states:
                    model(**self.pair.inputs_for("student", inputs))
                outputs = self.pair.stones.run(self._evaluated, states, teacher_inputs, extras)
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
            for evaluated in ("teacher", *range(1, len(self.pair.stones) + 1)):
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
        teacher_inputs = self.pair.inputs_for("teacher", inputs)
        indices = range(1, len(self.pair.stones) + 1)
        was_training = self.model.training
        self.model.eval()
        try:
            with self.accelerator.autocast():
                _, extras = self.pair.stones.teach(teacher_inputs)
                with self.pair.stones.capture(indices) as states:
                    self.model(**self.pair.inputs_for("student", inputs))
                logits = {i: main_outputs(self.pair.stones.run(i, states, teacher_inputs, extras)) for i in indices}
        finally:
            self.model.train(was_training)
        return {i: heads[0] if len(heads) == 1 else torch.stack(heads, dim=-1) for i, heads in logits.items()}

    # ---- Logging ----

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            logs |= self._loss_log.take(self.accelerator)
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
        key_names = {} if is_peft(student) else {"save_original_format": False}
        student.save_pretrained(output_dir, state_dict=state_dict, **key_names)
        processing = self.processing_class or getattr(self.data_collator, "tokenizer", None)
        if processing is not None:
            processing.save_pretrained(output_dir)
        save_connectors(self.connectors, output_dir)
        with open(os.path.join(output_dir, "training_args.json"), "w", encoding="utf-8") as file:
            file.write(self.args.to_json_string())

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        # The connectors first: those of another run are refused before anything of the student is overwritten.
        load_connectors(self.connectors, resume_from_checkpoint)
        with detached(self.model):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        with detached(self.model):
            super()._load_best_model()
        load_connectors(self.connectors, self.state.best_model_checkpoint)

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
