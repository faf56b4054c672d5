"""The hybrids of student and teacher: `SteppingStones`."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from ..connectors.maps import connect
from ..routing.entering import Extras, capture_states, enter_at, record_extras
from ..routing.examples import take_examples
from ..routing.layers import LayerStack
from .blocks import BlockMap
from .gradient_scale import GradientScale


class SteppingStones:
    """The hybrids N_1, ..., N_n of a student and a frozen teacher (Yu et al., 2024, arXiv 2411.01547).

    They are models between both, to measure blocks by and to keep (`objective="ladder"`). To train a student through
    them brought nothing next to errors of states in any measurement (examples/benchmarks/README.md).

    Stone i is the student's blocks 1..i, connector i, the teacher's blocks i+1..n, and the teacher's norm, pooling and
    head. Gradients flow through the teacher's layers into the connector and the student; the teacher's own weights get
    none.

    Args:
        student_stack: The student's layers.
        teacher: The teacher, in eval mode and frozen.
        teacher_stack: Its layers.
        block_map: The cut of both.
        connectors: One module per stone, from the student's to the teacher's width.
        recompute: Whether the teacher's layers compute their activations once more in backward, instead of keeping
            them.

    Example:
        ```python
        >>> import torch
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> from hf_blockkd import BlockMap, find_layer_stack
        >>> from hf_blockkd.pairing.stepping_stones import SteppingStones
        >>> model = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=99)).eval()
        >>> stack = find_layer_stack(model)
        >>> identity = torch.nn.ModuleList([torch.nn.Identity(), torch.nn.Identity()])
        >>> stones = SteppingStones(stack, model, stack, BlockMap.even(2, 2, 2), identity)
        >>> inputs = {"input_ids": torch.tensor([[1, 2, 3]])}
        >>> clean, extras = stones.teach(inputs)
        >>> with stones.capture([1]) as states:
        ...     _ = model(**inputs)
        >>> torch.equal(stones.run(1, states, inputs, extras).logits, clean.logits)
        True

        ```
    """

    def __init__(
        self,
        student_stack: LayerStack,
        teacher: PreTrainedModel,
        teacher_stack: LayerStack,
        block_map: BlockMap,
        connectors: nn.ModuleList,
        recompute: bool = False,
    ) -> None:
        self.student_stack = student_stack
        self.teacher = teacher
        self.teacher_stack = teacher_stack
        self.block_map = block_map
        self.connectors = connectors
        self.recompute = recompute

    def __len__(self) -> int:
        return len(self.block_map)

    @property
    def suffix_layers(self) -> dict[int, int]:
        """Number of teacher layers that each stone runs."""
        return {i: len(self.teacher_stack) - end for i, end in enumerate(self.block_map.teacher, start=1)}

    @torch.no_grad()
    def teach(self, inputs: Mapping[str, Any]) -> tuple[ModelOutput, Extras]:
        """The teacher's clean forward.

        Returns:
            Its outputs, and what its layers returned besides their hidden states, which `run` needs.
        """
        with self.record() as extras:
            outputs = self.teacher(**inputs)
        return outputs, extras

    @contextmanager
    def record(self) -> Iterator[Extras]:
        """Record what `enter` needs of a clean forward of the teacher that runs inside the context."""
        with record_extras(self.teacher_stack) as extras:
            yield extras

    @contextmanager
    def capture(self, indices: Collection[int]) -> Iterator[dict[int, torch.Tensor]]:
        """Capture what leaves the student's blocks `indices`, while its forward runs inside the context.

        Yields:
            A dictionary that the forward fills: end layer of the block -> hidden states.
        """
        with capture_states(self.student_stack, [self.block_map.student[i - 1] for i in indices]) as states:
            yield states

    @contextmanager
    def enter(
        self,
        index: int,
        states: Mapping[int, torch.Tensor],
        extras: Extras,
        examples: torch.Tensor | None = None,
        scale: GradientScale | None = None,
    ) -> Iterator[None]:
        """Make the teacher's forward, run inside the context, that of stone `index`.

        Args:
            index: From 1 to n.
            states: From `capture`.
            extras: From `record`, around a clean forward on the whole batch.
            examples: Indices of the examples that the teacher's forward will get; default: all.
            scale: Of the gradients inside the teacher; what comes out must go through its `leave`.

        Raises:
            ValueError: If the student's forward skipped the end of the block (layer drop).
        """
        end = self.block_map.student[index - 1]
        if end not in states:
            raise ValueError(
                f"The student's forward did not call layer {min(end, len(self.student_stack) - 1)} of "
                f"{self.student_stack.path!r}, which stepping stone {index} reads; set `layerdrop` to 0 in its config."
            )
        num_examples = len(states[end])
        connected = connect(self.connectors[index - 1], take_examples(states[end], examples, num_examples))
        connected = connected if scale is None else scale.enter(connected)
        extras = take_examples(extras, examples, num_examples)
        depth = self.block_map.teacher[index - 1]
        with enter_at(self.teacher_stack, depth, connected, extras, recompute=self.recompute):
            yield

    def run(
        self, index: int, states: Mapping[int, torch.Tensor], inputs: Mapping[str, Any], extras: Extras
    ) -> ModelOutput:
        """Run stone `index`: `enter`, and the teacher's forward.

        Args:
            index: From 1 to n.
            states: From `capture`.
            inputs: What the teacher's clean forward got; with labels, the outputs hold the teacher's own loss, too.
            extras: From `teach`, on the same inputs.

        Returns:
            The outputs of the teacher's head.
        """
        with self.enter(index, states, extras):
            return self.teacher(**inputs)
