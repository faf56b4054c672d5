"""Forwards on the same inputs share their attention masks, to the bit, and look at values once."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AttentionMaskInterface, masking_utils

from hf_blockkd import find_layer_stack
from hf_blockkd.routing.dummy_inputs import dummy_inputs
from hf_blockkd.routing.masks import Masks

from ..helpers import tiny_models as tiny
from .test_entering import MODELS, TEXT, clean_run, padded_inputs, routed


class Reads(TorchDispatchMode):
    """Counts values that Python reads of tensors."""

    number = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.number += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def test_transformers_still_makes_its_masks_by_one_registry():
    assert isinstance(masking_utils.ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface)


@torch.no_grad()
def assert_stones_are_the_same_bits(model, inputs):
    model.eval()
    stack = find_layer_stack(model)
    masks = Masks(stack)
    with masks.shared():
        _, states, extras = clean_run(model, inputs)
    for depth in range(len(stack) + 1):
        expected = routed(model, inputs, depth, states[depth] * 1.5, extras)
        with masks.shared():
            assert torch.equal(routed(model, inputs, depth, states[depth] * 1.5, extras), expected)
    return masks


@pytest.mark.parametrize("name", MODELS)
def test_a_stone_under_the_masks_of_the_clean_pass_has_the_same_bits(name):
    model = MODELS[name]()
    assert_stones_are_the_same_bits(model, dummy_inputs(model))


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", TEXT)
def test_it_has_them_where_texts_are_padded(name, side):
    model = TEXT[name]()
    assert_stones_are_the_same_bits(model, padded_inputs(model, side))


@pytest.mark.parametrize("build", [tiny.tiny_bert, tiny.tiny_llama, tiny.tiny_gemma3, tiny.tiny_bart])
def test_values_are_looked_at_by_the_first_forward_alone(build):
    model = build().eval()
    inputs, masks = padded_inputs(model, "right"), Masks(find_layer_stack(model))

    def reads():
        with torch.no_grad(), Reads() as counted, masks.shared():
            model(**inputs)
        return counted.number

    assert reads() > 0
    assert reads() == 0


@torch.no_grad()
def test_a_batch_of_another_shape_gets_masks_of_its_own():
    model = tiny.tiny_llama().eval()
    inputs, masks = padded_inputs(model, "left"), Masks(find_layer_stack(model))
    second = {name: tensor[1:] for name, tensor in inputs.items()}
    expected = model(**second).logits
    for one in (inputs, second):
        with masks.shared():
            logits = model(**one).logits
    assert torch.equal(logits, expected)


@torch.no_grad()
def test_what_a_model_writes_into_its_mask_is_not_written_twice():
    model = tiny.tiny_llama(attn_implementation="eager").eval()
    inputs, masks = padded_inputs(model, "left"), Masks(find_layer_stack(model))
    for _ in range(2):
        with masks.shared():
            mask = masking_utils.create_causal_mask(
                model.config, model.get_input_embeddings()(inputs["input_ids"]), inputs["attention_mask"], None
            )
        mask += 1
        assert mask.max() == 1


def test_the_registry_is_left_as_it_was(monkeypatch):
    registry, own = masking_utils.ALL_MASK_ATTENTION_FUNCTIONS, masking_utils.sdpa_mask
    monkeypatch.setitem(registry, "eager", own)
    before = dict(registry)
    with pytest.raises(KeyError, match="mine"), Masks(find_layer_stack(tiny.tiny_bert())).shared():
        raise KeyError("mine")
    assert dict(registry) == before
    # A function that is registered for all afterwards is not hidden by one of before.
    monkeypatch.setitem(AttentionMaskInterface._global_mapping, "sdpa", masking_utils.eager_mask)
    assert registry["sdpa"] is masking_utils.eager_mask


@torch.no_grad()
def test_without_a_registry_every_forward_makes_its_own(monkeypatch):
    monkeypatch.setattr("hf_blockkd.routing.masks.REGISTRY", {})
    model = tiny.tiny_bert().eval()
    masks = Masks(find_layer_stack(model))
    with masks.shared():
        model(**padded_inputs(model, "left"))
    assert not masks.made


@torch.inference_mode()
def test_masks_that_count_no_writes_are_shared_too():
    assert assert_stones_are_the_same_bits(tiny.tiny_llama(), padded_inputs(tiny.tiny_llama(), "left")).made
