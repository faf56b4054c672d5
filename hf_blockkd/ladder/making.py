"""From a pair of models to one of its stepping stones as a model: `stone_model`."""

from __future__ import annotations

import copy

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import logging

from ..connectors.geometry import IMAGES, resize
from ..connectors.maps import is_identity
from ..pairing.configs import same_beginning
from ..pairing.pair import Pair
from ..routing.dummy_inputs import dummy_inputs
from ..routing.errors import UnsupportedArchitectureError
from ..routing.forwards import in_eval_mode
from ..routing.layers import LayerStack
from ..routing.logits import main_outputs, without_the_rest
from ..students.student import make_student
from .stone_model import SteppingStone

logger = logging.get_logger(__name__)


def stone_model(pair: Pair, index: int, kind: str = "auto") -> PreTrainedModel:
    """A stepping stone as a model of its own, with copies of the weights.

    Layers that it does not run are left out where the models can be cut in depth. Where the connector is the identity
    and both models are of one class and shape, it is a plain model of that class. Either is compared with the hybrid
    that was trained, on made-up inputs, and taken only if every bit of the outputs is the same.

    Args:
        pair: Student, teacher and connectors.
        index: From 1 to n.
        kind: Of the connectors, as in the configuration.

    Returns:
        The model in eval mode: of the teacher's class, or a [`SteppingStone`].

    Raises:
        ValueError: If there is no such stone.
        UnsupportedArchitectureError: If the teacher's layers read more than hidden states of those before them.

    Example:
        ```python
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> from hf_blockkd.ladder.making import stone_model
        >>> from hf_blockkd.pairing.pair import Pair
        >>> shape = dict(n_head=2, vocab_size=99)
        >>> teacher = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=4, **shape))
        >>> student = GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=2, **shape))
        >>> stone = stone_model(Pair(student, teacher, num_blocks=2), 1)
        >>> len(stone.body_stack), len(stone.tail_stack)
        (1, 2)

        ```
    """
    if not 1 <= index <= len(pair.block_map):
        raise ValueError(f"There is no stepping stone {index}; choose one from 1 to {len(pair.block_map)}.")
    inputs, expected = _as_trained(pair, index)
    for make in (_plain, _shortened):
        try:
            model = make(pair, index, kind)
            if model is not None and all(map(torch.equal, _outputs(model, inputs), expected)):
                return model.eval().requires_grad_(True)
        except Exception as error:  # whatever a family raises that cannot be cut
            logger.info(f"Stepping stone {index} keeps the layers that it does not run: {error!r}")
    ends = pair.block_map.student[index - 1], pair.block_map.teacher[index - 1]
    models = copy.deepcopy(pair.student), copy.deepcopy(pair.teacher)
    whole = _stone(pair, index, models, ends, kind).eval()
    if not all(map(_are_close, _outputs(whole, inputs), expected)):
        raise UnsupportedArchitectureError(
            f"Stepping stone {index} of {type(pair.teacher).__name__} does not answer as it did in training when it is "
            "a model of its own; save the student, or set `eval_stepping_stones` to evaluate it."
        )
    return whole.requires_grad_(True)


def _shortened(pair: Pair, index: int, kind: str) -> SteppingStone:
    """The stone without the layers that it does not run."""
    exit, entry = pair.block_map.student[index - 1], pair.block_map.teacher[index - 1]
    ours, theirs = pair.stones.student_stack, pair.stones.teacher_stack
    # A model without layers is none: of the last stone's teacher, one stays that is not run.
    start = min(entry, len(theirs) - 1)
    parts = _part(pair.student, ours, range(exit)), _part(pair.teacher, theirs, range(start, len(theirs)))
    return _stone(pair, index, parts, (exit, entry - start), kind)


def _stone(
    pair: Pair, index: int, parts: tuple[PreTrainedModel, PreTrainedModel], ends: tuple[int, int], kind: str
) -> SteppingStone:
    paths = pair.stones.student_stack.search_path, pair.stones.teacher_stack.search_path
    stone = SteppingStone(*parts, *ends, kind, *paths)
    stone.connector.load_state_dict(pair.connectors[index - 1].state_dict())
    return stone


