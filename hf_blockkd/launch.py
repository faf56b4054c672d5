"""What a run was asked to be, where it would fail late or quietly become something else."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from accelerate.utils import DistributedType, str_to_bool

if TYPE_CHECKING:
    from .config import BlockwiseDistillConfig


def check_no_deepspeed(deepspeed: Any) -> None:
    """Raise a `ValueError` if a field of the configuration or `accelerate launch` asks for DeepSpeed."""
    if deepspeed or _asked("ACCELERATE_USE_DEEPSPEED"):
        raise ValueError(
            f"`deepspeed` is {deepspeed!r}{_by_launcher('ACCELERATE_USE_DEEPSPEED')}, but a teacher has no place in "
            "its engine; shard student and teacher with FSDP2 instead, by `fsdp=True` or "
            "`accelerate launch --use_fsdp --fsdp_version 2 ...`."
        )


def check_launch(args: BlockwiseDistillConfig) -> None:
    """Raise a `ValueError` where Accelerate would, without a word, run something else than what was asked for."""
    if args.fp16 and args.device.type == "cpu":
        raise ValueError(
            "`fp16` is True, but on a CPU Accelerate would run everything in float32, without a word; set `bf16` "
            "instead, or neither."
        )
    kind = args.distributed_state.distributed_type
    if (args.fsdp or _asked("ACCELERATE_USE_FSDP")) and kind in (DistributedType.NO, DistributedType.MULTI_CPU):
        instead = "one process" if kind == DistributedType.NO else "DistributedDataParallel"
        raise ValueError(
            f"`fsdp` is {args.fsdp!r}{_by_launcher('ACCELERATE_USE_FSDP')}, but for {args.world_size} process(es) on a "
            f"{args.device.type} Accelerate would run {instead}, without a word; start several processes with a GPU "
            "each, or leave FSDP out."
        )
    # `--num_processes 2` has set a port, but nothing has started a second process.
    told = {"ACCELERATE_MIXED_PRECISION", "MASTER_PORT"} <= set(os.environ) and _asked("ACCELERATE_USE_CPU")
    if told and "WORLD_SIZE" not in os.environ and kind == DistributedType.NO:
        raise ValueError(
            "`accelerate launch --cpu` was given several processes, but runs one of them, without a word; start them "
            "with `ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes N ...`, or with torchrun, or "
            "give it one process."
        )


def _asked(variable: str) -> bool:
    return bool(str_to_bool(os.environ.get(variable, "false")))


def _by_launcher(variable: str) -> str:
    return " and `accelerate launch` asks for it" if _asked(variable) else ""
