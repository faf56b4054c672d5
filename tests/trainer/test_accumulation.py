"""However a batch is cut into micro-batches, in whatever precision, the step is the same."""

import copy
from functools import partial

import pytest
import torch
from transformers import LlamaForCausalLM, ViTForImageClassification

from ..helpers.tiny_models import scrambled, tiny_bart, tiny_bert, tiny_gpt2, tiny_llama, tiny_t5, tiny_vit
from ..helpers.training import (
    PLAIN_SGD,
    Gradients,
    batch_of,
    image_rows,
    make_trainer,
    max_difference,
    state_of,
    step_logs,
    text_rows,
    token_rows,
)


def multi_label_rows(count):
    generator = torch.Generator().manual_seed(1)
    return [{**row, "labels": torch.randint(2, (5,), generator=generator).float()} for row in image_rows(count)]


def regression_rows(count):
    return [{**row, "labels": torch.tensor(0.3 * i - 1)} for i, row in enumerate(text_rows(count))]


def question_rows(count):
    """Answers as two positions; the first example has none inside the text."""
    rows = [{name: row[name] for name in ("input_ids", "attention_mask")} for row in text_rows(count)]
    spans = [(9, 9) if i == 0 else (i % 3, 3) for i in range(count)]
    return [
        {**row, "start_positions": torch.tensor(start), "end_positions": torch.tensor(end)}
        for row, (start, end) in zip(rows, spans, strict=True)
    ]


def cut_rows(count):
    """Answers of which more ends than starts lie beyond the text."""
    rows = question_rows(count)
    for i, row in enumerate(rows):
        row["start_positions"] = torch.tensor(60 if i % 4 == 3 else i % 3)
        row["end_positions"] = torch.tensor(60 if i % 3 < 2 else 3)
    return rows


def masked_rows(count):
    """Rows 2 and 3, which make a micro-batch of two, have no label that counts."""
    rows = token_rows(count)
    for row in rows[2:4]:
        row["labels"] = torch.full_like(row["labels"], -100)
    return rows


def without_some_labels(make_rows):
    """Every third row has no label, nor has the second micro-batch of two, nor the last step."""

    def make(count):
        rows = make_rows(count)
        for i, row in enumerate(rows):
            if i % 3 == 1 or i in (2, 3) or i >= 8:
                row |= {name: torch.full_like(row[name], -100) for name in row if "label" in name or "pos" in name}
        return rows

    return make


def bert(head="SequenceClassification", **config):
    return tiny_bert(head, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, **config)


class NarrowViT(ViTForImageClassification):
    """Its forward takes no more than it names, so the stock Trainer would scale its loss otherwise."""

    def forward(self, pixel_values=None, labels=None):
        return super().forward(pixel_values, labels=labels)


class RenamedLlama(LlamaForCausalLM):
    """Another name is no other task."""


def narrow(**config):
    return scrambled(NarrowViT(tiny_vit(**config).config)).eval()


def renamed(**config):
    return scrambled(RenamedLlama(tiny_llama(**config).config)).eval()


