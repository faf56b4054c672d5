"""`hf-blockkd distill`: from a teacher and a data set to a trained student, for people who write no script."""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from datasets import Dataset
from transformers import EvalPrediction, PreTrainedModel, TrainerCallback
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from ..config import BlockwiseDistillConfig
from ..data.calibration import FEWEST_EXAMPLES, batches_for
from ..losses.rows import IGNORED
from ..models.flops import forward_flops
from ..models.loading import load_model, place
from ..models.processing import processing_of
from ..pairing.tasks import Task
from ..students.choices import LAYER_CHOICES
from ..students.likeness import likeness
from ..students.progress import bars_shown
from ..students.student import make_student
from ..trainer import BlockwiseDistillTrainer
from . import report
from .cut import FORMS, check_that_it_runs, kept, layers_of
from .flags import refuse
from .notes import Notes
from .options import DEFAULT_SHARE
from .recipe import recipe_for
from .report.curves import LOSS_STYLES
from .rows import Inputs, inputs_of, reads_running_text
from .tables import read_splits

HELD_OUT = 0.1
"""Share of the rows that is held out where the data set has no split to evaluate on."""
EVAL_SPLITS = ("validation", "test")
SHOWN = 10
"""How often losses and figures are told, and checkpoints written, in a run."""


def run(args: argparse.Namespace) -> int:
    """Cut a student, show the plan, train, measure, write and report.

    Given again after it was killed, it goes on from its last checkpoint.

    Raises:
        ValueError: If an option does not fit, before anything is written, or training cannot go on.
        OSError: If something is not there.
    """
    _check_numbers(args)
    notes = Notes.of(args)
    train, held_out, split = _tables(args)
    teacher, processing = load_model(args.teacher), processing_of(args.teacher)
    place(teacher, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    train, held_out = _inputs(args, teacher, processing, train, held_out)
    notes.begin()

    student = notes.student()
    if student is None:
        print("Cutting the student out of its teacher, and measuring it", flush=True)
        with bars_shown():
            student = _cut(args, teacher, train)
            notes.found["before"] = likeness(student, teacher, held_out.rows, held_out.collator)
    notes.write()
    trainer = _trainer(args, teacher, processing, train, held_out, student)
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(_Lines())
    _show(_plan(trainer, train, held_out, split, notes))
    trained = trainer.train(resume_from_checkpoint=notes.checkpoint)
    with bars_shown():
        after = likeness(student, teacher, held_out.rows, held_out.collator)
    _save(args, trainer, trained.metrics, notes.found["before"], after)
    _show(_figures(trainer, notes.found["before"], after))
    if got_worse(notes.found["before"], after):
        print(
            "Training made it worse than it was cut: give it more `--epochs`, or a lower `--learning_rate`; "
            "`hf-blockkd cut` writes an untrained one."
        )
    print(f"\nThe student is in {args.output}", flush=True)
    try:
        report.run(argparse.Namespace(folders=[args.output], output=None, metric=None))
    except (ValueError, OSError, ImportError) as error:  # the student is there all the same
        refuse(error)
    return 0


def _check_numbers(args: argparse.Namespace) -> None:
    if args.parameters is not None and args.flops is not None:
        raise ValueError(f"`parameters` is {args.parameters} and `flops` is {args.flops}; give one of them.")
    for name in ("learning_rate", "epochs", "batch_size"):
        value = getattr(args, name)
        if value is not None and not 0 < value < math.inf:
            raise ValueError(f"`{name}` is {value}, but must be a positive number.")


# ---- Data, student, trainer ----


def _tables(args: argparse.Namespace) -> tuple[Dataset, Dataset | None, str]:
    """Rows to train on, those to measure on if there is a split of them, and what these are called."""
    splits = read_splits(args.dataset, args.dataset_config)
    train = splits.get("train", next(iter(splits.values())) if len(splits) == 1 else None)
    if train is None:
        raise ValueError(f"`dataset` is {args.dataset!r}, which has no split `train`, but {', '.join(splits)}.")
    name = next((name for name in EVAL_SPLITS if name in splits), None)
    return train, splits.get(name), f"split `{name}`" if name else f"{HELD_OUT:.0%} held out"


def _inputs(
    args: argparse.Namespace, teacher: PreTrainedModel, processing: Any, train: Dataset, held_out: Dataset | None
) -> tuple[Inputs, Inputs]:
    if held_out is None:
        if len(train) < 2 * FEWEST_EXAMPLES:
            raise ValueError(f"`dataset` is {args.dataset!r}, which has {len(train)} rows, too few to hold some out.")
        # Of a running text the end is held out, which follows on nothing that is trained on.
        number = max(FEWEST_EXAMPLES, round(HELD_OUT * len(train)))
        parts = train.train_test_split(number, seed=args.seed, shuffle=not reads_running_text(teacher))
        train, held_out = parts["train"], parts["test"]
    made = [inputs_of(teacher, processing, table, args.column, args.max_length) for table in (train, held_out)]
    for inputs, what in zip(made, ("to train on", "to measure on"), strict=True):
        if len(inputs.rows) < FEWEST_EXAMPLES:
            raise ValueError(
                f"Rows {what} that the data set gives: {len(inputs.rows)}, but {FEWEST_EXAMPLES} are needed; give it "
                "more, or a language model longer texts or a smaller `--max_length`."
            )
        check_that_it_runs(teacher, inputs.rows, inputs.collator, inputs.columns)
    return made[0], made[1]


def _cut(args: argparse.Namespace, teacher: PreTrainedModel, train: Inputs) -> PreTrainedModel:
    sizes = {name: getattr(args, name) for name in ("num_layers", "hidden_size", "parameters", "flops")}
    if all(size is None for size in sizes.values()) and args.layers in LAYER_CHOICES:
        sizes["parameters"] = DEFAULT_SHARE
    # Updates of weights in half precision would be lost.
    own = {"layers": layers_of(args.layers), "dtype": torch.float32}
    data = train.rows if len(train.rows) >= 2 * FEWEST_EXAMPLES else None
    return make_student(teacher, data=data, data_collator=train.collator, **sizes, **own)


def _trainer(
    args: argparse.Namespace,
    teacher: PreTrainedModel,
    processing: Any,
    train: Inputs,
    held_out: Inputs,
    student: PreTrainedModel,
) -> BlockwiseDistillTrainer:
    has_labels = has_classes(held_out, teacher)
    settings = {
        **recipe_for(teacher, student, len(train.rows), args.epochs, args.batch_size, args.learning_rate),
        "output_dir": str(args.output),
        "seed": args.seed,
        "remove_unused_columns": False,  # rows are encoded when they are read, and hold nothing else
        "eval_strategy": "steps" if has_labels else "no",
        "eval_on_start": has_labels,
        "eval_steps": 1 / SHOWN,
        "save_strategy": "steps",
        "save_steps": 1 / SHOWN,
        "save_total_limit": 1,
        "logging_steps": 1 / SHOWN / 4,
        "report_to": "none",
        "use_cpu": not torch.cuda.is_available(),
    }
    return BlockwiseDistillTrainer(
        model=student,
        teacher_model=teacher,
        args=BlockwiseDistillConfig(**settings),
        data_collator=train.collator,
        train_dataset=train.rows,
        eval_dataset=held_out.rows,
        processing_class=processing,
        compute_metrics=None if Task.of(teacher).over_vocabulary else _accuracy,
    )


def has_classes(inputs: Inputs, model: PreTrainedModel) -> bool:
    """Whether rows have labels, or collators make them of a text."""
    return Task.of(model).over_vocabulary or "labels" in inputs.collator([inputs.rows[0]])


def _no_classes(teacher: PreTrainedModel) -> str:
    names = [str(name) for name in (teacher.config.id2label or {}).values()]
    some = ", ".join(names[:SHOWN]) + ", ..." * (len(names) > SHOWN)
    return f"no column holds the classes of the teacher ({some})"


def _accuracy(prediction: EvalPrediction) -> dict[str, float]:
    known = prediction.label_ids != IGNORED
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids)[known].mean())}


