"""Time, FLOPs and memory of a training step: the student alone, plain KD by several libraries, and Block-KD.

    make bench                                                   # all shapes, with the peers in a .venv of their own
    python examples/benchmarks/step_time.py --shapes BERT        # the peers that are installed beside us; a CPU's shape

A step is `Trainer.training_step`, optimizer and `zero_grad`. All trainers take turns within every round, in a new order
each time, so that ratios hold when the machine's speed drifts: a ratio is taken within a round, and the table shows the
median over rounds with the range of its middle half. FLOPs are counted by torch: matrix products, convolutions and
attention. The peak is that of memory above what it was before the step, resident or, on a GPU, allocated. On a GPU,
shapes are larger and everything runs under bfloat16 autocast.
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import statistics
import tempfile
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from memory import DEVICE, peak, reset_peak, wait
from peers import TEMPERATURE, GivenVectors, peer_trainers
from shapes import GPU_SHAPES, SHAPES, Batch, Shape
from transformers import PreTrainedModel, Trainer, TrainingArguments

from hf_blockkd import BlockwiseDistillConfig, BlockwiseDistillTrainer
from hf_blockkd.data.example_keys import KeyedCollator
from hf_blockkd.models.flops import flop_counter
from hf_blockkd.objectives.block_kd import OURS as BLOCK_KD

ALONE, BASELINE = "student alone", "docs recipe"
FITTED = {**BLOCK_KD, "stone_schedule": "constant"}  # no number of steps is known here, over which weights could fall
STATES = {"stepping_stones": "none", "state_blocks": "last_two"}  # which a run with enough examples does by itself
LAST = [4]  # of the blocks that a shape has
OURS: dict[str, dict[str, Any]] = {
    "plain KD": {"stepping_stones": "none"},
    "all stones": {"stepping_stones": "all"},
    "shared examples": {"stepping_stones": "share"},
    "sampled stone": {"stepping_stones": "sample"},
    "a quarter of the examples": {"stepping_stones": "all", "stone_fraction": 0.25},
    "every 4th step": {"stepping_stones": "all", "stones_every": 4},
    "last two stones": {"stepping_stones": "last_two"},
    "last stone": {"stepping_stones": LAST},
    "the default": {**FITTED, **STATES},
    "states after all blocks": {**FITTED, **STATES, "state_blocks": "all"},
    "states, last stone": {**FITTED, "stepping_stones": LAST, "state_blocks": "last_two"},
    "states, last two stones": {**FITTED, "stepping_stones": "last_two"},
    "states, sampled stone": {**FITTED, "stepping_stones": "sample"},
    "hints": {"objective": "hint"},
    "plain KD, cached": {"stepping_stones": "none", "teacher_cache": "cache"},
    "shared examples, cached": {"stepping_stones": "share", "teacher_cache": "cache"},
    "sampled stone, cached": {"stepping_stones": "sample", "teacher_cache": "cache"},
}
OURS_COMPILED = {
    f"{name}, compiled": {**OURS[name], "torch_compile": True} for name in ("plain KD", "the default", "all stones")
}
"""The same with compiled layers, which take a C++ compiler and minutes to make: where they are asked for."""
DRAWS = {"sample": 8, "share": 2}
"""Number of steps after which draws begin anew, so that time and FLOPs are means over the same ones."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    shapes = {shape.name: shape for shape in (GPU_SHAPES if DEVICE == "cuda" else SHAPES)}
    parser.add_argument("--shapes", nargs="+", default=list(shapes), choices=[*shapes])
    parser.add_argument("--settings", nargs="+", default=list(OURS), choices=[*OURS, *OURS_COMPILED])
    parser.add_argument("--rounds", type=int, default=5, help="How often each trainer takes its turn.")
    parser.add_argument(
        "--output", type=Path, default=Path("outputs/step_time"), help="Folder for figures and picture."
    )
    args = parser.parse_args()
    if args.rounds < 2:
        parser.error(f"--rounds is {args.rounds}; a spread takes at least 2.")
    transformers.logging.set_verbosity_error()
    results = {}
    for name in args.shapes:
        with tempfile.TemporaryDirectory() as folder:
            results[name] = measure_shape(shapes[name], args.settings, args.rounds, folder)
        print(f"\n{name}\n{table(results[name])}", flush=True)
    args.output.mkdir(parents=True, exist_ok=True)
    setting = {
        "rounds": args.rounds,
        "device": torch.cuda.get_device_name() if DEVICE == "cuda" else DEVICE,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    figures = json.dumps({"setting": setting, "shapes": results}, indent=2)
    (args.output / "step_time.json").write_text(figures + "\n", encoding="utf-8")
    (args.output / "step_time.md").write_text(
        "\n\n".join(f"{name}\n\n{table(rows)}" for name, rows in results.items()) + "\n", encoding="utf-8"
    )
    draw(results, args.output / "step_time.png")
    print(f"\n{setting}\nFigures, tables and picture: {args.output}")


def make_trainers(shape: Shape, batch: Batch, names: Collection[str], folder: str) -> dict[str, Trainer]:
    """The peers and those of ours, each with models of its own; the caches hold the outputs for the batch."""
    quiet = {"output_dir": folder, "report_to": "none", "disable_tqdm": True}
    quiet |= {"bf16": True} if DEVICE == "cuda" else {"use_cpu": True}

    def make_model(is_teacher: bool) -> PreTrainedModel:
        with torch.device(DEVICE):
            return shape.make_model(is_teacher)

    alone = GivenVectors if shape.outputs == "vectors" else Trainer
    trainers: dict[str, Trainer] = {ALONE: alone(model=make_model(False), args=TrainingArguments(**quiet))}
    for name, make in peer_trainers(shape.outputs).items():
        trainers[name] = make(make_model(False), make_model(True), TrainingArguments(**quiet))
    examples = [{name: tensor[i].cpu() for name, tensor in batch.items()} for i in range(len(batch["labels"]))]
    for name in names:
        settings = (OURS | OURS_COMPILED)[name]
        if "teacher_cache" in settings:
            settings = {**settings, "teacher_cache": f"{folder}/{name}"}
        if settings.get("stepping_stones") == LAST:
            settings = {**settings, "stepping_stones": [shape.num_blocks]}
        trainers[f"hf_blockkd, {name}"] = BlockwiseDistillTrainer(
            model=make_model(False),
            teacher_model=make_model(True),
            args=BlockwiseDistillConfig(**quiet, temperature=TEMPERATURE, num_blocks=shape.num_blocks, **settings),
            train_dataset=examples,
        )
        trainers[f"hf_blockkd, {name}"].fill_teacher_cache()
        if "torch_compile" in settings:
            compile_layers(trainers[f"hf_blockkd, {name}"])
    for trainer in trainers.values():
        trainer.model = trainer.accelerator.prepare_model(trainer.model.train())  # for autocast
        trainer.create_optimizer()
    return trainers


def compile_layers(trainer: BlockwiseDistillTrainer) -> None:
    """Compile the layers of both models for good, as a run does for its time."""
    for stack in (trainer.pair.stones.student_stack, trainer.pair.stones.teacher_stack):
        for layer in stack.layers:
            layer.forward = torch.compile(layer.forward, **trainer._compile_options)


def step(trainer: Trainer, batch: Batch, index: int) -> None:
    """One optimizer step."""
    trainer.state.global_step = index
    if getattr(trainer.args, "teacher_cache", None):
        batch = KeyedCollator(lambda _: batch)([None] * len(batch["labels"]))  # in a run, workers may do it meanwhile
    count = trainer._get_num_items_in_batch([batch], batch["labels"].device)
    trainer.training_step(trainer.model, dict(batch), count)
    trainer.optimizer.step()
    trainer.optimizer.zero_grad()


def measure_shape(shape: Shape, names: list[str], rounds: int, folder: str) -> dict[str, dict[str, Any]]:
    """Name of a trainer -> its figures."""
    torch.manual_seed(0)
    batch = {name: tensor.to(DEVICE) for name, tensor in shape.make_batch().items()}
    trainers = make_trainers(shape, batch, names, folder)
    flops, peaks = {}, {}
    for name, trainer in trainers.items():
        with collected():
            step(trainer, batch, 0)  # what a first step allocates and checks
            before = reset_peak()
            step(trainer, batch, 1)
            peaks[name] = peak() - before
            flops[name] = count_flops(trainer, batch)
    seconds: dict[str, list[float]] = {name: [] for name in trainers}
    with collected():
        for _ in range(rounds):
            for name in random.sample(list(trainers), len(trainers)):
                steps = period(trainers[name])
                wait()
                start = time.perf_counter()
                for index in range(steps):
                    step(trainers[name], batch, index)
                wait()
                seconds[name].append((time.perf_counter() - start) / steps)
    return {
        name: {
            "seconds": statistics.median(taken),
            "time_ratio": ratios(taken, seconds[BASELINE]),
            "time_ratio_to_alone": ratios(taken, seconds[ALONE]),
            "flops": flops[name],
            "flop_ratio": flops[name] / flops[BASELINE],
            "flop_ratio_to_alone": flops[name] / flops[ALONE],
            "peak_mib": peaks[name],
        }
        for name, taken in seconds.items()
    }


def period(trainer: Trainer) -> int:
    """Number of steps after which a trainer is measured over the same draws again."""
    args = trainer.args
    if not isinstance(args, BlockwiseDistillConfig) or isinstance(args.stepping_stones, list):
        return 2
    return max(DRAWS.get(args.stepping_stones, 2), args.stones_every)


def count_flops(trainer: Trainer, batch: Batch) -> float:
    """FLOPs of a step, in the mean over all draws."""
    steps = period(trainer)
    with torch.compiler.set_stance("force_eager"), flop_counter() as counter:  # which sees into no compiled layer
        for index in range(steps):
            step(trainer, batch, index)
    return counter.get_total_flops() / steps


def ratios(taken: list[float], other: list[float]) -> list[float]:
    """Lower quartile, median and upper quartile of the ratios within each round."""
    return statistics.quantiles([a / b for a, b in zip(taken, other, strict=True)], n=4, method="inclusive")


@contextmanager
def collected() -> Iterator[None]:
    """Without garbage collections in between, which would hit whichever trainer comes next."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def table(rows: dict[str, dict[str, Any]]) -> str:
    lines = [
        "| step | s | time / KD | FLOPs / KD | time / alone | FLOPs / alone | peak, MiB |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, row in rows.items():
        low, middle, high = row["time_ratio"]
        lines.append(
            f"| {name} | {row['seconds']:.3f} | {middle:.2f} ({low:.2f} to {high:.2f}) | {row['flop_ratio']:.2f} "
            f"| {row['time_ratio_to_alone'][1]:.2f} | {row['flop_ratio_to_alone']:.2f} | {row['peak_mib']:,.0f} |"
        )
    return "\n".join(lines)


def draw(results: dict[str, dict[str, dict[str, Any]]], path: Path) -> None:
    """Time of a step relative to the docs recipe, beside what its FLOPs would have it be."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    names = max(results.values(), key=len)
    place = {name: len(names) - position for position, name in enumerate(names)}
    figure, panels = plt.subplots(
        1, len(results), figsize=(4.5 * len(results), 5), layout="constrained", squeeze=False, sharex=True, sharey=True
    )
    for axes, (shape, rows) in zip(panels[0], results.items(), strict=True):
        heights = [place[name] for name in rows]
        low, middle, high = zip(*(row["time_ratio"] for row in rows.values()), strict=True)
        errors = [[b - a for a, b in zip(low, middle, strict=True)], [b - a for a, b in zip(middle, high, strict=True)]]
        colours = ["C0" if name.startswith("hf_blockkd") else "C7" for name in rows]
        axes.barh(heights, middle, xerr=errors, color=colours)
        axes.plot([row["flop_ratio"] for row in rows.values()], heights, "k|", markersize=14, label="by FLOPs")
        axes.axvline(1, color="grey", linewidth=0.8)
        axes.set(title=shape, xlabel="time of a step / docs recipe")
        axes.set_yticks(list(place.values()), list(place))
        axes.legend(loc="lower right")
    figure.savefig(path, dpi=130)
    plt.close(figure)


if __name__ == "__main__":
    main()
