"""Data that cannot be trained on is refused with the field, the values and what to do."""

import copy
import json

import pytest
import torch
from datasets import ClassLabel, Dataset
from transformers import DataCollatorWithPadding

from hf_blockkd.data.checks import check_dropped_columns
from hf_blockkd.pairing.vocabularies import check_vocabularies

from ..helpers.tiny_models import LABELS, VOCABULARY, tiny_bert, tiny_llama, word_tokenizer
from ..helpers.training import make_trainer, text_rows, token_rows


def with_tokenizer(model, tokenizer, folder):
    """The model, as if loaded from a folder that holds a tokenizer, too."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return type(model).from_pretrained(folder)


def test_an_empty_data_set_is_refused(tmp_path):
    with pytest.raises(ValueError, match="`train_dataset` is empty"):
        make_trainer(tmp_path, tiny_bert(), tiny_bert(), [])


@pytest.mark.parametrize("kind", ["list of rows", "dataset", "dataset, class labels, shuffled"])
def test_a_class_outside_the_head_is_found_wherever_it_stands(tmp_path, kind):
    rows = text_rows(40)
    rows[37]["labels"] = torch.tensor(LABELS)
    data = rows
    if kind != "list of rows":
        data = Dataset.from_list([{name: tensor.tolist() for name, tensor in row.items()} for row in rows])
    if kind.endswith("shuffled"):
        classes = ClassLabel(num_classes=LABELS + 1)
        data = data.cast_column("labels", classes).rename_column("labels", "label").shuffle(seed=0)
    with pytest.raises(
        ValueError, match=rf"holds {LABELS} in row \d+ of the training set, but there are {LABELS} classes"
    ):
        make_trainer(tmp_path, tiny_bert(), tiny_bert(), data)


@pytest.mark.parametrize("make", [list, Dataset.from_list], ids=["list of rows", "dataset"])
def test_names_of_classes_are_refused_where_numbers_are_read(tmp_path, make):
    data = make([{"input_ids": [3, 4, 5], "label": name} for name in ("good", "bad") * 4])
    with pytest.raises(ValueError, match=r"`label` holds the text 'good' in row 0 .* look each name up in the teacher"):
        make_trainer(tmp_path, tiny_bert(), tiny_bert(), data)


def test_whole_numbers_are_no_classes_in_a_regression(tmp_path):
    data = Dataset.from_dict({"input_ids": [[3, 4, 5]] * 4, "labels": [7, 8, 9, 100]})
    make_trainer(tmp_path, tiny_bert(num_labels=1), tiny_bert(num_labels=1), data)


def test_a_collator_without_a_pad_token_is_refused(tmp_path):
    trainer = make_trainer(tmp_path, tiny_bert(), tiny_bert(), text_rows())
    collator = DataCollatorWithPadding(word_tokenizer(VOCABULARY))
    with pytest.raises(ValueError, match=r"has no pad token; set `tokenizer\.pad_token"):
        type(trainer)(
            model=tiny_bert(), teacher_model=tiny_bert(), args=trainer.args, data_collator=collator, train_dataset=[1]
        )


def test_sequences_longer_than_either_models_positions_are_refused(tmp_path):
    student, teacher = tiny_llama(max_position_embeddings=40), tiny_llama(max_position_embeddings=8)
    before = copy.deepcopy(student.state_dict())
    trainer = make_trainer(tmp_path, student, teacher, token_rows(8, length=12), max_steps=1)
    with pytest.raises(
        ValueError, match=r"12 tokens in `input_ids`, but `max_position_embeddings` of the teacher Llama.* is 8"
    ):
        trainer.train()
    assert all(torch.equal(before[name], value) for name, value in student.state_dict().items() if name in before)


def test_a_column_that_a_transform_needs_is_not_dropped_unseen(tmp_path):
    rows = text_rows()
    data = Dataset.from_dict({"words": [row["input_ids"].tolist() for row in rows], "labels": [0, 1] * 4})
    data = data.with_transform(lambda batch: {"input_ids": torch.tensor(batch["words"]), "labels": batch["labels"]})
    trainer = make_trainer(tmp_path, tiny_bert(), tiny_bert(), data, max_steps=1)
    with pytest.raises(ValueError, match=r"The column 'words' is read.*`remove_unused_columns=False`"):
        trainer.train()
    make_trainer(tmp_path, tiny_bert(), tiny_bert(), data, max_steps=1, remove_unused_columns=False).train()
    # None is left, which the stock trainer sees by itself.
    trainer = make_trainer(tmp_path, tiny_bert(), tiny_bert(), data.select_columns("words"), max_steps=1)
    with pytest.raises(ValueError, match="`remove_unused_columns=False`"):
        trainer.train()


def test_looking_at_a_row_leaves_the_random_state_alone():
    state = torch.get_rng_state()
    check_dropped_columns([{"a": 1}], lambda rows: torch.rand(3), ["b"])
    assert torch.equal(torch.get_rng_state(), state)


def test_different_tokenizers_are_refused(tmp_path):
    student, teacher = tiny_llama(), tiny_llama()
    teacher = with_tokenizer(teacher, word_tokenizer(VOCABULARY, prefix="x"), tmp_path)
    with pytest.raises(ValueError, match=r"token 1 is 'w1' for the student's.*'x1' for the teacher's"):
        check_vocabularies(student, teacher, word_tokenizer(VOCABULARY))
    check_vocabularies(student, teacher, word_tokenizer(VOCABULARY, prefix="x"))


def test_the_students_tokenizer_is_found_beside_its_weights(tmp_path):
    student = with_tokenizer(tiny_llama(), word_tokenizer(VOCABULARY), tmp_path / "student")
    teacher = with_tokenizer(tiny_llama(), word_tokenizer(VOCABULARY, prefix="x"), tmp_path / "teacher")
    with pytest.raises(ValueError, match="The tokenizers differ"):
        check_vocabularies(student, teacher)


def test_padded_vocabularies_of_one_tokenizer_pass(tmp_path):
    student = tiny_llama(vocab_size=VOCABULARY + 64)
    teacher = with_tokenizer(tiny_llama(vocab_size=VOCABULARY), word_tokenizer(VOCABULARY - 3), tmp_path)
    check_vocabularies(student, teacher, word_tokenizer(VOCABULARY - 3))


def test_vocabularies_that_differ_by_more_than_padding_are_refused_where_no_tokenizer_can_be_compared():
    with pytest.raises(ValueError, match=f"{VOCABULARY} rows for the student.*{VOCABULARY + 2000} for the teacher"):
        check_vocabularies(tiny_llama(), tiny_llama(vocab_size=VOCABULARY + 2000))


def test_a_streamed_data_set_trains(tmp_path):
    rows = [{name: tensor.tolist() for name, tensor in row.items()} for row in token_rows()]
    stream = Dataset.from_list(rows).to_iterable_dataset(num_shards=2).with_format("torch")
    trainer = make_trainer(tmp_path, tiny_llama(), tiny_llama(num_hidden_layers=4), stream, max_steps=3)
    trainer.train()
    assert json.loads(json.dumps(trainer.state.log_history))[0]["loss"] > 0
    assert trainer.state.global_step == 3
