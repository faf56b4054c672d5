"""What a run takes on GPUs that are not here, by counting one step on shapes alone: `make_estimate`."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn import functional
from transformers import PreTrainedModel

from ..config import BlockwiseDistillConfig
from ..connectors.attached import without_connectors
from ..losses.chunked_loss import default_chunk_size
from ..objectives.block_kd import BlockKD
from ..trainer import BlockwiseDistillTrainer
from .counting import count_stones, counting_trainer, prepare_batches
from .step_cost import extended
from .tables import si, table
from .traffic import Traffic

UTILISATION = 0.5
"""Share of its peak that a GPU reaches in matrix products of bfloat16, where no measured step says it."""
HOST_SECONDS = 23e-6
"""To start one operation from Python, forward or backward, which small models wait for: fitted to nine steps on an H200
(examples/benchmarks), with `HOST_STEP`."""
HOST_STEP = 31e-3
"""What Python takes for a step besides: `Trainer`, accelerate, the optimizer's parameters."""
FAR_BANDWIDTH = 400e9
"""Bytes a second between nodes of eight GPUs, each with a 400 Gb/s card."""
NODE = 8
LAYERS_AT_ONCE = 2
"""Layers of a sharded model that are whole at a time: the one that runs and the one that is fetched."""


@dataclass(frozen=True)
class Gpu:
    """What its maker says of a GPU: dense bfloat16 FLOPs a second, bytes a second, bytes, bytes a second to others."""

    flops: float
    bandwidth: float
    memory: float
    near_bandwidth: float


GPUS = {
    "a100": Gpu(312e12, 2.04e12, 80e9, 300e9),
    "h100": Gpu(989e12, 3.35e12, 80e9, 450e9),
    "h200": Gpu(989e12, 4.8e12, 141e9, 450e9),
}


@dataclass(frozen=True)
class StepEstimate:
    """Seconds and bytes of one step on each GPU.

    Attributes:
        name: The setting, in words.
        flops: Counted, of one GPU.
        seconds: What takes time -> seconds: `"products"` and `"traffic"` follow one another, `"host"` and
            `"communication"` go on beside both.
        memory: What takes memory -> bytes.
    """

    name: str
    flops: float
    seconds: dict[str, float]
    memory: dict[str, float]

    @property
    def step_seconds(self) -> float:
        """Of a step: the longest of what goes on side by side."""
        device = self.seconds["products"] + self.seconds["traffic"]
        return max(device, self.seconds["host"], self.seconds["communication"])

    @property
    def peak(self) -> float:
        """Bytes of all memory together."""
        return sum(self.memory.values())

    @property
    def dominant(self) -> str:
        """What takes the most time, of what the step waits for."""
        device = ("products", "traffic")
        beside = [name for name in self.seconds if name not in device and self.seconds[name] == self.step_seconds]
        return beside[0] if beside else max(device, key=self.seconds.get)


@dataclass(frozen=True)
class Estimate:
    """What `make_estimate` found out; `print` shows it.

    Attributes:
        gpu: Name of the GPU.
        gpus: Their number.
        utilisation: Share of its peak that matrix products reach.
        tokens: Of the run; `None` where it is not asked for.
        tokens_per_step: On all GPUs together; examples, for models that take no text.
        steps: Plain KD, the default, and the last two stones.
    """

    gpu: str
    gpus: int
    utilisation: float
    tokens: float | None
    tokens_per_step: int
    steps: tuple[StepEstimate, ...]

    def hours(self, step: StepEstimate) -> float:
        """Of the whole run."""
        return self.tokens / self.tokens_per_step * step.step_seconds / 3600

    def __str__(self) -> str:
        times = [("setting", "FLOPs", *(f"{name}, s" for name in self.steps[0].seconds), "step, s", "dominated by")]
        memory = [("setting", *self.steps[0].memory, "peak", "fits")]
        if self.tokens is not None:
            times[0] += ("hours", "GPU hours")
        for step in self.steps:
            parts = [f"{seconds:.3g}" for seconds in (*step.seconds.values(), step.step_seconds)]
            run = () if self.tokens is None else (f"{self.hours(step):.3g}", f"{self.hours(step) * self.gpus:.3g}")
            times.append((step.name, si(step.flops), *parts, step.dominant, *run))
            fits = "yes" if step.peak < GPUS[self.gpu].memory else "no"
            memory.append((step.name, *(f"{si(one)}B" for one in (*step.memory.values(), step.peak)), fits))
        whole = "one GPU" if self.gpus == 1 else f"{self.gpus} GPUs, both models in shards (FSDP2)"
        return "\n\n".join(
            (
                f"Estimate: {self.gpu.upper()}, {whole}, {self.tokens_per_step:,} tokens or examples a step"
                + ("" if self.tokens is None else f", {si(self.tokens)} in all"),
                f"Time of a step\n{table(times)}",
                f"Memory of each GPU\n{table(memory)}",
                "Counted, on shapes: FLOPs, bytes and operations of the trainer's own loss, forward and backward, at "
                "batch\nsizes 1 and 2, extended from there. Assumed: matrix products at "
                f"{self.utilisation:.0%} of the peak in bfloat16, all other\noperations at the bandwidth of the memory "
                f"and not fused, {HOST_SECONDS * 1e6:.0f} us to start one and {HOST_STEP * 1e3:.0f} ms a step,\n"
                "or what `step_seconds` says of Python's pace; AdamW; weights between GPUs fetched in bfloat16 while\n"
                "others compute, 400 Gb/s a GPU between nodes of eight; no activation checkpointing, no loading of\n"
                "data, no evaluation. The routing is not tested: run `hf-blockkd check`.",
            )
        )


