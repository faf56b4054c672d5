"""Linear maps of cut students, fitted to what their teachers write."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from hf_blockkd import find_layer_stack, make_student
from hf_blockkd.data.calibration import batches_for
from hf_blockkd.routing.dummy_inputs import dummy_inputs
from hf_blockkd.students.refitting import _Fit, refit

from ..helpers import tiny_models as tiny

FAMILIES = {
    "vit": tiny.tiny_vit,
    "bert": tiny.tiny_bert,
    "llama": lambda: tiny.tiny_llama(num_attention_heads=4, num_key_value_heads=2, head_dim=4),
    "gpt2": tiny.tiny_gpt2,
    "mixtral": tiny.tiny_mixtral,
    "t5": tiny.tiny_t5,
    "bart": tiny.tiny_bart,
    "xlnet": tiny.tiny_xlnet,
    "fsmt": tiny.tiny_fsmt,
    "gpt2 that classifies": lambda: tiny.tiny_gpt2("SequenceClassification"),
    "resnet": tiny.tiny_resnet,
    "falcon": lambda: tiny.build("Falcon", "CausalLM", tiny.TEXT, {}),  # maps of a class of their own
}
NARROW = {
    "resnet": {"hidden_sizes": [2, 4], "embedding_size": 2},
    "xlnet": {"num_layers": 2, "d_inner": 12},  # no head of it can go
}


def rows_for(model: PreTrainedModel, number: int = 64, seed: int = 0) -> list[dict[str, torch.Tensor]]:
    """Rows that all differ, unlike dummy inputs of a size that grow out of each other."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for row in ({name: value[0] for name, value in dummy_inputs(model).items()} for _ in range(number)):
        for name, value in row.items():
            if value.is_floating_point():
                row[name] = torch.rand(value.shape, generator=generator) * 2 - 1
            elif "mask" not in name:
                row[name] = torch.randint(3, tiny.VOCABULARY, value.shape, generator=generator)
        rows.append(row)
    return rows


@torch.no_grad()
def states_behind(
    model: PreTrainedModel, indices: list[int], rows: list[dict[str, torch.Tensor]]
) -> list[torch.Tensor]:
    """What leaves some layers, seen by hooks."""
    found: dict[int, torch.Tensor] = {}

    def keep(index: int, output: torch.Tensor | tuple) -> None:
        found[index] = output[0] if isinstance(output, tuple) else output

    layers = find_layer_stack(model).layers
    handles = [layers[i].register_forward_hook(lambda module, args, output, i=i: keep(i, output)) for i in set(indices)]
    model(**{name: torch.stack([row[name] for row in rows]) for name in rows[0]})
    for handle in handles:
        handle.remove()
    return [found[i] for i in indices]


