"""`hf-blockkd plan`: blocks, connectors, parameters, FLOPs and memory, before anything trains."""

from __future__ import annotations

import argparse
from contextlib import ExitStack
from dataclasses import field, fields, make_dataclass
from pathlib import Path
from typing import get_type_hints

import torch
from transformers import HfArgumentParser, PreTrainedModel, TrainingArguments

from ..config import BlockwiseDistillConfig
from ..models.loading import has_no_weights, load_model
from ..plan.costs import make_plan
from ..plan.estimate import GPUS, UTILISATION, Estimate, make_estimate
from ..plan.without_values import without_values
from ..routing.layers import find_layer_stack
from .rebalance import proposal

STOCK = {one.name for one in fields(TrainingArguments)}
SETTINGS = [one for one in fields(BlockwiseDistillConfig) if one.name not in STOCK]
"""Fields of ours, all of which a plan takes: those of a run can be given as they are."""


def add_options(parser: argparse.ArgumentParser) -> None:
    """What `plan` understands."""
    parser.usage = "%(prog)s --teacher TEACHER --student STUDENT [--FLAG VALUE ...]\n       %(prog)s --rebalance RUN"
    parser.set_defaults(error=parser.error)
    add = parser.add_argument
    add("--teacher", help="hub name or folder; a folder with just a config is enough")
    add("--student", help="likewise")
    rebalance = "instead: propose blocks and layers by what the blocks of this run cost, see trainer.evaluate_blocks"
    add("--rebalance", metavar="RUN", type=Path, help=rebalance)
    add("--metric", help="with --rebalance: what costs are counted in; default: accuracy, else loss")
    add("--batch_size", type=int, default=8, help="Examples in a training step. Default: 8.")
    add("--sequence_length", type=int, help="Tokens per example. Default: 128, or what the models allow.")
    add("--gpus", type=int, help="Estimate time and memory on so many GPUs instead, without any weights.")
    add("--gpu", choices=GPUS, default="h100", help="Which ones. Default: h100.")
    add("--tokens", type=float, help="Of the run that is estimated (images: examples), e.g. 10e9.")
    add("--utilisation", type=float, default=UTILISATION, help=f"Share of a GPU's peak. Default: {UTILISATION}.")
    add("--step_seconds", type=float, help="Of plain KD on one example, measured: Python's pace there.")
    add("--config_only", action="store_true", help="random weights, so that only configs are downloaded")
    settings = parser.add_argument_group("settings of the run", "fields of BlockwiseDistillConfig")
    hints = get_type_hints(BlockwiseDistillConfig)
    own = [(one.name, hints[one.name], field(default=one.default, metadata=one.metadata)) for one in SETTINGS]
    for action in HfArgumentParser(make_dataclass("Settings", own), add_help=False)._actions:
        if action.default is not None:
            fits = ", or the smaller depth" if action.dest == "num_blocks" else ""
            action.help = f"{action.help} Default: {action.default}{fits}."
        action.default = None  # what is not given
        settings._add_action(action)
        action.option_strings = action.option_strings[:1]  # those that are shown; both ways to write them work


def run(args: argparse.Namespace) -> int:
    """Print what a run of two models will take.

    Raises:
        ValueError: If models and settings do not fit together.
    """
    if args.rebalance is not None:
        print(proposal(args.rebalance, args.metric))
        return 0
    if args.teacher is None or args.student is None:
        args.error("give --teacher and --student, or --rebalance with a run.")
    asked = vars(args)
    given = {one.name: asked[one.name] for one in SETTINGS if asked[one.name] is not None}
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
