"""Students that train as adapters of a frozen base (PEFT), and the base without them as their teacher."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

from torch import nn
from transformers import PreTrainedModel
from transformers.utils import logging

from .quantized import weight_tensors

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel


logger = logging.get_logger(__name__)


def is_peft(model: nn.Module) -> bool:
    """Whether a model is wrapped in an adapter, without importing peft."""
    return hasattr(model, "get_base_model")


def base_of(model: nn.Module) -> PreTrainedModel:
    """The transformers model inside an adapted one, with its adapters in place; any other model is its own base."""
    return model.get_base_model() if is_peft(model) else model


def check_adapter(model: nn.Module, peft_config: PeftConfig | None = None) -> None:
    """Raise a `ValueError` for an adapter around another, and for soft prompts."""
    if is_peft(model) and peft_config is not None:
        raise ValueError(
            f"`model` is a {type(model).__name__} already, so `peft_config` would put an adapter around an adapter; "
            "leave it out, or pass the base model."
        )
    if peft_config is None and is_peft(model):
        peft_config = model.active_peft_config
    if peft_config is not None and peft_config.is_prompt_learning:
        raise ValueError(
            f"The adapter is a {type(peft_config).__name__}, whose virtual tokens would stand between those that "
            "student and teacher have in common; use one that changes layers, such as LoraConfig."
        )


def check_trains(student: nn.Module, may_be_frozen: bool = False) -> None:
    """Raise a `ValueError` for a student of which nothing trains: a frozen adapter, or the teacher of another run.

    Args:
        student: As it was passed.
        may_be_frozen: Whether connectors train that are worth it by themselves, which is what a student that is frozen
            as a whole asks for.
    """
    sizes = {True: 0, False: 0}
    for parameter in student.parameters():
        sizes[parameter.requires_grad] += parameter.numel()
    if sizes[True]:
        if sizes[False] > sizes[True] and not is_peft(student):
            logger.warning(
                f"{sizes[False]:,} of {sum(sizes.values()):,} weights of the student {type(student).__name__} are "
                "frozen; if that is not meant (a copy of a teacher stays frozen), call `model.requires_grad_(True)`."
            )
        return
    if may_be_frozen:
        logger.warning(
            f"No weight of the student {type(student).__name__} requires gradients: connectors alone are trained, for "
            "the sake of the stepping stones, and the student stays as it is."
        )
        return
    who, cure = f"student {type(student).__name__}", "call `model.requires_grad_(True)`"
    if is_peft(student):
        who, cure = "adapted `model`", "load the adapter with `PeftModel.from_pretrained(..., is_trainable=True)`"
    raise ValueError(
        f"No weight of the {who} requires gradients, so the student would not train; {cure}. A teacher of another run "
        "stays frozen, and so do copies of it. To train connectors alone, for stepping stones that are kept, set "
        "`objective='ladder'` and `train_connectors=True`, and leave `stone_weight` above 0 and `stepping_stones` "
        "other than 'none', or set `state_weight`."
    )


def base_as_teacher(student: PreTrainedModel | PeftModel, peft_config: PeftConfig | None = None) -> PreTrainedModel:
    """The base of an adapted student as a teacher of its own: the same weights, without the adapters.

    The teacher has modules of its own, so that it can be in eval mode while the student trains and its layers can be
    entered while those of the student are hooked; but its parameters are the student's tensors, which are frozen, so
    that the weights are in memory once.

    Args:
        student: A model that `peft_config` will adapt, or a `PeftModel`.
        peft_config: As in `BlockwiseDistillTrainer`.

    Returns:
        The teacher. Its parameters do not require gradients, and so do not those of the student's base.

    Raises:
        ValueError: If there is no adapter; or if the base's own weights are not what a teacher needs, because an
            adapter is merged into them or trains them.

    Example:
        ```python
        >>> from peft import LoraConfig, get_peft_model
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> from hf_blockkd.models.adapters import base_as_teacher
        >>> base = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=99))
        >>> teacher = base_as_teacher(get_peft_model(base, LoraConfig(target_modules=["c_attn"])))
        >>> teacher is base, teacher.transformer.wte.weight is base.transformer.wte.weight
        (False, True)

        ```
    """
    if peft_config is None and not is_peft(student):
        raise ValueError(
            "`teacher_model` is None, which stands for the student's own base without its adapter, but the student "
            f"{type(student).__name__} has none; pass a teacher, or a `peft_config`."
        )
    merged = [name for name, module in student.named_modules() if getattr(module, "merged", False)]
    if merged:
        raise ValueError(
            f"`teacher_model` is None, but an adapter is merged into the student's base, e.g. in {merged[0]!r}, so "
            "there is no base without it; call `unmerge_adapter()` first, or pass a teacher."
        )
    # What is in the memo already is not copied.
    teacher = copy.deepcopy(student, {id(tensor): tensor for tensor in weight_tensors(student)})
    if is_peft(teacher):
        teacher = _without_adapters(teacher)
        _check_frozen(teacher)
    return teacher.requires_grad_(False).eval()


def has_adapters(model: nn.Module) -> bool:
    """Whether a model is wrapped in an adapter, or has adapters inside (`add_adapter` of transformers)."""
    return is_peft(model) or any(hasattr(module, "get_base_layer") for module in model.modules())


def merged_base(model: PeftModel) -> PreTrainedModel:
    """A model without adapters that computes what an adapted one does, which is left as it is.

    Weights that no adapter changes are the adapted model's own tensors, so that they are in memory once.

    Args:
        model: In the state that is wanted: its active adapters are merged, disabled ones are left out.

    Returns:
        The base's class, with weights W + delta.

    Raises:
        ValueError: If the adapter is none of weights (prompts, prefixes), cannot be merged, or has no wrapper.

    Example:
        ```python
        >>> from peft import LoraConfig, get_peft_model
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> from hf_blockkd.models.adapters import merged_base
        >>> base = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=99))
        >>> merged = merged_base(get_peft_model(base, LoraConfig(target_modules=["c_attn"])))
        >>> type(merged).__name__, merged.transformer.wte.weight is base.transformer.wte.weight
        ('GPT2LMHeadModel', True)

        ```
    """
    name = type(model).__name__
    if not is_peft(model):
        raise ValueError(
            f"{name} has adapters inside, but is no PeftModel, which could merge them; load them with "
            "`PeftModel.from_pretrained`, or make it with `get_peft_model`."
        )
    kind = type(model.active_peft_config).__name__
    if not hasattr(model.base_model, "merge_and_unload"):
        raise ValueError(
            f"The adapter of {name} is {kind}, which cannot be merged into weights; merge one that changes layers, "
            "such as LoraConfig, or pass the base model."
        )
    layers = [module for module in model.modules() if hasattr(module, "get_base_layer")]
    changed = {id(tensor) for layer in layers for tensor in (*layer.parameters(), *layer.buffers())}
    kept = [tensor for tensor in weight_tensors(model) if id(tensor) not in changed]
    merged = copy.deepcopy(model, {id(tensor): tensor for tensor in kept})
    if any(layer.disable_adapters for layer in layers):
        return _without_adapters(merged)
    try:
        return merged.merge_and_unload(safe_merge=True)
    except (AttributeError, NotImplementedError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(
            f"The adapter of {name}, {kind}, cannot be merged into its base ({error}); pass a model in which it is, "
            "or the base model."
        ) from error


def adapt(student: PreTrainedModel, peft_config: PeftConfig, teacher: PreTrainedModel) -> PeftModel:
    """Put an adapter around the student.

    Raises:
        ValueError: If it trains weights that the student shares with its teacher.
    """
    from peft import get_peft_model

    student = get_peft_model(student, peft_config)
    _check_frozen(teacher)
    return student


def _without_adapters(model: PeftModel) -> PreTrainedModel:
    from peft.utils.other import ModulesToSaveWrapper

    # `unload` would keep the trained copy of what is in `modules_to_save`.
    for name, module in list(model.named_modules()):
        if isinstance(module, ModulesToSaveWrapper):
            model.set_submodule(name, module.original_module)
    return model.unload()


def _check_frozen(teacher: PreTrainedModel) -> None:
    trained = [name for name, parameter in teacher.named_parameters() if parameter.requires_grad]
    if trained:
        raise ValueError(
            f"The adapter trains {len(trained)} of the base's own weights, e.g. {trained[0]!r}, which are those of the "
            "teacher where `teacher_model` is None; set bias='none' in the adapter's config, or pass a teacher."
        )
