"""Which devices a run computes on, and whether each holds the model or they hold it together."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import safe_open

from pairclf.config import Model, Predict
from pairclf.errors import ConfigError, ModelError, quoted
from pairclf.model.backbone import resolve_base, weight_files
from pairclf.model.bundle import Bundle

_GIB = 1 << 30
HEADROOM = 0.1, 1.5 * _GIB
"""What a device must have beyond the weights: a share of its memory, and bytes for CUDA itself and a batch's states."""

_STORED = {"nf4": 0.5 + (1 + 4 / 256) / 64, "int8": 1.0}
"""Bytes a quantised weight. NF4: half a byte, a scale of one byte a block of 64, and 4 bytes for 256 of these."""

_CAST = {"F64", "F32", "BF16", "F16"}
"""safetensors' names of what is cast to the dtype computed in; all else, packed weights, stays as it is."""

_WIDTHS = {"I64": 8, "I32": 4, "I16": 2}
"""Bytes of what is not cast, where it is not one."""


class Gpu(NamedTuple):
    """A CUDA device: its name, and bytes of memory."""

    name: str
    memory: int


@dataclass(frozen=True, slots=True)
class Placement:
    """Where the workers compute.

    Attributes:
        groups: the devices of each worker; more than one: the layers lie over them.
        why: for people.
    """

    groups: tuple[tuple[str, ...], ...]
    why: str

    @property
    def gpu(self) -> bool:
        """Whether a worker computes on a GPU."""
        return any(device.startswith("cuda") for group in self.groups for device in group)


def choose(settings: Predict, model_bytes: int) -> Placement:
    """Devices by `predict.devices` and `predict.spread`, and by what fits.

    Args:
        settings: the section `predict`.
        model_bytes: the largest model of the run, as `model_bytes` has it.

    Raises:
        ConfigError: a device is not there, or can't be part of what is asked for.
        ModelError: the model does not fit.
    """
    return place(settings, model_bytes, _look() if torch.cuda.device_count() else [])


def place(settings: Predict, model_bytes: int, gpus: Sequence[Gpu]) -> Placement:
    """`choose` among these GPUs."""
    devices = named_devices(settings, len(gpus))
    memory = {f"cuda:{index}": gpu.memory for index, gpu in enumerate(gpus)}
    shown = " + ".join(f"{one} ({gpus[int(one[5:])].name})" if one in memory else one for one in devices)
    if settings.spread == "pipeline" or (settings.spread == "auto" and not _fits_each(devices, memory, model_bytes)):
        return _pipeline(devices, memory, model_bytes, shown, asked=settings.spread == "pipeline")
    # What was asked for is refused only where the weights alone are too large: the headroom is a guess.
    if settings.spread == "replicas" and not _fits_each(devices, memory, model_bytes, bare=True):
        raise ModelError(
            f"predict.spread=replicas, but the model of {_gib(model_bytes)} does not fit on each of {shown}",
            remedy="set predict.spread=pipeline, name fewer devices, or quantise the model",
        )
    each = "the whole model on each" if len(devices) > 1 else "the whole model"
    return Placement(tuple((one,) for one in devices), f"{shown}: {each}, {_gib(model_bytes)}")


def named_devices(settings: Predict, gpus: int) -> list[str]:
    """The devices to compute on, `cuda:0` or `cpu`, on a machine with so many GPUs.

    Raises:
        ConfigError: a device is not there.
    """
    named = [_named(one, gpus) for one in settings.devices]
    return named or [f"cuda:{index}" for index in range(gpus)] or ["cpu"]


def _named(device: str, gpus: int) -> str:
    """`cuda` -> `cuda:0`; what can't be meant is refused."""
    try:
        found = torch.device(device)
    except RuntimeError:
        found = None
    if found is None or found.type not in ("cpu", "cuda"):
        raise ConfigError(f"predict.devices names {quoted(device)}", remedy="name cpu, or cuda:0, cuda:1, ...")
    if found.type == "cpu":
        return "cpu"
    if (found.index or 0) >= gpus:
        raise ConfigError(f"predict.devices names {device}, and there are {gpus} GPUs", remedy="name one that there is")
    return f"cuda:{found.index or 0}"


def _fits_each(devices: Sequence[str], memory: Mapping[str, int], size: int, *, bare: bool = False) -> bool:
    """Whether as many models as name a GPU fit on it; CPUs are taken at their word."""
    share, fixed = (0.0, 0.0) if bare else HEADROOM
    there = Counter(device for device in devices if device in memory)
    return all(count * (size + fixed) <= (1 - share) * memory[device] for device, count in there.items())


def _pipeline(devices: Sequence[str], memory: Mapping[str, int], size: int, shown: str, *, asked: bool) -> Placement:
    if len(set(devices)) < 2 or len(set(devices)) < len(devices) or not set(devices) <= memory.keys():
        if asked:
            raise ConfigError(
                f"predict.spread=pipeline needs two different GPUs or more, and there is {shown}",
                remedy="set predict.spread=auto, or name them in predict.devices",
            )
        raise _too_large(size, shown)
    share, fixed = HEADROOM
    if size > sum((1 - share) * memory[device] - fixed for device in devices):
        raise _too_large(size, shown)
    why = "as set" if asked else "no one of them holds it"
    return Placement((tuple(devices),), f"{shown}: the model's layers over all of them, {_gib(size)}: {why}")


def _too_large(size: int, shown: str) -> ModelError:
    return ModelError(
        f"the model takes {_gib(size)}, more than {shown} can hold beside a batch",
        remedy="export it quantised (pairclf export), or name more GPUs in predict.devices",
    )


def _look() -> list[Gpu]:
    """All CUDA devices, asked for in a process of its own: to ask would make a context in this one, and hold memory."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(_gpus).result()


def _gpus() -> list[Gpu]:
    found = map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
    return [Gpu(one.name, one.total_memory) for one in found]


def model_bytes(bundle: Bundle, base: Path | None = None) -> int:
    """Bytes that a bundle's weights take on a GPU, from the heads of its files: nothing is loaded.

    Raises:
        ModelError: the base is not there.
    """
    model = bundle.config.model
    source = str(bundle.folder / "backbone") if model.lora is None else resolve_base(model.base, base)
    adapter = sum(path.stat().st_size for path in (bundle.folder / "adapter").glob("*.safetensors"))
    return sum(_file_bytes(path, model) for path in weight_files(source)) + adapter


def _file_bytes(path: Path, model: Model) -> int:
    """Of the backbone's weights in a file; the LM head is not loaded."""
    width = 4 if model.dtype == "float32" else 2  # auto: a 16-bit dtype on every GPU
    total = 0.0
    with safe_open(path, framework="pt") as weights:
        for name in weights.keys():  # noqa: SIM118 - it is no dict
            if "lm_head." in name:
                continue
            tensor = weights.get_slice(name)
            shape, stored = tensor.get_shape(), tensor.get_dtype()
            linear = len(shape) == 2 and "embed" not in name and name.endswith(".weight")
            cast = _STORED.get(model.quantization, width) if linear else width
            total += math.prod(shape) * (cast if stored in _CAST else _WIDTHS.get(stored, 1))
    return math.ceil(total)


def _gib(size: float) -> str:
    return f"{size / _GIB:.1f} GiB"
