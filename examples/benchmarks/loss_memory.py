"""Peak memory and time of loss and backward at real vocabulary sizes: all logits at once, and in chunks.

    python examples/benchmarks/loss_memory.py --output loss_memory.json

Every cell runs the objective on random final states, with the heads of two Llamas. Plain and chunked take turns, so
that their ratio holds when the machine's speed drifts. The peak is that of memory above what it was before the loss,
resident or, on a GPU, allocated; there, all of it runs under bfloat16 autocast. The last columns are of a run of the
trainer, in a process of its own: peaks of its first step, with all checks of the first batch, and of its third.

    python examples/benchmarks/loss_memory.py --chunks 16 64 256     # other sizes than the default, in tokens
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
from memory import DEVICE, autocast, peak, reset_peak, wait
from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback

from hf_blockkd import BlockwiseDistillConfig, BlockwiseDistillTrainer
from hf_blockkd.losses.chunked_loss import chunked_distillation_loss, default_chunk_size
from hf_blockkd.losses.learners import PLAIN_WEIGHTS, block_kd_learners, distillation_loss
from hf_blockkd.losses.rows import RowLosses
from hf_blockkd.models.heads import Head, find_head
from hf_blockkd.objectives.sampling import stone_weights

VOCABULARIES = (32_000, 128_000)
STONES = (0, 1, 4)
NUM_LAYERS = 4
WIDTHS = {"student": 256, "teacher": 512}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, help="Write the figures here, as JSON.")
    parser.add_argument("--chunks", nargs="+", type=int, help="Tokens in a chunk, to be compared with all at once.")
    parser.add_argument("--vocabularies", nargs="+", type=int, default=VOCABULARIES)
    parser.add_argument("--run", nargs=2, type=int, help="Vocabulary and stones of a run to measure here.")
    args = parser.parse_args()
    torch.manual_seed(0)
    if args.run:
        print(json.dumps(measure_steps(*args.run, args.tokens)))
        return
    cells = []
    for vocabulary in args.vocabularies:
        heads = {role: make_head(vocabulary, width) for role, width in WIDTHS.items()}
        heads["teacher"].model.requires_grad_(False)
        if args.chunks:
            cells += [measure_chunks(vocabulary, stones, heads, args) for stones in STONES[:2]]
            continue
        for stones in STONES:
            sizes = {"plain": None, "chunked": default_chunk_size(vocabulary, DEVICE)}
            cells.append(measure_cell(vocabulary, stones, heads, args.tokens, args.rounds, sizes))
            command = [sys.executable, __file__, "--tokens", str(args.tokens), "--run", str(vocabulary), str(stones)]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            cells[-1]["steps_mib"] = json.loads(done.stdout.splitlines()[-1])
    print(f"{args.tokens} tokens, widths {WIDTHS}, medians of {args.rounds} rounds, {torch.get_num_threads()} threads")
    print("\n".join(cells) if args.chunks else table(cells))
    if args.output:
        args.output.write_text(json.dumps(cells, indent=2) + "\n", encoding="utf-8")


class StepPeaks(TrainerCallback):
    """Peak of each step, in MiB above what there was before it."""

    def __init__(self) -> None:
        self.found: list[float] = []

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.before = reset_peak()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.found.append(peak() - self.before)


def measure_steps(vocabulary: int, stones: int, tokens: int) -> list[float]:
    """Peaks of the first three steps of a run on two texts each."""
    torch.set_num_threads(1)
    student, teacher = (make_model(vocabulary, WIDTHS[role], NUM_LAYERS) for role in ("student", "teacher"))
    rows = [{"input_ids": row, "labels": row} for row in torch.randint(vocabulary, (6, tokens))]
    chosen = list(range(NUM_LAYERS - stones + 1, NUM_LAYERS + 1)) or "none"
    peaks = StepPeaks()
    with tempfile.TemporaryDirectory() as folder:
        args = BlockwiseDistillConfig(
            folder,
            num_blocks=NUM_LAYERS,
            stepping_stones=chosen,
            per_device_train_batch_size=2,
            max_steps=3,
            optim="sgd",
            report_to="none",
            disable_tqdm=True,
            save_strategy="no",
            use_cpu=DEVICE == "cpu",
            bf16=DEVICE == "cuda",
        )
        BlockwiseDistillTrainer(
            model=student, teacher_model=teacher, args=args, train_dataset=rows, callbacks=[peaks]
        ).train()
    return peaks.found


def make_model(vocabulary: int, width: int, num_layers: int) -> LlamaForCausalLM:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=width,
            intermediate_size=width,
            num_hidden_layers=num_layers,
            num_attention_heads=4,
            num_key_value_heads=4,
        )
    )


def make_head(vocabulary: int, width: int) -> Head:
    head = find_head(make_model(vocabulary, width, num_layers=1).to(DEVICE))
    with torch.no_grad(), head.capture():
        head.model(input_ids=torch.zeros(1, 1, dtype=torch.long, device=DEVICE))
    return head


def measure_chunks(vocabulary: int, stones: int, heads: dict[str, Head], args: argparse.Namespace) -> str:
    """A line of the time, over that of all logits at once, and of the peak with chunks of several sizes."""
    sizes = {"plain": None} | {str(size): size for size in args.chunks}
    cell = measure_cell(vocabulary, stones, heads, args.tokens, args.rounds, sizes)
    found = [
        f"{name}: {cell[name]['seconds']:.2f} s ({cell[name]['ratio']:.2f}), {cell[name]['peak_mib']:,.0f} MiB"
        for name in sizes
    ]
    return f"| {vocabulary:,} | {stones} | " + " | ".join(found) + " |"


def measure_cell(
    vocabulary: int, stones: int, heads: dict[str, Head], tokens: int, rounds: int, sizes: dict[str, int | None]
) -> dict[str, Any]:
    """Medians for one vocabulary and number of stones, of all logits at once (`None`) and of chunks."""
    with torch.device(DEVICE):
        states = {
            "student": torch.randn(tokens, WIDTHS["student"], requires_grad=True),
            "teacher": torch.randn(tokens, WIDTHS["teacher"]),
            "stones": {i: torch.randn(tokens, WIDTHS["teacher"], requires_grad=True) for i in range(1, stones + 1)},
        }
        labels = torch.randint(vocabulary, (tokens,))
    runs: dict[str, list[tuple[float, float, float]]] = {name: [] for name in sizes}
    for _ in range(rounds + 1):
        for name, found in runs.items():
            found.append(measure(sizes[name], states, labels, heads))
    cell: dict[str, Any] = {"vocabulary": vocabulary, "stones": stones}
    for name, found in runs.items():
        seconds, peaks, losses = zip(*found[1:], strict=True)  # the first round warms up
        whole = [one[0] for one in runs["plain"][1:]]
        cell[name] = {
            "seconds": statistics.median(seconds),
            "ratio": statistics.median(one / other for one, other in zip(seconds, whole, strict=True)),
            "spread": [min(seconds), max(seconds)],
            "peak_mib": statistics.median(peaks),
            "loss": losses[0],
        }
    return cell


def measure(
    chunk_size: int | None, states: dict[str, Any], labels: torch.Tensor, heads: dict[str, Head]
) -> tuple[float, float, float]:
    """Seconds, peak in MiB, and loss of one loss and backward."""
    losses = RowLosses("single_label_classification", labels)
    weights = stone_weights(states["stones"], max(len(states["stones"]), 1))
    before = reset_peak()
    wait()
    start = time.perf_counter()
    with autocast():
        if chunk_size is None:
            with torch.no_grad():
                clean = heads["teacher"](states["teacher"])
            student = heads["student"](states["student"])
            stones = {i: heads["teacher"](stone) for i, stone in states["stones"].items()}
            loss = distillation_loss(losses, block_kd_learners(student, stones, weights), clean)
            del clean, student, stones
        else:
            loss = chunked_distillation_loss(
                losses,
                block_kd_learners(states["student"], states["stones"], weights),
                states["teacher"],
                PLAIN_WEIGHTS,
                student_head=heads["student"],
                teacher_head=heads["teacher"],
                chunk_size=chunk_size,
            )
    loss.total.backward()
    wait()
    seconds = time.perf_counter() - start
    grown = peak() - before
    for tensor in (states["student"], *states["stones"].values(), *heads["student"].model.parameters()):
        tensor.grad = None
    return seconds, grown, loss.total.item()


def table(cells: list[dict[str, Any]]) -> str:
    lines = [
        "| vocabulary | stones | plain, MiB | chunked, MiB | / chunked KD | plain, s | chunked, s | time ratio "
        "| first step, MiB | third, MiB |",
        "| ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for cell in cells:
        kd = next(other for other in cells if other["vocabulary"] == cell["vocabulary"] and other["stones"] == 0)
        plain, chunked = cell["plain"], cell["chunked"]
        lines.append(
            f"| {cell['vocabulary']:,} | {cell['stones'] or '0 (plain KD)'} | {plain['peak_mib']:,.0f} "
            f"| {chunked['peak_mib']:,.0f} | {chunked['peak_mib'] / kd['chunked']['peak_mib']:.2f} "
            f"| {plain['seconds']:.2f} | {chunked['seconds']:.2f} | {chunked['seconds'] / plain['seconds']:.2f} "
            f"| {cell['steps_mib'][0]:,.0f} | {cell['steps_mib'][2]:,.0f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
