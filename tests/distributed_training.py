"""Trains one tiny student, by itself or on every rank that torchrun started, and writes down what came out.

Usage: `python -m tests.distributed_training WORLD_SIZE OUTPUT CASE...`
"""

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from .tiny_models import tiny_bert, tiny_llama, tiny_vit
from .training import (
    PLAIN_SGD,
    assert_same_state,
    batch_of,
    file_bytes,
    image_rows,
    make_trainer,
    state_of,
    step_logs,
    text_rows,
    token_rows,
)

GLOBAL_BATCH = 8
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
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
    "bert-accumulation": (tiny_bert, NO_DROPOUT, text_rows, {"gradient_accumulation_steps": 2}),
    "bert-some-stones": (tiny_bert, NO_DROPOUT, text_rows, {"stepping_stones": [2]}),
    # Ranks with different numbers of labels.
    "llama-masked": (tiny_llama, {}, token_rows, {"logging_steps": 2}),
    "llama-fcfd": (tiny_llama, {}, token_rows, {"objective": "fcfd", "num_blocks": 2}),
    "bert-theseus": (tiny_bert, NO_DROPOUT, text_rows, {"objective": "theseus", "num_blocks": 2}),
    "llama-checkpointing": (tiny_llama, {}, token_rows, {"activation_checkpointing": True}),
}


def train(case: str, folder: Path, world_size: int) -> dict:
    """Four steps at one global batch, whatever the number of ranks, then an evaluation and a resumed run."""
    build, config, rows, settings = CASES[case]
    torch.manual_seed(0)
    student, teacher = build(num_hidden_layers=2, **config), build(**config)
    if "teacher_cache" in settings:
        settings = {**settings, "teacher_cache": str(folder / case / "cache")}
    accumulation = settings.get("gradient_accumulation_steps", 1)
    trainer = make_trainer(
        folder / case,
        student,
        teacher,
        rows(24),
        eval_dataset=rows(6, seed=1),
        per_device_train_batch_size=GLOBAL_BATCH // world_size // accumulation,
        per_device_eval_batch_size=6 // world_size,
        max_steps=4,
        save_strategy="steps",
        save_steps=2,
        **PLAIN_SGD,
        **settings,
    )
    assert trainer.accelerator.num_processes == world_size
    trainer.train()
    logs = step_logs(trainer)
    weights = state_of(trainer.model)
    metrics = trainer.evaluate_stepping_stones()
    batch = batch_of(rows(2, seed=3))
    stones = {i: logits.detach() for i, logits in trainer.stepping_stone_logits(batch).items()}

    # A resumed run on the same ranks ends with the very same bits.
    trainer.train(resume_from_checkpoint=str(folder / case / "checkpoint-2"))
    assert_same_state(state_of(trainer.model), weights)
    files = sorted(name for name in file_bytes(folder / case) if name.startswith("checkpoint-4"))
    return {"weights": weights, "logs": logs, "metrics": metrics, "stones": stones, "files": files}


def main() -> None:
    world_size, folder, cases = int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:]
    torch.set_num_threads(1)
    assert int(os.environ["WORLD_SIZE"]) == world_size
    results = {case: train(case, folder, world_size) for case in cases}
    assert dist.get_world_size() == world_size
    assert dist.get_backend() == "gloo"
    torch.save(results, folder / f"rank-{dist.get_rank()}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