def distance(teacher: PreTrainedModel, student: PreTrainedModel, rows: list[dict[str, torch.Tensor]]) -> float:
    """Of a student's states at the ends of its layers from those the teacher has by then, as shares of these."""
    chosen = student.cut.layers
    ends = [*(index - 1 for index in chosen[1:]), student.cut.depth - 1]
    ours = states_behind(student, list(range(len(chosen))), rows)
    theirs = states_behind(teacher, ends, rows)
    if student.cut.channels is not None:
        theirs = [states[..., student.cut.channels] for states in theirs]
    return sum(((a - b).square().sum() / b.square().sum()).item() for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("sizes", [{"hidden_size": 8}, {"num_layers": 2}, {"num_layers": 2, "hidden_size": 8}])
@pytest.mark.parametrize("family", ["vit", "bert", "llama", "gpt2"])
def test_states_come_nearer_to_the_teachers_on_rows_that_were_not_seen(family, sizes):
    teacher = FAMILIES[family]()
    data, other = rows_for(teacher, 128), rows_for(teacher, 32, seed=1)
    fitted, cut = (make_student(teacher, **sizes, data=data, fit=fit) for fit in (True, False))
    assert fitted.cut == cut.cut
    assert distance(teacher, fitted, other) < 0.9 * distance(teacher, cut, other)


@pytest.mark.parametrize("number", [8, 5], ids=["as many rows as steps", "fewer"])
@pytest.mark.parametrize("family", ["xlnet", "fsmt"])
def test_layers_that_take_steps_first_come_nearer_to_the_teachers_states(family, number, monkeypatch):
    asked = []
    monkeypatch.setattr(_Fit, "to_what_the_teachers_write", lambda fit, group: asked.append((fit.index, group)))
    teacher = FAMILIES[family]()
    data, other = rows_for(teacher, 128), rows_for(teacher, 32, seed=1)
    cut = make_student(teacher, num_layers=2, data=data, fit=False)
    fitted = copy.deepcopy(cut)
    batches = [{name: torch.stack([row[name] for row in data[i : i + number]]) for name in data[0]} for i in (0, 64)]
    refit(teacher, fitted, (find_layer_stack(teacher), find_layer_stack(fitted)), cut.cut.layers, None, batches)
    assert distance(teacher, fitted, other) < 0.9 * distance(teacher, cut, other)
    # The last map of each layer was fitted to the states.
    ends = {"xlnet": "transformer.layer.{}.ff.layer_2", "fsmt": "model.decoder.layers.{}.fc2"}[family]
    assert not {ends.format(index) for index in range(2)} & {name for _, group in asked for name in group}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_kind_of_model_is_fitted(family):
    teacher = FAMILIES[family]()
    sizes = NARROW.get(family, {"num_layers": 2, "hidden_size": 8})
    data = rows_for(teacher, 32)
    fitted, cut = (make_student(teacher, **sizes, data=data, fit=fit) for fit in (True, False))
    with torch.no_grad():
        assert fitted(**dummy_inputs(fitted)).logits.isfinite().all()
    changed = [name for name, value in fitted.state_dict().items() if not torch.equal(value, cut.state_dict()[name])]
    maps = {name for name, module in fitted.named_modules() if isinstance(module, (nn.Linear, Conv1D))}
    assert changed
    assert all(name.rpartition(".")[0] in maps for name in changed)


def test_a_linear_map_is_known_by_what_it_computes():
    """Some of transformers' models have a class of linear maps with a forward of its own."""

    class Own(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x @ self.weight.T + self.bias

    class Bent(Own):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x).relu()

    teacher = tiny.tiny_bert()
    data = rows_for(teacher, 32)
    changed = {}
    for kind in (nn.Linear, Own, Bent):
        for layer in teacher.bert.encoder.layer:
            layer.intermediate.dense.__class__ = kind
        student = make_student(teacher, num_layers=2, fit=False)
        for layer in student.bert.encoder.layer:
            layer.intermediate.dense.__class__ = kind
        before = copy.deepcopy(student.state_dict())
        stacks = find_layer_stack(teacher), find_layer_stack(student)
        refit(teacher, student, stacks, student.cut.layers, None, batches_for(teacher, data))
        after = student.state_dict()
        changed[kind] = {name: value for name, value in after.items() if not torch.equal(value, before[name])}
    assert changed[Own].keys() == changed[nn.Linear].keys()
    assert all(torch.allclose(value, changed[nn.Linear][name], atol=1e-4) for name, value in changed[Own].items())
    assert changed[Own].keys() - changed[Bent].keys() == {
        f"bert.encoder.layer.1.intermediate.dense.{name}" for name in ("weight", "bias")
    }


def test_what_neurons_that_are_left_out_repeat_is_taken_over():
    """Each neuron that is left out is a copy of one that stays, which only has to write for both."""
    teacher = tiny.tiny_vit(num_hidden_layers=1)
    mlp = teacher.vit.layers[0].mlp
    with torch.no_grad():
        mlp.fc1.weight[12:], mlp.fc1.bias[12:] = mlp.fc1.weight[:12], mlp.fc1.bias[:12]
        mlp.fc2.weight[:, 12:] *= 0.05  # so that these are the ones that go
    own = mlp.fc2.weight.clone()
    data = rows_for(teacher, 256)
    student = make_student(teacher, intermediate_size=12, data=data)
    (kept,) = (axis["kept"] for axis in student.cut.axes)
    assert sorted(index % 12 for index in kept) == list(range(12))
    wanted = own[:, [index % 12 for index in kept]] + own[:, [index % 12 + 12 for index in kept]]
    fitted = student.vit.layers[0].mlp.fc2.weight
    assert (fitted - wanted).norm() < 0.1 * (own[:, kept] - wanted).norm()


def test_a_copy_of_the_teacher_stays_as_it_is():
    teacher = tiny.tiny_bert()
    student = copy.deepcopy(teacher)
    batches = list(batches_for(teacher, rows_for(teacher)))
    refit(teacher, student, (find_layer_stack(teacher), find_layer_stack(student)), [0, 1, 2], None, batches)
    assert all(torch.equal(value, teacher.state_dict()[name]) for name, value in student.state_dict().items())


def test_a_map_that_is_the_embedding_too_stays_as_it_was_cut():
    teacher = tiny.tiny_gpt2()
    fitted, cut = (make_student(teacher, 2, hidden_size=8, data=rows_for(teacher), fit=fit) for fit in (True, False))
    assert fitted.lm_head.weight is fitted.transformer.wte.weight
    assert torch.equal(fitted.lm_head.weight, cut.lm_head.weight)


@pytest.mark.parametrize("family", ["bert", "llama", "gpt2", "bart"])
def test_nothing_hangs_on_what_stands_in_padding(family):
    teacher = FAMILIES[family]()
    students = []
    for padding in (5, 9):
        rows = rows_for(teacher)
        for number, row in enumerate(rows):
            length = 5 + number % 3
            names = [name for name in row if name.endswith("input_ids")]
            for name in names:
                row[name][length:] = padding
                row[name.replace("input_ids", "attention_mask")] = (torch.arange(8) < length).long()
        students.append(make_student(teacher, 2, hidden_size=8, data=rows))
    ours, other = students
    assert ours.cut == other.cut
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in ours.state_dict().items())


