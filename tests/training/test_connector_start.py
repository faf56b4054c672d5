"""Connectors begin at the least squares between the states of both models, whatever the run's batches are."""

import copy

import numpy as np
import pytest
import torch
from peft import LoraConfig
from torch import nn
from transformers import ResNetConfig, ResNetForImageClassification, TrainerCallback

from hf_blockkd import BlockwiseDistillConfig
from hf_blockkd.connectors.bridges import BridgedConnector
from hf_blockkd.connectors.least_squares import LeastSquares
from hf_blockkd.connectors.maps import connect
from hf_blockkd.data.calibration import NUM_EXAMPLES
from hf_blockkd.routing.entering import capture_states
from hf_blockkd.training.connector_start import RIDGE

from ..helpers.tiny_models import scrambled, tiny_bert, tiny_llama, tiny_vit
from ..helpers.training import (
    assert_same_state,
    batch_of,
    differs,
    image_rows,
    make_trainer,
    state_of,
    step_logs,
    text_rows,
    token_rows,
)

NARROW = {"hidden_size": 8}


class Start(TrainerCallback):
    """Keeps the connectors as they are when the first step begins, and torch's random state."""

    def __init__(self) -> None:
        self.connectors = None

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if self.connectors is None:
            self.connectors, self.random = state_of(model.blockwise_connectors), torch.get_rng_state()


def started(folder, build, rows, student=None, **config):
    """A trainer after one step, and its connectors before it."""
    torch.manual_seed(0)
    student = build(num_hidden_layers=2, **(NARROW if student is None else student))
    start = Start()
    settings = {"max_steps": 1, "stepping_stones": "all", **config}
    trainer = make_trainer(folder, student, build(), rows, callbacks=[start], **settings)
    made = state_of(trainer.pair.all_connectors)
    trainer.train()
    return trainer, made, start


def states_before_training(trainer, build, rows, student=NARROW):
    """What the connectors join, on all rows, from models as they were made."""
    torch.manual_seed(0)
    pair, states = trainer.pair, {}
    models = {"S": build(num_hidden_layers=2, **student).eval(), "T": build().eval()}
    for owner, model in models.items():
        stack = pair.stones.student_stack if owner == "S" else pair.stones.teacher_stack
        ends = pair.block_map.student if owner == "S" else pair.block_map.teacher
        own = type(stack)(stack.path, model.get_submodule(stack.path))
        with torch.no_grad(), capture_states(own, ends) as captured:
            model(**{name: value for name, value in batch_of(rows).items() if name != "labels"})
        states[owner] = [captured[end] for end in ends]
    return states


