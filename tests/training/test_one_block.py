"""The teacher with one block of the student's, against models put together by hand, and its metrics."""

import copy

import pytest
import torch
from peft import LoraConfig

from hf_blockkd.saving.last_evaluation import last_evaluation
from hf_blockkd.training.evaluation import run_hybrid
from hf_blockkd.training.one_block import OneBlock, fitted_paths

from ..helpers.tiny_models import tiny_bert, tiny_llama, tiny_resnet, tiny_t5, tiny_vit
from ..helpers.training import (
    assert_same_state,
    batch_of,
    image_rows,
    make_trainer,
    state_of,
    step_logs,
    text_rows,
    token_rows,
)
from ..helpers.walks import walk

ENDS = {"S": [0, 1, 2, 3], "T": [0, 2, 3, 5]}
BLOCKS = range(1, 4)
CASES = {
    "bert": (tiny_bert, text_rows, "num_hidden_layers"),
    "llama": (tiny_llama, token_rows, "num_hidden_layers"),
    "t5": (tiny_t5, token_rows, "num_decoder_layers"),
}


def trainer_of(folder, case, width=12, **settings):
    build, make_rows, depth = CASES[case]
    name = "d_model" if case == "t5" else "hidden_size"
    student, teacher = build(**{depth: 3, name: width}), build(**{depth: 5})
    settings = {"student_boundaries": ENDS["S"][1:], "teacher_boundaries": ENDS["T"][1:], **settings}
    return make_trainer(folder, student, teacher, make_rows(16), eval_dataset=make_rows(6, seed=1), **settings)


def paths_of(trainer):
    return fitted_paths(trainer.pair, trainer.model, trainer.calibration_batches(), trainer.accelerator)


@torch.no_grad()
def hybrid(trainer, what, batch):
    return run_hybrid(trainer.pair, trainer.model.eval(), trainer.pair.complete(batch), what).logits


@pytest.mark.parametrize("case", CASES)
def test_hybrids_are_what_a_loop_over_layers_and_maps_makes(tmp_path, case):
    trainer = trainer_of(tmp_path, case)
    batch, paths = batch_of(trainer.eval_dataset), paths_of(trainer)
    walks = {owner: walk(model, batch) for owner, model in (("S", trainer.model.eval()), ("T", trainer.teacher))}

    def through(owner, block, states):
        first, last = ENDS[owner][block - 1 : block + 1]
        for layer in walks[owner].layers[first:last]:
            states = walks[owner].call(layer, states)
        return states

    for block in BLOCKS:
        for is_entry in (False, True)[: 1 + (block > 1)]:
            with torch.no_grad():
                states = walks["S" if block == 1 else "T"].states
                for one in BLOCKS:
                    if one != block:
                        states = through("T", one, states)
                        continue
                    if one > 1:
                        states = paths.connectors["S"][one - 2](states)
                    if is_entry:
                        states = through("T", one, paths.connectors["T"][one - 2](states))
                    else:
                        states = paths.connectors["T"][one - 1](through("S", one, states))
                expected = walks["T"].head(states)
            found = hybrid(trainer, OneBlock(paths, block, is_entry), batch)
            assert (found - expected).abs().max() < 1e-5


@pytest.mark.parametrize("case", ["bert", "llama"])
def test_the_maps_are_least_squares_corrections_of_what_they_are_made_as(tmp_path, case):
    trainer = trainer_of(tmp_path, case)
    made, paths = trainer.pair.new_paths(), paths_of(trainer)
    for source, target in ("ST", "TS"):
        for index in range(1, 4 if target == "T" else 3):
            xs, ys = [], []
            for batch in trainer.calibration_batches():
                states = {}
                for owner, model in (("S", trainer.model.eval()), ("T", trainer.teacher)):
                    with torch.no_grad():
                        one = walk(model, batch)
                        value = one.states
                        for layer in one.layers[: ENDS[owner][index]]:
                            value = one.call(layer, value)
                    states[owner] = value[batch["attention_mask"].bool()].double()
                xs.append(states[source]), ys.append(states[target])
            x, y = torch.cat(xs), torch.cat(ys)
            first, fitted = (some.connectors[target][index - 1].double() for some in (made, paths))
            with torch.no_grad():
                lacking = y - first(x)
                z = (x - x.mean(0)) / x.std(0, correction=0)
                z1 = torch.cat([z, torch.ones_like(z[:, :1])], 1)
                penalty = len(x) * torch.eye(z1.shape[1], dtype=z1.dtype)
                penalty[-1, -1] = 0
                change = z1 @ torch.linalg.solve(z1.T @ z1 + penalty, z1.T @ lacking)
                assert (fitted(x) - first(x) - change).abs().max() < 1e-4


@pytest.mark.parametrize(
    ("build", "make_rows"),
    [(tiny_bert, text_rows), (tiny_llama, token_rows), (tiny_t5, token_rows), (tiny_vit, image_rows)],
    ids=["bert", "llama", "t5", "vit"],
)
def test_a_student_that_is_its_teacher_costs_nothing_to_the_bit(tmp_path, build, make_rows):
    teacher = build()
    trainer = make_trainer(tmp_path, copy.deepcopy(teacher), teacher, make_rows(8), eval_dataset=make_rows(6, seed=1))
    batch, paths = batch_of(trainer.eval_dataset), paths_of(trainer)
    clean = hybrid(trainer, "teacher", batch)
    for block, is_entry in ((1, False), (2, False), (2, True)):
        assert torch.equal(hybrid(trainer, OneBlock(paths, block, is_entry), batch), clean)


