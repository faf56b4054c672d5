"""Students that are cut in width hold the right parts of their teachers' tensors.

The reference is written from the inside out: a narrow model is widened by hand, with channels that only repeat others,
and with heads and neurons that nothing reads. Cut to the narrow model's sizes, the wide one must give it back.
"""

from __future__ import annotations

import copy
import re
import zlib
from collections.abc import Callable, Sequence

import pytest
import torch
import transformers
from accelerate import cpu_offload
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForImageClassification, PreTrainedModel, default_data_collator

from hf_blockkd import UnsupportedArchitectureError, make_student
from hf_blockkd.axes.following import find_axes
from hf_blockkd.axes.rules import RULES
from hf_blockkd.data.calibration import batches_for
from hf_blockkd.models.cut import Cut
from hf_blockkd.routing.dummy_inputs import dummy_inputs
from hf_blockkd.students.likeness import distance, likeness

from ..helpers import tiny_models as tiny
from .test_config_changes import tiny_llava


def tiny_phi3(**config: int) -> PreTrainedModel:
    return tiny.build("Phi3", "CausalLM", {**tiny.DECODER, "head_dim": 4, "num_attention_heads": 4}, config)


# ---- How each dimension of a narrow model's tensor is widened, by hand ----
#
# A dimension is spelled as one or more parts with a "+" between, each of a role and what it is for one of it:
#   w  states that are written: other channels repeat those that there are, so that norms see what they saw
#   r  states that are read: nothing reads the other channels
#   H4 four entries for each head, of which others are made (h4: read)
#   N  neurons, of which others are made (n: read)
#   .  as it is

