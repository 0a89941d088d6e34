"""Finds the device, precision and memory of this machine."""

import ctypes
import gc
import os
import platform
import sys
from dataclasses import asdict, dataclass
from typing import Any

import psutil
import torch

from veneer.machine.peers import uncounted_bytes


@dataclass(frozen=True)
class Machine:
    """The machine of a run. Sizes are in bytes; on a GPU they are those of its memory."""

    device: str
    name: str
    cores: int
    total_bytes: int
    free_bytes: int
    has_bfloat16: bool

    @property
    def dtype(self) -> torch.dtype:
        """The default compute dtype: bfloat16 where it is fast, else float32."""
        return torch.bfloat16 if self.has_bfloat16 else torch.float32

    def describe(self) -> str:
        """Describe the machine in one line."""
        where = f"{self.name}, {self.cores} cores" if self.device == "cpu" else self.name
        precision = "bfloat16" if self.has_bfloat16 else "float32 (no fast bfloat16)"
        return f"{where}, {self.total_bytes / 2**30:.0f} GiB ({self.free_bytes / 2**30:.0f} free), {precision}"

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def find_machine() -> Machine:
    """Find the best device: CUDA, then Apple's MPS, then the CPU."""
    memory = psutil.virtual_memory()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        name = torch.cuda.get_device_name()
        return Machine("cuda", name, cores, total, free, torch.cuda.is_bf16_supported(including_emulation=False))
    if torch.backends.mps.is_available():
        return Machine("mps", "Apple GPU", cores, memory.total, memory.available, True)
    return Machine("cpu", _cpu_name(), cores, memory.total, memory.available, _cpu_has_bfloat16())


def to_device(tensor: torch.Tensor, device: Any) -> torch.Tensor:
    """Copy a tensor to a device, asynchronously from pinned memory on CUDA."""
    if torch.device(device).type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def named_dtype(setting: str, default: torch.dtype) -> torch.dtype:
    """Return the dtype that `model.dtype` names, where `auto` means `default`."""
    named = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
    return named.get(setting, default)


def resolve_optim(setting: str, device: str) -> str:
    """Return the optimizer that `train.optim` means on a device. Paged states need CUDA; elsewhere they are unpaged."""
    if setting == "auto":
        return "adamw_8bit" if device == "cuda" else "adamw_torch"
    return setting if device == "cuda" else unpaged(setting)


def unpaged(optim: str) -> str:
    """Return the optimizer whose states are the same and not paged."""
    return optim.removeprefix("paged_")


def peak_resident_bytes() -> int:
    """Return the peak resident memory of this process."""
    import resource  # not on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if platform.system() == "Darwin" else peak * 1024


def peak_bytes(device: str) -> int:
    """Return the peak memory of the run: allocated on the GPU, resident on the CPU."""
    return torch.cuda.max_memory_allocated() + uncounted_bytes() if device == "cuda" else peak_resident_bytes()


def bytes_now(device: str) -> int:
    """Return the memory that the process has now: allocated on the GPU, resident on the CPU."""
    return torch.cuda.memory_allocated() + uncounted_bytes() if device == "cuda" else psutil.Process().memory_info().rss


def rng_state() -> dict[str, torch.Tensor]:
    """Return the state of torch's random number generators by device: cpu, and cuda where there is one."""
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_rng_state(state: dict[str, torch.Tensor]) -> None:
    """Restore what `rng_state` returned; a GPU of which it knows nothing begins with a number drawn from the CPU's."""
    torch.set_rng_state(state["cpu"])
    if torch.cuda.is_available():
        if "cuda" in state:
            torch.cuda.set_rng_state(state["cuda"])
        else:
            torch.cuda.manual_seed(int(torch.randint(2**31, ())))
            torch.set_rng_state(state["cpu"])


def release_memory() -> None:
    """Free objects in reference cycles, and return to the GPU what its allocator holds for reuse."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def reset_peak(device: str) -> None:
    """Begin to measure the peak anew, where the device can."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()


def bound_freed_memory() -> None:
    """Make the C library return large buffers to the system as soon as they are freed; for the CPU.

    A buffer above the threshold gets its own mapping, so that it does not fragment the heap, and its pages are cleared
    each time. For buffers of a few MiB that clearing costs a tenth of a step, and half of a pass over many rows; those
    stay in the heap, which `return_freed_memory` trims. Does nothing outside the GNU C library.
    """
    if _C_LIBRARY is not None:
        threshold, top = -3, -1  # M_MMAP_THRESHOLD and M_TRIM_THRESHOLD of malloc.h
        _C_LIBRARY.mallopt(threshold, 32 * 2**20)  # the largest that it takes
        _C_LIBRARY.mallopt(top, 256 * 2**20)


def return_freed_memory() -> None:
    """Return the heap's free pages to the system; call it on a CPU every few passes.

    Untrimmed, a step of SmolLM2 holds 0.15 GiB more; trimmed after each step, it is an eighth slower, since all pages
    are cleared again.
    """
    if _C_LIBRARY is not None:
        _C_LIBRARY.malloc_trim(0)


def _c_library() -> Any:
    """Return the GNU C library, if this process runs on it."""
    library = ctypes.CDLL(None) if sys.platform == "linux" else None
    return library if hasattr(library, "malloc_trim") else None


_C_LIBRARY = _c_library()


def _cpu_name() -> str:
    if platform.system() == "Linux":
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _cpu_has_bfloat16() -> bool:
    """Return whether oneDNN may use the CPU's instructions for bfloat16 products; without them float32 is faster."""
    allowed = os.environ.get("ONEDNN_MAX_CPU_ISA", "DEFAULT").upper()
    if allowed not in ("DEFAULT", "ALL") and "BF16" not in allowed and "AMX" not in allowed:
        return False
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    if capabilities:
        return any(capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16", "arm_bf16"))
    return bool(torch.cpu._is_avx512_bf16_supported())
