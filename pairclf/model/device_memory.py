"""Memory of this process on its device: current, peak and available."""

from __future__ import annotations

import ctypes
import gc
import platform

import torch

from pairclf.hardware import peak_resident_memory, process_memory, resident_memory


def peak_memory(device: torch.device) -> int:
    """Peak memory of this process in bytes: allocated on CUDA, resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return peak_resident_memory()


def forget_peak(device: torch.device) -> None:
    """Reset `peak_memory` on CUDA; on a CPU it can't be reset."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def memory_now(device: torch.device) -> int:
    """Current memory of this process, as `peak_memory` counts it."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    return resident_memory()


def give_back_freed_memory() -> None:
    """Let glibc return freed memory to the kernel, so that new allocations become visible."""
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)


def memory_to_have(device: torch.device, processes: int) -> int:
    """Memory available to each of `processes` processes on the device: its own, and its share of the free memory."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] // processes + torch.cuda.memory_reserved(device)
    return process_memory(processes)


def free_memory() -> None:
    """Free a dropped model's memory before another is loaded."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
