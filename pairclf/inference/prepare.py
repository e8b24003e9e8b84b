"""Prepare a test file and an ensemble for workers and planner."""

from __future__ import annotations

import sys
from collections.abc import Callable, Container, Sequence
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from pairclf.approaches import approach_of
from pairclf.approaches.protocol import ModelCost, Prepared
from pairclf.bundles.bundle import Bundle, verify_files
from pairclf.config import Predict
from pairclf.console import console
from pairclf.hardware import has_gpu_driver
from pairclf.inference.devices import Placement, choose, gpu_count, named_devices
from pairclf.inference.ensemble import Ensemble, EnsembleMember
from pairclf.inference.messages import Clock
from pairclf.inference.planner import PlannedModel
from pairclf.inference.pool import WorkerModel, forked, warm_up
from pairclf.inputs.cache import RowSource
from pairclf.inputs.sequences import LargestPass, SequenceIndex
from pairclf.signals import Signals
from pairclf.trust import Trust, grant, granted

LOAD_BYTES_PER_SECOND = 3e8
"""Assumed load speed before the first load, bytes a second: a network disk's."""


STEP_SHARE = 0.5
"""Largest share of the time until scoring ends that a step of the preparation may take, such as tokenising the rows."""


class StepEndedError(Exception):
    """A step of the preparation was ended by a signal or for want of time."""


class PreparationTime(NamedTuple):
    """The time for what is done before scoring.

    Attributes:
        signals: that arrived; each ends the preparation.
        clock: of the run.
        stop: clock time at which scoring ends; infinite: no deadline.
    """

    signals: Signals
    clock: Clock
    stop: float

    def limit(self, share: float = STEP_SHARE) -> Callable[[], bool]:
        """For a step that begins now: whether it is to end, because of a signal or as its share of the time is over."""
        end = self.clock() + share * (self.stop - self.clock())
        return lambda: self.signals.asked() or self.clock() >= end


def verify_in_time(members: Sequence[EnsembleMember], time: PreparationTime) -> dict[int, str]:
    """Compare the hashes of all bundles' files; without them nothing is loaded.

    Returns:
        The members for which the time did not suffice, by index, and why. Nothing can be scored without the first one,
        which may therefore take all the time.

    Raises:
        BundleError: a file was changed.
    """
    left_out = {}
    for index, member in enumerate(members):
        is_over = time.limit(STEP_SHARE if index else 1.0)

        def between(is_over: Callable[[], bool] = is_over) -> None:
            if is_over():
                raise StepEndedError

        try:
            verify_files(member.bundle, between)
        except StepEndedError:
            left_out[index] = "a signal or the deadline came before its files were verified"
            console.print(f"{member.bundle.name} is not used: {left_out[index]}")
    return left_out


def prepare(
    members: Sequence[EnsembleMember],
    source_of: Callable[[EnsembleMember, str], RowSource],
    folder: Path,
    left_out: Container[int] = (),
) -> list[Prepared]:
    """Encode the file for each model; models with the same recipe (folds of one run) share the encoding.

    Args:
        members: the models.
        source_of: the file's rows, as the rules of a model repair them, by model and recipe.
        folder: for files of the approaches.
        left_out: indices of models for which nothing is encoded.

    Returns:
        For each model, all rows of the file; those that the time did not suffice for are not known.
    """
    by_recipe: dict[tuple[str, int], Prepared] = {}
    prepared = []
    for index, member in enumerate(members):
        config = member.bundle.config
        approach = approach_of(config)
        recipe = "" if index in left_out else approach.recipe(member.bundle)
        key = recipe, config.orders  # nothing is encoded alike only in as many orders
        if key not in by_recipe:
            source, rows = source_of(member, recipe), Prepared((), SequenceIndex.empty())
            if recipe and not source.step()():
                rows = approach.prepare(member.bundle, source, folder)
            if (known := len(rows.inputs.shared)) < source.rows:
                console.print(f"{known:,} of {source.rows:,} rows are tokenised: a signal or the deadline ended it")
            padded = rows.inputs.padded(source.rows, config.orders)
            by_recipe[key] = replace(rows, inputs=padded)
        prepared.append(by_recipe[key])
    return prepared


def costs_of(members: Sequence[EnsembleMember]) -> list[ModelCost]:
    """Operations, bytes and assumed speed of each model.

    They are counted by a process that the server of the workers forks, if this one has not imported what that takes.
    """
    models = [(member.bundle, member.base) for member in members]
    modules = {approach_of(bundle.config).module for bundle, _ in models}
    if modules <= sys.modules.keys() or has_gpu_driver() or not warm_up(modules):
        return _costs(models, granted())
    with suppress(BrokenProcessPool):  # it was killed; no model is lost, and nothing is scored yet
        return forked(_costs, models, granted())
    return _costs(models, granted())


def _costs(models: Sequence[tuple[Bundle, Path | None]], trust: Trust) -> list[ModelCost]:
    grant(trust)
    return [approach_of(bundle.config).cost(bundle, base) for bundle, base in models]


def placement_of(ensemble: Ensemble, size: int) -> Placement:
    """Devices for models of at most `size` bytes; CPUs where no member uses a GPU.

    Raises:
        ConfigError, ModelError: as `choose`.
    """
    return choose(_settings(ensemble), size)


def devices_of(ensemble: Ensemble) -> list[str]:
    """Names of the devices for an ensemble's models."""
    settings = _settings(ensemble)
    return named_devices(settings, gpu_count(settings))


def _settings(ensemble: Ensemble) -> Predict:
    """The ensemble's settings, on CPUs where no member uses a GPU."""
    settings = ensemble.settings
    if any(approach_of(member.bundle.config).uses_gpu for member in ensemble.members):
        return settings
    cpus = [device for device in settings.devices if device.startswith("cpu")]
    return settings.model_copy(update={"devices": cpus or ["cpu"]})


def warm_up_workers(ensemble: Ensemble) -> None:
    """Import what CPU workers need, in the background, while this process does something else."""
    if all(device == "cpu" for device in devices_of(ensemble)):
        warm_up({approach_of(member.bundle.config).module for member in ensemble.members})


def planned_model_of(
    member: EnsembleMember, inputs: SequenceIndex, cost: ModelCost, placement: Placement
) -> PlannedModel:
    """A model as the planner needs it, with first estimates of speed and load time."""
    return PlannedModel(
        name=member.name,
        inputs=inputs,
        cost=cost,
        speed=cost.speed_on(placement.gpu),
        load_seconds=10.0 + cost.bytes / LOAD_BYTES_PER_SECOND,
        gain=member.gain_member,
        gain_swap=member.gain_swap,
        share=member.share,
        swap_share=member.swap_share,
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
        pointwise=member.bundle.config.is_pointwise,
    )
