"""Trains one tiny student, by itself or on every rank that torchrun started, and writes down what came out.

Usage: `python -m tests.helpers.distributed_training WORLD_SIZE OUTPUT CASE...`
"""

import json
import os
import sys
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from peft import LoraConfig
from transformers import TrainerCallback

from hf_blockkd.saving.checkpoints import MANIFEST_NAME, flaw
from hf_blockkd.saving.sigterm import CheckpointOnSigterm

from .tiny_models import VOCABULARY, tiny_bert, tiny_dinov2, tiny_llama, tiny_vit, tiny_vit_or_narrow
from .training import (
    PLAIN_SGD,
    Gradients,
    Terminate,
    assert_same_state,
    batch_of,
    image_rows,
    make_trainer,
    prompt_rows,
    state_of,
    step_logs,
    text_rows,
    token_rows,
    with_connectors,
)

GLOBAL_BATCH = 8


def answer_rows(count, seed=0):
    """Answers; of those to train on, half of the starts and a quarter of the ends lie beyond the text."""
    rows = []
    for i, row in enumerate(text_rows(count, seed=seed)):
        start, end = (60 if seed == 0 and i % 2 else i % 3), (60 if seed == 0 and i % 4 == 0 else 3)
        positions = {"start_positions": torch.tensor(start), "end_positions": torch.tensor(end)}
        rows.append({"input_ids": row["input_ids"], "attention_mask": row["attention_mask"], **positions})
    return rows


def some_unlabelled(make_rows, count, seed=0):
    """Of the rows of a step the first three, four, then five have no label; the first of two ranks has half of all."""
    rows = make_rows(count, seed=seed)
    for i, row in enumerate(rows if seed == 0 else ()):
        if i % GLOBAL_BATCH >= 3 + i // GLOBAL_BATCH:
            continue
        if row["labels"].ndim:
            row["labels"] = torch.full_like(row["labels"], -100)
        else:
            del row["labels"]
    return rows


def frozen_students(**config):
    return tiny_vit(**config).requires_grad_(config.get("num_hidden_layers") != 2)


def bodies(**config):
    """Without heads; the student, of two layers, is narrower."""
    return tiny_bert(None, **config, **({"hidden_size": 8} if config.get("num_hidden_layers") == 2 else {}))


SLOW = (
    "vit-sample",
    "vit-uneven",
    "vit-frozen",
    "bert-accumulation",
    "bert-some-stones",
    "bert-lora",
    "bert-theseus",
    "bert-embeddings",
    "llama-sample",
)
"""Cases that differ from others in one respect only."""
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
ENDS_SOON = {"eos_token_id": list(range(2, VOCABULARY, 2))}
"""Every other token ends a text, so that what is written is of unequal length."""
CASES = {
    "vit-all": (tiny_vit, {}, image_rows, {"cross_weight": 0.5}),
    "vit-sample": (tiny_vit, {}, image_rows, {"stepping_stones": "sample", "cross_weight": 0.5}),
    "bert-share": (
        tiny_bert,
        NO_DROPOUT,
        text_rows,
        {"stepping_stones": "share", "gradient_accumulation_steps": 2, "stone_sampling": "uniform"},
    ),
    "vit-cache": (tiny_vit, {}, image_rows, {"teacher_cache": "cache", "stepping_stones": "share"}),
    "vit-mean-of-ranks": (tiny_vit, {}, image_rows, {"average_tokens_across_devices": False}),
    "vit-fitted": (tiny_vit_or_narrow, {}, image_rows, {"num_rows": 256}),
    "bert-accumulation": (tiny_bert, NO_DROPOUT, text_rows, {"gradient_accumulation_steps": 2}),
    "bert-some-stones": (tiny_bert, NO_DROPOUT, text_rows, {"stepping_stones": [2]}),
    # The last batch of an epoch is smaller than the others.
    "vit-uneven": (tiny_vit, {}, image_rows, {"num_rows": 22}),
    "bert-uneven-accumulation": (
        tiny_bert,
        NO_DROPOUT,
        text_rows,
        {"num_rows": 22, "gradient_accumulation_steps": 2, "stepping_stones": "sample"},
    ),
    # Ranks with different numbers of labels.
    "bert-answers": (partial(tiny_bert, "QuestionAnswering"), NO_DROPOUT, answer_rows, {}),
    "llama-masked": (tiny_llama, {}, token_rows, {"logging_steps": 2}),
    "llama-sample": (tiny_llama, {}, token_rows, {"stepping_stones": "sample", "gradient_accumulation_steps": 2}),
    "llama-on-policy": (tiny_llama, ENDS_SOON, prompt_rows, {"lmbda": 0.4, "max_new_tokens": 4, "logging_steps": 2}),
    "vit-unlabelled": (tiny_vit, {}, partial(some_unlabelled, image_rows), {"train_sampling_strategy": "sequential"}),
    "llama-unlabelled": (
        tiny_llama,
        {},
        partial(some_unlabelled, token_rows),
        {"train_sampling_strategy": "sequential", "gradient_accumulation_steps": 2, "stepping_stones": "last_two"},
    ),
    "llama-lora": (tiny_llama, {}, token_rows, {"lora": ["q_proj", "v_proj"], "stepping_stones": "share"}),
    "bert-lora": (tiny_bert, NO_DROPOUT, text_rows, {"lora": ["query", "value"]}),
    # With a connector for vectors of another width.
    "bert-embeddings": (bodies, NO_DROPOUT, text_rows, {"embedding_loss": "squared_error"}),
    # Its mask token takes no part in classification.
    "dinov2": (tiny_dinov2, {}, image_rows, {}),
    "vit-frozen": (frozen_students, {}, image_rows, {"objective": "ladder"}),
    "llama-fcfd": (tiny_llama, {}, token_rows, {"objective": "fcfd", "num_blocks": 2}),
    "bert-theseus": (tiny_bert, NO_DROPOUT, text_rows, {"objective": "theseus", "num_blocks": 2}),
    "llama-checkpointing": (tiny_llama, {}, token_rows, {"activation_checkpointing": True}),
}


