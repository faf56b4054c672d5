"""Every stepping stone is a model: to the bit what was trained, saved, loaded, evaluated, generating."""

import copy
import logging

import pytest
import torch
from peft import LoraConfig
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    Trainer,
    TrainingArguments,
    ViTImageProcessorPil,
    pipeline,
)

from hf_blockkd import UnsupportedArchitectureError, load_stepping_stone
from hf_blockkd.connectors.attached import detached
from hf_blockkd.ladder.making import _are_close, stone_model
from hf_blockkd.ladder.stone_model import SteppingStone
from hf_blockkd.pairing.pair import Pair
from hf_blockkd.routing.dummy_inputs import dummy_inputs
from hf_blockkd.routing.logits import main_outputs

from ..helpers.tiny_models import (
    TEXT,
    build,
    tiny_bart,
    tiny_bert,
    tiny_deberta,
    tiny_dinov2,
    tiny_distilbert,
    tiny_gemma3,
    tiny_gpt2,
    tiny_gpt_neox,
    tiny_llama,
    tiny_mixtral,
    tiny_modernbert,
    tiny_qwen3,
    tiny_resnet,
    tiny_swin,
    tiny_t5,
    tiny_vit,
    tiny_whisper,
)
from ..helpers.training import assert_same_state, batch_of, image_rows, make_trainer, state_of, token_rows

LAYERS, WIDTH = "num_hidden_layers", "hidden_size"
FAMILIES = {
    "vit": (tiny_vit, LAYERS, WIDTH),
    "dinov2": (tiny_dinov2, LAYERS, WIDTH),
    "bert": (tiny_bert, LAYERS, WIDTH),
    "deberta": (tiny_deberta, LAYERS, WIDTH),
    "distilbert": (tiny_distilbert, "n_layers", "dim"),
    "modernbert": (tiny_modernbert, LAYERS, WIDTH),
    "bart": (tiny_bart, "decoder_layers", "d_model"),
    "whisper": (tiny_whisper, "decoder_layers", "d_model"),
    "llama": (tiny_llama, LAYERS, WIDTH),
    "gpt2": (tiny_gpt2, "n_layer", "n_embd"),
    "qwen3": (tiny_qwen3, LAYERS, WIDTH),
    "gemma3": (tiny_gemma3, LAYERS, WIDTH),
    "mixtral": (tiny_mixtral, LAYERS, WIDTH),
    "neox": (tiny_gpt_neox, LAYERS, WIDTH),
}
DECODERS = ("llama", "gpt2", "qwen3", "gemma3", "mixtral", "neox")
PLAIN = {"deberta": False, "bart": False, "whisper": False}


def pair_of(family, narrow=True):
    build, layers, width = FAMILIES[family]
    teacher = build()
    student = build(**{layers: 2}, **({width: 8} if narrow else {}))
    pair = Pair(student, teacher, num_blocks=2)
    if narrow:
        for connector in pair.connectors:
            torch.nn.init.normal_(connector.weight)
    return pair


@torch.no_grad()
def as_trained(pair, index, inputs):
    teacher_inputs = pair.inputs_for("teacher", inputs)
    _, extras = pair.stones.teach(teacher_inputs)
    with pair.stones.capture([index]) as states:
        pair.student(**pair.inputs_for("student", inputs))
    return main_outputs(pair.stones.run(index, states, teacher_inputs, extras))


