"""What the examples share: one recipe from YAML and flags, one loop over methods and seeds, one table, one picture."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import json
import os
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import PartialState
from datasets import Dataset
from transformers import AutoConfig, HfArgumentParser, PreTrainedModel, Trainer, set_seed

from hf_blockkd import BlockwiseDistillConfig, BlockwiseDistillTrainer, make_student
from hf_blockkd.config import check_objective
from hf_blockkd.objectives import OBJECTIVES, make_objective
from hf_blockkd.students.config_changes import DEPTH_FIELDS
from hf_blockkd.students.layer_scores import LAYER_CHOICES
from hf_blockkd.students.student import CHANNEL_CHOICES

METHODS = {"alone": "student alone", "kd": "student, plain KD", "block_kd": "student, Block-KD"}
"""The methods that are compared by default, and their names; all others go by that of their objective."""
TOGETHER = ({"student", "student_layers", "student_config"}, {"dataset", "dataset_config"})
"""Fields that describe one thing: who sets one of them means none that the recipe sets of the others."""


@dataclass
class ComparisonArguments:
    """The teacher, the student, and what to compare."""

    config: str | None = field(
        default=None,
        metadata={
            "help": "YAML file with fields and values; it may stand first, without the flag. What it leaves out is "
            "as in the recipe beside the script, whose values are the defaults shown here."
        },
    )
    teacher: str | None = field(default=None, metadata={"help": "Name or path of the teacher."})
    train_teacher: bool = field(
        default=False, metadata={"help": "Train the teacher first: `teacher` on this data, or a new one."}
    )
    teacher_config: str | None = field(default=None, metadata={"help": "JSON: config fields of a new teacher."})
    teacher_epochs: float = field(default=3, metadata={"help": "Epochs of the teacher's training."})
    teacher_learning_rate: float = field(default=1e-3, metadata={"help": "Peak learning rate of the teacher."})
    student: str | None = field(default=None, metadata={"help": "Name or path of a student to start from."})
    student_layers: int | None = field(default=None, metadata={"help": "Depth of a student of the teacher's width."})
    student_config: str | None = field(
        default=None, metadata={"help": "JSON: fields in which the student's config differs from the teacher's."}
    )
    methods: list[str] = field(
        default_factory=lambda: list(METHODS),
        metadata={"help": f"Objectives to train a student with: {', '.join(OBJECTIVES)}, or sums."},
    )
    fresh: bool = field(
        default=False, metadata={"help": "Begin with new weights, instead of cutting the student out of the teacher."}
    )
    layers: str = field(default="even", metadata={"help": "Which layers the cut keeps.", "choices": [*LAYER_CHOICES]})
    channels: str | None = field(
        default=None, metadata={"help": "What its channels are chosen by.", "choices": [*CHANNEL_CHOICES]}
    )
    fit: bool = field(default=True, metadata={"help": "Whether linear maps of the cut are fitted before training."})
    seeds: list[int] | None = field(
        default=None, metadata={"help": "Seeds of the students, one run for each; default: `seed` alone."}
    )

    def __post_init__(self) -> None:
        if not self.methods:
            raise ValueError(f"`methods` has no entry; choose from {', '.join(OBJECTIVES)}.")
        for method in self.methods:
            check_objective(method)
        if self.teacher is None and not self.train_teacher:
            raise ValueError("There is no teacher: name one with `--teacher`, or train one with `--train_teacher`.")


def parse_arguments(script: str | Path, data_arguments: type, **defaults: Any) -> tuple[Any, ...]:
    """Read the recipe of an example, a YAML file of the person's own, and the command line; the later wins.

    Args:
        script: `__file__` of the example, beside which its recipe lies.
        data_arguments: Its dataclass of arguments about data.
        **defaults: Defaults of the example that none of them sets.

    Returns:
        ComparisonArguments, the data arguments, and BlockwiseDistillConfig.

    Raises:
        ValueError: If a file holds no recipe, or a name that is no field.
    """
    flags = sys.argv[1:]
    if flags and flags[0].endswith((".yaml", ".yml")):
        flags.insert(0, "--config")
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--config")
    recipe, config = Path(script).with_suffix(".yaml"), first.parse_known_args(flags)[0].config
    parser = HfArgumentParser((ComparisonArguments, data_arguments, BlockwiseDistillConfig))
    fields = {action.dest for action in parser._actions}
    values, own = _read_recipe(recipe, fields), {} if config is None else _read_recipe(Path(config), fields)
    given = set(own) | {flag.partition("=")[0].removeprefix("--") for flag in flags if flag.startswith("--")}
    for group in TOGETHER:
        if given & group:
            values = {name: value for name, value in values.items() if name not in group}
    values = {**defaults, **values, **own}
    parser.set_defaults(
        **{name: json.dumps(value) if isinstance(value, dict) else value for name, value in values.items()}
    )
    return parser.parse_args_into_dataclasses(flags)


def _read_recipe(path: Path, fields: set[str]) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(f"There is no file {str(path)!r}; name a YAML file with fields and values.")
    values = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds a {type(values).__name__}; write a line `field: value` for each field.")
    for name in values:
        if name not in fields:
            near = difflib.get_close_matches(str(name), sorted(fields), n=1)
            advice = f"did you mean `{near[0]}`?" if near else "`--help` lists those that there are."
            raise ValueError(f"{path} sets `{name}`, which is no field of script, data or configuration; {advice}")
    return values


@dataclass
class Metric:
    """The figure that is compared.

    Attributes:
        name: For table and picture.
        of: Reads it from the metrics of an evaluation with a prefix such as `eval` or `eval_stone_1`.
        style: Format of one value.
        lower_is_better: Whether it is an error.
    """

    name: str
    of: Callable[[dict[str, float], str], float]
    style: str = ".2%"
    lower_is_better: bool = False

    def show(self, value: float) -> str:
        return format(value, self.style)


def _same(rows: Any) -> Any:
    return rows


@dataclass
class Task:
    """What an example trains, on which data, and how it is judged.

    Attributes:
        teacher: Loaded or new.
        auto_class: The `AutoModelFor...` class of both models.
        train_set: Rows to train on.
        eval_set: Rows to evaluate on.
        metric: What is compared.
        trainer_arguments: Collator, metrics and processing class, for the trainers.
        as_train: Makes a data set to train on of rows, e.g. with augmentation.
        as_eval: Makes one to evaluate on.
        finish: Makes of the folder of a trained student what is to stay of it.
    """

    teacher: PreTrainedModel
    auto_class: type
    train_set: Dataset
    eval_set: Dataset
    metric: Metric
    trainer_arguments: dict[str, Any]
    as_train: Callable[[Dataset], Any] = _same
    as_eval: Callable[[Dataset], Any] = _same
    finish: Callable[[Path], None] | None = None

    def arguments(self, train_set: Dataset | None = None, eval_set: Dataset | None = None) -> dict[str, Any]:
        """Arguments about data for a trainer; by default, those of all rows."""
        return {
            "train_dataset": self.as_train(self.train_set if train_set is None else train_set),
            "eval_dataset": self.as_eval(self.eval_set if eval_set is None else eval_set),
            **self.trainer_arguments,
        }


def load_teacher(script: ComparisonArguments, auto_class: type, **fields: Any) -> PreTrainedModel:
    """The teacher by its name, whole, unless it is trained first.

    Args:
        script: Names it.
        auto_class: The `AutoModelFor...` class.
        **fields: Of its config.

    Raises:
        ValueError: If some of its weights would be new and stay untrained.
    """
    teacher, loading = auto_class.from_pretrained(
        script.teacher,
        ignore_mismatched_sizes=script.train_teacher,
        trust_remote_code=False,
        output_loading_info=True,
        **fields,
    )
    new = sorted(loading["missing_keys"])
    if new and not script.train_teacher:
        raise ValueError(
            f"The teacher {script.teacher!r} has no weights for {new[0]!r}, which would stay as they are drawn: "
            "fine-tune it first with `--train_teacher true`, or name a fine-tuned one."
        )
    return teacher


def new_student(
    script: ComparisonArguments, teacher: PreTrainedModel, auto_class: type, data: dict[str, Any]
) -> PreTrainedModel:
    """The student: loaded, cut out of the teacher, or new, with the teacher's classes."""
    overrides = json.loads(script.student_config or "{}")
    if script.student is not None:
        classes = {"id2label": teacher.config.id2label, "label2id": teacher.config.label2id}
        return auto_class.from_pretrained(
            script.student, ignore_mismatched_sizes=True, trust_remote_code=False, **classes, **overrides
        )
    if not script.fresh:
        depth = next((overrides.pop(name) for name in DEPTH_FIELDS if name in overrides), None)
        return make_student(
            teacher,
            num_layers=script.student_layers or depth,
            layers=script.layers,
            channels=script.channels,
            fit=script.fit,
            data=data["train_dataset"],
            data_collator=data.get("data_collator"),
            **overrides,
        )
    config = AutoConfig.for_model(**{**teacher.config.to_dict(), **overrides})
    return auto_class.from_config(config, dtype=teacher.dtype, trust_remote_code=False)


