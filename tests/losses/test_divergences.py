import itertools
import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from hf_blockkd.losses.divergences import (
    DIVERGENCES,
    decoupled_kd,
    divergence,
    forward_kl,
    jensen_shannon,
    standardize_logits,
)
from hf_blockkd.losses.rows import RowLosses
from hf_blockkd.losses.top_k import top_k

from ..helpers import references

ROWS, CLASSES = 6, 5
SETTINGS = list(itertools.product(DIVERGENCES, (1.0, 4.0), (False, True)))


@pytest.fixture
def logits() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of a learner and a target, and labels."""
    return torch.randn(ROWS, CLASSES) * 2, torch.randn(ROWS, CLASSES) * 2, torch.randint(CLASSES, (ROWS,))


def test_kl_of_two_known_distributions_in_both_directions():
    p, q = torch.tensor([[0.1, 0.9]]).log(), torch.tensor([[0.9, 0.1]]).log()
    by_hand = 0.1 * math.log(0.1 / 0.9) + 0.9 * math.log(0.9 / 0.1)
    assert divergence(q, p, "forward_kl").item() == pytest.approx(by_hand, abs=1e-5)
    assert divergence(q, p, "reverse_kl").item() == pytest.approx(by_hand, abs=1e-5)
    assert by_hand == pytest.approx(1.75778, abs=1e-5)


def test_forward_and_reverse_kl_take_the_expectation_under_the_target_and_under_the_learner():
    learner, target = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.25, 0.75]]).log()
    forward = 0.25 * math.log(0.25 / 0.5) + 0.75 * math.log(0.75 / 0.5)
    reverse = 0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)
    assert divergence(learner, target, "forward_kl").item() == pytest.approx(forward, abs=1e-6)
    assert divergence(learner, target, "reverse_kl").item() == pytest.approx(reverse, abs=1e-6)
    assert abs(forward - reverse) > 0.01


@pytest.mark.parametrize(("name", "temperature", "standardize"), SETTINGS)
def test_value_and_gradient_match_the_formulas(logits, name, temperature, standardize):
    learner, target, labels = logits
    learner.requires_grad_()
    options = {"name": name, "temperature": temperature, "standardize": standardize}
    rows = divergence(learner, target, labels=labels, **options)
    rows.sum().backward()

    numpy_target, numpy_labels = target.numpy().astype(float), labels.numpy()

    def reference(x: np.ndarray) -> np.ndarray:
        return references.divergence(x, numpy_target, labels=numpy_labels, **options)

    at = learner.detach().numpy().astype(float)
    # float32 sums of a few dozen terms of size up to 100.
    np.testing.assert_allclose(rows.detach().numpy(), reference(at), rtol=2e-5, atol=2e-5)
    slope = references.gradient(lambda x: reference(x).sum(), at)
    np.testing.assert_allclose(learner.grad.numpy(), slope, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_equal_logits_have_no_divergence_and_no_gradient(logits, name):
    learner, _, labels = logits
    learner.requires_grad_()
    rows = divergence(learner, learner.detach(), name, temperature=2.0, labels=labels)
    rows.sum().backward()
    torch.testing.assert_close(rows, torch.zeros(ROWS), rtol=0, atol=1e-6)
    torch.testing.assert_close(learner.grad, torch.zeros(ROWS, CLASSES), rtol=0, atol=2e-6)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_a_constant_added_to_all_classes_changes_nothing(logits, name):
    learner, target, labels = logits
    plain = divergence(learner, target, name, labels=labels)
    shifted = divergence(learner + 3, target - 2, name, labels=labels)
    torch.testing.assert_close(shifted, plain, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_temperature_divides_the_logits_and_its_square_multiplies_the_result(logits, name):
    learner, target, labels = logits
    # Powers of two scale floating-point numbers exactly, so this holds to the bit.
    hot = divergence(learner * 4, target * 4, name, temperature=4.0, labels=labels)
    assert torch.equal(hot, divergence(learner, target, name, labels=labels) * 16)


def test_jensen_shannon_is_symmetric_and_at_most_ln_2(logits):
    learner, target, _ = logits
    torch.testing.assert_close(jensen_shannon(learner, target), jensen_shannon(target, learner), rtol=1e-6, atol=1e-7)
    far = jensen_shannon(learner * 100, target * 100)
    assert (far <= math.log(2) + 1e-6).all()
    assert far.max() > 0.69


def generalised_jsd(learner, target, beta):
    """Eq. 1 of GKD (arXiv 2306.13649) in float64, with the target as P and the learner as Q."""
    p, q = (references.softmax(side.numpy().astype(float)) for side in (target, learner))
    mixture = beta * p + (1 - beta) * q
    return beta * references.kl(p, mixture) + (1 - beta) * references.kl(q, mixture)


@pytest.mark.parametrize("beta", [0.01, 0.1, 0.5, 0.9, 0.99])
@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_beta_is_the_share_of_the_target_in_the_mixture_and_the_weight_of_its_divergence(logits, beta, temperature):
    learner, target, _ = logits
    rows = divergence(learner, target, "jsd", temperature, beta=beta)
    reference = generalised_jsd(learner / temperature, target / temperature, beta) * temperature**2
    np.testing.assert_allclose(rows.numpy(), reference, rtol=2e-4, atol=1e-6)
    swapped = divergence(target, learner, "jsd", temperature, beta=1 - beta)
    torch.testing.assert_close(rows, swapped, rtol=1e-4, atol=1e-6)


def test_at_its_ends_beta_is_the_forward_and_the_reverse_kl_which_its_inside_approaches_in_proportion(logits):
    learner, target, _ = logits
    forward, reverse = (divergence(learner, target, name, 2.0) for name in ("forward_kl", "reverse_kl"))
    assert torch.equal(divergence(learner, target, "jsd", 2.0, beta=0.0), forward)
    assert torch.equal(divergence(learner, target, "jsd", 2.0, beta=1.0), reverse)
    small = 2.0**-8
    near = divergence(learner, target, "jsd", 2.0, beta=small) / small
    torch.testing.assert_close(near, forward, rtol=0.1, atol=0.01)
    near = divergence(learner, target, "jsd", 2.0, beta=1 - small) / small
    torch.testing.assert_close(near, reverse, rtol=0.1, atol=0.01)


def test_a_beta_of_one_half_is_the_mean_of_both_kls_to_the_mean_to_the_bit(logits):
    learner, target, _ = logits
    learner.requires_grad_()
    q, p = learner.log_softmax(-1), target.log_softmax(-1)
    mixture = torch.logaddexp(q, p) - torch.log(torch.tensor(2.0))
    both = [F.kl_div(mixture, side, reduction="none", log_target=True).sum(-1) for side in (q, p)]
    expected = (both[0] + both[1]) / 2
    rows = jensen_shannon(learner, target, 0.5)
    assert torch.equal(rows, expected)
    gradients = [torch.autograd.grad(one.sum(), learner, retain_graph=True)[0] for one in (rows, expected)]
    assert torch.equal(*gradients)


@pytest.mark.parametrize("beta", [0.0, 0.1, 0.9, 1.0])
def test_of_multi_label_logits_beta_compares_each_class_alone(logits, beta):
    learner, target, _ = logits
    losses = RowLosses("multi_label_classification", torch.zeros(ROWS, CLASSES), divergence="jsd", beta=beta)
    pairs = [torch.stack([torch.zeros(side.numel()), side.flatten()], dim=-1) for side in (learner, target)]
    by_class = divergence(*pairs, "jsd", beta=beta).mean()
    torch.testing.assert_close(losses.distill(losses.rows(learner), losses.rows(target)), by_class)


@pytest.mark.parametrize("beta", [0.0, 0.1, 0.9, 1.0])
def test_of_the_likeliest_classes_beta_compares_the_merged_outcomes(logits, beta):
    learner, target, labels = logits
    kept = top_k(target, 2, temperature=2.0, num_classes=CLASSES)
    losses = RowLosses("single_label_classification", labels, divergence="jsd", temperature=2.0, beta=beta)
    merged = divergence(kept.bucket(learner, 2.0), kept.log_probs, "jsd", beta=beta).mean() * 4
    torch.testing.assert_close(losses.distill(losses.rows(learner), kept), merged)
    whole = losses.distill(losses.rows(learner), target)
    assert 0 < merged <= whole
    everything = top_k(target, CLASSES - 1, temperature=2.0, num_classes=CLASSES)
    torch.testing.assert_close(losses.distill(losses.rows(learner), everything), whole, rtol=1e-4, atol=1e-6)


def test_dkd_weighs_the_two_parts_of_kl_anew(logits):
    """KL = TCKD + (1 - p_label) NCKD (eq. 6 there), so NCKD follows from the KL, and DKD from both."""
    learner, target, labels = logits
    p, q = references.softmax(target.numpy().astype(float)), references.softmax(learner.numpy().astype(float))
    rows = np.arange(ROWS)
    p_label, q_label = p[rows, labels], q[rows, labels]
    tckd = p_label * np.log(p_label / q_label) + (1 - p_label) * np.log((1 - p_label) / (1 - q_label))
    nckd = (references.kl(p, q) - tckd) / (1 - p_label)
    np.testing.assert_allclose(decoupled_kd(learner, target, labels).numpy(), tckd + 8 * nckd, rtol=1e-4, atol=1e-5)


def test_dkd_of_two_classes_is_the_kl():
    learner, target = torch.randn(4, 2), torch.randn(4, 2)
    labels = torch.tensor([0, 1, 0, 1])
    torch.testing.assert_close(decoupled_kd(learner, target, labels), forward_kl(learner, target), rtol=1e-5, atol=1e-6)


def test_standardized_rows_have_mean_0_and_deviation_1(logits):
    scores = standardize_logits(logits[0]).numpy()
    np.testing.assert_allclose(scores.mean(-1), 0, atol=1e-6)
    np.testing.assert_allclose(scores.std(-1, ddof=1), 1, atol=1e-5)
    np.testing.assert_allclose(scores, references.z_scores(logits[0].numpy().astype(float)), rtol=1e-5, atol=1e-5)


def test_standardized_divergence_ignores_scale_and_offset_of_either_side(logits):
    learner, target, _ = logits
    plain = divergence(learner, target, standardize=True)
    torch.testing.assert_close(divergence(learner * 5 + 1, target * 0.2 - 3, standardize=True), plain)


def test_standardizing_equal_logits_gives_zeros():
    assert torch.equal(standardize_logits(torch.full((2, 3), 7.0)), torch.zeros(2, 3))


@pytest.mark.parametrize(("name", "temperature", "standardize"), SETTINGS)
def test_huge_logits_do_not_overflow(logits, name, temperature, standardize):
    learner, target, labels = logits
    learner = (learner * 1e4).requires_grad_()
    rows = divergence(learner, target * -1e4, name, temperature, standardize, labels)
    rows.sum().backward()
    assert torch.isfinite(rows).all()
    assert torch.isfinite(learner.grad).all()


@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [False, True])
def test_half_precision_logits_are_compared_in_float32(logits, name, dtype, autocast):
    learner, target, labels = logits[0].to(dtype), logits[1].to(dtype), logits[2]
    wide = divergence(learner.float(), target.float(), name, 3.0, standardize=True, labels=labels)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        narrow = divergence(learner, target, name, 3.0, standardize=True, labels=labels)
    assert narrow.dtype == torch.float32
    assert torch.equal(narrow, wide)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_rows_do_not_mix(logits, name):
    learner, target, labels = logits
    together = divergence(learner, target, name, labels=labels)
    alone = [divergence(learner[i : i + 1], target[i : i + 1], name, labels=labels[i : i + 1]) for i in range(ROWS)]
    assert torch.equal(together, torch.cat(alone))


def test_what_cannot_be_compared_is_refused(logits):
    learner, target, labels = logits
    with pytest.raises(ValueError, match=r"shape \(6, 5\) cannot be compared .* shape \(6, 4\)"):
        divergence(learner, target[:, :4])
    with pytest.raises(ValueError, match="Unknown divergence 'kl'; choose one of"):
        divergence(learner, target, "kl")
    with pytest.raises(ValueError, match=r"divergence='dkd' .* needs `labels`"):
        divergence(learner, target, "dkd")
    assert divergence(learner, target, "dkd", labels=labels).shape == (ROWS,)


@pytest.mark.parametrize("least", [float("-inf"), torch.finfo(torch.float32).min, -1e9])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
@pytest.mark.parametrize("name", DIVERGENCES)
def test_classes_that_both_leave_out_add_nothing(name, temperature, least):
    logits, target = torch.randn(6, 5, requires_grad=True), torch.randn(6, 5)
    labels = torch.arange(6) % 3
    whole = divergence(logits[:, :3], target[:, :3], name, temperature, labels=labels)
    left_out = torch.tensor([False] * 3 + [True] * 2)
    masked = divergence(
        logits.masked_fill(left_out, least), target.masked_fill(left_out, least), name, temperature, labels=labels
    )
    assert torch.allclose(masked, whole, atol=1e-5)
    masked.sum().backward()
    assert torch.isfinite(logits.grad).all()
    assert not logits.grad[:, 3:].any()


def test_a_class_that_the_learner_alone_leaves_out_is_infinitely_far_away():
    learner, target = torch.tensor([[0.0, float("-inf")]]), torch.zeros(1, 2)
    assert divergence(learner, target).item() == float("inf")
    assert divergence(learner, target, "reverse_kl").isfinite().all()


@pytest.mark.parametrize("name", DIVERGENCES)
def test_logits_that_are_no_numbers_give_none(name):
    logits = torch.tensor([[0.0, float("nan"), 1.0]])
    assert divergence(logits, torch.zeros(1, 3), name, labels=torch.zeros(1, dtype=torch.long)).isnan().all()


@pytest.mark.parametrize("least", [float("-inf"), torch.finfo(torch.float32).min, -1e9])
@pytest.mark.parametrize("name", DIVERGENCES)
def test_classes_that_are_left_out_do_not_count_in_z_scores(name, least):
    logits, target, labels = torch.randn(6, 5), torch.randn(6, 5), torch.arange(6) % 3
    whole = divergence(logits[:, :3], target[:, :3], name, 2.0, standardize=True, labels=labels)
    left_out = torch.tensor([False] * 3 + [True] * 2)
    masked = (side.masked_fill(left_out, least) for side in (logits, target))
    assert torch.allclose(divergence(*masked, name, 2.0, standardize=True, labels=labels), whole, atol=1e-5)