# ---- What is told and written ----


class _Lines(TrainerCallback):
    """A line for each evaluation, or for each checkpoint where there is none."""

    losses: Sequence[str] = ()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if "loss" in logs:
            # Not their sum, in which weights fall.
            parts = {name: label for name, (label, *_) in LOSS_STYLES.items() if name != "loss"}
            self.losses = [f"{label} {logs[name]:.3f}" for name, label in parts.items() if logs.get(name)]
            if args.eval_strategy == "no" and state.global_step % state.save_steps == 0:
                self.tell(state, {})

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
        self.tell(state, metrics)

    def tell(self, state: Any, metrics: Mapping[str, float]) -> None:
        parts = [f"step {state.global_step:>6} of {state.max_steps}", *self.losses]
        if "eval_accuracy" in metrics:
            parts.append(f"accuracy {metrics['eval_accuracy']:.1%}")
        elif "eval_loss" in metrics:
            parts.append(f"perplexity {math.exp(min(metrics['eval_loss'], 99)):.2f}")
        print("  ".join(parts), flush=True)


def _show(lines: Iterator[tuple[str, str]]) -> None:
    print()
    for name, text in lines:
        print(f"{name:<19}  " + text.replace("\n", f"\n{'':<21}"))
    print(flush=True)


def _plan(
    trainer: BlockwiseDistillTrainer, train: Inputs, held_out: Inputs, split: str, notes: Notes
) -> Iterator[tuple[str, str]]:
    teacher, student, args = trainer.teacher, trainer.model, trainer.args
    yield "teacher", f"{type(teacher).__name__}, {teacher.num_parameters():,} parameters"
    yield (
        "data",
        f"{' and '.join(train.columns)}: {len(train.rows):,} rows to train on, {len(held_out.rows):,} "
        f"({split}) to measure on",
    )
    if not has_classes(train, teacher):
        yield "labels", f"not used, {_no_classes(teacher)}: the student learns from the teacher alone"
    yield from kept(student, teacher)
    example = next(batches_for(teacher, train.rows, train.collator, num_examples=FEWEST_EXAMPLES, batch_size=1))
    flops = [forward_flops(model, example) for model in (student, teacher)]
    yield "FLOPs of a row", f"{flops[0]:.3g} of {flops[1]:.3g} ({flops[0] / flops[1]:.1%})"
    yield "block map", str(trainer.block_map)
    kinds = {
        "block_kd": "labels, the teacher's outputs, and its states at the ends of blocks",
        "kd": "labels and the teacher's outputs",
    }
    text = kinds[args.objective]
    yield "trains on", text if has_classes(train, teacher) else text.replace("labels, ", "").replace("labels and ", "")
    per_epoch = math.ceil(len(train.rows) / args.per_device_train_batch_size)
    epochs, size = args.num_train_epochs, args.per_device_train_batch_size
    yield "steps", f"{math.ceil(per_epoch * epochs):,} of {size} rows, {epochs:g} x {per_epoch:,}"
    yield "precision", f"{'bfloat16' if args.bf16 else 'float32'} on {args.device}"
    compared = "states" if args.objective == "block_kd" else "outputs alone"
    reason = f"what searches found for students of this width that compare {compared}; --learning_rate sets another"
    yield "learning rate", f"{args.learning_rate:.2g}: {'as you said' if notes.asked['learning_rate'] else reason}"
    if notes.checkpoint is not None:
        yield "goes on from", notes.checkpoint


