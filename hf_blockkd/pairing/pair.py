"""A student and a teacher that fit together, and everything that stands between them: `Pair`."""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..connectors.geometry import Geometry
from ..connectors.maps import make_connectors
from ..losses.top_k import CAPTURED_IDS, CAPTURED_LOG_PROBS
from ..models.adapters import base_of
from ..models.classes import is_headless
from ..models.compiling import check_not_compiled
from ..models.heads import find_head
from ..models.pooling import Pooling
from ..models.quantized import keep_gradients
from ..routing.forwards import forward_parameters
from ..routing.head_positions import head_positions
from ..routing.layers import find_layer_stack
from ..routing.logits import without_the_rest
from .blocks import BlockMap
from .compatibility import check_models
from .configs import check_tokens, token_fields
from .decoder_inputs import decoder_ids, makes_decoder_ids
from .distilled_rows import DISTILL_MASK, distilled_rows, rows_of_logits
from .embeddings import Embeddings
from .paths import MixedPaths
from .positions import position_mask
from .shared_prefix import SharedPrefix
from .stepping_stones import SteppingStones
from .tables import IndexTables
from .tasks import Task
from .vocabularies import check_vocabularies

NOT_FOR_MODELS = (DISTILL_MASK, CAPTURED_IDS, CAPTURED_LOG_PROBS)
"""What a batch may hold for the losses alone; models that take anything by name would be asked about it."""


