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
from ..students.layer_scores import LAYER_CHOICES
from ..students.likeness import likeness
from ..students.progress import bars_shown
from ..students.student import CHANNEL_CHOICES, make_student
from .rows import Rows, rows_for
from .tables import FORMATS, read_table

OWN = inspect.signature(make_student).parameters.keys() - {"config_overrides"}
MADE_BY_TRAINING = (ARGS_NAME, "training_args.bin", "trainer_state.json")


def add_options(parser: argparse.ArgumentParser) -> None:
    """What `cut` understands."""
    add = parser.add_argument
    add("teacher", metavar="TEACHER", help="hub name or folder")
    add("--output", type=Path, required=True, help="folder for the student, its cut.json, and the teacher's processing")
    add("--overwrite", action="store_true", help="write into a folder that holds something else than an untrained cut")
    add_size_options(parser, "default: as many as --layers names, or all", "default: the teacher's")
    add("--layers_path", help="dotted name of the ModuleList of layers; default: search for it")
    add("--candidates", type=int, default=1, help="sizes within the budget that are compared on rows; default: 1")
    add(
        "--heal_steps", type=int, default=0, help="steps that a student is trained on the teacher's outputs; default: 0"
    )
    add("--config_overrides", help="more fields of the student's config as JSON, e.g. '{\"intermediate_size\": 256}'")
    add(
        "--channels",
        choices=CHANNEL_CHOICES,
        help="what channels are chosen by; default: activations, without rows weights",
    )
    add("--no_fit", action="store_true", help="do not fit linear maps to what the teacher computes on the rows")
    add_data_options(parser)
    add("--split", default="train", help="split, or a part of it, e.g. train[:1000]; default: train")
    add("--max_examples", type=int, default=256, help="rows to cut by, and again as many to measure on; default: 256")


def add_size_options(parser: Any, depth: str, width: str) -> None:
    """Options that say how small a student is, with what holds where none is given."""
    add = parser.add_argument
    add("--num_layers", type=int, help=f"depth; {depth}")
    add("--hidden_size", type=int, help=f"width; {width}")
    add("--layers", default="even", help=f"{', '.join(LAYER_CHOICES)} or indices, e.g. 0,2,5; default: even")
    add("--parameters", type=float, help="a budget instead of sizes: a share of the teacher's parameters or a number")
    add("--flops", type=float, help="likewise, of the FLOPs of a forward on one row")


def add_data_options(parser: Any, required: bool = False) -> None:
    """Options that say which data, and how rows are made of it."""
    add = parser.add_argument
    files = f"hub name, file ({', '.join(FORMATS)}), or a folder of such files or of images"
    add("--dataset", metavar="DATA", required=required, help=files)
    add("--dataset_config", help="configuration of a hub data set")
    add("--column", nargs="+", help="column of images or texts (two for pairs, or source and target); default: by type")
    add("--max_length", type=int, default=128, help="tokens of a text; default: 128")


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
