"""Out of how many architectures of the installed transformers can students be cut, in depth and in width.

    python examples/benchmarks/cut_coverage.py --output_dir outputs/cut_coverage

Of a tiny random model of every (task, model type) pair, as in `coverage.py`, `make_student` cuts one student with half
of the layers, and one with half of the width, or, where that is refused, with half of other sizes.
"""

from __future__ import annotations

import traceback
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import coverage
import torch
from coverage import Row, describe
from tiny_configs import tiny_model
from transformers import PreTrainedModel

from hf_blockkd import UnsupportedArchitectureError, check_routing, find_layer_stack, make_student
from hf_blockkd.routing.dummy_inputs import dummy_inputs
from hf_blockkd.routing.layers import LayerStack
from hf_blockkd.routing.logits import main_outputs, only_logits
from hf_blockkd.students.config_changes import INNER_FIELDS
from hf_blockkd.students.config_parts import part_of_the_stack, same_in_all_layers

STATUSES = {
    "both": "in width, and in depth",
    "width": "a narrower student whose layers hold entries of the teacher's tensors alone, by proved symmetries",
    "depth": "a shallower student of whole layers, through which states are routed exactly",
    "refused": "`make_student` says what stands in the way",
    "not built": "no model from a default config, or it does not run on text or images alone",
    "broken": "anything else",
}
STAGES = ("embed_dim", "embed_dims", "hidden_sizes", "neck_hidden_sizes", "embedding_size", "stem_hidden_channels")
"""Fields of the widths of models in stages, which have no one width."""
INNER = (*INNER_FIELDS, "inner_dim", "mlp_ratio")
"""Fields of what is inside the layers alone."""


class _RefusalError(Exception):
    """What `make_student` says of a cut that it does not make."""


def examine(task: str, model_type: str) -> Row:
    """What becomes of one pair: a line of the results."""
    row: Row = {"task": task, "model_type": model_type}
    try:
        model = tiny_model(task, model_type)
    except Exception as error:
        return {**row, "status": "not built", "reason": describe(error)}
    row |= {"model": type(model).__name__, "parameters": model.num_parameters()}
    reasons = {}
    for way in (examine_depth, examine_width):
        try:
            row |= way(model)
        except (UnsupportedArchitectureError, _RefusalError) as error:
            reasons[way] = str(error)
        except Exception as error:
            return {**row, "status": "broken", "reason": describe(error)}
    if not reasons:
        return {**row, "status": "both"}
    status = "refused" if len(reasons) == 2 else "width" if examine_depth in reasons else "depth"
    return {**row, "status": status, "reason": " ".join(dict.fromkeys(reasons.values()))}


def examine_depth(model: PreTrainedModel) -> Row:
    """A student with every other layer, through which states must go as through its teacher."""
    stack = find_layer_stack(model)
    if len(stack) == 1:
        raise _RefusalError(f"{stack.path!r} holds one layer.")
    check_routing(model)
    student = _cut(model, num_layers=len(stack) // 2)
    error = check_routing(student, layers_path=stack.search_path).max_abs_error
    if error != 0.0:
        raise RuntimeError(f"the shallower student is routed with an error of {error:.3g}")
    return {"layers": len(find_layer_stack(student, stack.search_path))}


def examine_width(model: PreTrainedModel) -> Row:
    """The first of some smaller sizes to which it can be cut."""
    stack = find_layer_stack(model)
    layers = tuple(f"{name}." for name, module in model.named_modules() if any(module is one for one in stack.layers))
    refusals = []
    for sizes in smaller_sizes(model, stack):
        try:
            student = _cut(model, **sizes, channels="weights")
        except (UnsupportedArchitectureError, _RefusalError) as error:
            refusals.append(str(error))
            continue
        with torch.no_grad(), only_logits(student):
            if not all(torch.isfinite(logits).all() for logits in main_outputs(student(**dummy_inputs(student)))):
                raise RuntimeError(f"with {sizes}, the logits of the narrower student are not finite")
        if student.num_parameters() >= model.num_parameters():
            refusals.append(f"{', '.join(sizes)} change nothing")
            continue
        new = [name for name in new_tensors(model, student) if is_read(student, name)]
        inside = [name for name in new if name.startswith(layers)]
        if inside:
            refusals.append(f"with {', '.join(sizes)}, {inside[0]} begins anew")
            continue
        return {"sizes": list(sizes), "new": new, "narrower_parameters": student.num_parameters()}
    raise _RefusalError(refusals[0] if refusals else "Its config names no width.")


def smaller_sizes(model: PreTrainedModel, stack: LayerStack) -> Iterator[dict[str, Any]]:
    """Half of the width, with half of the heads or with heads of half their size; of stages' widths; of MLPs."""
    part = part_of_the_stack(model, model.config, stack)
    width, heads = (same_in_all_layers(part, name) for name in ("hidden_size", "num_attention_heads"))
    if isinstance(width, int):
        yield {"hidden_size": width // 2}
        if isinstance(heads, int):
            yield {"hidden_size": width // 2, "num_attention_heads": heads}
    stages = {name: value for name in STAGES if (value := _half(same_in_all_layers(part, name))) is not None}
    if stages:
        yield stages
    for name in INNER:
        value = _half(same_in_all_layers(part, name))
        if value is not None:
            yield {name: value}


def new_tensors(model: PreTrainedModel, student: PreTrainedModel) -> list[str]:
    """Tensors of a student of all layers with entries that its teacher's have not."""
    theirs = model.state_dict()
    return [
        name
        for name, ours in student.state_dict().items()
        if ours.is_floating_point() and (name not in theirs or not torch.isin(ours, theirs[name]).all())
    ]


@torch.no_grad()
def is_read(model: PreTrainedModel, name: str) -> bool:
    """Whether the logits of dummy inputs depend on a tensor."""
    tensor = model.state_dict()[name]
    own = tensor.clone()
    tensor.fill_(torch.nan)
    with only_logits(model):
        outputs = main_outputs(model(**dummy_inputs(model)))
    tensor.copy_(own)
    return any(logits.isnan().any() for logits in outputs)


def notes(rows: list[Row]) -> list[str]:
    """By which sizes students became narrower, and how many have tensors outside their layers that begin anew."""
    sizes = Counter(" and ".join(f"`{name}`" for name in row["sizes"]) for row in rows if "sizes" in row)
    new = [f"{row['model_type']} ({row['new'][0]})" for row in rows if row.get("new")]
    found = [f"narrower by {', '.join(f'{name}: {count}' for name, count in sizes.most_common())}"] if sizes else []
    if new:
        found.append(f"with tensors outside the layers that begin anew: {len(new)}, {', '.join(sorted(set(new)))}")
    return found


def table(rows: list[Row]) -> str:
    return coverage.table(rows, STATUSES, notes)


def _half(value: Any) -> Any:
    if isinstance(value, (list, tuple)) and value and all(isinstance(one, int) for one in value):
        return type(value)(one // 2 for one in value)
    return value / 2 if isinstance(value, float) else value // 2 if isinstance(value, int) and value > 1 else None


def _cut(model: PreTrainedModel, **sizes: Any) -> PreTrainedModel:
    try:
        return make_student(model, **sizes)
    except UnsupportedArchitectureError:
        raise
    except ValueError as error:
        # One that transformers or torch raises says nothing about the cut.
        if "hf_blockkd" not in traceback.extract_tb(error.__traceback__)[-1].filename:
            raise
        raise _RefusalError(str(error)) from error


if __name__ == "__main__":
    coverage.main(examine, table, __doc__.split("\n")[0], Path("outputs/cut_coverage"), seconds=300)
