"""Which values the fields of a configuration may have: `check_values`."""

from __future__ import annotations

from transformers import TrainingArguments

from .connectors.maps import CONNECTOR_KINDS, CONNECTOR_STARTS
from .losses.divergences import DIVERGENCES
from .losses.embeddings import embedding_losses
from .models.pooling import MODES

STONES = ("auto", "last_two", "all", "none", "sample", "share")
"""Words for the stones that take part in a step; a list of indices is the other way to name them."""
STATE_BLOCKS = ("last_two", "all")
"""Words for the blocks after which states are compared, or a list of indices."""
ABOUT_STONES = ("stone_weight", "cross_weight", "stone_weighting", "stone_fraction", "stones_every")
"""Fields that mean nothing where no stone runs: `stepping_stones="auto"` runs stones for whoever sets one of them."""
DISTILLED = ("labelled", "all")
"""Which tokens of a text with labels are compared with the teacher."""
SAMPLINGS = ("uniform", "weight", "cost")
SCHEDULES = ("linear", "constant")
OBJECTIVE_WEIGHTS: dict[str, tuple[str, ...]] = {
    "block_kd": ("task_weight", "distill_weight", "cross_weight"),
    "ladder": ("task_weight", "distill_weight"),
    "kd": ("task_weight", "distill_weight"),
    "alone": ("task_weight",),
    "hint": ("task_weight", "distill_weight", "hint_weight"),
    "simkd": ("hint_weight",),
    "fcfd": ("task_weight", "distill_weight", "hint_weight"),
    "theseus": ("task_weight",),
}
"""Objective -> the fields that weigh what it trains on; each is a class of `hf_blockkd.objectives`."""
REPLACING_OBJECTIVES = ("alone", "simkd", "theseus")
"""Objectives that replace the losses of plain distillation, to which the others add."""


def check_values(args: TrainingArguments) -> None:
    """Raise a `ValueError` for the first value that no model could be trained with, or that another one contradicts.

    Args:
        args: A [`BlockwiseDistillConfig`], which is made of these.
    """
    objectives = check_objective(args.objective)
    _check_choice(args, "connector", CONNECTOR_KINDS)
    _check_choice(args, "connector_start", CONNECTOR_STARTS)
    _check_choice(args, "divergence", DIVERGENCES)
    _check_choice(args, "distill_on", DISTILLED)
    embedding_losses(args.embedding_loss)
    if args.pooling is not None:
        _check_choice(args, "pooling", tuple(MODES))
    _check_choice(args, "stone_sampling", SAMPLINGS)
    _check_choice(args, "stone_weighting", ("halving", "uniform"))
    if args.stone_schedule is not None:
        _check_choice(args, "stone_schedule", SCHEDULES)
    if not args.temperature > 0:
        raise ValueError(f"`temperature` must be greater than 0, but is {args.temperature}.")
    if not 0 <= args.beta <= 1:
        raise ValueError(f"`beta` must be from 0 to 1, but is {args.beta}.")
    if args.beta != 0.5 and args.divergence != "jsd":
        raise ValueError(
            f"`beta` is {args.beta}, but belongs to divergence='jsd', and `divergence` is {args.divergence!r}; "
            "leave it at 0.5, or set `divergence` to 'jsd'."
        )
    if not 0 <= args.lmbda <= 1:
        raise ValueError(f"`lmbda` must be from 0 to 1, but is {args.lmbda}.")
    if args.captured_columns is not None and len(args.captured_columns) not in (1, 2):
        raise ValueError(
            f"`captured_columns` is {args.captured_columns!r}; name one column as vLLM's `prompt_logprobs`, or "
            "two, of token ids and of log probabilities."
        )
    names = ("task_weight", "distill_weight", "cross_weight", "hint_weight", "stone_weight", "state_weight")
    weights = {name: getattr(args, name) or 0.0 for name in names}
    used = [name for name in names if any(name in OBJECTIVE_WEIGHTS[one] for one in objectives)]
    for name, weight in weights.items():
        if not 0 <= weight < float("inf"):
            raise ValueError(f"`{name}` must be 0 or a positive number, but is {weight}.")
    if not any(weights[name] for name in used):
        raise ValueError(
            f"{', '.join(f'`{name}`' for name in used)} {'are all' if len(used) > 1 else 'is'} 0, so there is "
            f"nothing for objective={args.objective!r} to train on; give {'one of them' * (len(used) > 1) or 'it'} "
            "a weight."
        )
    if args.cross_weight and objectives != ["block_kd"]:
        raise ValueError(
            f"`cross_weight` is {args.cross_weight}, but the mean of stepping stones is a target of "
            f"objective='block_kd' alone, and `objective` is {args.objective!r}; set it to 0."
        )
    if args.cross_weight and (args.stepping_stones == "none" or args.stone_weight == 0):
        cause = "stepping_stones='none'" if args.stepping_stones == "none" else "stone_weight=0"
        raise ValueError(
            f"`cross_weight` is {args.cross_weight}, but with `{cause}` there is no mean of stones to distil from; "
            "set it to 0."
        )
    if args.connector_learning_rate is not None and not args.connector_learning_rate >= 0:
        raise ValueError(
            f"`connector_learning_rate` must be 0 or a positive number, but is {args.connector_learning_rate}."
        )
    for name in ("num_blocks", "stones_per_step", "stones_every", "teacher_cache_top_k", "max_new_tokens"):
        if getattr(args, name) < 1:
            raise ValueError(f"`{name}` must be at least 1, but is {getattr(args, name)}.")
    if not 0 < args.stone_fraction <= 1:
        raise ValueError(f"`stone_fraction` must be above 0 and at most 1, but is {args.stone_fraction}.")
    if args.cross_weight and (args.stepping_stones == "share" or args.stone_fraction < 1 or args.stones_every > 1):
        raise ValueError(
            f"`cross_weight` is {args.cross_weight}, but with `stepping_stones='share'`, a `stone_fraction` below "
            "1 or a `stones_every` above 1 not every example has a mean of stones to distil from; set it to 0."
        )
    if args.loss_chunk_size is not None and args.loss_chunk_size < 0:
        raise ValueError(f"`loss_chunk_size` must be 0 or a positive number, but is {args.loss_chunk_size}.")


