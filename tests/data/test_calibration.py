"""Batches to measure a model on, from whatever a person has for data."""

import random

import pytest
import torch
from datasets import Dataset, DatasetDict
from torch.utils.data import DataLoader
from transformers import BertTokenizerFast, DataCollatorWithPadding

from hf_blockkd.data.calibration import batches_for, calibration_batches, calibration_rows

from ..helpers import tiny_models as tiny
from ..helpers.training import Lazy, image_rows, text_rows, token_rows


def as_lists(rows):
    return [{name: value.tolist() for name, value in row.items()} for row in rows]


class Stream(torch.utils.data.IterableDataset):
    def __init__(self, rows):
        self.rows = rows

    def __iter__(self):
        return iter(self.rows)


def joined(batches):
    batches = list(batches)
    return {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}


@pytest.mark.parametrize("make", [Lazy, list, lambda rows: Dataset.from_list(as_lists(rows))])
def test_every_kind_of_data_gives_the_same_examples_in_an_order_of_the_seed(make):
    rows = text_rows(20)
    order = torch.randperm(20, generator=torch.Generator().manual_seed(3)).tolist()[:12]
    batches = list(batches_for(tiny.tiny_bert(), make(rows), seed=3, num_examples=12))
    assert [len(batch["input_ids"]) for batch in batches] == [8, 4]
    assert batches[0].keys() == {"input_ids", "attention_mask"}
    for name, values in joined(batches).items():
        assert torch.equal(values, torch.stack([rows[i][name] for i in order]))


def test_a_stream_gives_its_first_examples():
    rows = text_rows(20)
    for stream in (Stream(rows), iter(rows)):
        ids = joined(batches_for(tiny.tiny_bert(), stream, num_examples=9))["input_ids"]
        assert torch.equal(ids, torch.stack([row["input_ids"] for row in rows[:9]]))


def test_columns_that_the_forward_does_not_take_and_labels_are_left_out():
    rows = [{**row, "text": "words", "index": 3, "labels": None} for row in text_rows(8)]
    (batch,) = batches_for(tiny.tiny_bert(), rows)
    assert batch.keys() == {"input_ids", "attention_mask"}


def test_names_of_classes_do_not_reach_a_collator():
    rows = [{**row, "label": "good"} for row in text_rows(8)]
    (batch,) = batches_for(tiny.tiny_bert(), rows, DataCollatorWithPadding(tiny.word_tokenizer(9, pad_token="w1")))
    assert batch.keys() == {"input_ids", "attention_mask"}


def test_a_transform_of_the_data_set_keeps_the_columns_that_it_reads():
    data = Dataset.from_dict({"grey": [[[[float(i)] * 8] * 8] for i in range(8)], "label": [0] * 8})
    data.set_transform(lambda rows: {"pixel_values": torch.tensor(rows["grey"]), "label": rows["label"]})
    (batch,) = batches_for(tiny.tiny_vit(), data)
    assert batch.keys() == {"pixel_values"}
    assert batch["pixel_values"].shape == (8, 1, 8, 8)


def test_a_collator_that_pads_gets_no_text_and_one_that_tokenizes_gets_it():
    tokenizer = BertTokenizerFast(vocab={"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3, "a": 4, "b": 5})
    model = tiny.tiny_bert()
    texts = ["a b", "a", "b b a", "b"] * 2
    padded = DataCollatorWithPadding(tokenizer)
    tokens = [{"text": text, "label": 1, **tokenizer(text)} for text in texts]
    raw = [{"text": text, "label": 1} for text in texts]
    expected = tokenizer(texts, padding=True, return_tensors="pt")
    order = torch.randperm(8, generator=torch.Generator().manual_seed(0))
    for data, collator in (
        (tokens, padded),
        (raw, lambda rows: tokenizer([row["text"] for row in rows], padding=True, return_tensors="pt")),
    ):
        (batch,) = batches_for(model, data, collator)
        assert torch.equal(batch["input_ids"], expected["input_ids"][order])


@pytest.mark.parametrize("build", [tiny.tiny_t5, tiny.tiny_bart])
def test_a_decoder_reads_the_labels_where_nothing_else_is_given(build):
    model = build()
    rows = token_rows(8)
    batch = joined(batches_for(model, rows))
    order = torch.randperm(8, generator=torch.Generator().manual_seed(0)).tolist()
    labels = torch.stack([rows[i]["labels"] for i in order])
    assert "labels" not in batch
    assert torch.equal(batch["decoder_input_ids"], model.prepare_decoder_input_ids_from_labels(labels))
    assert torch.equal(batch["decoder_attention_mask"].bool(), labels != -100)


def test_images_have_the_dtype_of_the_weights_and_tokens_stay_whole_numbers():
    (images,) = batches_for(tiny.tiny_vit().to(torch.bfloat16), image_rows(8))
    assert images["pixel_values"].dtype == torch.bfloat16
    (texts,) = batches_for(tiny.tiny_bert().to(torch.bfloat16), text_rows(8))
    assert {value.dtype for value in texts.values()} == {torch.long}


def test_what_is_drawn_at_random_follows_from_the_seed_alone():
    def collate(rows):
        return {"pixel_values": torch.rand(len(rows), 1, 8, 8) + random.random()}

    model, rows = tiny.tiny_vit(), image_rows(16)
    state = torch.get_rng_state()
    first = joined(batches_for(model, rows, collate, seed=1))["pixel_values"]
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(3)
    assert torch.equal(joined(batches_for(model, rows, collate, seed=1))["pixel_values"], first)
    assert not torch.equal(joined(batches_for(model, rows, collate, seed=2))["pixel_values"], first)


def test_rows_and_batches_of_a_run_are_those_of_its_seed():
    rows = calibration_rows(list(range(30)), seed=5, num_examples=20)
    order = torch.randperm(30, generator=torch.Generator().manual_seed(5)).tolist()[:20]
    assert list(rows) == order
    assert list(calibration_batches(rows, list, seed=5)) == [order[:8], order[8:16], order[16:]]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "`data` has 0 examples, too few to measure the model on; give it at least 8, better 256"),
        (text_rows(7), "`data` has 7 examples"),
        (iter(text_rows(7)), "`data` has 7 examples"),
        (torch.ones(9, 4), "`data` is of type Tensor, but must be a data set"),
        (DataLoader(text_rows(16)), "`data` is of type DataLoader, but must be a data set"),
        ("sst2", "`data` is of type str, but must be a data set, one split of it, or a list of rows"),
        (DatasetDict(train=Dataset.from_list([])), "`data` is of type DatasetDict"),
        (5, "`data` is of type int"),
        ([{"text": "a", "label": 1}] * 8, "The rows of `data` have text, label, of which the forward of BertForSeq"),
        ([{"label": 1}] * 8, r"takes nothing but labels; apply its tokenizer or image processor first"),
        ([{"input_ids": [1] * n} for n in range(1, 9)], r"The default collator makes no batch .* `data_collator` that"),
    ],
)
def test_data_that_a_model_cannot_be_measured_on_is_refused(data, message):
    with pytest.raises(ValueError, match=message):
        next(batches_for(tiny.tiny_bert(), data))


def test_a_collator_that_makes_nothing_for_the_model_is_refused():
    with pytest.raises(ValueError, match="`data_collator` makes batches of words, of which the forward of BertForSeq"):
        next(batches_for(tiny.tiny_bert(), text_rows(8), lambda rows: {"words": rows}))
