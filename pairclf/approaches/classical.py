"""The approach `classical`, linear models, neighbours and trees on TF-IDF: the protocol, without torch.

A worker receives the row itself (`Item.ids`) and computes the features.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from pairclf.approaches import classical_model
from pairclf.approaches.classical_model import ClassicalModel
from pairclf.approaches.classical_vectors import CHUNK, Extracted, extract
from pairclf.approaches.protocol import (
    MEMORY_GB,
    SECONDS_BEFORE,
    Assignment,
    Loaded,
    ModelCost,
    Prepared,
    Process,
    only_process,
)
from pairclf.bundles.bundle import Bundle, Saved
from pairclf.bundles.contents import CONFIG, BundleFiles
from pairclf.bundles.probes import probe_rows
from pairclf.config import SECTIONS, Config, dump_config
from pairclf.console import progress
from pairclf.data.folds import prompt_groups
from pairclf.data.rows import targets_of, to_rows
from pairclf.files import write_text
from pairclf.hardware import peak_resident_memory
from pairclf.inputs.cache import RowSource
from pairclf.inputs.plan import CHEAPEST
from pairclf.inputs.sequences import Item, SequenceIndex
from pairclf.run import Run, Split, identity_of_rows
from pairclf.scores.metrics import Floats
from pairclf.task import Row

UNIT = 64
"""Characters of a unit of length, so that a forward pass of a few thousand units is some dozens of rows."""

SPEED = 2e6 / UNIT
"""Units that a core scores in a second: 2.0 million characters a second were measured, with trees or without."""

LONGEST = 1024
"""Units of a long row. Texts may be longer: nothing is allocated for the longest."""


@dataclass(frozen=True, slots=True)
class SizedRow:
    """A row with its length in units, for each of its orders: they are computed together."""

    row: Row
    units: int

    def __len__(self) -> int:
        return self.units

    @property
    def ids(self) -> SizedRow:
        """What travels to a worker."""
        return self


class FittedClassical:
    """A fitted model.

    Args:
        model: what was fitted.
        extracted: the features of rows of the run.
        seconds: that the training took.
        seconds_before: that the features of a row took.
    """

    def __init__(
        self,
        model: ClassicalModel,
        extracted: Callable[[pl.DataFrame], Extracted],
        seconds: float,
        seconds_before: float = 0.0,
    ) -> None:
        self._model, self._extracted = model, extracted
        memory = peak_resident_memory() / 1e9
        self.record: Mapping[str, float] = {"seconds": seconds, SECONDS_BEFORE: seconds_before, MEMORY_GB: memory}

    def logits(self, rows: pl.DataFrame) -> Floats:
        return self._model.scores(self._extracted(rows))

    def save(self, folder: Path) -> Saved:
        self._model.save(BundleFiles(folder).classical)
        packages = classical_model.packages_of(self._model.space.settings)
        return Saved("classical", "none", "float64", ("pairclf", "safetensors", *packages))


class ClassicalTrainer:
    """A run's rows. What hangs on a row alone is computed once, and the IDF, the SVD and the models fold by fold."""

    def __init__(self, run: Run) -> None:
        self.config: Config = run.config
        self._run = run

    @cached_property
    def _features(self) -> tuple[dict[str, int], Extracted, float]:
        """Places of the run's rows by id, their features, and the seconds that those of a row took."""
        frame, config = self._run.frame, self.config
        parts, start = [], time.perf_counter()
        with progress("features", len(frame)) as advance:
            for chunk in frame.iter_slices(CHUNK):
                parts.append(extract(to_rows(chunk, config.task), config.task, config.classical))
                advance(len(chunk))
        seconds = (time.perf_counter() - start) / len(frame)
        return {row: place for place, row in enumerate(frame["id"])}, Extracted.concat(parts), seconds

    @cached_property
    def _groups(self) -> dict[str, str]:
        """Groups of the run's rows by id, over equal and nearly equal prompts, as those of folds."""
        frame, settings = self._run.frame, self.config.folds
        groups = prompt_groups(frame, self.config.task, settings.near_duplicate_threshold)
        return dict(zip(frame["id"], groups, strict=True))

    def _extracted(self, rows: pl.DataFrame) -> Extracted:
        places, features, _ = self._features
        return features[[places[row] for row in rows["id"]]]

    def identity(self, split: Split) -> dict[str, Any]:
        return identity_of_rows(self.config, split)

    def fit(self, split: Split, folder: Path, *, resume: bool | None, trust_checkpoint: bool) -> FittedClassical:
        config, rows, start = self.config, split.training, time.perf_counter()
        write_text(folder / CONFIG, dump_config(config))
        groups = self._groups if classical_model.reads_groups(config.classical) else {}
        model = classical_model.fit_extracted(
            self._extracted(rows),
            [groups.get(row, row) for row in rows["id"]],
            targets_of(rows),
            rows["weight"].to_numpy(),
            config.task,
            config.classical,
            config.seed,
        )
        return FittedClassical(model, self._extracted, time.perf_counter() - start, self._features[2])

    def finish(self, folder: Path) -> None:
        """Nothing was kept: a model is fitted in minutes, and begins anew."""


