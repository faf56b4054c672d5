"""Distil between architectures: a student and a teacher that cut the same images into different grids.

    python examples/cross_architecture.py                                       # digits, four pairs
    python examples/cross_architecture.py --dataset uoft-cs/cifar10 --horizontal_flip true --pairs resnet-vit

For each pair, the teacher is trained first, then the same student alone, with plain KD and with Block-KD.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from image_data import ImageDataArguments, as_batches, load_images
from launching import run, use_all_cores
from transformers import (
    AutoModelForImageClassification,
    ConvNextConfig,
    EvalPrediction,
    HfArgumentParser,
    PreTrainedConfig,
    PreTrainedModel,
    ResNetConfig,
    SwinConfig,
    Trainer,
    TrainingArguments,
    ViTConfig,
    ViTImageProcessorPil,
    set_seed,
)

from hf_blockkd import BlockwiseDistillConfig, BlockwiseDistillTrainer
from hf_blockkd.connectors.attached import without_connectors
from hf_blockkd.metrics import Accuracy

SIZE = 32


def vit(width: int, depth: int, **fields: Any) -> PreTrainedConfig:
    shape = {"hidden_size": width, "num_hidden_layers": depth, "num_attention_heads": 4, "intermediate_size": 2 * width}
    return ViTConfig(image_size=SIZE, patch_size=8, **shape, **fields)


def swin(width: int, **fields: Any) -> PreTrainedConfig:
    shape = {"embed_dim": width, "depths": [2, 2, 2], "num_heads": [2, 4, 8], "window_size": 2, "mlp_ratio": 2.0}
    return SwinConfig(image_size=SIZE, patch_size=4, drop_path_rate=0.0, **shape, **fields)


def resnet(width: int, depth: int, **fields: Any) -> PreTrainedConfig:
    shape = {"embedding_size": width, "hidden_sizes": [width, 2 * width, 4 * width], "depths": [depth] * 3}
    return ResNetConfig(layer_type="basic", **shape, **fields)


def convnext(width: int, depth: int, **fields: Any) -> PreTrainedConfig:
    shape = {"hidden_sizes": [width, 2 * width, 4 * width], "depths": [depth] * 3, "num_stages": 3}
    return ConvNextConfig(image_size=SIZE, patch_size=4, **shape, **fields)


PAIRS: dict[str, tuple[Callable[..., PreTrainedConfig], Callable[..., PreTrainedConfig]]] = {
    "resnet-vit": (partial(resnet, 16, 1), partial(vit, 64, 6)),
    "vit-convnext": (partial(vit, 32, 3), partial(convnext, 24, 2)),
    "swin-vit": (partial(swin, 8), partial(vit, 64, 6)),
    "vit-swin": (partial(vit, 32, 3), partial(swin, 16)),
}
"""Config of the student, config of the teacher."""
METHODS = ("alone", "kd", "block_kd")


@dataclass
class CrossArguments(ImageDataArguments):
    """Which pairs, on how many images, and for how long."""

    pairs: list[str] = field(default_factory=lambda: list(PAIRS), metadata={"help": "Names of pairs, student-teacher."})
    train_images: int = field(default=2000, metadata={"help": "Images to train on, the first ones of the split."})
    eval_images: int = field(default=1000, metadata={"help": "Images to evaluate on, likewise."})
    teacher_epochs: float = field(default=5, metadata={"help": "Epochs of the teachers."})
    epochs: float = field(default=3, metadata={"help": "Epochs of the students."})
    image_size: None = field(default=None, init=False)  # of all models, SIZE
    batch_size: int = field(default=32, metadata={"help": "Images in a step."})
    seed: int = field(default=0, metadata={"help": "Seed of the students."})
    output_dir: str = field(default="outputs/cross_architecture", metadata={"help": "Folder for models and figures."})


def main() -> None:
    (args,) = HfArgumentParser(CrossArguments).parse_args_into_dataclasses()
    use_all_cores()
    train_set, eval_set = load_images(args)
    train_set = train_set.select(range(min(args.train_images, len(train_set))))
    eval_set = eval_set.select(range(min(args.eval_images, len(eval_set))))
    labels = train_set.features["label"].names
    channels = 1 if train_set[0]["image"].mode == "L" else 3
    half = [0.5] * channels
    processor = ViTImageProcessorPil(size={"height": SIZE, "width": SIZE}, image_mean=half, image_std=half)
    fields = {"num_channels": channels, "id2label": dict(enumerate(labels))}
    fields["label2id"] = {label: index for index, label in enumerate(labels)}
    data = {
        "train_dataset": as_batches(train_set, processor, channels, augment=args),
        "eval_dataset": as_batches(eval_set, processor, channels),
        "compute_metrics": compute_metrics,
    }
    output = Path(args.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    print(f"{len(train_set)} images to train on, {len(eval_set)} to evaluate on.")
    for name in args.pairs:
        for line in run_pair(name, args, fields, data):
            with (output / "results.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
            print(
                f"{name:<14}{line['model']:<10}{line['parameters']:>9,} parameters{line['seconds']:>6.0f} s   loss "
                f"{line['first_loss']:.2f} -> {line['last_loss']:.2f}   accuracy {line['accuracy']:.1%}",
                flush=True,
            )


def run_pair(name: str, args: CrossArguments, fields: dict[str, Any], data: dict[str, Any]) -> list[dict[str, Any]]:
    """Train the teacher of a pair, then its student by each method."""
    student_config, teacher_config = PAIRS[name]
    set_seed(args.seed)
    teacher = AutoModelForImageClassification.from_config(teacher_config(**fields))
    common = {
        "per_device_train_batch_size": args.batch_size,
        "per_device_eval_batch_size": 256,
        "learning_rate": 1e-3,
        "weight_decay": 0.05,
        "warmup_steps": 10,
        "lr_scheduler_type": "cosine",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "log_level": "error",
        "remove_unused_columns": False,  # images become pixels when a batch is read
        "seed": args.seed,
    }
    folder = str(Path(args.output_dir) / name)
    teacher_args = TrainingArguments(f"{folder}/teacher", num_train_epochs=args.teacher_epochs, **common)
    runs = [summary(name, "teacher", Trainer(teacher, teacher_args, **data))]
    for method in METHODS:
        set_seed(args.seed)
        student: PreTrainedModel = AutoModelForImageClassification.from_config(student_config(**fields))
        config = BlockwiseDistillConfig(
            f"{folder}/{method}",
            num_blocks=3,
            objective=method,
            stepping_stones="all",
            num_train_epochs=args.epochs,
            **common,
        )
        trainer = BlockwiseDistillTrainer(model=student, teacher_model=teacher, args=config, **data)
        runs.append(summary(name, method, trainer))
    bridges = trainer.pair.geometry.bridges.items()
    runs[-1]["bridges"] = {stone: str(bridge) for stone, bridge in bridges}
    return runs


def summary(pair: str, model: str, trainer: Trainer) -> dict[str, Any]:
    """Train, evaluate, and say what came out; losses are means of the first and of the last tenth of the steps."""
    own = without_connectors(dict(trainer.model.named_parameters()))
    seconds = trainer.train().metrics["train_runtime"]
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    tenth = max(1, len(losses) // 10)
    return {
        "pair": pair,
        "model": model,
        "parameters": sum(parameter.numel() for parameter in own.values()),
        "steps": len(losses),
        "seconds": seconds,
        "first_loss": sum(losses[:tenth]) / tenth,
        "last_loss": sum(losses[-tenth:]) / tenth,
        "accuracy": trainer.evaluate()["eval_accuracy"],
    }


def compute_metrics(prediction: EvalPrediction) -> dict[str, float]:
    return Accuracy().compute(predictions=prediction.predictions.argmax(-1), references=prediction.label_ids)


if __name__ == "__main__":
    run(main)