def test_neither_the_teacher_nor_a_random_state_changes():
    teacher = tiny.tiny_llama(attention_dropout=0.5).train()
    student = make_student(teacher, 2)
    before, batches = copy.deepcopy(teacher.state_dict()), list(batches_for(teacher, rows_for(teacher)))
    state = torch.random.get_rng_state()
    refit(teacher, student, (find_layer_stack(teacher), find_layer_stack(student)), [0, 2], None, batches)
    assert torch.equal(state, torch.random.get_rng_state())
    assert all(torch.equal(before[name], value) for name, value in teacher.state_dict().items())
    for model in (teacher, student):
        assert model.training
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_the_same_data_makes_the_same_student():
    teacher = tiny.tiny_vit()
    ours, again = (make_student(teacher, 2, hidden_size=8, data=rows_for(teacher)) for _ in range(2))
    assert ours.cut == again.cut
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in ours.state_dict().items())


def test_a_student_through_which_nothing_is_routed_is_cut_alone(caplog):
    teacher = tiny.build("SqueezeBert", "SequenceClassification", {**tiny.TEXT, "embedding_size": 16}, {})
    with caplog.at_level("WARNING", logger="hf_blockkd"):
        fitted, cut = (
            make_student(teacher, intermediate_size=12, data=rows_for(teacher), fit=fit) for fit in (True, False)
        )
    assert caplog.text.count("Nothing of the student is fitted to what the teacher computes. SqueezeBertForSeq") == 1
    assert all(torch.equal(value, cut.state_dict()[name]) for name, value in fitted.state_dict().items())


