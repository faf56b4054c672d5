"""What is said of a student before it trains: by hand on a few rows."""

import pytest
import torch
from torch.nn import functional as F
from transformers import default_data_collator

from hf_blockkd import make_student
from hf_blockkd.students.likeness import likeness

from ..helpers.tiny_models import tiny_bert, tiny_gpt2, tiny_t5, tiny_vit
from ..helpers.training import image_rows, text_rows, token_rows


@torch.no_grad()
def logits_of(model, rows, names):
    return model(**{name: torch.stack([row[name] for row in rows]) for name in names}).logits


def nats(student, teacher):
    return F.kl_div(student.log_softmax(-1), teacher.log_softmax(-1), reduction="none", log_target=True).sum(-1)


def test_a_classifier_is_compared_by_example():
    teacher, rows = tiny_vit(), image_rows(20)
    student = make_student(teacher, num_layers=1)
    found = likeness(student, teacher, rows, default_data_collator)
    ours, theirs = (logits_of(model, rows, ["pixel_values"]) for model in (student, teacher))
    labels = torch.stack([row["labels"] for row in rows])
    assert found["kl"] == pytest.approx(nats(ours, theirs).mean().item(), rel=1e-5)
    assert found["student_accuracy"] == (ours.argmax(-1) == labels).double().mean().item()
    assert found["teacher_accuracy"] == (theirs.argmax(-1) == labels).double().mean().item()


def test_a_language_model_is_compared_by_position_without_padding():
    teacher, rows = tiny_gpt2(), token_rows(12)
    student = make_student(teacher, num_layers=1)
    found = likeness(student, teacher, rows, default_data_collator)
    names = ["input_ids", "attention_mask"]
    ours, theirs = (logits_of(model, rows, names) for model in (student, teacher))
    mask = torch.stack([row["attention_mask"] for row in rows]).bool()
    assert found["kl"] == pytest.approx(nats(ours, theirs)[mask].mean().item(), rel=1e-5)
    labels = torch.stack([row["labels"] for row in rows])[:, 1:]
    for name, logits in (("student", ours), ("teacher", theirs)):
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels.flatten())
        assert found[f"{name}_perplexity"] == pytest.approx(loss.exp().item(), rel=1e-5)


def test_padding_alone_is_nothing_to_compare_on():
    teacher, rows = tiny_gpt2(), token_rows(4)
    for row in rows:
        row["attention_mask"] = torch.zeros_like(row["attention_mask"])
    with pytest.raises(ValueError, match="nothing but padding"):
        likeness(teacher, teacher, rows, default_data_collator)


def test_a_decoder_behind_an_encoder_reads_its_labels_a_place_later():
    teacher, rows = tiny_t5(), token_rows(8)
    found = likeness(make_student(teacher), teacher, rows, default_data_collator)
    assert found["kl"] == 0
    assert found["student_perplexity"] == found["teacher_perplexity"] > 1


def test_what_is_no_distribution_is_compared_by_its_squares():
    teacher = tiny_bert(num_labels=1)
    rows = [{name: row[name] for name in ("input_ids", "attention_mask")} for row in text_rows(8)]
    student = make_student(teacher, num_layers=1)
    ours, theirs = (logits_of(model, rows, rows[0]) for model in (student, teacher))
    found = likeness(student, teacher, rows, default_data_collator)
    assert found == {"mse": pytest.approx((ours - theirs).square().mean().item(), rel=1e-5)}
    states = likeness(make_student(teacher.bert), teacher.bert, rows, default_data_collator)
    assert states == {"mse": 0}


def test_rows_without_labels_and_ignored_ones_give_no_accuracy():
    teacher = tiny_vit()
    bare = [{"pixel_values": row["pixel_values"]} for row in image_rows(8)]
    ignored = [{**row, "labels": torch.tensor(-100)} for row in bare]
    for rows in (bare, ignored):
        assert likeness(teacher, teacher, rows, default_data_collator) == {"kl": 0}


def test_models_stay_in_their_modes():
    teacher = tiny_vit()
    student = make_student(teacher).train()
    likeness(student, teacher, image_rows(8), default_data_collator)
    assert student.training
    assert not teacher.training


def test_narrower_states_are_compared_by_the_cosines_between_examples():
    teacher, rows = tiny_bert(None), text_rows(8)
    student = make_student(teacher, num_layers=2, hidden_size=8)
    found = likeness(student, teacher, rows, default_data_collator)
    batch = {name: torch.stack([row[name] for row in rows]) for name in ("input_ids", "attention_mask")}
    mask = batch["attention_mask"][..., None]
    with torch.no_grad():
        states = [model(**batch).last_hidden_state for model in (student, teacher)]
    ours, theirs = (F.normalize((own * mask).sum(1) / mask.sum(1), dim=1) for own in states)
    errors = (ours @ ours.T - theirs @ theirs.T).square()
    assert found == {"similarity": pytest.approx((errors.sum() / 7 / 8).item(), rel=1e-4)}
