"""Where the time of a training step goes: for plain KD, the default and all stones, at several sizes.

    python examples/benchmarks/step_profile.py                          # a CPU's shapes; on a GPU, --shapes of a GPU

For each setting: time and FLOPs of a step over plain KD's, the excess of the first over the second, the time that
Python spends in our code, how many operations a step starts, what share of its time is inside them, and how many values
it reads, which on a GPU are waited for. All settings take turns within a round, as in `step_time.py`. Our Python is
measured by cProfile, which makes calls dearer, so that it is an upper bound: our functions, and what they call of the
standard library and of torch's Python, but no operation and no model.

A second table has the phases of a step with all stones. "Repeated" is what they compute again of the clean pass:
everything before the teacher's first layer (embeddings, masks, rotary tables). On a GPU, phases are the times in which
they are started.
"""

from __future__ import annotations

import argparse
import cProfile
import json
import pstats
import random
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from memory import DEVICE, wait
from shapes import GPU_SHAPES, SHAPES, TINY, Batch
from step_time import BASELINE, collected, count_flops, make_trainers, ratios, step
from torch.profiler import ProfilerActivity
from torch.profiler import profile as profiled
from transformers import Trainer
from waits import reads_of_a_step

import hf_blockkd
from hf_blockkd import BlockwiseDistillTrainer
from hf_blockkd.training.step import Step

SETTINGS = ("plain KD", "the default", "all stones")
OURS = str(Path(hf_blockkd.__file__).parent)
HELPERS = ("contextlib.py", "functools.py", "inspect.py", "copy.py", "dataclasses.py", "torch/nn/modules/", "hooks.py")
"""Python that our functions may call: hooks come and go, contexts are entered, signatures are looked at."""
PHASES = ("teacher, clean", "student, forward", "repeated", "suffixes, forward", "losses", "backward", "optimizer")
Rows = dict[str, dict[str, float]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    shapes = {shape.name: shape for shape in (TINY, *(GPU_SHAPES if DEVICE == "cuda" else SHAPES))}
    parser.add_argument("--shapes", nargs="+", default=list(shapes), choices=[*shapes])
    parser.add_argument("--rounds", type=int, default=7, help="How often each setting takes its turn.")
    parser.add_argument("--output", type=Path, help="Write the figures here, as JSON.")
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    phases, settings = {}, {}
    for name in args.shapes:
        torch.manual_seed(0)
        batch = {key: tensor.to(DEVICE) for key, tensor in shapes[name].make_batch().items()}
        with tempfile.TemporaryDirectory() as folder, collected():
            trainers = make_trainers(shapes[name], batch, SETTINGS, folder)
            trainers = {one.removeprefix("hf_blockkd, "): trainer for one, trainer in trainers.items()}
            trainers = {one: trainers[one] for one in (BASELINE, *SETTINGS)}
            rows = settings[name] = measure(trainers, batch, args.rounds)
            print(f"\n{name}\n{table(rows)}", flush=True)
            print(per_layer(trainers["all stones"], rows))
            phases[name] = profile_phases(trainers["all stones"], batch, args.rounds)
    print("\n| all stones | step, ms | " + " | ".join(f"{phase}, %" for phase in PHASES) + " |")
    print("| --- | ---: |" + " ---: |" * len(PHASES))
    for name, steps in phases.items():
        whole = statistics.median(sum(one.values()) for one in steps)
        shares = [statistics.median(one[phase] / sum(one.values()) for one in steps) for phase in PHASES]
        print(f"| {name} | {whole * 1000:,.1f} | " + " | ".join(f"{share:.1%}"[:-1] for share in shares) + " |")
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps({"settings": settings, "phases": phases}, indent=2) + "\n", encoding="utf-8")


def measure(trainers: dict[str, Trainer], batch: Batch, rounds: int) -> Rows:
    """Name of a setting -> its figures, times in seconds."""
    for trainer in trainers.values():
        for index in range(2):
            step(trainer, batch, index)  # what a first step allocates and checks
    seconds: dict[str, list[float]] = {name: [] for name in trainers}
    for _ in range(rounds):
        for name in random.sample(list(trainers), len(trainers)):
            seconds[name].append(timed(trainers[name], batch))
    rows = {}
    for name, trainer in trainers.items():
        python, (operations, inside) = own_python(trainer, batch), count_operations(trainer, batch)
        rows[name] = {
            "seconds": statistics.median(seconds[name]),
            "time": ratios(seconds[name], seconds["plain KD"])[1],
            "flops": count_flops(trainer, batch),
            "python": python,
            "operations": operations,
            "inside": inside,
        }
    for name, trainer in trainers.items():  # a run, which changes what a trainer is
        trainer.train_dataset = [
            {key: value[i].cpu() for key, value in batch.items()} for i in range(len(batch["labels"]))
        ]
        trainer.args.max_steps, trainer.args.save_strategy = 3, "no"
        rows[name]["reads"] = reads_of_a_step(trainer).total()
    return rows