@pytest.mark.parametrize(
    ("build", "sizes"),
    [(lambda: tiny.tiny_stages("PvtV2"), [4, 6, 8, 10]), (tiny.tiny_segformer, [4, 4, 8, 8])],
    ids=["pvt v2", "segformer, of more channels than a map is wide"],
)
def test_states_with_channels_first_are_left_to_what_maps_write(build, sizes):
    """States are images (B, C, H, W), but the last map of a stage writes (B, T, C)."""
    teacher = build()
    sizes = {"hidden_sizes": sizes}
    data = rows_for(teacher, 16)
    fitted, cut = (make_student(teacher, **sizes, data=data, fit=fit) for fit in (True, False))
    assert not all(torch.equal(value, cut.state_dict()[name]) for name, value in fitted.state_dict().items())
    with torch.no_grad():
        assert fitted(**dummy_inputs(fitted)).logits.isfinite().all()


def test_a_map_that_the_teachers_layer_has_not_is_fitted_to_the_states_alone():
    """DeepSeek's first layers are dense wherever they come from; the student's second one here was of experts."""
    sizes = {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "kv_lora_rank": 8}
    heads = {"q_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8, "num_key_value_heads": 2}
    experts = {"first_k_dense_replace": 2, "moe_intermediate_size": 8, "n_shared_experts": 1}
    fields = {**tiny.TEXT, **sizes, **heads, **experts}
    teacher = tiny.scrambled(transformers.DeepseekV3ForCausalLM(transformers.DeepseekV3Config(**fields))).eval()
    data, other = rows_for(teacher), rows_for(teacher, 32, seed=1)
    students = []
    for fit in (True, False):
        torch.manual_seed(0)  # what is new begins alike
        students.append(make_student(teacher, layers=[0, 2], data=data, fit=fit))
    fitted, cut = students
    ours, before = (model.model.layers[1].mlp for model in students)
    assert torch.equal(ours.gate_proj.weight, before.gate_proj.weight)
    assert not torch.equal(ours.down_proj.weight, before.down_proj.weight)
    assert distance(teacher, fitted, other) < distance(teacher, cut, other)


def test_maps_of_which_nothing_is_kept_begin_anew(caplog):
    """The head of ELECTRA's generator writes into its embeddings, which keep their width."""
    config = transformers.ElectraConfig(**tiny.TEXT, embedding_size=tiny.WIDTH)
    teacher = tiny.scrambled(transformers.ElectraForMaskedLM(config)).eval()
    with caplog.at_level("WARNING", logger="hf_blockkd"):
        student = make_student(teacher, 2, hidden_size=8, data=rows_for(teacher))
    assert "are newly initialised, e.g. electra.embeddings_project.weight" in caplog.text
    assert student.generator_predictions.dense.weight.shape == (tiny.WIDTH, 8)


def test_a_student_of_other_patches_is_fitted_where_both_have_the_same_positions():
    teacher = tiny.tiny_vit(patch_size=4)
    torch.manual_seed(0)
    cut = make_student(teacher, 2, hidden_size=8, patch_size=2, data=rows_for(teacher), fit=False)
    torch.manual_seed(0)  # what is new begins alike
    fitted = make_student(teacher, 2, hidden_size=8, patch_size=2, data=rows_for(teacher))
    changed = {name for name, value in fitted.state_dict().items() if not torch.equal(value, cut.state_dict()[name])}
    assert changed == {"classifier.weight", "classifier.bias"}


def test_a_fit_inside_autocast_is_that_of_the_weights_as_they_become():
    """Autocast keeps casts of weights for as long as its context lasts; stale ones would be corrected twice."""
    teacher = tiny.scrambled(tiny.tiny_llama(hidden_size=32, num_attention_heads=4, num_key_value_heads=2, head_dim=8))
    rows = rows_for(teacher)
    plain = make_student(teacher.eval(), num_layers=2, hidden_size=16, data=rows)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = make_student(teacher, num_layers=2, hidden_size=16, data=rows)
    batch = dummy_inputs(teacher)
    with torch.no_grad():
        clean = teacher(**batch).logits
        errors = [(student(**batch).logits - clean).square().mean().item() for student in (plain, mixed)]
    assert errors[1] < 1.2 * errors[0]
