"""Every figure about GPUs and Kaggle's machines, once, with its source; and what memory this machine has."""

from __future__ import annotations

import os
import resource
from dataclasses import dataclass, replace
from pathlib import Path

GIB = 1 << 30

HEADROOM = 0.1, 1.5 * GIB
"""What a GPU must have beyond a model's weights: a share of its memory, and bytes for CUDA itself and a batch's states.
A guess."""


_GPU_NODES = "/dev/nvidiactl", "/dev/kfd", "/dev/dxg"
"""Files of the drivers of NVIDIA, of AMD, and of Linux inside of Windows (WSL)."""


def has_gpu_driver() -> bool:
    """Whether this machine may have a GPU. If not, nobody needs to ask torch, which takes seconds to import."""
    return any(os.path.exists(node) for node in _GPU_NODES)


def dtype_of(setting: str, capability: tuple[int, int] | None) -> tuple[str, str]:
    """The name of the dtype to compute in by `model.dtype`, and why.

    `torch.cuda.is_bf16_supported()` counts emulation, which is slower than float32 on a T4; hence the capability.

    Args:
        setting: `auto`, or a dtype's name.
        capability: the compute capability of the GPU; None: it is a CPU.
    """
    if setting != "auto":
        return setting, "as set"
    if capability is None:
        return "float32", "CPU: bfloat16 is many times slower there"
    number = ".".join(map(str, capability))
    if capability[0] >= 8:
        return "bfloat16", f"compute capability {number} has bfloat16"
    return "float16", f"compute capability {number} only emulates bfloat16"


@dataclass(frozen=True, slots=True)
class Profile:
    """One kind of machine.

    Attributes:
        name: of its GPU.
        count: of GPUs.
        flops: 16-bit operations a second that each sustains in large matrix products.
        bandwidth: bytes a second of each one's memory, which dequantising a model waits for.
        memory: bytes of each.
        read: bytes a second in which a model is loaded.
        source: of the figures, for people.
    """

    name: str
    count: int
    flops: float
    bandwidth: float
    memory: int
    read: float
    source: str

    @property
    def tflops(self) -> float:
        """10^12 operations a second of all its GPUs."""
        return self.count * self.flops / 1e12


PEAK: dict[str, float] = {
    "B200": 2250e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "L40S": 362e12,
    "L40": 181e12,
    "A100": 312e12,
    "A10G": 70e12,
    "A10": 125e12,
    "RTX PRO 6000": 480e12,
    "RTX 5090": 209.5e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
    "L4": 121e12,
    "V100": 125e12,
    "T4": 65e12,
    "P100": 18.7e12,
}
"""Peak FLOP/s at 16 bits, dense, accumulated in float32, by the words of a GPU's name; the first that is in it counts.

From NVIDIA's data sheets (which state twice as much where "with sparsity" is written) and, for the RTX cards, the
Ampere, Ada and Blackwell white papers; RTX PRO 6000 is the Server Edition, as Kaggle has it (Workstation Edition:
504e12). P100 has no tensor cores: its plain float16.
"""


_KAGGLE = "loading at 200 MB/s is a guess"
_L4 = Profile("NVIDIA L4", 1, 48e12, 300e9, 22 * GIB, 2e8, f"40% of the data sheet's peak; {_KAGGLE}")
_T4 = Profile("Tesla T4", 1, 24e12, 300e9, 15 * GIB, 2e8, f"24 TFLOP/s under its 70 W cap, as others report; {_KAGGLE}")


def _of_data_sheet(gpu: str, bandwidth: float, gib: int) -> Profile:
    """A GPU that nobody has measured here: half of its peak, and its data sheet's bandwidth and memory."""
    source = "data sheet: half of its peak, its bandwidth and memory; loading at 1 GB/s is a guess"
    return Profile(f"NVIDIA {gpu}", 1, PEAK[gpu] / 2, bandwidth, gib * GIB, 1e9, source)


