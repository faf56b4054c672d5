"""`hf-blockkd plan`: blocks, connectors, parameters, FLOPs and memory, before anything trains."""

from __future__ import annotations

import argparse
import dataclasses
from contextlib import ExitStack
from typing import Any

import torch
from transformers import PreTrainedModel

from ..config import BlockwiseDistillConfig
from ..models.loading import has_no_weights, load_model
from ..plan.costs import make_plan
from ..plan.estimate import GPUS, UTILISATION, Estimate, make_estimate
from ..plan.without_values import without_values
from ..routing.layers import find_layer_stack

FIELDS: dict[str, dict[str, Any]] = {
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


def add_options(parser: argparse.ArgumentParser) -> None:
    """What `plan` understands."""
    add = parser.add_argument
    add("--teacher", required=True, help="hub name or folder; a folder with just a config is enough")
    add("--student", required=True, help="likewise")
    fields = {field.name: field for field in dataclasses.fields(BlockwiseDistillConfig)}
    for name, options in FIELDS.items():
        fits = ", or the smaller depth" if name == "num_blocks" else ""
        default = "" if fields[name].default is None else f" Default: {fields[name].default}{fits}."
        text = f"{fields[name].metadata['help']}{default}"
        add(f"--{name}", help=text, choices=fields[name].metadata.get("choices"), **options)
    add("--batch_size", type=int, default=8, help="Examples in a training step. Default: 8.")
    add("--sequence_length", type=int, help="Tokens per example. Default: 128, or what the models allow.")
    add("--gpus", type=int, help="Estimate time and memory on so many GPUs instead, without any weights.")
    add("--gpu", choices=GPUS, default="h100", help="Which ones. Default: h100.")
    add("--tokens", type=float, help="Of the run that is estimated (images: examples), e.g. 10e9.")
    add("--utilisation", type=float, default=UTILISATION, help=f"Share of a GPU's peak. Default: {UTILISATION}.")
    add("--step_seconds", type=float, help="Of plain KD on one example, measured: Python's pace there.")
    add("--config_only", action="store_true", help="random weights, so that only configs are downloaded")


def run(args: argparse.Namespace) -> int:
    """Print what a run of two models will take.

    Raises:
        ValueError: If models and settings do not fit together.
    """
    given = {name: getattr(args, name) for name in FIELDS if getattr(args, name) is not None}
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