class Pair:
    """Student, frozen teacher, block map, connectors and stepping stones of one run, checked to fit together.

    Args:
        student: The student; a PEFT model stands for its base model.
        teacher: The teacher, a PEFT model likewise. It is frozen and put into eval mode.
        processing_class: The tokenizer of the run, to be compared with the teacher's.
        num_blocks: Number of blocks that both are cut into, where no boundaries are given.
        student_boundaries: Exclusive end layer of each of the student's blocks.
        teacher_boundaries: Likewise for the teacher.
        student_layers_path: Dotted name of the student's stack of layers, where it is not to be searched.
        teacher_layers_path: Likewise for the teacher.
        connector: Kind of connector (`make_connector`).
        needs_paths: Whether hybrids may go from the teacher back into the student.
        recompute: Whether the teacher's layers keep their inputs alone for the backward of a hybrid.
        seed: Connectors are drawn from it.
        pooling: Of the states of models without a head: see `Embeddings`.
        embedding_loss: Likewise.

    Attributes:
        student: The student, without its adapter's wrapper.
        teacher: The frozen teacher.
        block_map: The cut of both.
        connectors: One for each stone, at least in float32; none of them trains before `train_connectors`.
        geometry: How the student's states stand on the image, and how the teacher's.
        back: Connectors from the teacher's width to the student's, where there are paths.
        embeddings: The pooled states of models without a head, `None` for others.
        all_connectors: All of these, and that of the pooled states.
        stones: The stepping stones.
        paths: The other hybrids, where they are needed.
        prefix: The frozen first layers that both have in common.
        trained_stones: Indices of the connectors that take part in training.
        is_copy: Whether the student was cut out of a teacher at its whole width (`make_student`).
        fitted_stones: Those that begin, or began, a run at a fit to its data (`hf_blockkd.training.connector_start`).
        task: What both heads predict.
        tasks: `"student"` and `"teacher"` -> what each head says of it.
        tables: `"student"` and `"teacher"` -> the tables that indices of a batch are looked up in.
        head_positions: Which of its last states the teacher's head reads, where it has one row per example.
        student_head: The student's head where it can be applied by itself, to be called on chunks of tokens.
        teacher_head: Likewise.

    Raises:
        ValueError: If anything does not fit; nothing is trained or written by then.
        UnsupportedArchitectureError: If a model has no stack of layers.
    """

    def __init__(
        self,
        student: PreTrainedModel,
        teacher: PreTrainedModel,
        processing_class: Any = None,
        *,
        num_blocks: int = 4,
        student_boundaries: list[int] | None = None,
        teacher_boundaries: list[int] | None = None,
        student_layers_path: str | None = None,
        teacher_layers_path: str | None = None,
        connector: str = "auto",
        needs_paths: bool = False,
        recompute: bool = False,
        seed: int = 42,
        pooling: str | None = None,
        embedding_loss: str = "cosine",
    ) -> None:
        student, teacher = base_of(student), base_of(teacher)
        check_not_compiled(student, "model")
        check_not_compiled(teacher, "teacher_model")
        for model in (student, teacher):
            keep_gradients(model)
        check_models(student, teacher)
        check_vocabularies(student, teacher, processing_class)
        student_stack = find_layer_stack(student, student_layers_path)
        teacher_stack = find_layer_stack(teacher, teacher_layers_path)
        depths = len(student_stack), len(teacher_stack)
        try:
            self.block_map = BlockMap.cut(*depths, num_blocks, student_boundaries, teacher_boundaries)
        except ValueError as error:
            names = f"Student {type(student).__name__} and teacher {type(teacher).__name__}"
            raise ValueError(f"{names} cannot be cut like this: {error}") from error
        self.trained_stones: list[int] = []
        self.fitted_stones: list[int] = []
        ends = self.block_map.student, self.block_map.teacher
        self.geometry = Geometry(student, student_stack, teacher, teacher_stack, *ends)
        ours, theirs = self.geometry.widths
        dtype = torch.promote_types(student.dtype, torch.float32)
        # Of a student that was cut out of a teacher (`make_student`).
        cut = getattr(student, "cut", None)
        channels = None if cut is None else cut.channels
        self.is_copy = cut is not None and ours == theirs
        self._ends_of_maps = (ours, theirs), (seed, channels), dtype
        self.connectors = self._new_connectors(connector).requires_grad_(False)
        self.teacher = teacher.requires_grad_(False).eval()
        self.stones = SteppingStones(student_stack, teacher, teacher_stack, self.block_map, self.connectors, recompute)
        self.paths, self.back = None, nn.ModuleList()
        if needs_paths:
            self.back = self._new_connectors(connector, back=True)
            self.paths = MixedPaths(student_stack, teacher_stack, self.block_map, self.connectors, self.back, recompute)
        self.embeddings: Embeddings | None = None
        if is_headless(teacher):
            options = pooling, embedding_loss, connector, seed + 2
            self.embeddings = Embeddings(student, teacher, self.geometry.logits_shapes, *options)
        pooled = [] if self.embeddings is None or self.embeddings.connector is None else [self.embeddings.connector]
        self.all_connectors = nn.ModuleList([*self.connectors, *self.back, *pooled])
        self.prefix = SharedPrefix(student, student_stack, teacher, teacher_stack, limit=len(student_stack) - 1)
        self.task = Task.of(student)
        if self.embeddings is not None:
            self.task = replace(self.task, label_dims=1)
        elif self.task.form is None:
            self.task = replace(self.task, label_dims=len(self.geometry.logits_shapes["student"]))
        self.tasks = {"student": self.task, "teacher": Task.of(teacher)}
        is_one_row = self.embeddings is None and self.task.form is None and self.task.label_dims == 1
        self.head_positions = head_positions(teacher, teacher_stack) if is_one_row else None
        if self.embeddings is None:
            _check_rows_of_logits(self.task, student, teacher, self.geometry)
        self.student_head = find_head(student) if self.task.over_vocabulary else None
        self.teacher_head = find_head(teacher) if self.task.over_vocabulary else None
        self.student = student
        self.tables = {
            "student": IndexTables(student, student_stack),
            "teacher": IndexTables(teacher, teacher_stack),
        }
        self._parameters = {
            "student": forward_parameters(student),
            "teacher": forward_parameters(teacher),
        }
        # Not set in its config, which student and teacher may share, and which is the person's.
        self._teacher_options = without_the_rest(teacher)
        self._tokens: list[Any] = []
        self._check_tokens()
        self._makes_decoder_ids = makes_decoder_ids(student)

    def _new_connectors(self, kind: str, back: bool = False) -> nn.ModuleList:
        """Connectors as they are made, one behind each of the student's blocks, or back, behind all but the last."""
        (ours, theirs), (seed, channels), dtype = self._ends_of_maps
        if back:
            ours, theirs, seed = theirs[:-1], ours[:-1], seed + 1
        return self.geometry.bridge(make_connectors(kind, ours, theirs, seed, channels).to(dtype), back)

    def new_paths(self) -> MixedPaths:
        """Hybrids of any kind through maps of their own, which nothing has trained or fitted."""
        stacks = self.stones.student_stack, self.stones.teacher_stack
        maps = (self._new_connectors("auto", back).requires_grad_(False) for back in (False, True))
        return MixedPaths(*stacks, self.block_map, *maps)

    def with_student(self, student: PreTrainedModel) -> Pair:
        """The same pair with another student of the same form, such as one into which an adapter was merged."""
        other = copy.copy(self)
        other.student, stones = student, self.stones
        stack = find_layer_stack(student, stones.student_stack.search_path)
        other.stones = SteppingStones(stack, self.teacher, stones.teacher_stack, self.block_map, self.connectors)
        return other

    def train_connectors(self, stones: Collection[int], trains: bool = True) -> None:
        """Let the connectors of these stones train, and no others, or take part as they are.

        Args:
            stones: Rising indices, from 1 to n.
            trains: Whether they change.
        """
        self.trained_stones = list(stones)
        drop = getattr(self.student.config, "layerdrop", 0)
        if drop and self.trained_stones:
            raise ValueError(
                f"`layerdrop` is {drop} in the config of the student {type(self.student).__name__}, whose forward then "
                "skips layers that stepping stones read; set it to 0."
            )
        for index, connector in enumerate(self.connectors, start=1):
            connector.requires_grad_(trains and index in self.trained_stones)
        # A stone reads what the student has computed itself.
        depth = len(self.stones.student_stack)
        first = self.block_map.student[self.trained_stones[0] - 1] if self.trained_stones else depth
        self.prefix.limit = min(first, depth - 1)

    def logits(self, role: str, outputs: Any, inputs: Mapping[str, Any]) -> torch.Tensor:
        """What of a forward is compared: `Task.logits`, or the vectors of models without a head.

        Args:
            role: The model whose head, or pooling, the forward ended in, `"student"` or `"teacher"`.
            outputs: What it returned.
            inputs: What it got.
        """
        return self.task.logits(outputs) if self.embeddings is None else self.embeddings.vectors(role, outputs, inputs)

    @cached_property
    def is_student_frozen(self) -> bool:
        """Whether no weight of the student trains, its adapters included; asked for when training begins."""
        ours = {id(parameter) for parameter in self.all_connectors.parameters()}  # which may be on it
        return not any(p.requires_grad for p in self.student.parameters() if id(p) not in ours)

    @property
    def pooling(self) -> Pooling | None:
        """How the states of a student without a head become vectors."""
        return None if self.embeddings is None else self.embeddings.poolings["student"]

    @property
    def columns(self) -> list[str]:
        """What the forward of either model takes by name."""
        return list({**self._parameters["student"], **self._parameters["teacher"]})

    @property
    def common_classes(self) -> int:
        """Number of tokens that both vocabularies have, which may differ by padding."""
        return min(self.teacher.get_output_embeddings().weight.shape[0], self.task.num_classes)

    def complete(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Add the decoder's inputs to a batch that leaves them to be made of the labels: our forwards see no labels.

        Labels get the dtype that the models' own losses take. The connectors are fitted to the size of its images.
        """
        self.geometry.fit(inputs)
        return self._with_decoder_inputs(self.task.typed(inputs))

    def position_mask(self, inputs: Mapping[str, Any], states: torch.Tensor) -> torch.Tensor | None:
        """Which positions of the student's hidden states are no padding: see `position_mask`."""
        return position_mask(self.student, self.stones.student_stack.path, inputs, states)

    def distilled_rows(self, inputs: Mapping[str, Any], everywhere: bool = False) -> torch.Tensor:
        """Which rows are compared with the teacher's: see `distilled_rows`."""
        return distilled_rows(self.student, self.task, inputs, everywhere)

    def rows_of_logits(self, inputs: Mapping[str, Any], logits: torch.Tensor) -> torch.Tensor:
        """Which rows are distilled where labels have another form: see `rows_of_logits`."""
        return rows_of_logits(self.student, inputs, logits)

    def count(self, inputs: Mapping[str, Any], everywhere: bool = False) -> torch.Tensor:
        """Number of rows of a batch that have a label, and that are distilled: (2, label sets).

        Where labels have another form than logits, what the student's own loss is a mean over, and the examples.
        """
        if self.task.form is not None:
            count = self.task.count(inputs)
            return torch.stack([count, torch.full_like(count, len(inputs["labels"]))])[:, None]
        distilled = self.distilled_rows(inputs, everywhere)
        counts = self.task.count(inputs).reshape(-1)
        return torch.stack([counts, distilled.reshape(len(counts), -1).sum(1)])

    def _with_decoder_inputs(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        if self._makes_decoder_ids and inputs.get("labels") is not None and "decoder_input_ids" not in inputs:
            return {**inputs, "decoder_input_ids": decoder_ids(self.student, inputs["labels"])}
        return dict(inputs)

    def check_batch(self, inputs: Mapping[str, Any], roles: Collection[str] = ("student", "teacher")) -> None:
        """Raise a `ValueError` for what a model cannot look up in its tables, and for labels missing or unknown.

        Args:
            inputs: The batch.
            roles: The models that it is for.
        """
        self.task.check_labels(inputs)
        if "teacher" in roles:
            self._check_tokens()
            if self.task.over_vocabulary:
                self.tasks["teacher"].check_classes(inputs)
        self.check_tables(inputs, roles)

    def check_tables(self, inputs: Mapping[str, Any], roles: Collection[str] = ("student", "teacher")) -> None:
        """Raise a `ValueError` for what a model cannot look up in its tables; labels are not needed."""
        complete = self._with_decoder_inputs(inputs)
        for role in roles:
            self.tables[role].check(complete, role)

    def _check_tokens(self) -> None:
        """`check_tokens`, once more if the stock trainer has set fields of the student's to those of its tokenizer."""
        tokens = [token_fields(model) for model in (self.student, self.teacher)]
        if tokens != self._tokens:
            check_tokens(self.student, self.teacher)
            self._tokens = tokens

    def inputs_for(self, role: str, inputs: Mapping[str, Any], labels: bool = False) -> dict[str, Any]:
        """What of a batch goes to a model: what its forward names, and what neither names but it can take.

        The teacher is told to fill no cache, with which packed documents are no longer told apart, and to return no
        router logits.

        Args:
            role: `"student"` or `"teacher"`.
            inputs: The batch.
            labels: Whether labels go along.
        """
        own = self._parameters[role]
        other = self._parameters["teacher" if role == "student" else "student"]
        takes_more = any(parameter.kind is parameter.VAR_KEYWORD for parameter in own.values())
        own_inputs = {
            name: value
            for name, value in inputs.items()
            if (name in own or (takes_more and name not in other and name not in NOT_FOR_MODELS))
            and (labels or name not in self.task.label_names)
        }
        return self.geometry.for_teacher(own_inputs) | self._teacher_options if role == "teacher" else own_inputs


def _check_rows_of_logits(task: Task, student: PreTrainedModel, teacher: PreTrainedModel, geometry: Geometry) -> None:
    """Labels have rows of logits; where they have another form, what is compared row by row are the logits alone."""
    ours, theirs = geometry.logits_shapes.values()
    if task.form is None and len(ours) > 2:
        raise ValueError(
            f"{type(student).__name__} returns logits of shape {(1, *ours)} instead of a row of classes for "
            "each example or token, so that no labels can be paired with them; put another head on its encoder."
        )
    if task.form is not None and ours != theirs:
        names = [type(model).__name__ for model in (student, teacher)]
        raise ValueError(
            f"The student {names[0]} returns logits of shape {ours} for one example and the teacher {names[1]} of "
            f"shape {theirs}, so that they do not pair up row by row; choose a student whose head gives as many "
            "frames, pixels or queries, of as many classes."
        )