PROFILES = {
    "t4": _T4,
    "t4x2": replace(_T4, count=2),
    "l4": _L4,
    "l4x4": replace(_L4, count=4),
    "a100-40": Profile("NVIDIA A100 40GB", 1, 200e12, 1.555e12, 39 * GIB, 1e9, "64% of the data sheet's peak"),
    "a100": Profile("NVIDIA A100 80GB", 1, 200e12, 2.0e12, 79 * GIB, 1e9, "64% of the data sheet's peak"),
    "h100": Profile("NVIDIA H100", 1, 500e12, 3.3e12, 79 * GIB, 1e9, "50% of the data sheet's peak"),
    "h200": Profile("NVIDIA H200", 1, 500e12, 4.8e12, 139 * GIB, 1e9, "50% of the data sheet's peak"),
    "3090": _of_data_sheet("RTX 3090", 936e9, 23),
    "4090": _of_data_sheet("RTX 4090", 1008e9, 23),
    "5090": _of_data_sheet("RTX 5090", 1792e9, 31),
    "rtxpro6000": _of_data_sheet("RTX PRO 6000", 1597e9, 94),
}
"""Profiles for `forecast --device`, none of them measured with pairclf (docs/performance.md). On the machine itself,
`--device here` gives a better forecast."""

SUSTAINED = {"cuda": _T4.flops, "cpu": 3e10}
"""Operations a second that a worker is taken to do before it made a pass: a T4's, and those of a CPU's core."""


LAUNCH_SECONDS = 1 / 25.5 / 32
"""Seconds of a forward pass over one token for each layer, in which a processor launches its kernels one after the
other; a GPU that is faster waits. 25.5 tokens a second of a Llama of 7B with 32 layers on an A100, without a compiler
(https://pytorch.org/blog/accelerating-generative-ai-2); its weights alone would take 7 ms of these 39."""


def peak_of_name(name: str) -> float | None:
    """The peak of the first GPU of `PEAK` whose words are all in a device's name.

    >>> peak_of_name("NVIDIA L40S") == PEAK["L40S"], peak_of_name("NVIDIA L400")
    (True, None)
    """
    words = name.replace("-", " ").split()
    return next((peak for gpu, peak in PEAK.items() if set(gpu.split()) <= set(words)), None)


@dataclass(frozen=True, slots=True)
class Machine:
    """One of Kaggle's: GB are 10^9 bytes, `disk_gb` is that of /kaggle/working, `profile` a key of `PROFILES`."""

    what: str
    gpus: int
    cores: int
    memory_gb: float
    disk_gb: float
    profile: str | None = None


MACHINES = {
    "NvidiaTeslaT4": Machine("two T4 with 16 GB each", 2, 4, 29, 20, "t4x2"),
    "NvidiaL4": Machine("four L4 with 24 GB each, in some competitions", 4, 48, 192, 20, "l4x4"),
    "NvidiaL4X1": Machine("one L4 with 24 GB, in some competitions", 1, 4, 16, 20, "l4"),
    "NvidiaTeslaA100": Machine("one A100 with 40 GB or more, in some competitions", 1, 12, 85, 20, "a100-40"),
    "NvidiaH100": Machine("one H100 with 80 GB, in some competitions", 1, 26, 234, 20, "h100"),
    "NvidiaRtxPro6000": Machine("one RTX PRO 6000 with 96 GB, in some competitions", 1, 48, 180, 20, "rtxpro6000"),
    "None": Machine("no accelerator", 0, 4, 29, 20),
}
"""`machine_shape`, in the client's words (`kernels push --accelerator`). TPUs are left out: nothing here runs on them.

Cores and memory beside other GPUs than T4 are those of the cloud's machines with these GPUs, the smallest where Kaggle
does not say which (g2-standard-48, g2-standard-4, a2-highgpu-1g, a3-highgpu-1g, g4-standard-48).
"""

_TPU = "a TPU, on which nothing here runs"
REFUSED_MACHINES = {
    "NvidiaTeslaP100": "retired: Kaggle would run it on NvidiaTeslaT4",
    "NvidiaTeslaT4Highmem": "for Kaggle's staff alone",
    **dict.fromkeys(("TpuV38", "Tpu1VmV38", "TpuV232", "TpuV2256", "TpuV5E8", "TpuV6E8"), _TPU),
}
"""`{machine_shape that is no choice: why}`. kaggle 2.2.5 (`_RETIRED_ACCELERATORS`) warns of the retired ones, and sends
them all the same; the staff's machine: github.com/Kaggle/kaggle-cli/issues/1196."""


def resident_memory() -> int:
    """Bytes of memory that this process has now."""
    resident = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return resident * os.sysconf("SC_PAGE_SIZE")


def peak_resident_memory() -> int:
    """Most bytes of memory that this process has had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB


def process_memory(processes: int) -> int:
    """Bytes that each of `processes` processes can use: those of this process, and its share of the free memory."""
    lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    return resident_memory() + free // processes