class ClassicalScorer:
    """Scores rows on the CPU, at once when they are launched."""

    def __init__(self, model: ClassicalModel) -> None:
        self._model = model

    def launch(self, items: Sequence[Item]) -> Floats:
        rows: dict[int, Row] = {item.row: item.ids.row for item in items}
        places = {row: place for place, row in enumerate(rows)}
        logits = self._model.logits(list(rows.values()))
        return logits[[places[item.row] for item in items], [item.order for item in items]]

    def collect(self, items: Sequence[Item], launched: Floats) -> tuple[Floats, int]:
        launched[~np.isfinite(launched).all(axis=1)] = np.nan
        return launched, 0

    def recover(self) -> None:
        """Nothing is held."""


class ClassicalApproach:
    """Hashed TF-IDF and dense features, with any of `classical_model.MODELS` or a stack of them."""

    sections = frozenset(SECTIONS["classical"])
    module = __name__
    uses_gpu = False
    unit = f"units of {UNIT} characters"

    # --- training ----------------------------------------------------------------------------------------------------

    def check(self, config: Config) -> None:
        classical_model.check(config.classical, config.task)

    def start(self, config: Config) -> Process:
        return only_process(config)

    def trainer(self, run: Run, process: Process) -> ClassicalTrainer:
        return ClassicalTrainer(run)

    # --- prediction --------------------------------------------------------------------------------------------------

    def recipe(self, bundle: Bundle) -> str:
        return json.dumps(["classical", bundle.config.data.of_bundle.model_dump(mode="json")])

    def encode(self, bundle: Bundle, rows: Sequence[Row]) -> list[tuple[SizedRow, ...]]:
        orders = 2 if bundle.config.task.swappable else 1
        return [(SizedRow(row, units_of(row)),) * orders for row in rows]

    def prepare(self, bundle: Bundle, source: RowSource, folder: Path) -> Prepared:
        is_over = source.step()
        frames = takewhile(lambda frame: not is_over(), source.frames())
        encoded = self.encode(bundle, [row for frame in frames for row in to_rows(frame, bundle.config.task)])
        return Prepared(encoded, self.index(encoded))

    def longest(self, bundle: Bundle) -> int:
        return LONGEST

    def index(self, encoded: Sequence[tuple[SizedRow, ...]]) -> SequenceIndex:
        lengths, duplicate_of = [], []
        places: dict[bytes, int] = {}
        for place, orders in enumerate(encoded):
            sized, count = orders[0], len(orders)
            lengths.append([sized.units] * count)
            texts = json.dumps(sized.row.fields, sort_keys=True).encode()
            first = places.setdefault(hashlib.blake2b(texts, digest_size=16).digest(), place)
            duplicate_of.append([first * count + order for order in range(count)])
        # Both orders are computed at once, whether or not both are asked for: all of a row is shared by them.
        shared = [row[0] if len(row) > 1 else 0 for row in lengths]
        lengths_of, shared_of, first_of = (np.array(values, np.int64) for values in (lengths, shared, duplicate_of))
        return SequenceIndex(lengths_of, shared_of, first_of)

    def cost(self, bundle: Bundle, base: Path | None) -> ModelCost:
        return ModelCost(1.0, 0.0, bundle.files.classical.stat().st_size, {"cpu": SPEED})

    def identity(self, bundle: Bundle, devices: Sequence[str]) -> dict[str, object]:
        return {package: version(package) for package in classical_model.packages_of(bundle.config.classical)}

    def load(self, bundle: Bundle, assignment: Assignment) -> Loaded:
        return Loaded(
            ClassicalScorer(self._model(bundle)), CHEAPEST, f"cpu, float64: TF-IDF, {bundle.config.classical.model}"
        )

    def score_probes(self, bundle: Bundle, base: Path | None) -> tuple[Floats, str]:
        return self._model(bundle).logits(probe_rows(bundle)), "float64"

    def _model(self, bundle: Bundle) -> ClassicalModel:
        return classical_model.load(bundle.files.classical, bundle.config.task, bundle.config.classical)


def units_of(row: Row) -> int:
    """Length of a row in units, one at least."""
    return max(1, math.ceil(classical_model.characters(row) / UNIT))
