"""Frozen first layers that student and teacher have in common, computed once: `SharedPrefix`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from transformers import PreTrainedModel

from ..connectors.attached import MODULE_NAME
from ..routing.entering import Extras, capture_states, enter_at
from ..routing.forwards import untracked
from ..routing.layers import LayerStack
from .configs import same_beginning


class SharedPrefix:
    """The leading layers that the student need not run, because the teacher's clean pass has run them.

    A student of `make_student` whose embeddings and first layers are frozen computes what its teacher does. That is
    found out, not guessed: the weights are the same bits, nothing below is trainable, the configs agree in whatever
    could tell other batches apart, and the states of one are the same bits in train mode, so that dropout rules it out.

    Args:
        student: The student.
        student_stack: Its layers.
        teacher: The teacher, frozen and in eval mode.
        teacher_stack: Its layers.
        limit: Number of layers to share at most: what the first stepping stone reads must be the student's to compute.

    Attributes:
        depth: Number of layers shared, 0 until `find` has found some.
    """

    def __init__(
        self,
        student: PreTrainedModel,
        student_stack: LayerStack,
        teacher: PreTrainedModel,
        teacher_stack: LayerStack,
        limit: int,
    ) -> None:
        self.student, self.student_stack = student, student_stack
        self.teacher, self.teacher_stack = teacher, teacher_stack
        self.limit = limit
        self.depth = 0
        self._frozen: list[torch.Tensor] = []

    def find(self, student_inputs: Mapping[str, Any], teacher_inputs: Mapping[str, Any]) -> None:
        """Set `depth` by the forwards of both models on a batch; random state and statistics stay as they were."""
        self.depth = 0
        depths = range(1, self._equal_layers() + 1)
        if not depths:
            return
        device = self.student.device
        devices = [] if device.type == "cpu" else [device]
        with (
            torch.random.fork_rng(devices),
            capture_states(self.student_stack, depths) as own,
            untracked(self.student),
            torch.enable_grad(),
        ):
            self.student(**student_inputs)
        with torch.no_grad(), capture_states(self.teacher_stack, depths) as clean:
            self.teacher(**teacher_inputs)
        lengths = len(self.student_stack), len(self.teacher_stack)
        for depth in depths:
            # Texts that are longer than those of this batch may tell a window or a scale of positions apart.
            if not same_beginning(self.student, self.teacher, lengths, depth):
                break
            if own[depth].requires_grad or not torch.equal(own[depth], clean[depth]):
                break
            self.depth = depth
        above = {id(parameter) for parameter in self.student_stack.layers[self.depth :].parameters()}
        self._frozen = [p for p in self.student.parameters() if not p.requires_grad and id(p) not in above]

    def _equal_layers(self) -> int:
        """Number of leading layers that are frozen, with the teacher's weights; 0 if other frozen weights differ."""
        teacher = dict(_tensors(self.teacher))
        prefix = f"{self.student_stack.path}."
        first_other = self.limit
        for name, tensor in _tensors(self.student):
            layer = int(name.removeprefix(prefix).partition(".")[0]) if name.startswith(prefix) else None
            if name.startswith(f"{MODULE_NAME}.") or (layer is not None and layer >= first_other):
                continue
            twin = teacher.get(f"{self.teacher_stack.path}.{name.removeprefix(prefix)}" if layer is not None else name)
            same = twin is not None and _are_equal(tensor, twin)
            if same and not tensor.requires_grad:
                continue
            if layer is not None:
                first_other = layer
            elif not tensor.requires_grad:
                return 0
        return first_other

    @contextmanager
    def capture(self) -> Iterator[dict[int, torch.Tensor]]:
        """Capture what `enter` needs of the teacher's clean forward that runs inside the context."""
        if any(parameter.requires_grad for parameter in self._frozen):
            self.depth = 0  # somebody thawed them
        with capture_states(self.teacher_stack, [self.depth] if self.depth else []) as states:
            yield states

    @contextmanager
    def enter(self, states: Mapping[int, torch.Tensor], extras: Extras) -> Iterator[None]:
        """Spare the student's forward, run inside the context, the shared layers; without states, spare it nothing.

        Args:
            states: From `capture`.
            extras: From `record_extras`, around the same forward.
        """
        if not states:
            yield
            return
        with enter_at(self.student_stack, self.depth, states[self.depth], extras):
            yield


def _are_equal(tensor: torch.Tensor, other: torch.Tensor) -> bool:
    # Offloaded, sharded and quantized weights cannot be compared.
    plain = all(
        type(one.data) is torch.Tensor and not one.is_meta and not hasattr(one, "ds_id") for one in (tensor, other)
    )
    return tensor is other or (
        plain and tensor.dtype == other.dtype and torch.equal(tensor.data, other.data.to(tensor.device))
    )


def _tensors(model: PreTrainedModel) -> Iterator[tuple[str, torch.Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()
