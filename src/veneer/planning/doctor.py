"""Examines the machine: its parts, which of them work, and how to fix those that do not.

`examine_machine` only collects facts and `diagnose` only judges them, so that every fault can be tested anywhere.
"""

import contextlib
import io
import logging
import platform
import shutil
import subprocess
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from importlib import metadata
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement

from veneer.config import JobError
from veneer.config.cache import cache_folder
from veneer.machine.device import Machine, find_machine
from veneer.machine.speeds import GpuLink

LIBRARIES = (
    *("torch", "transformers", "peft", "bitsandbytes", "accelerate", "datasets", "safetensors", "tokenizers", "triton"),
)
# Oldest driver for a major version of CUDA: the CUDA release notes, table "CUDA Toolkit and Minimum Required Driver".
OLDEST_DRIVER = {11: (450, 80), 12: (525, 60), 13: (580, 65)}
LITTLE_DISK = 5 * 2**30


@dataclass(frozen=True)
class Gpu:
    """A GPU as torch reports it. Sizes are in bytes; the capability 9.0 is 90."""

    name: str
    total_bytes: int
    free_bytes: int
    capability: int


@dataclass(frozen=True)
class MachineReport:
    """The facts of a machine.

    Attributes:
        machine: device that a run would use.
        driver: version of NVIDIA's driver; None: there is none.
        driver_gpus: GPUs that the driver sees.
        gpus: GPUs that torch can use.
        torch_cuda: CUDA version that torch was built for; None: built for the CPU.
        torch_capabilities: compute capabilities that torch was built for, as 90.
        bitsandbytes: cuda, cpu, or the reason why it does not load.
        flash_attn: whether the package is installed.
        versions: versions of the libraries that matter; None: missing.
        outdated: requirements that are missing or of another version.
        disk_free_bytes: free bytes by folder.
        gpu_link: measured link between the GPUs; None: there is one GPU, or it was not measured.
        gpu_link_failure: reason why it could not be measured; empty: it could, or there is one GPU.
    """

    machine: Machine
    driver: str | None = None
    driver_gpus: list[str] = field(default_factory=list)
    gpus: list[Gpu] = field(default_factory=list)
    torch_cuda: str | None = None
    torch_capabilities: list[int] = field(default_factory=list)
    bitsandbytes: str = "cpu"
    flash_attn: bool = False
    versions: dict[str, str | None] = field(default_factory=dict)
    outdated: list[str] = field(default_factory=list)
    disk_free_bytes: dict[str, int] = field(default_factory=dict)
    gpu_link: GpuLink | None = None
    gpu_link_failure: str = ""

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {"python": platform.python_version(), "platform": platform.platform()}


@dataclass(frozen=True)
class MachineProblem:
    """A fault of the machine, and its fix."""

    id: str
    message: str
    fix: str


@dataclass(frozen=True)
class Usable:
    """A choice of a run's settings, and whether it works here; `why` is the reason if not."""

    part: str
    name: str
    works: bool
    why: str = ""


def examine_machine() -> MachineReport:
    """Examine the machine; takes a second or two."""
    import torch

    machine = find_machine()
    driver, driver_gpus = _ask_driver()
    gpus = []
    for number in range(torch.cuda.device_count() if machine.device == "cuda" else 0):
        free, total = torch.cuda.mem_get_info(number)
        major, minor = torch.cuda.get_device_capability(number)
        gpus.append(Gpu(torch.cuda.get_device_name(number), total, free, 10 * major + minor))
    archs = torch.cuda.get_arch_list() if machine.device == "cuda" else []
    return MachineReport(
        machine=machine,
        driver=driver,
        driver_gpus=driver_gpus,
        gpus=gpus,
        torch_cuda=torch.version.cuda,
        torch_capabilities=sorted({int("".join(c for c in arch if c.isdigit())) for arch in archs}),
        bitsandbytes=_bitsandbytes(),
        flash_attn=_version("flash-attn") is not None,
        versions={name: _version(name) for name in LIBRARIES},
        outdated=_outdated(),
        disk_free_bytes={str(folder): _free(folder) for folder in (Path.cwd(), cache_folder())},
    )


def with_link(found: MachineReport, measure: Callable[[int], GpuLink]) -> MachineReport:
    """Measure the link between the GPUs of a machine, where it has several; takes half a minute.

    Args:
        found: the machine.
        measure: function of the number of GPUs; `veneer.machine.link.measure_link`.
    """
    if len(found.gpus) < 2:
        return found
    try:
        return replace(found, gpu_link=measure(len(found.gpus)))
    except JobError as error:
        return replace(found, gpu_link_failure=str(error))


def diagnose(found: MachineReport) -> list[MachineProblem]:
    """Return the faults of a machine. A missing GPU is not one."""
    return list(_problems(found))


