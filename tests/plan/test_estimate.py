"""What is estimated for GPUs that are not here, against counts on real values and hand computations."""

from contextlib import nullcontext

import pytest
import torch

from hf_blockkd import BlockwiseDistillConfig
from hf_blockkd.plan.counting import count_step, counting_trainer, labelled_batch
from hf_blockkd.plan.estimate import FAR_BANDWIDTH, GPUS, make_estimate
from hf_blockkd.plan.traffic import Traffic
from hf_blockkd.plan.without_values import without_values

from ..helpers import tiny_models as tiny


def estimate_of(**given):
    args = BlockwiseDistillConfig("unused", use_cpu=True, num_blocks=2, stepping_stones="all")
    with without_values():
        return make_estimate(tiny.tiny_llama(), tiny.tiny_llama(), args, sequence_length=12, **given)


def test_shapes_alone_cost_the_flops_and_activations_of_values():
    args = BlockwiseDistillConfig("unused", use_cpu=True, num_blocks=2, stepping_stones="all")

    def count(has_values: bool) -> tuple[int, int]:
        with counting_trainer(tiny.tiny_llama(), tiny.tiny_llama(), args) as trainer:
            trainer._first_batch_passed = not has_values
            batch = labelled_batch(trainer, 2, 12)
            batch.pop("attention_mask", None)
            return count_step(trainer, batch)

    flops, activations = count(True)
    with without_values():
        counted = count(False)
    assert counted[0] == flops
    assert counted[1] == pytest.approx(activations, rel=0.05)  # masks become indices


def test_traffic_is_what_is_read_and_written_besides_products():
    one, other = torch.ones(10, 10), torch.ones(10, 10)
    with Traffic() as traffic:
        total = (one @ other).exp() + one
        del total
    assert traffic.kernels == 3
    assert traffic.bytes == 400 * (2 + 3)
    assert traffic.peak == 800  # the product is gone when the sum is made


def test_shapes_alone_start_as_many_operations_as_values():
    def count(has_values: bool) -> tuple[int, int]:
        with nullcontext() if has_values else without_values():
            model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.LayerNorm(4), torch.nn.GELU())
            with Traffic() as traffic:
                model(torch.ones(2, 4)).sum().backward()
            return traffic.kernels, traffic.bytes

    assert count(False) == count(True)


def test_more_gpus_share_weights_and_fetch_them():
    alone, many = estimate_of(), estimate_of(gpus=64)
    for one, shared in zip(alone.steps, many.steps, strict=True):
        assert one.seconds["communication"] == one.memory["gathered"] == 0
        for part in ("student", "gradients", "AdamW", "teacher"):
            assert shared.memory[part] == one.memory[part] / 64
    weights = 2 * 3 * many.steps[0].memory["gradients"] * 64 / 4  # twice for passes, once for gradients, in bfloat16
    teacher = many.steps[0].memory["teacher"] * 64
    assert many.steps[0].seconds["communication"] == pytest.approx((weights + teacher) * 63 / 64 / FAR_BANDWIDTH)


def test_hours_go_by_tokens_and_products_by_utilisation():
    half, whole = estimate_of(tokens=1e6, batch_size=4), estimate_of(tokens=1e6, batch_size=4, utilisation=1.0)
    assert half.tokens_per_step == 4 * 12
    for step, fast in zip(half.steps, whole.steps, strict=True):
        assert step.seconds["products"] == 2 * fast.seconds["products"] == 2 * step.flops / GPUS["h100"].flops
        assert half.hours(step) == pytest.approx(1e6 / 48 * step.step_seconds / 3600)
    assert "GPU hours" in str(half)


def test_a_measured_step_sets_the_pace_of_python_and_of_nothing_else():
    usual, slow = estimate_of(batch_size=1), estimate_of(batch_size=1, step_seconds=0.5)
    assert slow.steps[0].seconds["host"] == pytest.approx(0.5)
    for step, slower in zip(usual.steps, slow.steps, strict=True):
        assert slower.seconds["host"] / step.seconds["host"] == pytest.approx(0.5 / usual.steps[0].seconds["host"])
        assert slower.seconds["products"] == step.seconds["products"]
        assert slower.memory == step.memory


def test_the_measured_step_is_one_of_one_example_of_whose_loss_a_batch_has_more_chunks():
    args = BlockwiseDistillConfig("unused", use_cpu=True, num_blocks=2, stepping_stones="all", loss_chunk_size=4)

    def host(batch_size, **given):
        with without_values():
            models = tiny.tiny_llama(), tiny.tiny_llama()
            estimate = make_estimate(*models, args, batch_size=batch_size, sequence_length=12, **given)
        return estimate.steps[0].seconds["host"]

    one, many = host(1), host(8)
    assert many > 1.01 * one
    assert host(8, step_seconds=one) == pytest.approx(many)


@pytest.mark.parametrize(
    ("given", "name"),
    [
        ({"gpu": "v100"}, "gpu"),
        ({"gpus": 0}, "gpus"),
        ({"utilisation": 1.5}, "utilisation"),
        ({"step_seconds": 0.0}, "step_seconds"),
    ],
)
def test_what_is_out_of_range_is_refused_by_name(given, name):
    with pytest.raises(ValueError, match=f"`{name}`"):
        estimate_of(**given)
