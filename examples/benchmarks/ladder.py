"""A ladder of models from one run: accuracy or perplexity, FLOPs, parameters and time of teacher, stones and student.

    python examples/benchmarks/ladder.py examples/benchmarks/recipes/cifar10.yaml --dataset FOLDER --teacher FOLDER \
        --train_teacher false --layers kl --objectives block_kd ladder --seeds 0 1 2

Every rung is saved by `save_stepping_stone`, loaded again, and judged on the test rows by the stock `Trainer`, as a
model of its own. FLOPs are those of an example, and time is that of a batch, relative to the teacher's. `hf-blockkd
report` draws the folder.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
import sys
from dataclasses import dataclass, field, make_dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from sweep import EXAMPLES, Run, SweepArguments, interval, read, split
from transformers import PreTrainedModel, Trainer, set_seed

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from arguments import ModelArguments, parse_arguments
from task import Task, new_student

from hf_blockkd import BlockwiseDistillConfig, BlockwiseDistillTrainer, load_stepping_stone
from hf_blockkd.connectors.attached import detached
from hf_blockkd.ladder.costs import model_costs


@dataclass
class LadderArguments(SweepArguments):
    """What a ladder adds to the arguments of a sweep."""

    objectives: list[str] = field(default_factory=lambda: ["block_kd", "ladder"], metadata={"help": "To compare."})


def main() -> None:
    path = Path(sys.argv.pop(1))
    recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
    example, data_arguments, defaults = EXAMPLES[recipe["example"]]
    arguments = make_dataclass("Arguments", [], bases=(LadderArguments, data_arguments))
    script, data, args = parse_arguments(path, arguments, ModelArguments, **defaults)
    results = Path(args.output_dir) / "ladder.jsonl"
    results.parent.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    args = dataclasses.replace(args, eval_strategy="no", save_strategy="no", disable_tqdm=True)
    task = example.load_task(script, data)
    teacher = task.auto_class.from_pretrained(script.teacher, trust_remote_code=False)
    train_rows = task.transfer(split(task.train_set, data)[1])
    for objective in data.objectives:
        for seed in script.seeds or [args.seed]:
            if any(run["objective"] == objective and run["seed"] == seed for run in read(results)):
                continue
            run_args = dataclasses.replace(args, seed=seed, objective=objective)
            lines = climb(script, task, teacher, train_rows, run_args, results.parent / f"{objective}-{seed}")
            with results.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps({"objective": objective, "seed": seed, **line}) + "\n" for line in lines)
    print(table(read(results), is_share=recipe["example"] != "lm"))


def climb(
    script: Any, task: Task, teacher: PreTrainedModel, rows: Any, args: BlockwiseDistillConfig, folder: Path
) -> list[Run]:
    """Train once, and measure every model between student and teacher."""
    arguments = task.arguments(rows)
    student = new_student(script, teacher, task.auto_class, arguments)
    set_seed(args.seed)
    trainer = BlockwiseDistillTrainer(model=student, teacher_model=teacher, args=args, **arguments)
    seconds = trainer.train().metrics["train_runtime"]
    rungs = {"student": student}
    for index in range(len(trainer.block_map), 0, -1):
        trainer.save_stepping_stone(index, folder / f"stone_{index}")
        rungs[f"stone {index}"] = load_stepping_stone(folder / f"stone_{index}")
    rungs["teacher"] = teacher
    batch = next(iter(trainer.get_eval_dataloader(arguments["eval_dataset"])))
    inputs = {name: value for name, value in batch.items() if name not in trainer.label_names}
    lines = []
    for name, model in rungs.items():
        judge = Trainer(model, args, eval_dataset=arguments["eval_dataset"], **task.trainer_arguments)
        value = task.metric.of(judge.evaluate(), "eval")
        lines.append({"rung": name, "seconds": round(seconds, 1), "test": value, "metric": task.metric.name})
        with detached(trainer.model):
            lines[-1] |= model_costs(model, inputs)
    return lines


def table(runs: list[Run], is_share: bool) -> str:
    lines = ["| objective | rung | test | FLOPs | parameters | time |", "| --- | --- | ---: | ---: | ---: | ---: |"]
    for objective, rung in dict.fromkeys((run["objective"], run["rung"]) for run in runs):
        same = [run for run in runs if (run["objective"], run["rung"]) == (objective, rung)]
        whole = [run for run in runs if (run["objective"], run["rung"]) == (objective, "teacher")]
        ratios = [
            statistics.median(run[key] for run in same) / statistics.median(run[key] for run in whole)
            for key in ("flops", "parameters", "time")
        ]
        test = interval([(100 if is_share else 1) * run["test"] for run in same])
        lines.append(f"| {objective} | {rung} | {test} | " + " | ".join(f"{ratio:.2f}" for ratio in ratios) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
