"""Metrics of encoder-decoders see what the student generates, as `Seq2SeqTrainer` shows it to them."""

import copy

import numpy as np
import pytest
import torch
from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments

from ..helpers.tiny_models import tiny_bart, tiny_llama, tiny_t5
from ..helpers.training import make_trainer, text_rows, token_rows

GENERATES = {"predict_with_generate": True, "generation_max_length": 9}


def even_t5():
    """As many layers in the decoder as in the encoder, by which transformers makes the cache of a T5."""
    return tiny_t5(num_layers=3)


def rows(count=8):
    """Texts, and others to make of them, whose length is another one."""
    return [
        {**row, "labels": target["input_ids"][:4]}
        for row, target in zip(text_rows(count), token_rows(count, seed=1), strict=True)
    ]


class Seen:
    def __call__(self, prediction):
        self.predictions, self.labels = prediction
        return {"length": 0 if isinstance(self.predictions, tuple) else self.predictions.shape[1]}


@pytest.mark.parametrize("build", [even_t5, tiny_bart], ids=["t5", "bart"])
@pytest.mark.parametrize("beams", [None, 3])
def test_metrics_see_the_tokens_and_the_loss_that_transformers_own_trainer_gives(tmp_path, build, beams):
    student, teacher, ours, theirs = build(), build(), Seen(), Seen()
    settings = {**GENERATES, "generation_num_beams": beams, "eval_dataset": rows(), "compute_metrics": ours}
    trainer = make_trainer(tmp_path, copy.deepcopy(student), teacher, rows(), **settings)
    metrics = trainer.evaluate()
    args = Seq2SeqTrainingArguments(
        str(tmp_path),
        per_device_eval_batch_size=4,
        use_cpu=True,
        report_to="none",
        generation_num_beams=beams,
        **GENERATES,
    )
    reference = Seq2SeqTrainer(model=student, args=args, eval_dataset=rows(), compute_metrics=theirs)
    expected = reference.evaluate()
    np.testing.assert_array_equal(ours.predictions, theirs.predictions[:, :9])
    assert not theirs.predictions[:, 9:].any()  # it fills up to the default of 20, whatever was asked for
    np.testing.assert_array_equal(ours.labels, theirs.labels[:, :4])
    assert metrics["eval_loss"] == pytest.approx(expected["eval_loss"], rel=1e-6)
    assert metrics["eval_length"] == 9


def test_sampling_in_evaluation_leaves_the_random_state_to_the_training(tmp_path):
    states = []
    for settings in (GENERATES, {}):
        student = even_t5()
        student.generation_config.do_sample = True
        trainer = make_trainer(tmp_path, student, even_t5(), rows(), eval_dataset=rows(), **settings)
        trainer.compute_metrics = Seen()
        torch.manual_seed(0)
        trainer.evaluate()
        states.append(torch.get_rng_state())
    assert torch.equal(*states)


def test_what_generates_no_texts_of_its_own_is_refused(tmp_path):
    with pytest.raises(
        ValueError, match="LlamaForCausalLM is no encoder-decoder that generates texts; set it to False"
    ):
        make_trainer(tmp_path, tiny_llama(), tiny_llama(), token_rows(), **GENERATES)
    with pytest.raises(ValueError, match="`eval_stepping_stones` evaluates stepping stones, which generate no texts"):
        make_trainer(tmp_path, tiny_t5(), tiny_t5(), rows(), eval_stepping_stones=True, **GENERATES)
