"""What each block of the student costs, as `trainer.evaluate_blocks` found it: `read_costs`, and its panel and rows."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from . import drawing
from .drawing import Panel
from .runs import LogHistory, stones_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes


class BlockCost(NamedTuple):
    """A block of the student's in the midst of the teacher.

    Attributes:
        index: From 1 to n.
        entry: The metric of the teacher, its states led through the maps before the block, there and back.
        value: The metric with the student's block in place of the teacher's.
        cost: By how much the second is worse than the first.
    """

    index: int
    entry: float
    value: float
    cost: float


def read_costs(log_history: LogHistory, metric: str) -> list[BlockCost]:
    """The last costs of a run, block by block; none where its blocks were not evaluated.

    Args:
        log_history: `trainer.state.log_history`.
        metric: Without `eval_`; one whose name ends in `loss` or `perplexity` is better the lower it is.

    Example:
        ```python
        >>> from hf_blockkd.commands.report.block_costs import read_costs
        >>> log = [{"step": 9, "eval_teacher_accuracy": 0.75, "eval_block_1_accuracy": 0.5}]
        >>> read_costs(log, "accuracy")
        [BlockCost(index=1, entry=0.75, value=0.5, cost=0.25)]

        ```
    """
    sign = -1 if metric.endswith(("loss", "perplexity")) else 1
    costs = []
    for index in stones_of(log_history, rf"eval_block_(\d+)_{re.escape(metric)}$"):
        keys = _keys(index, metric)
        # Of one evaluation: the teacher's metric is in others, too, on other rows.
        found = [[one[key] for key in keys] for one in log_history if all(key in one for key in keys)]
        if found:
            entry, value = found[-1]
            costs.append(BlockCost(index, entry, value, sign * (entry - value)))
    return costs


def cost_panel(costs: Sequence[BlockCost], metric: str) -> Panel:
    """A row for each block with what it costs.

    Args:
        costs: From `read_costs`, at least one.
        metric: As there.
    """
    rows = {f"block {one.index}": [one.cost] for one in costs}

    def draw(axis: Axes) -> None:
        drawing.draw_rows(axis, rows, ".4f")
        axis.axvline(0, color="0.6", linewidth=1, zorder=1)
        drawing.finish(axis, f"cost in {metric}", "")

    terms = tuple(key for one in costs for key in _keys(one.index, metric))
    return Panel("Cost of each block", draw, drawing.rows_height(len(rows)), terms)


def cost_rows(costs: Sequence[BlockCost]) -> list[list[str]]:
    """The same as rows of a table: block, the metric without and with the student's block, and its cost."""
    return [[str(one.index), f"{one.entry:.4f}", f"{one.value:.4f}", f"{one.cost:.4f}"] for one in costs]


def _keys(index: int, metric: str) -> tuple[str, str]:
    """Names of the values that are logged of a block: without the student's block, and with it."""
    own = f"eval_block_{index}_"
    return f"{own}entry_{metric}" if index > 1 else f"eval_teacher_{metric}", own + metric
