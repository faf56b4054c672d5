"""What the examples share: one recipe from YAML and flags, one loop over methods and seeds, one table, one picture."""

from __future__ import annotations

import argparse
import copy
import dataclasses
import difflib
import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import PartialState
from datasets import Dataset
from predictions import write_predictions
from results import TEACHER, Metric, Results, class_table, draw, table
from scores import Scores
from transformers import AutoConfig, HfArgumentParser, PreTrainedConfig, PreTrainedModel, Trainer, set_seed

from hf_blockkd import BlockwiseDistillConfig, BlockwiseDistillTrainer, make_student
from hf_blockkd.config import check_objective
from hf_blockkd.objectives import OBJECTIVES, make_objective
from hf_blockkd.pairing.pair import Pair
from hf_blockkd.plan.counting import quietly
from hf_blockkd.routing.layers import find_layer_stack
from hf_blockkd.students.config_changes import DEPTH_FIELDS
from hf_blockkd.students.config_parts import owners_of
from hf_blockkd.students.layer_scores import LAYER_CHOICES
from hf_blockkd.students.student import CHANNEL_CHOICES

METHODS = {"alone": "student alone", "kd": "student, plain KD", "block_kd": "student, Block-KD"}
"""The methods that are compared by default, and their names; all others go by that of their objective."""
TOGETHER = ({"student", "student_layers", "student_config"}, {"dataset", "dataset_config", "train_file"})
"""Fields that describe one thing: who sets one of them means none that the recipe sets of the others."""
BESIDE = ("output_dir", "resume", "disable_tqdm", "report_to", "log", "eval_st", "save_", "hub_", "push_", "run_name")
BESIDE += ("do_predict", "test_")
"""How names of fields begin that change nothing about what is trained."""

AS_TRAINED = "as_trained"
"""Folder, in that of a model, of the same model before it was finished."""


@dataclass
class ModelArguments:
    """The teacher, and the student."""

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
        if self.teacher is None and not self.train_teacher:
            raise ValueError("There is no teacher: name one with `--teacher`, or train one with `--train_teacher`.")
        for name in ("teacher_config", "student_config"):
            read_fields(name, getattr(self, name))
        for name, choices in (("layers", LAYER_CHOICES), ("channels", (None, *CHANNEL_CHOICES))):
            if getattr(self, name) not in choices:
                raise ValueError(f"`{name}` is {getattr(self, name)!r}; choose from {', '.join(map(str, choices))}.")


