r"""Distil an embedding model: cut a student out of it, and bring its vectors near the teacher's, without any label.

accelerate launch examples/distill_embeddings.py                              # MiniLM on sentences of WikiText
accelerate launch examples/distill_embeddings.py --train_file novels.txt --student_layers 2
accelerate launch examples/distill_embeddings.py --teacher BAAI/bge-small-en-v1.5 \
    --student_config '{"num_hidden_layers": 6, "hidden_size": 192}'

What comes out loads in `AutoModel`, and in `SentenceTransformer`. It is judged by the rank correlation (Spearman's)
between the similarities of all pairs of held-out sentences and those that the teacher finds.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from arguments import ModelArguments, parse_arguments
from comparison import compare
from data_files import DataArguments, choose_splits, load_splits
from datasets import Dataset
from launching import run, say
from results import Metric
from task import Task
from transformers import AutoModel, AutoTokenizer, DataCollatorWithPadding, EvalPrediction

from hf_blockkd.metrics import SimilarityCorrelation
from hf_blockkd.models.loading import load_model

END_OF_SENTENCE = re.compile(r"(?<=[.!?])[\"'\u2019\u201d]*\s+")


@dataclass
class SentenceArguments(DataArguments):
    """Which sentences."""

    dataset: str = field(default="Salesforce/wikitext", metadata={"help": "A hub data set, or a file of text."})
    text_column: str = field(default="text", metadata={"help": "Column of the texts, which are cut into sentences."})
    least_words: int = field(default=5, metadata={"help": "Shorter sentences are left out."})
    max_length: int = field(default=64, metadata={"help": "Tokens that a sentence is cut to."})
    max_eval_samples: int = field(default=500, metadata={"help": "Held-out sentences, all pairs of which are judged."})


def main() -> None:
    script, data, args = parse_arguments(__file__, SentenceArguments, label_names=[])
    compare(script, data, args, load_task(script, data))


def load_task(script: ModelArguments, data: SentenceArguments) -> Task:
    train, *held_out = choose_splits(load_splits(data.dataset, data), data)
    rows = sentences(train[data.text_column], data.least_words)
    if held_out:
        held_out = sentences(held_out[0][data.text_column], data.least_words)
    else:
        rows, held_out = rows.train_test_split(data.eval_fraction, seed=data.split_seed).values()
    rows, held_out = (
        part.shuffle(seed=data.split_seed).select(range(min(limit or len(part), len(part))))
        for part, limit in ((rows, data.max_train_samples), (held_out, data.max_eval_samples))
    )
    say(f"{len(rows)} sentences to train on, {len(held_out)} to evaluate on.")
    # Not of AutoModel, which leaves out how the states are pooled.
    teacher = load_model(script.teacher)
    tokenizer = AutoTokenizer.from_pretrained(script.teacher, trust_remote_code=False)
    correlation = SimilarityCorrelation()

    def tokenize(rows: dict[str, list]) -> dict[str, list]:
        return tokenizer(rows["text"], truncation=True, max_length=data.max_length)

    def compute_metrics(prediction: EvalPrediction) -> dict[str, float]:
        return correlation.compute(predictions=prediction.predictions, references=prediction.label_ids)

    return Task(
        teacher,
        AutoModel,
        *(part.map(tokenize, batched=True, remove_columns="text") for part in (rows, held_out)),
        Metric("rank correlation", lambda metrics, prefix: metrics[f"{prefix}_spearman"], ".4f"),
        {
            "data_collator": DataCollatorWithPadding(tokenizer),
            "processing_class": tokenizer,
            "compute_metrics": compute_metrics,
        },
        teacher_metrics={"eval_spearman": 1.0},
    )


def sentences(texts: list[str], least_words: int) -> Dataset:
    """Different sentences of texts, whose lines may be broken anywhere within a paragraph.

    Raises:
        ValueError: If there is none that is long enough.
    """
    paragraphs = re.split(r"\n\s*\n", "\n".join(texts))
    parts = (" ".join(part.split()) for paragraph in paragraphs for part in END_OF_SENTENCE.split(paragraph))
    found = list(dict.fromkeys(part for part in parts if len(part.split()) >= least_words))
    if not found:
        raise ValueError(f"No sentence of the texts has `least_words` {least_words}; lower it, or give other texts.")
    return Dataset.from_dict({"text": found})


if __name__ == "__main__":
    run(main)
