"""What devices do: as they were measured elsewhere, with the source."""

from __future__ import annotations

from dataclasses import dataclass

GIB = 1 << 30


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


_KAGGLE = "loading at 200 MB/s is a guess"

PROFILES = {
    "t4": Profile("Tesla T4", 1, 24e12, 300e9, 15 * GIB, 2e8, f"24 TFLOP/s under its 70 W cap, measured; {_KAGGLE}"),
    "t4x2": Profile("Tesla T4", 2, 24e12, 300e9, 15 * GIB, 2e8, f"24 TFLOP/s under its 70 W cap, measured; {_KAGGLE}"),
    "l4x4": Profile("NVIDIA L4", 4, 48e12, 300e9, 22 * GIB, 2e8, f"40% of the data sheet's peak; {_KAGGLE}"),
    "a100": Profile("NVIDIA A100 80GB", 1, 200e12, 2.0e12, 79 * GIB, 1e9, "64% of the data sheet's peak"),
    "h100": Profile("NVIDIA H100", 1, 500e12, 3.3e12, 79 * GIB, 1e9, "50% of the data sheet's peak"),
    "h200": Profile("NVIDIA H200", 1, 500e12, 4.8e12, 139 * GIB, 1e9, "50% of the data sheet's peak"),
}
"""`forecast --device`. A forecast for a machine at hand is better made there, with `--device here`."""
