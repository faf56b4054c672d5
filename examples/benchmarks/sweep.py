"""Every method under one recipe, seed by seed: accuracy or perplexity with its spread, and the share of the gap closed.

    python examples/benchmarks/sweep.py examples/benchmarks/recipes/cifar10.yaml --dataset FOLDER_OR_HUB_NAME \
        --names KD Block-KD --seeds 0 1 2 --learning_rates 1e-3 2e-3

The rows to train on are split once: some train the teacher, others the students, and others choose each method's
learning rate (and weight), so that the test rows choose nothing: the first seed runs all settings, the second the two
best, and all others the best by the mean of both. Every finished run is a line of `results.jsonl` in the output folder
and is not repeated: a sweep can be stopped, taken up again, and split between processes by its methods. `--table true`
prints what is there.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import statistics
import sys
from dataclasses import dataclass, field, make_dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import yaml
from datasets import Dataset
from transformers import PreTrainedModel, set_seed

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import distill_lm
import distill_text_classification
import distill_vit
import spiking  # noqa: F401  (makes its model type known)
from arguments import ModelArguments, parse_arguments
from comparison import train_teacher
from image_data import ImageDataArguments
from lm_data import LMDataArguments
from methods import Method, StonesInTwoParts, methods, normalise_before_connectors
from quantized import quantize
from results import Metric
from task import Task, new_student
from text_data import TextDataArguments

from hf_blockkd import BlockwiseDistillTrainer
from hf_blockkd.training import connector_start

EXAMPLES = {
    "vit": (distill_vit, ImageDataArguments, {"remove_unused_columns": False}),
    "text_classification": (distill_text_classification, TextDataArguments, {"remove_unused_columns": False}),
    "lm": (distill_lm, LMDataArguments, {"prediction_loss_only": True}),
}
TEACHER = "teacher"
UNTRAINED = "cut, before training"
Run = dict[str, Any]


@dataclass
class SweepArguments:
    """What a sweep adds to the arguments of an example."""

    example: str = field(default="vit", metadata={"help": "Which example's task.", "choices": list(EXAMPLES)})
    names: list[str] | None = field(default=None, metadata={"help": "Methods to run; default: all of methods.py."})
    learning_rates: list[float] | None = field(default=None, metadata={"help": "Default: the recipe's alone."})
    teacher_rows: int = field(default=0, metadata={"help": "Rows that train the teacher alone; 0: the students'."})
    student_rows: int = field(default=0, metadata={"help": "Rows that train the students; 0: all that are left."})
    validation_rows: int = field(default=0, metadata={"help": "Rows of the training set that are held out to choose."})
    levels: int | None = field(
        default=None, metadata={"help": "Values that a weight of the student's layers has; 3: ternary, 4: two bits."}
    )
    table: bool = field(default=False, metadata={"help": "Print the table and train nothing."})


def main() -> None:
    path = Path(sys.argv.pop(1))
    recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
    example, data_arguments, defaults = EXAMPLES[recipe["example"]]
    arguments = make_dataclass("Arguments", [], bases=(SweepArguments, data_arguments))
    script, data, args = parse_arguments(path, arguments, ModelArguments, **defaults)
    results = Path(args.output_dir) / "results.jsonl"
    if not data.table:
        torch.set_num_threads(1)  # two runs side by side get more done than one on two threads
        args = dataclasses.replace(args, eval_strategy="no", save_strategy="no", disable_tqdm=True)
        sweep(script, data, args, example.load_task(script, data), results)
    print(table(read(results), lower_is_better=recipe["example"] == "lm"))


def sweep(script: Any, data: Any, args: Any, task: Task, results: Path) -> None:
    teacher_rows, student_rows, validation = split(task.train_set, data)
    folder = results.parent / TEACHER if script.train_teacher else script.teacher
    if script.train_teacher and not (folder / "config.json").is_file():
        train_teacher(script, args, task.teacher, task.arguments(teacher_rows))
    teacher = task.auto_class.from_pretrained(folder, trust_remote_code=False)
    arguments = task.arguments(task.transfer(student_rows))

    def record(run: Run, trainer: BlockwiseDistillTrainer) -> None:
        run |= {"test": score(trainer, task.metric, task.as_eval(task.eval_set))}
        run |= {"validation": score(trainer, task.metric, task.as_eval(validation))} if len(validation) else {}
        with results.open("a", encoding="utf-8") as file:
            file.write(json.dumps(run) + "\n")

    known = methods(args.num_blocks)
    new = partial(new_student, script, teacher, task.auto_class, arguments)
    # A cut takes its time, and is the same for every run.
    make = new if script.fresh else partial(copy.deepcopy, new())

    def begin() -> PreTrainedModel:
        return make() if data.levels is None else quantize(make(), data.levels)

    if not any(run["method"] == TEACHER for run in read(results)):
        # Its own objective takes no part in an evaluation.
        trainer = BlockwiseDistillTrainer(model=teacher, teacher_model=begin(), args=args, **arguments)
        record({"method": TEACHER, "seed": None}, trainer)
        teacher = task.auto_class.from_pretrained(folder, trust_remote_code=False)
        if not script.fresh:
            trainer = BlockwiseDistillTrainer(model=begin(), teacher_model=teacher, args=args, **arguments)
            record({"method": UNTRAINED, "seed": None}, trainer)
    for name in data.names or known:
        tried = [
            {"learning_rate": learning_rate, **found}
            for learning_rate in data.learning_rates or [args.learning_rate]
            for found in known[name].search
        ]
        for index, seed in enumerate(script.seeds or [args.seed]):
            for settings in tried:
                run = {"method": name, "seed": seed, **settings}
                if any(run.items() <= other.items() for other in read(results)):
                    continue
                run_args = dataclasses.replace(args, seed=seed, **settings)
                set_seed(seed)
                trainer, seconds = train(known[name], begin(), run_args, teacher, arguments)
                record(run | {"seconds": round(seconds, 1), "steps": trainer.state.global_step}, trainer)
            ranked = rank([run for run in read(results) if run["method"] == name], task.metric.lower_is_better)
            tried = [{key: group[0][key] for key in tried[0]} for group in ranked[: 1 if index else 2]]


def split(rows: Dataset, data: SweepArguments) -> tuple[Dataset, Dataset, Dataset]:
    """Rows for the teacher, for the students, and to choose by; the same in every run of a recipe."""
    rows = rows.shuffle(seed=0) if data.teacher_rows or data.validation_rows else rows
    start = data.teacher_rows + data.validation_rows
    end = start + data.student_rows if data.student_rows else len(rows)
    students = rows.select(range(start, end))
    teachers = rows.select(range(data.validation_rows, start)) if data.teacher_rows else students
    return teachers, students, rows.select(range(data.validation_rows))


def train(
    method: Method, student: Any, args: Any, teacher: Any, arguments: dict[str, Any]
) -> tuple[BlockwiseDistillTrainer, float]:
    """A trained student, and the seconds that it took."""
    epochs = args.num_train_epochs * method.length
    args = dataclasses.replace(args, num_train_epochs=epochs, **method.settings)
    callbacks = [StonesInTwoParts(*method.schedule)] if method.schedule else None
    if method.teacher_dtype is not None:
        teacher = copy.deepcopy(teacher).to(method.teacher_dtype)
    trainer = BlockwiseDistillTrainer(model=student, teacher_model=teacher, args=args, callbacks=callbacks, **arguments)
    if method.norm_before:
        normalise_before_connectors(trainer)
    with patch.object(connector_start, "RIDGE", method.ridge):
        return trainer, trainer.train().metrics["train_runtime"]


def score(trainer: BlockwiseDistillTrainer, metric: Metric, rows: Any) -> float:
    return metric.of(trainer.evaluate(rows), "eval")


def read(path: Path) -> list[Run]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []


def table(runs: list[Run], lower_is_better: bool) -> str:
    """Mean and 95 % interval (Student's t) over seeds of each method's best settings, and what it closes of the gap."""
    percent = 1 if lower_is_better else 100
    best = {name: rank([run for run in runs if run["method"] == name], lower_is_better)[0] for name in names(runs)}
    means = {name: percent * statistics.mean(run["test"] for run in same) for name, same in best.items()}
    ends = means.get("alone"), means.get(TEACHER)
    paired = {run["seed"]: run["test"] for run in best.get("KD", [])}
    lines = [
        "| method | seeds | test | difference to KD | gap closed, % | seconds |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, same in best.items():
        closed = "-"
        if None not in ends and ends[0] != ends[1]:
            closed = f"{100 * (means[name] - ends[0]) / (ends[1] - ends[0]):.0f}"
        differences = [percent * (run["test"] - paired[run["seed"]]) for run in same if run["seed"] in paired]
        seconds = [run["seconds"] for run in same if "seconds" in run]
        lines.append(
            f"| {name} | {len(same)} | {interval([percent * run['test'] for run in same])} "
            f"| {interval(differences) if differences else '-'} | {closed} "
            f"| {f'{statistics.mean(seconds):.0f}' if seconds else '-'} |"
        )
    return "\n".join(lines)


def names(runs: list[Run]) -> list[str]:
    return list(dict.fromkeys(run["method"] for run in runs))


def rank(runs: list[Run], lower_is_better: bool) -> list[list[Run]]:
    """A method's runs by their settings, best first: the two best with the first seed, by the mean of two seeds."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(json.dumps([run.get("learning_rate"), run.get("hint_weight")]), []).append(run)
    seeds = list(dict.fromkeys(run["seed"] for run in runs))

    def validation(group: list[Run], num_seeds: int) -> float:
        scores = [run.get("validation", 0.0) for run in group if run["seed"] in seeds[:num_seeds]]
        return statistics.mean(scores or [float("inf") if lower_is_better else float("-inf")])

    ranked = sorted(groups.values(), key=lambda group: validation(group, 1), reverse=not lower_is_better)
    finalists = sorted(ranked[:2], key=lambda group: validation(group, 2), reverse=not lower_is_better)
    return finalists + ranked[2:]


def interval(values: list[float]) -> str:
    if len(values) < 2:
        return f"{values[0]:.2f}"
    return f"{statistics.mean(values):.2f} ± {half_width(values):.2f}"


def half_width(values: list[float]) -> float:
    """Of the 95 % interval of a mean (Student's t)."""
    from scipy.stats import t

    return t.ppf(0.975, len(values) - 1) * statistics.stdev(values) / len(values) ** 0.5


if __name__ == "__main__":
    main()
