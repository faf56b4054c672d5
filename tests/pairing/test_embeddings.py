"""What is compared of two models without heads."""

import copy

import pytest
import torch

from hf_blockkd.models.cut import Cut
from hf_blockkd.models.pooling import Pooling
from hf_blockkd.pairing.pair import Pair

from ..helpers.tiny_models import tiny_bert, tiny_vit
from ..helpers.training import batch_of, text_rows


def batch():
    rows = batch_of(text_rows(4))
    return {name: rows[name] for name in ("input_ids", "attention_mask")}


def pair(student=None, teacher=None, **options):
    teacher = tiny_bert(None) if teacher is None else teacher
    student = copy.deepcopy(teacher).requires_grad_(True) if student is None else student
    return Pair(student, teacher, num_blocks=2, **options)


def vectors(pair, role="teacher", **options):
    model = getattr(pair, role)
    with torch.no_grad():
        return pair.embeddings.vectors(role, model(**batch()), batch(), **options)


def test_every_stone_of_the_teacher_itself_has_its_vectors_bit_for_bit():
    own = pair()
    clean, extras = own.stones.teach(batch())
    with own.stones.capture([1, 2]) as states:
        own.student(**batch())
    for index in (1, 2):
        stone = own.stones.run(index, states, batch(), extras)
        assert torch.equal(own.logits("teacher", stone, batch()), own.logits("teacher", clean, batch()))
    assert torch.equal(vectors(own, "student"), vectors(own))


def test_the_mean_is_the_default_and_leaves_padding_out():
    own = pair()
    states = own.teacher(**batch()).last_hidden_state
    mask = batch()["attention_mask"][..., None]
    assert torch.allclose(vectors(own), (states * mask).sum(1) / mask.sum(1), atol=1e-6)
    assert torch.allclose(vectors(pair(own.student, own.teacher, pooling="cls")), states[:, 0])


def test_a_student_pools_as_its_folder_says_and_else_as_the_teacher():
    teacher, student = tiny_bert(None), tiny_bert(None, num_hidden_layers=2)
    teacher.pooling = Pooling(("cls",), normalize=True)
    assert pair(student, teacher).pooling == teacher.pooling
    student.pooling = Pooling(("mean",))
    assert pair(student, teacher).pooling == Pooling(("mean",), normalize=True)


def test_another_pooling_than_that_of_the_folder_is_refused():
    teacher = tiny_bert(None)
    teacher.pooling = Pooling(("cls",))
    with pytest.raises(ValueError, match="`pooling` is 'mean', but the folder of BertModel says 'cls'"):
        pair(teacher=teacher, pooling="mean")
    assert pair(teacher=teacher, pooling="cls").pooling == teacher.pooling


@pytest.mark.parametrize(
    ("loss", "width", "is_connected"), [("cosine", 16, False), ("cosine", 8, True), ("similarity", 8, False)]
)
def test_vectors_of_another_width_get_a_connector_where_the_loss_needs_it(loss, width, is_connected):
    own = pair(tiny_bert(None, hidden_size=width, num_hidden_layers=2), embedding_loss=loss)
    assert (own.embeddings.connector is not None) == is_connected
    assert len(own.all_connectors) == 2 + is_connected
    assert vectors(own, "student").shape == (4, 16 if is_connected else width)
    assert vectors(own, "student", connected=False).shape == (4, width)


def test_that_connector_begins_at_the_channels_of_a_cut():
    student = tiny_bert(None, hidden_size=8, num_hidden_layers=2)
    kept = [0, 2, 3, 5, 8, 9, 11, 15]
    student.cut = Cut([0, 2], 3, kept)
    own = pair(student)
    assert torch.equal(vectors(own, "student")[:, kept], vectors(own, "student", connected=False))


def test_images_are_pooled_over_patches_or_places():
    images = torch.randn(2, 1, 8, 8)
    own = Pair(tiny_vit(None, num_hidden_layers=2), tiny_vit(None), num_blocks=2)
    outputs = own.teacher(pixel_values=images)
    found = own.logits("teacher", outputs, {"pixel_values": images})
    assert torch.allclose(found, outputs.last_hidden_state.mean(1), atol=1e-6)
