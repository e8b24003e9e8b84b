"""Choose devices: a replica of the model on each, or its layers split over several."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from typing import NamedTuple

from pairclf.config import Predict
from pairclf.errors import ConfigError, ModelError, quoted
from pairclf.hardware import GIB, HEADROOM, has_gpu_driver
from pairclf.signals import work_for_parent

_DEVICE = re.compile(r"(cpu|cuda)(?::([0-9]{1,3}))?")


class Gpu(NamedTuple):
    """A CUDA device: its name, and bytes of memory."""

    name: str
    memory: int


@dataclass(frozen=True, slots=True)
class Placement:
    """Where the workers compute.

    Attributes:
        groups: the devices of each worker; the layers are split over several devices.
        why: reasons, for messages.
    """

    groups: tuple[tuple[str, ...], ...]
    why: str

    @property
    def gpu(self) -> bool:
        """Whether a worker computes on a GPU."""
        return any(device.startswith("cuda") for group in self.groups for device in group)


def choose(settings: Predict, model_bytes: int) -> Placement:
    """Devices by `predict.devices` and `predict.parallelism`, and by what fits.

    Args:
        settings: the section `predict`.
        model_bytes: the largest model of the run, as `model_bytes` has it.

    Raises:
        ConfigError: a device is not there, or can't be part of what is asked for.
        ModelError: the model does not fit.
    """
    return place(settings, model_bytes, _query_gpus() if gpu_count(settings) else [])


def gpu_count(settings: Predict) -> int:
    """CUDA devices of this machine; 0, without importing torch, if it has none or the settings name only CPUs."""
    if not has_gpu_driver():
        return 0
    if settings.devices and all(_DEVICE.fullmatch(device) and device.startswith("cpu") for device in settings.devices):
        return 0
    import torch

    return torch.cuda.device_count()


def place(settings: Predict, model_bytes: int, gpus: Sequence[Gpu]) -> Placement:
    """`choose` among these GPUs."""
    devices = named_devices(settings, len(gpus))
    memory = {f"cuda:{index}": gpu.memory for index, gpu in enumerate(gpus)}
    description = " + ".join(
        f"{device} ({gpus[int(device[5:])].name})" if device in memory else device for device in devices
    )
    choice = settings.parallelism
    if choice == "pipeline" or (choice == "auto" and not _fits_each(devices, memory, model_bytes)):
        return _pipeline(devices, memory, model_bytes, description, asked=choice == "pipeline")
    # What was asked for is refused only where the weights alone are too large: the headroom is a guess.
    if choice == "replicas" and not _fits_each(devices, memory, model_bytes, bare=True):
        raise ModelError(
            f"predict.parallelism=replicas, but the model of {_gib(model_bytes)} does not fit on each of {description}",
            remedy="set predict.parallelism=pipeline, name fewer devices, or quantise the model",
        )
    each = "the whole model on each" if len(devices) > 1 else "the whole model"
    return Placement(tuple((device,) for device in devices), f"{description}: {each}, {_gib(model_bytes)}")


def named_devices(settings: Predict, gpus: int) -> list[str]:
    """The devices to compute on, such as `cuda:0` or `cpu`, on a machine with `gpus` GPUs.

    Raises:
        ConfigError: a device is not there.
    """
    named = [_normalised_device(device, gpus) for device in settings.devices]
    return named or [f"cuda:{index}" for index in range(gpus)] or ["cpu"]


def _normalised_device(device: str, gpus: int) -> str:
    """`cuda` -> `cuda:0`; unknown or missing devices are refused."""
    match = _DEVICE.fullmatch(device)
    if match is None:
        raise ConfigError(f"predict.devices names {quoted(device)}", remedy="name cpu, or cuda:0, cuda:1, ...")
    kind, index = match[1], int(match[2] or 0)
    if kind == "cpu":
        return "cpu"
    if index >= gpus:
        raise ConfigError(f"predict.devices names {device}, and there are {gpus} GPUs", remedy="name one that there is")
    return f"cuda:{index}"


def _fits_each(devices: Sequence[str], memory: Mapping[str, int], size: int, *, bare: bool = False) -> bool:
    """Whether each GPU holds all replicas assigned to it; CPUs are not checked."""
    share, fixed = (0.0, 0.0) if bare else HEADROOM
    counts = Counter(device for device in devices if device in memory)
    return all(count * (size + fixed) <= (1 - share) * memory[device] for device, count in counts.items())


def _pipeline(
    devices: Sequence[str], memory: Mapping[str, int], size: int, description: str, *, asked: bool
) -> Placement:
    if len(set(devices)) < 2 or len(set(devices)) < len(devices) or not set(devices) <= memory.keys():
        if asked:
            raise ConfigError(
                f"predict.parallelism=pipeline needs two different GPUs or more, and there is {description}",
                remedy="set predict.parallelism=auto, or name them in predict.devices",
            )
        raise _too_large(size, description)
    share, fixed = HEADROOM
    if size > sum((1 - share) * memory[device] - fixed for device in devices):
        raise _too_large(size, description)
    why = "as set" if asked else "it does not fit on one of them"
    return Placement((tuple(devices),), f"{description}: the model's layers over all of them, {_gib(size)}: {why}")


def _too_large(size: int, description: str) -> ModelError:
    return ModelError(
        f"the model takes {_gib(size)}, more than {description} can hold beside a batch",
        remedy="export it quantised (pairclf export), or name more GPUs in predict.devices",
    )


def _query_gpus() -> list[Gpu]:
    """All CUDA devices, queried in a subprocess: a query creates a CUDA context, which occupies GPU memory."""
    with ProcessPoolExecutor(1, get_context("spawn"), work_for_parent) as pool:
        return pool.submit(_list_gpus).result()


def _list_gpus() -> list[Gpu]:
    import torch

    properties = map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
    return [Gpu(device.name, device.total_memory) for device in properties]


def _gib(size: float) -> str:
    return f"{size / GIB:.1f} GiB"
