"""Which entries of the teacher's tensors a narrower student keeps: `Narrowing`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PreTrainedModel

from ..axes.axis import Axis, entries, find, leaves
from ..axes.following import ModelAxes, find_axes
from ..axes.matching import matches
from ..axes.symmetry import check_symmetry
from ..models.classes import is_headless
from ..models.cut import Cut
from ..routing.errors import UnsupportedArchitectureError
from ..routing.layers import LayerStack
from .config_changes import BUILD_ERRORS
from .width_scores import Scores


@dataclass(frozen=True)
class Narrowing:
    """The entries that a student keeps of each dimension of its teacher's tensors.

    Attributes:
        axes: The teacher's axes.
        sizes: Leaf of these axes -> how many of its entries the student has a place for, where these are fewer.
        reasons: Name of a tensor of the student -> why it cannot be a part of the teacher's.
        kept: Leaf -> the entries that are kept: those of layers from the beginning, the others once they are chosen.
        scores: Leaf -> what they were chosen by.
    """

    axes: ModelAxes
    sizes: dict[Axis, int]
    reasons: dict[str, str]
    kept: dict[Axis, list[int]] = field(default_factory=dict)
    scores: Scores = field(default_factory=dict)

    def choose(self, scores: Scores) -> None:
        """Keep the entries with the highest scores, in their order."""
        for leaf, size in self.sizes.items():
            self.scores[leaf] = scores.get(leaf, torch.zeros(leaf.size))
            self.kept[leaf] = self.scores[leaf].argsort(descending=True, stable=True)[:size].sort().values.tolist()

    def entries(self, name: str, dim: int) -> list[int]:
        """Those that are kept of a dimension of one of the teacher's tensors."""
        return entries(self.axes.tensors[name][dim], self.kept)

    def entries_of_states(self, depth: int) -> list[int]:
        """Those that are kept of the last dimension of the hidden states before a layer."""
        return entries(self.axes.states[depth][-1], self.kept)

    def part_of(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """What is kept of one of the teacher's tensors."""
        for dim, axis in enumerate(self.axes.tensors[name]):
            if any(leaf in self.kept for leaf in leaves(axis)):
                index = torch.tensor(self.entries(name, dim), dtype=torch.long, device=tensor.device)
                tensor = tensor.index_select(dim, index)
        return tensor

    def record(self, layers: Sequence[int], depth: int) -> Cut:
        """What is written beside the student."""
        places: dict[Axis, tuple[str, int]] = {}
        for name, dims in self.axes.tensors.items():
            for dim, axis in enumerate(dims):
                for leaf in leaves(axis):
                    places.setdefault(leaf, (name, dim))
        axes = [
            {
                "tensor": places[leaf][0],
                "dim": places[leaf][1],
                "size": leaf.size,
                "kept": self.kept[leaf],
                "scores": [float(f"{score:.4g}") for score in self.scores[leaf].tolist()],
            }
            for leaf in self.sizes
        ]
        streams = {find(states[-1]) for states in self.axes.states}
        is_cut = len(streams) == 1 and any(leaf in self.kept for stream in streams for leaf in leaves(stream))
        return Cut(list(layers), depth, entries(streams.pop(), self.kept) if is_cut else None, axes)


def find_narrowing(
    teacher: PreTrainedModel,
    student: PreTrainedModel,
    stack: LayerStack,
    chosen: Sequence[int],
    origin: Callable[[str], str],
    inputs: Mapping[str, Any] | None,
    teachers: Callable[[], ModelAxes],
) -> Narrowing | None:
    """Find which dimensions a student has less of than its teacher.

    What is found is proved on the student: permuted at random, a copy in float64 gives the same outputs.

    Args:
        teacher: The teacher.
        student: Of the same class; its values do not matter.
        stack: The teacher's layers.
        chosen: Indices of those that the student keeps. Where each layer selects an entry of its own, as of the tables
            of Gemma 3n, these entries stay.
        origin: Name of a tensor of the student -> that of the teacher's.
        inputs: A small batch for both; default: made of the configs.
        teachers: Gives the teacher's axes, where they are needed.

    Returns:
        The narrowing, nothing of which is chosen yet; `None` if no tensor has another shape.

    Raises:
        UnsupportedArchitectureError: If what is found is wrong, or a tensor of a layer cannot be cut to the student's.
    """
    theirs, ours = dict(_tensors(teacher)), dict(_tensors(student))
    pairs = [(name, origin(name)) for name in ours if origin(name) in theirs]
    if all(ours[name].shape == theirs[source].shape for name, source in pairs):
        return None
    try:
        check_symmetry(student, inputs)
        wide, narrow = teachers(), find_axes(student, inputs)
    except UnsupportedArchitectureError:
        raise
    except BUILD_ERRORS as error:
        raise UnsupportedArchitectureError(
            f"{type(teacher).__name__} cannot be cut to these sizes, with which its forward does not run or cannot be "
            f"followed ({type(error).__name__}: {' '.join(str(error).split())}); other fields of its config may have "
            "to change with them."
        ) from error
    layers = tuple(f"{name}." for name, module in teacher.named_modules() if any(module is one for one in stack.layers))
    # What a model without a head returns are states, which may become narrower.
    heads = () if is_headless(teacher) else wide.outputs
    outputs = {leaf for dims in heads for axis in dims for leaf in leaves(axis)}
    sizes: dict[Axis, int] = {}
    reasons: dict[str, str] = {}
    of_layers: dict[Axis, list[int]] = {}
    found: list[tuple[str, tuple[Axis, Axis], list[dict[Axis, int]]]] = []
    for name, source in pairs:
        if source not in wide.unread:
            pairs_of_axes = zip(wide.tensors[source], narrow.tensors[name], strict=True)
            found += [(name, both, matches(*both)) for both in pairs_of_axes]
        elif ours[name].shape != theirs[source].shape:
            reasons[name] = "the forward does not read it on these inputs"
    # What could be matched in several ways follows what could not, and all the rest the layers.
    found.sort(key=lambda one: (len(one[2]) > 1, not origin(one[0]).startswith(layers)))
    for name, (one, other), ways in found:
        if not ways:
            if ours[name].shape != theirs[origin(name)].shape:
                reasons[name] = f"{other} entries are no part of {one}"
            continue
        agreeing = (way for way in ways if all(sizes.get(leaf, size) == size for leaf, size in way.items()))
        for leaf, size in next(agreeing, ways[0]).items():
            if (leaf.size, size, leaf.fixed) == (len(stack), len(chosen), "`select` reads it as a whole"):
                of_layers[leaf] = list(chosen)
            elif size > leaf.size:
                reasons[name] = f"the teacher has {leaf.size} entries where it has {size}"
            elif size < leaf.size and (leaf.fixed or leaf in outputs):
                reasons[name] = leaf.fixed or "its entries are those of the outputs"
            elif sizes.setdefault(leaf, size) != size:
                reasons[name] = f"{size} entries are {sizes[leaf]} elsewhere"
    sizes = {leaf: size for leaf, size in sizes.items() if size < leaf.size}
    # Such as queries, all of which stay, where some of the keys go that they belong to.
    whole = {
        name: f"{other} entries are no part of {one}"
        for name, (one, other), ways in found
        if not ways and name not in reasons and any(leaf in sizes for leaf in leaves(one))
    }
    for name, reason in {**reasons, **whole}.items():
        old, new = tuple(theirs[origin(name)].shape), tuple(ours[name].shape)
        is_part = name in whole or any(own < other for own, other in zip(new, old, strict=False))
        if is_part and origin(name).startswith(layers) and origin(name) not in wide.unread:
            changed = f"keep its shape, {old}" if name in whole else f"have the shape {new} instead of {old}"
            raise UnsupportedArchitectureError(
                f"{type(teacher).__name__} cannot be cut to these sizes: {name} would {changed}, but {reason}; choose "
                "other sizes, or build the student from its config, which begins anew."
            )
    return Narrowing(wide, sizes, reasons, of_layers)


def read_otherwise(
    student: PreTrainedModel,
    origin: Callable[[str], str],
    inputs: Mapping[str, Any] | None,
    teachers: Callable[[], ModelAxes],
) -> str | None:
    """Which tensor a student of the teacher's shapes takes apart in another way, as where heads are fewer and larger.

    Args:
        student: Of the teacher's class.
        origin: As in `find_narrowing`.
        inputs: Likewise.
        teachers: Likewise.

    Returns:
        Its name and what it is made of; `None` if there is none, or this cannot be followed.
    """
    try:
        wide, narrow = teachers(), find_axes(student, inputs)
    except BUILD_ERRORS:
        return None
    for name, dims in narrow.tensors.items():
        source = origin(name)
        if source in wide.tensors and source not in wide.unread:
            for one, other in zip(wide.tensors[source], dims, strict=True):
                if one.size == other.size and not matches(one, other):
                    return f"{name} as {other} entries, and the teacher as {one}"
    return None


def _tensors(model: PreTrainedModel) -> Iterator[tuple[str, torch.Tensor]]:
    stored = model.state_dict().keys()
    for name, tensor in [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]:
        if name in stored:
            yield name, tensor
