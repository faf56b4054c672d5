"""Distil a vision transformer: train or load a teacher, then a student alone, with plain KD, and with Block-KD.

    accelerate launch examples/distill_vit.py                                  # the recipe of distill_vit.yaml
    accelerate launch examples/distill_vit.py my_recipe.yaml --seed 1          # your recipe, then your flags
    accelerate launch examples/distill_vit.py --dataset uoft-cs/cifar10 --train_teacher false --methods block_kd \
        --teacher my-finetuned-vit --student_config '{"num_hidden_layers": 4}'
"""

from __future__ import annotations

from typing import Any

from arguments import ModelArguments, parse_arguments, read_fields
from classes import of_teacher
from colour import make_colour
from comparison import compare
from datasets import Dataset
from image_data import ImageDataArguments, as_batches, choose_size, load_images, load_test_images, load_unlabelled
from launching import run, say
from results import Metric
from scores import Scores
from task import Task, load_teacher
from transfer import transfer_rows
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    PreTrainedModel,
    ViTConfig,
    ViTImageProcessorPil,
    set_seed,
)


def main() -> None:
    # The images are turned into pixels when a batch is read, which needs their column.
    script, data, args = parse_arguments(__file__, ImageDataArguments, remove_unused_columns=False)
    compare(script, data, args, load_task(script, data))


def load_task(script: ModelArguments, data: ImageDataArguments) -> Task:
    train_set, eval_set = load_images(data)
    labels = train_set.features["label"].names
    say(f"{len(train_set)} images to train on, {len(eval_set)} to evaluate on, {len(labels)} classes.")
    teacher, processor = make_teacher(script, data, train_set, labels)
    if not script.train_teacher:
        train_set, eval_set = of_teacher(teacher, script.teacher, train_set, eval_set)
    channels = getattr(teacher.config, "num_channels", 3)
    return Task(
        teacher,
        AutoModelForImageClassification,
        train_set,
        eval_set,
        Metric("accuracy", lambda metrics, prefix: metrics[f"{prefix}_accuracy"]),
        {"processing_class": processor, "compute_metrics": Scores(teacher.config.id2label)},
        as_train=lambda rows: as_batches(rows, processor, channels, augment=data),
        as_eval=lambda rows: as_batches(rows, processor, channels),
        test_set=load_test_images(data),
        transfer=lambda rows: transfer_rows(rows, load_unlabelled(data), data),
        finish=make_colour,
    )


def make_teacher(
    script: ModelArguments, data: ImageDataArguments, train_set: Dataset, labels: list[str]
) -> tuple[PreTrainedModel, Any]:
    """The teacher, loaded or new, and its image processor."""
    set_seed(0)
    named = {"id2label": dict(enumerate(labels)), "label2id": {label: index for index, label in enumerate(labels)}}
    if script.teacher is None:
        fields = read_fields("teacher_config", script.teacher_config, ViTConfig())
        images = train_set[:256]["image"]
        channels = 1 if {image.mode for image in images} <= {"1", "L"} else 3
        size = fields.pop("image_size", None)
        height, width = choose_size(images, data.image_size or size, fields.get("patch_size", ViTConfig().patch_size))
        half = [0.5] * channels
        processor = ViTImageProcessorPil(size={"height": height, "width": width}, image_mean=half, image_std=half)
        config = ViTConfig(image_size=height if height == width else [height, width], num_channels=channels, **named)
        config.update(fields)
        return AutoModelForImageClassification.from_config(config), processor
    if data.image_size is not None:
        raise ValueError(
            f"`image_size` is {data.image_size}, but the teacher {script.teacher!r} takes images of its own size; "
            "leave it out."
        )
    processor = AutoImageProcessor.from_pretrained(script.teacher, backend="pil", trust_remote_code=False)
    # A model that was pretrained on other classes gets a new head.
    return load_teacher(script, AutoModelForImageClassification, **(named if script.train_teacher else {})), processor


if __name__ == "__main__":
    run(main)
