"""Peak of a process's resident memory, as Linux reports it, or of what it has allocated on a GPU."""

from __future__ import annotations

import ctypes
from pathlib import Path

import torch


def reset_peak(device: str = "cpu") -> float:
    """Hand free memory back and let the peak start anew; memory in use now, in MiB."""
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated() / 2**20
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    return status("VmRSS")


def peak(device: str = "cpu") -> float:
    """The peak since then, in MiB."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    return status("VmHWM")


def status(field: str) -> float:
    """A size that `/proc/self/status` names, in MiB."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(f"{field}:"))