def asks_for_stones(args: TrainingArguments) -> bool:
    """Whether one of the fields `ABOUT_STONES` has been set."""
    fields = args.__dataclass_fields__
    return any(getattr(args, name) != fields[name].default for name in ABOUT_STONES)


def _check_choice(args: TrainingArguments, name: str, choices: tuple[str, ...]) -> None:
    if getattr(args, name) not in choices:
        raise ValueError(
            f"`{name}` is {getattr(args, name)!r}, which is unknown; choose one of {', '.join(map(repr, choices))}."
        )


def check_objective(name: str) -> list[str]:
    """The names in `"block_kd"` or in a sum such as `"block_kd+hint"`.

    Raises:
        ValueError: If one is unknown, named twice, or cannot be added to others.
    """
    names = name.split("+")
    known = ", ".join(map(repr, OBJECTIVE_WEIGHTS))
    unknown = [one for one in names if one not in OBJECTIVE_WEIGHTS]
    if unknown:
        raise ValueError(f"`objective` is {name!r}, but {unknown[0]!r} is unknown; choose one of {known}, or a sum.")
    if len(set(names)) < len(names) or {"hint", "fcfd"} <= set(names):
        raise ValueError(f"`objective` is {name!r}, which adds the same loss twice; name each once.")
    alone = [one for one in names if one in REPLACING_OBJECTIVES]
    if alone and len(names) > 1:
        raise ValueError(
            f"`objective` is {name!r}, but {alone[0]!r} replaces the losses of plain distillation, to which the others "
            "add; name it by itself."
        )
    return names


def parse_indices(name: str, given: list[int] | str | None, words: tuple[str, ...]) -> list[int] | str:
    """Turn `"1,3"` from a command line into `[1, 3]`, and refuse what is neither a known word nor a list of indices."""
    if given in words:
        return given
    items = str(given).strip("[] ").split(",") if isinstance(given, (str, int)) else given
    try:
        indices = sorted({int(str(item)) for item in items})
    except (TypeError, ValueError):
        indices = []
    if not indices:
        raise ValueError(
            f"`{name}` is {given!r}; choose {', '.join(map(repr, words))} or a list of indices such as [1, 3]."
        )
    return indices
