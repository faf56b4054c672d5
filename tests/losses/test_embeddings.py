"""Losses between vectors, against the formulas in float64 numpy."""

import numpy as np
import pytest
import torch

from hf_blockkd.losses.embeddings import EMBEDDING_LOSSES, embedding_loss
from hf_blockkd.losses.rows import RowLosses


def vectors(width=4, count=5):
    return torch.randn(count, width, generator=torch.Generator().manual_seed(width))


def cosines(vectors):
    vectors = vectors.double().numpy()
    vectors = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors @ vectors.T


def reference(name, ours, theirs):
    if name == "similarity":
        differences = (cosines(ours) - cosines(theirs)) ** 2
        return [sum(row[j] for j in range(len(row)) if j != i) / (len(row) - 1) for i, row in enumerate(differences)]
    losses = []
    for a, b in zip(ours.double().numpy(), theirs.double().numpy(), strict=True):
        cosine = a @ b / np.sqrt((a @ a) * (b @ b))
        losses.append(1 - cosine if name == "cosine" else ((a - b) @ (a - b)) / (b @ b))
    return losses


@pytest.mark.parametrize("name", EMBEDDING_LOSSES)
def test_values(name):
    ours, theirs = vectors(), vectors() + 0.3
    assert embedding_loss(ours, theirs, name).tolist() == pytest.approx(reference(name, ours, theirs), rel=1e-5)


def test_a_sum_adds_its_parts():
    ours, theirs = vectors(), vectors() + 0.3
    total = embedding_loss(ours, theirs, "cosine+similarity")
    assert torch.equal(total, embedding_loss(ours, theirs, "cosine") + embedding_loss(ours, theirs, "similarity"))


def test_similarities_need_no_certain_width_and_do_not_change_under_a_rotation():
    theirs = vectors(6)
    rotation, _ = torch.linalg.qr(torch.randn(6, 6))
    assert embedding_loss(3 * theirs @ rotation, theirs, "similarity").max() < 1e-10
    assert embedding_loss(vectors(3), theirs, "similarity").tolist() == pytest.approx(
        reference("similarity", vectors(3), theirs), rel=1e-5
    )


def test_one_example_alone_has_no_similarities():
    assert embedding_loss(vectors(count=1), vectors(3, count=1), "similarity").tolist() == [0.0]


@pytest.mark.parametrize("name", EMBEDDING_LOSSES)
def test_autocast_does_not_round_and_gradients_reach_the_learner_alone(name):
    ours, theirs = vectors().requires_grad_(), (vectors() + 0.3).requires_grad_()
    losses = RowLosses("embedding", torch.full((5,), -100), num_items=10.0, divergence=name)
    with torch.autocast("cpu", torch.bfloat16):
        loss = losses.distill(losses.rows(ours), theirs)
    loss.backward()
    assert loss.item() == pytest.approx(sum(reference(name, ours.detach(), theirs.detach())) / 10, rel=1e-5)
    assert ours.grad.abs().max() > 0
    assert theirs.grad is None
    assert losses.task(ours).item() == 0.0


@pytest.mark.parametrize("name", ["cosines", "cosine+cosine", ""])
def test_unknown_names_are_refused(name):
    with pytest.raises(ValueError, match=r"`embedding_loss` is .*choose one of 'cosine'"):
        embedding_loss(vectors(), vectors(), name)
