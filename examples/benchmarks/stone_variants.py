"""Accuracy of the cheaper ways to run stepping stones, at equal steps and equal time, on the digits of `make distill`.

    python examples/benchmarks/stone_variants.py --seeds 0 1 2 3 4 --output_dir outputs/stone_variants

Takes the recipe and the flags of `distill_vit.py`. Every finished run is a line of `results.jsonl` in the output
folder and is not repeated, so a sweep can be stopped, taken up again, and split between processes by `--variants`.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import AutoModelForImageClassification, TrainerCallback, set_seed

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import distill_vit
from comparison import new_student, parse_arguments, train_teacher
from image_data import ImageDataArguments, as_batches, load_images

from hf_blockkd import BlockwiseDistillTrainer
from hf_blockkd.metrics import Accuracy


@dataclass
class ManyEarlyFewLate(TrainerCallback):
    """All stones in the first `share` of a run, and other ones after."""

    share: float
    later: str

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        args.stepping_stones = "all" if state.global_step < self.share * state.max_steps else self.later


@dataclass(frozen=True)
class Variant:
    """Settings of a run, the length of its training relative to the recipe's, and a schedule."""

    settings: dict[str, Any]
    length: float = 1.0
    schedule: ManyEarlyFewLate | None = None


VARIANTS = {
    "plain KD": Variant({"stepping_stones": "none"}),
    "plain KD, 1.25 times the steps": Variant({"stepping_stones": "none"}, 1.25),
    "plain KD, 2 times the steps": Variant({"stepping_stones": "none"}, 2.0),
    "all stones": Variant({"stepping_stones": "all"}),
    "shared examples": Variant({"stepping_stones": "share"}),
    "shared examples, by cost": Variant({"stepping_stones": "share", "stone_sampling": "cost"}),
    "sampled stone": Variant({"stepping_stones": "sample"}),
    "sampled stone, uniform": Variant({"stepping_stones": "sample", "stone_sampling": "uniform"}),
    "a quarter of the examples": Variant({"stone_fraction": 0.25}),
    "every 4th step": Variant({"stones_every": 4}),
    "last stone": Variant({"stepping_stones": [3]}),
    "last two stones": Variant({"stepping_stones": [2, 3]}),
    "all stones, then shared": Variant({"stepping_stones": "all"}, schedule=ManyEarlyFewLate(0.5, "share")),
    "all stones for a third": Variant({"stepping_stones": "all"}, schedule=ManyEarlyFewLate(1 / 3, "none")),
}


@dataclass
class VariantArguments(ImageDataArguments):
    """Which variants to train."""

    variants: list[str] = field(default_factory=lambda: list(VARIANTS), metadata={"help": "Names of variants."})


def main() -> None:
    script, data, args = parse_arguments(distill_vit.__file__, VariantArguments, remove_unused_columns=False)
    output = Path(args.output_dir)
    train_set, eval_set = load_images(data)
    teacher, processor = distill_vit.make_teacher(script, train_set, train_set.features["label"].names)
    channels = teacher.config.num_channels
    accuracy = Accuracy()
    datasets = {
        "train_dataset": as_batches(train_set, processor, channels, augment=data),
        "eval_dataset": as_batches(eval_set, processor, channels),
        "compute_metrics": lambda prediction: accuracy.compute(
            predictions=prediction.predictions.argmax(-1), references=prediction.label_ids
        ),
    }
    args = dataclasses.replace(args, eval_strategy="no", save_strategy="no")
    if not (output / "teacher" / "config.json").is_file():
        train_teacher(script, args, teacher, datasets)
    teacher = AutoModelForImageClassification.from_pretrained(output / "teacher")

    results = output / "results.jsonl"
    for seed in script.seeds or [args.seed]:
        for name in data.variants:
            if not any((run["variant"], run["seed"]) == (name, seed) for run in read(results)):
                run = {"variant": name, "seed": seed, **train(VARIANTS[name], seed, script, args, teacher, datasets)}
                with results.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(run) + "\n")
    print(table(read(results)))


def train(
    variant: Variant, seed: int, script: Any, args: Any, teacher: Any, datasets: dict[str, Any]
) -> dict[str, Any]:
    set_seed(seed)
    student = new_student(script, teacher, AutoModelForImageClassification)
    epochs = args.num_train_epochs * variant.length
    run_args = dataclasses.replace(args, seed=seed, num_train_epochs=epochs, **variant.settings)
    callbacks = [variant.schedule] if variant.schedule else None
    trainer = BlockwiseDistillTrainer(
        model=student, teacher_model=teacher, args=run_args, callbacks=callbacks, **datasets
    )
    seconds = trainer.train().metrics["train_runtime"]
    return {"accuracy": trainer.evaluate()["eval_accuracy"], "seconds": seconds, "steps": trainer.state.global_step}


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []


def table(runs: list[dict[str, Any]]) -> str:
    """Mean accuracy with a 95 % interval (Student's t), and the mean difference to all stones, seed by seed."""
    reference = {run["seed"]: run["accuracy"] for run in runs if run["variant"] == "all stones"}
    lines = [
        "| variant | seeds | accuracy, % | difference to all stones | steps |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for name in VARIANTS:
        same = [run for run in runs if run["variant"] == name]
        if same:
            paired = [100 * (run["accuracy"] - reference[run["seed"]]) for run in same if run["seed"] in reference]
            lines.append(
                f"| {name} | {len(same)} | {interval([100 * run['accuracy'] for run in same])} "
                f"| {interval(paired) if paired else '-'} | {same[0]['steps']:,} |"
            )
    return "\n".join(lines)


def interval(values: list[float]) -> str:
    from scipy.stats import t

    if len(values) < 2:
        return f"{values[0]:.2f}"
    half = t.ppf(0.975, len(values) - 1) * statistics.stdev(values) / len(values) ** 0.5
    return f"{statistics.mean(values):.2f} ± {half:.2f}"


if __name__ == "__main__":
    main()
