"""A picture of finished sweeps side by side: every seed, the mean, and its 95 % interval.

python examples/benchmarks/plot_sweeps.py examples/images/sweeps.png \
    examples/benchmarks/results/sweep/{cifar10,sst2,novels}.jsonl
"""

from __future__ import annotations

import statistics
import sys
from pathlib import Path

import matplotlib
from sweep import TEACHER, half_width, names, rank, read

matplotlib.use("Agg")
from matplotlib import pyplot as plt

OURS = "the default"
LONGER = "times the steps"


def main() -> None:
    picture, paths = Path(sys.argv[1]), [Path(name) for name in sys.argv[2:]]
    figure, all_axes = plt.subplots(1, len(paths), figsize=(5 * len(paths), 5.2), layout="constrained", squeeze=False)
    for axes, path in zip(all_axes[0], paths, strict=True):
        draw(axes, path)
    figure.savefig(picture, dpi=110)


def draw(axes: plt.Axes, path: Path) -> None:
    """One task: methods from worst to best."""
    runs = read(path)
    # Accuracies lie between 0 and 1, perplexities above.
    lower_is_better = max(run["test"] for run in runs) > 1
    percent = 1 if lower_is_better else 100
    values = {
        name: [
            percent * run["test"] for run in rank([run for run in runs if run["method"] == name], lower_is_better)[0]
        ]
        for name in names(runs)
        if LONGER not in name
    }
    (teacher,) = values.pop(TEACHER)
    order = sorted(values, key=lambda name: statistics.mean(values[name]), reverse=lower_is_better)
    for place, name in enumerate(order):
        same = values[name]
        colour = "C3" if name.startswith(OURS) else "C0"
        axes.plot(same, [place] * len(same), "o", color=colour, alpha=0.35, markersize=4)
        error = half_width(same) if len(same) > 1 else 0.0
        axes.errorbar(statistics.mean(same), place, xerr=error, fmt="|", color=colour, capsize=3, markersize=10)
    axes.axvline(teacher, color="grey", linestyle="--")
    axes.text(teacher, 0.5, "teacher ", ha="right", color="grey", fontsize=8)
    axes.set_yticks(range(len(order)), order)
    axes.set(title=path.stem, xlabel="perplexity, lower is better" if lower_is_better else "accuracy, %")
    if lower_is_better:
        axes.invert_xaxis()
    axes.grid(axis="x", alpha=0.3)


if __name__ == "__main__":
    main()
