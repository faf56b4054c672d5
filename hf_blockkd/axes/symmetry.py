"""The proof of what axes were found: a model that is permuted along them is the same model, `check_symmetry`."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel

from ..routing.dummy_inputs import dummy_inputs
from ..routing.errors import UnsupportedArchitectureError
from ..routing.forwards import in_dtype_of, in_eval_mode
from ..routing.logits import main_outputs, only_logits
from .axis import Axis, entries, leaves
from .following import ModelAxes, find_axes

TOLERANCE = 1e-9
"""Difference of outputs in float64, as a share of the largest: rounding alone."""


class _InFloat64(TorchDispatchMode):
    """Computes in float64 what models make or cast to float32, as they do for norms and softmax."""

    def __enter__(self) -> _InFloat64:
        self.default = torch.get_default_dtype()
        torch.set_default_dtype(torch.float64)
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        torch.set_default_dtype(self.default)
        super().__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = dict(kwargs or {})
        if kwargs.get("dtype") == torch.float32:
            kwargs["dtype"] = torch.float64
        return func(*args, **kwargs)


def check_symmetry(model: PreTrainedModel, inputs: Mapping[str, Any] | None = None, seed: int = 0) -> float:
    """Permute a model at random along all its axes, and compare outputs.

    Args:
        model: It is not changed: a copy in float64 is permuted, whose parameters are moved a little at random, since
            norms that multiply by one look alike in any order.
        inputs: A small batch; default: made of its config.
        seed: Of the permutations.

    Returns:
        The largest difference of outputs, as a share of the largest output.

    Raises:
        UnsupportedArchitectureError: If that is more than rounding, with the tensor whose permutation alone shows it.

    Example:
        ```python
        >>> from transformers import ViTConfig, ViTForImageClassification
        >>> from hf_blockkd.axes.symmetry import check_symmetry
        >>> model = ViTForImageClassification(ViTConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2))
        >>> check_symmetry(model) < 1e-9
        True

        ```
    """
    model = copy.deepcopy(model).double()
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")  # grouped products know no float64
    inputs = in_dtype_of(model, dummy_inputs(model) if inputs is None else inputs)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator).to(parameter)
    with _InFloat64():
        axes = find_axes(model, inputs)
    free = {leaf: None for dims in axes.tensors.values() for axis in dims for leaf in leaves(axis) if not leaf.fixed}
    orders = {leaf: torch.randperm(leaf.size, generator=generator).tolist() for leaf in free}
    error = _error(model, inputs, axes, orders)
    if not error <= TOLERANCE:
        for leaf, order in orders.items():
            if not _error(model, inputs, axes, {leaf: order}) <= TOLERANCE:
                names = [name for name, dims in axes.tensors.items() if any(leaf in leaves(axis) for axis in dims)]
                raise UnsupportedArchitectureError(
                    f"{type(model).__name__} cannot be cut in width: entries of {names[0]} and {len(names) - 1} other "
                    f"tensors, which seemed to go together, change the outputs by {error:.2g} when they are permuted."
                )
    return error


@torch.no_grad()
def _error(
    model: PreTrainedModel, inputs: Mapping[str, Any], axes: ModelAxes, orders: Mapping[Axis, list[int]]
) -> float:
    with in_eval_mode(model), only_logits(model), _InFloat64():
        own = main_outputs(model(**inputs))
        tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        permuted = {name: _permuted(tensor, axes.tensors[name], orders) for name, tensor in tensors.items()}
        other = main_outputs(torch.func.functional_call(model, permuted, kwargs=dict(inputs), tie_weights=True))
    differences = [
        (_permuted(ours, dims, orders) - theirs).abs().max() / ours.abs().max()
        for ours, theirs, dims in zip(own, other, axes.outputs, strict=True)
    ]
    return max(differences).item()


def _permuted(tensor: torch.Tensor, dims: tuple[Axis, ...], orders: Mapping[Axis, list[int]]) -> torch.Tensor:
    for dim, axis in enumerate(dims):
        if any(leaf in orders for leaf in leaves(axis)):
            tensor = tensor.index_select(
                dim, torch.tensor(entries(axis, orders), dtype=torch.long, device=tensor.device)
            )
    return tensor
