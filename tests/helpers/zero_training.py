"""Trains tiny students with DeepSpeed on the processes that torchrun started, on CPUs.

`use_cpu=True` without the variable ACCELERATE_USE_CPU is what makes Accelerate run DeepSpeed there.

Usage: `python -m tests.helpers.zero_training OUTPUT STAGE CASE...`
"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate.utils import DistributedType
from peft import LoraConfig

from hf_blockkd import BlockwiseDistillConfig, BlockwiseDistillTrainer

from .tiny_models import tiny_bert, tiny_llama, tiny_vit, tiny_vit_or_narrow
from .training import (
    PLAIN_SGD,
    QUIET,
    assert_same_state,
    batch_of,
    image_rows,
    state_of,
    step_logs,
    text_rows,
    token_rows,
    with_connectors,
)

NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
LORA = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
ACCUMULATION = {"gradient_accumulation_steps": 2, "max_grad_norm": 0.5}
CASES = {
    "vit-all": (tiny_vit, {}, image_rows, {"cross_weight": 0.5}),
    "vit-share": (tiny_vit, {}, image_rows, {"stepping_stones": "share"}),
    "vit-cache": (tiny_vit, {}, image_rows, {"teacher_cache": "cache"}),
    "vit-theseus": (tiny_vit, {}, image_rows, {"objective": "theseus"}),
    "vit-hint": (tiny_vit, {}, image_rows, {"objective": "hint"}),
    "vit-states": (tiny_vit, {}, image_rows, {"stone_weight": 0.0, "state_weight": 3.0}),
    "vit-unweighted": (tiny_vit, {}, image_rows, {"stone_weight": 0.0}),
    "vit-bf16": (tiny_vit, {}, image_rows, {"bf16": True}),
    "vit-best": (tiny_vit, {}, image_rows, {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 2}),
    "bert-sample": (tiny_bert, NO_DROPOUT, text_rows, {"stepping_stones": "sample", **ACCUMULATION}),
    "bert-accumulation": (tiny_bert, NO_DROPOUT, text_rows, ACCUMULATION),
    "llama-chunked": (tiny_llama, {}, token_rows, {"loss_chunk_size": 12}),
    "vit-fitted": (tiny_vit_or_narrow, {}, image_rows, {"num_rows": 256}),
    "llama-tied": (tiny_llama, {"tie_word_embeddings": True}, token_rows, {}),
    "llama-checkpointing": (tiny_llama, {}, token_rows, {"activation_checkpointing": True, "stepping_stones": [2]}),
    "llama-lora": (tiny_llama, {}, token_rows, {"peft_config": LORA}),
}
STAGES = {
    1: ("vit-share", "llama-chunked"),
    2: (
        "vit-all",
        "vit-fitted",
        "vit-cache",
        "vit-theseus",
        "vit-bf16",
        "vit-best",
        "bert-sample",
        "llama-tied",
        "llama-lora",
    ),
    3: (
        "vit-all",
        "vit-fitted",
        "vit-hint",
        "vit-states",
        "vit-unweighted",
        "vit-bf16",
        "bert-accumulation",
        "llama-checkpointing",
        "llama-tied",
        "llama-lora",
    ),
}
"""ZeRO stage -> the cases that it goes with, or some of them."""


def new_trainer(case: str, folder: Path, stage: int | None) -> BlockwiseDistillTrainer:
    """A trainer on this process alone, or with DeepSpeed on two at half the batch each."""
    build, config, rows, settings = CASES[case]
    torch.manual_seed(0)
    student, teacher = build(num_hidden_layers=2, **config), build(**config)
    world_size = 1 if stage is None else 2
    batch_size = 8 // world_size // settings.get("gradient_accumulation_steps", 1)
    settings = {**QUIET, **PLAIN_SGD, "max_steps": 4, "save_strategy": "steps", "save_steps": 2, **settings}
    settings |= {"per_device_train_batch_size": batch_size, "per_device_eval_batch_size": 4 // world_size}
    peft_config, num_rows = settings.pop("peft_config", None), settings.pop("num_rows", 32)
    if "teacher_cache" in settings:
        settings["teacher_cache"] = str(folder / case / "cache")
    if stage is not None:
        settings["deepspeed"] = {
            "train_micro_batch_size_per_gpu": "auto",
            "gradient_accumulation_steps": "auto",
            "gradient_clipping": "auto",
            "bf16": {"enabled": "auto"},
            "zero_optimization": {"stage": stage, "stage3_gather_16bit_weights_on_model_save": True},
        }
    return BlockwiseDistillTrainer(
        model=student,
        teacher_model=teacher,
        args=BlockwiseDistillConfig(str(folder / case), **settings),
        train_dataset=rows(num_rows),
        eval_dataset=rows(4, seed=1),
        peft_config=peft_config,
    )


def train(case: str, folder: Path, stage: int | None = None) -> dict:
    """Four steps at one global batch, whatever the number of ranks, and what came of them."""
    rows = CASES[case][2]
    trainer = new_trainer(case, folder, stage)
    if stage is not None and dist.get_rank():
        with torch.no_grad():
            for parameter in trainer.connectors.parameters():
                parameter.fill_(7.0)  # to be overwritten by those of the first rank
    trainer.train()
    weights = full_state(trainer)
    metrics = trainer.evaluate_stepping_stones()
    stones = {i: logits.detach() for i, logits in trainer.stepping_stone_logits(batch_of(rows(2, seed=3))).items()}
    if stage is not None:
        assert trainer.accelerator.distributed_type == DistributedType.DEEPSPEED
        assert (trainer.accelerator.num_processes, trainer.deepspeed.zero_optimization_stage()) == (2, stage)
        for model in (trainer.model, trainer.teacher):
            assert all(hasattr(parameter, "ds_id") == (stage == 3) for parameter in model.parameters())
    resumed = new_trainer(case, folder, stage)
    resumed.train(resume_from_checkpoint=str(folder / case / "checkpoint-2"))
    assert_same_state(full_state(resumed), weights)
    return {"weights": weights, "logs": step_logs(trainer), "metrics": metrics, "stones": stones}


def full_state(trainer: BlockwiseDistillTrainer) -> dict[str, torch.Tensor]:
    """All weights of student and connectors, on every rank."""
    if not trainer.is_deepspeed_enabled:
        with with_connectors(trainer):
            return state_of(trainer.model)
    import deepspeed

    with deepspeed.zero.GatheredParameters(list(trainer.model.parameters())):
        return {name: tensor.detach().clone() for name, tensor in trainer.model.state_dict().items()}


def main() -> None:
    folder, stage, cases = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]
    torch.set_num_threads(1)
    results = {case: train(case, folder, stage) for case in cases}
    assert (dist.get_world_size(), dist.get_backend()) == (2, "gloo")
    torch.save(results, folder / f"rank-{dist.get_rank()}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
