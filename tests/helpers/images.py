"""A folder of images of one's own, and the smallest vision transformer that takes them."""

from pathlib import Path

import numpy as np
from image_data import ImageDataArguments
from PIL import Image

from hf_blockkd import BlockwiseDistillConfig

SHAPE = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16, "patch_size": 4}
TINY = '{"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16, "patch_size": 4}'


def draw(folder: Path, sizes: list[tuple[int, int]], mode: str = "L") -> ImageDataArguments:
    """A folder a class, with images of these sizes (width, height)."""
    noise = np.random.default_rng(0)
    for label in ("cat", "dog"):
        (folder / label).mkdir(parents=True)
        for index, (width, height) in enumerate(sizes):
            pixels = noise.integers(0, 256, (height, width, *(() if mode == "L" else (3,))), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / label / f"{index}.png")
    return ImageDataArguments(dataset=str(folder))


def short_run(folder: Path, **fields) -> BlockwiseDistillConfig:
    """Two steps, as the example would make them."""
    stock = {"remove_unused_columns": False, "save_strategy": "no", "report_to": "none", "disable_tqdm": True}
    return BlockwiseDistillConfig(str(folder), **{"num_blocks": 1, "max_steps": 2, "use_cpu": True, **stock, **fields})
