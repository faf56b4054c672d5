"""What a distillation will cost, before anything trains: `make_plan`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel

from ..config import BlockwiseDistillConfig
from ..connectors.attached import without_connectors
from ..connectors.bridges import BridgedConnector
from ..connectors.maps import ResidualConnector
from ..objectives.sampling import choose_stones, inclusion_odds, sampling_shares, stone_weights
from ..pairing.blocks import BlockMap
from .counting import chunk_as_at, count_step, counting_trainer, labelled_batch


@dataclass(frozen=True)
class StoneCost:
    """A stepping stone's connector, and what the stone adds to a training step.

    Attributes:
        index: From 1 to n.
        connector: Kind and shape, e.g. `"linear 48 -> 128"`, and the layouts where these differ, e.g.
            `"linear 64 -> 192, 8x8 -> class + 4x4"`.
        parameters: Number of the connector's parameters.
        flops: FLOPs that the stone adds to a step of plain KD.
    """

    index: int
    connector: str
    parameters: int
    flops: float


@dataclass(frozen=True)
class StepCost:
    """The cost of one training step under one setting of `stepping_stones`.

    Attributes:
        name: The setting, in words.
        flops: FLOPs of forward and backward; the mean over draws where stones or examples are drawn.
        parameters: Bytes of all weights: teacher, student and connectors.
        gradients: Bytes of the gradients.
        optimizer: Bytes of AdamW's two moments.
        activations: Bytes of what the forward keeps for the backward; the largest draw where stones are sampled.
    """

    name: str
    flops: float
    parameters: int
    gradients: int
    optimizer: int
    activations: float

    @property
    def memory(self) -> float:
        """Bytes of all four together."""
        return self.parameters + self.gradients + self.optimizer + self.activations


@dataclass(frozen=True)
class Plan:
    """What `make_plan` found out; `print` shows it as tables.

    Attributes:
        block_map: The cut of both stacks.
        student_parameters: Number of the student's parameters, connectors excluded.
        teacher_parameters: Number of the teacher's.
        stones: One entry per stepping stone.
        batch_size: Examples in a step.
        example: Shape of one example of the main input: (T,) tokens or (C, H, W) pixels.
        steps: Plain KD, shared examples, sampled stones, the last two of several stones, all stones, and the chosen
            setting where it is none of them.
        chosen: Which of `steps` the arguments ask for.
    """

    block_map: BlockMap
    student_parameters: int
    teacher_parameters: int
    stones: tuple[StoneCost, ...]
    batch_size: int
    example: tuple[int, ...]
    steps: tuple[StepCost, ...]
    chosen: StepCost

    def __str__(self) -> str:
        plain = self.steps[0]
        ratio = self.teacher_parameters / self.student_parameters
        stones = [("stone", "connector", "parameters", "FLOPs it adds")]
        stones += [(str(s.index), s.connector, f"{s.parameters:,}", _si(s.flops)) for s in self.stones]
        steps = [("setting", "FLOPs", "ratio", "weights", "gradients", "AdamW", "activations", "memory", "ratio")]
        for step in self.steps:
            parts = (step.parameters, step.gradients, step.optimizer, step.activations, step.memory)
            steps.append(
                (
                    step.name + (" *" if step is self.chosen else ""),
                    _si(step.flops),
                    f"{step.flops / plain.flops:.2f}",
                    *(f"{_si(part)}B" for part in parts),
                    f"{step.memory / plain.memory:.2f}",
                )
            )
        example = f"{self.example[0]} tokens" if len(self.example) == 1 else " x ".join(map(str, self.example))
        return "\n\n".join(
            (
                f"Block map\n{self.block_map}",
                f"Stepping stones\n{_table(stones, left=2)}",
                f"Parameters\nteacher  {self.teacher_parameters:>15,}\nstudent  {self.student_parameters:>15,}  "
                f"(the teacher is {ratio:.2f} times as large)",
                f"One training step, batch size {self.batch_size}, examples of {example}, the chosen setting marked *\n"
                f"{_table(steps)}",
                "FLOPs are counted, not estimated: the trainer's own loss was computed and differentiated on dummy\n"
                "examples, at batch sizes 1 and 2, and is extended from there. A multiply-add is 2 FLOPs; only matrix\n"
                "products, convolutions and attention count. Activations are what this run kept for its backward;\n"
                "what is freed before comes on top. FLOPs are those of the mean draw and the mean step, the\n"
                "memory of sampled stones that of the largest draw. A teacher cache saves the clean pass on\n"
                "top, a frozen prefix that both models share its layers.",
            )
        )


def make_plan(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    args: BlockwiseDistillConfig,
    batch_size: int = 8,
    sequence_length: int | None = None,
) -> Plan:
    """Measure what a distillation will cost, on dummy data, without training anything.

    A [`BlockwiseDistillTrainer`] computes its own loss, forward and backward, on one and on two dummy examples: without
    stones, with each stone alone and with all of them. Every position of a text has a label, and activation
    checkpointing is off.

    Args:
        student: The student. Its weights stay as they are; gradients are removed.
        teacher: The teacher. As in training, it is frozen and put into eval mode.
        args: The configuration that will train; of its batch and output settings, nothing is used.
        batch_size: Examples in a step.
        sequence_length: Tokens per example, for models of text; default 128, or as many positions as both have.

    Returns:
        The plan; print it.

    Raises:
        ValueError: If models and configuration do not fit together, as the trainer would refuse them, or a model has
            fewer positions than `sequence_length`.

    Example:
        ```python
        >>> from transformers import ViTConfig, ViTForImageClassification
        >>> from hf_blockkd import BlockwiseDistillConfig
        >>> from hf_blockkd.plan.costs import make_plan
        >>> shape = dict(image_size=8, patch_size=4, num_channels=1, num_attention_heads=2)
        >>> teacher = ViTForImageClassification(ViTConfig(hidden_size=32, num_hidden_layers=4, **shape))
        >>> student = ViTForImageClassification(ViTConfig(hidden_size=16, num_hidden_layers=2, **shape))
        >>> plan = make_plan(student, teacher, BlockwiseDistillConfig("student", num_blocks=2), batch_size=64)
        >>> [step.name for step in plan.steps]
        ['plain KD', 'shared examples', 'sampled stones (1 of 2)', 'all stones']

        ```
    """
    for name, value in (("batch_size", batch_size), ("sequence_length", sequence_length)):
        if value is not None and value < 1:
            raise ValueError(f"`{name}` must be at least 1, but is {value}.")
    if args.objective not in ("block_kd", "kd"):
        raise ValueError(
            f"`objective` is {args.objective!r}, whose cost is not counted; set it to 'block_kd' or 'kd', which every "
            "objective with a teacher costs at least."
        )
    with counting_trainer(student, teacher, args) as trainer:
        own = list(without_connectors(dict(student.named_parameters())).values())
        stones = list(range(1, len(trainer.block_map) + 1))
        choose_stones(args.stepping_stones, len(stones), args.stones_per_step)  # refuses what training would refuse
        batches = [labelled_batch(trainer, size, sequence_length) for size in (1, 2)]
        chunk_as_at(trainer, batch_size, batches[0])

        def measure(chosen: Sequence[int]) -> tuple[float, float]:
            one, two = (count_step(trainer, chosen, batch) for batch in batches)
            # Some of the cost, such as position biases, is not per example.
            flops, activations = (a + (batch_size - 1) * (b - a) for a, b in zip(one, two, strict=True))
            return flops, activations

        def cost(name: str, flops: float, activations: float, trained: Sequence[int]) -> StepCost:
            connectors = [parameter for i in trained for parameter in trainer.connectors[i - 1].parameters()]
            gradients = _bytes(parameter for parameter in (*own, *connectors) if parameter.requires_grad)
            weights = _bytes((*own, *teacher.parameters(), *trainer.connectors.parameters()))
            return StepCost(name, flops, weights, gradients, 2 * gradients, activations)

        plain = measure([])
        # A stone adds the same beside others as alone, so the mean over all draws follows from those of the stones.
        alone = {i: measure([i]) for i in stones}
        flops = {i: one - plain[0] for i, (one, _) in alone.items()}
        activations = {i: one - plain[1] for i, (_, one) in alone.items()}
        shares = sampling_shares(
            stone_weights(stones, len(stones), args.stone_weighting),
            trainer.pair.stones.suffix_layers,
            args.stone_sampling,
        )
        drawn = min(args.stones_per_step, len(stones))
        odds = inclusion_odds(shares, drawn)

        def part(name: str, flops: float, activations: float, trained: Sequence[int]) -> StepCost:
            """The cost where stones, on all examples and at every step, would add so much."""
            return cost(
                name,
                plain[0] + flops * args.stone_fraction / args.stones_every,
                plain[1] + activations * args.stone_fraction,
                trained,
            )

        def mean(values: dict[int, float], by: dict[int, float]) -> float:
            return sum(by[i] * values[i] for i in stones)

        def together(chosen: list[int]) -> tuple[float, float]:
            flops, activations = measure(chosen)
            return flops - plain[0], activations - plain[1]

        steps = {
            "none": cost("plain KD", *plain, []),
            "share": part("shared examples", mean(flops, shares), mean(activations, shares), stones),
            "sample": part(
                f"sampled stones ({drawn} of {len(stones)})",
                mean(flops, odds),
                sum(sorted(activations.values())[-drawn:]),
                stones,
            ),
        }
        if len(stones) > 2:
            steps["last_two"] = part("last two stones", *together(stones[-2:]), stones[-2:])
        steps["all"] = part("all stones", *together(stones), stones)
        chosen = "none" if args.objective == "kd" or args.stone_weight == 0 else args.stepping_stones
        if chosen == "last_two" and len(stones) <= 2:
            chosen = "all"
        if isinstance(chosen, list):
            names = ", ".join(map(str, chosen))
            steps[names] = part(f"stones {names}", *together(chosen), chosen)
            chosen = names
        return Plan(
            block_map=trainer.block_map,
            student_parameters=sum(parameter.numel() for parameter in own),
            teacher_parameters=sum(parameter.numel() for parameter in teacher.parameters()),
            stones=tuple(
                StoneCost(i, _describe(connector), sum(p.numel() for p in connector.parameters()), added)
                for i, connector, added in zip(stones, trainer.connectors, flops.values(), strict=True)
            ),
            batch_size=batch_size,
            example=tuple(batches[0][student.main_input_name].shape[1:]),
            steps=tuple(steps.values()),
            chosen=steps[chosen],
        )


def _bytes(parameters: Iterable[nn.Parameter]) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in parameters)


def _describe(connector: nn.Module) -> str:
    if isinstance(connector, BridgedConnector):
        return f"{_describe(connector.width)}, {connector.bridge}"
    layers = [layer for layer in connector.modules() if isinstance(layer, nn.Linear)]
    kind = "mlp" if len(layers) > 1 else "identity" if isinstance(connector, ResidualConnector) else "linear"
    return f"{kind} {layers[0].in_features} -> {layers[-1].out_features}"


def _si(number: float) -> str:
    """`1234567` -> `"1.23 M"`: three digits and a decimal prefix."""
    for prefix in ("", "k", "M", "G", "T", "P"):
        if abs(number) < 999.5 or prefix == "P":
            break
        number /= 1000
    return f"{number:#.3g}".rstrip(".") + f" {prefix}"


def _table(rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """Columns of equal width: the first `left` ones flush left, the others right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            f"{cell:<{width}}" if column < left else f"{cell:>{width}}"
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )
