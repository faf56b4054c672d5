"""What every model between student and teacher is worth, and costs."""

import json

import pytest
import torch
from peft import LoraConfig
from torch.utils.flop_counter import FlopCounterMode

from hf_blockkd import load_stepping_stone
from hf_blockkd.commands.report import report
from hf_blockkd.ladder.costs import model_costs
from hf_blockkd.models.flops import forward_flops

from ..helpers.tiny_models import tiny_bert, tiny_llama, tiny_resnet, tiny_vit
from ..helpers.training import assert_same_state, batch_of, image_rows, make_trainer, state_of, text_rows, token_rows

PAIRS = {
    "images": (lambda: (tiny_vit(hidden_size=8, num_hidden_layers=2), tiny_vit(num_hidden_layers=4)), image_rows),
    "texts": (lambda: (tiny_bert(hidden_size=8, num_hidden_layers=2), tiny_bert(num_hidden_layers=4)), text_rows),
    "language": (lambda: (tiny_llama(hidden_size=8, num_hidden_layers=2), tiny_llama(num_hidden_layers=4)), token_rows),
}


def bfloat16() -> torch.autocast:
    return torch.autocast("cpu", torch.bfloat16)


def always(prediction) -> dict[str, float]:
    return {"always": 0.5}


@pytest.mark.parametrize("name", PAIRS)
def test_a_ladder_tells_what_every_model_is_worth_and_costs(name, tmp_path):
    build, rows = PAIRS[name]
    settings = {"num_blocks": 2, "objective": "ladder", "max_steps": 1}
    trainer = make_trainer(tmp_path, *build(), rows(8), eval_dataset=rows(8), **settings)
    trainer.train()
    before = state_of(trainer.model)
    rungs = trainer.evaluate_ladder()
    assert_same_state(state_of(trainer.model), before)
    assert [rung["rung"] for rung in rungs] == ["student", "stone 2", "stone 1", "teacher"]
    apart = trainer.evaluate() | trainer.evaluate_stepping_stones()
    assert [rung["test"] for rung in rungs] == [
        apart[f"eval_{whose}loss"] for whose in ("", "stone_2_", "stone_1_", "teacher_")
    ]
    batch = {key: value for key, value in batch_of(rows(8)).items() if key != "labels"}
    for index, rung in ((2, rungs[1]), (1, rungs[2])):
        trainer.save_stepping_stone(index, tmp_path / "stone")
        stone = load_stepping_stone(tmp_path / "stone")
        for part in (stone.body, stone.tail):
            part.set_attn_implementation("eager")  # torch does not count the kernels of a CPU
        with FlopCounterMode(display=False) as counter:
            stone(**batch)
        assert rung["flops"] == counter.get_total_flops() / 8
        assert rung["parameters"] == sum(parameter.numel() for parameter in stone.parameters())
    assert all(rung["time"] > 0 for rung in rungs)
    lines = (tmp_path / "ladder.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == rungs


OTHER_SIZES = {
    "both of any size": lambda: (tiny_resnet(hidden_sizes=[8, 16]), tiny_resnet()),
    "a student of any size": lambda: (tiny_resnet(hidden_sizes=[8, 16]), tiny_vit(image_size=16, num_hidden_layers=4)),
    "a larger teacher": lambda: (tiny_vit(num_hidden_layers=2), tiny_vit(image_size=16, num_hidden_layers=4)),
}


@pytest.mark.parametrize("index", [1, 2])
@pytest.mark.parametrize("name", OTHER_SIZES)
def test_stones_see_the_images_of_the_run_whatever_the_sizes_of_the_models(name, index, tmp_path):
    rows = image_rows(8)
    settings = {"num_blocks": 2, "objective": "ladder", "max_steps": 1}
    student, teacher = OTHER_SIZES[name]()
    trainer = make_trainer(tmp_path, student, teacher, rows, eval_dataset=rows, **settings)
    trainer.train()
    expected = trainer.stepping_stone_logits(batch_of(rows))[index]
    trainer.save_stepping_stone(index, tmp_path / "stone")
    stone = load_stepping_stone(tmp_path / "stone")
    images = {"pixel_values": batch_of(rows)["pixel_values"]}
    assert torch.equal(stone(**images).logits, expected)
    assert torch.equal(trainer.stepping_stone_logits(batch_of(rows))[index], expected)
    rungs = {rung["rung"]: rung for rung in trainer.evaluate_ladder()}
    assert rungs[f"stone {index}"]["flops"] == forward_flops(stone, images) / 8


def test_stones_see_tokens_that_both_models_have(tmp_path):
    student, teacher = tiny_llama(num_hidden_layers=2), tiny_llama(num_hidden_layers=4, vocab_size=72)
    trainer = make_trainer(tmp_path, student, teacher, token_rows(8), num_blocks=2, max_steps=1)
    trainer.train()
    trainer.save_stepping_stone(1, tmp_path / "stone")
    batch = batch_of(token_rows(8))
    logits = load_stepping_stone(tmp_path / "stone")(**{k: v for k, v in batch.items() if k != "labels"}).logits
    assert torch.equal(logits, trainer.stepping_stone_logits(batch)[1])


def test_the_rungs_are_those_that_the_objective_runs_and_the_student_is_one_where_it_has_a_head(tmp_path):
    build, rows = PAIRS["texts"]

    def rungs(**settings) -> list[str]:
        trainer = make_trainer(tmp_path, *build(), rows(8), eval_dataset=rows(8), num_blocks=2, **settings)
        return [rung["rung"] for rung in trainer.evaluate_ladder()]

    assert rungs(objective="ladder", stepping_stones=[1], state_blocks="all") == ["student", "stone 1", "teacher"]
    assert rungs(objective="kd") == ["student", "stone 2", "stone 1", "teacher"]
    assert rungs(objective="simkd") == ["stone 2", "teacher"]


def test_an_adapter_is_merged_into_all_that_is_measured(tmp_path):
    lora = LoraConfig(target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    model, rows = tiny_llama(num_hidden_layers=4), token_rows(8)
    trainer = make_trainer(tmp_path, model, None, rows, eval_dataset=rows, num_blocks=2, peft_config=lora)
    student, *_, teacher = trainer.evaluate_ladder()
    assert [student[name] for name in ("flops", "parameters")] == [teacher[name] for name in ("flops", "parameters")]


def test_a_frozen_teacher_casts_its_weights_as_often_as_a_student():
    casts = {}
    for trains in (True, False):
        model = tiny_vit().requires_grad_(trains)
        with torch.profiler.profile() as profile:
            model_costs(model, {"pixel_values": batch_of(image_rows(2))["pixel_values"]}, bfloat16)
        casts[trains] = sum(event.count for event in profile.key_averages() if event.key == "aten::_to_copy")
    assert casts[True] == casts[False] > 0


def test_the_report_of_a_run_draws_its_ladder(tmp_path):
    build, rows = PAIRS["images"]
    trainer = make_trainer(tmp_path, *build(), rows(8), eval_dataset=rows(8), num_blocks=2, max_steps=1)
    trainer.train()
    trainer.evaluate_ladder()
    trainer.save_state()
    found = report(tmp_path)
    assert tmp_path / "ladder.png" in found.pictures
    assert "From student to teacher" in found.page.read_text(encoding="utf-8")


def test_the_metric_of_a_ladder_is_that_of_the_report_and_one_that_is_not_there_is_refused(tmp_path):
    build, rows = PAIRS["images"]
    settings = {"num_blocks": 2, "compute_metrics": always}
    trainer = make_trainer(tmp_path, *build(), rows(8), eval_dataset=rows(8), **settings)
    assert {rung["metric"] for rung in trainer.evaluate_ladder()} == {"loss"}
    assert {rung["metric"] for rung in trainer.evaluate_ladder(metric="always")} == {"always"}
    with pytest.raises(ValueError, match=r"`metric` is 'f1', which no evaluation gives; choose one of loss, always"):
        trainer.evaluate_ladder(metric="f1")
    unlabelled = [{"pixel_values": row["pixel_values"]} for row in rows(8)]
    with pytest.raises(ValueError, match="`eval_dataset` has no labels, so no model can be told"):
        trainer.evaluate_ladder(unlabelled)
    with pytest.raises(ValueError, match=r"a dict of 'a', but a ladder is measured on one data set"):
        trainer.evaluate_ladder({"a": rows(8)})