def train_teacher(
    script: ComparisonArguments, args: BlockwiseDistillConfig, teacher: PreTrainedModel, data: dict[str, Any]
) -> float:
    """Train the teacher into `output_dir/teacher`; seconds it took."""
    say("\n== teacher")
    teacher_args = dataclasses.replace(
        args,
        output_dir=str(Path(args.output_dir) / "teacher"),
        num_train_epochs=script.teacher_epochs,
        learning_rate=script.teacher_learning_rate,
        max_steps=-1,
    )
    trainer = Trainer(model=teacher, args=teacher_args, **data)
    seconds = trainer.train().metrics["train_runtime"]
    trainer.save_model()
    return seconds


def compare(script: ComparisonArguments, args: BlockwiseDistillConfig, task: Task) -> None:
    """Train the teacher if asked, then the student with each method and seed; print and save what came out.

    Args:
        script: What to compare.
        args: The recipe of every student.
        task: Models and data.
    """
    use_all_cores()
    teacher, auto_class, metric, data = task.teacher, task.auto_class, task.metric, task.arguments()
    output = Path(args.output_dir)
    teacher_seconds = train_teacher(script, args, teacher, data) if script.train_teacher else None
    runs: list[dict[str, Any]] = []
    path: dict[str, float] = {}
    for seed in script.seeds or [args.seed]:
        for method in script.methods:
            name = METHODS.get(method, f"student, {method}")
            say(f"\n== {name}, seed {seed}")
            set_seed(seed)
            student = new_student(script, teacher, auto_class, data)
            parameters = student.num_parameters()
            folder = output / method / f"seed_{seed}" if script.seeds else output / method
            run_args = dataclasses.replace(args, seed=seed, output_dir=str(folder))
            trainer = _make_trainer(method, student, teacher, run_args, data)
            seconds = trainer.train(resume_from_checkpoint=args.resume_from_checkpoint).metrics["train_runtime"]
            trainer.save_model()
            if task.finish is not None and args.should_save:
                task.finish(folder)
            metrics = trainer.evaluate()
            curve = [
                (entry["epoch"], metric.of(entry, "eval"))
                for entry in trainer.state.log_history
                if "eval_loss" in entry
            ]
            value = metric.of(metrics, "eval")
            runs.append(
                {
                    "model": name,
                    "seed": seed,
                    metric.name: value,
                    "parameters": parameters,
                    "seconds": seconds,
                    "curve": curve,
                }
            )
            if method == "block_kd":
                path = _path(trainer, metric, value)
                say(f"\n{trainer.block_map}")
    teacher_value = path.get("teacher")
    if teacher_value is None:
        teacher_value = metric.of(_make_evaluator(teacher, args, data).evaluate(), "eval")
    teacher_run = {
        "model": "teacher",
        "seed": None,
        metric.name: teacher_value,
        "parameters": teacher.num_parameters(),
        "seconds": teacher_seconds,
    }
    if PartialState().is_main_process:
        _save([teacher_run, *runs], path, metric, output)
        print(f"\n{_table([teacher_run, *runs], metric)}\n")
        print(f"Picture: {output / 'results.png'}   figures: {output / 'results.json'}   student: {folder}")
        print(f'Load it with: {auto_class.__name__}.from_pretrained("{folder}")')


