"""Every objective against its sources, written again over models that are put together by hand."""

import copy
import logging as pylogging
import random
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForSequenceClassification, Trainer, TrainingArguments
from transformers.utils import logging

from hf_blockkd import BlockwiseDistillConfig, make_student
from hf_blockkd.objectives import OBJECTIVES
from hf_blockkd.objectives.hint import state_error
from hf_blockkd.objectives.theseus import replacing_rate

from ..helpers import references
from ..helpers.tiny_models import (
    tiny_bart,
    tiny_bert,
    tiny_llama,
    tiny_mixtral,
    tiny_resnet,
    tiny_t5,
    tiny_vit,
    tiny_xlnet,
)
from ..helpers.training import (
    PLAIN_SGD,
    Gradients,
    assert_same_state,
    batch_of,
    image_rows,
    make_trainer,
    max_difference,
    state_of,
    step_logs,
    text_rows,
    token_rows,
)
from ..helpers.walks import Walk, walk

NUM_BLOCKS, TEMPERATURE, SEED = 3, 2.0, 8
ENDS = {"S": [1, 2, 3], "T": [2, 3, 5]}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
SETTINGS = {
    "student_boundaries": ENDS["S"],
    "teacher_boundaries": ENDS["T"],
    "temperature": TEMPERATURE,
    "task_weight": 0.7,
    "distill_weight": 1.3,
    "hint_weight": 0.4,
    "state_weight": 0.6,
    "stone_weight": 0.9,
    "connector_start": "random",
    "stepping_stones": "all",
    "connector": "linear",
    "seed": SEED,
    "max_steps": 1,
    **PLAIN_SGD,
}


def bert_pair(student_width: int = 12):
    student = tiny_bert(hidden_size=student_width, num_hidden_layers=3, **NO_DROPOUT)
    return student, tiny_bert(hidden_size=16, num_hidden_layers=5, **NO_DROPOUT)


def llama_pair(student_width: int = 12):
    return tiny_llama(hidden_size=student_width, num_hidden_layers=3), tiny_llama(num_hidden_layers=5)


PAIRS = {"bert": (bert_pair, text_rows), "llama": (llama_pair, token_rows)}


def one_step(folder, student, teacher, rows, **config):
    """Gradients by name and logs of one step, and copies of the models and connectors that took it."""
    gradients = Gradients()
    config = {**SETTINGS, "per_device_train_batch_size": 8, **config}
    trainer = make_trainer(folder, student, teacher, rows, callbacks=[gradients], **config)
    before = copy.deepcopy((student, teacher, trainer.pair.all_connectors))
    trainer.train()
    (logs,) = step_logs(trainer)
    return gradients.steps[0], logs, before


# ---- The parts that the references are made of ----


def layers_of(walks: dict[str, Walk], owner: str, first: int, last: int, states: Tensor) -> Tensor:
    """States after blocks `first` to `last` (from 1) of a model."""
    for layer in walks[owner].layers[([0] + ENDS[owner])[first - 1] : ENDS[owner][last - 1]]:
        states = walks[owner].call(layer, states)
    return states


def path_logits(walks: dict[str, Walk], connectors, path: str) -> Tensor:
    states = walks[path[0]].states
    for block, owner in enumerate(path, start=1):
        if block > 1 and path[block - 2] != owner:
            # The way back stands behind those to the teacher: one for each block but the last.
            place = block - 2 if owner == "T" else NUM_BLOCKS + block - 2
            states = connectors[place](states)
        states = layers_of(walks, owner, block, block, states)
    return walks[path[-1]].head(states)


def kept(logits: Tensor, batch) -> tuple[Tensor, Tensor]:
    labels = batch["labels"]
    if labels.ndim == 2:
        logits, labels = logits[:, :-1], labels[:, 1:]
    return logits[labels != -100], labels[labels != -100]


def task(logits: Tensor, batch) -> Tensor:
    logits, labels = kept(logits, batch)
    return (logits.logsumexp(-1) - logits[torch.arange(len(labels)), labels]).mean()


def kl(logits: Tensor, target: Tensor, batch) -> Tensor:
    q, p = ((kept(side, batch)[0] / TEMPERATURE).softmax(-1) for side in (logits, target))
    return TEMPERATURE**2 * (p * (p / q).log()).sum(-1).mean()


