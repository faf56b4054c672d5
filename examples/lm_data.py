"""Running text for the language model example: lines, a tokenizer, and blocks of fixed length."""

from __future__ import annotations

from dataclasses import dataclass, field

from data_files import choose_splits, load_splits
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast


@dataclass
class LMDataArguments:
    """Which text, and how it is cut."""

    dataset: str = field(default="Salesforce/wikitext", metadata={"help": "A hub data set, or one text file."})
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a hub data set."})
    train_file: str | None = field(default=None, metadata={"help": "Text file to train on in place of `dataset`."})
    validation_file: str | None = field(default=None, metadata={"help": "Text file to evaluate on."})
    text_column: str = field(default="text", metadata={"help": "Column of a hub data set."})
    train_split: str = field(default="train", metadata={"help": "Split of a hub data set to train on."})
    eval_split: str | None = field(
        default=None, metadata={"help": "Split to evaluate on; default: the first of validation, test and the others."}
    )
    eval_fraction: float = field(
        default=0.1, metadata={"help": "Share of the lines, the last, held out if there is none."}
    )
    eval_lines: list[int] | None = field(
        default=None, metadata={"help": "First and last line, from 1, that are held out instead of that share."}
    )
    max_train_samples: int | None = field(
        default=None, metadata={"help": "Blocks to train on at most, drawn at random; default: all."}
    )
    block_size: int = field(default=128, metadata={"help": "Tokens in an example; texts are packed without gaps."})
    vocab_size: int = field(default=4096, metadata={"help": "Size of the tokenizer that a new teacher gets."})
    masked: bool = field(default=False, metadata={"help": "Masked instead of causal language modelling."})


def load_lines(args: LMDataArguments) -> tuple[list[str], list[str]]:
    """The lines to train and to evaluate on.

    Raises:
        ValueError: If a file, a split or a column cannot be found, or the lines to hold out do not lie in the text.
    """
    splits = choose_splits(load_splits(args.dataset, args), args)
    if args.text_column not in splits[0].column_names:
        raise ValueError(f"`text_column` is {args.text_column!r}, but there are {', '.join(splits[0].column_names)}.")
    lines, *held_out = ([line + "\n" for line in split[args.text_column]] for split in splits)
    if held_out and args.eval_lines is None:
        return lines, held_out[0]
    first, last = args.eval_lines or (len(lines) - max(1, round(args.eval_fraction * len(lines))) + 1, len(lines))
    if not 1 <= first <= last <= len(lines) or last - first + 1 == len(lines):
        raise ValueError(
            f"`eval_lines` is {args.eval_lines} and `eval_fraction` {args.eval_fraction}, but some of the {len(lines)} "
            "lines must be held out, and some left to train on."
        )
    return lines[: first - 1] + lines[last:], lines[first - 1 : last]


def make_tokenizer(lines: list[str], vocab_size: int, masked: bool) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer."""
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    if masked:
        special["mask_token"] = "<mask>"
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(special.values()),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(lines, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def pack(lines: list[str], tokenizer: PreTrainedTokenizerBase, block_size: int) -> Dataset:
    """Tokenize all lines, join them, and cut the result into blocks; what is left over goes.

    Raises:
        ValueError: If there is not one whole block.
    """
    tokens = [token for row in tokenizer(lines, add_special_tokens=False)["input_ids"] for token in row]
    blocks = [tokens[start : start + block_size] for start in range(0, len(tokens) - block_size + 1, block_size)]
    if not blocks:
        raise ValueError(f"The text has {len(tokens)} tokens, less than one block of `block_size` {block_size}.")
    return Dataset.from_dict({"input_ids": blocks, "labels": blocks})
