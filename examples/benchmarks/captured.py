"""A teacher that has only left a table of its likeliest tokens, next to the teacher itself: plain distillation by both.

    python examples/benchmarks/captured.py examples/benchmarks/recipes/novels.yaml --train_file austen.txt \
        --eval_lines 39444 47772 --train_teacher false --teacher TEACHER --seeds 0 1

Every run trains the same student on the same rows at the same rate, for as many steps. The table of a `k` holds what a
server would write: of every token but the first, the ids of its k likeliest in the teacher's eyes, and their log
probabilities. It is written once and read from disk; training by it neither has nor runs the teacher. Every run is a
line of `captured.jsonl` in the output folder, with what the table takes on disk and the time of a step; `cpu` counts
the process's own, which what else a machine does changes less than the clock.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
import json
import sys
import time
from dataclasses import dataclass, field, make_dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from datasets import Dataset, Features, List, Value, load_from_disk
from sweep import TEACHER, UNTRAINED, Run, SweepArguments, distill_lm, read, score, split, train
from transformers import PreTrainedModel, set_seed

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from arguments import ModelArguments, parse_arguments
from lm_data import LMDataArguments
from methods import Method
from task import new_student

from hf_blockkd import BlockwiseDistillTrainer

IDS, LOG_PROBS = "token_ids", "log_probs"


@dataclass
class CapturedArguments(SweepArguments):
    k: list[int] = field(default_factory=lambda: [8, 64], metadata={"help": "Likeliest tokens that tables hold."})


def capture(teacher: PreTrainedModel, rows: Dataset, k: int, folder: Path) -> Dataset:
    """The rows with what a server would have written of the teacher, kept in a folder and read from there."""
    if not folder.exists():
        numbers = {name: List(List(Value(kind))) for name, kind in ((IDS, "int32"), (LOG_PROBS, "float32"))}

        @torch.no_grad()
        def ask(batch: dict[str, list]) -> dict[str, torch.Tensor]:
            texts = torch.tensor(batch["input_ids"], device=teacher.device)
            likeliest = teacher(input_ids=texts).logits[:, :-1].float().log_softmax(-1).topk(k)
            return {IDS: likeliest.indices, LOG_PROBS: likeliest.values}

        asked = rows.map(ask, batched=True, batch_size=32, features=Features({**rows.features, **numbers}))
        asked.save_to_disk(folder)
    return load_from_disk(folder)


def main() -> None:
    path = Path(sys.argv.pop(1))
    if yaml.safe_load(path.read_text(encoding="utf-8"))["example"] != "lm":
        raise SystemExit(f"{path} is no recipe of a language model, whose tokens alone can be captured.")
    arguments = make_dataclass("Arguments", [], bases=(CapturedArguments, LMDataArguments))
    script, data, args = parse_arguments(path, arguments, ModelArguments, prediction_loss_only=True)
    torch.set_num_threads(1)
    args = dataclasses.replace(args, eval_strategy="no", save_strategy="no", disable_tqdm=True)
    task, results = distill_lm.load_task(script, data), Path(args.output_dir) / "captured.jsonl"
    _, rows, _ = split(task.train_set, data)
    teacher, own = task.teacher.eval(), task.arguments(rows)
    cut = None if script.fresh else new_student(script, teacher, task.auto_class, own)

    def student() -> PreTrainedModel:
        return new_student(script, teacher, task.auto_class, own) if cut is None else copy.deepcopy(cut)

    def is_new(run: Run) -> bool:
        return not any(run.items() <= other.items() for other in read(results))

    def record(run: Run, trainer: BlockwiseDistillTrainer) -> None:
        run |= {"test": score(trainer, task.metric, task.eval_set)}
        results.parent.mkdir(parents=True, exist_ok=True)
        with results.open("a", encoding="utf-8") as file:
            file.write(json.dumps(run) + "\n")
        print(json.dumps(run), flush=True)

    start = "fresh" if script.fresh else "cut"
    for name, model in [(TEACHER, copy.deepcopy(teacher)), *([] if cut is None else [(UNTRAINED, student())])]:
        run = {"method": name, "start": start}
        if is_new(run):
            record(run, BlockwiseDistillTrainer(model=model, teacher_model=student(), args=args, **own))
    by_table = {"objective": "kd", "captured_columns": [IDS, LOG_PROBS]}
    runs: dict[str, tuple[dict[str, Any], PreTrainedModel | None, Dataset]] = {
        "alone": ({"objective": "alone"}, teacher, rows),
        "KD": ({"objective": "kd"}, teacher, rows),
    }
    for k in data.k:
        runs[f"KD, the {k} likeliest"] = by_table, None, capture(teacher, rows, k, results.parent / f"table_{k}")
    for seed, name in itertools.product(script.seeds or [args.seed], data.names or runs):
        run = {"method": name, "start": start, "seed": seed, "learning_rate": args.learning_rate}
        if not is_new(run):
            continue
        settings, of_run, table = runs[name]
        set_seed(seed)
        model, begin = student(), time.process_time()
        trainer, seconds = train(
            Method(settings), model, dataclasses.replace(args, seed=seed), of_run, task.arguments(table)
        )
        run |= {"steps": trainer.state.global_step, "seconds": round(seconds, 1)}
        run |= {"cpu": round(time.process_time() - begin, 1)}
        if of_run is None:
            run["table_mb"] = round(sum(Path(one["filename"]).stat().st_size for one in table.cache_files) / 1e6, 1)
        record(run, trainer)


if __name__ == "__main__":
    main()
