"""Which blocks and layers to train with next, by what the blocks of a run cost: `hf-blockkd plan --rebalance`."""

from __future__ import annotations

from pathlib import Path

from ..plan.rebalancing import rebalance
from ..plan.tables import table
from .report.block_costs import cost_rows, read_costs
from .report.runs import Run


def proposal(folder: str | Path, metric: str | None = None) -> str:
    """What the blocks of a run cost, and the blocks and layers of a student of the same size that shares it out.

    Args:
        folder: Of the run, whose trainer called `evaluate_blocks`, `save_model` and `save_state`.
        metric: Of the evaluation; default: accuracy where that was measured, else the loss.

    Raises:
        ValueError: If there is no such run, or nothing can be shared out.
    """
    run = Run.read(folder)
    if metric is None:
        metric = "accuracy" if read_costs(run.log, "accuracy") else "loss"
    costs = read_costs(run.log, metric)
    if not costs or run.block_map is None:
        missing = f"log holds no `eval_block_1_{metric}`" if not costs else "folder holds no `blocks.json`"
        raise ValueError(
            f"{folder} does not say what its blocks cost: its {missing}; call `trainer.evaluate_blocks()`, "
            "`trainer.save_model()` and `trainer.save_state()` after training."
        )
    found = rebalance(run.block_map, [one.cost for one in costs])
    heads = ["block", f"{metric} of the teacher", "with the student's", "cost"]
    parts = [f"What each block of the student costs\n{table([heads, *cost_rows(costs)], left=0)}"]
    if found.block_map == run.block_map and (run.cut is None or run.cut.layers == found.layers):
        return "\n\n".join([*parts, "Every layer of the student answers for as much as any other: leave it as it is."])
    parts.append(f"A student of the same depth whose layers would share it out\n{found.block_map}")
    ends = " ".join(map(str, found.block_map.student)), " ".join(map(str, found.block_map.teacher))
    flags = f"  --student_boundaries {ends[0]} --teacher_boundaries {ends[1]}"
    if run.cut is not None:
        flags += f" --layers {','.join(map(str, found.layers))}"
        heading = "Cut the student and train it with"
    else:
        heading = "Train it with"
    return "\n\n".join([*parts, f"{heading}\n{flags}"])
