"""Running text for the language model example: lines, a tokenizer, and blocks of fixed length."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from datasets import Dataset, load_dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast


@dataclass
class LMDataArguments:
    """Which text, and how it is cut."""

    dataset: str = field(default="Salesforce/wikitext", metadata={"help": "A hub data set, or one text file."})
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a hub data set."})
    text_column: str = field(default="text", metadata={"help": "Column of a hub data set."})
    eval_split: str = field(default="validation", metadata={"help": "Split of a hub data set to evaluate on."})
    eval_lines: list[int] | None = field(
        default=None, metadata={"help": "First and last line of a text file, from 1, that are held out to evaluate on."}
    )
    block_size: int = field(default=128, metadata={"help": "Tokens in an example; texts are packed without gaps."})
    vocab_size: int = field(default=4096, metadata={"help": "Size of the tokenizer that a new teacher gets."})
    masked: bool = field(default=False, metadata={"help": "Masked instead of causal language modelling."})


def load_lines(args: LMDataArguments) -> tuple[list[str], list[str]]:
    """The lines to train and to evaluate on.

    Raises:
        ValueError: If a text file comes without the lines to hold out, or they do not lie in it.
    """
    path = Path(args.dataset).expanduser()
    if not path.is_file():
        splits = load_dataset(args.dataset, args.dataset_config)
        return tuple([line + "\n" for line in splits[name][args.text_column]] for name in ("train", args.eval_split))
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    first, last = args.eval_lines or (0, 0)
    if not 1 <= first <= last <= len(lines):
        raise ValueError(
            f"`eval_lines` is {args.eval_lines}, but must be the first and the last line to hold out of the "
            f"{len(lines)} lines of {path}."
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
