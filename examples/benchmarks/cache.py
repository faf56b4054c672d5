"""A teacher cache ten times as large as the memory that a process may have, against a small one.

    python examples/benchmarks/cache.py

A tiny teacher with the classes of ImageNet-21k (85 KiB of logits an image) fills a cache of ten times the limit. Then
processes train on all of it, and on a hundredth of it, in turns, each in a memory cgroup with that limit, which needs
the right to make one (root); else without, and the table says so. The system keeps no page of the cache beforehand.
Ratios are taken within a round.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
from memory import status
from safetensors.torch import load_file
from transformers import TrainerCallback, ViTConfig, ViTForImageClassification

from hf_blockkd import BlockwiseDistillConfig, BlockwiseDistillTrainer
from hf_blockkd.data.example_keys import example_keys
from hf_blockkd.data.mapped_rows import MappedRows

CLASSES, BATCH, WARMUP = 21_841, 32, 20
SHARES = {"large": 1, "small": 100}
"""What part of the examples a cache has."""
LIMITS = {Path("/sys/fs/cgroup/memory"): "memory.limit_in_bytes", Path("/sys/fs/cgroup"): "memory.max"}
"""Where memory is limited, in the first version of cgroups and in the second."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--limit", type=int, default=768, help="Memory of a process that trains, in MiB.")
    parser.add_argument("--rounds", type=int, default=2, help="How often each cache has its turn.")
    parser.add_argument("--steps", type=int, default=200, help="Of a training.")
    parser.add_argument("--train", nargs=2, help=argparse.SUPPRESS)  # in a process of its own: cache, folder
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    examples = 10 * args.limit * 2**20 // (4 * CLASSES)
    if args.train:
        name, folder = args.train
        print(json.dumps(measure(Path(folder), name, examples // SHARES[name], args.steps)))
        return
    blake2b, ours, copy = hashing()
    print(f"hashing {BATCH} images of 224x224: {ours:.2f} ms of CPU, by blake2b {blake2b:.1f}, stacking {copy:.2f}")
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        vit(128, 4).save_pretrained(f"{folder}/teacher")
        for name, share in SHARES.items():
            trainer(Path(folder), Path(folder, name), examples // share, 1).fill_teacher_cache()
            forget(Path(folder, name))
        results = [{name: child(name, folder, args) for name in shuffled(SHARES)} for _ in range(args.rounds)]
    for name in SHARES:
        found = {key: statistics.median(one[name][key] for one in results) for key in results[0][name]}
        print(f"{name}: {', '.join(f'{key} {value:.4g}' for key, value in found.items())}")
    for key in ("ms a step", "ms to take a batch at random"):
        ratios = [one["large"][key] / one["small"][key] for one in results]
        print(f"{key}, large to small: {', '.join(f'{ratio:.2f}' for ratio in ratios)}")


def shuffled(names: Any) -> list[str]:
    return random.sample(list(names), len(names))


def hashing() -> tuple[float, float, float]:
    """Milliseconds of CPU for the keys of a batch, by blake2b and by ours, and for stacking the batch."""
    images = [torch.randn(3, 224, 224) for _ in range(BATCH)]
    batch = {"pixel_values": torch.stack(images), "labels": torch.arange(BATCH)}
    ways = (
        lambda: [hashlib.blake2b(image.numpy(), digest_size=8).digest() for image in images],
        lambda: example_keys(batch, BATCH),
        lambda: torch.stack(images),
    )
    taken: list[list[float]] = [[] for _ in ways]
    for _ in range(15):
        for way, seconds in zip(ways, taken, strict=True):
            start = time.process_time()
            way()
            seconds.append(time.process_time() - start)
    return tuple(1000 * statistics.median(seconds) for seconds in taken)


def vit(width: int, layers: int) -> ViTForImageClassification:
    shape = {"image_size": 8, "patch_size": 4, "num_channels": 1, "num_labels": CLASSES}
    heads = {"num_attention_heads": 2, "intermediate_size": 2 * width}
    return ViTForImageClassification(ViTConfig(hidden_size=width, num_hidden_layers=layers, **shape, **heads))


def images(count: int) -> datasets.Dataset:
    pixels = torch.randn(count, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    columns = {"pixel_values": pixels.numpy(), "labels": [i % CLASSES for i in range(count)]}
    return datasets.Dataset.from_dict(columns).with_format("torch")


def trainer(folder: Path, cache: Path, count: int, steps: int, **options: Any) -> BlockwiseDistillTrainer:
    """Plain KD of two tiny models, on the first `count` images."""
    config = BlockwiseDistillConfig(
        str(folder / "run"),
        objective="kd",
        num_blocks=2,
        teacher_cache=str(cache),
        max_steps=steps,
        per_device_train_batch_size=BATCH,
        per_device_eval_batch_size=8 * BATCH,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        save_strategy="no",
    )
    models = {"model": vit(128, 2), "teacher_model": str(folder / "teacher")}
    return BlockwiseDistillTrainer(args=config, train_dataset=images(count), **models, **options)


class Clock(TrainerCallback):
    """Times of the steps."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.times.append(time.perf_counter())


def measure(folder: Path, name: str, count: int, steps: int) -> dict[str, float]:
    """Train in this process, then take batches at random."""
    clock = Clock()
    trainer(folder, folder / name, count, steps + WARMUP, callbacks=[clock]).train()
    start = time.perf_counter()
    rows = MappedRows(folder / name)
    opened = time.perf_counter() - start
    keys = [key for shard in rows.shards for key in load_file(folder / name / shard)["keys"].tolist()]
    draw = random.Random(0)
    batches = [draw.sample(keys, BATCH) for _ in range(100)]
    start = time.perf_counter()
    for batch in batches:
        rows.take(batch)
    taken = time.perf_counter() - start
    read = next(line for line in Path("/proc/self/io").read_text().splitlines() if line.startswith("read_bytes"))
    return {
        "ms a step": 1000 * (clock.times[-1] - clock.times[WARMUP - 1]) / steps,
        "ms to take a batch at random": 10 * taken,
        "ms to open": 1000 * opened,
        "MiB on disk": sum(path.stat().st_size for path in (folder / name).iterdir()) / 2**20,
        "MiB read": int(read.split()[1]) / 2**20,
        "MiB of anonymous memory": status("RssAnon"),
    }


def child(name: str, folder: str, args: argparse.Namespace) -> dict[str, float]:
    """What a process of its own measures, within the limit if there can be one."""
    group = limited_group(args.limit * 2**20)
    command = [sys.executable, __file__, "--train", name, folder, f"--limit={args.limit}", f"--steps={args.steps}"]
    try:
        done = subprocess.run(
            command,
            stdout=subprocess.PIPE,
            text=True,
            check=True,
            preexec_fn=None if group is None else lambda: (group / "cgroup.procs").write_text(str(os.getpid())),
        )
    finally:
        if group is not None:
            group.rmdir()
    forget(Path(folder, name))
    return {**json.loads(done.stdout.splitlines()[-1]), "is limited": group is not None}


def limited_group(size: int) -> Path | None:
    """A new cgroup whose processes have no more memory than that, files that they read included."""
    for root, limit in LIMITS.items():
        group = root / f"teacher_cache_{os.getpid()}"
        try:
            group.mkdir()
            (group / limit).write_text(str(size))
        except OSError:
            if group.is_dir():
                group.rmdir()
            continue
        return group
    return None


def forget(folder: Path) -> None:
    """Have the system drop what it keeps in memory of the files of a folder."""
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


if __name__ == "__main__":
    main()
