"""What students cut out of a language model are worth before any training, and after a short healing.

    python examples/benchmarks/heal.py MODEL --text austen.txt --eval_lines 39444 47772 --num_layers 20 15 \
        --hidden_size 384 --max_steps 30 --output_dir outputs/heal

Of each depth, copies of even layers, and of the layers whose absence changes the logits least, as they are and fitted;
of the width, the channels of the largest activations, as they are and fitted. All are healed with the same rows and
steps, by what `--healings` names. Prints the perplexity on the first held-out tokens; every figure is a line of
`results.jsonl` in the output folder, and is not measured again.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from layer_choice import add_options, load, perplexity
from transformers import PreTrainedModel, set_seed

from hf_blockkd import BlockwiseDistillConfig, BlockwiseDistillTrainer, find_layer_stack, make_student
from hf_blockkd.data.calibration import batches_for
from hf_blockkd.students.layer_scores import drop_order

HEALINGS: dict[str, dict[str, Any]] = {
    "KD": {"objective": "kd"},
    "the default": {},
    "the last two stones": {"stepping_stones": "last_two"},
}
"""What heals a student -> the settings that differ from the default."""
UNTRAINED = "before training"


def students(
    teacher: PreTrainedModel, train: Dataset, args: argparse.Namespace
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Name, and how it is cut."""
    stack = find_layer_stack(teacher)
    order = args.dropped
    if order is None:
        batches = list(batches_for(teacher, train, num_examples=args.num_examples))
        with torch.autocast(teacher.device.type, torch.bfloat16, enabled=args.bf16):
            order = drop_order(teacher, stack, batches, len(stack) - min(args.num_layers))
    for depth in args.num_layers:
        layers = sorted(set(range(len(stack))) - set(order[: len(stack) - depth]))
        yield f"{depth} layers, even, not fitted", {"num_layers": depth, "fit": False}
        yield f"{depth} layers, by KL, not fitted", {"layers": layers, "fit": False}
        yield f"{depth} layers, by KL, fitted", {"layers": layers}
    if args.hidden_size is not None:
        for fit in (False, True):
            how = "fitted" if fit else "not fitted"
            yield f"width {args.hidden_size}, {how}", {"hidden_size": args.hidden_size, "fit": fit}


def heal(
    student: PreTrainedModel, teacher: PreTrainedModel, train: Dataset, args: argparse.Namespace, **settings: Any
) -> PreTrainedModel:
    """A copy of a student, trained for some steps."""
    set_seed(0)
    student = copy.deepcopy(student)
    config = BlockwiseDistillConfig(
        output_dir=args.output_dir,
        max_steps=args.max_steps,
        per_device_train_batch_size=args.batch_size,
        learning_rate=args.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=args.max_steps // 10,
        temperature=1.0,
        bf16=args.bf16,
        use_cpu=not torch.cuda.is_available(),
        logging_steps=10,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        **settings,
    )
    BlockwiseDistillTrainer(model=student, teacher_model=teacher, args=config, train_dataset=train).train()
    return student.eval()


def table(found: dict[tuple[str, str], dict[str, Any]]) -> str:
    """Perplexities, a line for each student."""
    columns = [column for column in (UNTRAINED, *HEALINGS) if any(column == healing for _, healing in found)]
    lines = [f"| student | {' | '.join(columns)} |", f"| --- |{' ---: |' * len(columns)}"]
    for name in dict.fromkeys(name for name, _ in found):
        values = (found[name, column]["perplexity"] if (name, column) in found else None for column in columns)
        cells = ["" if value is None else f"{value:,.1f}" for value in values]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser)
    parser.add_argument("--hidden_size", type=int, help="Width of one more student, of all layers.")
    parser.add_argument("--num_examples", type=int, default=8, help="Examples to choose layers on.")
    parser.add_argument("--dropped", type=int, nargs="+", help="Layers as they go one by one; default: by KL.")
    parser.add_argument("--fit_examples", type=int, help="Examples to fit to; default: as many as make_student takes.")
    parser.add_argument("--max_steps", type=int, default=30, help="Steps of healing.")
    parser.add_argument("--healings", nargs="*", choices=list(HEALINGS), default=["KD", "the default"])
    parser.add_argument("--batch_size", type=int, default=8, help="Examples in a step.")
    parser.add_argument("--learning_rate", type=float, default=5e-4)
    parser.add_argument("--bf16", action="store_true", help="Choose layers, fit, heal and measure in mixed precision.")
    parser.add_argument("--output_dir", default="outputs/heal")
    args = parser.parse_args()
    output = Path(args.output_dir) / "results.jsonl"
    output.parent.mkdir(parents=True, exist_ok=True)
    names = ("max_steps", "batch_size", "block_size", "learning_rate", "fit_examples", "bf16")
    settings = {name: getattr(args, name) for name in names}
    lines = [json.loads(line) for line in output.read_text().splitlines()] if output.exists() else []
    found = {(line["student"], line["healing"]): line for line in lines if settings.items() <= line.items()}
    teacher, train, held_out = load(args)
    fitted = train if args.fit_examples is None else train.shuffle(seed=0).select(range(args.fit_examples))

    def measure(name: str, healing: str, model: PreTrainedModel, seconds: float) -> None:
        with torch.autocast(model.device.type, torch.bfloat16, enabled=args.bf16):
            value = perplexity(model, held_out)
        line = {"student": name, "healing": healing, "perplexity": value, "seconds": round(seconds)}
        line |= {"parameters": model.num_parameters(), "layers": len(find_layer_stack(model))}
        found[name, healing] = line | settings
        with output.open("a") as file:
            file.write(json.dumps(line | settings) + "\n")
        print(line, flush=True)

    if ("the whole model", UNTRAINED) not in found:
        measure("the whole model", UNTRAINED, teacher, 0.0)
    cuts, made = list(students(teacher, train, args)), {}
    for column in (UNTRAINED, *args.healings):
        for name, cut in cuts:
            if (name, column) in found:
                continue
            start = time.perf_counter()
            if name not in made:
                with torch.autocast(teacher.device.type, torch.bfloat16, enabled=args.bf16):
                    made[name] = make_student(teacher, data=fitted, **cut)
            own = HEALINGS.get(column)
            model = made[name] if own is None else heal(made[name], teacher, train, args, **own)
            measure(name, column, model, time.perf_counter() - start)
    print(table(found))


if __name__ == "__main__":
    main()
