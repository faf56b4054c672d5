"""Layers are scored, and dropped, as a model that was built without them says."""

import copy
import itertools

import numpy as np
import pytest
import torch
from torch import nn
from transformers import BertModel

from hf_blockkd import check_routing, find_layer_stack, make_student
from hf_blockkd.data.calibration import batches_for
from hf_blockkd.students import layer_scores
from hf_blockkd.students.layer_scores import choose_layers, drop_order, layer_influence, output_change

from ..helpers import references
from ..helpers import tiny_models as tiny
from ..helpers.training import image_rows, text_rows, token_rows

DEEP = {"num_hidden_layers": 5}
LEARNERS = {
    "vit": lambda: (tiny.tiny_vit(**DEEP), image_rows(12)),
    "bert": lambda: (tiny.tiny_bert(**DEEP), text_rows(12)),
    "llama": lambda: (tiny.tiny_llama(**DEEP), token_rows(12)),
    "gpt2": lambda: (tiny.tiny_gpt2(num_hidden_layers=5), token_rows(12)),
    "regression": lambda: (tiny.tiny_bert(**DEEP, num_labels=1), text_rows(12)),
    "several labels": lambda: (
        tiny.tiny_bert(**DEEP, problem_type="multi_label_classification"),
        text_rows(12),
    ),
    "questions": lambda: (tiny.tiny_bert("QuestionAnswering", **DEEP), text_rows(12)),
    "no head": lambda: (BertModel(tiny.tiny_bert(**DEEP).config).eval(), text_rows(12)),
}


def measured(name):
    model, rows = LEARNERS[name]()
    return model, find_layer_stack(model), list(batches_for(model, rows))


def cut(model, kept):
    """A copy whose list of layers is shorter, where no layer knows its index."""
    model = copy.deepcopy(model)
    stack = find_layer_stack(model)
    parent, _, attribute = stack.path.rpartition(".")
    setattr(model.get_submodule(parent), attribute, nn.ModuleList(stack.layers[index] for index in kept))
    model.config.num_hidden_layers, model.config.use_cache = len(kept), False  # its layers know their places in one
    return model


def change(name, model, kept, batches):
    """In float64, once more: how far the outputs of the cut model are from the whole one's, summed over what counts."""
    total, short = 0.0, cut(model, kept)
    for batch in batches:
        with torch.no_grad():
            ours, theirs = short(**batch), model(**batch)
        names = ("start_logits", "end_logits") if name == "questions" else ("logits",)
        names = ("last_hidden_state",) if name == "no head" else names
        for output in names:
            a, b = (one[output].double().numpy() for one in (ours, theirs))
            if a.ndim == 3:
                real = batch["attention_mask"].bool().numpy()
                a, b = a[real], b[real]
            if name in ("regression", "no head"):
                total += ((a - b) ** 2).sum()
            elif name == "several labels":
                p, q = (1 / (1 + np.exp(-one)) for one in (b, a))
                total += (p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q))).sum()
            else:
                total += references.kl(references.softmax(b), references.softmax(a)).sum()
    return total


@pytest.mark.parametrize("name", LEARNERS)
def test_the_layers_that_go_are_those_without_which_a_shorter_model_answers_most_alike(name):
    model, stack, batches = measured(name)
    expected, kept = [], list(range(5))
    for _ in range(4):
        changes = {index: change(name, model, [one for one in kept if one != index], batches) for index in kept}
        expected.append(min(changes, key=changes.get))
        kept.remove(expected[-1])
    assert drop_order(model, stack, batches, 4) == expected


@pytest.mark.parametrize("name", LEARNERS)
def test_a_change_of_the_outputs_is_their_divergence_over_all_that_is_no_padding(name):
    model, _, batches = measured(name)
    short = cut(model, [0, 2, 3])
    with torch.no_grad():
        total = sum(output_change(model, batch, short(**batch), model(**batch)) for batch in batches)
    assert total == pytest.approx(change(name, model, [0, 2, 3], batches), rel=1e-3)
    with torch.no_grad():
        assert output_change(model, batches[0], model(**batches[0]), model(**batches[0])) == 0.0


def test_a_change_is_the_same_however_many_rows_are_compared_at_a_time(monkeypatch):
    model, _, batches = measured("llama")
    short = cut(model, [0, 2, 3])
    with torch.no_grad():
        outputs, clean = short(**batches[0]), model(**batches[0])
    whole = output_change(model, batches[0], outputs, clean)
    monkeypatch.setattr(layer_scores, "default_chunk_size", lambda *_: 5)
    assert output_change(model, batches[0], outputs, clean) == pytest.approx(whole, rel=1e-5)


def test_what_is_not_finite_is_infinitely_far_away():
    model, _, batches = measured("bert")
    with torch.no_grad():
        outputs, clean = model(**batches[0]), model(**batches[0])
    outputs.logits[0, 0] = torch.nan
    assert output_change(model, batches[0], outputs, clean) == float("inf")


@pytest.mark.parametrize("build", [tiny.tiny_t5, tiny.tiny_bart])
def test_logits_of_a_decoder_count_where_it_reads_something(build):
    model = build()
    (batch,) = batches_for(model, token_rows(8))
    with torch.no_grad():
        clean, outputs = model(**batch), model(**batch)
    real = batch["decoder_attention_mask"].bool()
    outputs.logits[~real] += torch.randn_like(outputs.logits[~real])
    assert output_change(model, batch, outputs, clean) == 0.0
    outputs.logits[real] += torch.randn_like(outputs.logits[real])
    assert output_change(model, batch, outputs, clean) > 0.0