def hint(walks: dict[str, Walk], connectors, batch, blocks, relative: bool = False) -> Tensor:
    total = torch.zeros(())
    for block in blocks:
        ours = connectors[block - 1](layers_of(walks, "S", 1, block, walks["S"].states))
        theirs = layers_of(walks, "T", 1, block, walks["T"].states)
        errors = ((ours - theirs) ** 2).mean(-1)
        if relative:
            errors = (ours - theirs).norm(dim=-1) ** 2 / theirs.norm(dim=-1) ** 2
        if batch["labels"].ndim == 2:
            total = total + errors[:, :-1][batch["labels"][:, 1:] != -100].mean()
        else:
            mask = batch["attention_mask"]
            if relative and block == NUM_BLOCKS:  # behind the last one, the pooler takes the first token
                mask = mask * (torch.arange(mask.shape[1]) == 0)
            total = total + ((errors * mask).sum(-1) / mask.sum(-1)).mean()
    return total


def by_hand(objective: str, models, batch) -> Tensor:
    student, teacher, connectors = models
    walks = {"S": walk(student, batch), "T": walk(teacher, batch)}
    own, clean = path_logits(walks, connectors, "SSS"), path_logits(walks, connectors, "TTT").detach()
    plain = 0.7 * task(own, batch) + 1.3 * kl(own, clean, batch)
    everywhere = range(1, NUM_BLOCKS + 1)
    if objective == "alone":
        return 0.7 * task(own, batch)
    if objective == "kd":
        return plain
    if objective == "hint":
        return plain + 0.4 * hint(walks, connectors, batch, everywhere)
    if objective == "simkd":
        return 0.4 * hint(walks, connectors, batch, [NUM_BLOCKS])
    if objective == "theseus":
        chance = random.Random(f"{SEED}-0")
        path = "TTT"
        while path == "TTT":
            path = "".join("S" if chance.random() < 0.3 else "T" for _ in everywhere)
        assert path == THESEUS_PATH
        return 0.7 * task(path_logits(walks, connectors, path), batch)
    if objective == "fcfd":
        drawn = random.Random(f"{SEED}-0").sample(["STT", "SST", "TSS", "TTS"], 2)
        assert sorted(drawn) == FCFD_PATHS
        mixed = sum(kl(path_logits(walks, connectors, path), clean, batch) for path in drawn)
        return plain + 0.4 * hint(walks, connectors, batch, everywhere) + 1.3 * mixed
    stones = {i: walks["T"].head(suffix(walks, connectors, i)) for i in everywhere}
    weighted = sum(
        0.9 * 2.0 ** (i - NUM_BLOCKS) * (0.7 * task(stone, batch) + 1.3 * kl(stone, clean, batch))
        for i, stone in stones.items()
    )
    states = 0.6 * hint(walks, connectors, batch, everywhere, relative=True)
    if objective == "ladder":  # one stone, by so much more as it is drawn less often
        prices = {i: (1 + ENDS["T"][-1] - ENDS["T"][i - 1]) ** -0.5 for i in everywhere}
        stone, share = stones[LADDER_STONE], prices[LADDER_STONE] / sum(prices.values())
        return plain + 0.9 / share * (0.7 * task(stone, batch) + 1.3 * kl(stone, clean, batch)) + states
    if objective == "ladder, two rungs":  # alike, and together as much as the student
        chosen = [0.7 * task(stones[i], batch) + 1.3 * kl(stones[i], clean, batch) for i in TWO_RUNGS]
        return plain + sum(chosen) / 2 + 0.6 * hint(walks, connectors, batch, TWO_RUNGS, relative=True)
    return plain + weighted + states + (0.4 * hint(walks, connectors, batch, everywhere) if "hint" in objective else 0)


def suffix(walks: dict[str, Walk], connectors, index: int) -> Tensor:
    states = connectors[index - 1](layers_of(walks, "S", 1, index, walks["S"].states))
    return layers_of(walks, "T", index + 1, NUM_BLOCKS, states) if index < NUM_BLOCKS else states


THESEUS_PATH, FCFD_PATHS, LADDER_STONE = "TST", ["STT", "TSS"], 2
"""What the seed of the tests draws; asserted, so that a change of the draw shows here and not as a wrong gradient."""
TWO_RUNGS = [1, 3]
LADDERS = {
    "ladder": {"stepping_stones": "sample"},
    "ladder, two rungs": {"objective": "ladder", "stepping_stones": TWO_RUNGS, "stone_weight": None},
}


