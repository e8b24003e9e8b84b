"""Prepare a test file and an ensemble for workers and planner."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pairclf.approaches import approach_of
from pairclf.approaches.protocol import ModelCost, Prepared
from pairclf.config import Predict
from pairclf.inference.devices import Placement, choose, gpu_count, named_devices
from pairclf.inference.ensemble import EnsembleMember
from pairclf.inference.planner import PlannedModel
from pairclf.inference.pool import WorkerModel
from pairclf.inputs.sequences import LargestPass, SequenceIndex
from pairclf.run import unlabelled

LOAD_BYTES_PER_SECOND = 3e8
"""Assumed load speed before the first load, bytes a second: a network disk's."""


def prepare(members: Sequence[EnsembleMember], data: Path, folder: Path) -> list[Prepared]:
    """Encode the file for each model; models with the same recipe (folds of one run) share the encoding."""
    by_recipe: dict[str, Prepared] = {}
    prepared = []
    for member in members:
        approach = approach_of(member.bundle.config)
        recipe = approach.recipe(member.bundle)
        if recipe not in by_recipe:
            frames = unlabelled(member.bundle.config, data)
            by_recipe[recipe] = approach.prepare(member.bundle, frames, folder)
        prepared.append(by_recipe[recipe])
    return prepared


def costs_of(members: Sequence[EnsembleMember]) -> list[ModelCost]:
    """Operations, bytes and assumed speed of each model."""
    return [approach_of(member.bundle.config).cost(member.bundle, member.base) for member in members]


def placement_of(members: Sequence[EnsembleMember], size: int) -> Placement:
    """Devices for models of at most `size` bytes, by the first member's `predict`; CPUs where no member uses a GPU.

    Raises:
        ConfigError, ModelError: as `choose`.
    """
    return choose(_settings(members), size)


def devices_of(members: Sequence[EnsembleMember]) -> list[str]:
    """Names of the devices for these models."""
    settings = _settings(members)
    return named_devices(settings, gpu_count(settings))


def _settings(members: Sequence[EnsembleMember]) -> Predict:
    """The first member's `predict`, on CPUs where no member uses a GPU."""
    settings = members[0].bundle.config.predict
    if any(approach_of(member.bundle.config).uses_gpu for member in members):
        return settings
    cpus = [device for device in settings.devices if device.startswith("cpu")]
    return settings.model_copy(update={"devices": cpus or ["cpu"]})


def planned_model_of(
    member: EnsembleMember, inputs: SequenceIndex, cost: ModelCost, placement: Placement
) -> PlannedModel:
    """A model as the planner needs it, with first estimates of speed and load time."""
    return PlannedModel(
        name=member.bundle.name,
        inputs=inputs,
        cost=cost,
        speed=cost.speed_on(placement.gpu),
        load_seconds=10.0 + cost.bytes / LOAD_BYTES_PER_SECOND,
        gain=member.gain_member,
        gain_swap=member.gain_swap,
        share=member.share,
        approach=member.bundle.config.approach,
    )


def worker_model_of(
    member: EnsembleMember, encoded: Sequence[tuple[Any, ...]], overrides: Sequence[str], largest: LargestPass
) -> WorkerModel:
    """A model as workers need it."""
    return WorkerModel(
        module=approach_of(member.bundle.config).module,
        bundle_folder=member.bundle.folder,
        base=member.base,
        overrides=tuple(overrides),
        encoded=encoded,
        largest=largest,
    )