def test_states_of_another_layout_are_bridged_both_ways(tmp_path):
    trainer = make_trainer(tmp_path, tiny_resnet(), tiny_vit(), image_rows(8), eval_dataset=image_rows(6, seed=1))
    before = state_of(trainer.model)  # batch norms that have seen no batch yet
    metrics = trainer.evaluate_blocks()
    assert {name for name in metrics if name.endswith("_loss")} == {
        f"eval_{name}_loss" for name in ("teacher", "block_1", "block_2_entry", "block_2")
    }
    assert_same_state(before, state_of(trainer.model))


def test_maps_that_nobody_has_any_more_are_forgotten(tmp_path):
    trainer = make_trainer(tmp_path, tiny_resnet(), tiny_vit(), image_rows(8), eval_dataset=image_rows(6, seed=1))
    known = len(trainer.pair.geometry._bridged)
    for _ in range(2):
        trainer.evaluate_blocks()
        assert len(trainer.pair.geometry._bridged) == known


# ---- The trainer ----


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_metrics_are_those_of_the_hybrids_and_are_logged(tmp_path, lora):
    adapter = LoraConfig(r=2, target_modules=["query"]) if lora else None
    rows = text_rows(7, seed=1)
    trainer = make_trainer(
        tmp_path,
        tiny_bert(num_hidden_layers=2, hidden_size=12),
        tiny_bert(),
        text_rows(8),
        eval_dataset=rows,
        compute_metrics=lambda prediction: {"largest": prediction.predictions.max()},
        max_steps=2,
        peft_config=adapter,
    )
    trainer.train()
    metrics = trainer.evaluate_blocks()
    batch, paths = batch_of(rows), paths_of(trainer)
    hybrids = {
        "teacher": "teacher",
        "block_1": OneBlock(paths, 1),
        "block_2_entry": OneBlock(paths, 2, is_entry=True),
        "block_2": OneBlock(paths, 2),
    }
    for name, what in hybrids.items():
        logits = hybrid(trainer, what, batch)
        loss = torch.nn.functional.cross_entropy(logits, batch["labels"]).item()
        assert metrics[f"eval_{name}_loss"] == pytest.approx(loss, rel=1e-5)
        assert metrics[f"eval_{name}_largest"] == pytest.approx(logits.max().item(), rel=1e-5)
    assert trainer.state.log_history[-1]["eval_block_2_loss"] == metrics["eval_block_2_loss"]
    # Of the models that the card tells of, it is the teacher's alone.
    _, table = last_evaluation(trainer.state, trainer.args)
    assert {name: set(values) for name, values in table[""].items()} == {"loss": {"teacher"}, "largest": {"teacher"}}


def test_models_without_a_head_are_judged_by_their_vectors(tmp_path):
    teacher = tiny_bert("", num_hidden_layers=4)
    rows = [{name: value for name, value in row.items() if name != "labels"} for row in text_rows(8)]
    trainer = make_trainer(tmp_path, copy.deepcopy(teacher), teacher, rows, eval_dataset=rows)
    metrics = trainer.evaluate_blocks()
    assert [metrics[f"eval_{name}_loss"] for name in ("teacher", "block_1", "block_2_entry", "block_2")] == (
        pytest.approx([0.0] * 4, abs=1e-6)
    )


def test_each_of_several_data_sets_has_costs_of_its_own(tmp_path):
    sets = {"near": image_rows(4, seed=1), "far": image_rows(6, seed=2)}
    trainer = make_trainer(tmp_path, tiny_vit(num_hidden_layers=2), tiny_vit(), image_rows(8), eval_dataset=sets)
    metrics = trainer.evaluate_blocks()
    for name, rows in sets.items():
        alone = trainer.evaluate_blocks(rows)
        assert metrics[f"eval_{name}_block_2_entry_loss"] == alone["eval_block_2_entry_loss"]


def test_it_changes_nothing_of_the_training(tmp_path):
    def trained(often):
        torch.manual_seed(0)
        student = tiny_bert(num_hidden_layers=2, hidden_size=12, hidden_dropout_prob=0.3)
        trainer = make_trainer(
            tmp_path, student, tiny_bert(), text_rows(), eval_dataset=text_rows(), max_steps=3, connector="linear"
        )
        if often:
            trainer.evaluate_blocks()
        before = state_of(trainer.connectors)
        trainer.train()
        if often:
            trainer.evaluate_blocks()
        return before, state_of(student), state_of(trainer.connectors), [one["loss"] for one in step_logs(trainer)]

    for one, other in zip(trained(True)[:3], trained(False)[:3], strict=True):
        assert_same_state(one, other)


def test_models_in_shards_are_refused(tmp_path):
    trainer = make_trainer(tmp_path, tiny_bert(num_hidden_layers=2), tiny_bert(), text_rows(), eval_dataset=text_rows())
    trainer.is_fsdp_enabled = True
    with pytest.raises(ValueError, match="sharded over processes; load the saved student"):
        trainer.evaluate_blocks()


def test_it_needs_examples_to_fit_to(tmp_path):
    trainer = make_trainer(tmp_path, tiny_vit(num_hidden_layers=2), tiny_vit(), eval_dataset=image_rows(4))
    with pytest.raises(ValueError, match=r"`evaluate_blocks` fits maps .* but `train_dataset` has none"):
        trainer.evaluate_blocks()
