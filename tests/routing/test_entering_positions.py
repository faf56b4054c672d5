"""Routing where positions matter: padding on either side, positions by hand, packed sequences, sliding windows."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from hf_blockkd import check_routing, find_layer_stack
from hf_blockkd.routing.entering import capture_states, enter_at, record_extras

from ..helpers import tiny_models as tiny
from ..helpers.training import PLAIN_SGD, differs, make_trainer, state_of

LENGTH = 12
DOCUMENTS = (5, 4, 3)
DECODERS = {
    "llama": tiny.tiny_llama,
    "qwen3": tiny.tiny_qwen3,
    "gemma3": tiny.tiny_gemma3,
    "mistral": tiny.tiny_mistral,
}
MODELS = {
    **DECODERS,
    "modernbert": tiny.tiny_modernbert,
    "modernbert masked": lambda: tiny.tiny_modernbert("MaskedLM"),
}


def token_ids(rows: int) -> Tensor:
    return torch.randint(3, tiny.VOCABULARY, (rows, LENGTH))


def left_padded() -> dict[str, Tensor]:
    return padded(slice(0, 3))


def right_padded() -> dict[str, Tensor]:
    return padded(slice(LENGTH - 3, LENGTH))


def padded(padding: slice) -> dict[str, Tensor]:
    """Two rows, the second of nine tokens."""
    ids = token_ids(2)
    mask = torch.ones_like(ids)
    ids[1, padding], mask[1, padding] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


def left_padded_with_positions() -> dict[str, Tensor]:
    inputs = left_padded()
    return {**inputs, "position_ids": (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)}


def spread_positions() -> dict[str, Tensor]:
    """Positions of two rows that a model would not have counted itself."""
    ids = token_ids(2)
    positions = torch.stack([torch.arange(LENGTH) * 2 + 3, torch.arange(LENGTH) * 3])
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "position_ids": positions}


def packed() -> dict[str, Tensor]:
    """Three documents in one row, told apart by their positions alone."""
    positions = torch.cat([torch.arange(length) for length in DOCUMENTS])
    return {"input_ids": token_ids(1), "position_ids": positions[None]}


ARRANGEMENTS = [left_padded, right_padded, left_padded_with_positions, spread_positions, packed]


def documents(inputs: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """What `packed` made of them: each document by itself."""
    return [{"input_ids": ids} for ids in inputs["input_ids"].split(DOCUMENTS, dim=1)]


def without_cache(model: nn.Module) -> nn.Module:
    """Packing is only looked for where no cache is; the trainer turns caches off, too."""
    model.config.use_cache = False
    return model


@torch.no_grad()
def logits_of(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    return model(**inputs).logits


@torch.no_grad()
def foreign_logits(model: nn.Module, inputs: dict[str, Tensor], depth: int, noise: Tensor) -> Tensor:
    """The logits of a model that is entered at `depth` with states other than its own."""
    stack = find_layer_stack(model)
    with capture_states(stack, [depth]) as states, record_extras(stack) as extras:
        model(**inputs)
    with enter_at(stack, depth, states[depth] + noise, extras):
        return model(**inputs).logits


# ---- Exactness ----


@pytest.mark.parametrize("cache", [False, True], ids=["no cache", "cache"])
@pytest.mark.parametrize("arrange", ARRANGEMENTS)
@pytest.mark.parametrize("name", MODELS)
def test_a_model_entered_at_any_depth_gives_its_own_logits_to_the_bit(name, arrange, cache):
    model = MODELS[name]()
    model.config.use_cache = cache
    report = check_routing(model, inputs=arrange())
    assert report.max_abs_error == 0.0
    assert report.num_layers == tiny.LAYERS


@pytest.mark.parametrize("arrange", ARRANGEMENTS)
@pytest.mark.parametrize("name", MODELS)
def test_each_arrangement_changes_the_logits(name, arrange):
    """Or being exact with it would say nothing."""
    model, inputs = without_cache(MODELS[name]()), arrange()
    plain = logits_of(model, {"input_ids": inputs["input_ids"]})
    assert (logits_of(model, inputs) - plain).abs().max() > 1e-3


@pytest.mark.parametrize("name", [name for name in MODELS if name != "llama"])
def test_the_windows_are_shorter_than_the_sequences(name):
    model = without_cache(MODELS[name]())
    wide = {"local_attention": 64} if name.startswith("modernbert") else {"sliding_window": 64}
    head = {"head": "MaskedLM"} if name.endswith("masked") else {}
    builder = getattr(tiny, f"tiny_{name.split()[0]}")
    other = without_cache(builder(**head, **wide))
    other.load_state_dict(model.state_dict())
    inputs = {"input_ids": token_ids(2)}
    assert (logits_of(model, inputs) - logits_of(other, inputs)).abs().max() > 1e-3


# ---- What the layers above the entry see ----


@pytest.mark.parametrize("depth", range(tiny.LAYERS + 1))
@pytest.mark.parametrize("name", DECODERS)
def test_foreign_states_of_packed_documents_go_the_way_of_each_document_alone(name, depth):
    model, inputs = without_cache(DECODERS[name]()), packed()
    noise = 0.3 * torch.randn(1, LENGTH, tiny.WIDTH)
    together = foreign_logits(model, inputs, depth, noise)
    alone = [
        foreign_logits(model, document, depth, own)
        for document, own in zip(documents(inputs), noise.split(DOCUMENTS, dim=1), strict=True)
    ]
    torch.testing.assert_close(together, torch.cat(alone, dim=1), atol=1e-5, rtol=1e-5)
    unpacked = {"input_ids": inputs["input_ids"]}
    if depth < tiny.LAYERS:
        assert (together - foreign_logits(model, unpacked, depth, noise)).abs().max() > 1e-3


@pytest.mark.parametrize("arrange", [left_padded_with_positions, right_padded])
@pytest.mark.parametrize("name", [*DECODERS, "modernbert masked"])
def test_foreign_states_of_a_padded_row_go_the_way_of_the_row_alone(name, arrange):
    model, inputs = without_cache(MODELS[name]()), arrange()
    kept = inputs["attention_mask"][1].bool()
    noise = 0.3 * torch.randn(2, LENGTH, tiny.WIDTH)
    row = {"input_ids": inputs["input_ids"][1:, kept]}
    for depth in range(tiny.LAYERS + 1):
        padded_logits = foreign_logits(model, inputs, depth, noise)[1:, kept]
        alone = foreign_logits(model, row, depth, noise[1:, kept])
        torch.testing.assert_close(padded_logits, alone, atol=1e-5, rtol=1e-5)


# ---- Through the trainer ----


@pytest.mark.parametrize("name", DECODERS)
def test_stones_of_a_copied_teacher_give_its_logits_bit_for_bit_on_a_packed_batch(tmp_path, name):
    teacher, inputs = DECODERS[name](), packed()
    trainer = make_trainer(tmp_path, copy.deepcopy(teacher), teacher, connector="identity", num_blocks=3)
    expected = logits_of(teacher, trainer.pair.inputs_for("teacher", inputs))
    stones = trainer.stepping_stone_logits(inputs)
    assert list(stones) == [1, 2, 3]
    for logits in stones.values():
        assert torch.equal(logits, expected)
    unpacked = logits_of(teacher, {"input_ids": inputs["input_ids"]})
    for first, length in zip((0, 5, 9), DOCUMENTS, strict=True):
        difference = (expected - unpacked)[:, first : first + length].abs().max()
        assert difference == 0.0 if first == 0 else difference > 1e-3


@pytest.mark.parametrize("name", DECODERS)
def test_stones_of_a_smaller_student_see_each_packed_document_alone(tmp_path, name):
    """Student prefix, connector and teacher suffix keep the documents apart."""
    student, inputs = DECODERS[name](num_hidden_layers=2, hidden_size=12), packed()
    trainer = make_trainer(tmp_path, student, DECODERS[name]())
    with torch.no_grad():
        together = trainer.stepping_stone_logits(inputs)
        alone = [trainer.stepping_stone_logits(document) for document in documents(inputs)]
        unpacked = trainer.stepping_stone_logits({"input_ids": inputs["input_ids"]})
    for i, logits in together.items():
        torch.testing.assert_close(logits, torch.cat([one[i] for one in alone], dim=1), atol=1e-5, rtol=1e-5)
        assert (logits - unpacked[i]).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_a_step_on_packed_documents_is_the_step_on_the_documents_one_by_one(tmp_path, name):
    """The label at the start of a document is left out, so that the end of the one before does not predict it."""
    teacher, student, inputs = DECODERS[name](), DECODERS[name](num_hidden_layers=2), packed()
    labels = inputs["input_ids"].clone()
    labels[0, [0, 5, 9]] = -100
    together = [{name: tensor[0] for name, tensor in {**inputs, "labels": labels}.items()}]
    one_by_one = [
        {"input_ids": ids, "labels": own}
        for ids, own in zip(
            together[0]["input_ids"].split(DOCUMENTS), together[0]["labels"].split(DOCUMENTS), strict=True
        )
    ]
    states = []
    for rows in (together, one_by_one):
        trainer = make_trainer(
            tmp_path,
            copy.deepcopy(student),
            teacher,
            rows,
            per_device_train_batch_size=1,
            gradient_accumulation_steps=len(rows),
            max_steps=1,
            **PLAIN_SGD,
        )
        trainer.train()
        states.append(state_of(trainer.model))
    for key, value in states[0].items():
        torch.testing.assert_close(value, states[1][key], atol=2e-6, rtol=1e-5)
    assert differs(states[0], student.state_dict())
