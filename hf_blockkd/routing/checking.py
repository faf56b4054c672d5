"""Does a model that is entered in its middle answer like itself: `check_routing`."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from .calls import check_calls, record_calls
from .dummy_inputs import dummy_inputs
from .entering import capture_states, enter_at, record_extras
from .errors import UnsupportedArchitectureError
from .examples import take_examples
from .forwards import in_eval_mode
from .layers import LayerStack, find_layer_stack
from .logits import main_outputs, only_logits


@dataclass(frozen=True)
class RoutingReport:
    """What `check_routing` found.

    Attributes:
        layers_path: Dotted name of the stack.
        num_layers: Its depth.
        technique: How states are routed; `"own forward"` is the only one.
        max_abs_error: Largest absolute difference to the model's own outputs, over all entry depths `0..num_layers`.
        worst_depth: The entry depth at which it was seen.
    """

    layers_path: str
    num_layers: int
    technique: str
    max_abs_error: float
    worst_depth: int


def check_routing(
    model: PreTrainedModel,
    inputs: Mapping[str, torch.Tensor] | None = None,
    layers_path: str | None = None,
) -> RoutingReport:
    """Test whether a model entered at each depth, from its own states, gives its own logits.

    Args:
        model: A model with a head; it is run in eval mode, without gradients, and put back into its mode.
        inputs: Keyword arguments of its forward; `None` makes dummy inputs from the config. Caches and router
            logits, which a teacher does without in training, are left out.
        layers_path: Dotted name of the stack where `find_layer_stack` should not search.

    Returns:
        A report; `max_abs_error` is 0.0 where routing is exact.

    Raises:
        UnsupportedArchitectureError: If the model has no stack to route through.
        ValueError: If no dummy input can be made for it, or it does not run on that.

    Example:
        ```python
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> from hf_blockkd import check_routing
        >>> check_routing(GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=99))).max_abs_error
        0.0

        ```
    """
    stack = find_layer_stack(model, layers_path)
    with in_eval_mode(model), only_logits(model):
        inputs = _working_dummy_inputs(model) if inputs is None else inputs
        errors = routing_errors(model, stack, inputs, range(len(stack) + 1))
    worst_depth = max(errors, key=errors.__getitem__)
    return RoutingReport(stack.path, len(stack), "own forward", errors[worst_depth], worst_depth)


@torch.no_grad()
def _working_dummy_inputs(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    inputs = dummy_inputs(model)
    try:
        model(**inputs)
    except Exception as error:
        raise ValueError(
            f"{type(model).__name__} does not run on made-up {' and '.join(inputs)} "
            f"({' '.join(str(error).split()).rstrip('.')}); correct its config, or pass `inputs` of your own."
        ) from error
    return inputs


@torch.no_grad()
def routing_errors(
    model: PreTrainedModel,
    stack: LayerStack,
    inputs: Mapping[str, Any],
    depths: Collection[int],
    examples: torch.Tensor | None = None,
    run: Callable[[Mapping[str, Any]], tuple[torch.Tensor, ...]] | None = None,
) -> dict[int, float]:
    """Largest absolute difference between the outputs of a clean forward and of one entered at each of `depths`.

    Args:
        model: In eval mode.
        stack: Where it is entered.
        inputs: A batch.
        depths: Numbers of layers that are skipped.
        examples: They alone enter, and theirs are the outputs that are compared; default: all.
        run: Runs the model on a batch and gives what is compared; default: its main outputs.
    """
    if run is None:

        def run(batch: Mapping[str, Any]) -> tuple[torch.Tensor, ...]:
            return main_outputs(model(**batch))

    with capture_states(stack, depths) as states, record_extras(stack) as extras, record_calls(stack) as calls:
        clean = run(inputs)
    check_calls(model, stack, calls, depths)
    num_examples = len(clean[0])
    if examples is not None and any(len(one) != num_examples for one in states.values()):
        raise UnsupportedArchitectureError(
            f"The states of {type(model).__name__} have the shape {tuple(next(iter(states.values())).shape)} for "
            f"{num_examples} examples, which so cannot be shared out among stepping stones; set `stepping_stones` to "
            "'sample' and `stone_fraction` to 1."
        )
    clean, states, extras, inputs = (
        take_examples(value, examples, num_examples) for value in (clean, states, extras, inputs)
    )
    errors = {}
    for depth in depths:
        with enter_at(stack, depth, states[depth], extras):
            routed = run(inputs)
        errors[depth] = max(_difference(a, b) for a, b in zip(clean, routed, strict=True))
    # A head that reads several levels may leave out the last one (BEiT), and the others count.
    if len(stack) in errors and not stack.are_levels:
        with enter_at(stack, len(stack), torch.zeros_like(states[len(stack)]), extras):
            blind = run(inputs)
        if all(torch.equal(a, b) for a, b in zip(clean, blind, strict=True)):
            raise UnsupportedArchitectureError(
                f"The outputs of {type(model).__name__} do not depend on the hidden states that leave the last layer "
                f"of {stack.path!r}; name another stack, or register an Architecture whose layers hand on all that "
                "its head reads."
            )
    return errors


def _difference(a: torch.Tensor, b: torch.Tensor) -> float:
    # Equal infinities (masked logits) are no difference; anything beside a NaN is an infinite one.
    difference = torch.where(a == b, 0.0, (a.float() - b.float()).abs())
    return difference.nan_to_num(nan=float("inf"), posinf=float("inf")).max().item()