def _make_trainer(
    method: str, student: PreTrainedModel, teacher: PreTrainedModel, args: BlockwiseDistillConfig, data: dict[str, Any]
) -> BlockwiseDistillTrainer:
    objective = make_objective(dataclasses.replace(args, objective=method, cross_weight=0.0))
    is_cached = objective.needs_teacher and not objective.needs_teacher_states
    args = dataclasses.replace(
        args,
        objective=method,
        cross_weight=args.cross_weight if method == "block_kd" else 0.0,
        teacher_cache=args.teacher_cache if is_cached else None,
    )
    return BlockwiseDistillTrainer(model=student, teacher_model=teacher, args=args, **data)


def _make_evaluator(model: PreTrainedModel, args: BlockwiseDistillConfig, data: dict[str, Any]) -> Trainer:
    args = dataclasses.replace(args, output_dir=str(Path(args.output_dir) / "teacher"))
    return Trainer(model=model, args=args, **data)


def _path(trainer: BlockwiseDistillTrainer, metric: Metric, student: float) -> dict[str, float]:
    """The metric of teacher, stones and student."""
    stones = trainer.evaluate_stepping_stones()
    return {
        "teacher": metric.of(stones, "eval_teacher"),
        **{f"N_{i}": metric.of(stones, f"eval_stone_{i}") for i in trainer.pair.trained_stones},
        "student": student,
    }