def make_estimate(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    args: BlockwiseDistillConfig,
    gpu: str = "h100",
    gpus: int = 1,
    batch_size: int = 8,
    sequence_length: int | None = None,
    tokens: float | None = None,
    utilisation: float = UTILISATION,
    step_seconds: float | None = None,
) -> Estimate:
    """Estimate time and memory of a distillation on GPUs, from one step that is counted and not computed.

    Args:
        student: The student; made inside of `without_values`, it may have any size. On one GPU it should be in
            float32, and in bfloat16, as sharded weights are fetched, on more.
        teacher: The teacher, likewise; both in shards where there are several GPUs.
        args: The configuration that will train; `bf16=True` for mixed precision.
        gpu: One of `GPUS`.
        gpus: Their number.
        batch_size: Examples in a step on each of them.
        sequence_length: Tokens per example, for models of text; default 128, or as many positions as both have.
        tokens: Of the whole run; examples, for models that take no text.
        utilisation: Share of the GPU's peak in matrix products; of a measured step, its FLOPs over its seconds and the
            peak, where products dominate.
        step_seconds: Of a step of plain KD on a single example, as measured where the run will be: how fast Python is
            there, which such a step waits for. Default: as it was beside an H200.

    Raises:
        ValueError: If a number is out of range, or the models do not fit together.

    Example:
        ```python
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from hf_blockkd import BlockwiseDistillConfig
        >>> from hf_blockkd.plan.estimate import make_estimate
        >>> from hf_blockkd.plan.without_values import without_values
        >>> shape = dict(num_attention_heads=2, num_key_value_heads=2, vocab_size=99, intermediate_size=64)
        >>> args = BlockwiseDistillConfig("unused", num_blocks=2, use_cpu=True, bf16=True)
        >>> with without_values():
        ...     teacher = LlamaForCausalLM(LlamaConfig(hidden_size=64, num_hidden_layers=4, **shape))
        ...     student = LlamaForCausalLM(LlamaConfig(hidden_size=32, num_hidden_layers=2, **shape))
        ...     estimate = make_estimate(student, teacher, args, gpus=8, tokens=1e9)
        >>> [step.name for step in estimate.steps], estimate.steps[0].dominant
        (['plain KD', 'the default', 'last two stones'], 'host')

        ```
    """
    if gpu not in GPUS:
        raise ValueError(f"`gpu` is {gpu!r}; give one of {', '.join(GPUS)}.")
    given = {"gpus": gpus, "batch_size": batch_size, "sequence_length": sequence_length, "tokens": tokens}
    if step_seconds is not None and step_seconds <= 0:
        raise ValueError(f"`step_seconds` must be above 0, but is {step_seconds}.")
    for name, value in given.items():
        if value is not None and value < 1:
            raise ValueError(f"`{name}` must be at least 1, but is {value}.")
    if not 0 < utilisation <= 1:
        raise ValueError(f"`utilisation` must be above 0 and at most 1, but is {utilisation}.")
    vocabulary = getattr(student.config.get_text_config(), "vocab_size", None)
    # Chunks of a GPU's size; where weights are in shards, logits exist all at once.
    chunk = default_chunk_size(vocabulary, "cuda") if vocabulary and args.loss_chunk_size is None else None
    changes = {"loss_chunk_size": args.loss_chunk_size if chunk is None else chunk}
    every = {"objective": "block_kd", "stepping_stones": "all", "stone_fraction": 1.0, "stones_every": 1}
    with counting_trainer(student, teacher, args, **changes, **every, stone_weight=1.0, state_weight=0.0) as trainer:
        trainer._first_batch_passed = isinstance(next(student.parameters()), FakeTensor)  # nothing to test
        if gpus > 1:
            trainer.pair.student_head = trainer.pair.teacher_head = None
        blocks = len(trainer.block_map)
        last_two = list(range(1, blocks + 1))[-2:]
        states = BlockKD(args).state_blocks(blocks) or last_two
        batches = prepare_batches(trainer, batch_size, sequence_length)
        settings = {
            "plain KD": ([], 0.0, 0.0),
            "the default": (states, 0.0, 1.0),
            "last two stones": (last_two, 1.0, 1.0),
        }
        for batch in batches:  # a mask of whole texts is none
            batch.pop("attention_mask", None)
        _count(trainer, batches[0], *settings["the default"])  # what a first step does besides
        counts = {name: [_count(trainer, batch, *setting) for batch in batches] for name, setting in settings.items()}
        usual = host_seconds(counts["plain KD"][0][2])
        pace = 1.0 if step_seconds is None else step_seconds / usual
        where = gpu, gpus, utilisation, pace
        steps = [
            _step(name, trainer, extended(counts[name], batch_size), stones if weights[0] else [], *where)
            for name, (stones, *weights) in settings.items()
        ]
        inputs = batches[0]["input_ids"].shape[-1] if "input_ids" in batches[0] else 1
        return Estimate(gpu, gpus, utilisation, tokens, inputs * batch_size * gpus, tuple(steps))


