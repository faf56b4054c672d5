"""The chunked objective against the plain one, for heads that scale, cap, tie, bias and transform."""

import copy

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import CohereConfig, CohereForCausalLM, GraniteConfig, GraniteForCausalLM

from hf_blockkd.losses.chunked_loss import CHUNK_ELEMENTS, OTHER_CHUNK_ELEMENTS, default_chunk_size
from hf_blockkd.models.heads import find_head
from hf_blockkd.routing.logits import main_outputs

from ..helpers.tiny_models import (
    VOCABULARY,
    WIDTH,
    tiny_bert,
    tiny_gemma3,
    tiny_gpt2,
    tiny_llama,
    tiny_mistral,
    tiny_t5,
    tiny_vit,
)
from ..helpers.training import PLAIN_SGD, Gradients, batch_of, make_trainer, step_logs, token_rows

SMALL = {
    "hidden_size": 16,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "intermediate_size": 32,
    "vocab_size": VOCABULARY,
    "pad_token_id": 0,
}
FAMILIES = {
    "llama": lambda layers: tiny_llama(num_hidden_layers=layers),
    "llama, tied": lambda layers: tiny_llama(num_hidden_layers=layers, tie_word_embeddings=True),
    "gpt2": lambda layers: tiny_gpt2(n_layer=layers),
    "gemma3, soft-capped": lambda layers: tiny_gemma3(num_hidden_layers=layers, final_logit_softcapping=2.0),
    "mistral": lambda layers: tiny_mistral(num_hidden_layers=layers),
    "cohere, scaled": lambda layers: CohereForCausalLM(CohereConfig(num_hidden_layers=layers, **SMALL)),
    "granite, scaled": lambda layers: GraniteForCausalLM(
        GraniteConfig(num_hidden_layers=layers, logits_scaling=3.0, **SMALL)
    ),
    "masked bert, transformed and biased": lambda layers: tiny_bert(
        "MaskedLM", num_hidden_layers=layers, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
    ),
}