@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("objective", [*OBJECTIVES, "block_kd+hint", "ladder, two rungs"])
def test_a_step_follows_the_gradients_of_the_objective_written_by_hand(tmp_path, objective, pair):
    build, rows = PAIRS[pair]
    settings = {"objective": objective} | LADDERS.get(objective, {})
    actual, logs, models = one_step(tmp_path, *build(), rows(8), **settings)
    student, _, connectors = models
    loss = by_hand(objective, models, batch_of(rows(8)))
    loss.backward()
    assert logs["loss"] == pytest.approx(loss.item(), rel=1e-5)
    expected = {name: p.grad for name, p in student.named_parameters() if not name.startswith("blockwise")}
    expected |= {f"blockwise_connectors.{name}": p.grad for name, p in connectors.named_parameters()}
    missing = {name for name, gradient in expected.items() if gradient is None}
    assert (
        max_difference(
            {name: gradient for name, gradient in actual.items() if name not in missing},
            {name: gradient for name, gradient in expected.items() if name not in missing},
        )
        < 1e-5
    )
    # What the objective leaves out gets no gradient but zeros.
    assert all(not actual[name].any() for name in missing & actual.keys())
    assert max(gradient.abs().max() for name, gradient in expected.items() if name not in missing) > 1e-3


@pytest.mark.parametrize("objective", ["alone", "hint", "simkd", "fcfd", "theseus", "ladder", "block_kd+hint"])
@pytest.mark.parametrize("pair", PAIRS)
def test_micro_batches_add_up_to_the_whole_batch(tmp_path, objective, pair):
    build, rows = PAIRS[pair]
    models = build()

    def gradients(size: int) -> dict[str, Tensor]:
        split = {"per_device_train_batch_size": size, "gradient_accumulation_steps": 8 // size}
        return one_step(tmp_path, *copy.deepcopy(models), rows(8), objective=objective, **split)[0]

    whole = gradients(8)
    for size in (4, 2):
        assert max_difference(gradients(size), whole) < 1e-6


def test_alone_is_the_stock_trainer_bit_for_bit(tmp_path):
    student, teacher = tiny_vit(num_hidden_layers=3), tiny_vit(num_hidden_layers=5)
    stock, rows = copy.deepcopy(student), image_rows(8)
    same = {"max_steps": 3, "save_strategy": "no", "report_to": "none", "use_cpu": True, "disable_tqdm": True}
    Trainer(stock, TrainingArguments(str(tmp_path), **same), train_dataset=rows).train()
    trainer = make_trainer(
        tmp_path, student, teacher, rows, objective="alone", per_device_train_batch_size=8, num_blocks=3, max_steps=3
    )
    calls = []
    teacher.register_forward_hook(lambda *_: calls.append(1))
    trainer.train()
    assert not calls
    assert_same_state({n: t for n, t in state_of(student).items() if "blockwise" not in n}, state_of(stock))


def test_kd_is_block_kd_without_stones(tmp_path):
    models = bert_pair()
    kd, _, _ = one_step(tmp_path, *copy.deepcopy(models), text_rows(8), objective="kd")
    settings = {"stepping_stones": "none", "state_weight": None}
    without, _, _ = one_step(tmp_path, *copy.deepcopy(models), text_rows(8), **settings)
    assert_same_state(kd, without)


@pytest.mark.parametrize("chunk_size", [4, 5])
@pytest.mark.parametrize("objective", ["alone", "simkd", "fcfd", "theseus"])
def test_chunks_change_no_gradient(tmp_path, objective, chunk_size):
    models, rows = llama_pair(), token_rows(8, length=12)
    plain, _, _ = one_step(tmp_path, *copy.deepcopy(models), rows, objective=objective, loss_chunk_size=0)
    chunked, _, _ = one_step(tmp_path, *copy.deepcopy(models), rows, objective=objective, loss_chunk_size=chunk_size)
    assert max_difference(chunked, plain) < 1e-6


def test_a_path_of_an_identical_student_with_identity_connectors_is_the_teacher_bit_for_bit(tmp_path):
    teacher = tiny_llama(num_hidden_layers=3)
    settings = {"objective": "theseus", "num_blocks": 3, "connector": "identity"}
    trainer = make_trainer(tmp_path, copy.deepcopy(teacher), teacher, token_rows(8), **settings)
    step = trainer.make_step(batch_of(token_rows(4)))
    trainer.model.eval()
    with torch.no_grad():
        step.teach(with_states=True)
        step.learn(trainer.model)
        for path in ("STS", "TST", "SST", "TTS", "TSS", "STT", "SSS"):
            assert torch.equal(step.path(path, 1.0).rows, step.teacher_rows), path


def test_the_rate_of_theseus_rises_to_one_at_half_of_the_run():
    rates = [replacing_rate(index, 200) for index in range(200)]
    assert rates[0] == 0.3
    np.testing.assert_allclose(rates[50], 0.65)
    assert rates[100:] == [1.0] * 100
    assert rates == sorted(rates)


def test_simkd_is_evaluated_under_the_teachers_head(tmp_path):
    student, teacher = bert_pair()
    rows = text_rows(7, seed=1)
    trainer = make_trainer(tmp_path, student, teacher, text_rows(8), eval_dataset=rows, objective="simkd", num_blocks=3)
    metrics = trainer.evaluate()
    batch = batch_of(rows)
    logits = trainer.stepping_stone_logits(batch)[3].detach().numpy().astype(float)
    expected = references.cross_entropy(logits, batch["labels"].numpy()).mean()
    assert metrics["eval_loss"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("objective", ["fcfd", "theseus"])
def test_connectors_back_to_the_student_are_saved_and_resumed(tmp_path, objective):
    settings = {"objective": objective, "save_strategy": "steps", "save_steps": 2, "max_steps": 4, "num_blocks": 3}
    teacher, student = tiny_bert(num_hidden_layers=5), tiny_bert(hidden_size=8, num_hidden_layers=3)
    unbroken = make_trainer(tmp_path / "a", copy.deepcopy(student), teacher, text_rows(8), **settings)
    unbroken.train()
    resumed = make_trainer(tmp_path / "b", copy.deepcopy(student), teacher, text_rows(8), **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    assert len(unbroken.connectors) == 3
    assert len(unbroken.pair.all_connectors) == 5
    assert_same_state(state_of(resumed.model), state_of(unbroken.model))


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"objective": "dark"}, r"`objective` is 'dark', but 'dark' is unknown; choose one of 'block_kd'"),
        ({"objective": "kd+kd"}, "which adds the same loss twice"),
        ({"objective": "hint+fcfd"}, "which adds the same loss twice"),
        ({"objective": "block_kd+simkd"}, "'simkd' replaces the losses of plain distillation"),
        ({"objective": "kd", "cross_weight": 1.0}, "the mean of stepping stones is a target of objective='block_kd'"),
        ({"state_weight": -1.0}, "`state_weight` must be 0 or a positive number, but is -1.0"),
        ({"stone_weight": -1.0}, "`stone_weight` must be 0 or a positive number, but is -1.0"),
        ({"stone_weight": 0.0, "cross_weight": 1.0}, "with `stone_weight=0` there is no mean of stones"),
        (
            {"stone_schedule": "cosine"},
            "`stone_schedule` is 'cosine', which is unknown; choose one of 'linear', 'const",
        ),
        ({"hint_weight": -1.0}, "`hint_weight` must be 0 or a positive number, but is -1.0"),
        ({"objective": "simkd", "hint_weight": 0}, "`hint_weight` is 0, so there is nothing for objective='simkd'"),
        ({"objective": "alone", "task_weight": 0}, "`task_weight` is 0, so there is nothing for objective='alone'"),
    ],
)
def test_objectives_that_have_no_meaning_are_refused(settings, match):
    with pytest.raises(ValueError, match=match):
        BlockwiseDistillConfig("unused", **settings)


