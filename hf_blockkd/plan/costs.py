"""What a distillation will cost, before anything trains: `make_plan`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel

from ..config import BlockwiseDistillConfig
from ..connectors.attached import without_connectors
from ..connectors.bridges import BridgedConnector
from ..connectors.maps import ResidualConnector
from ..objectives.block_kd import BlockKD
from ..objectives.sampling import choose_stones, inclusion_odds, sampling_shares, stone_weights
from ..pairing.blocks import BlockMap
from .counting import assume_fitted, count_stones, counting_trainer, prepare_batches
from .objectives import OTHERS, objective_cost
from .step_cost import StepCost, extended, step_cost
from .tables import si, table


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
class Plan:
    """What `make_plan` found out; `print` shows it as tables.

    Attributes:
        block_map: The cut of both stacks.
        student_parameters: Number of the student's parameters, connectors excluded.
        teacher_parameters: Number of the teacher's.
        stones: One entry per stepping stone.
        batch_size: Examples in a step.
        example: Shape of one example of the main input: (T,) tokens or (C, H, W) pixels.
        steps: Plain KD, shared examples, sampled stones, the last two of several stones, all stones, the chosen stones
            where they are none of these, errors of states without a stone, and the other objectives.
        chosen: Which of `steps` the arguments ask for.
        refused: Objective -> why these models cannot train on it.
    """

    block_map: BlockMap
    student_parameters: int
    teacher_parameters: int
    stones: tuple[StoneCost, ...]
    batch_size: int
    example: tuple[int, ...]
    steps: tuple[StepCost, ...]
    chosen: StepCost
    refused: dict[str, str]

    def __str__(self) -> str:
        plain = self.steps[0]
        ratio = self.teacher_parameters / self.student_parameters
        stones = [("stone", "connector", "parameters", "FLOPs it adds")]
        stones += [(str(s.index), s.connector, f"{s.parameters:,}", si(s.flops)) for s in self.stones]
        steps = [("setting", "FLOPs", "ratio", "weights", "gradients", "AdamW", "activations", "memory", "ratio")]
        for step in self.steps:
            parts = (step.parameters, step.gradients, step.optimizer, step.activations, step.memory)
            steps.append(
                (
                    step.name + (" *" if step is self.chosen else ""),
                    si(step.flops),
                    f"{step.flops / plain.flops:.2f}",
                    *(f"{si(part)}B" for part in parts),
                    f"{step.memory / plain.memory:.2f}",
                )
            )
        example = f"{self.example[0]} tokens" if len(self.example) == 1 else " x ".join(map(str, self.example))
        return "\n\n".join(
            (
                f"Block map\n{self.block_map}",
                f"Stepping stones\n{table(stones, left=2)}",
                f"Parameters\nteacher  {self.teacher_parameters:>15,}\nstudent  {self.student_parameters:>15,}  "
                f"(the teacher is {ratio:.2f} times as large)",
                f"One training step, batch size {self.batch_size}, examples of {example}, the chosen setting marked *\n"
                f"{table(steps)}",
                "FLOPs are counted, not estimated: the trainer's own loss was computed and differentiated on dummy\n"
                "examples, at batch sizes 1 and 2, and is extended from there. A multiply-add is 2 FLOPs; only matrix\n"
                "products, convolutions and attention count. Activations are what this run kept for its backward;\n"
                "what is freed before comes on top. FLOPs are those of the mean draw and the mean step, the\n"
                "memory of what is drawn that of the largest draw. Errors of states count where they train. A teacher\n"
                "cache saves the clean pass on top, a frozen prefix that both models share its layers.",
                *(f"`{name}` is not counted: {reason}" for name, reason in self.refused.items()),
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
    stones, with each stone alone and with all of them, and under every other objective. Every position of a text has a
    label, and activation checkpointing is off.

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
        >>> [step.name for step in plan.steps][:5]
        ['plain KD', 'shared examples', 'sampled stones (1 of 2)', 'all stones', 'states, no stones']

        ```
    """
    for name, value in (("batch_size", batch_size), ("sequence_length", sequence_length)):
        if value is not None and value < 1:
            raise ValueError(f"`{name}` must be at least 1, but is {value}.")
    every = {"objective": "block_kd", "stepping_stones": "all", "stone_fraction": 1.0, "stones_every": 1}
    with counting_trainer(student, teacher, args, **every, stone_weight=1.0, state_weight=0.0) as trainer:
        own = without_connectors(dict(student.named_parameters()))
        stones = list(range(1, len(trainer.block_map) + 1))
        asked = choose_stones(args.stepping_stones, len(stones), args.stones_per_step)
        assume_fitted(trainer, args)
        objective = BlockKD(args)
        compared = objective.state_blocks(len(stones)) if objective.compares_states(trainer.pair) else []
        batches = prepare_batches(trainer, batch_size, sequence_length)

        def measure(chosen: Sequence[int], stone_weight: float = 1.0, state_weight: float = 0.0) -> tuple[float, float]:
            weights = stone_weight, state_weight
            return extended([count_stones(trainer, chosen, batch, *weights) for batch in batches], batch_size)

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

        def states_of(trained: Sequence[int]) -> list[int]:
            """Blocks after which states are compared where these stones run."""
            return list(compared if args.state_blocks is not None or not compared else trained)

        with_states = {
            tuple(some): measure(some, 0.0, 1.0) if some else plain
            for some in (compared, *map(states_of, (stones, stones[-2:], asked)))
        }

        def part(name: str, flops: float, activations: float, trained: Sequence[int]) -> StepCost:
            """The cost where stones, on all examples and at every step, would add so much."""
            blocks = states_of(trained)
            base = with_states[tuple(blocks)]
            flops = base[0] + flops * args.stone_fraction / args.stones_every
            connectors = [trainer.connectors[i - 1] for i in sorted({*trained, *blocks})]
            return step_cost(name, trainer, flops, base[1] + activations * args.stone_fraction, connectors)

        def mean(values: dict[int, float], by: dict[int, float]) -> float:
            return sum(by[i] * values[i] for i in stones)

        def together(name: str, chosen: list[int]) -> StepCost:
            flops, activations = measure(chosen)
            return part(name, flops - plain[0], activations - plain[1], chosen)

        steps = {
            "none": step_cost("plain KD", trainer, *plain, []),
            "share": part("shared examples", mean(flops, shares), mean(activations, shares), stones),
            "sample": part(
                f"sampled stones ({drawn} of {len(stones)})",
                mean(flops, odds),
                sum(sorted(activations.values())[-drawn:]),
                stones,
            ),
        }
        if len(stones) > 2:
            steps["last_two"] = together("last two stones", stones[-2:])
        steps["all"] = together("all stones", stones)
        chosen = args.stepping_stones
        if chosen in ("auto", "last_two"):
            chosen = "last_two" if len(stones) > 2 else "all"
        if isinstance(chosen, list):
            chosen = ", ".join(map(str, asked))
            steps[chosen] = together(f"stones {chosen}", asked)
        if compared:
            steps["states"] = part("states, no stones", 0.0, 0.0, compared)
        if not objective.stones_where(bool(compared), len(stones)):
            chosen = "states" if compared else "none"
        refused = {}
        for name in dict.fromkeys((*OTHERS, args.objective)):
            if name in ("block_kd", "kd"):
                continue
            try:
                steps[name] = objective_cost(student, teacher, args, name, batch_size, sequence_length)
            except ValueError as error:
                if name == args.objective:
                    raise
                refused[name] = str(error)
        if args.objective != "block_kd":
            chosen = "none" if args.objective == "kd" else args.objective
        return Plan(
            block_map=trainer.block_map,
            student_parameters=sum(parameter.numel() for parameter in own.values()),
            teacher_parameters=sum(parameter.numel() for parameter in teacher.parameters()),
            stones=tuple(
                StoneCost(i, _describe(connector), sum(p.numel() for p in connector.parameters()), added)
                for i, connector, added in zip(stones, trainer.connectors, flops.values(), strict=True)
            ),
            batch_size=batch_size,
            example=tuple(batches[0][student.main_input_name].shape[1:]),
            steps=tuple(steps.values()),
            chosen=steps[chosen],
            refused=refused,
        )


def _describe(connector: nn.Module) -> str:
    if isinstance(connector, BridgedConnector):
        return f"{_describe(connector.width)}, {connector.bridge}"
    layers = [layer for layer in connector.modules() if isinstance(layer, nn.Linear)]
    # An identity at first, which trains by a linear map beside it.
    one = "identity + linear" if isinstance(connector, ResidualConnector) else "linear"
    kind = "mlp" if len(layers) > 1 else one
    return f"{kind} {layers[0].in_features} -> {layers[-1].out_features}"
