"""What a cut language model learns from the texts of others, and from those that it writes itself (`lmbda`).

    python examples/benchmarks/on_policy.py MODEL --text austen.txt --eval_lines 39444 47772 --num_layers 15

Every student goes on from the same cut with the same prompts: the first half of each block of text. At the share
`lmbda` of its steps it completes them itself, at the others it reads the second half; the teacher is all that it learns
from. Prints, of each share, the perplexity on held-out text, what the student writes after held-out prompts in the
teacher's eyes: the mean log probability of a token, and the KL divergence of the student from the teacher on the way.
Everything is drawn at temperature 1. Every figure is a line of `results.jsonl` in the output folder.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from pathlib import Path

import torch
from datasets import Dataset
from layer_choice import add_options, load, perplexity
from torch.nn import functional as F
from transformers import GenerationConfig, PreTrainedModel, set_seed

from hf_blockkd import BlockwiseDistillConfig, BlockwiseDistillTrainer, make_student
from hf_blockkd.losses.rows import IGNORED


def with_prompts(blocks: Dataset) -> Dataset:
    """Blocks of text whose first half is a prompt, without labels."""

    def hide(rows: dict[str, list]) -> dict[str, list]:
        half = len(rows["labels"][0]) // 2
        return {"labels": [[IGNORED] * half + labels[half:] for labels in rows["labels"]]}

    return blocks.map(hide, batched=True)


def train(
    student: PreTrainedModel, teacher: PreTrainedModel, rows: Dataset, lmbda: float, seed: int, args: argparse.Namespace
) -> PreTrainedModel:
    """A copy of a student, trained for some steps."""
    set_seed(seed)
    student = copy.deepcopy(student)
    config = BlockwiseDistillConfig(
        output_dir=args.output_dir,
        objective="kd",
        num_blocks=1,
        task_weight=0.0,
        temperature=1.0,
        divergence="jsd",
        beta=args.beta,
        lmbda=lmbda,
        max_new_tokens=args.block_size - args.block_size // 2,
        max_steps=args.max_steps,
        per_device_train_batch_size=args.batch_size,
        learning_rate=args.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=args.max_steps // 10,
        seed=seed,
        use_cpu=not torch.cuda.is_available(),
        logging_steps=args.max_steps,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    BlockwiseDistillTrainer(model=student, teacher_model=teacher, args=config, train_dataset=rows).train()
    return student.eval()


@torch.no_grad()
def judge(student: PreTrainedModel, teacher: PreTrainedModel, held_out: Dataset) -> dict[str, float]:
    """Perplexity on text, and what the teacher says of the student's own (the same draws for each student)."""
    blocks = torch.tensor(held_out["input_ids"][:], device=student.device)
    half = blocks.shape[1] // 2
    set_seed(0)
    texts = student.generate(
        input_ids=blocks[:, :half],
        attention_mask=torch.ones_like(blocks[:, :half]),
        min_new_tokens=blocks.shape[1] - half,
        max_new_tokens=blocks.shape[1] - half,
    )
    logs = [F.log_softmax(model(input_ids=texts).logits[:, half - 1 : -1].float(), -1) for model in (student, teacher)]
    of_student, of_teacher = logs
    return {
        "perplexity": perplexity(student, held_out),
        "teacher_log_probability": of_teacher.gather(-1, texts[:, half:, None]).mean().item(),
        "kl_from_teacher": (of_student.exp() * (of_student - of_teacher)).sum(-1).mean().item(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser)
    parser.add_argument("--layers", default="influence", help="How the layers of the cut are chosen.")
    parser.add_argument("--fit_examples", type=int, default=64, help="Examples to cut on and to fit to.")
    parser.add_argument("--lmbda", type=float, nargs="+", default=[0.0, 0.5, 1.0], help="Shares of on-policy steps.")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--beta", type=float, default=0.5, help="Of the generalised Jensen-Shannon divergence.")
    parser.add_argument("--max_steps", type=int, default=30)
    parser.add_argument("--batch_size", type=int, default=8, help="Prompts in a step.")
    parser.add_argument("--learning_rate", type=float, default=5e-4)
    parser.add_argument("--output_dir", default="outputs/on_policy")
    args = parser.parse_args()
    output = Path(args.output_dir) / "results.jsonl"
    output.parent.mkdir(parents=True, exist_ok=True)
    teacher, text, held_out = load(args)
    eos = teacher.config.eos_token_id
    drawn = GenerationConfig(do_sample=True, temperature=1.0, top_k=0, top_p=1.0, eos_token_id=eos, pad_token_id=eos)
    teacher.generation_config = drawn
    print("| student | lmbda | seed | perplexity | teacher's log probability | KL from the teacher | seconds |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: |", flush=True)

    def measure(name: str, model: PreTrainedModel, seconds: float, lmbda: float | None, seed: int | None) -> None:
        line = {"student": name, "lmbda": lmbda, "seed": seed, **judge(model, teacher, held_out)}
        line |= {"seconds": round(seconds)}
        names = ("max_steps", "batch_size", "block_size", "learning_rate", "beta", "layers", "fit_examples")
        with output.open("a") as file:
            file.write(json.dumps(line | {name: getattr(args, name) for name in names}) + "\n")
        cells = (
            "" if value is None else f"{value:.3f}" if isinstance(value, float) else value for value in line.values()
        )
        print(f"| {' | '.join(map(str, cells))} |", flush=True)

    measure("the teacher", teacher, 0.0, None, None)
    rows = with_prompts(text)
    for depth in args.num_layers:
        start = time.perf_counter()
        few = text.shuffle(seed=0).select(range(min(args.fit_examples, len(text))))
        student = make_student(teacher, num_layers=depth, layers=args.layers, data=few)
        student.generation_config = drawn
        measure(f"{depth} layers", student, time.perf_counter() - start, None, None)
        for seed in args.seeds:
            for lmbda in args.lmbda:
                start = time.perf_counter()
                trained = train(student, teacher, rows, lmbda, seed, args)
                measure(f"{depth} layers", trained, time.perf_counter() - start, lmbda, seed)


if __name__ == "__main__":
    main()
