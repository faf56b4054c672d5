"""Students and teachers that are sharded over processes (FSDP2)."""

from __future__ import annotations

from accelerate.utils import FullyShardedDataParallelPlugin
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from ..config import BlockwiseDistillConfig
from ..pairing.pair import Pair
from ..routing.layers import LayerStack


def set_up_fsdp(
    pair: Pair, args: BlockwiseDistillConfig, plugin: FullyShardedDataParallelPlugin, shares_weights: bool
) -> None:
    """Shard the teacher of a run, and see that Accelerate shards the student alike.

    Args:
        pair: Both models, whole.
        args: The configuration.
        plugin: Accelerate's, of the run.
        shares_weights: Whether the teacher is the base of the student.

    Raises:
        ValueError: If the configuration does not go with that.
    """
    check_sharded(args, plugin, shares_weights)
    shard_pair(pair.stones.student_stack, pair.teacher, pair.stones.teacher_stack, plugin)
    # The gradients of a chunk's head are taken apart from the others, where the weights are in shards.
    pair.student_head = pair.teacher_head = None


def check_sharded(args: BlockwiseDistillConfig, plugin: FullyShardedDataParallelPlugin, shares_weights: bool) -> None:
    """Raise a `ValueError` for what a sharded teacher does not go with.

    Args:
        args: The configuration.
        plugin: Accelerate's, of the run.
        shares_weights: Whether the teacher is the base of the student.
    """
    if plugin.fsdp_version != 2:
        raise ValueError(
            f"`fsdp_version` is {plugin.fsdp_version}, but teachers are sharded by version 2; set it to 2."
        )
    if plugin.cpu_ram_efficient_loading:
        raise ValueError(
            "`cpu_ram_efficient_loading` is True, with which only the first process would have the teacher's weights; "
            "set it to False."
        )
    if shares_weights:
        raise ValueError(
            "`teacher_model` is None, but a sharded student does not share its weights with a teacher; pass a copy of "
            "the base, which is sharded, too."
        )
    # All processes must run the teacher equally often, and gather its weights together.
    refuse(
        args,
        "FSDP",
        stepping_stones="share",
        stone_fraction=None,
        teacher_cache=None,
        loss_chunk_size=None,
        captured_columns=None,
        lmbda=None,
    )


def refuse(args: BlockwiseDistillConfig, sharding: str, **fields: str | None) -> None:
    """Raise a `ValueError` for the first of some fields that is set to what a way of sharding does not go with.

    Args:
        args: The configuration.
        sharding: Its name.
        **fields: Field -> the value that it must not have, or `None` where it must be off.
    """
    for name, refused in fields.items():
        value, default = getattr(args, name), BlockwiseDistillConfig.__dataclass_fields__[name].default
        if value == refused if refused else value not in (default, 0):
            raise ValueError(f"`{name}` is {value!r}, which {sharding} does not go with; leave it at its default.")


def shard_pair(
    student_stack: LayerStack, teacher: nn.Module, teacher_stack: LayerStack, plugin: FullyShardedDataParallelPlugin
) -> None:
    """Shard the teacher over all processes, layer by layer, and see that Accelerate does so with the student.

    Args:
        student_stack: The student's layers; Accelerate shards the student when it prepares the optimizer.
        teacher: The teacher.
        teacher_stack: Its layers.
        plugin: Accelerate's, with the options of both.
    """
    if plugin.transformer_cls_names_to_wrap is None:
        # What transformers names for it includes embeddings, which Accelerate then shards twice (BERT).
        plugin.transformer_cls_names_to_wrap = sorted({type(layer).__name__ for layer in student_stack.layers})
    options = {
        "reshard_after_forward": plugin.reshard_after_forward,
        "offload_policy": plugin.cpu_offload,
        "mp_policy": plugin.mixed_precision_policy or MixedPrecisionPolicy(),
    }
    for layer in teacher_stack.layers:
        fully_shard(layer, **options)
    fully_shard(teacher, **options)