SHARED = {"stepping_stones": "share", "cross_weight": 0.0}
MULTI_LABEL = {"problem_type": "multi_label_classification"}
REGRESSION = {"num_labels": 1, "problem_type": "regression"}
CASES = {
    "image-classes": (tiny_vit, {}, image_rows, {}),
    "narrow-forward": (narrow, {}, image_rows, {}),
    "multi-label": (tiny_vit, MULTI_LABEL, multi_label_rows, {}),
    "regression": (bert, REGRESSION, regression_rows, {"distill_weight": 0.5}),
    "regression-by-one-label": (bert, {"num_labels": 1}, regression_rows, {}),
    "questions": (partial(bert, "QuestionAnswering"), {}, question_rows, {}),
    "questions-cut-off": (partial(bert, "QuestionAnswering"), {}, cut_rows, {}),
    "masked-tokens": (partial(bert, "MaskedLM"), {}, token_rows, {"divergence": "jsd"}),
    "causal": (tiny_llama, {}, token_rows, {}),
    "causal-without-labels-in-one-micro-batch": (tiny_llama, {}, masked_rows, {}),
    "causal-renamed": (renamed, {}, token_rows, {}),
    "causal-in-chunks": (tiny_llama, {}, masked_rows, {"loss_chunk_size": 3}),
    "causal-dkd": (tiny_llama, {}, masked_rows, {"divergence": "dkd", "standardize_logits": True}),
    "image-classes-shared": (tiny_vit, {}, image_rows, {**SHARED, "stone_fraction": 0.7}),
    "questions-shared": (partial(bert, "QuestionAnswering"), {}, question_rows, SHARED),
    "questions-cut-off-shared": (partial(bert, "QuestionAnswering"), {}, cut_rows, SHARED),
    "multi-label-shared": (tiny_vit, MULTI_LABEL, multi_label_rows, SHARED),
    "causal-shared": (tiny_llama, {}, masked_rows, {**SHARED, "stone_sampling": "cost"}),
    "causal-shared-in-chunks": (tiny_llama, {}, masked_rows, {**SHARED, "loss_chunk_size": 3}),
    "image-classes-unlabelled": (tiny_vit, {}, without_some_labels(image_rows), {}),
    "image-classes-unlabelled-dkd": (tiny_vit, {}, without_some_labels(image_rows), {"divergence": "dkd"}),
    "multi-label-unlabelled": (tiny_vit, MULTI_LABEL, without_some_labels(multi_label_rows), {}),
    "regression-unlabelled": (bert, REGRESSION, without_some_labels(regression_rows), {}),
    "questions-unlabelled": (partial(bert, "QuestionAnswering"), {}, without_some_labels(question_rows), SHARED),
    "causal-unlabelled": (tiny_llama, {}, without_some_labels(token_rows), {"state_weight": 1.0}),
    "causal-unlabelled-in-chunks": (tiny_llama, {}, without_some_labels(token_rows), {"loss_chunk_size": 3}),
    "causal-everywhere": (tiny_llama, {}, token_rows, {"distill_on": "all", "loss_chunk_size": 3, **SHARED}),
    "embeddings": (partial(bert, None), {}, text_rows, {"stepping_stones": "all", "connector": "linear"}),
    "embeddings-shared": (partial(bert, None), {}, text_rows, {**SHARED, "embedding_loss": "squared_error"}),
    "smoothed": (tiny_vit, {}, image_rows, {"label_smoothing_factor": 0.1}),
}


def run(folder, student, teacher, rows, **settings):
    """An epoch in the order of the rows: the trainer, and the gradients of each step."""
    gradients = Gradients()
    settings = {"cross_weight": 0.5, "train_sampling_strategy": "sequential", **PLAIN_SGD, **settings}
    trainer = make_trainer(
        folder, copy.deepcopy(student), teacher, rows, callbacks=[gradients], num_train_epochs=1, **settings
    )
    trainer.train()
    return trainer, gradients.steps


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_micro_batches_add_up_to_the_whole_batch(tmp_path, case):
    build, config, make_rows, settings = case
    teacher, student = build(**config), build(num_hidden_layers=2, **config)
    # 11 rows make one full step of 8, and one of 3 whose last micro-batch is short.
    whole, expected = run(tmp_path, student, teacher, make_rows(11), per_device_train_batch_size=8, **settings)
    assert len(expected) == 2
    assert max(gradient.abs().max() for gradient in expected[0].values()) > 1e-2
    for size, accumulation in [(4, 2), (2, 4), (1, 8)]:
        split, steps = run(
            tmp_path,
            student,
            teacher,
            make_rows(11),
            per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulation,
            **settings,
        )
        for step, reference in zip(steps, expected, strict=True):
            scale = max(1.0, max(gradient.abs().max().item() for gradient in reference.values()))
            assert max_difference(step, reference) < 2e-6 * scale
        assert max_difference(state_of(split.model), state_of(whole.model)) < 2e-6 * scale
        for ours, theirs in zip(step_logs(split), step_logs(whole), strict=True):
            for name in ("loss", "loss_task", "loss_distill", "loss_cross", "stone_1/task", "stone_2/distill"):
                assert ours[name] == pytest.approx(theirs[name], rel=1e-5, abs=1e-6), name


