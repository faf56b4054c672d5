"""What each command understands, by its name; no library is imported for that, so that `--help` is there at once."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ..students.choices import CHANNEL_CHOICES, LAYER_CHOICES

FORMATS = {".parquet": "parquet", ".csv": "csv", ".tsv": "csv", ".json": "json", ".jsonl": "json", ".txt": "text"}
"""How files of data end, and what `datasets` calls their readers."""
DEFAULT_SHARE = 0.25
"""Of the teacher's parameters, where no size is said: what a cut of half the width or a quarter of the layers keeps."""


def check(parser: argparse.ArgumentParser) -> None:
    """What `check` understands."""
    parser.add_argument("model", metavar="MODEL", help="hub name or folder; a folder with just a config is enough")
    parser.add_argument("--layers_path", help="dotted name of the ModuleList of layers; default: search for it")
    parser.add_argument("--config_only", action="store_true", help="random weights, so that the config alone is read")


def cut(parser: argparse.ArgumentParser) -> None:
    """What `cut` understands."""
    add = parser.add_argument
    add("teacher", metavar="TEACHER", help="hub name or folder")
    add("--output", type=Path, required=True, help="folder for the student, its cut.json, and the teacher's processing")
    add("--overwrite", action="store_true", help="write into a folder that holds something else than an untrained cut")
    _sizes(parser, "default: as many as --layers names, or all", "default: the teacher's")
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
    _data(parser)
    add("--split", default="train", help="split, or a part of it, e.g. train[:1000]; default: train")
    add("--max_examples", type=int, default=256, help="rows to cut by, and again as many to measure on; default: 256")


def distill(parser: argparse.ArgumentParser) -> None:
    """What `distill` understands."""
    what = parser.add_argument_group("what is distilled")
    what.add_argument("--teacher", required=True, metavar="TEACHER", help="hub name or folder")
    what.add_argument("--output", type=Path, required=True, help="folder for the student, its figures, card and report")
    _data(what, required=True)
    size = parser.add_argument_group("how small the student is", f"default: --parameters {DEFAULT_SHARE}")
    _sizes(size, "default: all, or what the budget asks for", "likewise")
    how = parser.add_argument_group("how it trains", "found from teacher and data where nothing is said")
    how.add_argument(
        "--learning_rate", type=float, help="highest; default: by the width of the student, as searched in benchmarks"
    )
    how.add_argument("--epochs", type=float, help="passes over the rows; default: those of about 600 steps, 1 to 15")
    how.add_argument("--batch_size", type=int, help="rows in a step; default: 64 images, 32 texts, 16 windows of text")
    how.add_argument("--seed", type=int, default=0, help="of all that is drawn; default: 0")


def plan(parser: argparse.ArgumentParser) -> None:
    """What `plan` understands: all that a run does, whose own class takes seconds to import."""
    from .plan import add_options

    add_options(parser)


def report(parser: argparse.ArgumentParser) -> None:
    """What `report` understands."""
    add = parser.add_argument
    add("folders", metavar="RUN", type=Path, nargs="+", help="output_dir of a run or a comparison, or a checkpoint")
    add("--output", type=Path, help="folder for page and pictures; default: that of the runs")
    add("--metric", help="metric of the evaluation that is compared; default: accuracy, else loss")


def _sizes(parser: Any, depth: str, width: str) -> None:
    """How small a student is, with what holds where nothing is said."""
    add = parser.add_argument
    add("--num_layers", type=int, help=f"depth; {depth}")
    add("--hidden_size", type=int, help=f"width; {width}")
    add("--layers", default="even", help=f"{', '.join(LAYER_CHOICES)} or indices, e.g. 0,2,5; default: even")
    add("--parameters", type=float, help="a budget instead of sizes: a share of the teacher's parameters or a number")
    add("--flops", type=float, help="likewise, of the FLOPs of a forward on one row")


def _data(parser: Any, required: bool = False) -> None:
    """Which data, and how rows are made of it."""
    add = parser.add_argument
    files = f"hub name, file ({', '.join(FORMATS)}), or a folder of such files or of images"
    add("--dataset", metavar="DATA", required=required, help=files)
    add("--dataset_config", help="configuration of a hub data set")
    add("--column", nargs="+", help="column of images or texts (two for pairs, or source and target); default: by type")
    add("--max_length", type=int, default=128, help="tokens of a text; default: 128")
