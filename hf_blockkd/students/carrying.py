"""From the teacher's tensors to the student's: values, and the dtype of each."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Container, Sequence

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import logging

from ..models.loading import weights_of
from .narrowing import Narrowing

logger = logging.get_logger(__name__)


def main_dtype(model: nn.Module) -> torch.dtype:
    """The dtype of most of a model's weights; some keep a few weights in another one."""
    sizes: Counter[torch.dtype] = Counter()
    for parameter in model.parameters():
        if parameter.is_floating_point():
            sizes[parameter.dtype] += parameter.numel()
    return sizes.most_common(1)[0][0] if sizes else torch.get_default_dtype()


def compute_buffers(student: PreTrainedModel) -> PreTrainedModel:
    """Fill the buffers of modules without weights once more, in the default dtype, as `from_pretrained` does it.

    Args:
        student: Built in another dtype, in which what its buffers are made of was computed and rounded.
    """
    for module in student.modules():
        if any(True for _ in module.buffers()) and not any(True for _ in module.parameters()):
            module._is_hf_initialized = False
    student.initialize_weights()
    return student


@torch.no_grad()
def carry_over(
    teacher: PreTrainedModel,
    student: PreTrainedModel,
    path: str,
    chosen: Sequence[int],
    same_fields: bool,
    narrowing: Narrowing | None = None,
) -> None:
    """Give a student the teacher's weights and buffers, each in the dtype that the teacher has it in.

    Where the student's main dtype is another than the teacher's, each is in the dtype in which transformers would load
    it then: some models keep a few weights in float32.

    Buffers that no weight file holds, such as the frequencies of rotary embeddings, follow from the config. Where its
    fields are the teacher's, they are the teacher's, too; else they are those that the student was built with, as after
    a reload, unless the teacher's are the same but for rounding.

    Args:
        teacher: Where they come from; it is not changed.
        student: Built in its main dtype, where its weights are to be. Tensors of shapes of its own stay as they are.
        path: Dotted name of the layers, in both.
        chosen: For each of the student's layers, the index of the teacher's.
        same_fields: Whether both configs agree, but for the depth.
        narrowing: What a narrower student keeps of each tensor.
    """
    source = weights_of(teacher)
    theirs = {**dict(_tensors(teacher)), **source}
    main, their_main = main_dtype(student), main_dtype(teacher)
    saved, stays_float32 = student.state_dict().keys(), _kept_in_float32(student, main)
    new, carried, done = [], set(), {}
    for name, tensor in _tensors(student):
        origin = origin_of(name, path, chosen, theirs)
        if id(tensor) in done:
            # Of what the student ties and the teacher does not, the first counts, which is the embedding.
            carried.add(origin)
            first = done[id(tensor)]
            other = theirs.get(origin, theirs[first])
            if not other.is_meta and not torch.equal(theirs[first], other):
                logger.warning(
                    f"The student ties {first} and {origin}, which differ in the teacher: both begin as its {first}, "
                    "far from what it computes; leave them apart (`tie_word_embeddings`), or train the student well."
                )
            continue
        value, dtype = theirs.get(origin), tensor.dtype
        if value is not None and (value.is_meta or value.is_floating_point() != tensor.is_floating_point()):
            value = None
        if narrowing is not None and value is not None and name in saved and name not in narrowing.reasons:
            value = narrowing.part_of(origin, value)
        fits = value is not None and value.shape == tensor.shape
        if name in saved:
            carried.add(origin)
            if not fits:
                new.append(name)
            if main != their_main and tensor.is_floating_point():
                dtype = torch.float32 if stays_float32(name) else main
            elif value is not None:
                dtype = value.dtype
        elif value is not None and main == their_main:
            dtype = value.dtype
            fits = fits and ((same_fields and origin == name) or _equal_but_for_rounding(tensor, value))
        else:
            fits = False
        # `data` alone is exchanged, so that ties and `requires_grad` are the student's.
        if fits:
            done[id(tensor)] = origin
        tensor.data = (value if fits else tensor.data).to(device=tensor.device, dtype=dtype, copy=True)
    if same_fields and main == their_main:
        _carry_state(teacher, student, path)
    _report(source, student, path, chosen, new, carried)


def _tensors(model: nn.Module) -> list[tuple[str, torch.Tensor]]:
    return [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]


def origin_of(name: str, path: str, chosen: Sequence[int], theirs: Container[str]) -> str:
    """Name of the teacher's tensor that one of the student's comes from."""
    if not name.startswith(f"{path}."):
        return name
    index, _, rest = name.removeprefix(f"{path}.").partition(".")
    origin = f"{path}.{chosen[int(index)]}.{rest}"
    # What the first layer alone has, such as the position bias of T5, stays in the first one.
    return origin if origin in theirs else name


def _equal_but_for_rounding(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    if not ours.is_floating_point():
        return torch.equal(ours, theirs.to(ours.device, ours.dtype))
    # Half a unit in the last place of bfloat16, and the smallest float16.
    return torch.allclose(ours.float(), theirs.to(ours.device).float(), rtol=2**-8, atol=2**-24)


def _kept_in_float32(student: PreTrainedModel, dtype: torch.dtype) -> re.Pattern[str].search:
    """Whether transformers loads a weight in float32 though the others are in `dtype`."""
    patterns = [pattern.replace(".", r"\.").replace("*", ".*") for pattern in student._get_dtype_plan(dtype)]
    return re.compile("|".join(patterns) if patterns else r"(?!)").search


def _carry_state(teacher: nn.Module, student: nn.Module, path: str) -> None:
    """Numbers beside buffers that change in a forward, e.g. how long a text dynamic rotary embeddings have met."""
    theirs = dict(teacher.named_modules())
    for name, module in student.named_modules():
        if name.startswith(f"{path}.") or name not in theirs or not any(True for _ in module.buffers(recurse=False)):
            continue
        for field, value in vars(theirs[name]).items():
            is_number = isinstance(value, (float, int, torch.Tensor)) and not isinstance(value, bool)
            if is_number and not field.startswith("_"):
                setattr(module, field, value.clone() if isinstance(value, torch.Tensor) else value)


def _report(
    source: dict[str, torch.Tensor],
    student: PreTrainedModel,
    path: str,
    chosen: Sequence[int],
    new: list[str],
    carried: set[str],
) -> None:
    if new:
        logger.warning(
            f"{len(new)} of the student's {len(student.state_dict())} tensors have other shapes than the teacher's and "
            f"are newly initialised, e.g. {new[0]}."
        )
    kept = tuple(f"{path}.{index}." for index in chosen)
    lost = [name for name in source if name.startswith(kept) and name not in carried]
    if lost:
        logger.warning(
            f"The student has no place for {len(lost)} of the tensors in the layers {chosen}, e.g. {lost[0]}; its own "
            "layers there are built in another way."
        )
