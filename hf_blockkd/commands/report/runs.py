"""What a run left in its folder: `find_runs`, `read_log_history`, and `Run` with all that a report says of it."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, get_last_checkpoint
from transformers.utils import SAFE_WEIGHTS_NAME

from ...models.cut import Cut
from ...pairing.blocks import BlockMap
from ...saving.settings import ARGS_NAME, RESOLVED_NAME

CHECKPOINT = re.compile(rf"\b{PREFIX_CHECKPOINT_DIR}-\d+\b")
COST = re.compile(r"_runtime|_per_second|_preparation_time|_mem_|^total_flos$|^train_loss$")
"""What of a log is no curve: times, memory, and means over the whole run."""
LogHistory = Sequence[Mapping[str, Any]]
"""What a trainer logged: `trainer.state.log_history`."""
Points = list[tuple[int, float]]
"""(step, value), rising."""


@dataclass(frozen=True)
class Run:
    """What is known of one run.

    Attributes:
        folder: Its `output_dir`, or one of its checkpoints.
        log: What it logged.
        args: Its `training_args.json`; empty where another trainer wrote none.
        resolved: What it made of the fields that were left to it.
        block_map: How both models are cut into blocks, where it says so.
        cut: What of its teacher the student keeps, where it was cut.
        parameters: Of the student that was saved, where its weights are in one file.
    """

    folder: Path
    log: LogHistory
    args: Mapping[str, Any]
    resolved: Mapping[str, Any]
    block_map: BlockMap | None = None
    cut: Cut | None = None
    parameters: int | None = None

    @classmethod
    def read(cls, folder: str | Path) -> Run:
        """Read what is there.

        Raises:
            ValueError: If there is no run, or a file of it is none.
        """
        folder = Path(folder)
        places = [folder, *_places(folder)]
        return cls(
            folder,
            read_log_history(folder),
            read_args(folder),
            read_args(folder, RESOLVED_NAME),
            _first(BlockMap.load, places),
            _first(Cut.load, places),
            _first(_count_parameters, places),
        )

    def last(self, key: str) -> float | None:
        """The last value that was logged; `None` where there is none."""
        points = series(self.log, key)
        return points[-1][1] if points else None


def find_runs(folder: str | Path) -> list[Path]:
    """The folders of runs that a folder is or holds, at any depth, such as the methods and seeds of a comparison.

    Args:
        folder: The `output_dir` of a run, one of its checkpoints, or a folder above some of them.

    Raises:
        ValueError: If there is none.
    """
    folder = Path(folder)
    if _places(folder):
        return [folder]
    found = [place for place in sorted(folder.rglob("*")) if not CHECKPOINT.search(str(place)) and _places(place)]
    if not found:
        raise ValueError(
            f"{folder}, its checkpoints and folders hold no trainer_state.json; give the `output_dir` of a run that "
            "saved a checkpoint, or call `trainer.save_state()` after training."
        )
    return found


def read_log_history(folder: str | Path) -> list[dict[str, Any]]:
    """Read what a run logged from its `trainer_state.json`.

    Args:
        folder: The `output_dir` of a run, or one of its checkpoints. Where `output_dir` itself has no
            `trainer_state.json`, that of its newest checkpoint is read.

    Raises:
        ValueError: If there is none, or it holds no log.
    """
    path = _places(find_runs(folder)[0])[0] / "trainer_state.json"
    state = _read_json(path, "is no state of a trainer")
    if not isinstance(state.get("log_history"), list):
        raise ValueError(f"{path} is no state of a trainer (it has no `log_history`); give another folder.")
    return state["log_history"]


def read_args(folder: str | Path, name: str = ARGS_NAME) -> dict[str, Any]:
    """Read a run's `training_args.json`; empty where it has none, as those of other trainers.

    Args:
        folder: As for `read_log_history`.
        name: `RESOLVED_NAME` for what the run made of the fields that were left to it.

    Raises:
        ValueError: If it holds no arguments.
    """
    for place in (Path(folder), *_places(Path(folder))):
        if (path := place / name).is_file():
            return _read_json(path, "holds no arguments of a run")
    return {}


def series(log_history: LogHistory, key: str) -> Points:
    """(step, value) of every entry that has the key, one per step, the last one where a step has several."""
    return sorted({entry["step"]: entry[key] for entry in log_history if key in entry and "step" in entry}.items())


def logged_terms(log_history: LogHistory) -> list[str]:
    """Names of all that was logged as numbers over the steps, in the order in which they came."""
    return list(
        dict.fromkeys(
            key
            for entry in log_history
            for key, value in entry.items()
            if key not in ("step", "epoch") and not COST.search(key) and isinstance(value, (int, float))
        )
    )


def stones_of(log_history: LogHistory, pattern: str) -> list[int]:
    """The numbers, rising, that names of logged values have where the pattern has its group."""
    return sorted({int(match[1]) for entry in log_history for key in entry if (match := re.match(pattern, key))})


def choose_metric(logs: Sequence[LogHistory]) -> str:
    """`"accuracy"` where it was evaluated, else `"loss"`."""
    return "accuracy" if any("eval_accuracy" in entry for log in logs for entry in log) else "loss"


def _places(folder: Path) -> list[Path]:
    """Where a run's state is, the run's own folder before its newest checkpoint."""
    places = [folder]
    if folder.is_dir() and (checkpoint := get_last_checkpoint(str(folder))) is not None:
        places.append(Path(checkpoint))
    return [place for place in places if (place / "trainer_state.json").is_file()]


def _first(read: Any, places: Sequence[Path]) -> Any:
    return next((found for place in places if (found := read(place)) is not None), None)


def _read_json(path: Path, otherwise: str) -> dict[str, Any]:
    try:
        read = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} {otherwise} ({error}); give another folder.") from error
    if not isinstance(read, dict):
        raise ValueError(f"{path} {otherwise} (it is a {type(read).__name__}); give another folder.")
    return read


def _count_parameters(folder: Path) -> int | None:
    """Of a model's file of weights, whose tensors are not read."""
    path = folder / SAFE_WEIGHTS_NAME
    if not path.is_file():
        return None
    try:
        with safe_open(path, "pt") as file:
            shapes = [file.get_slice(name).get_shape() for name in file.keys()]  # noqa: SIM118 (no dictionary)
    except SafetensorError as error:
        raise ValueError(f"{path} holds no weights ({error}); give another folder.") from error
    return sum(map(math.prod, shapes))
