"""Students and teachers in other dtypes than float32, and values that do not fit into theirs."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from hf_blockkd.losses.chunked_loss import chunked_distillation_loss
from hf_blockkd.losses.learners import PLAIN_WEIGHTS, STUDENT, Learner
from hf_blockkd.losses.rows import RowLosses
from hf_blockkd.models.heads import find_head

from ..helpers import references
from ..helpers.tiny_models import LABELS, tiny_bert, tiny_llama, tiny_vit
from ..helpers.training import (
    PLAIN_SGD,
    Gradients,
    assert_same_state,
    image_rows,
    make_trainer,
    state_of,
    step_logs,
    text_rows,
    token_rows,
)

NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
FAMILIES = {
    "vit": (tiny_vit, {}, image_rows),
    "bert": (tiny_bert, NO_DROPOUT, text_rows),
    "llama": (tiny_llama, {}, token_rows),
}
GRADIENT_BOUND = {torch.bfloat16: 0.04, torch.float16: 0.005}
"""Norm of the error of all gradients relative to theirs in float32; the largest seen here are 0.021 and 0.002."""
LOSS_BOUND = {torch.bfloat16: 0.02, torch.float16: 0.002}
"""Relative error of every logged loss; the largest seen here are 0.008 and 0.0007."""


def train(folder, family, student_dtype=torch.float32, teacher_dtype=torch.float32, **settings):
    """Gradients of the first step, logged losses, and the trainer."""
    torch.manual_seed(0)
    build, config, rows = FAMILIES[family]
    student, teacher = build(num_hidden_layers=2, **config).to(student_dtype), build(**config).to(teacher_dtype)
    watch = Gradients()
    settings = {"max_steps": 2, "cross_weight": 0.5, **PLAIN_SGD, **settings}
    trainer = make_trainer(folder, student, teacher, rows(8), callbacks=[watch], **settings)
    trainer.train()
    losses = {name: value for name, value in step_logs(trainer)[0].items() if "loss" in name or "stone" in name}
    return watch.steps[0], losses, trainer


def relative_error(found, expected):
    assert found.keys() == expected.keys()
    difference = torch.cat([(found[name].float() - expected[name].float()).flatten() for name in expected])
    return (difference.norm() / torch.cat([tensor.float().flatten() for tensor in expected.values()]).norm()).item()


HALF, FULL = torch.bfloat16, torch.float32


@pytest.mark.parametrize(
    ("student_dtype", "teacher_dtype", "settings", "coarsest"),
    [
        pytest.param(FULL, FULL, {"bf16": True}, HALF, id="autocast"),
        pytest.param(FULL, HALF, {}, HALF, id="bf16 teacher"),
        pytest.param(HALF, FULL, {}, HALF, id="bf16 student"),
        pytest.param(HALF, HALF, {"loss_chunk_size": 0}, HALF, id="bf16 both"),
        pytest.param(FULL, HALF, {"bf16": True}, HALF, id="bf16 teacher, autocast"),
        pytest.param(FULL, torch.float16, {}, torch.float16, id="fp16 teacher"),
        pytest.param(torch.float16, FULL, {}, torch.float16, id="fp16 student"),
    ],
)
@pytest.mark.parametrize("family", ["llama", *(pytest.param(name, marks=pytest.mark.slow) for name in ("vit", "bert"))])
def test_lower_precisions_stay_near_float32(tmp_path, family, student_dtype, teacher_dtype, settings, coarsest):
    expected, expected_losses, _ = train(tmp_path, family)
    gradients, losses, trainer = train(tmp_path, family, student_dtype, teacher_dtype, **settings)
    assert relative_error(gradients, expected) < GRADIENT_BOUND[coarsest]
    assert losses == pytest.approx(expected_losses, rel=LOSS_BOUND[coarsest])
    # Everybody stays in their own dtype; connectors, whose updates are small, in float32.
    assert {parameter.dtype for parameter in trainer.teacher.parameters()} == {teacher_dtype}
    assert {parameter.dtype for parameter in trainer.connectors.parameters()} == {torch.float32}
    own = {p.dtype for name, p in trainer.model.named_parameters() if "blockwise_connectors" not in name}
    assert own == {student_dtype}


def test_small_updates_of_connectors_do_not_vanish_in_a_bfloat16_student(tmp_path):
    """Adam moves a weight by about its learning rate, which is less than bfloat16 can add to most weights."""
    student, teacher = tiny_vit(num_hidden_layers=2, hidden_size=32).to(HALF), tiny_vit()
    trainer = make_trainer(tmp_path, student, teacher, image_rows(4), max_steps=1, learning_rate=1e-5)
    before = state_of(trainer.connectors)
    trainer.train()
    assert all((tensor != before[name]).float().mean() > 0.9 for name, tensor in state_of(trainer.connectors).items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl", "jsd", "dkd"])
def test_divergences_of_coarse_logits_are_those_of_the_same_numbers_in_float64(dtype, name):
    logits, target = (3 * torch.randn(6, LABELS)).to(dtype), (3 * torch.randn(6, LABELS)).to(dtype)
    labels = torch.arange(6) % LABELS
    losses = RowLosses("single_label_classification", labels, divergence=name, temperature=2.0)
    found = losses.distill(logits, target)
    exact = references.divergence(logits.double().numpy(), target.double().numpy(), name, 2.0, labels=labels.numpy())
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(exact.mean(), rel=1e-5)
    assert losses.task(logits).item() == pytest.approx(
        references.cross_entropy(logits.double().numpy(), labels.numpy()).mean(), rel=1e-5
    )


def test_a_student_is_saved_in_its_own_dtype(tmp_path):
    _, _, trainer = train(tmp_path, "llama", HALF, FULL)
    trainer.save_model(str(tmp_path / "saved"))
    loaded = LlamaForCausalLM.from_pretrained(tmp_path / "saved", dtype="auto")
    own = {name: tensor for name, tensor in state_of(trainer.model).items() if "blockwise_connectors" not in name}
    assert {tensor.dtype for tensor in own.values()} == {HALF}
    assert_same_state(state_of(loaded), own)


# ---- What does not fit ----


def test_a_teacher_whose_logits_overflow_in_float16_is_named_before_anything_is_updated(tmp_path):
    student, teacher = tiny_vit(num_hidden_layers=2), tiny_vit()
    with torch.no_grad():
        teacher.classifier.weight.mul_(100_000)
    trainer = make_trainer(tmp_path, student, teacher.half(), image_rows(4), max_steps=1)
    before = state_of(trainer.model)
    with pytest.raises(ValueError, match=r"not finite for examples \[.* run the teacher in a wider dtype"):
        trainer.train()
    assert_same_state(state_of(trainer.model), before)
    # In bfloat16, which reaches as far as float32, the same weights are no problem.
    make_trainer(tmp_path, tiny_vit(num_hidden_layers=2), teacher.bfloat16(), image_rows(4), max_steps=1).train()


def test_float16_on_a_cpu_is_refused_because_nothing_would_run_in_it(tmp_path):
    with pytest.raises(ValueError, match=r"`fp16` is True, but on a CPU .* float32, without a word; set `bf16`"):
        make_trainer(tmp_path, tiny_vit(), tiny_vit(), image_rows(4), fp16=True)


def test_gradients_of_a_mean_over_many_rows_survive_float16_under_a_scaled_loss():
    """A gradient scaler multiplies the loss; what the chunks have computed before must not have underflowed by then."""
    rows, width, classes = 2**17, 16, 8
    config = LlamaConfig(
        vocab_size=classes, hidden_size=width, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    head = find_head(LlamaForCausalLM(config))
    with torch.no_grad(), head.capture():
        head.model(input_ids=torch.zeros(1, 1, dtype=torch.long))
    head.model.requires_grad_(False)
    losses = RowLosses("single_label_classification", torch.randint(classes, (rows,)))
    states, target = torch.randn(rows, width), torch.randn(rows, width)
    gradients = {}
    for dtype in (torch.float16, torch.float32):
        head.model.to(dtype)
        own = states.to(dtype).requires_grad_()
        loss = chunked_distillation_loss(
            losses, {STUDENT: Learner(own, student_head=True)}, target.to(dtype), PLAIN_WEIGHTS,
            student_head=head, teacher_head=head, chunk_size=2**14,
        )  # fmt: skip
        (loss.total * 2**16).backward()
        gradients[dtype] = own.grad.float() / 2**16
    error = (gradients[torch.float16] - gradients[torch.float32]).norm() / gradients[torch.float32].norm()
    assert error < 5e-3, error