def _figures(
    trainer: BlockwiseDistillTrainer, before: Mapping[str, float], after: Mapping[str, float]
) -> Iterator[tuple[str, str]]:
    """A line for each model."""
    names = [name for name in FORMS if name in after or f"student_{name}" in after]
    rows = {
        "teacher": {name: after.get(f"teacher_{name}", 0.0) for name in names},
        "student, cut": {name: before.get(f"student_{name}", before.get(name)) for name in names},
        "student, trained": {name: after.get(f"student_{name}", after.get(name)) for name in names},
    }
    yield "", "".join(f"{FORMS[name][0]:>18}" for name in names) + f"{'parameters':>16}"
    for who, figures in rows.items():
        cells = (FORMS[name][1](figures[name]).split(" from")[0] for name in names)
        model = trainer.teacher if who == "teacher" else trainer.model
        yield who, "".join(f"{cell:>18}" for cell in cells) + f"{model.num_parameters():>16,}"


def got_worse(before: Mapping[str, float], after: Mapping[str, float]) -> bool:
    """Whether training took more than it gave, by the figure that says most: that of labels, if there are some.

    Args:
        before: What `likeness` found of the student that was cut.
        after: Likewise, of the one that was trained.
    """
    if "student_accuracy" in after:
        return after["student_accuracy"] < before["student_accuracy"]
    figure = next(name for name in ("student_perplexity", "kl", "similarity", "mse") if name in after)
    return after[figure] > before[figure]


def _save(
    args: argparse.Namespace,
    trainer: BlockwiseDistillTrainer,
    trained: dict[str, float],
    before: Mapping[str, float],
    after: Mapping[str, float],
) -> None:
    trainer.save_model()
    trainer.save_state()
    trainer.save_metrics("train", trained)
    figures = {f"eval_{name.removeprefix('student_')}": value for name, value in after.items()}
    figures |= {
        f"eval_before_{name.removeprefix('student_')}": value
        for name, value in before.items()
        if not name.startswith("teacher_")
    }
    trainer.save_metrics("eval", figures)
    trainer.create_model_card(model_name=args.output.name, dataset=args.dataset)
