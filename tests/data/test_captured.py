"""What a server wrote of a teacher: read in every documented form, trained on as if the teacher had run, or refused."""

import copy
import json
import math

import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models
from transformers import DataCollatorForLanguageModeling, PreTrainedTokenizerFast

from hf_blockkd.data.captured import (
    CAPTURED_IDS,
    CAPTURED_LOG_PROBS,
    FINGERPRINT,
    CapturedCollator,
    captured_rows,
    read_entries,
    tokenizer_fingerprint,
)
from hf_blockkd.losses.rows import RowLosses
from hf_blockkd.losses.top_k import TopK, top_k

from ..helpers.tiny_models import VOCABULARY, tiny_bert, tiny_llama
from ..helpers.training import PLAIN_SGD, Gradients, batch_of, make_trainer, max_difference, step_logs, token_rows

KD = {"objective": "kd", "temperature": 1.0, "captured_columns": ["prompt_logprobs"]}


def stack(examples):
    """Rows of one length, as they are."""
    return {name: torch.stack([torch.as_tensor(row[name]) for row in examples]) for name in examples[0]}


@torch.no_grad()
def likeliest(teacher, row, k):
    """Of one text, what the teacher says of its tokens from the second on: (T - 1, k) ids and log probabilities."""
    logits = teacher(input_ids=row["input_ids"][None], attention_mask=row["attention_mask"][None]).logits[0, :-1]
    kept = top_k(logits, k, 1.0, VOCABULARY)
    length = int(row["attention_mask"].sum()) - 1
    return kept.indices[:length].tolist(), kept.log_probs[:length, :-1].tolist()


def as_vllm(ids, log_probs):
    positions = [
        {str(token): {"logprob": p, "rank": rank, "decoded_token": "?"} for rank, (token, p) in enumerate(pairs, 1)}
        for pairs in map(zip, ids, log_probs)
    ]
    return {"prompt_logprobs": [None, *positions]}


def as_json(ids, log_probs):
    return {"prompt_logprobs": json.dumps(as_vllm(ids, log_probs)["prompt_logprobs"])}


def as_distillkit(ids, log_probs):
    return {"token_ids": ids, "top_values": log_probs}


def as_logits_stand(ids, log_probs):
    """With an entry of the last position, too, which is about a token after the end."""
    return {"token_ids": [*ids, ids[0]], "top_values": [*log_probs, log_probs[0]]}


def whole_rows(count):
    """Without padding, whose labels would ask for what nobody captured."""
    return [row for row in token_rows(2 * count) if row["attention_mask"].all()]


FORMS = {"vllm": as_vllm, "json": as_json, "distillkit": as_distillkit, "as-logits": as_logits_stand}


def captured(teacher, rows, k, form=as_vllm):
    return [{**row, **form(*likeliest(teacher, row, k))} for row in rows]


def columns_of(form):
    return ["token_ids", "top_values"] if form in (as_distillkit, as_logits_stand) else ["prompt_logprobs"]


def one_step(folder, student, teacher, rows, **settings):
    gradients = Gradients()
    settings = {**KD, "max_steps": 1, **PLAIN_SGD, **settings}
    trainer = make_trainer(folder, copy.deepcopy(student), teacher, rows, callbacks=[gradients], **settings)
    trainer.train()
    return gradients.steps[0], step_logs(trainer)[0]


@pytest.fixture
def models_():
    return tiny_llama(num_hidden_layers=2), tiny_llama()


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_every_form_gives_the_loss_of_the_teachers_own_top_k(models_, form):
    student, teacher = models_
    rows = token_rows(4)
    for row in rows:
        row["labels"] = row["labels"].masked_fill(row["attention_mask"] == 0, -100)
    batch = CapturedCollator(stack, columns_of(form), VOCABULARY)(captured(teacher, rows, 5, form))
    plain = batch_of(rows)
    losses = RowLosses("single_label_classification", plain["labels"][:, 1:])
    with torch.no_grad():
        clean, own = (
            model(input_ids=plain["input_ids"], attention_mask=plain["attention_mask"]).logits[:, :-1]
            for model in (teacher, student)
        )
    kept = captured_rows(batch, losses, VOCABULARY)
    expected = top_k(losses.rows(clean), 5, 1.0, VOCABULARY)
    assert torch.equal(kept.indices, expected.indices)
    torch.testing.assert_close(kept.log_probs, expected.log_probs, rtol=1e-4, atol=1e-6)
    learner = losses.rows(own)
    torch.testing.assert_close(losses.distill(learner, kept), losses.distill(learner, expected), rtol=1e-5, atol=1e-7)


