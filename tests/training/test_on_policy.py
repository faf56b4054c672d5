"""Completions that the student writes itself: the right prompts, the right tokens, the same after a resume."""

import copy

import pytest
import torch
from peft import LoraConfig
from transformers import TrainerCallback

from hf_blockkd.training.on_policy import completed, is_on_policy, left_padded_prompts

from ..helpers.tiny_models import tiny_bert, tiny_gpt2, tiny_llama, tiny_t5
from ..helpers.training import (
    PLAIN_SGD,
    Gradients,
    assert_same_state,
    differs,
    make_trainer,
    max_difference,
    prompt_rows,
    state_of,
    step_logs,
    token_rows,
)

ON_POLICY = {"lmbda": 1.0, "max_new_tokens": 5}
EOS, PAD = 2, 0


def student_of(sampling=False, **config):
    student = tiny_llama(num_hidden_layers=2, eos_token_id=EOS, **config)
    if sampling:
        student.generation_config.do_sample = True
    return student


class Batches(TrainerCallback):
    """Keeps what the student's forward is trained on, which is what the trainer makes a step of."""

    def __init__(self, trainer):
        self.seen = []
        usual = trainer.compute_loss

        def look_on(model, inputs, *args, **kwargs):
            self.seen.append({name: value.clone() for name, value in inputs.items()})
            return usual(model, inputs, *args, **kwargs)

        trainer.compute_loss = look_on


# ---- The parts ----


def test_prompts_are_padded_on_the_left_whichever_side_they_were_padded_on():
    ids, labels = torch.tensor([[5, 6, 7, 8, 0], [0, 0, 4, 9, 3]]), torch.tensor([[-100, -100, 7, 8, -100]] * 2)
    labels[1] = torch.tensor([-100, -100, -100, 9, 3])
    mask = torch.tensor([[1, 1, 1, 1, 0], [0, 0, 1, 1, 1]])
    prompts, kept = left_padded_prompts({"input_ids": ids, "attention_mask": mask, "labels": labels}, pad=1)
    assert prompts.tolist() == [[5, 6], [1, 4]]
    assert kept.tolist() == [[1, 1], [0, 1]]


def test_an_example_without_labels_is_a_prompt_as_a_whole():
    batch = {"input_ids": torch.tensor([[5, 6, 7], [8, 9, 0]]), "attention_mask": torch.tensor([[1, 1, 1], [1, 1, 0]])}
    expected = [[5, 6, 7], [0, 8, 9]]
    assert left_padded_prompts(batch, 0)[0].tolist() == expected
    assert left_padded_prompts({**batch, "labels": torch.full((2, 3), -100)}, 0)[0].tolist() == expected


@pytest.mark.parametrize("eos", [2, [2, 7]])
def test_a_completion_ends_with_the_first_token_that_ends_texts(eos):
    sequences = torch.tensor([[0, 5, 4, 2, 0, 0], [6, 5, 7, 3, 2, 0], [6, 5, 4, 4, 4, 4]])
    batch = completed(sequences, torch.tensor([[0, 1], [1, 1], [1, 1]]), eos, PAD)
    second = [6, 5, 7, 3, 2] if eos == 2 else [6, 5, 7]
    texts = [
        [token for token, is_real in zip(*row, strict=True) if is_real]
        for row in zip(batch["input_ids"].tolist(), batch["attention_mask"].tolist(), strict=True)
    ]
    assert texts == [[5, 4, 2], second, [6, 5, 4, 4, 4, 4]]
    assert batch["distill_mask"].sum(1).tolist() == [2, len(second) - 2, 4]
    assert (batch["labels"] == -100).all()


def test_an_end_that_is_the_padding_too_belongs_to_the_text_once():
    batch = completed(torch.tensor([[5, 4, 0, 0], [5, 4, 3, 0]]), torch.ones(2, 1, dtype=torch.long), 0, pad=0)
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]


def test_padding_after_another_end_is_no_part_of_the_text():
    batch = completed(torch.tensor([[5, 4, 0, 0], [5, 4, 3, 3]]), torch.ones(2, 1, dtype=torch.long), None, pad=0)
    assert batch["attention_mask"].tolist() == [[1, 1, 0, 0], [1, 1, 1, 1]]


def test_the_share_of_steps_is_as_asked_and_depends_on_seed_and_step_alone():
    drawn = [is_on_policy(0.3, 5, step) for step in range(2000)]
    assert sum(drawn) / 2000 == pytest.approx(0.3, abs=0.03)
    assert drawn == [is_on_policy(0.3, 5, step) for step in range(2000)]
    assert drawn != [is_on_policy(0.3, 6, step) for step in range(2000)]
    assert all(is_on_policy(1.0, 5, step) for step in range(100))


# ---- In a run ----


