"""How the examples run: on all cores, saying everything once, and answering a mistake with one sentence."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from accelerate import PartialState


def run(main: Callable[[], None]) -> None:
    """Run a script; what is wrong with its arguments or data is one sentence instead of a traceback."""
    try:
        main()
    except ValueError as error:
        sys.exit(f"{Path(sys.argv[0]).name}: {error}")


def use_all_cores() -> None:
    """On a CPU, share the cores out among the processes: `accelerate launch` gives each of them one thread."""
    state = PartialState()
    if state.device.type == "cpu":
        local = int(os.environ.get("LOCAL_WORLD_SIZE", state.num_processes))
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        torch.set_num_threads(max(1, cores // local))


def say(text: str) -> None:
    """Print once, not once a process."""
    if PartialState().is_main_process:
        print(text, flush=True)