def _problems(found: MachineReport) -> Iterator[MachineProblem]:
    if found.driver is not None and found.driver_gpus and not found.gpus:
        yield _without_gpu(found)
    for gpu in found.gpus:
        if found.torch_capabilities and not any(_runs(built, gpu.capability) for built in found.torch_capabilities):
            built = ", ".join(f"{c / 10:.1f}" for c in found.torch_capabilities)
            yield MachineProblem(
                "gpu-not-built-for",
                f"{gpu.name} has compute capability {gpu.capability / 10:.1f}; this torch is built for {built}",
                "install a torch that is built for this GPU (pytorch.org/get-started)",
            )
    if found.gpus and found.bitsandbytes != "cuda":
        yield MachineProblem(
            "bitsandbytes-without-cuda",
            f"bitsandbytes has no CUDA here ({found.bitsandbytes}): no 4-bit base, no 8-bit optimizer on the GPU",
            f"pip install --force-reinstall bitsandbytes; it must include a library for CUDA {found.torch_cuda}",
        )
    if found.gpu_link_failure:
        yield MachineProblem(
            "gpus-do-not-exchange",
            f"the {len(found.gpus)} GPUs exchange nothing: {found.gpu_link_failure}",
            f"see what NCCL says: NCCL_DEBUG=INFO torchrun --standalone --nproc-per-node {len(found.gpus)} -m "
            "veneer.machine.link; one GPU alone trains without it (CUDA_VISIBLE_DEVICES=0)",
        )
    if found.outdated:
        unmet = f"missing or of another version: {', '.join(found.outdated)}"
        yield MachineProblem("libraries", unmet, "pip install --upgrade veneer")
    sizes = found.disk_free_bytes.items()
    if full := [f"{folder} ({free / 2**30:.1f} GiB)" for folder, free in sizes if free < LITTLE_DISK]:
        left = f"little space left in {', '.join(full)}"
        yield MachineProblem("disk", left, "free some, or set VENEER_CACHE elsewhere")


def usable(found: MachineReport) -> list[Usable]:
    """Return which engines, attention backends, optimizers and quantizations work here."""
    gpu = "" if found.gpus else "needs a CUDA GPU"
    broken = "" if found.bitsandbytes in ("cuda", "cpu") else f"bitsandbytes does not load: {found.bitsandbytes}"
    parts = (
        ("engine", "reference", ""),
        ("engine", "fused", gpu),
        ("attention", "sdpa", ""),
        ("attention", "eager", ""),
        ("attention", "flash_attention_2", gpu or ("" if found.flash_attn else "flash-attn is not installed")),
        ("optimizer", "adamw_torch", ""),
        ("optimizer", "adamw_8bit", broken),
        ("optimizer", "paged_adamw_8bit", broken or (gpu and f"{gpu}; kept unpaged here")),
        ("quantization", "4 bits", broken),
        ("precision", "bfloat16", "" if found.machine.has_bfloat16 else "not in hardware"),
    )
    return [Usable(part, name, not why, why) for part, name, why in parts]


def _without_gpu(found: MachineReport) -> MachineProblem:
    """Return the fault of a machine whose driver sees a GPU that torch does not see."""
    names = ", ".join(found.driver_gpus)
    if found.torch_cuda is None:
        return MachineProblem(
            "torch-without-cuda",
            f"this torch ({found.versions.get('torch')}) is built for the CPU, and there is a GPU: {names}",
            "install the CUDA build of torch (pytorch.org/get-started)",
        )
    major = int(found.torch_cuda.split(".")[0])
    oldest = OLDEST_DRIVER.get(major)
    if oldest is not None and tuple(map(int, (found.driver or "0").split(".")[:2])) < oldest:
        return MachineProblem(
            "driver-too-old",
            f"driver {found.driver} is too old for CUDA {found.torch_cuda}, which this torch is built for",
            f"update NVIDIA's driver to {oldest[0]}.{oldest[1]} or later, or install a torch built for an older CUDA",
        )
    return MachineProblem(
        "gpu-unreachable",
        f"the driver sees {names}, torch does not",
        "check CUDA_VISIBLE_DEVICES, and that nvidia-smi and torch run in the same container",
    )


def _runs(built: int, capability: int) -> bool:
    """Return whether code built for a capability runs on another: a later one of the same major version."""
    return built // 10 == capability // 10 and built <= capability


def _ask_driver() -> tuple[str | None, list[str]]:
    command = ["nvidia-smi", "--query-gpu=driver_version,name", "--format=csv,noheader"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None, []
    lines = (
        [line.split(", ", 1) for line in answer.stdout.splitlines() if ", " in line] if not answer.returncode else []
    )
    return (lines[0][0], [name for _, name in lines]) if lines else (None, [])


def _bitsandbytes() -> str:
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            logging.disable()
            from bitsandbytes.cextension import lib
    except Exception as error:  # noqa: BLE001 - a broken native library fails in many ways, and each is an answer
        return f"{type(error).__name__}: {error}".splitlines()[0]
    finally:
        logging.disable(logging.NOTSET)
    return "cuda" if getattr(lib, "compiled_with_cuda", False) else "cpu"


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _outdated() -> list[str]:
    """Return unmet requirements of this package; none are known where it runs without being installed."""
    try:
        wanted = [Requirement(text) for text in metadata.requires("veneer") or []]
    except metadata.PackageNotFoundError:
        return []
    unmet = []
    for requirement in wanted:
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        version = _version(requirement.name)
        if version is None or not requirement.specifier.contains(version, prereleases=True):
            unmet.append(f"{requirement} (found {version or 'none'})")
    return unmet


def _free(folder: Path) -> int:
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free
