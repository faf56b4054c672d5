"""Indices without a row, and texts without a position, are refused before a model looks them up."""

import json

import pytest
import torch
from transformers import XLNetConfig, XLNetLMHeadModel

from hf_blockkd import find_layer_stack
from hf_blockkd.pairing.tables import IndexTables

from ..helpers import tiny_models as tiny
from ..helpers.training import make_trainer, text_rows, token_rows


def tables_of(model):
    return IndexTables(model, find_layer_stack(model))


@pytest.mark.parametrize(
    ("build", "columns", "lengths"),
    [
        (tiny.tiny_llama, {"input_ids": 64}, {}),
        (tiny.tiny_gpt2, {"input_ids": 64, "position_ids": 40, "token_type_ids": 64}, {"input_ids": 40}),
        (tiny.tiny_bert, {"input_ids": 64, "position_ids": 40, "token_type_ids": 2}, {"input_ids": 40}),
        # The first position is that after the padding's.
        (tiny.tiny_roberta, {"input_ids": 64, "position_ids": 40, "token_type_ids": 1}, {"input_ids": 39}),
        # Two rows of its 42 precede the first position.
        (
            tiny.tiny_bart,
            {"input_ids": 64, "decoder_input_ids": 64},
            {"input_ids": 40, "decoder_input_ids": 40},
        ),
        # Relative positions are looked up, too, but never run out.
        (tiny.tiny_t5, {"input_ids": 64, "decoder_input_ids": 64}, {}),
        (tiny.tiny_vit, {}, {}),
    ],
)
def test_tables_are_found_by_watching_the_model(build, columns, lengths):
    model = build()
    tables = tables_of(model)
    assert {name: table.rows for name, table in tables.columns.items()} == columns
    assert {name: tables.longest(name) for name in tables.lengths} == lengths


def test_a_model_of_texts_of_any_length_has_no_limit():
    config = XLNetConfig(d_model=16, n_layer=2, n_head=2, d_inner=16, vocab_size=64)
    assert tables_of(XLNetLMHeadModel(config)).longest("input_ids") is None


def test_watching_leaves_no_trace():
    model = tiny.tiny_bert().train()
    state = torch.get_rng_state()
    tables_of(model)
    assert model.training
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert torch.equal(torch.get_rng_state(), state)


def test_a_model_that_moves_ids_within_its_table_takes_any():
    class Modulo(type(tiny.tiny_bert())):
        def forward(self, input_ids=None, **kwargs):
            return super().forward(input_ids % 64, **kwargs)

    assert "input_ids" not in tables_of(Modulo(tiny.tiny_bert().config)).columns


def changed(rows, **columns):
    """Rows of which the last but one has other columns."""
    rows[-2].update({name: torch.as_tensor(value) for name, value in columns.items()})
    return rows


def refused(folder, student, teacher, rows, match):
    trainer = make_trainer(folder, student, teacher, rows, max_steps=1, per_device_train_batch_size=8)
    with pytest.raises(ValueError, match=match):
        trainer.train()
    assert trainer.state.global_step == 0


IDS = [3, 4, 5, 6, 7, 64]


@pytest.mark.parametrize("role", ["student", "teacher"])
def test_a_token_that_one_model_lacks_is_named_even_as_padding(tmp_path, role):
    models = {"student": tiny.tiny_llama(), "teacher": tiny.tiny_llama()}
    models["teacher" if role == "student" else "student"].resize_token_embeddings(65)
    rows = changed(token_rows(), input_ids=IDS, attention_mask=[1, 1, 1, 1, 1, 0], labels=[3, 4, 5, 6, 7, -100])
    match = f"`input_ids` holds 64, but 'model.embed_tokens.weight' of the {role} LlamaForCausalLM has 64 rows, 0 to 63"
    refused(tmp_path, *models.values(), rows, match)


def test_labels_that_become_the_decoders_ids_are_looked_up_in_both_models(tmp_path):
    student, teacher = tiny.tiny_bart(), tiny.tiny_bart()
    student.resize_token_embeddings(65)
    refused(tmp_path, student, teacher, changed(token_rows(), labels=IDS[::-1]), "64.*BartForConditionalGeneration has")


def test_other_columns_of_indices_are_named(tmp_path):
    student, teacher = tiny.tiny_bert(), tiny.tiny_bert(type_vocab_size=1)
    rows = [{**row, "token_type_ids": torch.zeros(6, dtype=torch.long)} for row in text_rows()]
    rows = changed(rows, token_type_ids=[0, 0, 0, 1, 1, 1])
    refused(
        tmp_path, student, teacher, rows, "`token_type_ids` holds 1, but 'bert.*token_type.*of the teacher Bert.*1 row"
    )


def test_positions_that_are_given_are_looked_up(tmp_path):
    rows = [{**row, "position_ids": torch.arange(6) + 35} for row in text_rows()]
    refused(tmp_path, tiny.tiny_bert(), tiny.tiny_bert(), rows, "`position_ids` holds 40.*student.*40 rows, 0 to 39")


def test_offset_positions_end_earlier_than_the_config_says(tmp_path):
    rows = text_rows(length=40)
    match = (
        "40 tokens in `input_ids`, but 'roberta.*student Roberta.* has 40 positions, of which a text begins at 1; cut"
    )
    refused(tmp_path, tiny.tiny_roberta(), tiny.tiny_roberta(), rows, match)
    make_trainer(tmp_path, tiny.tiny_roberta(), tiny.tiny_roberta(), text_rows(length=39), max_steps=1).train()


def test_labels_longer_than_the_decoder_are_refused(tmp_path):
    rows = [{**row, "labels": torch.full((9,), 5)} for row in token_rows()]
    models = tiny.tiny_bart(), tiny.tiny_bart(max_position_embeddings=8)
    refused(tmp_path, *models, rows, "9 tokens in `decoder_input_ids`.*teacher Bart.* has 10 positions.*cut them to 8")


@pytest.mark.parametrize("build", [tiny.tiny_gpt2, tiny.tiny_llama])
def test_the_student_is_evaluated_on_texts_longer_than_the_teachers(tmp_path, build):
    limit = "n_positions" if build is tiny.tiny_gpt2 else "max_position_embeddings"
    student, teacher = build(), build(**{limit: 8})
    trainer = make_trainer(tmp_path, student, teacher, token_rows(), eval_dataset=token_rows(length=12), max_steps=1)
    trainer.train()
    assert json.loads(json.dumps(trainer.evaluate()))["eval_loss"] > 0
    with pytest.raises(ValueError, match=r"12 tokens in `input_ids`.*teacher.*cut them to 8"):
        trainer.evaluate_stepping_stones()