def timed(trainer: Trainer, batch: Batch, steps: int = 2) -> float:
    """Seconds of a step."""
    wait()
    start = time.perf_counter()
    for index in range(steps):
        step(trainer, batch, index)
    wait()
    return (time.perf_counter() - start) / steps


def own_python(trainer: Trainer, batch: Batch, steps: int = 5) -> float:
    """Seconds of a step in which Python runs our code, or what that calls of `HELPERS`."""
    profile = cProfile.Profile()
    with profile:
        for index in range(steps):
            step(trainer, batch, index)
    total = 0.0
    for (file, _, _), (*_, own, _, callers) in pstats.Stats(profile).stats.items():
        if file.startswith(OURS):
            total += own
        elif any(helper in file for helper in HELPERS):
            total += sum(edge[2] for (caller, _, _), edge in callers.items() if caller.startswith(OURS))
    return total / steps


def count_operations(trainer: Trainer, batch: Batch) -> tuple[int, float]:
    """How many operations a step starts, and the share of its time that is inside of them."""
    with profiled(activities=[ProfilerActivity.CPU]) as profile:
        start = time.perf_counter()
        step(trainer, batch, 0)
        seconds = time.perf_counter() - start
    operations = [one for one in profile.key_averages() if one.key.startswith("aten::")]
    inside = sum(one.self_cpu_time_total for one in operations) / 1e6
    return sum(one.count for one in operations), inside / seconds


def table(rows: Rows) -> str:
    lines = [
        "| setting | step, ms | time / KD | FLOPs / KD | excess | our Python, us | of a step, % | operations "
        "| inside them, % | reads |",
        "| --- |" + " ---: |" * 9,
    ]
    for name, row in rows.items():
        flops = row["flops"] / rows["plain KD"]["flops"]
        lines.append(
            f"| {name} | {row['seconds'] * 1000:,.1f} | {row['time']:.2f} | {flops:.2f} | {row['time'] / flops:.2f} "
            f"| {row['python'] * 1e6:,.0f} | {row['python'] / row['seconds']:.1%} | {row['operations']:,} "
            f"| {row['inside']:.0%} | {row['reads']} |".replace("% |", " |")
        )
    return "\n".join(lines)


def per_layer(trainer: BlockwiseDistillTrainer, rows: Rows) -> str:
    """What a stone adds to our Python, for each layer of the teacher, whether it runs or is passed over."""
    layers, stones = len(trainer.pair.stones.teacher_stack), len(trainer.pair.stones)
    added = rows["all stones"]["python"] - rows["plain KD"]["python"]
    return f"Our Python for each stone and layer of the teacher: {added / layers / stones * 1e6:.1f} us"


# ---- Phases of a step ----


def profile_phases(trainer: BlockwiseDistillTrainer, batch: Batch, steps: int) -> list[dict[str, float]]:
    """Seconds of each phase, step by step."""
    seconds: dict[str, float] = defaultdict(float)
    watch(trainer, seconds)
    found = []
    for index in range(steps):
        seconds.clear()
        start = time.perf_counter()
        step(trainer, batch, index)
        seconds["backward"] = time.perf_counter() - start - sum(seconds.values())
        found.append(dict(seconds))
    return found


def watch(trainer: BlockwiseDistillTrainer, seconds: dict[str, float]) -> None:
    """Time the parts of a step, by name, from now on."""

    def timed(function: Callable, phase: str) -> Callable:
        def run(*args: Any, **kwargs: Any) -> Any:
            start, repeated = time.perf_counter(), seconds["repeated"]
            try:
                return function(*args, **kwargs)
            finally:
                seconds[phase] += time.perf_counter() - start - (seconds["repeated"] - repeated)

        return run

    make_step, objective = trainer.make_step, trainer.objective

    def timed_step(*args: Any, **kwargs: Any) -> Step:
        step = make_step(*args, **kwargs)
        for name, phase in (("teach", "teacher, clean"), ("learn", "student, forward"), ("loss", "losses")):
            setattr(step, name, timed(getattr(step, name), phase))
        return step

    trainer.make_step = timed_step
    objective.learners = timed(objective.learners, "suffixes, forward")
    trainer.optimizer.step = timed(trainer.optimizer.step, "optimizer")

    begun = 0.0

    def begin(*_: Any) -> None:
        nonlocal begun
        begun = time.perf_counter()

    def reach_layers(*_: Any) -> None:
        if torch.is_grad_enabled():  # not the clean pass
            seconds["repeated"] += time.perf_counter() - begun

    trainer.teacher.register_forward_pre_hook(begin)
    trainer.pair.stones.teacher_stack.layers[0].register_forward_pre_hook(reach_layers)


if __name__ == "__main__":
    main()
