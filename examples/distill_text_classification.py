"""Distil a text classifier: fine-tune or load a teacher, then a student alone, with plain KD, and with Block-KD.

accelerate launch examples/distill_text_classification.py                  # MiniLM on SST-2, from the hub
accelerate launch examples/distill_text_classification.py --teacher some/folder --train_file reviews.csv
"""

from __future__ import annotations

from arguments import ModelArguments, parse_arguments
from classes import of_teacher
from comparison import compare
from datasets import Dataset
from launching import run, say
from results import Metric
from scores import Scores
from task import Task, load_teacher
from text_data import TextDataArguments, augment, load_test_texts, load_texts, load_unlabelled
from transfer import transfer_rows
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    set_seed,
)


def main() -> None:
    # The texts are turned into tokens when a batch is read, which needs their column.
    script, data, args = parse_arguments(__file__, TextDataArguments, remove_unused_columns=False)
    compare(script, data, args, load_task(script, data))


def load_task(script: ModelArguments, data: TextDataArguments) -> Task:
    train_set, eval_set = load_texts(data)
    labels = train_set.features["label"].names
    say(f"{len(train_set)} texts to train on, {len(eval_set)} to evaluate on, {len(labels)} classes.")
    set_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(script.teacher, trust_remote_code=False)
    new_head = {"id2label": dict(enumerate(labels)), "label2id": {label: index for index, label in enumerate(labels)}}
    teacher = load_teacher(script, AutoModelForSequenceClassification, **(new_head if script.train_teacher else {}))
    if not script.train_teacher:
        train_set, eval_set = of_teacher(teacher, script.teacher, train_set, eval_set)

    def tokenize(texts: list[str], rows: dict[str, list]) -> dict[str, list]:
        labels = {"labels": rows["label"]} if "label" in rows else {}
        return {**tokenizer(texts, truncation=True, max_length=data.max_length), **labels}

    def as_train(rows: Dataset) -> Dataset:
        def transform(rows: dict[str, list]) -> dict[str, list]:
            return tokenize([augment(text, tokenizer.mask_token, data) for text in rows["text"]], rows)

        return rows.with_transform(transform)

    def as_eval(rows: Dataset) -> Dataset:
        return rows.with_transform(lambda rows: tokenize(rows["text"], rows))

    return Task(
        teacher,
        AutoModelForSequenceClassification,
        train_set,
        eval_set,
        Metric("accuracy", lambda metrics, prefix: metrics[f"{prefix}_accuracy"]),
        {
            "data_collator": DataCollatorWithPadding(tokenizer),
            "processing_class": tokenizer,
            "compute_metrics": Scores(teacher.config.id2label),
        },
        as_train=as_train,
        as_eval=as_eval,
        test_set=load_test_texts(data),
        transfer=lambda rows: transfer_rows(rows, load_unlabelled(data), data),
    )


if __name__ == "__main__":
    run(main)