HEADS = 4
FAMILIES: dict[str, tuple[Callable[..., PreTrainedModel], dict, dict, dict[str, tuple[str, ...]]]] = {
    "vit": (
        tiny.tiny_vit,
        {"hidden_size": 16, "num_attention_heads": 4},
        {"hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 12},
        {
            r"cls_token|position_embeddings": (".", ".", "w"),
            r"projection.weight": ("w", ".", ".", "."),
            r"[qkv]_proj.weight": ("H4", "r"),
            r"[qkv]_proj.bias": ("H4",),
            r"o_proj.weight": ("w", "h4"),
            r"fc1.weight": ("N", "r"),
            r"fc1.bias": ("N",),
            r"fc2.weight": ("w", "n"),
            r"classifier.weight": (".", "r"),
            r"classifier.bias": (".",),
            r"": ("w",),
        },
    ),
    "bert": (
        tiny.tiny_bert,
        {"hidden_size": 16, "num_attention_heads": 4},
        {"hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 12},
        {
            r"embeddings.weight": (".", "w"),
            r"(query|key|value).weight": ("H4", "r"),
            r"(query|key|value).bias": ("H4",),
            r"attention.output.dense.weight": ("w", "h4"),
            r"intermediate.dense.weight": ("N", "r"),
            r"intermediate.dense.bias": ("N",),
            r"output.dense.weight": ("w", "n"),
            r"pooler.dense.weight": ("N", "r"),
            r"pooler.dense.bias": ("N",),
            r"classifier.weight": (".", "n"),
            r"classifier.bias": (".",),
            r"": ("w",),
        },
    ),
    "llama": (
        tiny.tiny_llama,
        {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 4},
        {"hidden_size": 8, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 4, "intermediate_size": 12},
        {
            r"embed_tokens": (".", "w"),
            r"q_proj": ("H8", "r"),  # both queries of a group
            r"[kv]_proj": ("H4", "r"),
            r"o_proj": ("w", "h8"),
            r"(gate|up)_proj": ("N", "r"),
            r"down_proj": ("w", "n"),
            r"lm_head": (".", "r"),
            r"": ("w",),
        },
    ),
    "phi3": (
        tiny_phi3,
        {"num_key_value_heads": 2},
        {"hidden_size": 8, "num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 12},
        {
            r"embed_tokens": (".", "w"),
            r"qkv_proj": ("H8+H4+H4", "r"),
            r"o_proj": ("w", "h8"),
            r"gate_up_proj": ("N+N", "r"),
            r"down_proj": ("w", "n"),
            r"lm_head": (".", "r"),
            r"": ("w",),
        },
    ),
    "gpt2": (
        tiny.tiny_gpt2,
        {"n_head": 4, "n_inner": 24, "tie_word_embeddings": False},
        {"n_embd": 8, "n_head": 2, "n_inner": 12, "tie_word_embeddings": False},
        {
            r"wte|wpe": (".", "w"),
            r"c_attn.weight": ("r", "H4+H4+H4"),
            r"c_attn.bias": ("H4+H4+H4",),
            r"attn.c_proj.weight": ("h4", "w"),
            r"c_fc.weight": ("r", "N"),
            r"c_fc.bias": ("N",),
            r"mlp.c_proj.weight": ("n", "w"),
            r"lm_head": (".", "r"),
            r"": ("w",),
        },
    ),
    "t5": (
        tiny.tiny_t5,
        {"num_heads": 4, "d_kv": 4},
        {"d_model": 8, "num_heads": 2, "d_kv": 4, "d_ff": 12},
        {
            r"shared|embed_tokens|lm_head": (".", "w"),
            r"Attention.[qkv]": ("H4", "r"),
            r"Attention.o": ("w", "h4"),
            r"relative_attention_bias": (".", "H1"),
            r"wi": ("N", "r"),
            r"wo": ("w", "n"),
            r"": ("w",),
        },
    ),
    "resnet": (
        tiny.tiny_resnet,
        {},
        {"embedding_size": 2, "hidden_sizes": [2, 4]},
        {
            r"embedder.*convolution": ("S", ".", ".", "."),
            r"shortcut.convolution": ("S", "s", ".", "."),
            r"layer.0.convolution": ("N", "s", ".", "."),
            r"layer.1.convolution": ("S", "n", ".", "."),
            r"layer.0.normalization": ("N",),
            r"classifier.1.weight": (".", "s"),
            r"classifier.1.bias": (".",),
            r"": ("S",),
        },
    ),
}


def kept_of(role: str, name: str, wide: int, narrow: int) -> list[int]:
    """Which entries stay: others in each layer, but the same ones in all tensors that share a dimension."""
    layer = "".join(re.findall(r"\.\d+\.", name)[:1])
    shared = {"w": "states", "n": f"neurons {layer} {'pooler' in name or 'classifier' in name}", "h": f"heads {layer}"}
    if "Attention" in name:  # all layers of T5 add the same biases
        shared["h"] = f"heads {name.split('.')[0]} {'EncDec' in name}"
    if role == "s":
        # The states of ResNet's first stage are those of its embedder, whose channels a shortcut adds.
        reads_first = re.search(r"embedder|stages.0|stages.1.layers.0.(shortcut|layer.0).convolution", name)
        shared["s"] = f"stage {'0' if reads_first and wide == 4 else '1'}"
    key = {"r": "w"}.get(role, role)
    generator = torch.Generator().manual_seed(zlib.crc32(shared[key].encode()))
    return torch.randperm(wide, generator=generator)[:narrow].sort().values.tolist()


def widened(
    name: str, narrow: torch.Tensor, shape: Sequence[int], spelling: Sequence[str], noise: bool
) -> torch.Tensor:
    # What nothing reads comes last: it is zero, whatever else a row or a column is.
    dims = sorted(range(len(shape)), key=lambda dim: (spelling[dim] in "rhns" or spelling[dim][0] in "h", dim))
    for dim in dims:
        spelled, size = spelling[dim], shape[dim]
        if spelled == ".":
            continue
        parts = spelled.split("+")
        weights = [int(part[1:] or 1) for part in parts]
        made = []
        for part, weight, own in zip(
            parts, weights, narrow.split([narrow.shape[dim] * one // sum(weights) for one in weights], dim), strict=True
        ):
            role, whole = part[0].lower(), size * weight // sum(weights)
            units, few = whole // weight, own.shape[dim] // weight
            kept = kept_of(role, name, units, few)
            others = [unit for unit in range(units) if unit not in kept]
            entries = [[unit * weight + i for unit in some for i in range(weight)] for some in (kept, others)]
            rest = own if part == "w" else torch.zeros_like(own)
            if noise and part[0].isupper():
                rest = torch.rand_like(own) + 0.5  # variances among them
            out = own.new_zeros([whole if d == dim else n for d, n in enumerate(own.shape)])
            out.index_copy_(dim, torch.tensor(entries[0]), own)
            made.append(out.index_copy_(dim, torch.tensor(entries[1]), rest))
        narrow = torch.cat(made, dim)
    return narrow


def narrow_and_wide(family: str, noise: bool) -> tuple[PreTrainedModel, PreTrainedModel]:
    build, wide_sizes, narrow_sizes, spellings = FAMILIES[family]
    narrow, wide = build(**narrow_sizes), build(**wide_sizes)
    own = narrow.state_dict()
    tensors = {}
    for name, tensor in own.items():
        if re.search(r"layer.0.normalization.(weight|bias)", name):  # no channel that is never anything but zero
            tensor.fill_(0.01 if name.endswith("weight") else 1.0)
    for name, tensor in wide.state_dict().items():
        if tensor.is_floating_point():
            spelling = next(spelling for pattern, spelling in spellings.items() if re.search(pattern, name))
            tensors[name] = widened(name, own[name], tensor.shape, spelling, noise)
    wide.load_state_dict(tensors, strict=False)
    return narrow, wide


def rows_for(model: PreTrainedModel, number: int = 12) -> list[dict[str, torch.Tensor]]:
    inputs = dummy_inputs(model, number)
    return [{name: value[i] for name, value in inputs.items()} for i in range(number)]


@torch.no_grad()
def logits_of(model: PreTrainedModel, **inputs: torch.Tensor) -> torch.Tensor:
    return model(**(inputs or dummy_inputs(model))).logits


def sizes_of(family: str) -> dict:
    sizes = {**FAMILIES[family][2]}
    return {"hidden_size": 8} if "hidden_sizes" not in sizes else sizes


@pytest.mark.parametrize("channels", ["weights", "activations"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_teacher_that_was_widened_by_hand_is_cut_to_what_it_was(family, channels):
    narrow, wide = narrow_and_wide(family, noise=channels == "activations")
    data = rows_for(wide) if channels == "activations" else None
    student = make_student(wide, **sizes_of(family), channels=channels, data=data, fit=False)
    ours, wanted = student.state_dict(), narrow.state_dict()
    assert ours.keys() == wanted.keys()
    assert [name for name in wanted if not torch.equal(ours[name], wanted[name])] == []
    own = logits_of(
        student.double(), **{k: v.double() if v.is_floating_point() else v for k, v in dummy_inputs(student).items()}
    )
    theirs = logits_of(
        wide.double(), **{k: v.double() if v.is_floating_point() else v for k, v in dummy_inputs(wide).items()}
    )
    if family == "t5":
        own *= 2**0.5  # its head reads each channel and the one that repeats it, over the root of the width
    assert (own - theirs).abs().max() < 1e-6 * theirs.abs().max()


def test_parts_of_a_decoder_are_what_indexing_by_hand_takes():
    teacher = tiny.tiny_llama(num_attention_heads=4, num_key_value_heads=2, head_dim=4)
    student = make_student(teacher, layers=[0, 2], hidden_size=8, data=rows_for(teacher), fit=False)
    cut = {(axis["tensor"], axis["dim"]): axis["kept"] for axis in student.cut.axes}
    channels = student.cut.channels
    assert channels == cut["model.embed_tokens.weight", 1]
    for ours, theirs in zip(student.model.layers, (teacher.model.layers[i] for i in (0, 2)), strict=True):
        (neurons,) = (
            kept
            for kept in cut.values()
            if torch.equal(theirs.mlp.up_proj.weight[kept][:, channels], ours.mlp.up_proj.weight)
        )
        assert torch.equal(ours.mlp.down_proj.weight, theirs.mlp.down_proj.weight[channels][:, neurons])
        keys = theirs.self_attn.k_proj.weight[:, channels].split(4)
        (group,) = (i for i in range(2) if torch.equal(ours.self_attn.k_proj.weight, keys[i]))
        queries = theirs.self_attn.q_proj.weight[:, channels].split(8)
        assert torch.equal(ours.self_attn.q_proj.weight, queries[group])
        outputs = theirs.self_attn.o_proj.weight[channels].split(8, dim=1)
        assert torch.equal(ours.self_attn.o_proj.weight, outputs[group])
        assert torch.equal(ours.input_layernorm.weight, theirs.input_layernorm.weight[channels])
    assert torch.equal(student.lm_head.weight, teacher.lm_head.weight[:, channels])


def test_what_is_kept_of_a_tied_embedding_stays_tied():
    teacher = tiny.tiny_gpt2()
    student = make_student(teacher, hidden_size=8, data=rows_for(teacher), fit=False)
    assert student.lm_head.weight is student.transformer.wte.weight
    assert torch.equal(student.lm_head.weight, teacher.lm_head.weight[:, student.cut.channels])


def test_inner_widths_alone_leave_the_states_as_they_are():
    teacher = tiny.tiny_vit()
    student = make_student(teacher, intermediate_size=12, channels="weights")
    assert student.cut.channels is None
    kept = {axis["tensor"]: axis["kept"] for axis in student.cut.axes}
    assert len(kept) == tiny.LAYERS
    for index, (ours, theirs) in enumerate(zip(student.vit.layers, teacher.vit.layers, strict=True)):
        neurons = kept[f"vit.layers.{index}.mlp.fc1.weight"]
        assert torch.equal(ours.mlp.fc1.weight, theirs.mlp.fc1.weight[neurons])
        assert torch.equal(ours.mlp.fc2.weight, theirs.mlp.fc2.weight[:, neurons])
        assert torch.equal(ours.attention.q_proj.weight, theirs.attention.q_proj.weight)


def test_other_layers_and_channels_are_told_by_the_cut(tmp_path):
    teacher = tiny.tiny_bert()
    student = make_student(teacher, layers=[0, 2], hidden_size=8, data=rows_for(teacher))
    student.cut.save(tmp_path)
    assert Cut.load(tmp_path) == student.cut
    assert (student.cut.layers, student.cut.depth, len(student.cut.channels)) == ([0, 2], 3, 8)
    sizes = [(axis["size"], len(axis["kept"]), len(axis["scores"])) for axis in student.cut.axes]
    # The states, the pooler, and heads and neurons of two layers.
    assert sorted(sizes) == sorted([(16, 8, 16)] * 2 + [(2, 1, 2), (24, 12, 24)] * 2)
    for axis in student.cut.axes:
        least = min(axis["scores"][i] for i in axis["kept"])
        assert all(score <= least for i, score in enumerate(axis["scores"]) if i not in axis["kept"])


def test_a_cut_in_depth_alone_is_told_too():
    cut = make_student(tiny.tiny_bert(), 2).cut
    assert cut == Cut([0, 2], 3)


@pytest.mark.parametrize(
    ("build", "model_class"),
    [
        (tiny.tiny_vit, AutoModelForImageClassification),
        (
            lambda: tiny.tiny_llama(num_attention_heads=4, num_key_value_heads=2, head_dim=4),
            transformers.AutoModelForCausalLM,
        ),
        (tiny.tiny_t5, transformers.AutoModelForSeq2SeqLM),
    ],
)
def test_a_narrow_student_is_loaded_whole(build, model_class, tmp_path):
    teacher = build()
    student = make_student(teacher, 2, hidden_size=8, data=rows_for(teacher))
    student.save_pretrained(tmp_path)
    loaded, info = model_class.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert torch.equal(logits_of(loaded), logits_of(student))


def test_adapters_are_merged_before_the_cut():
    base = tiny.tiny_llama()
    adapted = get_peft_model(
        copy.deepcopy(base), LoraConfig(target_modules=["up_proj"], init_lora_weights=False)
    ).eval()
    merged = copy.deepcopy(adapted).merge_and_unload()
    data = rows_for(base)
    ours, wanted = (make_student(teacher, 2, hidden_size=8, data=data) for teacher in (adapted, merged))
    assert ours.cut == wanted.cut
    assert all(torch.equal(value, wanted.state_dict()[name]) for name, value in ours.state_dict().items())
    assert not torch.equal(
        ours.model.layers[0].mlp.up_proj.weight,
        make_student(base, 2, hidden_size=8, data=data).model.layers[0].mlp.up_proj.weight,
    )


def test_an_offloaded_teacher_gives_the_student_that_one_in_place_gives():
    teacher = tiny.tiny_llama()
    data = rows_for(teacher)
    wanted = make_student(teacher, 2, hidden_size=8, data=data)
    cpu_offload(teacher, execution_device="cpu")
    ours = make_student(teacher, 2, hidden_size=8, data=data)
    assert ours.cut == wanted.cut
    for name, value in ours.state_dict().items():
        assert torch.allclose(value, wanted.state_dict()[name], atol=1e-6), name


@pytest.mark.parametrize("build", [tiny.tiny_vit, tiny.tiny_llama])
def test_a_teacher_in_half_precision_is_cut_and_fitted(build):
    teacher = build().to(torch.bfloat16)
    student = make_student(teacher, 2, hidden_size=8, data=rows_for(teacher))
    assert {own.dtype for own in student.parameters()} == {torch.bfloat16}
    assert logits_of(student).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_student_may_be_in_another_dtype_than_a_teacher_that_takes_images_in_its_own(dtype):
    teacher = tiny.tiny_resnet().to(dtype)
    data = rows_for(teacher, number=16)
    student = make_student(teacher, hidden_sizes=[2, 4], embedding_size=2, dtype=torch.float32, data=data)
    assert {own.dtype for own in student.parameters()} == {torch.float32}
    assert logits_of(student).isfinite().all()
    assert distance(teacher, student, batches_for(teacher, data)) < float("inf")
    assert likeness(student, teacher, data, default_data_collator)["kl"] < float("inf")


def test_a_teacher_of_which_nothing_changes_but_what_is_asked_of_it():
    teacher = tiny.tiny_bert().train()
    before, config = copy.deepcopy(teacher.state_dict()), teacher.config.to_dict()
    make_student(teacher, 2, hidden_size=8, data=rows_for(teacher), channels="activations")
    assert teacher.training
    assert teacher.config.to_dict() == config
    assert all(torch.equal(before[name], value) for name, value in teacher.state_dict().items())
    assert torch.get_default_dtype() == torch.float32


def test_entries_of_layers_that_go_go_with_them(caplog):
    """Gemma 3n and 4 have one table with a part for each layer."""
    sizes = {"num_hidden_layers": 4, "hidden_size_per_layer_input": 4, "vocab_size_per_layer_input": 64}
    kinds = {"layer_types": ["sliding_attention", "full_attention"] * 2, "global_head_dim": 8}
    config = transformers.Gemma4TextConfig(**{**tiny.DECODER, **sizes, **kinds})
    teacher = tiny.scrambled(transformers.Gemma4ForCausalLM(config)).eval()
    with caplog.at_level("WARNING", logger="hf_blockkd"):
        student = make_student(teacher, layers=[1, 3])
    assert caplog.text == ""
    table, maps = teacher.model.embed_tokens_per_layer.weight, teacher.model.per_layer_model_projection.weight
    own = torch.tensor([4, 5, 6, 7, 12, 13, 14, 15])
    assert torch.equal(student.model.embed_tokens_per_layer.weight, table[:, own])
    assert torch.equal(student.model.per_layer_model_projection.weight, maps[own])
    assert student.cut == Cut([1, 3], 4)


def test_experts_that_no_token_reaches_are_cut_as_those_that_some_reach(caplog):
    config = transformers.SwitchTransformersConfig(
        d_model=16, d_kv=4, d_ff=12, num_layers=2, num_decoder_layers=2, num_heads=4, num_experts=8, vocab_size=64,
        num_sparse_encoder_layers=1, num_sparse_decoder_layers=1, decoder_start_token_id=0,
    )  # fmt: skip
    teacher = tiny.scrambled(transformers.SwitchTransformersForConditionalGeneration(config)).eval()
    path = "encoder.block.1.layer.1.mlp.experts.expert_{}.{}.weight"
    reached = find_axes(teacher)
    student = make_student(teacher, hidden_size=8, channels="weights")
    assert "newly" not in caplog.text
    assert not reached.unread
    theirs, ours = teacher.state_dict(), student.state_dict()
    channels = torch.tensor(student.cut.channels)
    for expert in range(8):
        up, down = (theirs[path.format(expert, name)] for name in ("wi", "wo"))
        # The squared weights of each neuron, on both sides of it.
        best = sum(t.square().sum(1) / t.square().sum() for t in (up, down.T)).topk(6).indices.sort().values
        assert torch.equal(ours[path.format(expert, "wi")], up[best][:, channels])
        assert torch.equal(ours[path.format(expert, "wo")], down[channels][:, best])


# ---- Several towers ----


def tiny_images_and_text() -> list[dict[str, torch.Tensor]]:
    """Rows of LLaVA: 4 places for the patches of an image, and a text."""
    rows = []
    for _ in range(12):
        text = torch.randint(3, 50, (5,))
        rows.append(
            {
                "input_ids": torch.cat([torch.full((4,), 60), text]),
                "attention_mask": torch.ones(9, dtype=torch.long),
                "pixel_values": torch.rand(1, 8, 8) * 2 - 1,
            }
        )
    return rows


def test_what_made_up_inputs_do_not_read_begins_anew_and_is_named(caplog):
    teacher = tiny.scrambled(tiny_llava()).eval()
    with caplog.at_level("WARNING", logger="hf_blockkd"):
        student = make_student(teacher, hidden_size=8, channels="weights")
    assert "4 of the student's" in caplog.text
    assert "multi_modal_projector" in caplog.text
    wanted = teacher.model.vision_tower.state_dict()
    assert all(torch.equal(value, wanted[name]) for name, value in student.model.vision_tower.state_dict().items())


@pytest.mark.parametrize("fit", [True, False])
def test_what_joins_images_to_a_text_is_cut_with_it(fit, caplog):
    teacher, data = tiny.scrambled(tiny_llava()).eval(), tiny_images_and_text()
    with caplog.at_level("WARNING", logger="hf_blockkd"):
        student = make_student(teacher, hidden_size=8, data=data, fit=fit)
    assert "newly initialised" not in caplog.text
    ours, theirs = student.model.multi_modal_projector, teacher.model.multi_modal_projector
    if not fit:
        (inner,) = (axis["kept"] for axis in student.cut.axes if axis["tensor"].endswith("linear_1.weight"))
        assert torch.equal(ours.linear_1.weight, theirs.linear_1.weight[inner])
        assert torch.equal(ours.linear_2.weight, theirs.linear_2.weight[student.cut.channels][:, inner])
    batch = {name: torch.stack([row[name] for row in data]) for name in data[0]}
    assert logits_of(student, **batch).isfinite().all()
    assert not torch.equal(
        logits_of(student, **batch), logits_of(student, **{**batch, "pixel_values": -batch["pixel_values"]})
    )


# ---- What is refused or said ----


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"channels": "loudest", "hidden_size": None}, "`channels` is 'loudest'; choose 'activations', 'weights'"),
        ({"channels": "loudest"}, "`channels` is 'loudest'; choose 'activations', 'weights', 'random'"),
        ({"channels": "activations"}, "`channels` is 'activations', which needs `data` to measure them on"),
        ({"data": rows_for(tiny.tiny_bert(), 3)}, "`data` has 3 examples, too few to measure the model on"),
    ],
)
def test_what_cannot_be_measured_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        make_student(tiny.tiny_bert(), **{"hidden_size": 8, **arguments})


def test_a_model_that_was_understood_wrongly_is_refused(monkeypatch):
    monkeypatch.setitem(RULES, "native_layer_norm", lambda call, x, shape, *rest: [x, [*x[:-1]], [*x[:-1]]])
    monkeypatch.setitem(RULES, "addmm", lambda call, bias, a, b, **kwargs: [[a[0], b[1]]])
    with pytest.raises(
        UnsupportedArchitectureError, match="BertForSequenceClassification cannot be cut in width: entri"
    ):
        make_student(tiny.tiny_bert(), hidden_size=8)


def test_sizes_with_which_nothing_runs_are_refused():
    with pytest.raises(
        ValueError, match=r"cannot be cut to these sizes, with which its forward does not run .*Error: "
    ):
        make_student(tiny.tiny_deberta(pooler_hidden_size=16), hidden_size=8, pooler_hidden_size=16)


def test_more_than_the_teacher_has_is_refused():
    with pytest.raises(UnsupportedArchitectureError, match=r"the teacher has 24 entries where it has 32"):
        make_student(tiny.tiny_vit(), hidden_size=8, intermediate_size=32)


def test_queries_do_not_stay_without_their_keys():
    teacher = tiny.tiny_llama(hidden_size=32, num_attention_heads=4, num_key_value_heads=2, head_dim=8)
    with pytest.raises(UnsupportedArchitectureError, match=r"q_proj.weight would keep its shape, \(32, 32\), but 4\*"):
        make_student(teacher, num_key_value_heads=1)
    fewer = make_student(teacher, num_key_value_heads=1, num_attention_heads=2, head_dim=8, channels="weights")
    assert fewer.model.layers[0].self_attn.q_proj.weight.shape == (16, 32)


@pytest.mark.parametrize("build", [tiny.tiny_llama, tiny.tiny_bert])
def test_weights_that_other_heads_read_are_told(build, caplog):
    groups = {"num_key_value_heads": 2} if build is tiny.tiny_llama else {}
    teacher = build(hidden_size=32, num_attention_heads=4, **groups)
    with caplog.at_level("WARNING", logger="hf_blockkd"):
        make_student(teacher, 2, intermediate_size=24)
        assert caplog.text == ""
        make_student(teacher, 2, num_attention_heads=2, **dict.fromkeys(groups, 1))
    assert "do not mean what they did; leave the number of heads as it is" in caplog.text


def test_a_teacher_that_was_never_trained_is_told_from_one_that_was(caplog):
    with caplog.at_level("WARNING", logger="hf_blockkd"):
        make_student(tiny.tiny_vit(), 2)
        assert "never trained" not in caplog.text
        make_student(transformers.ViTForImageClassification(transformers.ViTConfig(**tiny.VISION)), 2)
    assert "weights of the teacher, ViTForImageClassification, look as if they were never trained" in caplog.text


@pytest.mark.parametrize(("data", "said"), [(True, False), (False, True)])
def test_a_narrow_student_without_data_is_warned_of(data, said, caplog):
    teacher = tiny.tiny_vit()
    with caplog.at_level("WARNING", logger="hf_blockkd"):
        make_student(teacher, hidden_size=8, data=rows_for(teacher) if data else None)
    assert ("Without `data`, the narrower student's channels are chosen by the size" in caplog.text) is said
