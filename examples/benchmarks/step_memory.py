"""Peak memory and time of a training step of all stones with each switch that saves memory, relative to none.

    python examples/benchmarks/step_memory.py --output step_memory.json

Every measurement is a process of its own. Its peak is that of memory above what it was before there were any models,
resident or, on a GPU, allocated: weights, gradients, optimizer and activations. Time is that of the processor (on a GPU
that of the wall, and everything runs under bfloat16 autocast), and cells take turns, so that ratios hold on a machine
that others use, too.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import disk_offload
from memory import DEVICE, peak, reset_peak, wait
from peft import LoraConfig
from transformers import LlamaConfig, LlamaForCausalLM

from hf_blockkd import BlockwiseDistillConfig, BlockwiseDistillTrainer

CHECKPOINTING = {"activation_checkpointing": True}
CELLS: dict[str, dict[str, Any]] = {
    "no switch": {},
    "checkpointing of the student alone": {**CHECKPOINTING, "recompute": False},
    "checkpointing of the suffixes alone": {"recompute": True},
    "activation_checkpointing": CHECKPOINTING,
    "the last two stones": {"stepping_stones": [3, 4]},
    "the last two stones, activation_checkpointing": {"stepping_stones": [3, 4], **CHECKPOINTING},
    "teacher in bfloat16": {"teacher": "bfloat16"},
    "teacher on disk": {"teacher": "disk"},
    "teacher on disk, activation_checkpointing": {"teacher": "disk", **CHECKPOINTING},
    "loss_chunk_size=0": {"loss_chunk_size": 0},
    "plain KD": {"stepping_stones": "none"},
    "LoRA of the teacher, which is a copy": {"teacher": "copy"},
    "LoRA of the teacher, teacher_model=None": {"teacher": "shared"},
}
SHAPES = {"teacher": (256, 8), "student": (192, 4)}
"""Width and layers."""
BATCH = (4, 256)
STEPS = 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cells", nargs="+", default=list(CELLS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, help="Write the figures here, as JSON.")
    parser.add_argument("--measure", choices=CELLS, help="Measure one cell in this process, and print its figures.")
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(**CELLS[args.measure])))
        return
    found: dict[str, list[dict[str, float]]] = {name: [] for name in args.cells}
    for _ in range(args.rounds):
        for name, runs in found.items():
            command = [sys.executable, __file__, "--measure", name]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            runs.append(json.loads(done.stdout.splitlines()[-1]))
    figures = {
        name: {key: statistics.median(run[key] for run in runs) for key in runs[0]} for name, runs in found.items()
    }
    print(f"Llamas of (width, layers) {SHAPES}, batch {BATCH}, medians of {args.rounds} processes each\n")
    print(table(figures))
    if args.output:
        args.output.write_text(json.dumps({"runs": found, "medians": figures}, indent=2) + "\n", encoding="utf-8")


def make_model(role: str) -> LlamaForCausalLM:
    width, layers = SHAPES[role]
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=4096,
            hidden_size=width,
            intermediate_size=4 * width,
            num_attention_heads=width // 64,
            num_key_value_heads=width // 64,
            num_hidden_layers=layers,
        )
    )


def measure(teacher: str = "plain", recompute: bool | None = None, **settings: Any) -> dict[str, float]:
    """Peak in MiB, and seconds of a step, in the mean over a few after the first one."""
    torch.manual_seed(0)
    transformers.logging.set_verbosity_error()
    before = reset_peak()
    adapted = teacher in ("copy", "shared")
    student = make_model("teacher" if adapted else "student")
    teacher_model = None if teacher == "shared" else make_model("teacher")
    with tempfile.TemporaryDirectory() as folder:
        if teacher == "bfloat16":
            teacher_model = teacher_model.to(torch.bfloat16)
        elif teacher == "disk":
            teacher_model = disk_offload(teacher_model, f"{folder}/weights", torch.device(DEVICE))
        trainer = BlockwiseDistillTrainer(
            model=student,
            teacher_model=teacher_model,
            args=BlockwiseDistillConfig(
                folder,
                report_to="none",
                disable_tqdm=True,
                use_cpu=DEVICE == "cpu",
                bf16=DEVICE == "cuda",
                save_strategy="no",
                per_device_train_batch_size=BATCH[0],
                max_steps=1 + STEPS,
                **{"stepping_stones": "all", **settings},
            ),
            train_dataset=[
                {"input_ids": row, "labels": row} for row in torch.randint(4096, (BATCH[0] * (1 + STEPS), BATCH[1]))
            ],
            peft_config=LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM") if adapted else None,
        )
        if recompute is not None:
            trainer.pair.stones.recompute = recompute
        clock = Clock()
        trainer.add_callback(clock)
        trainer.train()
    return {"peak_mib": peak() - before, "seconds": clock.seconds}


class Clock(transformers.TrainerCallback):
    """Seconds of a step, without the first one and what comes before and after all of them."""

    def on_step_end(self, args, state, control, **kwargs) -> None:
        wait()
        now = time.process_time() if DEVICE == "cpu" else time.perf_counter()
        if state.global_step == 1:
            self.start = now
        self.seconds = (now - self.start) / STEPS


def table(figures: dict[str, dict[str, float]]) -> str:
    base = figures["no switch"]
    lines = ["| switch | peak, MiB | / no switch | time / no switch |", "| --- | ---: | ---: | ---: |"]
    for name, cell in figures.items():
        ratios = (cell[key] / base[key] for key in ("peak_mib", "seconds"))
        lines.append(f"| {name} | {cell['peak_mib']:,.0f} | " + " | ".join(f"{ratio:.2f}" for ratio in ratios) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
