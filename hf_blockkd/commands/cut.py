"""`hf-blockkd cut`: a student cut out of a teacher from a shell, and how good it is before any training."""

from __future__ import annotations

import argparse
import inspect
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from ..data.calibration import FEWEST_EXAMPLES, batches_for
from ..models.cut import CUT_NAME
from ..models.loading import load_model
from ..models.pooling import save_pooling
from ..models.processing import processing_of
from ..routing.forwards import in_eval_mode
from ..saving.settings import ARGS_NAME
from ..students.likeness import likeness
from ..students.progress import bars_shown
from ..students.student import make_student
from .rows import Rows, rows_for
from .tables import read_table

OWN = inspect.signature(make_student).parameters.keys() - {"config_overrides"}
MADE_BY_TRAINING = (ARGS_NAME, "training_args.bin", "trainer_state.json")


def run(args: argparse.Namespace) -> int:
    """Cut, measure, write, and print what came out.

    Raises:
        ValueError: If an option does not fit, before anything is written.
        OSError: If something is not there, or not to be overwritten.
    """
    _check_output(args.output, args.teacher, args.overwrite)
    overrides = _fields(args.config_overrides)
    table = None if args.dataset is None else read_table(args.dataset, args.split, args.dataset_config)
    teacher, processing = load_model(args.teacher), processing_of(args.teacher)
    rows = None
    if table is not None:
        rows = rows_for(teacher, processing, table, args.column, args.max_examples, args.max_length)
        check_that_it_runs(teacher, rows.calibration, rows.collator, rows.columns)
    start = time.perf_counter()
    with bars_shown():
        student = make_student(
            teacher,
            args.num_layers,
            args.hidden_size,
            layers=layers_of(args.layers),
            layers_path=args.layers_path,
            data=None if rows is None else rows.calibration,
            data_collator=None if rows is None else rows.collator,
            parameters=args.parameters,
            flops=args.flops,
            candidates=args.candidates,
            heal_steps=args.heal_steps,
            channels=args.channels,
            fit=not args.no_fit,
            **overrides,
        )
        seconds = time.perf_counter() - start
        found = {} if rows is None else likeness(student, teacher, rows.held_out, rows.collator)
    # In the names that every loader knows, a resuming trainer's included.
    student.save_pretrained(args.output, save_original_format=False)
    if processing is not None:
        processing.save_pretrained(args.output)
    student.cut.save(args.output)
    save_pooling(student, getattr(student, "pooling", None), args.output)
    lines = [*kept(student, teacher), ("cut in", f"{seconds:.1f} s"), *_measured(found, rows)]
    print("\n".join(f"{name:<19}  {text}" for name, text in [*lines, ("student", str(args.output))]))
    return 0


def holds_something(output: Path, teacher: str) -> bool:
    """Whether a folder to write to is there, and is not empty.

    Raises:
        ValueError: If it is a file, or the teacher's own folder.
    """
    if output.exists() and not output.is_dir():
        raise ValueError(f"`output` is {str(output)!r}, which is a file; name a folder.")
    if output.is_dir() and Path(teacher).is_dir() and output.samefile(teacher):
        raise ValueError(f"`output` is {str(output)!r}, the teacher's own folder; name another one.")
    return output.is_dir() and any(output.iterdir())


def _check_output(output: Path, teacher: str, overwrite: bool) -> None:
    if not holds_something(output, teacher):
        return
    is_cut = (output / CUT_NAME).is_file() and not any((output / name).exists() for name in MADE_BY_TRAINING)
    if not overwrite and not is_cut:
        raise ValueError(
            f"`output` is {str(output)!r}, which holds something else than an untrained cut; name another folder, or "
            "say `--overwrite`."
        )


def _fields(text: str | None) -> dict[str, Any]:
    try:
        fields = json.loads(text or "{}")
    except ValueError as error:
        raise ValueError(f"`config_overrides` is {text!r}, which is no JSON ({error}); correct it.") from None
    if not isinstance(fields, dict):
        raise ValueError(f"`config_overrides` is {text!r}, but must be a JSON object of fields and values.")
    if taken := sorted(fields.keys() & OWN):
        raise ValueError(f"`config_overrides` names {taken[0]!r}, which `make_student` takes itself; leave it out.")
    return fields


def layers_of(text: str) -> str | list[int]:
    """The name of a choice, or indices; what is neither is refused where the choices are known."""
    try:
        return [int(index) for index in text.split(",")]
    except ValueError:
        return text


@torch.no_grad()
def check_that_it_runs(teacher: PreTrainedModel, rows: Any, collator: Callable, columns: Sequence[str]) -> None:
    """Refuse rows that do not go with the model, in its own words.

    Args:
        teacher: The model.
        rows: From `inputs_of`, like the others.
        collator: Makes a batch of them.
        columns: What they were made of.

    Raises:
        ValueError: If it does not run on them.
    """
    try:
        with in_eval_mode(teacher):
            for batch in batches_for(teacher, rows, collator, num_examples=FEWEST_EXAMPLES):
                teacher(**batch)
    except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(
            f"{type(teacher).__name__} does not run on rows of {' and '.join(columns)} "
            f"({' '.join(str(error).split()).rstrip('.')}); name other columns with `--column`, or correct the "
            "processing beside it."
        ) from error


def kept(student: PreTrainedModel, teacher: PreTrainedModel) -> Iterator[tuple[str, str]]:
    """Lines that say what a cut left of its teacher: names and values."""
    cut = student.cut
    yield "layers", f"{len(cut.layers)} of {cut.depth}: {', '.join(map(str, cut.layers))}"
    ours, theirs = _sizes(student.config), _sizes(teacher.config)
    for name, size in theirs.items():
        if ours.get(name, size) != size:
            yield name, f"{ours[name]} of {size}"
    sizes = [model.num_parameters() for model in (student, teacher)]
    yield "parameters", f"{sizes[0]:,} of {sizes[1]:,} ({sizes[0] / sizes[1]:.1%})"


def _sizes(config: PreTrainedConfig) -> dict[str, int]:
    """The whole numbers in a config: widths, numbers of heads, neurons and layers."""

    def walk(fields: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, int]]:
        for name, value in fields.items():
            if isinstance(value, Mapping):
                yield from walk(value, f"{before}{name}.")
            elif isinstance(value, int):
                yield f"{before}{name}", value

    return dict(walk(config.to_dict()))


FORMS: dict[str, tuple[str, Callable[[float], str]]] = {
    "kl": ("KL from teacher", "{:.4f} nats".format),
    "similarity": ("similarities", "{:.4g} from the teacher's, squared".format),
    "mse": ("squared error", "{:.4g} from the teacher's outputs".format),
    "accuracy": ("accuracy", "{:.1%}".format),
    "perplexity": ("perplexity", "{:.2f}".format),
}
"""Figures of `likeness`, their names, and how they are written."""


def _measured(found: Mapping[str, float], rows: Rows | None) -> Iterator[tuple[str, str]]:
    if rows is None:
        return
    counts = f"{len(rows.calibration)} rows to cut by, {len(rows.held_out)} held out to measure on"
    yield "data", f"{' and '.join(rows.columns)}: {counts}"
    for kind, (title, form) in FORMS.items():
        if kind in found:
            yield title, form(found[kind])
        if f"student_{kind}" in found:
            yield title, f"{form(found[f'student_{kind}'])}, teacher {form(found[f'teacher_{kind}'])}"
