"""Scores of channels, heads and neurons, against sums written out by hand."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from transformers import PreTrainedModel

from hf_blockkd.axes.axis import Axis, leaves
from hf_blockkd.axes.following import find_axes
from hf_blockkd.routing.dummy_inputs import dummy_inputs
from hf_blockkd.students.width_scores import activation_scores, random_scores, weight_scores

from ..helpers import tiny_models as tiny

MAPS = {
    "bert": (tiny.tiny_bert, "bert.encoder.layer.1.output.dense", 1),
    "gpt2": (tiny.tiny_gpt2, "transformer.h.1.mlp.c_proj", 0),
    "llama": (tiny.tiny_llama, "model.layers.1.mlp.down_proj", 1),
    # Its layers take steps first, its head does not.
    "xlnet": (lambda: tiny.tiny_xlnet("TokenClassification"), "transformer.layer.1.ff.layer_2", 1),
}


def padded_batches(model: PreTrainedModel, padding: int) -> Iterator[dict[str, torch.Tensor]]:
    """Batches of rows that end early; `padding` stands behind their ends."""
    generator = torch.Generator().manual_seed(1)
    for length in (5, 8):
        ids = torch.randint(3, tiny.VOCABULARY, (4, 8), generator=generator)
        mask = (torch.arange(8) < length).long().expand(4, 8)
        yield {"input_ids": ids.where(mask.bool(), torch.tensor(padding)), "attention_mask": mask}


def neurons(model: PreTrainedModel, name: str, dim: int) -> Axis:
    (leaf,) = leaves(find_axes(model).tensors[f"{name}.weight"][dim])
    return leaf


@pytest.mark.parametrize("family", MAPS)
def test_neurons_are_scored_by_their_share_in_what_is_computed_of_them(family):
    build, name, dim = MAPS[family]
    model = build()
    module, inputs = model.get_submodule(name), []
    handle = module.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    batches = list(padded_batches(model, 0))
    with torch.no_grad():
        for batch in batches:
            model(**batch)
    handle.remove()
    inputs = [x.transpose(0, 1) for x in inputs] if family == "xlnet" else inputs
    rows = torch.cat([x[batch["attention_mask"].bool()] for x, batch in zip(inputs, batches, strict=True)])
    columns = module.weight if dim == 1 else module.weight.T
    lost = torch.stack([(rows[:, i, None] * columns[:, i]).square().sum() for i in range(rows.shape[1])])
    axes = find_axes(model)
    (leaf,) = leaves(axes.tensors[f"{name}.weight"][dim])
    assert torch.allclose(activation_scores(model, axes, batches)[leaf].float(), lost / lost.sum(), rtol=1e-4)


@pytest.mark.parametrize("family", MAPS)
def test_padding_does_not_count(family):
    model = MAPS[family][0]()
    axes = find_axes(model)
    ours, other = (activation_scores(model, axes, padded_batches(model, padding)) for padding in (0, 9))
    assert all(torch.equal(ours[leaf], other[leaf]) for leaf in axes_of_layers(model, axes))


def axes_of_layers(model: PreTrainedModel, axes) -> set[Axis]:
    name = next(path for path, module in model.named_modules() if path.endswith(".1"))
    tensors = [dims for tensor, dims in axes.tensors.items() if tensor.startswith(f"{name}.")]
    return {leaf for dims in tensors for axis in dims for leaf in leaves(axis) if not leaf.fixed}


def test_a_head_has_the_shares_of_all_its_entries():
    model = tiny.tiny_bert()
    name = "bert.encoder.layer.0.attention.output.dense"
    seen = []
    handle = model.get_submodule(name).register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    batch = dummy_inputs(model)
    with torch.no_grad():
        model(**batch)
    handle.remove()
    weight = model.get_submodule(name).weight
    parts = seen[0].flatten(0, 1).square().sum(0) * weight.square().sum(0)
    axes = find_axes(model)
    heads, within = leaves(axes.tensors[f"{name}.weight"][1])
    scores = activation_scores(model, axes, [batch])
    assert torch.allclose(scores[heads].float(), parts.reshape(2, 8).sum(1) / parts.sum(), rtol=1e-4)
    assert torch.allclose(scores[within].float(), parts.reshape(2, 8).sum(0) / parts.sum(), rtol=1e-4)


def test_weights_are_shares_of_their_tensors_added_up():
    model = tiny.tiny_bert()
    layer = model.bert.encoder.layer[1]
    first, second = layer.intermediate.dense.weight.square(), layer.output.dense.weight.square()
    axes = find_axes(model)
    (leaf,) = leaves(axes.tensors["bert.encoder.layer.1.output.dense.weight"][1])
    wanted = first.sum(1) / first.sum() + second.sum(0) / second.sum()
    assert torch.allclose(weight_scores(model, axes)[leaf].float(), wanted)


def test_random_scores_follow_from_their_seed():
    axes = find_axes(tiny.tiny_bert())
    state = torch.random.get_rng_state()
    first, again, other = (random_scores(axes, seed) for seed in (0, 0, 1))
    assert torch.equal(state, torch.random.get_rng_state())
    assert all(torch.equal(first[leaf], again[leaf]) for leaf in first)
    assert not all(torch.equal(first[leaf], other[leaf]) for leaf in first)


def test_a_model_is_measured_in_eval_mode_and_keeps_its_own():
    model = tiny.tiny_bert(hidden_dropout_prob=0.5).train()
    axes = find_axes(model)
    ours, again = (activation_scores(model, axes, padded_batches(model, 0)) for _ in range(2))
    assert model.training
    assert all(torch.equal(ours[leaf], again[leaf]) for leaf in ours)
    assert not any(module._forward_pre_hooks for module in model.modules())
