"""Kill a training run again and again, resume it, and compare its outcome with that of an unbroken run, bit by bit.

    python examples/benchmarks/kill_and_resume.py --rounds 40 --output kill_and_resume.json

Every round starts a process that says `trainer.train(resume_from_checkpoint=True)`, and kills it with SIGKILL at a
random moment of its training. When a run is through, its last checkpoint must hold the same bits as that of the
unbroken run (weights, connectors, optimizer, schedule, random states) and the same losses; then the next kind of
student begins.
"""

from __future__ import annotations

import argparse
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    TrainerCallback,
    ViTConfig,
    ViTForImageClassification,
)

from hf_blockkd import BlockwiseDistillConfig, BlockwiseDistillTrainer
from hf_blockkd.saving.checkpoints import MANIFEST_NAME, UNFINISHED, checkpoints

STARTED = "training"
"""What a process prints when its first step begins."""
NOT_COMPARED = ("training_args.json", "trainer_state.json", "adapter_config.json")
"""The first two name folders; of the second, the losses are compared. PEFT writes a set of names in any order."""
WIDTH = {"hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 128}


def vit(layers: int) -> PreTrainedModel:
    shape = {"image_size": 16, "patch_size": 4, "num_channels": 1, "hidden_dropout_prob": 0.1}
    return ViTForImageClassification(ViTConfig(num_hidden_layers=layers, num_labels=10, **WIDTH, **shape))


def bert(layers: int) -> PreTrainedModel:
    return BertForSequenceClassification(BertConfig(num_hidden_layers=layers, vocab_size=4096, num_labels=10, **WIDTH))


def llama(layers: int) -> PreTrainedModel:
    return LlamaForCausalLM(LlamaConfig(num_hidden_layers=layers, vocab_size=4096, num_key_value_heads=2, **WIDTH))


def images(count: int) -> list[dict[str, torch.Tensor]]:
    return [{"pixel_values": torch.randn(1, 16, 16), "labels": torch.tensor(i % 10)} for i in range(count)]


def sentences(count: int) -> list[dict[str, torch.Tensor]]:
    return [{"input_ids": torch.randint(4096, (16,)), "labels": torch.tensor(i % 10)} for i in range(count)]


def texts(count: int) -> list[dict[str, torch.Tensor]]:
    tokens = [torch.randint(4096, (16,)) for _ in range(count)]
    return [{"input_ids": row, "labels": row} for row in tokens]


CASES: dict[str, tuple[Callable, Callable, dict[str, Any]]] = {
    "ViT": (vit, images, {}),
    "BERT, sampled stones": (bert, sentences, {"stepping_stones": "sample", "gradient_accumulation_steps": 2}),
    "Llama": (llama, texts, {"save_total_limit": 1}),
    "Llama, LoRA": (llama, texts, {"save_total_limit": 2}),
    "ViT, shared stones": (vit, images, {"stepping_stones": "share"}),
}


class Announce(TrainerCallback):
    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        print(STARTED, flush=True)


def train(case: str, folder: Path, steps: int) -> None:
    """One process of a run: it goes on from whatever is there, to the end unless it is killed."""
    torch.manual_seed(0)
    build, rows, settings = CASES[case]
    teacher, student, data = build(4), build(2), rows(200)
    peft_config = None
    if "LoRA" in case:
        from peft import LoraConfig

        peft_config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], lora_dropout=0.1)
    args = BlockwiseDistillConfig(
        str(folder),
        num_blocks=2,
        max_steps=steps,
        save_strategy="steps",
        save_steps=2,
        logging_steps=2,
        learning_rate=1e-3,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        **settings,
    )
    trainer = BlockwiseDistillTrainer(
        model=student,
        teacher_model=teacher,
        args=args,
        train_dataset=data,
        callbacks=[Announce()],
        peft_config=peft_config,
    )
    trainer.train(resume_from_checkpoint=True)


def start(case: str, folder: Path, steps: int) -> subprocess.Popen:
    command = [sys.executable, __file__, "--child", case, "--folder", str(folder), "--steps", str(steps)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen) -> float:
    """Wait for a process to end well; its seconds of training."""
    begun = None
    for line in process.stdout:
        begun = time.monotonic() if line.strip() == STARTED else begun
    seconds = time.monotonic() - begun if begun else 0.0
    if process.wait():
        raise SystemExit(f"A run broke down by itself:\n{process.stderr.read()}")
    return seconds


def kill(process: subprocess.Popen, delay: float) -> bool:
    """Kill a process `delay` seconds after its training began; whether it was still running."""
    for line in process.stdout:
        if line.strip() == STARTED:
            break
    time.sleep(delay)
    process.send_signal(signal.SIGKILL)
    return process.wait() == -signal.SIGKILL


def outcome(folder: Path) -> dict[str, Any]:
    """Hashes of the files of the last checkpoint, and the losses of the whole run."""
    last = checkpoints(folder)[0]
    files = json.loads((last / MANIFEST_NAME).read_text())["files"]
    hashes = {name: entry["sha256"] for name, entry in files.items() if name not in NOT_COMPARED}
    state = json.loads((last / "trainer_state.json").read_text())
    return {"checkpoint": last.name, **hashes, "log_history": state["log_history"]}


def soak(rounds: int, steps: int, seed: int, root: Path) -> list[dict[str, Any]]:
    """Kill `rounds` processes; a line for every run that was killed, resumed to its end, and compared."""
    chance = random.Random(seed)
    results: list[dict[str, Any]] = []
    kills = 0
    while kills < rounds:
        case = list(CASES)[len(results) % len(CASES)]
        unbroken, broken = root / f"unbroken-{len(results)}", root / f"broken-{len(results)}"
        seconds = finish(start(case, unbroken, steps))
        share = max(1, min(rounds - kills, rounds // len(CASES)))
        result = {"case": case, "kills": 0, "in a write": 0, "seconds": round(seconds, 1)}
        while result["kills"] < share:
            # As long as it takes to get on by a few checkpoints, however many rounds are left.
            if not kill(start(case, broken, steps), chance.uniform(0, 1.5 * seconds / share)):
                break
            result["kills"] += 1
            result["in a write"] += any(broken.glob(f"{UNFINISHED}*"))
        finish(start(case, broken, steps))
        kills += result["kills"]
        expected, found = outcome(unbroken), outcome(broken)
        result["different"] = sorted(name for name in expected | found if expected.get(name) != found.get(name))
        results.append(result)
        print(f"{case}: killed {result['kills']} times, {result['in a write']} of them in a write; ", end="")
        print(f"different: {', '.join(result['different']) or 'nothing'}", flush=True)
    return results


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=40, help="Processes to kill in all.")
    parser.add_argument("--steps", type=int, default=120, help="Optimizer steps of each run.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="Write the figures here, as JSON.")
    parser.add_argument("--child", choices=list(CASES), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        train(args.child, args.folder, args.steps)
        return 0
    with tempfile.TemporaryDirectory() as root:
        results = soak(args.rounds, args.steps, args.seed, Path(root))
    kills, writes = (sum(result[name] for result in results) for name in ("kills", "in a write"))
    wrong = [result["case"] for result in results if result["different"]]
    print(
        f"{kills} kills, {writes} of them in the write of a checkpoint; runs that came out different: {wrong or 'none'}"
    )
    if args.output:
        args.output.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