def one_step(folder, student, teacher, rows, **config):
    """Gradients and logged losses of one optimizer step."""
    gradients = Gradients()
    trainer = make_trainer(
        folder, copy.deepcopy(student), teacher, rows, callbacks=[gradients], max_steps=1, **PLAIN_SGD, **config
    )
    trainer.train()
    (logs,) = step_logs(trainer)
    return gradients.steps[0], {name: value for name, value in logs.items() if "loss" in name or "stone" in name}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_head_alone_gives_the_models_own_logits(family):
    model = FAMILIES[family](2).eval()
    head = find_head(model)
    rows = batch_of(token_rows())
    inputs = {name: rows[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        logits = main_outputs(model(**inputs))[0]
        with head.capture() as captured:
            short = main_outputs(model(**inputs))[0]
        again = head(captured["states"][3])
    assert short.shape[1] == 1
    torch.testing.assert_close(again, logits[3], rtol=1e-5, atol=1e-6)
    assert "forward" not in vars(model.base_model)


@pytest.mark.parametrize("model", [tiny_t5(), tiny_vit()], ids=["t5", "vit"])
def test_a_model_whose_body_is_not_separate_has_no_head_of_its_own(model):
    assert find_head(model) is None


@pytest.mark.parametrize("cross_weight", [0.0, 0.7])
@pytest.mark.parametrize("family", FAMILIES)
def test_chunks_change_neither_losses_nor_gradients(tmp_path, family, cross_weight):
    student, teacher, rows = FAMILIES[family](2), FAMILIES[family](4), token_rows(8, length=12)
    settings = {"cross_weight": cross_weight, "per_device_train_batch_size": 8}
    plain, plain_logs = one_step(tmp_path, student, teacher, rows, loss_chunk_size=0, **settings)
    for chunk_size in (4, 5, 64):
        chunked, chunked_logs = one_step(tmp_path, student, teacher, rows, loss_chunk_size=chunk_size, **settings)
        assert chunked.keys() == plain.keys()
        assert chunked_logs == pytest.approx(plain_logs, rel=1e-5, abs=1e-6)
        for name, gradient in plain.items():
            torch.testing.assert_close(chunked[name], gradient, rtol=1e-5, atol=1e-6)
    assert all(parameter.grad is None for parameter in teacher.parameters())


@pytest.mark.parametrize(
    "options",
    [
        {"divergence": "reverse_kl"},
        {"divergence": "jsd"},
        {"divergence": "jsd", "beta": 0.9},
        {"divergence": "dkd"},
        {"standardize_logits": True},
    ],
    ids=str,
)
def test_chunks_share_the_divergence_and_its_options(tmp_path, options):
    student, teacher, rows = tiny_llama(num_hidden_layers=2), tiny_llama(num_hidden_layers=4), token_rows()
    plain, plain_logs = one_step(tmp_path, student, teacher, rows, loss_chunk_size=0, **options)
    chunked, chunked_logs = one_step(tmp_path, student, teacher, rows, loss_chunk_size=3, **options)
    assert chunked_logs == pytest.approx(plain_logs, rel=1e-5)
    for name, gradient in plain.items():
        torch.testing.assert_close(chunked[name], gradient, rtol=1e-5, atol=1e-6)


def test_chunks_agree_in_bfloat16(tmp_path):
    student, teacher, rows = tiny_llama(num_hidden_layers=2), tiny_llama(num_hidden_layers=4), token_rows()
    _, plain = one_step(tmp_path, student, teacher, rows, loss_chunk_size=0, bf16=True)
    _, chunked = one_step(tmp_path, student, teacher, rows, loss_chunk_size=5, bf16=True)
    assert chunked == pytest.approx(plain, rel=5e-2)


def test_chunks_add_up_over_micro_batches(tmp_path):
    student, teacher, rows = tiny_llama(num_hidden_layers=2), tiny_llama(num_hidden_layers=4), token_rows(8)
    whole, _ = one_step(tmp_path, student, teacher, rows, loss_chunk_size=5, per_device_train_batch_size=8)
    parts, _ = one_step(
        tmp_path,
        student,
        teacher,
        rows,
        loss_chunk_size=5,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=4,
    )
    for name, gradient in whole.items():
        torch.testing.assert_close(parts[name], gradient, rtol=1e-5, atol=1e-6)


class LargestLogits(TorchDispatchMode):
    """Keeps the largest number of rows of any tensor whose last dimension is the vocabulary."""

    def __init__(self):
        super().__init__()
        self.rows = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            # The transposed weight of the head, which is as wide as the vocabulary, too, is no logits.
            is_logits = isinstance(tensor, torch.Tensor) and tensor.shape[-1:] == (VOCABULARY,)
            if is_logits and tensor.shape[-2:] != (WIDTH, VOCABULARY):
                self.rows = max(self.rows, tensor.numel() // VOCABULARY)
        return result


@pytest.mark.parametrize(("chunk_size", "most_rows"), [(0, 8 * 12), (5, 8)])
def test_no_more_logits_exist_at_a_time_than_a_chunk_has(tmp_path, chunk_size, most_rows):
    trainer = make_trainer(
        tmp_path, tiny_llama(num_hidden_layers=2), tiny_llama(num_hidden_layers=4), loss_chunk_size=chunk_size
    )
    trainer.model.train()
    trainer._first_batch_passed = True
    inputs = batch_of(token_rows(8, length=12))
    with LargestLogits() as largest:
        trainer.compute_loss(trainer.model, inputs).backward()
    # With chunks, the heads see one position of each of the 8 sequences, and then 5 rows at a time.
    assert largest.rows == most_rows


def test_a_batch_that_fits_is_not_chunked_by_default():
    assert default_chunk_size(8_000) * 8_000 <= CHUNK_ELEMENTS["cpu"]
    assert default_chunk_size(50_000, "cuda") * 50_000 <= OTHER_CHUNK_ELEMENTS
    assert default_chunk_size(10**9) == default_chunk_size(10**9, "cuda") == 64


def test_vocabularies_that_differ_by_padding_meet_on_the_common_part(tmp_path):
    student = tiny_llama(num_hidden_layers=2, vocab_size=VOCABULARY)
    teacher = tiny_llama(num_hidden_layers=4, vocab_size=VOCABULARY + 29)
    rows = token_rows()
    _, plain_logs = one_step(tmp_path, student, teacher, rows, loss_chunk_size=0)
    _, chunked_logs = one_step(tmp_path, student, teacher, rows, loss_chunk_size=5)
    assert chunked_logs == pytest.approx(plain_logs, rel=1e-5)
    # What the teacher says of its padding does not matter to the divergence.
    with torch.no_grad():
        teacher.lm_head.weight[VOCABULARY:] = 0.0
    _, without_padding = one_step(tmp_path, student, teacher, rows, stepping_stones="none", task_weight=0.0)
    with torch.no_grad():
        teacher.lm_head.weight[VOCABULARY:] = 7.0
    _, with_padding = one_step(tmp_path, student, teacher, rows, stepping_stones="none", task_weight=0.0)
    assert with_padding == without_padding


def test_the_gradient_of_a_head_in_bfloat16_does_not_err_more_in_more_chunks(tmp_path):
    student, teacher = tiny_llama(num_hidden_layers=2), tiny_llama()
    batch = batch_of(token_rows(64, length=12))

    def gradient(dtype, chunk_size):
        model = copy.deepcopy(student).to(dtype)
        trainer = make_trainer(tmp_path, model, teacher, loss_chunk_size=chunk_size, objective="kd")
        trainer.compute_loss(model.train(), batch).backward()
        return model.lm_head.weight.grad.float()

    reference = gradient(torch.float32, 0)
    errors = [
        ((gradient(torch.bfloat16, size) - reference).norm() / reference.norm()).item() for size in (0, 256, 16, 4)
    ]
    assert max(errors) < 1.5 * errors[0]


def test_outputs_that_are_asked_for_hold_the_logits_of_all_positions(tmp_path):
    student, batch = tiny_llama(num_hidden_layers=2), batch_of(token_rows(4))
    trainer = make_trainer(tmp_path, student, tiny_llama(), loss_chunk_size=5)
    loss, outputs = trainer.compute_loss(student.train(), batch, return_outputs=True)
    assert outputs.logits.shape[:2] == batch["input_ids"].shape
    assert outputs[0] is outputs.loss is loss
    assert loss.item() == pytest.approx(trainer.compute_loss(student, batch).item(), rel=1e-5)