@torch.no_grad()
def assert_same(model, inputs, expected):
    for ours, theirs in zip(main_outputs(model(**inputs)), expected, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("index", [1, 2])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_stone_of_unequal_widths_is_what_was_trained_to_the_bit_and_so_is_the_saved_one(tmp_path, family, index):
    pair = pair_of(family)
    model, inputs = stone_model(pair, index), dummy_inputs(pair.teacher)
    expected = as_trained(pair, index, inputs)
    assert isinstance(model, SteppingStone)
    assert_same(model, inputs, expected)
    model.save_pretrained(tmp_path)
    loaded, weights = load_stepping_stone(tmp_path), state_of(model)
    assert_same_state(state_of(loaded), weights)
    # Weights that lie elsewhere in memory may be multiplied in another order.
    for ours, theirs in zip(main_outputs(loaded(**inputs)), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        for parameter in pair.student.parameters():
            parameter.zero_()
    assert all(torch.equal(weights[name], tensor) for name, tensor in state_of(model).items())


@pytest.mark.parametrize("index", [1, 2])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_stone_of_one_width_is_a_plain_model_of_the_teachers_class(tmp_path, family, index):
    pair = pair_of(family, narrow=False)
    model, inputs = stone_model(pair, index), dummy_inputs(pair.teacher)
    expected = as_trained(pair, index, inputs)
    if PLAIN.get(family, True) or (index == 2 and family != "deberta"):
        assert type(model) is type(pair.teacher)
        model.save_pretrained(tmp_path)
        assert_same(type(pair.teacher).from_pretrained(tmp_path), inputs, expected)
    else:
        model.save_pretrained(tmp_path)
    assert_same(load_stepping_stone(tmp_path), inputs, expected)


def test_what_is_not_run_is_not_kept():
    pair = Pair(tiny_llama(num_hidden_layers=4, hidden_size=8), tiny_llama(num_hidden_layers=4), num_blocks=4)
    depths = [(len(one.body_stack), len(one.tail_stack)) for one in (stone_model(pair, i) for i in (1, 2, 3, 4))]
    # A model without layers is none: under the last stone's head one stays, which is not run.
    assert depths == [(1, 3), (2, 2), (3, 1), (4, 1)]


def test_models_that_cannot_be_cut_stay_whole_and_say_why(monkeypatch):
    said, pair = [], pair_of("llama")
    monkeypatch.setattr("hf_blockkd.ladder.making.logger.info", said.append)
    monkeypatch.setattr("hf_blockkd.ladder.making.make_student", lambda *_, **__: 1 / 0)
    stone, inputs = stone_model(pair, 1), dummy_inputs(pair.teacher)
    assert (len(stone.body_stack), len(stone.tail_stack)) == (2, len(pair.stones.teacher_stack))
    assert_same(stone, inputs, as_trained(pair, 1, inputs))
    assert said == ["Stepping stone 1 keeps the layers that it does not run: ZeroDivisionError('division by zero')"]


def test_images_of_another_size_and_another_family_go_through_the_bridge(tmp_path):
    student, teacher = tiny_resnet(num_channels=3), tiny_vit(image_size=16, num_channels=3)
    pair = Pair(student, teacher, num_blocks=2)
    inputs = {"pixel_values": torch.randn(2, 3, 16, 16)}
    for index in (1, 2):
        stone_model(pair, index).save_pretrained(tmp_path / str(index))
        pair.geometry.fit(inputs)
        assert_same(load_stepping_stone(tmp_path / str(index)), inputs, as_trained(pair, index, inputs))


def test_models_of_stages_are_plain_models_too():
    pair = Pair(tiny_swin(), tiny_swin(), num_blocks=2)
    model, inputs = stone_model(pair, 1), dummy_inputs(pair.teacher)
    assert_same(model, inputs, as_trained(pair, 1, inputs))


def test_layers_that_hand_on_more_than_states_are_refused():
    with pytest.raises(UnsupportedArchitectureError, match="hand on more than hidden states"):
        SteppingStone(tiny_t5(d_model=8), tiny_t5(), 1, 1)


def test_what_skipped_layers_hand_on_and_no_layer_reads_is_no_obstacle():
    pair = Pair(tiny_t5(num_decoder_layers=2, d_model=8), tiny_t5(), num_blocks=2)
    inputs = dummy_inputs(pair.teacher)
    assert_same(stone_model(pair, 2), inputs, as_trained(pair, 2, inputs))


def test_a_model_that_does_not_answer_as_trained_is_refused(monkeypatch):
    pair = pair_of("vit")
    monkeypatch.setattr("hf_blockkd.ladder.making._outputs", lambda *_: (torch.zeros(2, 5),))
    with pytest.raises(UnsupportedArchitectureError, match="does not answer as it did in training"):
        stone_model(pair, 1)


def test_how_near_outputs_are_is_told_by_those_of_usual_size():
    logits = torch.randn(2, 9)
    for least in (-torch.inf, torch.finfo(logits.dtype).min):  # what some heads give to classes that are none
        theirs = logits.index_fill(1, torch.tensor([0, 5]), least)
        assert _are_close(theirs + 0.01, theirs)
        assert not _are_close(theirs + 1.0, theirs)
        assert not _are_close(logits, theirs)


def test_skipped_layers_whose_indices_later_ones_read_are_refused():
    sizes = {"kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 8, "v_head_dim": 8, "qk_nope_head_dim": 8}
    sizes |= {"index_topk": 2, "index_n_heads": 2, "index_head_dim": 16, "moe_intermediate_size": 8}
    experts = {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1, "n_shared_experts": 1}
    kinds = {"mlp_layer_types": ["dense"] * 4, "indexer_types": ["full", "full", "shared", "full"]}
    fields = {**TEXT, "num_key_value_heads": 2, "num_hidden_layers": 4}
    teacher = build("GlmMoeDsa", "CausalLM", fields, {**sizes, **experts, **kinds})
    with pytest.raises(UnsupportedArchitectureError, match="hand on more than hidden states"):
        SteppingStone(tiny_llama(), teacher, 1, 2)
    SteppingStone(tiny_llama(), teacher, 1, 3)


@pytest.mark.parametrize("index", [0, 3])
def test_a_stone_that_is_not_there(index):
    with pytest.raises(ValueError, match=f"no stepping stone {index}; choose one from 1 to 2"):
        stone_model(pair_of("vit"), index)


@pytest.mark.parametrize("index", [1, 2])
@pytest.mark.parametrize("family", DECODERS)
def test_a_stone_generates_with_a_cache_what_it_does_without(family, index):
    model = stone_model(pair_of(family), index)
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    ids, mask = torch.randint(3, 60, (2, 5)), torch.ones(2, 5, dtype=torch.long)
    ids[0, :2] = mask[0, :2] = 0
    expected, seen = ids, mask
    with torch.no_grad():
        for _ in range(6):
            positions = (seen.cumsum(-1) - 1).clamp(min=0)
            logits = model(input_ids=expected, attention_mask=seen, position_ids=positions, use_cache=False).logits
            expected = torch.cat([expected, logits[:, -1].argmax(-1, keepdim=True)], 1)
            seen = torch.cat([seen, torch.ones(2, 1, dtype=torch.long)], 1)
    options = {"input_ids": ids, "attention_mask": mask, "max_new_tokens": 6, "do_sample": False}
    assert torch.equal(model.generate(**options), expected)
    beams = [model.generate(**options, num_beams=3, use_cache=cached) for cached in (True, False)]
    assert torch.equal(*beams)


@pytest.mark.parametrize("index", [1, 2])
@pytest.mark.parametrize("family", ["bart", "whisper"])
def test_so_does_one_of_an_encoder_and_a_decoder_from_its_own_encodings(tmp_path, family, index):
    stone_model(pair_of(family), index).save_pretrained(tmp_path)
    model = load_stepping_stone(tmp_path)
    model.generation_config.update(eos_token_id=None, forced_eos_token_id=None, decoder_start_token_id=2)
    own = dummy_inputs(model.tail)
    given = {name: value for name, value in own.items() if not name.startswith("decoder")}
    written = torch.full((len(given[model.main_input_name]), 1), 2)
    with torch.no_grad():
        for _ in range(6):
            logits = model(**given, decoder_input_ids=written, use_cache=False).logits
            written = torch.cat([written, logits[:, -1].argmax(-1, keepdim=True)], 1)
    options = {**given, "max_new_tokens": 6, "do_sample": False}
    assert torch.equal(model.generate(**options), written)
    beams = [model.generate(**options, num_beams=3, use_cache=cached) for cached in (True, False)]
    assert torch.equal(*beams)


def test_the_trainer_saves_a_stone_that_evaluates_trains_and_runs_in_a_pipeline(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    teacher, rows = tiny_vit(), image_rows(8)
    trainer = make_trainer(tmp_path / "run", tiny_vit(num_hidden_layers=2, hidden_size=8), teacher, rows, max_steps=2)
    trainer.processing_class = ViTImageProcessorPil(
        size={"height": 8, "width": 8}, image_mean=[0.5], image_std=[0.5], do_convert_rgb=False
    )
    trainer.train()
    trainer.save_stepping_stone(1, tmp_path / "stone")
    expected = trainer.stepping_stone_logits(batch_of(rows))[1]
    stone = load_stepping_stone(tmp_path / "stone")
    inputs = batch_of(rows)
    assert torch.equal(stone(**inputs).logits, expected)
    plain = Trainer(
        stone,
        TrainingArguments(str(tmp_path / "more"), max_steps=1, report_to="none", disable_tqdm=True, use_cpu=True),
        train_dataset=rows,
        eval_dataset=rows,
    )
    loss = torch.nn.functional.cross_entropy(expected, inputs["labels"]).item()
    assert plain.evaluate()["eval_loss"] == pytest.approx(loss, rel=1e-5)
    before = state_of(stone)
    plain.train()
    assert any(not torch.equal(before[name], tensor) for name, tensor in state_of(stone).items())
    with caplog.at_level("ERROR", logger="transformers"):
        classify = pipeline("image-classification", stone, image_processor=trainer.processing_class, device="cpu")
    assert "not supported" not in caplog.text
    pixels = inputs["pixel_values"][:1]
    assert {one["label"] for one in classify.postprocess(classify.forward({"pixel_values": pixels}), top_k=5)} == {
        f"LABEL_{i}" for i in range(5)
    }


def test_a_stone_that_is_trained_on_as_a_student_is_saved_as_it_is_then(tmp_path):
    student, teacher = tiny_vit(hidden_size=8, num_hidden_layers=2), tiny_vit(num_hidden_layers=4)
    make_trainer(tmp_path, student, teacher, image_rows(), num_blocks=2).save_stepping_stone(1, tmp_path / "stone")
    settings = {"num_blocks": 2, "objective": "ladder", "max_steps": 2, "learning_rate": 1e-2}
    trainer = make_trainer(tmp_path, load_stepping_stone(tmp_path / "stone"), teacher, image_rows(), **settings)
    trainer.train()
    trainer.save_model(tmp_path / "trained")
    before, after = (load_stepping_stone(tmp_path / name) for name in ("stone", "trained"))
    inputs = {"pixel_values": batch_of(image_rows())["pixel_values"]}
    with torch.no_grad(), detached(trainer.model):
        assert torch.equal(after(**inputs).logits, trainer.model.eval()(**inputs).logits)
        assert not torch.equal(after(**inputs).logits, before(**inputs).logits)
    expected = trainer.stepping_stone_logits(inputs)[1]
    trainer.save_stepping_stone(1, tmp_path / "again")  # the first part of which is a stepping stone
    assert torch.equal(load_stepping_stone(tmp_path / "again")(**inputs).logits, expected)


def test_what_is_not_run_is_not_kept_of_a_run_in_bfloat16_either(tmp_path):
    sizes = {}
    for bf16 in (False, True):
        student, teacher = tiny_llama(hidden_size=8, num_hidden_layers=2), tiny_llama(num_hidden_layers=4)
        trainer = make_trainer(tmp_path, student, teacher, token_rows(), num_blocks=2, max_steps=1, bf16=bf16)
        trainer.train()
        trainer.save_stepping_stone(1, tmp_path / "stone")
        sizes[bf16] = load_stepping_stone(tmp_path / "stone").num_parameters()
    assert sizes[True] == sizes[False]


def test_a_run_that_trains_a_stone_goes_on_with_the_bits_of_an_unbroken_one_and_ends_with_its_best(tmp_path):
    student, teacher = tiny_vit(hidden_size=8, num_hidden_layers=2), tiny_vit(num_hidden_layers=4)
    make_trainer(tmp_path, student, teacher, image_rows(), num_blocks=2).save_stepping_stone(1, tmp_path / "stone")
    settings = {"num_blocks": 2, "objective": "ladder", "max_steps": 3, "learning_rate": 1e-2}
    settings |= {"save_strategy": "steps", "save_steps": 1}

    def trainer_of(folder: str, **more):
        stone = load_stepping_stone(tmp_path / "stone")
        return make_trainer(tmp_path / folder, stone, teacher, image_rows(), **settings | more)

    whole = trainer_of("whole")
    whole.train()
    resumed = trainer_of("whole")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-1"))
    assert_same_state(state_of(resumed.model), state_of(whole.model))

    best = {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 1, "learning_rate": 1.0}
    rising = trainer_of("best", **best, eval_dataset=image_rows())
    rising.train()
    assert rising.state.best_model_checkpoint == str(tmp_path / "best" / "checkpoint-1")
    saved = load_stepping_stone(tmp_path / "best" / "checkpoint-1").state_dict()
    with detached(rising.model):
        assert_same_state(state_of(rising.model), saved)


def test_smoothed_labels_of_texts_are_compared_with_the_token_before(tmp_path):
    teacher, rows = tiny_llama(), token_rows(4)
    stone = stone_model(Pair(tiny_llama(num_hidden_layers=2, hidden_size=8), teacher, num_blocks=2), 2)
    batch = batch_of(rows)
    settings = {"label_smoothing_factor": 0.1, "report_to": "none", "use_cpu": True}
    trainer = Trainer(stone, TrainingArguments(str(tmp_path), **settings), train_dataset=rows)
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    logits = stone(**inputs).logits[:, :-1].flatten(0, 1)
    expected = torch.nn.functional.cross_entropy(logits, batch["labels"][:, 1:].flatten(), label_smoothing=0.1)
    assert trainer.compute_loss(stone, batch).item() == pytest.approx(expected.item(), rel=1e-5)


def test_a_plain_stone_takes_the_place_of_one_of_two_models(tmp_path):
    rows, widths = token_rows(8), (8, 16)
    for width in widths:
        student = tiny_llama(num_hidden_layers=2, hidden_size=width)
        settings = {"connector": "identity", "train_connectors": False} if width == 16 else {}
        trainer = make_trainer(tmp_path / "run", student, tiny_llama(), rows, **settings)
        trainer.save_stepping_stone(1, tmp_path / "stone")
    found = load_stepping_stone(tmp_path / "stone")
    assert type(found) is type(trainer.teacher)
    batch = {name: value for name, value in batch_of(rows).items() if name != "labels"}
    assert torch.equal(found(**batch).logits, trainer.stepping_stone_logits(batch)[1])


@pytest.mark.parametrize(
    ("build", "make_rows", "auto"),
    [(tiny_vit, image_rows, AutoModelForImageClassification), (tiny_llama, token_rows, AutoModelForCausalLM)],
)
def test_with_identity_connectors_that_stay_every_stone_needs_none_of_our_code(tmp_path, build, make_rows, auto):
    teacher, rows = build(), make_rows(256)
    settings = {"connector": "identity", "train_connectors": False, "max_steps": 2, "stepping_stones": "all"}
    trainer = make_trainer(tmp_path, build(num_hidden_layers=2), teacher, rows, **settings)
    before = copy.deepcopy(state_of(trainer.connectors))
    trainer.train()
    assert all(torch.equal(before[name], tensor) for name, tensor in state_of(trainer.connectors).items())
    batch = batch_of(rows[:4])
    expected = trainer.stepping_stone_logits(batch)
    for index in (1, 2):
        trainer.save_stepping_stone(index, tmp_path / "stone")
        model = auto.from_pretrained(tmp_path / "stone")
        assert torch.equal(model(**{k: v for k, v in batch.items() if k != "labels"}).logits, expected[index])


def test_the_adapter_of_a_student_is_merged_into_a_stone(tmp_path):
    rows = token_rows(8)
    lora = LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", init_lora_weights=False)
    student = tiny_llama(num_hidden_layers=2, hidden_size=8)
    trainer = make_trainer(tmp_path / "run", student, tiny_llama(), rows, peft_config=lora, max_steps=2)
    trainer.train()
    batch = {name: value for name, value in batch_of(rows[:4]).items() if name != "labels"}
    expected = trainer.stepping_stone_logits(batch)
    for index in (1, 2):
        trainer.save_stepping_stone(index, tmp_path / str(index))
        found = load_stepping_stone(tmp_path / str(index))(**batch).logits
        torch.testing.assert_close(found, expected[index], rtol=1e-4, atol=1e-4)
