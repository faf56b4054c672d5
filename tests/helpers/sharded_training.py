"""Trains tiny students with FSDP2, sharded by Accelerate over the processes that torchrun started, on CPUs.

Accelerate shards on accelerators only, and would run DistributedDataParallel here; told that these are some, it does on
CPUs what it does there.

Usage: `python -m tests.helpers.sharded_training OUTPUT CASE...`
"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from peft import LoraConfig
from torch.distributed.tensor import DTensor

from hf_blockkd import BlockwiseDistillConfig, BlockwiseDistillTrainer

from .tiny_models import tiny_bert, tiny_llama, tiny_vit, tiny_vit_or_narrow
from .training import QUIET, assert_same_state, batch_of, image_rows, step_logs, text_rows, token_rows, with_connectors

NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
LORA = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
CASES = {
    "vit-all": (tiny_vit, {}, image_rows, {"cross_weight": 0.5}),
    "vit-fcfd": (tiny_vit, {}, image_rows, {"objective": "fcfd"}),
    "bert-sample": (
        tiny_bert,
        NO_DROPOUT,
        text_rows,
        {"stepping_stones": "sample", "gradient_accumulation_steps": 2, "max_grad_norm": 0.5},
    ),
    "llama-checkpointing": (tiny_llama, {}, token_rows, {"activation_checkpointing": True, "stepping_stones": [2]}),
    "vit-fitted": (tiny_vit_or_narrow, {}, image_rows, {"num_rows": 256}),
    "llama-tied": (tiny_llama, {"tie_word_embeddings": True}, token_rows, {}),
    "llama-bf16": (tiny_llama, {}, token_rows, {"bf16": True}),
    "llama-lora": (tiny_llama, {}, token_rows, {"peft_config": LORA}),
}


# Almost plain gradient descent, so that a wrong scale shows; torch cannot restore an optimizer without any state.
ADAM = {"learning_rate": 0.1, "adam_epsilon": 1.0, "lr_scheduler_type": "constant", "max_grad_norm": 0.0}


def new_trainer(case: str, folder: Path, world_size: int) -> BlockwiseDistillTrainer:
    build, config, rows, settings = CASES[case]
    torch.manual_seed(0)
    student, teacher = build(num_hidden_layers=2, **config), build(**config)
    batch_size = 8 // world_size // settings.get("gradient_accumulation_steps", 1)
    settings = {**QUIET, **ADAM, "max_steps": 4, "save_strategy": "steps", "save_steps": 2, **settings}
    settings |= {"per_device_train_batch_size": batch_size, "per_device_eval_batch_size": 4 // world_size}
    peft_config, num_rows = settings.pop("peft_config", None), settings.pop("num_rows", 32)
    args = BlockwiseDistillConfig(str(folder / case), fsdp=world_size > 1, **settings)
    if world_size > 1:
        assert args.distributed_state.distributed_type == DistributedType.MULTI_CPU
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    return BlockwiseDistillTrainer(
        model=student,
        teacher_model=teacher,
        args=args,
        train_dataset=rows(num_rows),
        eval_dataset=rows(4, seed=1),
        peft_config=peft_config,
    )


def train(case: str, folder: Path, world_size: int) -> dict:
    """Four steps at one global batch, whatever the number of ranks, and what came of them."""
    rows = CASES[case][2]
    trainer = new_trainer(case, folder, world_size)
    trainer.train()
    weights = full_state(trainer)
    metrics = trainer.evaluate_stepping_stones()
    stones = {i: logits.detach() for i, logits in trainer.stepping_stone_logits(batch_of(rows(2, seed=3))).items()}
    if world_size > 1:
        assert trainer.accelerator.distributed_type == DistributedType.FSDP
        for model in (trainer.model, trainer.teacher):
            assert all(isinstance(tensor, DTensor) for tensor in model.state_dict().values())
    resumed = new_trainer(case, folder, world_size)
    resumed.train(resume_from_checkpoint=str(folder / case / "checkpoint-2"))
    assert_same_state(full_state(resumed), weights)
    return {"weights": weights, "logs": step_logs(trainer), "metrics": metrics, "stones": stones}


def full_state(trainer: BlockwiseDistillTrainer) -> dict[str, torch.Tensor]:
    """All weights of student and connectors, on every rank."""
    with with_connectors(trainer):
        state = trainer.model.state_dict()
    return {n: (t.full_tensor() if isinstance(t, DTensor) else t).detach().clone() for n, t in state.items()}


def main() -> None:
    folder, cases = Path(sys.argv[1]), sys.argv[2:]
    torch.set_num_threads(1)
    results = {case: train(case, folder, 2) for case in cases}
    assert (dist.get_world_size(), dist.get_backend()) == (2, "gloo")
    torch.save(results, folder / f"rank-{dist.get_rank()}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
