"""How near students of an embedding model come to it: one cut for each depth, trained in several ways.

    python examples/benchmarks/embeddings.py TEACHER novels.txt --sst2 FOLDER >> results/embeddings.jsonl

The teacher is a folder of sentence-transformers. Every line of what is printed is a model: the rank correlation of its
similarities with the teacher's over all pairs of held-out sentences, and, with `--sst2`, the accuracy of a linear probe
on its vectors, fitted to the training split and judged on the other one.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from transformers import AutoTokenizer, DataCollatorWithPadding, PreTrainedModel, PrinterCallback, set_seed

from hf_blockkd import BlockwiseDistillConfig, BlockwiseDistillTrainer, make_student
from hf_blockkd.metrics import SimilarityCorrelation
from hf_blockkd.models.loading import load_model

sys.path.insert(0, str(Path(__file__).parents[1]))

from data_files import read_file
from distill_embeddings import sentences

METHODS: dict[str, dict[str, Any]] = {
    "plain": {"objective": "kd"},
    "default": {},
    "weight 5": {"state_weight": 5.0},
    "stones": {"state_weight": 5.0, "stepping_stones": "last_two"},
}
"""Fields of the configuration: of states at two weights, and of the last two stones besides."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("teacher", help="folder of sentence-transformers")
    parser.add_argument("text", help="text file, of which sentences are taken")
    parser.add_argument("--sst2", help="folder with train.tsv and dev.tsv for a linear probe")
    parser.add_argument("--layers", type=int, nargs="+", default=[3, 2], help="depths of students")
    parser.add_argument("--hidden_size", type=int, help="their width; default: the teacher's")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--losses", nargs="+", default=["cosine"], help="values of `embedding_loss`")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--sentences", type=int, default=8000, help="sentences to train on")
    parser.add_argument("--held_out", type=int, default=500, help="sentences to judge on")
    parser.add_argument("--probe_rows", type=int, default=3000, help="rows of SST-2 that the probe is fitted to")
    parser.add_argument("--max_length", type=int, default=64)
    parser.add_argument("--epochs", type=float, default=1.0)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--learning_rate", type=float, default=2e-4)
    args = parser.parse_args()
    bench = Bench(args)
    bench.judge(bench.teacher, model="teacher")
    for layers in args.layers:
        set_seed(0)
        options = {"data": bench.train, "data_collator": bench.collate}
        cut = make_student(bench.teacher, layers, args.hidden_size, **options)
        bench.judge(cut, model="cut", layers=layers)
        for seed in args.seeds:
            for loss in args.losses:
                for method in args.methods:
                    student, seconds = bench.trained(cut, method, loss, seed)
                    line = {"loss": loss, "learning_rate": args.learning_rate, "seed": seed}
                    bench.judge(student, model=method, layers=layers, **line, seconds=round(seconds, 1))


class Bench:
    """The teacher, the sentences, and what students are judged by."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.teacher = args, load_model(args.teacher).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(args.teacher, trust_remote_code=False)
        self.collate = DataCollatorWithPadding(self.tokenizer)
        texts = sentences(read_file(args.text, "text")["text"], least_words=5).shuffle(seed=0)
        self.held_out = self.tokenized(texts.select(range(args.held_out)))
        self.train = self.tokenized(texts.select(range(args.held_out, args.held_out + args.sentences)))
        self.probe = None
        if args.sst2:
            parts = (read_file(str(Path(args.sst2, f"{name}.tsv")), name).shuffle(seed=0) for name in ("train", "dev"))
            train, dev = parts
            train = train.select(range(min(args.probe_rows, len(train))))
            self.probe = [(self.tokenized(part), np.array(part["label"])) for part in (train, dev)]
        self.targets = self.vectors(self.teacher, self.held_out)

    def tokenized(self, rows: Dataset) -> Dataset:
        def tokenize(rows: dict[str, list]) -> dict[str, list]:
            return self.tokenizer(rows["text"], truncation=True, max_length=self.args.max_length)

        return rows.map(tokenize, batched=True, remove_columns=rows.column_names)

    @torch.no_grad()
    def vectors(self, model: PreTrainedModel, rows: Dataset) -> np.ndarray:
        """Of all rows, in their order; those of a length together, which spares padding."""
        model.eval()
        order = sorted(range(len(rows)), key=lambda index: len(rows[index]["input_ids"]))
        found = []
        for start in range(0, len(order), 64):
            batch = self.collate([rows[index] for index in order[start : start + 64]])
            states = model(**batch).last_hidden_state
            found.append(self.teacher.pooling(states, batch["attention_mask"]))
        return torch.cat(found)[torch.tensor(order).argsort()].numpy()

    def trained(self, cut: PreTrainedModel, method: str, loss: str, seed: int) -> tuple[PreTrainedModel, float]:
        """A student that begins at the cut, and the seconds of its training."""
        student, args = copy.deepcopy(cut), self.args
        with tempfile.TemporaryDirectory() as folder:
            config = BlockwiseDistillConfig(
                folder,
                num_blocks=student.config.num_hidden_layers,
                embedding_loss=loss,
                seed=seed,
                num_train_epochs=args.epochs,
                per_device_train_batch_size=args.batch_size,
                learning_rate=args.learning_rate,
                warmup_steps=0.1,
                weight_decay=0.01,
                train_sampling_strategy="group_by_length",
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
                logging_strategy="no",
                **METHODS[method],
            )
            data = {"train_dataset": self.train, "data_collator": self.collate}
            trainer = BlockwiseDistillTrainer(model=student, teacher_model=self.teacher, args=config, **data)
            trainer.remove_callback(PrinterCallback)  # of which the lines of models would not be told
            return student, trainer.train().metrics["train_runtime"]

    def judge(self, model: PreTrainedModel, /, **line: Any) -> None:
        """Print the line of a model."""
        vectors = self.vectors(model, self.held_out)
        found = SimilarityCorrelation().compute(predictions=vectors, references=self.targets)
        if self.probe is not None:
            found["probe"] = self.probe_accuracy(model)
        found = {name: round(value, 4) for name, value in found.items()}
        print(json.dumps({**line, "parameters": model.num_parameters(), **found}), flush=True)

    def probe_accuracy(self, model: PreTrainedModel) -> float:
        """Of the least squares, with a ridge, from standardised vectors to the two classes."""
        (x, y), (dev_x, dev_y) = ((self.vectors(model, rows), labels) for rows, labels in self.probe)
        mean, scale = x.mean(0), x.std(0) + 1e-6
        x, dev_x = ((one - mean) / scale for one in (x, dev_x))
        weight = np.linalg.solve(x.T @ x + 0.1 * len(x) * np.eye(x.shape[1]), x.T @ (y - y.mean()))
        return float(((dev_x @ weight + y.mean() > 0.5) == dev_y).mean())


if __name__ == "__main__":
    main()
