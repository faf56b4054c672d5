"""Models without a head are cut in width, too: what they return are states, which may become narrower."""

import pytest
import torch
from transformers import AutoModel

from hf_blockkd import make_student
from hf_blockkd.losses.embeddings import embedding_loss
from hf_blockkd.models.pooling import Pooling

from ..helpers.tiny_models import scrambled, tiny_bert, tiny_dinov2, tiny_distilbert, tiny_qwen3, tiny_vit
from ..helpers.training import batch_of, text_rows


@pytest.mark.parametrize("build", [tiny_bert, tiny_distilbert, tiny_qwen3, tiny_vit, tiny_dinov2])
def test_the_parts_of_a_body_are_those_of_the_channels_that_stay(build, tmp_path):
    teacher = scrambled(AutoModel.from_config(build().config)).eval()
    width = teacher.config.hidden_size
    student = make_student(teacher, num_layers=2, hidden_size=8)
    kept, layers = student.cut.channels, student.cut.layers
    assert len(kept) == 8
    checked = 0
    for name, own in student.named_parameters():
        theirs = name.replace(f".{len(layers) - 1}.", f".{layers[-1]}.")
        if own.shape == (8,) and teacher.get_parameter(theirs).shape == (width,) and "norm" in name.lower():
            assert torch.equal(own, teacher.get_parameter(theirs)[kept]), name
            checked += 1
    assert checked >= 5
    student.save_pretrained(tmp_path)
    again, info = AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), student.parameters(), strict=True))


def test_a_cut_that_is_fitted_is_nearer_to_its_teacher():
    teacher = tiny_bert(None)
    rows, batch = text_rows(256), batch_of(text_rows(32, seed=1))
    batch = {name: batch[name] for name in ("input_ids", "attention_mask")}

    def error(**options):
        student = make_student(teacher, num_layers=2, hidden_size=8, **options).eval()
        with torch.no_grad():
            states = [model(**batch).last_hidden_state for model in (student, teacher)]
        vectors = [Pooling().pool(one, batch["attention_mask"]) for one in states]
        return embedding_loss(*vectors, "similarity").mean()

    assert error(data=rows) < 0.8 * error()


def test_a_student_is_pooled_as_its_teacher():
    teacher = tiny_bert(None)
    assert not hasattr(make_student(teacher, num_layers=2), "pooling")
    teacher.pooling = Pooling(("cls",), normalize=True)
    assert make_student(teacher, num_layers=2).pooling == teacher.pooling