def ridge(x: np.ndarray, y: np.ndarray, penalty: float) -> tuple[np.ndarray, np.ndarray]:
    """The reference: least squares of standardised inputs, the penalty as further rows of the system."""
    mean, std = x.mean(0), x.std(0)
    std = np.maximum(std, 0.1 * np.sort(std)[(len(std) - 1) // 2])  # what varies less counts as if it varied so
    z = (x - mean) / std
    rows = np.vstack([z, np.sqrt(penalty * len(x)) * np.eye(x.shape[1])])
    right = np.vstack([y - y.mean(0), np.zeros((x.shape[1], y.shape[1]))])
    weight = (np.linalg.lstsq(rows, right, rcond=None)[0] / std[:, None]).T
    return weight, y.mean(0) - weight @ mean


@pytest.mark.parametrize("penalty", [0.0, 1e-3, 0.5])
def test_the_map_is_that_of_least_squares_however_the_rows_come(penalty):
    generator = np.random.default_rng(0)
    x = generator.normal(size=(40, 5)) * [1, 10, 0.1, 3, 1] + [0, 100, 5, -3, 1]
    y = generator.normal(size=(40, 3)) + x[:, :3]
    fit = LeastSquares()
    for part in np.array_split(np.arange(40), [7, 8, 30]):
        fit.add(torch.tensor(x[part]), torch.tensor(y[part]))
    weight, bias = ridge(x, y, penalty)
    assert np.allclose(fit.solve(penalty)[0], weight, rtol=1e-6, atol=1e-9)
    assert np.allclose(fit.solve(penalty)[1], bias, rtol=1e-6, atol=1e-6)


def test_inputs_that_never_change_and_fewer_rows_than_inputs_are_no_trouble():
    x = torch.randn(4, 8)
    x[:, 2] = 7.0
    fit = LeastSquares()
    fit.add(x, torch.randn(4, 3))
    weight, bias = fit.solve(1e-3)
    assert weight[:, 2].abs().max() == 0
    assert torch.isfinite(weight).all()
    assert torch.isfinite(bias).all()


@pytest.mark.parametrize(("build", "rows"), [(tiny_vit, image_rows), (tiny_bert, text_rows), (tiny_llama, token_rows)])
def test_connectors_begin_at_the_least_squares_correction_over_what_is_no_padding(build, rows, tmp_path):
    data = rows(256)
    trainer, made, start = started(tmp_path, build, data)
    states = states_before_training(trainer, build, data)
    mask = batch_of(data).get("attention_mask")
    for index, (ours, theirs) in enumerate(zip(states["S"], states["T"], strict=True)):
        x, y = (side.flatten(0, 1).double().numpy() for side in (ours, theirs))
        if mask is not None:
            x, y = x[mask.flatten().bool()], y[mask.flatten().bool()]
        before = made[f"{index}.weight"].double().numpy(), made[f"{index}.bias"].double().numpy()
        weight, bias = ridge(x, y - x @ before[0].T - before[1], RIDGE)
        assert np.allclose(start.connectors[f"{index}.weight"], before[0] + weight, atol=2e-4)
        assert np.allclose(start.connectors[f"{index}.bias"], before[1] + bias, atol=2e-4)
        assert not torch.equal(start.connectors[f"{index}.weight"], made[f"{index}.weight"])


def test_random_leaves_connectors_as_they_were_made(tmp_path):
    _, made, start = started(tmp_path, tiny_vit, image_rows(256), connector_start="random")
    assert_same_state(start.connectors, made)


def test_fewer_examples_than_a_fit_takes_leave_them_as_they_were_made(tmp_path):
    trainer, made, start = started(tmp_path, tiny_vit, image_rows(255))
    assert_same_state(start.connectors, made)
    assert "loss_state" not in step_logs(trainer)[0]


def test_states_count_where_connectors_were_fitted_before_and_after_a_resume(tmp_path):
    settings = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    trainer, _, _ = started(tmp_path, tiny_vit, image_rows(256), **settings)
    first, second = step_logs(trainer)
    for entry, weight in ((first, 5.0), (second, 2.5)):
        whole = entry["loss_task"] + entry["loss_distill"] + weight * entry["loss_state"]
        assert entry["loss"] == pytest.approx(whole, rel=1e-5)
    torch.manual_seed(0)
    models = tiny_vit(num_hidden_layers=2, **NARROW), tiny_vit()
    resumed = make_trainer(tmp_path, *models, image_rows(256), stepping_stones="all", **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert step_logs(resumed)[-1]["loss_state"] == second["loss_state"]
    for config in ({"state_weight": 0.0}, {"stepping_stones": "none"}, {"teacher_cache": str(tmp_path / "cache")}):
        assert "loss_state" not in step_logs(started(tmp_path, tiny_vit, image_rows(256), **config)[0])[0]


def test_stones_count_a_third_where_connectors_were_fitted(tmp_path):
    def entry(**config):
        (logs,) = step_logs(started(tmp_path, tiny_vit, image_rows(256), **config)[0])
        return logs

    def stones(logs):
        return logs["stone_1/task"] / 2 + logs["stone_2/task"]

    fitted, whole = entry(), entry(stone_weight=1.0)
    assert fitted["loss_task"] == pytest.approx(whole["loss_task"] - 2 / 3 * stones(whole), rel=1e-5)
    for published in ({"connector_start": "random"}, {"teacher_cache": str(tmp_path / "cache")}):
        logs = entry(**published)
        assert logs["loss"] == pytest.approx(logs["loss_task"] + logs["loss_distill"], rel=1e-5)
        assert logs["loss_task"] == entry(**published, stone_weight=1.0)["loss_task"]


def test_a_stream_gives_its_first_examples(tmp_path):
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(image_rows(256) + image_rows(100, seed=1))

    streamed = started(tmp_path, tiny_vit, Stream())[2]
    chosen = started(tmp_path, tiny_vit, image_rows(256))[2]
    for name, tensor in chosen.connectors.items():
        assert torch.allclose(streamed.connectors[name], tensor, atol=1e-4)


class ShortStream(torch.utils.data.IterableDataset):
    """Fewer rows than a fit takes."""

    def __iter__(self):
        return iter(image_rows(255))


def test_a_stream_of_fewer_examples_leaves_them_as_they_were_made_before_and_after_a_resume(tmp_path):
    settings = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    trainer, made, start = started(tmp_path, tiny_vit, ShortStream(), **settings)
    assert_same_state(start.connectors, made)
    assert "loss_state" not in step_logs(trainer)[-1]
    whole = started(tmp_path / "rows", tiny_vit, image_rows(255), train_sampling_strategy="sequential", **settings)[0]
    assert [entry["loss"] for entry in step_logs(trainer)] == [entry["loss"] for entry in step_logs(whole)]
    torch.manual_seed(0)
    models = tiny_vit(num_hidden_layers=2, **NARROW), tiny_vit()
    resumed = make_trainer(tmp_path, *models, ShortStream(), stepping_stones="all", **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert step_logs(resumed)[-1]["loss"] == step_logs(trainer)[-1]["loss"]
    assert_same_state(state_of(resumed.connectors), state_of(trainer.connectors))


def test_a_run_that_fits_nothing_reads_no_stream_ahead(tmp_path):
    read = []

    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            for row in image_rows(300):
                read.append(1)
                yield row

    started(tmp_path, tiny_vit, Stream(), connector_start="random", per_device_train_batch_size=1)
    assert len(read) < NUM_EXAMPLES


def test_a_residual_connector_begins_at_the_least_squares_of_what_it_adds(tmp_path):
    data = image_rows(256)
    trainer, made, start = started(tmp_path, tiny_vit, data, student={})
    assert all(not tensor.any() for tensor in made.values())
    states = states_before_training(trainer, tiny_vit, data, student={})
    for index, (ours, theirs) in enumerate(zip(states["S"], states["T"], strict=True)):
        x, y = (side.flatten(0, 1).double().numpy() for side in (ours, theirs))
        weight, bias = ridge(x, y - x, RIDGE)
        assert np.allclose(start.connectors[f"{index}.weight"], weight, atol=2e-4)
        assert np.allclose(start.connectors[f"{index}.bias"], bias, atol=2e-4)


def test_a_residual_connector_between_equal_states_begins_as_the_identity_to_the_bit(tmp_path):
    teacher, start = tiny_vit(), Start()
    settings = {"max_steps": 1, "stepping_stones": "all", "num_blocks": 3}
    trainer = make_trainer(tmp_path, copy.deepcopy(teacher), teacher, image_rows(256), callbacks=[start], **settings)
    trainer.train()
    assert trainer.pair.fitted_stones == [1, 2, 3]
    assert all(not tensor.any() for tensor in start.connectors.values())


def test_a_teacher_that_is_the_base_of_its_student_is_not_fitted_to(tmp_path):
    adapter, start = LoraConfig(target_modules=["q_proj"]), Start()
    trainer = make_trainer(
        tmp_path, tiny_llama(), None, token_rows(256), peft_config=adapter, callbacks=[start], max_steps=1
    )
    trainer.train()
    assert trainer.pair.fitted_stones == []
    assert "loss_state" not in step_logs(trainer)[0]


def test_a_connector_that_does_not_train_stays_as_it_was_made(tmp_path):
    _, made, start = started(tmp_path, tiny_vit, image_rows(256), stepping_stones=[2])
    assert torch.equal(start.connectors["0.weight"], made["0.weight"])
    assert not torch.equal(start.connectors["1.weight"], made["1.weight"])


def test_they_begin_alike_however_the_batch_is_split_and_draw_nothing_from_the_random_states(tmp_path):
    splits = [(8, 1), (4, 2), (2, 4)]
    starts = [
        started(
            tmp_path, tiny_vit, image_rows(256), per_device_train_batch_size=size, gradient_accumulation_steps=steps
        )[2]
        for size, steps in splits
    ]
    unfitted = started(tmp_path, tiny_vit, image_rows(256), connector_start="random")[2]
    for start in starts:
        assert_same_state(start.connectors, starts[0].connectors)
    assert torch.equal(starts[0].random, unfitted.random)


def test_only_a_run_that_begins_fits_them(tmp_path):
    settings = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    trainer, _, _ = started(tmp_path, tiny_vit, image_rows(256), **settings)
    trained = state_of(trainer.connectors)
    torch.manual_seed(0)
    start = Start()
    again = make_trainer(
        tmp_path,
        tiny_vit(num_hidden_layers=2, **NARROW),
        tiny_vit(),
        image_rows(256),
        callbacks=[start],
        stepping_stones="all",
        **settings,
    )
    again.compute_loss(again.model.train(), batch_of(image_rows()))  # by itself
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert_same_state(state_of(again.connectors), trained)
    assert differs(start.connectors, trained)


def test_a_loss_by_itself_fits_nothing(tmp_path):
    trainer = make_trainer(tmp_path, tiny_vit(num_hidden_layers=2, **NARROW), tiny_vit(), image_rows(256))
    made = state_of(trainer.connectors)
    trainer.compute_loss(trainer.model.train(), batch_of(image_rows()))
    assert_same_state(state_of(trainer.connectors), made)


def test_the_last_map_of_an_mlp_is_fitted(tmp_path):
    trainer, made, start = started(tmp_path, tiny_vit, image_rows(256), connector="mlp")
    assert torch.equal(start.connectors["0.0.weight"], made["0.0.weight"])
    states = states_before_training(trainer, tiny_vit, image_rows(256))
    for index, (ours, theirs) in enumerate(zip(states["S"], states["T"], strict=True)):
        mlp = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 16))
        mlp.load_state_dict({name[2:]: value for name, value in made.items() if name[0] == str(index)})
        x = mlp[:2](ours).detach()
        lacking = (theirs - mlp[2](x).detach()).flatten(0, 1).double().numpy()
        weight, bias = ridge(x.flatten(0, 1).double().numpy(), lacking, RIDGE)
        assert np.allclose(start.connectors[f"{index}.2.weight"], mlp[2].weight.detach() + weight, atol=2e-4)
        assert np.allclose(start.connectors[f"{index}.2.bias"], mlp[2].bias.detach() + bias, atol=2e-4)


@pytest.mark.parametrize("is_new", [True, False], ids=["new norms", "norms that have seen batches"])
def test_connectors_between_layouts_are_fitted_through_their_bridge_to_the_states_of_training(tmp_path, is_new):
    config = ResNetConfig(num_channels=1, embedding_size=8, hidden_sizes=[8, 12], depths=[1, 1], num_labels=5)
    rows = [{**row, "pixel_values": torch.randn(1, 32, 32)} for row in image_rows(256)]
    start = Start()
    student, teacher = scrambled(ResNetForImageClassification(config)), tiny_vit(image_size=32, patch_size=8)
    for norm in student.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.running_mean.normal_() if not is_new else norm.running_mean.zero_()
    statistics = {name: value.clone() for name, value in student.named_buffers()}
    trainer = make_trainer(tmp_path, student, teacher, rows, callbacks=[start], max_steps=1, learning_rate=0.0)
    assert all(isinstance(connector, BridgedConnector) for connector in trainer.connectors)
    made = state_of(trainer.connectors)
    trainer.train()
    student.load_state_dict(statistics, strict=False)  # which batches of the step have moved
    student.train(is_new)  # whose norms then take the statistics of each batch, as in training
    pair, given = trainer.pair, {student: [], teacher: []}
    for batch in trainer.calibration_batches():
        for model, stack, ends in (
            (student, pair.stones.student_stack, pair.block_map.student),
            (teacher, pair.stones.teacher_stack, pair.block_map.teacher),
        ):
            with torch.no_grad(), capture_states(stack, ends) as captured:
                model(pixel_values=batch["pixel_values"])
            given[model].append([captured[end] for end in ends])
    states = {model: [torch.cat(one) for one in zip(*batches, strict=True)] for model, batches in given.items()}
    for index, connector in enumerate(trainer.connectors):
        connector.load_state_dict(
            {name.partition(".")[2]: value for name, value in start.connectors.items() if name.startswith(f"{index}.")}
        )
        ours, theirs = states[student][index], states[teacher][index]
        error = (connect(connector, ours) - theirs).square().sum(-1).mean()
        weight, bias = torch.autograd.grad(error, [connector.width.weight, connector.width.bias])
        inputs = connector.bridge(ours, nn.Identity())
        # At the minimum, the error's gradient is that of the penalty on what has changed, against it.
        changed = connector.width.weight - made[f"{index}.width.weight"]
        variance = inputs.var((0, 1), correction=0)
        penalty = RIDGE * changed.square() * torch.maximum(variance, 0.1**2 * variance.median())
        (pull,) = torch.autograd.grad(penalty.sum(), [connector.width.weight])
        assert torch.allclose(weight, -pull, atol=1e-5)
        assert bias.abs().max() < 1e-5


def test_values_that_are_not_finite_leave_the_connectors_to_the_checks_of_the_step(tmp_path):
    rows = image_rows(256)
    rows[3]["pixel_values"] = torch.full_like(rows[3]["pixel_values"], torch.nan)
    with pytest.raises(ValueError, match="The teacher gives values that are not finite"):
        started(tmp_path, tiny_vit, rows, max_steps=64)


def test_a_large_data_set_is_not_read_whole(tmp_path):
    class Counting(torch.utils.data.Dataset):
        rows, read = image_rows(8), set()

        def __len__(self):
            return 1000

        def __getitem__(self, index):
            self.read.add(index)
            return self.rows[index % len(self.rows)]

    data = Counting()
    started(tmp_path, tiny_vit, data, per_device_train_batch_size=1)
    assert NUM_EXAMPLES <= len(data.read) <= NUM_EXAMPLES + 2


def test_an_unknown_start_is_refused():
    with pytest.raises(ValueError, match="`connector_start` is 'identity', which is unknown; choose one of"):
        BlockwiseDistillConfig("student", connector_start="identity")
