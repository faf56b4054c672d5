"""The console command `hf-blockkd`: `check` a model, `cut` and `distill` a student, `plan` a run, `report` it."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import datasets
import torch
from transformers import PreTrainedModel
from transformers.utils import logging

from ..config import BlockwiseDistillConfig
from ..models.loading import has_no_weights, load_model
from ..plan.costs import make_plan
from ..plan.estimate import GPUS, UTILISATION, Estimate, make_estimate
from ..plan.without_values import without_values
from ..routing.checking import check_routing
from ..routing.dummy_inputs import dummy_inputs
from ..routing.errors import UnsupportedArchitectureError
from ..routing.layers import find_layer_stack
from ..routing.logits import main_outputs
from ..training.self_test import ROUTING_TOLERANCE
from . import cut, distill
from .flags import FlagParser
from .report import report as write_report

PLAN_FIELDS: dict[str, dict[str, Any]] = {
    "num_blocks": {"type": int},
    "student_boundaries": {"type": int, "nargs": "+"},
    "teacher_boundaries": {"type": int, "nargs": "+"},
    "connector": {"type": str},
    "stepping_stones": {"type": str},
    "state_blocks": {"type": str},
    "stones_per_step": {"type": int},
    "stone_sampling": {"type": str},
    "stone_fraction": {"type": float},
    "stones_every": {"type": int},
    "stone_weighting": {"type": str},
    "loss_chunk_size": {"type": int},
    "student_layers_path": {"type": str},
    "teacher_layers_path": {"type": str},
}
"""Fields of `BlockwiseDistillConfig` that the cost of a step depends on, and how a command line gives them."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run `hf-blockkd`.

    Args:
        argv: The arguments; default: those of the process.

    Returns:
        The exit code: 0, or 1 with one sentence on stderr where a model, a setting or a run is refused.

    Raises:
        SystemExit: From argparse, with code 2, for arguments that it does not understand.

    Example:
        ```python
        >>> from hf_blockkd.commands.cli import main
        >>> main(["report", "no/such/run"])
        1

        ```
    """
    args = _parser().parse_args(argv)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    datasets.disable_progress_bars()
    try:
        return args.run(args)
    except (ValueError, OSError, ImportError) as error:
        return _refuse(error)


def _parser() -> argparse.ArgumentParser:
    parser = FlagParser("hf-blockkd", description="Block-wise logit distillation for transformers models.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    check = commands.add_parser("check", help="test whether hidden states can be routed through a model's layers")
    check.add_argument("model", metavar="MODEL", help="hub name or folder; a folder with just a config is enough")
    check.add_argument("--layers_path", help="dotted name of the ModuleList of layers; default: search for it")
    check.set_defaults(run=_check)

    cutting = commands.add_parser("cut", help="cut a smaller student out of a teacher, and measure it before training")
    cut.add_options(cutting)
    cutting.set_defaults(run=cut.run)

    distilling = commands.add_parser("distill", help="cut a student, train it, measure it and report, all in one")
    distill.add_options(distilling)
    distilling.set_defaults(run=_distill)

    plan = commands.add_parser("plan", help="blocks, connectors, parameters, FLOPs and memory, before anything trains")
    plan.add_argument("--teacher", required=True, help="hub name or folder; a folder with just a config is enough")
    plan.add_argument("--student", required=True, help="likewise")
    fields = {field.name: field for field in dataclasses.fields(BlockwiseDistillConfig)}
    for name, options in PLAN_FIELDS.items():
        fits = ", or the smaller depth" if name == "num_blocks" else ""
        default = "" if fields[name].default is None else f" Default: {fields[name].default}{fits}."
        text = f"{fields[name].metadata['help']}{default}"
        plan.add_argument(f"--{name}", help=text, choices=fields[name].metadata.get("choices"), **options)
    plan.add_argument("--batch_size", type=int, default=8, help="Examples in a training step. Default: 8.")
    plan.add_argument("--sequence_length", type=int, help="Tokens per example. Default: 128, or what the models allow.")
    plan.add_argument("--gpus", type=int, help="Estimate time and memory on so many GPUs instead, without any weights.")
    plan.add_argument("--gpu", choices=GPUS, default="h100", help="Which ones. Default: h100.")
    plan.add_argument("--tokens", type=float, help="Of the run that is estimated (images: examples), e.g. 10e9.")
    plan.add_argument(
        "--utilisation", type=float, default=UTILISATION, help=f"Share of a GPU's peak. Default: {UTILISATION}."
    )
    plan.add_argument("--step_seconds", type=float, help="Of plain KD on one example, measured: Python's pace there.")
    plan.set_defaults(run=_plan)

    for command in (check, plan):
        command.add_argument(
            "--config_only", action="store_true", help="random weights, so that only configs are downloaded"
        )

    report = commands.add_parser("report", help="write one page about runs, and their pictures")
    report.add_argument(
        "folders", metavar="RUN", type=Path, nargs="+", help="output_dir of a run or a comparison, or a checkpoint"
    )
    report.add_argument("--output", type=Path, help="folder for page and pictures; default: that of the runs")
    report.add_argument("--metric", help="metric of the evaluation that is compared; default: accuracy, else loss")
    report.set_defaults(run=_report)
    return parser


def _check(args: argparse.Namespace) -> int:
    model = load_model(args.model, args.config_only or has_no_weights(args.model))
    report = check_routing(model, layers_path=args.layers_path)
    print(f"model          {type(model).__name__}")
    print(f"layers path    {report.layers_path}")
    print(f"layers         {report.num_layers}")
    print(f"technique      {report.technique}")
    print(f"max abs error  {report.max_abs_error:.3g}")
    print(f"worst depth    {report.worst_depth}")
    with torch.no_grad():
        largest = max(logits.abs().max().item() for logits in main_outputs(model(**dummy_inputs(model))))
    if report.max_abs_error > ROUTING_TOLERANCE * largest:
        raise UnsupportedArchitectureError(
            f"{type(model).__name__} entered at layer {report.worst_depth} from its own hidden states gives logits "
            f"that differ from its own by {report.max_abs_error:.3g} (largest logit: {largest:.3g}), so it cannot be "
            "a teacher; name another stack with `--layers_path`."
        )
    return 0


def _distill(args: argparse.Namespace) -> int:
    distill.run(args)
    main(["report", str(args.output)])  # what cannot be drawn is told, and the student is there all the same
    return 0


def _plan(args: argparse.Namespace) -> int:
    given = {name: getattr(args, name) for name in PLAN_FIELDS if getattr(args, name) is not None}
    # Counting needs no accelerator, and works the same on each machine without one.
    config = BlockwiseDistillConfig("unused", use_cpu=True, bf16=args.gpus is not None, **given)
    if args.gpus is not None:
        print(_estimate(args, config))
        return 0
    student, teacher = (
        load_model(name, args.config_only or has_no_weights(name)) for name in (args.student, args.teacher)
    )
    _fit_blocks(args, config, student, teacher)
    print(make_plan(student, teacher, config, args.batch_size, args.sequence_length))
    return 0


def _estimate(args: argparse.Namespace, config: BlockwiseDistillConfig) -> Estimate:
    # Weights that many GPUs have in shards are fetched in bfloat16; one keeps the student's in float32.
    student_dtype = torch.float32 if args.gpus == 1 else torch.bfloat16
    wanted = (args.student, student_dtype), (args.teacher, torch.bfloat16)
    with ExitStack() as stack:
        stack.enter_context(without_values())
        models = [load_model(name, True, dtype) for name, dtype in wanted]
        if models[0].main_input_name != "input_ids":  # how a model cuts images or sounds is found out by values
            stack.close()
            models = [load_model(name, True, dtype) for name, dtype in wanted]
        _fit_blocks(args, config, *models)
        sizes = args.batch_size, args.sequence_length, args.tokens
        return make_estimate(*models, config, args.gpu, args.gpus, *sizes, args.utilisation, args.step_seconds)


def _fit_blocks(
    args: argparse.Namespace, config: BlockwiseDistillConfig, student: PreTrainedModel, teacher: PreTrainedModel
) -> None:
    """As many blocks as the shallower model has layers, where fewer than the default."""
    if args.num_blocks is None:
        stacks = (student, args.student_layers_path), (teacher, args.teacher_layers_path)
        config.num_blocks = min(config.num_blocks, *(len(find_layer_stack(*stack)) for stack in stacks))


def _report(args: argparse.Namespace) -> int:
    page, pictures, missing = write_report(args.folders, args.output, args.metric)
    for lines, file in (([*pictures, page] if page else [], sys.stdout), (missing, sys.stderr)):
        if lines:
            print(*lines, sep="\n", file=file)
    return 0 if page else 1


def _refuse(error: Exception) -> int:
    print(f"hf-blockkd: {' '.join(str(error).split())}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
