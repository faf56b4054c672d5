from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers
from accelerate import cpu_offload

from hf_blockkd import UnsupportedArchitectureError, find_layer_stack
from hf_blockkd.axes.axis import find, leaves
from hf_blockkd.axes.following import find_axes
from hf_blockkd.axes.rules import RULES
from hf_blockkd.axes.symmetry import check_symmetry

from ..helpers import tiny_models as tiny
from ..routing.test_entering import MODELS


@pytest.mark.parametrize("name", MODELS)
def test_a_model_that_is_permuted_along_its_axes_is_the_same_model(name):
    assert check_symmetry(MODELS[name]()) < 1e-9


@pytest.mark.parametrize("name", ["vit", "bert", "llama", "gpt2"])
def test_the_stream_of_states_is_one_axis_through_all_layers(name):
    model = MODELS[name]()
    stack = find_layer_stack(model)
    axes = find_axes(model, stack=stack)
    (stream,) = {find(states[-1]) for states in axes.states}
    assert not stream.fixed
    readers = [name for name, dims in axes.tensors.items() if any(find(axis) is stream for axis in dims)]
    assert all(any(name.startswith(f"{stack.path}.{index}.") for name in readers) for index in range(len(stack)))


def test_queries_of_a_group_and_its_keys_are_told_apart():
    model = tiny.tiny_llama(hidden_size=32, num_attention_heads=4, num_key_value_heads=2)
    tensors = find_axes(model).tensors
    queries, keys = (list(leaves(tensors[f"model.layers.0.self_attn.{one}_proj.weight"][0])) for one in "qk")
    assert queries[0] is keys[0]
    assert [leaf.size for leaf in queries[:2]] == [2, 2]
    # Rotary embeddings tell the entries of a head apart.
    assert all(leaf.fixed for leaf in queries[2:])


def test_neurons_of_a_gated_map_in_one_matrix_are_one_axis():
    config = transformers.Phi3Config(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, vocab_size=64, pad_token_id=0
    )
    tensors = find_axes(transformers.Phi3ForCausalLM(config)).tensors
    gate, up = leaves(tensors["model.layers.0.mlp.gate_up_proj.weight"][0])
    (down,) = leaves(tensors["model.layers.0.mlp.down_proj.weight"][1])
    assert gate is up is down


def test_vocabulary_positions_and_classes_are_told_from_what_can_be_cut():
    axes = find_axes(tiny.tiny_bert())
    assert axes.tensors["bert.embeddings.word_embeddings.weight"][0].fixed
    assert axes.tensors["bert.embeddings.position_embeddings.weight"][0].fixed
    (classes,) = leaves(axes.outputs[0][-1])
    assert classes is find(axes.tensors["classifier.bias"][0])


def test_an_operation_without_a_rule_fixes_what_it_reads(monkeypatch):
    monkeypatch.delitem(RULES, "native_layer_norm")
    axes = find_axes(tiny.tiny_bert())
    assert "native_layer_norm" in find(axes.tensors["bert.embeddings.LayerNorm.weight"][0]).fixed


def test_a_wrong_rule_is_found_out_and_the_tensor_named(monkeypatch):
    def nothing_joined(call, a, b, *args):
        return [[a[0], b[1]]]

    monkeypatch.setitem(RULES, "mm", nothing_joined)
    monkeypatch.setitem(RULES, "addmm", lambda call, bias, a, b, **kwargs: [[a[0], b[1]]])
    with pytest.raises(UnsupportedArchitectureError, match="BertForSequenceClassification cannot be cut in width: ent"):
        check_symmetry(tiny.tiny_bert())


def test_nothing_of_the_model_changes():
    model = tiny.tiny_llama().train()
    before = copy.deepcopy(model.state_dict())
    state = torch.random.get_rng_state()
    check_symmetry(model)
    find_axes(model)
    assert model.training
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert torch.equal(state, torch.random.get_rng_state())


def test_axes_of_weights_that_are_offloaded_are_those_of_weights_in_place():
    model = tiny.tiny_gpt2()
    wanted = {name: [str(axis) for axis in dims] for name, dims in find_axes(model).tensors.items()}
    cpu_offload(model, execution_device="cpu")
    axes = find_axes(model)
    assert {name: [str(axis) for axis in dims] for name, dims in axes.tensors.items()} == wanted
    assert not axes.unread


def wav2vec2() -> transformers.PreTrainedModel:
    config = transformers.Wav2Vec2Config(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=24, conv_dim=(8, 8),
        conv_stride=(5, 2), conv_kernel=(10, 3), num_feat_extract_layers=2, num_conv_pos_embeddings=8,
        num_conv_pos_embedding_groups=4, vocab_size=16,
    )  # fmt: skip
    return transformers.Wav2Vec2ForCTC(config)


def falcon(**config: Any) -> transformers.PreTrainedModel:
    sizes = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "vocab_size": 64,
        "ffn_hidden_size": 24,
    }
    return transformers.FalconForCausalLM(transformers.FalconConfig(**sizes, **config))


@pytest.mark.parametrize(
    ("build", "name"),
    [
        (wav2vec2, "wav2vec2.encoder.layers.0.attention.q_proj.weight"),  # states go through a weight norm
        (falcon, "transformer.h.0.self_attention.dense.weight"),  # keys are looked up by a number in the code
        (lambda: falcon(new_decoder_architecture=True, num_kv_heads=2), "transformer.h.0.self_attention.dense.weight"),
    ],
)
def test_heads_and_states_behind_what_is_normed_or_looked_up_are_free(build, name):
    model = build()
    assert check_symmetry(model) < 1e-9
    states, heads = find_axes(model).tensors[name][:: 1 if "dense" in name else -1]
    assert not find(states).fixed
    assert not next(leaves(heads)).fixed


class Picker(torch.nn.Linear):
    """Adds one entry of each row of a table, of a number that stands in the code or that it computes."""

    computes: bool

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        index = self.table[0].argmax()[None] if self.computes else torch.tensor([-1])
        return super().forward(states) + self.table[:, index].sum()


@pytest.mark.parametrize("computes", [False, True])
def test_an_index_of_the_code_is_a_slice_and_one_that_is_computed_keeps_all_in_place(computes):
    model = tiny.tiny_bert()
    model.classifier = Picker(16, 5)
    model.classifier.table, model.classifier.computes = torch.nn.Parameter(torch.randn(3, 6)), computes
    columns = find_axes(model).tensors["classifier.table"][1]
    sizes = [(leaf.size, leaf.fixed is None) for leaf in leaves(columns)]
    assert sizes == ([(6, False)] if computes else [(5, True), (1, True)])