@pytest.mark.parametrize(("builder", "depth"), [(tiny_t5, "num_decoder_layers"), (tiny_bart, "decoder_layers")])
def test_encoder_decoders_read_their_decoder_inputs_off_the_labels_as_their_own_loss_does(tmp_path, builder, depth):
    dropout = {"dropout_rate": 0.0} if builder is tiny_t5 else {"dropout": 0.0}
    teacher, student = builder(**dropout), builder(**dropout, **{depth: 2})
    rows = token_rows(8)
    own = copy.deepcopy(student)(**batch_of(rows)).loss.item()
    whole, expected = run(tmp_path, student, teacher, rows, per_device_train_batch_size=8, stepping_stones="all")
    logs = step_logs(whole)[0]
    stones = 0.5 * logs["stone_1/task"] + logs["stone_2/task"]
    assert logs["loss_task"] - stones == pytest.approx(own, rel=1e-5)
    split = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
    _, steps = run(tmp_path, student, teacher, rows, **split)
    assert max_difference(steps[0], expected[0]) < 1e-5


def test_a_language_model_under_another_name_predicts_the_next_token_as_its_base_does(tmp_path):
    teacher, student = tiny_llama(), renamed(num_hidden_layers=2)
    plain = tiny_llama(num_hidden_layers=2)
    plain.load_state_dict(student.state_dict())
    (_, (ours,)), (_, (theirs,)) = (run(tmp_path, model, teacher, token_rows(4)) for model in (student, plain))
    assert max_difference(ours, theirs) == 0.0


@pytest.mark.parametrize("objective", ["kd", "alone"])
def test_a_step_without_any_label_changes_nothing_where_nothing_is_distilled(tmp_path, objective):
    teacher, student = tiny_llama(), tiny_llama(num_hidden_layers=2)
    rows = token_rows(4)
    (labelled,) = token_rows(1)
    for row in rows:
        row["labels"] = torch.full_like(row["labels"], -100)
    settings = {"distill_weight": 0.0, "cross_weight": 0.0, "per_device_train_batch_size": 4}
    trainer, (step, _) = run(tmp_path, student, teacher, [*rows, labelled], objective=objective, **settings)
    assert len(step) == len(list(trainer.model.parameters()))
    assert all(torch.equal(gradient, torch.zeros_like(gradient)) for gradient in step.values())
    assert step_logs(trainer)[0]["loss"] == 0.0


def test_logits_at_ignored_positions_take_no_part(tmp_path):
    """Tokens after the last label change nothing: no later position sees them, and their own rows do not count."""
    teacher, student = tiny_llama(), tiny_llama(num_hidden_layers=2)
    rows = token_rows(4)
    for row in rows:
        row["labels"][4:] = -100
    other = [{**row, "input_ids": row["input_ids"].clone()} for row in rows]
    for row in other:
        row["input_ids"][4:] = 63
    (_, (first,)), (_, (second,)) = (run(tmp_path, student, teacher, data) for data in (rows, other))
    # The embedding's own rows of the tokens get a gradient of zero either way.
    assert max_difference(first, second) < 1e-6


# ---- Precision and memory ----


@pytest.mark.parametrize(("builder", "make_rows"), [(tiny_vit, image_rows), (tiny_llama, token_rows)])
def test_bf16_stays_close_to_fp32(tmp_path, builder, make_rows):
    teacher, student = builder(), builder(num_hidden_layers=2)
    full, (exact,) = run(tmp_path, student, teacher, make_rows(4))
    half, (rounded,) = run(tmp_path, student, teacher, make_rows(4), bf16=True)
    assert step_logs(half)[0]["loss"] == pytest.approx(step_logs(full)[0]["loss"], rel=0.02)
    assert step_logs(half)[0]["loss"] != step_logs(full)[0]["loss"]
    flat, other = (torch.cat([g.flatten().float() for g in step.values()]) for step in (exact, rounded))
    assert torch.cosine_similarity(flat, other, dim=0) > 0.995
    assert {parameter.dtype for parameter in half.model.parameters()} == {torch.float32}


@pytest.mark.parametrize(
    ("builder", "make_rows"),
    [(tiny_vit, image_rows), (tiny_bert, text_rows), (tiny_llama, token_rows), (tiny_gpt2, token_rows)],
    ids=["vit", "bert", "llama", "gpt2"],
)
def test_activation_checkpointing_gives_the_same_gradients(tmp_path, builder, make_rows):
    depth = "n_layer" if builder is tiny_gpt2 else "num_hidden_layers"
    teacher, student = builder(**{depth: 4}), builder()
    _, (expected,) = run(tmp_path, student, teacher, make_rows(4), num_blocks=3)
    trainer, (step,) = run(tmp_path, student, teacher, make_rows(4), num_blocks=3, activation_checkpointing=True)
    assert trainer.model.is_activation_checkpointing
    assert max_difference(step, expected) < 1e-6