def _part(model: PreTrainedModel, stack: LayerStack, layers: range) -> PreTrainedModel:
    """A model with some of its layers; all else is the same."""
    return make_student(model, layers=list(layers), layers_path=stack.search_path, dtype=model.dtype)


def _plain(pair: Pair, index: int, kind: str) -> PreTrainedModel | None:
    """The teacher with its first blocks, and all that comes before them, replaced by the student's."""
    exit, entry = pair.block_map.student[index - 1], pair.block_map.teacher[index - 1]
    theirs = pair.stones.teacher_stack
    depths = len(pair.stones.student_stack), len(theirs)
    is_one_class = type(pair.student) is type(pair.teacher) and exit <= entry
    # Longer inputs than the made-up ones may tell a window or a scale of positions apart.
    if not (
        is_one_class
        and is_identity(pair.connectors[index - 1])
        and same_beginning(pair.student, pair.teacher, depths, exit, in_training=False)
    ):
        return None
    layers = [*range(exit), *range(entry, len(theirs))]
    untied = {"tie_word_embeddings": False} if pair.teacher.get_output_embeddings() is not None else {}
    plain = make_student(
        pair.teacher, layers=layers, layers_path=theirs.search_path, dtype=pair.teacher.dtype, **untied
    )
    replaced = [f"{theirs.path}.{layer}" for layer in range(exit)] + _before(pair.teacher, theirs)
    state = {
        name: tensor
        for name, tensor in pair.student.state_dict().items()
        if any(name.startswith(f"{module}.") for module in replaced)
    }
    plain.load_state_dict(state, strict=False)
    return plain


@torch.no_grad()
def _before(model: PreTrainedModel, stack: LayerStack) -> list[str]:
    """Names of the modules that a forward calls, and leaves, before the first layer."""
    names, left = {module: name for name, module in model.named_modules()}, []
    has_begun = False

    def leave(module: nn.Module, *_: object) -> None:
        if not has_begun:
            left.append(names[module])

    def begin(*_: object) -> None:
        nonlocal has_begun
        has_begun = True

    handles = [module.register_forward_hook(leave) for module in model.modules()]
    handles.append(stack.layers[0].register_forward_pre_hook(begin))
    try:
        with in_eval_mode(model):
            model(**dummy_inputs(model))
    finally:
        for handle in handles:
            handle.remove()
    return left


@torch.no_grad()
def _as_trained(pair: Pair, index: int) -> tuple[dict[str, torch.Tensor], tuple[torch.Tensor, ...]]:
    """Inputs, and what the hybrid makes of them."""
    inputs = _made_up(pair)
    with in_eval_mode(pair.student), pair.stones.capture([index]) as states:
        pair.student(**{**pair.inputs_for("student", inputs), **without_the_rest(pair.student)})
    teacher_inputs = pair.inputs_for("teacher", inputs)
    _, extras = pair.stones.teach(teacher_inputs)
    return inputs, main_outputs(pair.stones.run(index, states, teacher_inputs, extras))


def _made_up(pair: Pair) -> dict[str, torch.Tensor]:
    """Inputs of both models: tokens that both know, and images of the size of the run's."""
    inputs = dummy_inputs(pair.teacher)
    try:
        pair.check_tables(inputs)
    except ValueError:
        inputs = dummy_inputs(pair.student)
    if pair.geometry.size is not None:
        inputs[IMAGES] = resize(inputs[IMAGES], pair.geometry.size)
    return inputs


@torch.no_grad()
def _outputs(model: PreTrainedModel, inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
    with in_eval_mode(model):
        return main_outputs(model(**inputs))


def _are_close(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    """Whether two outputs differ by no more than sums in another order do, also in bfloat16."""
    usual = theirs.abs().float().nanmedian().item()  # some heads give -inf, or as little as there is, to some classes
    return ours.shape == theirs.shape and torch.allclose(ours, theirs, rtol=0.02, atol=0.1 * usual, equal_nan=True)
