"""Students and teachers under DeepSpeed (ZeRO)."""

from __future__ import annotations

from accelerate.utils import DeepSpeedPlugin
from torch import nn

from ..config import BlockwiseDistillConfig
from ..pairing.pair import Pair
from .sharding import refuse


def set_up_zero(pair: Pair, args: BlockwiseDistillConfig, plugin: DeepSpeedPlugin, shares_weights: bool) -> None:
    """Prepare the models of a run for DeepSpeed, which takes the student over when training begins.

    Args:
        pair: Both models, whole.
        args: The configuration.
        plugin: Accelerate's, of the run.
        shares_weights: Whether the teacher is the base of the student.

    Raises:
        ValueError: If the configuration does not go with that.
    """
    check_zero(args, plugin, shares_weights, needs_paths=pair.paths is not None)
    if plugin.zero_stage >= 2:
        # Whether a batch is taken in chunks, and so the order of its gradients, depends on its labels.
        pair.student_head = pair.teacher_head = None
    if plugin.zero_stage == 3:
        shard_teacher(pair.teacher, plugin)


def check_whole(**models: nn.Module) -> None:
    """Raise a `ValueError` for models that transformers has loaded in shards, because ZeRO-3 was configured by then.

    Args:
        **models: Name of the argument -> model.
    """
    for name, model in models.items():
        if any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
            raise ValueError(
                f"`{name}` was loaded when ZeRO-3 had been configured, and so in shards, which cannot be cut into "
                "blocks; load both models before you make the configuration, or set the `stage` of `deepspeed` to 2."
            )


def check_zero(args: BlockwiseDistillConfig, plugin: DeepSpeedPlugin, shares_weights: bool, needs_paths: bool) -> None:
    """Raise a `ValueError` for what DeepSpeed does not go with, mostly because it would err without a word.

    Args:
        args: The configuration.
        plugin: Accelerate's, of the run.
        shares_weights: Whether the teacher is the base of the student.
        needs_paths: Whether hybrids may go from the teacher back into the student.
    """
    if plugin.hf_ds_config.is_true("fp16.enabled"):
        raise ValueError(
            "`fp16` is True, with which DeepSpeed skips updates that are not finite, where this trainer would stop at "
            "the first; set `bf16` instead, or neither."
        )
    if plugin.zero_stage >= 2:
        # Gradients are added up in the order in which they come, which has to be the same on all processes.
        refuse(args, f"ZeRO-{plugin.zero_stage}", stepping_stones="share", stone_fraction=None, loss_chunk_size=None)
    if plugin.zero_stage == 3:
        # A weight that takes no part in a step is updated by the gradient of the last step in which it did.
        refuse(
            args,
            "ZeRO-3",
            stepping_stones="sample",
            stones_every=None,
            teacher_cache=None,
            captured_columns=None,
            lmbda=None,
        )
        if needs_paths:
            raise ValueError(
                f"`objective` is {args.objective!r}, which runs random parts of the models, and which ZeRO-3 therefore "
                "does not go with; choose another one, or set the `stage` of `deepspeed` to 2."
            )
        if shares_weights:
            raise ValueError(
                "`teacher_model` is None, but under ZeRO-3 a student does not share its weights with a teacher; pass a "
                "copy of the base, or set the `stage` of `deepspeed` to 2."
            )
        if not plugin.hf_ds_config.is_true("zero_optimization.stage3_gather_16bit_weights_on_model_save"):
            raise ValueError(
                "`stage3_gather_16bit_weights_on_model_save` is not set in the `zero_optimization` of `deepspeed`, so "
                "that no whole student would be saved; set it to true."
            )


def shard_teacher(teacher: nn.Module, plugin: DeepSpeedPlugin) -> None:
    """Shard the teacher over all processes, as ZeRO-3 does the student; its modules gather their weights to run.

    Args:
        teacher: The frozen teacher.
        plugin: Accelerate's, with the options of the student.
    """
    import deepspeed

    # "auto" stands for what Accelerate finds out about the student; DeepSpeed has defaults of its own.
    zero = {name: value for name, value in plugin.deepspeed_config["zero_optimization"].items() if value != "auto"}
    zero.pop("offload_optimizer", None)
    deepspeed.initialize(model=teacher, config={"train_micro_batch_size_per_gpu": 1, "zero_optimization": zero})
    teacher.eval()
