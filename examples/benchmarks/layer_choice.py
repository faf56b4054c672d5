"""What a language model loses with some of its layers, by how those are chosen, before any training.

    python examples/benchmarks/layer_choice.py MODEL --text austen.txt --eval_lines 39444 47772 --num_layers 20 15

Prints a table in markdown: the perplexity on the first held-out tokens of what `make_student` makes, the layers that
went, and the seconds of the choice. A model in a GGUF file is named by its folder and `--gguf_file`.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from lm_data import LMDataArguments, load_lines, pack

from hf_blockkd import find_layer_stack, make_student
from hf_blockkd.data.calibration import batches_for
from hf_blockkd.students.layer_scores import choose_layers, drop_order, layer_influence

Choice = tuple[str, dict[int, list[int]], float]
"""How layers were chosen, the layers that stay by depth, and seconds."""


def choices(
    teacher: PreTrainedModel, train: Dataset, depths: list[int], counts: list[int], seeds: int
) -> Iterator[Choice]:
    """Every choice, for all depths at once."""
    stack = find_layer_stack(teacher)
    everything = range(len(stack))
    for how in ("even", "outer"):
        yield how, {depth: choose_layers(teacher, stack, depth, how) for depth in depths}, 0.0
    for count in counts:
        for seed in range(seeds):
            batches = list(batches_for(teacher, train, seed=seed, num_examples=count))
            start = time.perf_counter()
            influence = layer_influence(teacher, stack, batches)
            seconds = time.perf_counter() - start
            order = sorted(everything, key=influence.__getitem__)
            yield f"influence, {count} examples, seed {seed}", _left(everything, order, depths), seconds
            start = time.perf_counter()
            order = drop_order(teacher, stack, batches, len(stack) - min(depths))
            seconds = time.perf_counter() - start
            yield f"kl, {count} examples, seed {seed}", _left(everything, order, depths), seconds


def _left(everything: range, order: list[int], depths: list[int]) -> dict[int, list[int]]:
    """What stays, by depth, where layers go in an order."""
    return {depth: sorted(set(everything) - set(order[: len(everything) - depth])) for depth in depths}


@torch.no_grad()
def perplexity(model: PreTrainedModel, held_out: Dataset) -> float:
    """Of every token but the first of each block."""
    losses = [model(input_ids=ids, labels=ids).loss for ids in torch.tensor(held_out["input_ids"][:]).split(4)]
    return torch.stack(losses).mean().exp().item()


def add_options(parser: argparse.ArgumentParser) -> None:
    """Which model, which text, and how much of it is held out."""
    parser.add_argument("model", help="Name or folder of a causal language model with its tokenizer.")
    parser.add_argument("--gguf_file", help="File in that folder.")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--text", required=True, help="A text file.")
    parser.add_argument("--eval_lines", type=int, nargs=2, required=True, help="First and last line that are held out.")
    parser.add_argument("--num_layers", type=int, nargs="+", required=True, help="Depths of the students.")
    parser.add_argument("--block_size", type=int, default=128, help="Tokens in an example.")
    parser.add_argument("--eval_blocks", type=int, default=32, help="Held-out examples.")


def load(args: argparse.Namespace) -> tuple[PreTrainedModel, Dataset, Dataset]:
    """The model, with plain weights, and blocks of text to train on and to measure on."""
    teacher = AutoModelForCausalLM.from_pretrained(
        args.model, gguf_file=args.gguf_file, dtype=args.dtype, trust_remote_code=False
    ).eval()
    tokenizer = AutoTokenizer.from_pretrained(args.model, gguf_file=args.gguf_file, trust_remote_code=False)
    # What was read from a quantized file has plain weights now.
    teacher.hf_quantizer, teacher.is_quantized = None, False
    if hasattr(teacher.config, "quantization_config"):
        del teacher.config.quantization_config
    lines = load_lines(LMDataArguments(dataset=args.text, eval_lines=args.eval_lines))
    train, held_out = (pack(part, tokenizer, args.block_size) for part in lines)
    return teacher, train, held_out.select(range(min(args.eval_blocks, len(held_out))))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser)
    parser.add_argument("--num_examples", type=int, nargs="+", default=[8], help="Examples to measure on.")
    parser.add_argument("--seeds", type=int, default=1, help="How often other examples are drawn.")
    args = parser.parse_args()
    teacher, train, held_out = load(args)

    print(f"The whole model: {perplexity(teacher, held_out):.1f}\n")
    print(f"| choice | {' | '.join(f'{depth} layers | without' for depth in args.num_layers)} | seconds |")
    print(f"| --- | {' | '.join(['---: | ---'] * len(args.num_layers))} | ---: |")
    for name, kept, seconds in choices(teacher, train, args.num_layers, args.num_examples, args.seeds):
        cells = []
        for layers in kept.values():
            value = perplexity(make_student(teacher, layers=layers), held_out)
            gone = sorted(set(range(len(find_layer_stack(teacher)))) - set(layers))
            cells += [f"{value:,.1f}", " ".join(map(str, gone))]
        print(f"| {name} | {' | '.join(cells)} | {seconds:.0f} |", flush=True)


if __name__ == "__main__":
    main()
