"""Which options of `Trainer` do not work here: `check_options`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ..config import BlockwiseDistillConfig
from ..losses.embeddings import embedding_losses
from ..pairing.tasks import Task

UNSUPPORTED: dict[str, tuple[Callable[[BlockwiseDistillConfig], bool], str]] = {
    "ddp_find_unused_parameters": (
        lambda args: args.world_size > 1 and args.ddp_find_unused_parameters is not False,
        "DistributedDataParallel would take the connectors for unused, because the student's outputs do not depend on "
        "them; set it to False, since every parameter is used",
    ),
    "ddp_static_graph": (
        lambda args: args.world_size > 1 and args.ddp_static_graph and args.gradient_accumulation_steps > 1,
        "DistributedDataParallel cannot accumulate gradients over a static graph; set it to None, or "
        "`gradient_accumulation_steps` to 1",
    ),
    "parallelism_config": (
        lambda args: args.parallelism_config is not None and args.parallelism_config.non_data_parallel_size > 1,
        "student and teacher cannot be split within a layer or a sequence; set it to None and use "
        "DistributedDataParallel, which `accelerate launch --multi_gpu` starts",
    ),
}
"""Field of the configuration -> when it cannot be had; why, and what to do. All others do what they do in `Trainer`."""


def check_options(
    args: BlockwiseDistillConfig, optimizers: tuple[Any, Any], peft_config: Any, model_init: Any = None
) -> None:
    """Raise a `ValueError` that names the first option that cannot be had; nothing has been loaded by then.

    Args:
        args: The configuration.
        optimizers: As given to the trainer.
        peft_config: As given to the trainer.
        model_init: As given to the trainer.
    """
    for name, (is_asked_for, reason) in UNSUPPORTED.items():
        if is_asked_for(args):
            raise ValueError(f"`{name}` is {getattr(args, name)!r}, but {reason}.")
    if model_init is not None:
        raise ValueError(
            "`model_init` is given, but blocks, connectors and optimizer of a BlockwiseDistillTrainer belong to one "
            "student; pass `model`, and make a new trainer in the objective of your search."
        )
    if optimizers[0] is not None and args.connector_learning_rate is not None:
        raise ValueError(
            f"`connector_learning_rate` is {args.connector_learning_rate}, but `optimizers` is given, too, which has "
            "rates of its own; leave one of them out."
        )
    if peft_config is not None and optimizers[0] is not None:
        raise ValueError(
            "`optimizers` and `peft_config` are both given, but the optimizer was made before the adapter, so it would "
            "not train it; wrap the student with `peft.get_peft_model` before you make its optimizer."
        )


def check_has_labels(args: BlockwiseDistillConfig, task: Task, distils: bool) -> None:
    """Raise a `ValueError` for models without a head, which have no labels, and an objective that needs them.

    Args:
        args: The configuration.
        task: Of both models.
        distils: Whether rows without a label teach anything.
    """
    if task.problem_type == "embedding" and not distils:
        raise ValueError(
            f"`objective` is {args.objective!r}, which trains on labels alone, but {task.name} has no head that could "
            "be compared with any; choose 'block_kd' or 'kd', or give both models a head."
        )
    is_one = args.per_device_train_batch_size == 1 and args.distill_weight > 0
    if task.problem_type == "embedding" and is_one and embedding_losses(args.embedding_loss) == ["similarity"]:
        raise ValueError(
            "`embedding_loss` is 'similarity', which compares the examples of a micro-batch with each other, but "
            "`per_device_train_batch_size` is 1; make it at least 2, or choose 'cosine'."
        )


def labels_alone(args: BlockwiseDistillConfig, weights: Mapping[str, float]) -> tuple[str | None, str]:
    """Why rows without labels teach nothing, `None` where they do, and what to do about it.

    Args:
        args: The configuration.
        weights: Its fields that say what rows without a label learn from, as `Objective` has them.
    """
    if any(weights.values()):
        return None, ""
    if not weights:
        return f"`objective` is {args.objective!r}", "choose 'block_kd' or 'kd'"
    named, are_several = " and ".join(f"`{name}`" for name in weights), len(weights) > 1
    cause = f"{named} {'are' if are_several else 'is'} 0"
    return cause, f"give {'one of them' if are_several else 'it'} a weight"


def check_learns(
    args: BlockwiseDistillConfig, task: Task, weights: Mapping[str, float], has_no_labels: Callable[[], bool]
) -> None:
    """Raise a `ValueError` if nothing of a run trains: rows without labels, and nothing that they could learn from.

    Args:
        args: The configuration.
        task: Of both models.
        weights: As in `labels_alone`.
        has_no_labels: Whether no row of the training set has a label, as far as that is known.
    """
    cause, cure = labels_alone(args, weights)
    if cause is None:
        return
    found = None
    if task.problem_type == "embedding":
        found = f"{task.name} has no head that could be compared with any"
    elif args.lmbda:
        found = f"`lmbda` is {args.lmbda}, and what the student writes has none"
    elif has_no_labels():
        found = "no row of `train_dataset` has one"
    if found is not None:
        raise ValueError(f"{cause}, so that labels alone would train, but {found}; {cure}.")


def check_smoothing(args: BlockwiseDistillConfig, task: Task, problem_type: str | None) -> None:
    """Raise a `ValueError` for smoothed labels where there are none that `Trainer` could smooth in evaluation.

    Args:
        args: The configuration.
        task: Of both models.
        problem_type: `None` where it is not known yet.
    """
    if not args.label_smoothing_factor:
        return
    if task.label_names != ("labels",):
        raise ValueError(
            f"`label_smoothing_factor` is {args.label_smoothing_factor}, but {' and '.join(task.label_names)} of "
            f"{task.name} would not be smoothed in evaluation; set it to 0."
        )
    if task.form is not None:
        raise ValueError(
            f"`label_smoothing_factor` is {args.label_smoothing_factor}, but {task.name} trains on its own loss, which "
            "smooths nothing; set it to 0."
        )
    if problem_type not in (None, "single_label_classification"):
        raise ValueError(
            f"`label_smoothing_factor` is {args.label_smoothing_factor}, but in a problem of type {problem_type!r} "
            "there is no label to smooth; set it to 0."
        )