@dataclass
class ComparisonArguments(ModelArguments):
    """What to compare."""

    methods: list[str] = field(
        default_factory=lambda: list(METHODS),
        metadata={"help": f"Objectives to train a student with: {', '.join(OBJECTIVES)}, or sums."},
    )
    variants: str | None = field(
        default=None,
        metadata={
            "help": "JSON: more students by names of your own, each with the fields in which it differs from the "
            'recipe, e.g. {"no stones": {"stone_weight": 0}}.'
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        variants = self.named_variants()
        if not self.methods and not variants:
            raise ValueError(f"`methods` has no entry; choose from {', '.join(OBJECTIVES)}.")
        for method in self.methods:
            check_objective(method)
        fields = {one.name for one in dataclasses.fields(BlockwiseDistillConfig) if one.init}
        for name, changes in variants.items():
            if not isinstance(changes, dict):
                raise ValueError(f"`variants` has {changes!r} as {name!r}; give fields and values, in braces.")
            if name in {*METHODS, *self.methods} or Path(name).name != name:
                raise ValueError(f"`variants` has the name {name!r}, which is a method's or no name of a folder.")
            for own in changes:
                if own not in fields or own in ("output_dir", "seed"):
                    near = difflib.get_close_matches(own, sorted(fields), n=1)
                    advice = f"did you mean `{near[0]}`?" if near and near[0] != own else "give another."
                    raise ValueError(f"`variants` sets `{own}` of {name!r}, which no variant can; {advice}")

    def named_variants(self) -> dict[str, dict[str, Any]]:
        return read_fields("variants", self.variants)


def read_fields(argument: str, text: str | None, config: PreTrainedConfig | None = None) -> dict[str, Any]:
    """Fields and values that an argument holds as JSON.

    Args:
        argument: Its name.
        text: What it holds; `None` for no field.
        config: What the fields are to be set on.

    Raises:
        ValueError: If it is no JSON, or names no field of the config; the nearest is named.
    """
    try:
        fields = json.loads(text or "{}")
    except json.JSONDecodeError as error:
        raise ValueError(f'`{argument}` is {text!r}, which is no JSON ({error}); write {{"field": value}}.') from error
    if not isinstance(fields, dict):
        raise ValueError(f'`{argument}` is {text!r}, which holds no fields; write {{"field": value}}.')
    for name in fields if config is not None else ():
        try:
            owners_of(config, config, name)
        except ValueError as error:
            raise ValueError(f"`{argument}` cannot be set: {error}") from error
    return fields


def parse_arguments(
    script: str | Path, data_arguments: type, script_arguments: type = ComparisonArguments, **defaults: Any
) -> tuple[Any, ...]:
    """Read the recipe of an example, a YAML file of the person's own, and the command line; the later wins.

    Args:
        script: `__file__` of the example, beside which its recipe lies.
        data_arguments: Its dataclass of arguments about data.
        script_arguments: Its dataclass of arguments about models.
        **defaults: Defaults of the example that none of them sets.

    Returns:
        The script's arguments, those about data, and BlockwiseDistillConfig.

    Raises:
        ValueError: If a file holds no recipe, or a name that is no field.
    """
    flags = sys.argv[1:]
    if flags and flags[0].endswith((".yaml", ".yml")):
        flags.insert(0, "--config")
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--config")
    recipe, config = Path(script).with_suffix(".yaml"), first.parse_known_args(flags)[0].config
    parser = HfArgumentParser((script_arguments, data_arguments, BlockwiseDistillConfig))
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
        test_set: Rows whose classes are predicted by every student.
        transfer: Makes of labelled rows those that students train on.
        finish: Makes of the folder of a trained model what is to stay of it.
        teacher_metrics: What the teacher has, where that needs no evaluation: it is the measure itself.
    """

    teacher: PreTrainedModel
    auto_class: type
    train_set: Dataset
    eval_set: Dataset
    metric: Metric
    trainer_arguments: dict[str, Any]
    as_train: Callable[[Dataset], Any] = _same
    as_eval: Callable[[Dataset], Any] = _same
    test_set: Dataset | None = None
    transfer: Callable[[Dataset], Dataset] = _same
    finish: Callable[[Path], None] | None = None
    teacher_metrics: dict[str, float] | None = None

    def load(self, folder: Path) -> PreTrainedModel:
        """A model that was trained, as it was when it was saved."""
        place = folder / AS_TRAINED
        return self.auto_class.from_pretrained(place if place.is_dir() else folder, trust_remote_code=False)

    def arguments(self, train_set: Dataset | None = None, eval_set: Dataset | None = None) -> dict[str, Any]:
        """Arguments about data for a trainer; by default, those of all rows."""
        return {
            "train_dataset": self.as_train(self.train_set if train_set is None else train_set),
            "eval_dataset": self.as_eval(self.eval_set if eval_set is None else eval_set),
            **self.trainer_arguments,
        }


def load_teacher(script: ModelArguments, auto_class: type, **fields: Any) -> PreTrainedModel:
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
    script: ModelArguments, teacher: PreTrainedModel, auto_class: type, data: dict[str, Any]
) -> PreTrainedModel:
    """The student: loaded, cut out of the teacher, or new, with the teacher's classes."""
    if script.student is not None:
        config = AutoConfig.from_pretrained(script.student, trust_remote_code=False)
        overrides = read_fields("student_config", script.student_config, config)
        classes = {"id2label": teacher.config.id2label, "label2id": teacher.config.label2id}
        return auto_class.from_pretrained(
            script.student, ignore_mismatched_sizes=True, trust_remote_code=False, **classes, **overrides
        )
    # Of a cut, `make_student` knows which part of the config a field belongs to.
    overrides = read_fields("student_config", script.student_config, teacher.config if script.fresh else None)
    depth_field = next((name for name in DEPTH_FIELDS if name in overrides), None)
    if script.student_layers is not None and depth_field is not None:
        raise ValueError(
            f"`student_layers` is {script.student_layers} and `{depth_field}` in `student_config` "
            f"{overrides[depth_field]}; give one of them."
        )
    if script.fresh:
        if script.student_layers is not None:
            depth = len(find_layer_stack(teacher))
            field = next(name for name in DEPTH_FIELDS if getattr(teacher.config, name, None) == depth)
            overrides[field] = script.student_layers
        config = AutoConfig.for_model(**{**teacher.config.to_dict(), **overrides})
        return auto_class.from_config(config, dtype=teacher.dtype, trust_remote_code=False)
    return make_student(
        teacher,
        num_layers=overrides.pop(depth_field, script.student_layers),
        layers=script.layers,
        channels=script.channels,
        fit=script.fit,
        data=data["train_dataset"],
        data_collator=data.get("data_collator"),
        **overrides,
    )


def check_pairs(script: ModelArguments, task: Task, runs: list[tuple[str, BlockwiseDistillConfig]]) -> None:
    """Build the student and every pair once, before anything trains, and say how the models are cut into blocks.

    Raises:
        ValueError: If a description of the student, or what a run wants of the pair, does not fit.
    """
    # A cut of the same sizes, which needs no data and no trained weights.
    rough = dataclasses.replace(script, layers="even", channels="random", fit=False)
    teacher = copy.deepcopy(task.teacher)
    with quietly():
        student = new_student(rough, teacher, task.auto_class, {"train_dataset": None})
    processing = task.trainer_arguments.get("processing_class")
    say(f"\nThe teacher has {teacher.num_parameters():,} parameters, the student {student.num_parameters():,}.")
    maps = set()
    for args in dict(runs).values():  # of one seed
        pair = Pair(student, teacher, processing, needs_paths=make_objective(args).needs_paths, **args.pairing)
        maps.add(str(pair.block_map))
    say("\n\n".join(sorted(maps)))


def train_teacher(
    script: ModelArguments, args: BlockwiseDistillConfig, teacher: PreTrainedModel, data: dict[str, Any]
) -> float:
    """Train the teacher into `output_dir/teacher`; seconds it took."""
    say("\n== teacher")
    teacher_args = dataclasses.replace(
        args,
        output_dir=str(Path(args.output_dir) / TEACHER),
        num_train_epochs=script.teacher_epochs,
        learning_rate=script.teacher_learning_rate,
        max_steps=-1,
    )
    trainer = Trainer(model=teacher, args=teacher_args, **data)
    seconds = trainer.train().metrics["train_runtime"]
    trainer.save_model()
    return seconds


def compare(script: ComparisonArguments, data: Any, args: BlockwiseDistillConfig, task: Task) -> None:
    """Train the teacher if asked, then the student with each method and seed; print and save what came out.

    What an earlier call with the same `output_dir` has finished is not repeated, and what it has begun goes on from its
    last checkpoint.

    Args:
        script: What to compare.
        data: Arguments about data.
        args: The recipe of every student.
        task: Models and data.

    Raises:
        ValueError: Before anything is trained, if the earlier call had other settings, or models do not fit.
    """
    use_all_cores()
    output, metric = Path(args.output_dir), task.metric
    if args.do_predict and task.test_set is None:
        raise ValueError(
            "`do_predict` is True, but no rows to predict are named; classifiers take `--test_file` or `--test_split`."
        )
    runs = _runs(script, args)
    results = Results(output, _settings(script, data, args), script.named_variants())
    check_pairs(script, task, runs)
    results.begin()
    if not results.has(TEACHER, None):
        seconds = train_teacher(script, args, task.teacher, task.arguments()) if script.train_teacher else None
        if seconds is not None and task.finish is not None and args.should_save:
            task.finish(output / TEACHER)
        found = task.teacher_metrics
        if found is None:
            found = _make_evaluator(task.teacher, output / TEACHER, args, task.arguments()).evaluate()
        results.add(_result(TEACHER, None, task.teacher, seconds, task, found))
    elif script.train_teacher:
        task.teacher = task.load(output / TEACHER)
    for model, run_args in runs:
        if results.has(model, run_args.seed):
            say(f"\n== {model}, seed {run_args.seed}: is finished")
        else:
            say(f"\n== {model}, seed {run_args.seed}")
            results.add(_train(script, task, model, run_args, results.is_repeated))
        if task.test_set is not None:
            _predict(task, run_args)
    if PartialState().is_main_process:
        draw(results.runs, metric, output / "results.png")
        folder = runs[-1][1].output_dir
        print(f"\n{table(results.runs, metric)}\n{class_table(results.runs)}")
        print(f"Picture: {output / 'results.png'}   figures: {output / 'results.jsonl'}   student: {folder}")
        print(f'Load it with: {task.auto_class.__name__}.from_pretrained("{folder}")')


def _runs(script: ComparisonArguments, args: BlockwiseDistillConfig) -> list[tuple[str, BlockwiseDistillConfig]]:
    """Every student's name and configuration, seed by seed."""
    named = {method: {"objective": method} for method in script.methods} | script.named_variants()
    runs = []
    for seed in script.seeds or [args.seed]:
        for name, changes in named.items():
            folder = Path(args.output_dir) / name
            own = {"seed": seed, "output_dir": str(folder / f"seed_{seed}" if script.seeds else folder)}
            objective = changes.get("objective", args.objective)
            if objective != "block_kd":
                own["cross_weight"] = 0.0
            own |= changes
            run_args = dataclasses.replace(args, **own)
            needs = make_objective(run_args)
            if not needs.needs_teacher or needs.needs_teacher_states:
                run_args = dataclasses.replace(run_args, teacher_cache=None)
            runs.append((METHODS.get(name, f"student, {name}"), run_args))
    return runs


def _settings(script: ComparisonArguments, data: Any, args: BlockwiseDistillConfig) -> dict[str, Any]:
    """What makes the figures of a run; not how it is logged, evaluated and saved."""
    values = {**dataclasses.asdict(script), **dataclasses.asdict(data), **args.to_dict()}
    beside = {"config", "methods", "variants", "seeds"} | ({"seed"} if script.seeds else set())
    return {name: value for name, value in values.items() if name not in beside and not name.startswith(BESIDE)}


def _train(
    script: ModelArguments, task: Task, model: str, args: BlockwiseDistillConfig, is_repeated: bool
) -> dict[str, Any]:
    """Train and save a student; its line of the results."""
    set_seed(args.seed)
    arguments, folder = task.arguments(task.transfer(task.train_set)), Path(args.output_dir)
    student = new_student(script, task.teacher, task.auto_class, arguments)
    trainer = BlockwiseDistillTrainer(model=student, teacher_model=task.teacher, args=args, **arguments)
    resume = (args.resume_from_checkpoint or is_repeated) and any(folder.glob("checkpoint-*"))
    seconds = trainer.train(resume_from_checkpoint=resume).metrics["train_runtime"]
    trainer.save_model()
    if task.finish is not None and args.should_save:
        task.finish(folder)
    log = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    # A run that went on does not know the seconds before.
    run = _result(model, args.seed, student, None if resume else seconds, task, trainer.evaluate())
    run["curve"] = [(entry["epoch"], task.metric.of(entry, "eval")) for entry in log]
    if model == METHODS["block_kd"]:
        run["path"] = _path(trainer, task.metric, run[task.metric.name])
    trainer.save_state()  # for `hf-blockkd report`
    return run


def _result(
    model: str, seed: int | None, trained: PreTrainedModel, seconds: float | None, task: Task, found: dict[str, float]
) -> dict[str, Any]:
    value, parameters = task.metric.of(found, "eval"), trained.num_parameters()
    run = {"model": model, "seed": seed, task.metric.name: value, "parameters": parameters, "seconds": seconds}
    scores = task.trainer_arguments.get("compute_metrics")
    return run | ({"f1": found["eval_f1"], "classes": scores.classes} if isinstance(scores, Scores) else {})


def _predict(task: Task, args: BlockwiseDistillConfig) -> None:
    """Write what a saved student says of the rows to predict."""
    folder = Path(args.output_dir)
    if make_objective(args).deploys_last_stone:
        say(f"{folder} predicts nothing: objective={args.objective!r} trains no head of the student's.")
        return
    student = task.load(folder)
    evaluator = _make_evaluator(student, folder, args, task.arguments())
    logits = torch.as_tensor(evaluator.predict(task.as_eval(task.test_set)).predictions)
    if PartialState().is_main_process:
        say(f"Predictions: {write_predictions(folder, task.test_set, logits, student.config.id2label)}")


def _make_evaluator(
    model: PreTrainedModel, folder: Path, args: BlockwiseDistillConfig, data: dict[str, Any]
) -> Trainer:
    return Trainer(model=model, args=dataclasses.replace(args, output_dir=str(folder)), **data)


def _path(trainer: BlockwiseDistillTrainer, metric: Metric, student: float) -> dict[str, float]:
    """The metric of teacher, stones and student."""
    stones = trainer.evaluate_stepping_stones()
    return {
        "teacher": metric.of(stones, "eval_teacher"),
        **{f"N_{i}": metric.of(stones, f"eval_stone_{i}") for i in trainer.pair.trained_stones},
        "student": student,
    }


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