@contextmanager
def _fused_attention() -> Iterator[None]:
    """Attention without dropout, with which a CPU would keep all scores; a GPU's kernels keep none."""
    attention = functional.scaled_dot_product_attention

    def without_dropout(*args: Any, dropout_p: float = 0.0, **kwargs: Any) -> torch.Tensor:
        return attention(*args, **kwargs)

    with patch.object(functional, "scaled_dot_product_attention", without_dropout):
        yield


@contextmanager
def _garbage_kept() -> Iterator[None]:
    """What lives in cycles lives on, so that the peak does not depend on when Python happens to collect it."""
    was_enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def host_seconds(kernels: float) -> float:
    """What Python takes to start the operations of one step, beside an H200."""
    return HOST_STEP + kernels * HOST_SECONDS


def _count(
    trainer: BlockwiseDistillTrainer, batch: dict, stones: Sequence[int], *weights: float
) -> tuple[float, float, float, float]:
    """FLOPs, bytes, operations and bytes at the peak of a step, the gradients of weights not among these."""
    with _fused_attention(), _garbage_kept(), Traffic() as traffic:
        flops, _ = count_stones(trainer, stones, batch, *weights)
    return flops, traffic.bytes, traffic.kernels, traffic.peak


def _step(
    name: str,
    trainer: BlockwiseDistillTrainer,
    counted: Sequence[float],
    stones: Sequence[int],
    gpu: str,
    gpus: int,
    utilisation: float,
    pace: float,
) -> StepEstimate:
    flops, moved, kernels, peak = counted
    device, pair = GPUS[gpu], trainer.pair
    own = sum(parameter.numel() for parameter in without_connectors(dict(pair.student.named_parameters())).values())
    own += sum(parameter.numel() for parameter in pair.all_connectors.parameters() if parameter.requires_grad)
    theirs = _bytes(pair.teacher)
    update = 28 * own / gpus  # weights, gradients and moments are read, and all but gradients written
    seconds = {
        "products": flops / (device.flops * utilisation),
        "traffic": (moved + update) / device.bandwidth,
        "host": pace * host_seconds(kernels),
        "communication": 0.0,
    }
    memory = {
        "student": 4 * own / gpus,
        "gradients": 4 * own / gpus,
        "AdamW": 8 * own / gpus,
        "teacher": theirs / gpus,
        "gathered": 0.0,
        # Gradients were made in the count, too.
        "activations": max(0.0, peak - _bytes(pair.student)),
    }
    if gpus > 1:
        suffixes = [pair.stones.suffix_layers[i] / len(pair.stones.teacher_stack) for i in stones]
        # The student's forward, backward and gradients; the teacher's clean pass, and both ways through each suffix.
        fetched = 3 * 2 * own + theirs * (1 + 2 * sum(suffixes))
        bandwidth = device.near_bandwidth if gpus <= NODE else FAR_BANDWIDTH
        seconds["communication"] = fetched * (gpus - 1) / gpus / bandwidth
        stacks = pair.stones.student_stack, pair.stones.teacher_stack
        layers = sum(LAYERS_AT_ONCE * max(map(_bytes, stack.layers)) for stack in stacks)
        rest = sum(
            _bytes(model) - sum(map(_bytes, stack.layers))
            for model, stack in zip((pair.student, pair.teacher), stacks, strict=True)
        )
        memory["gathered"] = layers + rest
    return StepEstimate(name, flops, seconds, memory)


def _bytes(module: nn.Module) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in module.parameters())
