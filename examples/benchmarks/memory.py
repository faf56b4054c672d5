"""The device of the benchmarks, and the peak of memory there: resident, as Linux reports it, or allocated on a GPU."""

from __future__ import annotations

import ctypes
from pathlib import Path

import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def wait() -> None:
    """For the kernels that a GPU has been given."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def autocast() -> torch.autocast:
    """What a step runs under: bfloat16 on a GPU, float32 on a CPU."""
    return torch.autocast(DEVICE, torch.bfloat16, enabled=DEVICE == "cuda")


def reset_peak() -> float:
    """Hand free memory back and let the peak start anew; memory in use now, in MiB."""
    if DEVICE == "cuda":
        torch.cuda.init()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated() / 2**20
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    return status("VmRSS")


def peak() -> float:
    """The peak since then, in MiB."""
    if DEVICE == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    return status("VmHWM")


def status(field: str) -> float:
    """A size that `/proc/self/status` names, in MiB."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(f"{field}:"))
