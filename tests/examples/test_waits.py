"""A step reads values of tensors, for which a GPU would be waited for, no more often than the stock trainer's does."""

import pytest
import torch
from benchmarks.peers import DocsRecipe
from benchmarks.waits import Waits, reads_of_a_step
from transformers import TrainingArguments

from ..helpers.tiny_models import tiny_bert, tiny_llama, tiny_vit
from ..helpers.training import QUIET, image_rows, make_trainer, text_rows, token_rows

FAMILIES = {"vit": (tiny_vit, image_rows), "bert": (tiny_bert, text_rows), "llama": (tiny_llama, token_rows)}
SETTINGS = {"max_steps": 3, "logging_steps": 100}


def both(folder, family, stock=None, **settings):
    build, rows = FAMILIES[family]
    arguments = {name: value for name, value in QUIET.items() if name != "num_blocks"} | SETTINGS | (stock or {})
    models = {"model": build(num_hidden_layers=2), "teacher": build()}
    recipe = DocsRecipe(**models, args=TrainingArguments(str(folder), **arguments), train_dataset=rows(24))
    ours = make_trainer(folder, build(num_hidden_layers=2), build(), rows(24), **SETTINGS, **(stock or {}), **settings)
    return reads_of_a_step(recipe), reads_of_a_step(ours)


@pytest.mark.parametrize("settings", [{"objective": "kd"}, {"state_blocks": "last_two"}], ids=["kd", "states"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_step_reads_as_often_as_the_stock_trainers_does(tmp_path, family, settings):
    stock, ours = both(tmp_path, family, **settings)
    assert sum(ours.values()) == sum(stock.values()), (ours, stock)


@pytest.mark.parametrize("family", FAMILIES)
def test_stones_read_nothing_more(tmp_path, family):
    stock, ours = both(tmp_path, family, stepping_stones="all")
    assert sum(ours.values()) == sum(stock.values()), (ours, stock)


def test_losses_of_a_window_are_read_together(tmp_path):
    stock, ours = both(tmp_path, "vit", {"gradient_accumulation_steps": 2}, objective="kd")
    assert sum(ours.values()) == 3 < sum(stock.values()) == 4, (ours, stock)


@pytest.mark.parametrize(
    ("read", "kind"),
    [
        (lambda one: one.sum().item(), "item"),
        (lambda one: bool(one[0] > 0), "item"),
        (lambda one: one.tolist(), "tolist"),
        (lambda one: one.nonzero(), "nonzero"),
        (lambda one: one[one > 0], "index by a mask"),
        (lambda one: one.cpu(), "cpu"),
        (lambda one: one.long().bincount(), "bincount"),
    ],
)
def test_reads_are_counted_by_place_and_kind(read, kind):
    with Waits() as waits:
        read(torch.ones(3) * 2)
    ((place, count),) = waits.places.items()
    assert place.startswith("examples/test_waits.py:")
    assert place.endswith(kind)
    assert count == 1