def test_the_first_stage_of_fitnets_is_hints_alone():
    assert BlockwiseDistillConfig("unused", objective="hint", task_weight=0, distill_weight=0).hint_weight == 1.0


def test_a_linear_schedule_lets_stones_and_states_fall_to_plain_distillation(tmp_path):
    models, still = bert_pair(), {"learning_rate": 0.0, "max_steps": 4, "per_device_train_batch_size": 8}

    def losses(**config):
        trainer = make_trainer(tmp_path, *copy.deepcopy(models), text_rows(8), **{**SETTINGS, **still, **config})
        trainer.train()
        return np.array([entry["loss"] for entry in step_logs(trainer)])

    plain, constant = losses(objective="kd"), losses(stone_schedule="constant")
    assert min(constant - plain) > 0.1
    np.testing.assert_allclose(constant, constant[0], rtol=1e-6)
    np.testing.assert_allclose(losses(stone_schedule="linear") - plain, (constant - plain) * [1, 3 / 4, 2 / 4, 1 / 4])


def test_weights_that_fall_are_logged_as_what_the_loss_was_made_with(tmp_path):
    def logs(**config):
        settings = {**SETTINGS, "max_steps": 4, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
        trainer = make_trainer(tmp_path, *bert_pair(), text_rows(8), **{**settings, **config})
        trainer.train()
        return step_logs(trainer)

    falling = logs(stone_schedule="linear")
    assert [entry["state_weight"] for entry in falling] == pytest.approx([0.6, 0.45, 0.3, 0.15])
    assert [entry["stone_weight"] for entry in falling] == pytest.approx([0.9, 0.675, 0.45, 0.225])
    for entry in falling:  # those of task and distillation have the stones in them
        parts = (0.7, "loss_task"), (1.3, "loss_distill"), (entry["state_weight"], "loss_state")
        assert entry["loss"] == pytest.approx(sum(weight * entry[name] for weight, name in parts), rel=1e-3)
    alone = logs(stone_schedule="linear", stepping_stones="none", objective="block_kd+hint", state_blocks="all")
    assert "state_weight" in alone[0]
    assert "stone_weight" not in alone[0]
    assert not {"state_weight", "stone_weight"} & logs(stone_schedule="constant")[0].keys()


def test_without_a_weight_no_stone_runs(tmp_path):
    models, rows = bert_pair(), text_rows(8)

    def run(folder, **config):
        student, teacher = copy.deepcopy(models)
        calls = []
        teacher.register_forward_hook(lambda *_: calls.append(1))
        gradients, logs, _ = one_step(tmp_path / folder, student, teacher, rows, **config)
        return gradients, logs, len(calls)

    plain, _, calls_without = run("kd", objective="kd")
    _, logs, calls = run("states", stone_weight=0.0)
    assert calls == calls_without == run("all")[2] - NUM_BLOCKS - 1  # stones, and a look at the loss of their heads
    assert logs["loss"] == pytest.approx(
        0.7 * logs["loss_task"] + 1.3 * logs["loss_distill"] + 0.6 * logs["loss_state"], rel=1e-5
    )
    assert not any(name.startswith("stone_") for name in logs)
    assert_same_state(run("neither", stone_weight=0.0, state_weight=0.0)[0], plain)
    assert not any(name.startswith("stone_") for name in run("ladder", objective="ladder", stone_weight=0.0)[1])


def test_states_count_for_the_stones_that_take_part(tmp_path):
    def logs(**config):
        settings = {name: value for name, value in SETTINGS.items() if name not in ("state_weight", "stepping_stones")}
        trainer = make_trainer(tmp_path / "run", *bert_pair(), text_rows(8), **settings, **config)
        trainer.train()
        return step_logs(trainer)[0]

    last_two, last = logs(state_weight=3.0), logs(state_weight=3.0, stepping_stones=[3])
    for entry in (last_two, last):
        whole = 0.7 * entry["loss_task"] + 1.3 * entry["loss_distill"] + 3.0 * entry["loss_state"]
        assert entry["loss"] == pytest.approx(whole, rel=1e-5)
    assert 0 < last["loss_state"] < last_two["loss_state"]
    for without in (logs(stepping_stones="none"), logs()):
        assert "loss_state" not in without
    with pytest.raises(ValueError, match=r"needs its hidden states; set it to None, or `state_weight` to 0\."):
        logs(state_weight=1.0, teacher_cache=str(tmp_path / "cache"))
    assert logs(objective="kd", state_weight=1.0, teacher_cache=str(tmp_path / "cache"))["loss_distill"] > 0


def test_states_are_compared_after_other_blocks_than_those_whose_stones_run(tmp_path):
    models, rows = bert_pair(), text_rows(8)

    def step(folder, **config):
        logs = one_step(tmp_path / folder, *copy.deepcopy(models), rows, **config)[1]
        return {name: value for name, value in logs.items() if name.startswith(("stone", "loss"))}

    alone = {i: step(str(i), stepping_stones="none", state_blocks=[i]) for i in range(1, NUM_BLOCKS + 1)}
    assert not any(name.startswith("stone_") for logs in alone.values() for name in logs)
    every = step("every", stepping_stones="last_two", state_blocks="all")
    assert every["loss_state"] == pytest.approx(sum(logs["loss_state"] for logs in alone.values()), rel=1e-5)
    stones = step("stones", stepping_stones="last_two", state_weight=0.0)
    assert {name: every[name] for name in stones if "stone_" in name} == {
        name: value for name, value in stones.items() if "stone_" in name
    }
    last = step("last", stepping_stones=[NUM_BLOCKS], state_blocks="last_two")
    assert {name for name in last if "stone_" in name} == {f"stone_{NUM_BLOCKS}/task", f"stone_{NUM_BLOCKS}/distill"}
    assert last["loss_state"] == pytest.approx(alone[2]["loss_state"] + alone[3]["loss_state"], rel=1e-5)
    weighted = step("weighted", stepping_stones="none")  # with a weight of states, and no block that is named
    assert weighted["loss_state"] == pytest.approx(alone[2]["loss_state"] + alone[3]["loss_state"], rel=1e-5)
    named = step("named", stepping_stones="none", state_blocks="all", state_weight=None)
    assert named["loss_state"] == every["loss_state"]  # with the weight of a fitted run


def test_by_default_no_stone_runs_where_states_are_compared(tmp_path):
    models, rows = bert_pair(), text_rows(8)
    free = {"stone_weight": None, "stepping_stones": "auto"}

    def step(folder, **config):
        return one_step(tmp_path / folder, *copy.deepcopy(models), rows, **config)[:2]

    gradients, logs = step("default", **free)
    assert "loss_state" in logs
    assert not any(name.startswith("stone_") for name in logs)
    named, _ = step("named", stone_weight=None, stepping_stones="none", state_blocks="last_two")
    assert_same_state(gradients, named)
    assert not any(name.startswith("stone_") for name in step("sampling", **free, stone_sampling="uniform")[1])
    for asked in (
        {"state_weight": None},
        {"stone_weight": 0.5},
        {"cross_weight": 0.5},
        {"stone_weighting": "uniform"},
        {"stone_fraction": 0.5},
        {"stones_every": 2},
    ):
        assert f"stone_{NUM_BLOCKS}/distill" in step("stones", **{**free, **asked})[1], asked


def test_what_is_left_to_the_run_is_resolved_by_it(tmp_path):
    models, rows = bert_pair(), text_rows(8)

    def resolved(folder, fitted_stones=(1, 2), **config):
        free = {"stepping_stones": "auto", "stone_weight": None, "state_weight": None, "stone_schedule": None}
        trainer = make_trainer(tmp_path / folder, *copy.deepcopy(models), rows, **{**SETTINGS, **free, **config})
        trainer.pair.fitted_stones = list(fitted_stones)
        return trainer.objective.resolved(trainer.pair)

    fitted = {"state_weight": 5.0, "stone_schedule": "linear", "state_blocks": [NUM_BLOCKS - 1, NUM_BLOCKS]}
    assert resolved("default") == fitted | {"stepping_stones": "none"}
    assert resolved("kd", objective="kd") == {"stepping_stones": "none"}
    assert resolved("sum", objective="block_kd+hint") == fitted | {"stepping_stones": "none"}
    published = {"state_weight": 0.0, "stone_schedule": "constant", "stone_weight": 1.0}
    stones = {"stepping_stones": [NUM_BLOCKS - 1, NUM_BLOCKS]}
    assert resolved("random", fitted_stones=()) == published | stones


def test_states_weigh_a_tenth_where_the_student_begins_as_layers_of_the_teacher_at_its_whole_width(tmp_path):
    teacher, rows = tiny_bert(num_hidden_layers=4), text_rows(8)
    copied = make_student(teacher, num_layers=2, fit=False)
    copied.save_pretrained(tmp_path / "copied")
    copied.cut.save(tmp_path / "copied")
    fewer_neurons = make_student(teacher, num_layers=2, intermediate_size=8, data=rows)
    narrow = make_student(teacher, num_layers=2, hidden_size=8, data=rows)
    fresh = tiny_bert(num_hidden_layers=2)

    def weight(student, **config):
        trainer = make_trainer(tmp_path / "run", student, teacher, rows, **config)
        trainer.pair.fitted_stones = [1, 2]
        return trainer.objective.resolved(trainer.pair)["state_weight"]

    weights = [weight(copy.deepcopy(one)) for one in (copied, fewer_neurons, narrow, fresh)]
    assert weights == [0.5, 0.5, 5.0, 5.0]
    assert weight(copy.deepcopy(copied), objective="ladder") == 0.5
    assert weight(str(tmp_path / "copied")) == 0.5
    assert weight(copied, state_weight=5.0) == 5.0


def test_errors_of_states_do_not_depend_on_the_size_of_the_teachers(tmp_path):
    student, teacher = bert_pair()
    trainer = make_trainer(tmp_path, student, teacher, text_rows(8), **SETTINGS)
    step = trainer.make_step(batch_of(text_rows(8)))
    step.teach(with_states=True)
    step.learn(trainer.model)
    loss, _ = trainer.objective.terms(step)["state"]
    for connector in trainer.connectors:
        for parameter in connector.parameters():
            parameter.data *= 1000
    step.states["T"] = {end: states * 1000 for end, states in step.states["T"].items()}
    large, _ = trainer.objective.terms(step)["state"]
    assert large.item() == pytest.approx(loss.item(), rel=1e-5)


@pytest.mark.parametrize(("objective", "needs"), [("hint", "its hidden states"), ("alone", "none")])
def test_a_cache_of_logits_is_refused_where_they_are_not_what_is_needed(tmp_path, objective, needs):
    with pytest.raises(ValueError, match=f"objective='{objective}' needs {needs}; set it to None"):
        make_trainer(tmp_path, *bert_pair(), text_rows(), objective=objective, teacher_cache=str(tmp_path / "cache"))


def test_mixed_paths_leave_the_statistics_of_batch_norms_to_the_students_own_states(tmp_path):
    teacher, student = tiny_resnet(), tiny_resnet()
    settings = {"num_blocks": 2, "max_steps": 3, "learning_rate": 0.0, "weight_decay": 0.0}
    statistics = []
    for objective in ("kd", "fcfd"):
        trainer = make_trainer(tmp_path, copy.deepcopy(student), teacher, image_rows(), objective=objective, **settings)
        trainer.train()
        statistics.append({name: buffer.clone() for name, buffer in trainer.model.named_buffers()})
    assert any(name.endswith("running_mean") for name in statistics[0])
    assert_same_state(statistics[1], statistics[0])


def test_experts_are_balanced_as_the_stock_trainer_balances_them(tmp_path):
    student = tiny_mixtral(output_router_logits=True, router_aux_loss_coef=3.0)
    stock, rows = copy.deepcopy(student), token_rows(4)
    same = {"max_steps": 1, "save_strategy": "no", "report_to": "none", "use_cpu": True, "disable_tqdm": True}
    expected = Gradients()
    arguments = TrainingArguments(str(tmp_path), per_device_train_batch_size=4, **same, **PLAIN_SGD)
    Trainer(stock, arguments, train_dataset=rows, callbacks=[expected]).train()
    actual = Gradients()
    make_trainer(
        tmp_path, student, tiny_mixtral(), rows, callbacks=[actual], objective="alone", max_steps=1, **PLAIN_SGD
    ).train()
    gate = next(name for name in expected.steps[0] if name.endswith("gate.weight"))
    assert expected.steps[0][gate].abs().max() > 1e-4
    assert max_difference(actual.steps[0], expected.steps[0]) < 1e-6


def test_hints_leave_padding_out_whatever_the_number_of_classes(tmp_path):
    rows = text_rows(4, length=5)
    for row in rows:
        row["labels"] = torch.nn.functional.one_hot(row["labels"], 5).float()
    student, teacher = (tiny_bert(num_labels=5, problem_type="multi_label_classification", **NO_DROPOUT) for _ in "ST")
    trainer = make_trainer(tmp_path, student, teacher, rows, objective="hint")
    trainer.model.train()

    def hint(garbage: float) -> Tensor:
        step = trainer.make_step(batch_of(rows))
        step.teach(with_states=True)
        step.learn(trainer.model)
        for states in step.states["T"].values():
            states[step.inputs["attention_mask"] == 0] = garbage
        return trainer.objective.terms(step)["hint"][0]

    assert torch.equal(hint(0.0), hint(999.0))


def test_errors_of_states_leave_padding_out_where_layers_take_steps_first(tmp_path):
    """Each example's are what it has without padding, for XLNet hides padding from all others."""
    generator = torch.Generator().manual_seed(0)
    texts = [torch.randint(1, 60, (length,), generator=generator) for length in (6, 3, 4)]
    trainer = make_trainer(tmp_path, tiny_xlnet(n_layer=2, d_model=8), tiny_xlnet(), objective="hint")
    trainer.model.eval()

    def errors(texts: list[Tensor]) -> list[float]:
        length = max(map(len, texts))
        padded = [torch.cat([text.new_zeros(length - len(text)), text]) for text in texts]
        rows = [{"input_ids": x, "attention_mask": (x > 0).float(), "labels": torch.tensor(1)} for x in padded]
        step = trainer.make_step(batch_of(rows))
        step.teach(with_states=True)
        step.learn(trainer.model)
        return [state_error(step, index, relative=True).item() for index in (1, 2)]

    alone = [errors([text]) for text in texts]
    assert errors(texts) == pytest.approx([sum(each) / 3 for each in zip(*alone, strict=True)], rel=1e-5)


def test_a_stone_whose_connector_does_not_train_is_told_of(tmp_path):
    trainer = make_trainer(tmp_path, *bert_pair(), text_rows(4), num_blocks=3, max_steps=2)
    step = trainer.make_step(batch_of(text_rows(4)))
    assert list(trainer.objective.draw(step)) == [2, 3]
    trainer.args.stepping_stones = "all"
    with told() as messages:
        assert list(trainer.objective.draw(step)) == [2, 3]
    assert "the connectors of stones [1] do not train" in messages[0]


@contextmanager
def told():
    """What the library's loggers warn of inside the context."""
    messages = []
    logging.warning_once.cache_clear()  # another test may have caused the same
    logger = logging.get_logger("hf_blockkd.objectives.block_kd")
    keep = pylogging.Handler()
    keep.emit = lambda record: messages.append(record.getMessage())
    level = logger.level
    logger.addHandler(keep)
    logger.setLevel(pylogging.WARNING)
    try:
        yield messages
    finally:
        logger.removeHandler(keep)
        logger.setLevel(level)


@pytest.mark.parametrize(("builder", "make_rows"), [(tiny_vit, image_rows), (tiny_bert, text_rows)])
@pytest.mark.parametrize("relative", [False, True])
def test_errors_of_states_count_examples_without_a_label_as_all_others(tmp_path, builder, make_rows, relative):
    rows = make_rows(8)
    trainer = make_trainer(tmp_path, builder(num_hidden_layers=2), builder(), objective="hint")

    def error(batch):
        step = trainer.make_step(batch_of(batch))
        step.teach(with_states=True)
        step.learn(trainer.model.eval())
        return state_error(step, 1, relative).item()

    ignored = [{**row, "labels": torch.tensor(-100)} for row in rows]
    assert error([*rows[:4], *ignored[4:]]) == error(ignored) == error(rows)


def decoder_classifier(hidden_size, num_layers, seed):
    torch.manual_seed(seed)
    return LlamaForSequenceClassification(
        LlamaConfig(
            hidden_size=hidden_size,
            num_hidden_layers=num_layers,
            num_attention_heads=2,
            num_key_value_heads=2,
            intermediate_size=32,
            vocab_size=64,
            pad_token_id=0,
            num_labels=3,
        )
    )


def test_the_side_of_the_padding_changes_nothing(tmp_path):
    generator = torch.Generator().manual_seed(0)
    texts = [torch.randint(1, 64, (8 - i % 5,), generator=generator).tolist() for i in range(300)]

    def run(side):
        padded = [torch.tensor([0] * (8 - len(t)) + t if side == "left" else t + [0] * (8 - len(t))) for t in texts]
        rows = [{"input_ids": x, "attention_mask": (x > 0).long()} for x in padded]
        rows = [{**row, "labels": torch.tensor(i % 3)} for i, row in enumerate(rows)]
        models = decoder_classifier(16, 2, 0), decoder_classifier(32, 4, 1)
        trainer = make_trainer(tmp_path, *models, rows, max_steps=2, stepping_stones="last_two")
        trainer.train()
        return step_logs(trainer)

    names = ("loss", "loss_state", "loss_distill", "stone_1/task", "stone_2/distill")
    for left, right in zip(run("left"), run("right"), strict=True):
        assert {name: left[name] for name in names} == pytest.approx({name: right[name] for name in names}, rel=1e-4)


@pytest.mark.parametrize("build", [tiny_bart, tiny_t5])
def test_states_of_a_decoder_are_masked_by_what_the_decoder_reads(tmp_path, build):
    rows = token_rows(4)
    trainer = make_trainer(tmp_path, build(), build())
    batch = batch_of(rows)
    states = torch.zeros(*batch["labels"].shape, 3)
    assert torch.equal(trainer.pair.position_mask(batch, states), batch["labels"] != -100)
    given = {**batch, "decoder_attention_mask": torch.ones_like(batch["labels"])}
    assert trainer.pair.position_mask(given, states).all()
    assert trainer.pair.position_mask({**batch, "labels": batch["labels"][:, :3]}, states[:, :2]) is None
