"""What students are worth as drafts of their teacher: speculative decoding by transformers' assisted generation.

    python examples/benchmarks/speculation.py TEACHER STUDENT [STUDENT ...] --text austen.txt --eval_lines 39444 47772

Over all held-out positions, how often the teacher would take a student's token: drawn at temperature 1, where that is
the mass that both distributions share (Leviathan et al., 2023, arXiv 2211.17192, theorem 3.5), and greedily. Then
tokens per second of the teacher alone and with each draft, greedily, which give the same text; all take turns in every
round.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from lm_data import LMDataArguments, load_lines, pack


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("teacher", help="Name or folder of a causal language model, with its tokenizer.")
    parser.add_argument("students", nargs="+", help="Folders of students with the same vocabulary.")
    parser.add_argument("--text", required=True, help="A text file.")
    parser.add_argument("--eval_lines", type=int, nargs=2, required=True, help="First and last line to measure on.")
    parser.add_argument("--block_size", type=int, default=128, help="Tokens in an example.")
    parser.add_argument("--blocks", type=int, default=64, help="Examples to measure acceptance on.")
    parser.add_argument("--prompts", type=int, default=8, help="Texts to go on from, of half an example each.")
    parser.add_argument("--draft_tokens", type=int, default=4, help="Tokens that a student drafts at a time.")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/speculation"))
    args = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(args.teacher, trust_remote_code=False)
    _, lines = load_lines(LMDataArguments(dataset=args.text, eval_lines=args.eval_lines))
    blocks = torch.tensor(pack(lines, tokenizer, args.block_size)["input_ids"][: args.blocks])
    teacher = load(args.teacher)
    students = {name: load(name) for name in args.students}
    found = {name: acceptance(teacher, student, blocks) for name, student in students.items()}
    speeds = tokens_per_second(teacher, students, blocks[: args.prompts, : args.block_size // 2], args)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    alone = speeds.pop(None)
    print(f"The teacher alone: {statistics.median(alone):.0f} tokens a second.\n")
    print("| draft | accepted, drawn, % | accepted, greedy, % | tokens a second, to the teacher alone |")
    print("| --- | ---: | ---: | ---: |")
    with (args.output_dir / "results.jsonl").open("a", encoding="utf-8") as file:
        for name, (drawn, greedy) in found.items():
            ratios = sorted(one / other for one, other in zip(speeds[name], alone, strict=True))
            line = {"draft": name, "drawn": drawn, "greedy": greedy, "speed": statistics.median(ratios)}
            line |= {"lowest": ratios[0], "highest": ratios[-1], "draft_tokens": args.draft_tokens}
            file.write(json.dumps(line) + "\n")
            spread = f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"
            print(f"| {name} | {100 * drawn:.1f} | {100 * greedy:.1f} | {spread} |")


def load(name: str) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(name, trust_remote_code=False).eval()


@torch.no_grad()
def acceptance(teacher: PreTrainedModel, student: PreTrainedModel, blocks: torch.Tensor) -> tuple[float, float]:
    """How often the teacher takes the student's next token: drawn from its distribution, and its likeliest one."""
    drawn, greedy = [], []
    for batch in blocks.split(8):
        theirs, ours = (model(batch).logits.float() for model in (teacher, student))
        drawn.append(torch.minimum(theirs.softmax(-1), ours.softmax(-1)).sum(-1).mean().item())
        greedy.append((theirs.argmax(-1) == ours.argmax(-1)).float().mean().item())
    return statistics.mean(drawn), statistics.mean(greedy)


def tokens_per_second(
    teacher: PreTrainedModel, students: dict[str, PreTrainedModel], prompts: torch.Tensor, args: argparse.Namespace
) -> dict[str | None, list[float]]:
    """Draft, `None` for the teacher alone -> tokens per second in every round.

    Raises:
        RuntimeError: If a draft changes the text.
    """
    for student in students.values():
        student.generation_config.num_assistant_tokens = args.draft_tokens
        student.generation_config.num_assistant_tokens_schedule = "constant"
        student.generation_config.assistant_confidence_threshold = 0.0
    length = prompts.shape[1]
    options = {"do_sample": False, "min_new_tokens": length, "max_new_tokens": length, "pad_token_id": 0}
    texts: dict[int, torch.Tensor] = {}
    speeds: dict[str | None, list[float]] = {None: [], **{name: [] for name in students}}
    for _ in range(args.rounds + 1):  # the first to warm up
        for name in speeds:
            start, written = time.perf_counter(), 0
            for index, prompt in enumerate(prompts):
                draft = {} if name is None else {"assistant_model": students[name]}
                text = teacher.generate(prompt[None], attention_mask=torch.ones_like(prompt[None]), **options, **draft)
                written += text.shape[1] - length
                if not torch.equal(texts.setdefault(index, text), text):
                    raise RuntimeError(f"With {name!r} as its draft the teacher writes another text; report this.")
            speeds[name].append(written / (time.perf_counter() - start))
    return {name: values[1:] for name, values in speeds.items()}


if __name__ == "__main__":
    main()
