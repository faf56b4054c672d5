"""Where the time of a training step with all stepping stones goes, phase by phase.

    python examples/benchmarks/step_profile.py

Each phase's share of the step, in the median over steps. "repeated" is what the stones compute again of the clean pass:
everything before the teacher's first layer (embeddings, masks, rotary tables).
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
import transformers
from shapes import SHAPES, Batch, Shape

from hf_blockkd import BlockwiseDistillConfig, BlockwiseDistillTrainer
from hf_blockkd.training.step import Step

PHASES = ("teacher, clean", "student, forward", "repeated", "suffixes, forward", "losses", "backward", "optimizer")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", default=[shape.name for shape in SHAPES])
    parser.add_argument("--steps", type=int, default=20, help="Steps that are timed.")
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    print("| shape | step, s | " + " | ".join(f"{phase}, %" for phase in PHASES) + " |")
    print("| --- | ---: |" + " ---: |" * len(PHASES))
    for shape in SHAPES:
        if shape.name in args.shapes:
            with tempfile.TemporaryDirectory() as folder:
                steps = profile(shape, args.steps, folder)
            whole = statistics.median(sum(step.values()) for step in steps)
            shares = [statistics.median(step[phase] / sum(step.values()) for step in steps) for phase in PHASES]
            print(f"| {shape.name} | {whole:.3f} | " + " | ".join(f"{share:.1%}"[:-1] for share in shares) + " |")


def profile(shape: Shape, num_steps: int, folder: str) -> list[dict[str, float]]:
    """Seconds of each phase, step by step."""
    torch.manual_seed(0)
    batch = shape.make_batch()
    args = BlockwiseDistillConfig(folder, stepping_stones="all", report_to="none", disable_tqdm=True, use_cpu=True)
    trainer = BlockwiseDistillTrainer(model=shape.make_model(False), teacher_model=shape.make_model(True), args=args)
    trainer.model.train()
    trainer.create_optimizer()
    seconds: dict[str, float] = defaultdict(float)
    watch(trainer, seconds)
    steps = []
    for index in range(num_steps + 2):
        seconds.clear()
        whole = take_step(trainer, batch, seconds)
        seconds["backward"] = whole - sum(seconds.values())
        if index > 1:
            steps.append(dict(seconds))
    return steps


def take_step(trainer: BlockwiseDistillTrainer, batch: Batch, seconds: dict[str, float]) -> float:
    start = time.perf_counter()
    count = trainer._get_num_items_in_batch([batch], batch["labels"].device)
    trainer.training_step(trainer.model, dict(batch), count)
    before = time.perf_counter()
    trainer.optimizer.step()
    trainer.optimizer.zero_grad()
    seconds["optimizer"] = time.perf_counter() - before
    return time.perf_counter() - start


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
