"""What a run was asked to be, where it would fail late or quietly become something else."""

from __future__ import annotations

import os

from accelerate.utils import DistributedType, str_to_bool

from ..config import BlockwiseDistillConfig


def check_launch(args: BlockwiseDistillConfig) -> None:
    """Raise a `ValueError` where Accelerate would, without a word, run something else than what was asked for."""
    if args.n_gpu > 1:
        raise ValueError(
            f"{args.n_gpu} GPUs are visible to one process, which would run nn.DataParallel; start the script with "
            f"`accelerate launch --num_processes {args.n_gpu} ...`, or make one GPU visible with "
            "CUDA_VISIBLE_DEVICES=0."
        )
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
    if args.deepspeed or _asked("ACCELERATE_USE_DEEPSPEED"):
        _check_deepspeed(args)
    # `--num_processes 2` has set a port, but nothing has started a second process.
    told = {"ACCELERATE_MIXED_PRECISION", "MASTER_PORT"} <= set(os.environ) and _asked("ACCELERATE_USE_CPU")
    if told and "WORLD_SIZE" not in os.environ and kind == DistributedType.NO:
        raise ValueError(
            "`accelerate launch --cpu` was given several processes, but runs one of them, without a word; start them "
            "with `ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes N ...`, or with torchrun, or "
            "give it one process."
        )


def _check_deepspeed(args: BlockwiseDistillConfig) -> None:
    if "LOCAL_RANK" not in os.environ:
        raise ValueError(
            "`deepspeed` is set, but it runs only in processes that a launcher has started, one or more; start the "
            "script with `torchrun --nproc_per_node N ...` or `accelerate launch --num_processes N ...`."
        )
    instead = None
    if _asked("ACCELERATE_USE_CPU"):
        instead = "DistributedDataParallel"
    elif args.world_size != int(os.environ["WORLD_SIZE"]):
        instead = f"{os.environ['WORLD_SIZE']} processes that know nothing of each other"
    if instead is not None:
        raise ValueError(
            f"`deepspeed` is set, but on a {args.device.type} Accelerate would run {instead}, without a word; set "
            "`use_cpu=True` and leave the variable ACCELERATE_USE_CPU out."
        )


def _asked(variable: str) -> bool:
    return bool(str_to_bool(os.environ.get(variable, "false")))


def _by_launcher(variable: str) -> str:
    return " and `accelerate launch` asks for it" if _asked(variable) else ""