def test_entries_of_labelled_tokens_alone_are_enough_for_them():
    row = {"input_ids": torch.arange(6), "attention_mask": torch.ones(6), "labels": torch.tensor([-100] * 4 + [4, 5])}
    row |= {"token_ids": [[7, 8], [9, 10]], "top_values": [[-1.0, -2.0], [-1.5, -2.5]]}
    batch = CapturedCollator(stack, ["token_ids", "top_values"], VOCABULARY)([row])
    assert batch[CAPTURED_IDS][0].tolist() == [[-1, -1]] * 4 + [[7, 8], [9, 10]]
    rest = math.log(1 - math.exp(-1) - math.exp(-2))
    torch.testing.assert_close(batch[CAPTURED_LOG_PROBS][0, 4], torch.tensor([-1.0, -2.0, rest]))


def test_places_follow_the_side_that_is_padded():
    mask = torch.tensor([0, 0, 1, 1, 1])
    row = {"input_ids": torch.arange(5), "attention_mask": mask, "labels": torch.arange(5).masked_fill(mask == 0, -100)}
    row |= {"prompt_logprobs": [None, {3: -0.5}, {4: -0.25}]}
    batch = CapturedCollator(stack, ["prompt_logprobs"], VOCABULARY)([row])
    assert batch[CAPTURED_IDS][0, :, 0].tolist() == [-1, -1, -1, 3, 4]


def test_positions_with_fewer_tokens_count_as_if_they_stood_alone():
    """vLLM adds the actual token where it is not among the likeliest, so that some positions have one more."""
    logits = torch.randn(2, 9)
    short = TopK(torch.tensor([[0.5, 0.3, 0.2]]).log(), torch.tensor([[4, 0]]), 9)
    filled = TopK(
        torch.tensor([[0.5, 0.3, 0.0, 0.2], [0.4, 0.3, 0.2, 0.1]]).log(), torch.tensor([[4, 0, -1], [1, 2, 3]]), 9
    )
    for name in ("forward_kl", "reverse_kl", "jsd"):
        losses = [
            RowLosses("single_label_classification", torch.zeros(1, dtype=torch.long), divergence=name)
            for _ in range(2)
        ]
        alone, padded = losses[0].distill(logits[:1], short), losses[1].distill(logits[:1], filled[:1])
        torch.testing.assert_close(padded, alone)
    assert torch.isneginf(filled.bucket(logits, 1.0)[0, 2])


def test_a_table_keeps_mappings_of_different_keys(models_):
    """Arrow gives every mapping the keys of all, with None where there were none."""
    rows = captured(models_[1], token_rows(3), 4)
    table = Dataset.from_list(
        [{name: value if name == "prompt_logprobs" else value.tolist() for name, value in row.items()} for row in rows]
    )
    for row, stored in zip(rows, table, strict=True):
        ours, theirs = (read_entries([one["prompt_logprobs"]]) for one in (row, stored))
        assert [dict(zip(*entry, strict=True)) for entry in ours] == [
            dict(zip(*entry, strict=True)) for entry in theirs
        ]


@pytest.mark.parametrize("chunk", [0, 4])
def test_training_is_that_with_a_teacher_cache_of_the_same_k(tmp_path, models_, chunk):
    student, teacher = models_
    rows = whole_rows(4)
    settings = {"loss_chunk_size": chunk}
    ours, our_logs = one_step(tmp_path / "ours", student, teacher, captured(teacher, rows, 6), **settings)
    cached = {"captured_columns": None, "teacher_cache": str(tmp_path / "cache"), "teacher_cache_top_k": 6}
    theirs, their_logs = one_step(tmp_path / "theirs", student, teacher, rows, **cached, **settings)
    assert our_logs["loss_distill"] == pytest.approx(their_logs["loss_distill"], rel=2e-3)  # kept in float16
    assert our_logs["loss_task"] == their_logs["loss_task"]
    assert max_difference(ours, theirs) < 1e-3


def test_plain_distillation_never_runs_the_teacher_and_needs_none(tmp_path, models_):
    student, teacher = models_
    rows = captured(teacher, whole_rows(4), 6)
    runs = []
    teacher.register_forward_hook(lambda *_: runs.append(1))
    with_teacher, logs = one_step(tmp_path, student, teacher, rows)
    # The constructor looks at its states once.
    at_first = len(runs)
    make_trainer(tmp_path, copy.deepcopy(student), teacher, rows, **KD)
    assert len(runs) == 2 * at_first
    without, other_logs = one_step(tmp_path, student, None, rows)
    assert max_difference(with_teacher, without) == 0.0
    assert logs["loss_distill"] == other_logs["loss_distill"]