@pytest.mark.parametrize("build", [tiny_llama, tiny_gpt2], ids=["llama", "gpt2"])
@pytest.mark.parametrize("sampling", [False, True], ids=["greedy", "sampled"])
def test_the_student_learns_on_what_generate_gives_for_each_prompt(tmp_path, build, sampling):
    depth = "n_layer" if build is tiny_gpt2 else "num_hidden_layers"
    student, teacher, rows = build(**{depth: 2}), build(), prompt_rows(4)
    student.generation_config.eos_token_id = EOS
    trainer = make_trainer(tmp_path, copy.deepcopy(student), teacher, rows, max_steps=1, **ON_POLICY)
    trainer.model.generation_config.do_sample = sampling
    batches = Batches(trainer)
    trainer.train()
    (batch,) = batches.seen
    order = [
        next(i for i, row in enumerate(rows) if torch.equal(row["input_ids"][:2], ids[:2]))
        for ids in batch["input_ids"]
    ]
    for index, ids, mask, wanted in zip(
        order, batch["input_ids"], batch["attention_mask"], batch["distill_mask"], strict=True
    ):
        prompt = rows[index]["input_ids"][: int((rows[index]["labels"] == -100).long().cumprod(0).sum())]
        text = ids[mask.bool()]
        assert torch.equal(text[: len(prompt)], prompt)
        assert wanted.nonzero().flatten().tolist() == list(range(len(prompt), len(text)))
        assert 1 <= len(text) - len(prompt) <= 5
        if not sampling:
            alone = student.generate(
                input_ids=prompt[None], attention_mask=torch.ones_like(prompt)[None], max_new_tokens=5, pad_token_id=PAD
            )
            assert torch.equal(text, alone[0])


def test_completions_are_distilled_and_nothing_else(tmp_path):
    """The loss is the mean divergence over the tokens that the student wrote, and there is no task loss."""
    from hf_blockkd.losses.divergences import divergence

    student, teacher = student_of(), tiny_llama()
    settings = {**ON_POLICY, "objective": "kd", "divergence": "jsd", "beta": 0.9, "temperature": 1.0}
    trainer = make_trainer(tmp_path, copy.deepcopy(student), teacher, prompt_rows(4), max_steps=1, **settings)
    batches = Batches(trainer)
    trainer.train()
    (batch,) = batches.seen
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        ours, theirs = (model(**inputs).logits[:, :-1][batch["distill_mask"][:, 1:]] for model in (student, teacher))
    expected = divergence(ours, theirs, "jsd", beta=0.9).mean()
    (logs,) = step_logs(trainer)
    assert logs["loss"] == pytest.approx(expected.item(), rel=1e-3)
    assert logs["loss_task"] == 0.0