@pytest.mark.parametrize("name", ["vit", "bert", "llama"])
def test_influence_is_one_minus_the_mean_cosine_of_all_positions_but_padding(name):
    model, stack, batches = measured(name)
    cosines = [[] for _ in range(5)]
    handles = [
        layer.register_forward_hook(lambda layer, args, output, into=into: into.append((args[0], output)))
        for layer, into in zip(stack.layers, cosines, strict=True)
    ]
    for batch in batches:
        with torch.no_grad():
            model(**batch)
    for handle in handles:
        handle.remove()
    for score, pairs in zip(layer_influence(model, stack, batches), cosines, strict=True):
        values = []
        for batch, (before, after) in zip(batches, pairs, strict=True):
            before, after = (one[0] if isinstance(one, tuple) else one for one in (before, after))
            before, after = before.double().numpy(), after.double().numpy()
            cosine = (before * after).sum(-1) / np.linalg.norm(before, axis=-1) / np.linalg.norm(after, axis=-1)
            values += cosine[batch["attention_mask"].bool()].tolist() if name != "vit" else cosine.ravel().tolist()
        assert score == pytest.approx(1 - np.mean(values), abs=1e-5)


def test_a_layer_that_does_nothing_goes_first_by_either_measure():
    for name, idle in itertools.product(("vit", "llama"), (0, 2, 4)):
        model, stack, batches = measured(name)
        with torch.no_grad():
            for weight in stack.layers[idle].parameters():
                weight.zero_()
        assert drop_order(model, stack, batches, 1) == [idle]
        assert layer_influence(model, stack, batches)[idle] == pytest.approx(0.0, abs=1e-6)


def test_after_the_first_round_only_those_that_were_missed_least_are_tried(monkeypatch):
    model, stack, batches = measured("vit")
    monkeypatch.setattr(layer_scores, "NUM_TRIED", 2)
    tried, changes_of = [], layer_scores._changes

    def spied(*args):
        tried.append(changes_of(*args))
        return tried[-1]

    monkeypatch.setattr(layer_scores, "_changes", spied)
    first, second, third = drop_order(model, stack, batches[:1], 3)
    least = sorted(tried[0], key=tried[0].get)
    assert (first, list(tried[0])) == (least[0], [0, 1, 2, 3, 4])
    assert set(tried[1]) == set(least[1:3])
    growth = dict(tried[0])
    growth |= {index: one - tried[0][first] for index, one in tried[1].items()}
    left = sorted(set(growth) - {first, second}, key=growth.get)
    assert set(tried[2]) == set(left[:2])
    assert (second, third) == (min(tried[1], key=tried[1].get), min(tried[2], key=tried[2].get))


def test_layers_that_change_the_shape_of_the_states_stay():
    model = tiny.tiny_swin(depths=[1, 1, 1], num_heads=[2, 2, 2], image_size=16)
    stack = find_layer_stack(model)
    images = [{"pixel_values": torch.randn(1, 16, 16)} for _ in range(8)]
    batches = list(batches_for(model, images))
    assert layer_influence(model, stack, batches)[:2] == [float("inf")] * 2
    assert drop_order(model, stack, batches, 1) == [2]
    for how in ("kl", "influence"):
        assert choose_layers(model, stack, 2, how, batches) == [0, 1]
        with pytest.raises(
            ValueError, match=r"`num_layers` is 1, but 2 of the 3 layers of SwinForImageClass.* keep more"
        ):
            choose_layers(model, stack, 1, how, batches)


@pytest.mark.parametrize(
    "build", [tiny.tiny_t5, tiny.tiny_deberta, tiny.tiny_qwen3, tiny.tiny_gemma3, tiny.tiny_albert]
)
def test_layers_that_hand_on_more_than_states_can_be_missing(build):
    model = build()
    stack = find_layer_stack(model)
    rows = token_rows(8) if model.get_output_embeddings() is not None else text_rows(8)
    batches = list(batches_for(model, rows))
    order = drop_order(model, stack, batches, len(stack) - 1)
    assert len(set(order)) == len(stack) - 1
    assert all(score < 2 for score in layer_influence(model, stack, batches))


def test_measuring_leaves_model_mode_and_random_state_as_they_were():
    model, stack, batches = measured("bert")
    model.train()
    before = [(name, dict(one._forward_hooks), vars(one).get("forward")) for name, one in model.named_modules()]
    state, use_cache = torch.get_rng_state(), model.config.use_cache
    drop_order(model, stack, batches, 2)
    layer_influence(model, stack, batches)
    assert model.training
    assert model.config.use_cache is use_cache
    assert torch.equal(torch.get_rng_state(), state)
    after = [(name, dict(one._forward_hooks), vars(one).get("forward")) for name, one in model.named_modules()]
    assert before == after
    assert check_routing(model).max_abs_error == 0.0


def test_layers_are_chosen_by_either_measure_on_the_first_examples():
    model, rows = tiny.tiny_llama(**DEEP), token_rows(80)
    stack = find_layer_stack(model)
    batches = list(batches_for(model, rows))
    read = batches[: layer_scores.NUM_EXAMPLES // 8]
    assert 0 < len(read) < len(batches)
    order = drop_order(model, stack, read, 3)
    assert choose_layers(model, stack, 2, "kl", iter(batches)) == sorted(set(range(5)) - set(order))
    influence = layer_influence(model, stack, read)
    assert choose_layers(model, stack, 2, "influence", iter(batches)) == sorted(np.argsort(influence)[-2:].tolist())
    for how in ("kl", "influence", "even", "outer"):
        assert choose_layers(model, stack, None, how) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("how", ["kl", "influence"])
def test_a_measure_without_data_is_refused(how):
    with pytest.raises(
        ValueError, match=f"`layers` is '{how}', which needs `data` to measure the layers on; give some"
    ):
        make_student(tiny.tiny_vit(), 2, layers=how)