def test_stepping_stones_go_on_through_the_teachers_layers(tmp_path, models_):
    student, teacher = models_
    rows = whole_rows(4)
    everything = {"objective": "block_kd", "stepping_stones": "all"}
    ours, our_logs = one_step(tmp_path, student, teacher, captured(teacher, rows, VOCABULARY - 1), **everything)
    theirs, their_logs = one_step(tmp_path, student, teacher, rows, captured_columns=None, **everything)
    assert our_logs["stone_1/distill"] == pytest.approx(their_logs["stone_1/distill"], rel=1e-3)
    assert max_difference(ours, theirs) < 1e-4


def test_columns_reach_the_collator_and_not_the_model(tmp_path, models_):
    """`remove_unused_columns` keeps them, in evaluation, too, where nothing is distilled."""
    student, teacher = models_
    words = {f"w{i}": i for i in range(VOCABULARY)}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="w1")), pad_token="w0", unk_token="w1"
    )
    rows = [{"input_ids": row["input_ids"][: 4 + i % 3].tolist()} for i, row in enumerate(token_rows(8))]
    for row in rows:
        ids = torch.tensor(row["input_ids"])
        row |= as_vllm(*likeliest(teacher, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, 3))
        row[FINGERPRINT] = tokenizer_fingerprint(tokenizer)
    table = Dataset.from_list(rows)
    trainer = make_trainer(tmp_path, student, None, table, eval_dataset=table, max_steps=2, **KD)
    trainer.data_collator = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    trainer.train()
    assert trainer.evaluate()["eval_loss"] > 0
    assert step_logs(trainer)[-1]["loss_distill"] > 0
    other = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({**words, "w64": 64}, unk_token="w1")), pad_token="w0"
    )
    assert tokenizer_fingerprint(other) != tokenizer_fingerprint(tokenizer)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"prompt_logprobs": [None, *[{VOCABULARY: -1.0}] * 5]},
            r"token id 64 at position 1 .* have 64 tokens in common",
        ),
        ({"prompt_logprobs": [None, *[{3: -1.0, 4: 0.0}] * 5]}, r"sum to 1\.368 at position 1 .* not logits"),
        ({"prompt_logprobs": [None, *[{3: 12.0}] * 5]}, "sum to 1.628e\\+05 at position 1"),
        ({"prompt_logprobs": [None, *[{3: float("nan")}] * 5]}, "sum to nan at position 1"),
        ({FINGERPRINT: "0" * 16}, "a tokenizer of fingerprint '0000000000000000', but that of this run has"),
    ],
)
def test_rows_that_cannot_be_the_teachers_are_refused_before_anything_is_trained(tmp_path, models_, change, message):
    from hf_blockkd import BlockwiseDistillConfig, BlockwiseDistillTrainer

    student, teacher = models_
    rows = [{**row, **change} for row in captured(teacher, token_rows(4), 3)]
    words = {f"w{i}": i for i in range(VOCABULARY)}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="w1")), pad_token="w0"
    )
    args = BlockwiseDistillConfig(str(tmp_path), num_blocks=2, use_cpu=True, report_to="none", **KD)
    with pytest.raises(ValueError, match=message):
        BlockwiseDistillTrainer(
            model=student, teacher_model=teacher, args=args, train_dataset=rows, processing_class=tokenizer
        )