@pytest.mark.parametrize("stones", ["none", "all", "share"])
def test_a_step_is_the_same_however_its_batch_is_cut(tmp_path, stones):
    """Greedily, since what is sampled depends on the shape of a batch."""
    teacher, student = tiny_llama(), student_of()
    steps = []
    for size in (8, 4, 2):
        gradients = Gradients()
        trainer = make_trainer(
            tmp_path,
            copy.deepcopy(student),
            teacher,
            prompt_rows(8),
            callbacks=[gradients],
            max_steps=1,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=8 // size,
            stepping_stones=stones,
            **ON_POLICY,
            **PLAIN_SGD,
        )
        trainer.train()
        steps += gradients.steps
    assert max(gradient.abs().max() for gradient in steps[0].values()) > 1e-3
    assert max_difference(steps[1], steps[0]) < 1e-5
    assert max_difference(steps[2], steps[0]) < 1e-5


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_a_resumed_run_that_samples_equals_an_unbroken_one_to_the_bit(tmp_path, dropout):
    settings = {"save_strategy": "steps", "save_steps": 3, "max_steps": 7, "learning_rate": 1e-2, "lmbda": 0.6}
    settings |= {"max_new_tokens": 4, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    teacher, student = tiny_llama(), student_of(sampling=True, attention_dropout=dropout)
    runs = [
        make_trainer(tmp_path / name, copy.deepcopy(student), teacher, prompt_rows(12), **settings) for name in "abc"
    ]
    seen = [Batches(trainer).seen for trainer in runs]
    runs[0].train()
    drawn = [is_on_policy(0.6, 42, step) for step in range(7)]
    assert ["distill_mask" in batch for batch in seen[0]] == [one for one in drawn for _ in range(2)]
    assert 0 < sum(drawn) < 7
    runs[1].train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-3"))
    for ours, theirs in zip(seen[1], seen[0][6:], strict=True):
        assert_same_state(ours, theirs)
    assert_same_state(state_of(runs[1].model), state_of(runs[0].model))
    assert_same_state(state_of(runs[1].connectors), state_of(runs[0].connectors))
    runs[2].args.seed = 1
    runs[2].train()
    assert differs(state_of(runs[2].model), state_of(runs[0].model))


def test_the_student_writes_without_dropout_and_trains_with_it(tmp_path):
    student = student_of(attention_dropout=0.5)
    modes = []
    trainer = make_trainer(tmp_path, student, tiny_llama(), prompt_rows(4), max_steps=1, **ON_POLICY)
    attention = trainer.model.model.layers[0].self_attn
    attention.register_forward_hook(lambda module, _, output: modes.append((module.training, output[0].shape[1])))
    trainer.train()
    writing = [length for training, length in modes if not training]
    assert [length for training, length in modes if training] == [8]
    # What was read before is in a cache: after the prompts, a token at a time.
    assert writing[-4:] == [1] * 4
    assert trainer.model.training


def test_an_adapted_student_writes_with_its_adapter(tmp_path):
    config = LoraConfig(r=2, target_modules=["q_proj", "v_proj", "lm_head"], init_lora_weights=False)
    trainer = make_trainer(
        tmp_path, student_of(), tiny_llama(), prompt_rows(4), max_steps=1, peft_config=config, **ON_POLICY
    )
    batches, adapted = Batches(trainer), copy.deepcopy(trainer.model)
    trainer.train()
    (batch,) = batches.seen
    starts = batch["distill_mask"].long().argmax(1)
    for ids, mask, start in zip(batch["input_ids"], batch["attention_mask"].bool(), starts, strict=True):
        prompt = ids[None, :start]
        alone = adapted.generate(
            input_ids=prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=5, pad_token_id=PAD
        )
        assert torch.equal(ids[mask], alone[0])


def test_at_other_steps_the_data_stay_as_they_are(tmp_path):
    student, teacher, rows = student_of(), tiny_llama(), prompt_rows(8)
    runs = []
    for share in (0.0, 1e-9):
        trainer = make_trainer(tmp_path, copy.deepcopy(student), teacher, rows, max_steps=3, lmbda=share)
        trainer.train()
        runs.append(state_of(trainer.model))
    assert_same_state(*runs)


# ---- What cannot be completed ----


@pytest.mark.parametrize(
    ("build", "settings", "message"),
    [
        (lambda **c: tiny_bert("MaskedLM", **c), {}, "BertForMaskedLM is no causal language model"),
        (tiny_t5, {}, "T5ForConditionalGeneration is no causal language model"),
        (tiny_llama, {"objective": "alone"}, "`objective='alone'` learns from labels alone"),
        (tiny_llama, {"teacher_cache": "cache"}, "`teacher_cache='cache'` knows no text that is yet to come"),
        (tiny_llama, {"lmbda": 1.5}, r"`lmbda` must be from 0 to 1, but is 1\.5"),
        (tiny_llama, {"max_new_tokens": 0}, "`max_new_tokens` must be at least 1, but is 0"),
    ],
)
def test_what_cannot_be_completed_is_refused_when_the_trainer_is_made(tmp_path, build, settings, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, build(), build(), prompt_rows(), **{**ON_POLICY, **settings})


def packed(row):
    return {**row, "position_ids": torch.arange(len(row["input_ids"]))}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda row: {**row, "labels": row["input_ids"]}, r"Examples \[0, 1, 2, 3\] of a batch have no prompt"),
        (packed, "The batch holds 'position_ids', which `lmbda` cannot continue .* no padding-free batches"),
    ],
)
def test_batches_that_cannot_be_completed_are_refused_at_the_first_step_whether_it_is_drawn_or_not(
    tmp_path, change, message
):
    rows = [change(row) for row in prompt_rows(4)]
    trainer = make_trainer(tmp_path, student_of(), tiny_llama(), rows, max_steps=1, lmbda=1e-9)
    with pytest.raises(ValueError, match=message):
        trainer.train()
    assert trainer.state.global_step == 0


def test_prompts_at_the_end_of_the_models_positions_are_cut_short_or_refused(tmp_path):
    student, teacher = student_of(max_position_embeddings=8), tiny_llama()
    trainer = make_trainer(tmp_path, copy.deepcopy(student), teacher, prompt_rows(4), max_steps=1, lmbda=1.0)
    batches = Batches(trainer)
    trainer.train()
    assert batches.seen[0]["input_ids"].shape[1] <= 8
    rows = [{name: row[name] for name in ("input_ids", "attention_mask")} for row in token_rows(4, length=8)]
    trainer = make_trainer(tmp_path, student, teacher, rows, max_steps=1, lmbda=1.0)
    with pytest.raises(ValueError, match="A prompt of 8 tokens leaves no room for a completion in the 8 positions"):
        trainer.train()


def test_a_model_without_a_token_to_pad_with_and_a_generation_without_tokens_are_refused(tmp_path):
    student = student_of(pad_token_id=None)
    trainer = make_trainer(tmp_path, student, tiny_llama(), prompt_rows(4), max_steps=1, **ON_POLICY)
    with pytest.raises(ValueError, match="`lmbda` needs a token to pad prompts of unequal length with"):
        trainer.train()
    with pytest.raises(ValueError, match=r"The student wrote nothing after the prompts of examples \[1\] of a batch"):
        completed(torch.tensor([[5, 4], [5, 0]]), torch.ones(2, 1, dtype=torch.long), EOS, PAD)