def train(case: str, folder: Path, world_size: int) -> dict:
    """Four steps at one global batch, whatever the number of ranks, then an evaluation and a resumed run."""
    build, config, make_rows, settings = CASES[case]
    settings, rank = dict(settings), int(os.environ.get("RANK", 0))
    rows, lora = make_rows(settings.pop("num_rows", 24)), settings.pop("lora", None)
    if len(rows) % GLOBAL_BATCH:
        settings["train_sampling_strategy"] = "sequential"
        if world_size == 1:
            # What the ranks lack in the end, they take from the beginning.
            rows += rows[: GLOBAL_BATCH - len(rows) % GLOBAL_BATCH]
    torch.manual_seed(0)
    student, teacher = build(num_hidden_layers=2, **config), build(**config)
    if "teacher_cache" in settings:
        settings["teacher_cache"] = str(folder / case / "cache")
    accumulation = settings.get("gradient_accumulation_steps", 1)
    gradients = Gradients()
    trainer = make_trainer(
        folder / case,
        student,
        teacher,
        rows,
        eval_dataset=make_rows(6, seed=1),
        callbacks=[gradients],
        peft_config=LoraConfig(r=2, target_modules=lora) if lora else None,
        per_device_train_batch_size=GLOBAL_BATCH // world_size // accumulation,
        per_device_eval_batch_size=6 // world_size,
        max_steps=4,
        save_strategy="steps",
        save_steps=2,
        **PLAIN_SGD,
        **settings,
    )
    assert trainer.accelerator.num_processes == world_size
    if rank:
        with torch.no_grad():
            for parameter in trainer.connectors.parameters():
                parameter.fill_(7.0)  # to be overwritten by those of the first rank
    counts = []
    usual = trainer.pair.count
    trainer.pair.count = lambda *args: counts.append(usual(*args)) or counts[-1]
    trainer.train()
    trainer.pair.count = usual
    logs = step_logs(trainer)
    with with_connectors(trainer):
        weights = state_of(trainer.model)
    metrics = {**trainer.evaluate(), **trainer.evaluate_stepping_stones()}
    batch = batch_of(make_rows(2, seed=3))
    stones = {i: logits.detach() for i, logits in trainer.stepping_stone_logits(batch).items()}

    # A run that the same ranks resume from the last whole checkpoint ends with the very same bits.
    if rank == 0:
        (folder / case / "checkpoint-4" / "optimizer.pt").unlink()
    trainer.accelerator.wait_for_everyone()
    trainer.train(resume_from_checkpoint=True)
    assert trainer._initial_global_step == 2
    with with_connectors(trainer):
        assert_same_state(state_of(trainer.model), weights)
    if not lora:
        saved = state_of(type(student).from_pretrained(folder / case / "checkpoint-4"))
        assert_same_state(saved, {name: weights[name] for name in saved})
        assert all(name in saved or "blockwise" in name for name in weights)
    files = json.loads((folder / case / "checkpoint-4" / MANIFEST_NAME).read_text())["files"]
    found = {"weights": weights, "logs": logs, "gradients": gradients.steps[:4], "counts": torch.stack(counts)}
    return {**found, "metrics": metrics, "stones": stones, "files": sorted(files)}


class LogOnFirstRank(TrainerCallback):
    """What a person may log on one rank alone."""

    def on_step_end(self, args, state, control, **kwargs):
        if args.process_index == 0:
            self.trainer.log({"loss": 1.0, "mine": 2.0})


def stop(folder: Path) -> int:
    """Two ranks of which the second gets a SIGTERM in the midst of step 3; the step after which they stopped.

    The first logs something by itself after each.
    """
    torch.manual_seed(0)
    trainer = make_trainer(
        folder / "stop",
        tiny_vit(num_hidden_layers=2),
        tiny_vit(),
        image_rows(24),
        enable_jit_checkpoint=True,
        logging_strategy="no",  # where one rank logs, the stock trainer takes its own logging for done
        max_steps=9,
    )
    manager = next(c for c in trainer.callback_handler.callbacks if isinstance(c, CheckpointOnSigterm)).jit_manager
    manager.kill_wait = 0
    if dist.get_rank() == 1:
        trainer.add_callback(Terminate(2, manager))
    callback = LogOnFirstRank()
    callback.trainer = trainer
    trainer.add_callback(callback)
    trainer.train()
    assert len(step_logs(trainer)) == (trainer.state.global_step if dist.get_rank() == 0 else 0)
    assert flaw(folder / "stop" / f"checkpoint-{trainer.state.global_step}") is None
    return trainer.state.global_step


def main() -> None:
    world_size, folder, cases = int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:]
    torch.set_num_threads(1)
    assert int(os.environ["WORLD_SIZE"]) == world_size
    results = {case: stop(folder) if case == "stop" else train(case, folder, world_size) for case in cases}
    assert dist.get_world_size() == world_size
    assert dist.get_backend() == "gloo"
    torch.save(results, folder / f"rank-{dist.get_rank()}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