def _table(runs: list[dict[str, Any]], metric: Metric) -> str:
    """A line for each model, with mean and standard deviation over seeds where there are several."""
    lines = [f"{'model':<20}{metric.name:>18}{'parameters':>13}{'training':>12}"]
    for model in dict.fromkeys(run["model"] for run in runs):
        same = [run for run in runs if run["model"] == model]
        values = [run[metric.name] for run in same]
        value = metric.show(statistics.mean(values))
        if len(values) > 1:
            value += f" ± {metric.show(statistics.stdev(values))}"
        timed = [run["seconds"] for run in same if run["seconds"] is not None]
        seconds = f"{statistics.mean(timed):.0f} s" if timed else "-"
        lines.append(f"{model:<20}{value:>18}{same[0]['parameters']:>13,}{seconds:>12}")
    return "\n".join(lines)


def _save(runs: list[dict[str, Any]], path: dict[str, float], metric: Metric, output: Path) -> None:
    """Write `results.json` and `results.png`: learning curves, and the metric from teacher to student."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    (output / "results.json").write_text(json.dumps({"runs": runs, "path": path}, indent=2) + "\n", encoding="utf-8")
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    colours: dict[str, str] = {}
    for run in runs:
        if run.get("curve"):
            label = None if run["model"] in colours else run["model"]
            colour = colours.setdefault(run["model"], f"C{len(colours)}")
            left.plot(*zip(*run["curve"], strict=True), marker=".", color=colour, label=label)
    left.axhline(runs[0][metric.name], color="grey", linestyle="--", label="teacher")
    left.set(xlabel="epoch", ylabel=metric.name, title="Learning curves")
    left.legend()
    right.plot(list(path), list(path.values()), marker="o", color=colours.get(METHODS["block_kd"]))
    for name, value in path.items():
        right.annotate(
            metric.show(value), (name, value), textcoords="offset points", xytext=(0, 8), ha="center", fontsize=9
        )
    right.margins(x=0.1, y=0.25)
    right.set(ylabel=metric.name, title="From teacher to student, by stepping stone")
    for axes in (left, right):
        axes.grid(alpha=0.3)
    figure.savefig(output / "results.png", dpi=130)
    plt.close(figure)


def use_all_cores() -> None:
    """On a CPU, share the cores out among the processes: `accelerate launch` gives each of them one thread."""
    state = PartialState()
    if state.device.type == "cpu":
        local = int(os.environ.get("LOCAL_WORLD_SIZE", state.num_processes))
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        torch.set_num_threads(max(1, cores // local))


def say(text: str) -> None:
    """Print once, not once a process."""
    if PartialState().is_main_process:
        print(text, flush=True)