def test_entries_that_do_not_fit_the_text_are_refused(tmp_path, models_):
    student, teacher = models_
    rows = captured(teacher, token_rows(4), 3)
    collate = CapturedCollator(stack, ["prompt_logprobs"], VOCABULARY)
    rows[2]["prompt_logprobs"] = rows[2]["prompt_logprobs"][:2]
    with pytest.raises(ValueError, match="Example 2 of a batch has 6 tokens, 4 of them with labels, but 2 positions"):
        collate(rows)
    with pytest.raises(ValueError, match=r"A text has token ids of 2 positions, but log probabilities of 1"):
        read_entries([[[1], [2]], [[-1.0]]])
    with pytest.raises(ValueError, match=r"A position has 2 token ids, but 1 log probabilities"):
        read_entries([[[1, 2]], [[-1.0]]])
    rows = captured(teacher, whole_rows(4), 3)
    rows[3]["prompt_logprobs"][5] = None
    with pytest.raises(ValueError, match=r"Nothing was captured of some tokens of examples .* to be distilled"):
        one_step(tmp_path, student, teacher, rows)
    with pytest.raises(ValueError, match="row 0 of the training set has no 'prompt_logprobs', only input_ids"):
        make_trainer(tmp_path, student, teacher, token_rows(4), **KD)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": 2.0}, "`temperature=2.0` is not the 1.0 at which servers answer"),
        ({"objective": "alone"}, "`objective='alone'` asks for no logits of the teacher"),
        ({"objective": "hint"}, "the states that `objective='hint'` asks for were not captured"),
        ({"divergence": "dkd"}, "`divergence='dkd'` needs all tokens"),
        ({"standardize_logits": True}, "`standardize_logits=True` needs all tokens"),
        ({"teacher_cache": "cache"}, "`teacher_cache='cache'` keeps the teacher's outputs, too"),
        ({"lmbda": 0.5}, "`lmbda=0.5` needs the teacher's word"),
        ({"captured_columns": ["a", "b", "c"]}, "name one column as vLLM's `prompt_logprobs`, or two"),
    ],
)
def test_settings_that_need_more_than_what_was_captured_are_refused(tmp_path, models_, settings, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, *models_, token_rows(4), **{**KD, **settings})


def test_other_models_and_stones_without_a_teacher_are_refused(tmp_path, models_):
    with pytest.raises(ValueError, match="BertForMaskedLM is no causal language model"):
        make_trainer(tmp_path, tiny_bert("MaskedLM"), tiny_bert("MaskedLM"), token_rows(4), **KD)
    rows = captured(models_[1], token_rows(4), 3)
    with pytest.raises(ValueError, match="stepping stones run through the teacher's layers; pass a teacher"):
        make_trainer(tmp_path, models_[0], None, rows, **{**KD, "objective": "block_kd"})


@pytest.mark.parametrize("config", [{"stone_weight": 0.0}, {"stepping_stones": "none"}])
def test_without_stones_no_connector_waits_for_states_that_nobody_captured(tmp_path, models_, config):
    rows = captured(models_[1], token_rows(4), 3)
    trainer = make_trainer(tmp_path, models_[0], None, rows, **{**KD, "objective": "block_kd", **config})
    assert trainer.pair.trained_stones == []


@pytest.mark.parametrize(
    "run",
    [
        lambda trainer, folder: trainer.evaluate_blocks(),
        lambda trainer, folder: trainer.evaluate_stepping_stones(),
        lambda trainer, folder: trainer.stepping_stone_logits(batch_of(token_rows(2))),
        lambda trainer, folder: trainer.save_stepping_stone(1, folder / "stone"),
    ],
    ids=["blocks", "stones", "logits", "saved"],
)
def test_what_runs_a_teacher_that_is_not_there_says_so(tmp_path, models_, run):
    rows = captured(models_[1], token_rows(4), 3)
    trainer = make_trainer(tmp_path, models_[0], None, rows, eval_dataset=token_rows(4), **KD)
    with pytest.raises(ValueError, match=r"`teacher_model` is None, .* pass a teacher"):
        run(trainer, tmp_path)


def test_a_ladder_of_captured_outputs_compares_no_states(tmp_path, models_):
    student, teacher = models_
    rows = captured(teacher, whole_rows(256), 3)
    trainer = make_trainer(tmp_path, student, teacher, rows, **{**KD, "objective": "ladder", "max_steps": 1})
    trainer.train()
    assert trainer.pair.fitted_stones
    assert "loss_state" not in step_logs(trainer)[0]


def test_all_tokens_of_a_teacher_are_plain_distillation(models_):
    student, teacher = models_
    rows = token_rows(4)
    for row in rows:
        row["labels"] = row["labels"].masked_fill(row["attention_mask"] == 0, -100)
    batch = CapturedCollator(stack, columns_of(as_vllm), VOCABULARY)(captured(teacher, rows, VOCABULARY))
    plain = batch_of(rows)
    losses = RowLosses("single_label_classification", plain["labels"][:, 1:])
    with torch.no_grad():
        clean, own = (
            losses.rows(model(input_ids=plain["input_ids"], attention_mask=plain["attention_mask"]).logits[:, :-1])
            for model in (teacher, student)
        )
    found = losses.distill(own, captured_rows(batch, losses, VOCABULARY))
    torch.testing.assert_close(found, losses.distill(own, clean), rtol=1e-4, atol=1e-6)
