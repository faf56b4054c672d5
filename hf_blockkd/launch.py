"""What a run was asked to be, where Accelerate would quietly make it something else: `check_launch`."""

from __future__ import annotations

import os

from accelerate.utils import DistributedType, str_to_bool

from .config import BlockwiseDistillConfig


def check_launch(args: BlockwiseDistillConfig) -> None:
    """Raise a `ValueError` where Accelerate would run less than was asked for, or what cannot work here.

    `accelerate launch` says what it was asked for in environment variables.
    """
    if args.deepspeed or _asked("ACCELERATE_USE_DEEPSPEED"):
        raise ValueError(
            f"`deepspeed` is {args.deepspeed!r}, but the teacher has no place in a DeepSpeed engine; use FSDP2 "
            "(`fsdp=True`, or `accelerate launch --use_fsdp --fsdp_version 2 ...`), which shards student and teacher."
        )
    if args.fp16 and args.device.type == "cpu":
        raise ValueError(
            "`fp16` is True, but on a CPU Accelerate would run everything in float32, without a word; set `bf16` "
            "instead, or neither."
        )
    wants_fsdp = bool(args.fsdp) or _asked("ACCELERATE_USE_FSDP")
    kind = args.distributed_state.distributed_type
    if wants_fsdp and kind in (DistributedType.NO, DistributedType.MULTI_CPU):
        instead = "one process" if kind == DistributedType.NO else "DistributedDataParallel"
        raise ValueError(
            f"`fsdp` is {args.fsdp!r}, but on {args.device.type} with {args.world_size} process(es) Accelerate would "
            f"run {instead} instead, without a word; start several processes with a GPU each, or set `fsdp` to False."
        )
    # What its launcher of several processes sets is missing, while its launcher of one process was told of several.
    told = {"ACCELERATE_MIXED_PRECISION", "MASTER_PORT"} <= set(os.environ) and _asked("ACCELERATE_USE_CPU")
    if told and "WORLD_SIZE" not in os.environ and kind == DistributedType.NO:
        raise ValueError(
            "`accelerate launch --cpu` was given several processes, but runs one of them, without a word; start them "
            "with `ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes N ...`, or with torchrun, or "
            "give it one process."
        )


def _asked(variable: str) -> bool:
    return bool(str_to_bool(os.environ.get(variable, "false")))
