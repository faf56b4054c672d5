"""What operations that move entries do with axes: views, slices, concatenations, look-ups, resampling."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from .axis import Axis, cut, leaves, product, regroup, split, total, unify
from .rules import CONSTANT, Call, Dims, elementwise, opaque, rule, same


@rule("view", "_unsafe_view", "reshape", "_reshape_alias", "_view_copy", "view_copy")
def _view(call: Call, x: Dims, *args: Any) -> list[Dims]:
    if not args or not isinstance(args[0], (list, tuple)):  # another dtype
        return same(call, x)
    return [regroup(x, call.outputs[0].shape)]


@rule("view_as_complex")
def _view_as_complex(call: Call, x: Dims) -> list[Dims]:
    call.fix(x[-1])
    return [x[:-1]]


@rule("view_as_real")
def _view_as_real(call: Call, x: Dims) -> list[Dims]:
    return [[*x, call.new(2)]]


@rule("t")
def _t(call: Call, x: Dims) -> list[Dims]:
    return [x[::-1]]


@rule("transpose")
def _transpose(call: Call, x: Dims, first: int, second: int) -> list[Dims]:
    made = [*x]
    if made:
        made[first], made[second] = made[second], made[first]
    return [made]


@rule("permute")
def _permute(call: Call, x: Dims, dims: Sequence[int]) -> list[Dims]:
    return [[x[dim] for dim in dims]]


@rule("unsqueeze")
def _unsqueeze(call: Call, x: Dims, dim: int) -> list[Dims]:
    dim %= len(x) + 1
    return [[*x[:dim], Axis(1), *x[dim:]]]


@rule("squeeze")
def _squeeze(call: Call, x: Dims, dims: Any = None) -> list[Dims]:
    dims = range(len(x)) if dims is None else [dims] if isinstance(dims, int) else dims
    dropped = {dim % len(x) for dim in dims if x} if x else set()
    return [[axis for dim, axis in enumerate(x) if dim not in dropped or axis.size != 1]]


@rule("expand")
def _expand(call: Call, x: Dims, *args: Any, **kwargs: Any) -> list[Dims]:
    shape = call.outputs[0].shape
    own = [*[Axis(1)] * (len(shape) - len(x)), *x]
    # Copies of one and the same are a dimension of their own, such as the queries of one group of keys.
    return [[axis if axis.size == size else call.new(size, fixed=False) for axis, size in zip(own, shape, strict=True)]]


@rule("repeat")
def _repeat(call: Call, x: Dims, times: Sequence[int]) -> list[Dims]:
    own = [*[Axis(1)] * (len(times) - len(x)), *x]
    return [[product([call.new(n, fixed=False), axis]) for n, axis in zip(times, own, strict=True)]]


@rule("slice")
def _slice(
    call: Call, x: Dims, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1
) -> list[Dims]:
    size, made = x[dim].size, [*x]
    start, end, step = slice(start, end, step).indices(size)
    if step == 1:
        made[dim] = cut(x[dim], start, max(0, end - start))
    elif size % step == 0 and start < step and end > size - step + start:
        made[dim], within = split(x[dim], size // step, step)
        call.fix(within)
    else:
        call.fix(x[dim])
        made[dim] = call.new(call.outputs[0].shape[dim])
    return [made]


@rule("split", "split_with_sizes", "chunk", "tensor_split", "unsafe_split", "unsafe_split_with_sizes", "unsafe_chunk")
def _split(call: Call, x: Dims, sizes: Any, dim: int = 0) -> list[Dims]:
    made, start = [], 0
    for output in call.outputs:
        size = output.shape[dim]
        axes = [*x]
        axes[dim] = cut(x[dim], start, size)
        made.append(axes)
        start += size
    return made


@rule("select", "unbind")
def _select(call: Call, x: Dims, dim: int = 0, index: int = 0) -> list[Dims]:
    call.if_used.append(x[dim])  # some models take one entry to read the shape alone (BART)
    dim %= len(x)
    return [[*x[:dim], *x[dim + 1 :]] for _ in call.outputs]


@rule("cat")
def _cat(call: Call, tensors: Sequence[Dims], dim: int = 0) -> list[Dims]:
    shape = call.outputs[0].shape
    tensors = [axes for axes in tensors if len(axes) == len(shape)]  # empty ones of one dimension may be among them
    dim %= len(shape)
    made = []
    for index in range(len(shape)):
        if index == dim:
            made.append(total(axes[index] for axes in tensors))
        else:
            for axes in tensors[1:]:
                unify(tensors[0][index], axes[index])
            made.append(tensors[0][index])
    return [made]


@rule("stack")
def _stack(call: Call, tensors: Sequence[Dims], dim: int = 0) -> list[Dims]:
    for axes in tensors[1:]:
        for ours, theirs in zip(tensors[0], axes, strict=True):
            unify(ours, theirs)
    dim %= len(tensors[0]) + 1
    return [[*tensors[0][:dim], call.new(len(tensors)), *tensors[0][dim:]]]


@rule("constant_pad_nd", "reflection_pad1d", "reflection_pad2d", "replication_pad2d", "replication_pad1d")
def _pad(call: Call, x: Dims, padding: Sequence[int], *args: Any) -> list[Dims]:
    made = [*x]
    for index, (before, after) in enumerate(zip(padding[::2], padding[1::2], strict=True), start=1):
        kept = cut(x[-index], max(0, -before), x[-index].size + min(0, before) + min(0, after))
        if before or after:
            made[-index] = total([call.new(max(0, before)), kept, call.new(max(0, after))])
    return [made]


@rule("im2col")
def _im2col(call: Call, x: Dims, *args: Any) -> list[Dims]:
    call.fix(*x[2:])
    _, size, length = call.outputs[0].shape
    return [[x[0], product([x[1], call.new(size // x[1].size)]), call.new(length)]]


@rule("unfold")
def _unfold(call: Call, x: Dims, dim: int, *args: Any) -> list[Dims]:
    call.fix(x[dim])
    made = [*x, call.new(call.outputs[0].shape[-1])]
    made[dim % len(x)] = call.new(call.outputs[0].shape[dim % len(x)])
    return [made]


@rule("max_pool2d_with_indices", "avg_pool2d", "_adaptive_avg_pool2d", "adaptive_max_pool2d", "grid_sampler_2d")
@rule("upsample_bilinear2d", "upsample_bicubic2d", "upsample_nearest2d", "_upsample_bilinear2d_aa")
@rule("_upsample_bicubic2d_aa", "upsample_linear1d", "avg_pool1d", "_adaptive_avg_pool1d", "max_pool2d")
@rule("avg_pool3d", "_adaptive_avg_pool3d", "max_pool3d_with_indices", "upsample_trilinear3d")
def _places(call: Call, x: Dims, *args: Any, **kwargs: Any) -> list[Dims]:
    # What is pooled or resampled are places: images (B, C, H, W), or (B, C, T).
    places = 2 if "2d" in call.name else 3 if "3d" in call.name else 1
    kept = x[:-places]
    call.fix(*x[-places:])
    return [[*kept, *(call.new(size) for size in output.shape[len(kept) :])] for output in call.outputs]


# Look-ups.


@rule("embedding")
def _embedding(call: Call, weight: Dims, indices: Dims, *args: Any) -> list[Dims]:
    call.fix(weight[0])
    return [[*indices, weight[1]]]


@rule("index", "_unsafe_index")
def _index(call: Call, x: Dims, indices: Sequence[Dims | None]) -> list[Dims]:
    # Each index, from the first dimension that it takes: a mask takes as many as it has.
    taken: list[int] = []
    dim = 0
    for index in call.args[1]:
        width = 1 if index is None or index.dtype not in (torch.bool, torch.uint8) else index.ndim
        taken += [] if index is None else range(dim, dim + width)
        dim += width
    if len(taken) == 1 and _is_constant(indices[taken[0]]):
        places = [place % x[taken[0]].size for place in call.args[1][taken[0]].tolist()]
        if places == list(range(places[0], places[0] + len(places))):  # a slice by other means, as of Falcon's keys
            return [[cut(axis, places[0], len(places)) if dim in taken else axis for dim, axis in enumerate(x)]]
    call.fix(*(x[dim] for dim in taken))
    adjacent = taken == list(range(taken[0], taken[-1] + 1)) if taken else True
    position = taken[0] if adjacent and taken else 0
    kept = [axis for dim, axis in enumerate(x) if dim not in taken]
    shape = call.outputs[0].shape
    number = len(shape) - len(kept)
    made = [*kept[:position], *(call.new(size) for size in shape[position : position + number]), *kept[position:]]
    return [made]


def _is_constant(index: Dims) -> bool:
    """Whether an index of one dimension stands in the code, and is not computed."""
    return len(index) == 1 and all(leaf.fixed == CONSTANT for leaf in leaves(index[0]))


@rule("index_select")
def _index_select(call: Call, x: Dims, dim: int, index: Dims) -> list[Dims]:
    call.fix(x[dim])
    made = [*x]
    made[dim] = call.new(call.outputs[0].shape[dim])
    return [made]


@rule("gather")
def _gather(call: Call, x: Dims, dim: int, index: Dims, **kwargs: Any) -> list[Dims]:
    call.fix(x[dim])
    for place, (ours, own) in enumerate(zip(x, index, strict=True)):
        if place != dim % len(x):
            unify(ours, own)
    return [[*index]]


@rule("masked_scatter")
def _masked_scatter(call: Call, x: Dims, mask: Dims, source: Dims) -> list[Dims]:
    """Writes whole rows where a mask says so, such as the states of images into those of a text."""
    chosen = call.args[1].expand(call.outputs[0].shape)
    if source[-1].size != x[-1].size or not torch.equal(chosen, chosen[..., :1].expand_as(chosen)):
        return opaque(call, [x, mask, source])
    call.fix(*x[:-1], *mask[:-1], *source[:-1])
    return elementwise(call, [x, mask, [source[-1]]])


@rule("index_add", "index_copy", "index_put", "scatter", "scatter_add", "index_fill", "_index_put_impl")
def _write(call: Call, x: Dims, *args: Any, **kwargs: Any) -> list[Dims]:
    """Writes at indices: rows may be any, what a row holds keeps its place."""
    if call.name.startswith("index_put") or call.name == "_index_put_impl":
        indices, values = args[0], args[1]
        indexed = [dim for dim, index in enumerate(indices) if index is not None]
        kept = [axis for dim, axis in enumerate(x) if dim not in indexed]
        call.fix(*(x[dim] for dim in indexed))
        adjacent = indexed == list(range(len(indexed)))
        if kept and adjacent and any(index is not None and len(index) == 1 for index in indices):
            for ours, own in zip(reversed(kept), reversed(values), strict=False):
                if own.size != 1:
                    unify(ours, own)
        elif kept:
            call.fix(*kept, *values)
        return [x]
    if call.name in ("index_add", "index_copy"):
        dim, _, source = args[:3]
        call.fix(x[dim], source[dim])
        for place, (ours, own) in enumerate(zip(x, source, strict=True)):
            if place != dim % len(x):
                unify(ours, own)
        return [x]
    tensors = [value for value in args if isinstance(value, list) and all(isinstance(one, Axis) for one in value)]
    for axes in (x, *tensors):
        call.fix(*axes)
    return [x]
