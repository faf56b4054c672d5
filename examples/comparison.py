"""The examples' comparison: one loop over methods and seeds, one table, one picture."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from arguments import METHODS, ComparisonArguments, ModelArguments
from launching import say, use_all_cores
from predictions import write_predictions
from results import TEACHER, Metric, Results, class_table, draw, table
from scores import Scores
from task import Task, new_student
from transformers import PreTrainedModel, Trainer, set_seed

from hf_blockkd import BlockwiseDistillConfig, BlockwiseDistillTrainer
from hf_blockkd.objectives import make_objective
from hf_blockkd.pairing.pair import Pair
from hf_blockkd.plan.counting import quietly
from hf_blockkd.students.choices import LAYER_CHOICES

BESIDE = ("output_dir", "resume", "disable_tqdm", "report_to", "log", "eval_st", "save_", "hub_", "push_", "run_name")
BESIDE += ("do_predict", "test_")
"""How names of fields begin that change nothing about what is trained."""


def check_pairs(script: ModelArguments, task: Task, runs: list[tuple[str, BlockwiseDistillConfig]]) -> None:
    """Build the student and every pair once, before anything trains, and say how the models are cut into blocks.

    Raises:
        ValueError: If a description of the student, or what a run wants of the pair, does not fit.
    """
    # A cut of the same sizes, which needs no data and no trained weights.
    layers = "even" if script.layers in LAYER_CHOICES else script.layers
    rough = dataclasses.replace(script, layers=layers, channels="random", fit=False)
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
    if args.objective == "ladder":
        for i in trainer.objective.stones(trainer.pair):
            trainer.save_stepping_stone(i, folder / f"stone_{i}")
    if task.finish is not None and args.should_save:
        task.finish(folder)
    log = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    # A run that went on does not know the seconds before.
    run = _result(model, args.seed, student, None if resume else seconds, task, trainer.evaluate())
    run["curve"] = [(entry["epoch"], task.metric.of(entry, "eval")) for entry in log]
    if args.objective == "ladder":
        trainer.evaluate_ladder()
    if model == METHODS["block_kd"]:
        run["path"] = _path(trainer, task.metric, run[task.metric.name])
        trainer.evaluate_blocks()
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
