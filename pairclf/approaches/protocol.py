"""The protocol of an approach: everything that training, prediction and packaging ask of a kind of model.

    process = approach.start(config)                      # this process among those that train
    trainer = approach.trainer(run, process)              # once per command: tokenises the rows
    fitted = trainer.fit(split, folder)                   # once per fold
    saved = fitted.save(new_bundle)

    prepared = approach.prepare(bundle, source, folder)   # a test file: encoded rows, and their lengths
    loaded = approach.load(bundle, assignment)            # in a worker: launch, collect

Nothing here imports torch: an approach imports its libraries inside its functions.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import polars as pl

from pairclf.bundles.bundle import Bundle, Saved
from pairclf.config import Config
from pairclf.errors import ConfigError
from pairclf.inputs.cache import RowSource
from pairclf.inputs.sequences import Item, LargestPass, SequenceIndex
from pairclf.run import Run, Split
from pairclf.scores.metrics import Floats
from pairclf.task import Row
from pairclf.trust import Trust

# --- training --------------------------------------------------------------------------------------------------------


class Process(NamedTuple):
    """One of the processes that train together.

    Attributes:
        is_main: whether it is the one that writes.
        main_first: what the main process does before the others do it: it writes files that they read.
        handle: what its approach needs to train in it.
    """

    is_main: bool = True
    main_first: Callable[[], AbstractContextManager[object]] = nullcontext
    handle: Any = None


def only_process(config: Config) -> Process:
    """The process of an approach that can't train in several.

    Raises:
        ConfigError: several were started.
    """
    if (count := os.environ.get("WORLD_SIZE", "1")) != "1":
        raise ConfigError(
            f"approach={config.approach} trains in one process, and {count} were started",
            remedy="leave --processes and the launcher away",
        )
    return Process()


KEPT_STEP = "kept_step"
"""In `Fitted.record` and a bundle's metrics: the step whose weights were kept, where it was chosen by evaluations."""

LABEL_MASS = "label_mass"
"""In the same and in metrics.jsonl: the share of the vocabulary's probability that the labels' tokens hold."""

CALIBRATION_GAIN = "calibration_gain"
"""In the same two: the log loss that `prompt.calibration` took off, on training rows."""


SECONDS_BEFORE = "seconds_before_scoring"
"""In `Fitted.record`: seconds a row that went into what `logits` reads of it, where that was made before."""


MEMORY_GB = "memory_gb"
"""In `Fitted.record`, or else in metrics.jsonl: the most memory of the training on its device, in 10^9 bytes."""


class Fitted(Protocol):
    """A trained model.

    Attributes:
        record: figures of the training: `seconds` (over all interruptions), `steps`, `KEPT_STEP`, `LABEL_MASS`,
            `CALIBRATION_GAIN`, `SECONDS_BEFORE`, `MEMORY_GB`, as far as there are.
    """

    record: Mapping[str, float]

    def logits(self, rows: pl.DataFrame) -> Floats:
        """Logits `(N, O, C)` of rows of the run, each order in its own columns; a task that can't swap has O = 1."""

    def save(self, folder: Path) -> Saved:
        """Write its files into the folder of a bundle; the model is not used afterwards."""


class Trainer(Protocol):
    """A run, read and ready to be trained on.

    Attributes:
        config: what is kept in the bundle: the run's, with what was read from the base (a chat template) written out.
    """

    config: Config

    def identity(self, split: Split) -> dict[str, Any]:
        """What decides weights and scores, as JSON: settings, `rows`, `held-out rows`; two runs of it end the same."""

    def fit(self, split: Split, folder: Path, *, resume: bool | None, trust_checkpoint: bool) -> Fitted | None:
        """Train on one side of the split; None in a process that is not the main one.

        Args:
            split: rows to train on, and those held out, which may be evaluated on.
            folder: for logs and checkpoints.
            resume: True: continue from the last checkpoint; False: delete checkpoints; None: refuse to choose.
            trust_checkpoint: continue from a checkpoint that this user did not write.
        """

    def finish(self, folder: Path) -> None:
        """Delete what `fit` kept in the folder to continue from: the bundle stands."""


# --- prediction ------------------------------------------------------------------------------------------------------


class Scorer(Protocol):
    """What a loaded model does for a worker."""

    def launch(self, items: Sequence[Item]) -> Any:
        """Start on a batch; a GPU is not done when it returns."""

    def collect(self, items: Sequence[Item], launched: Any) -> tuple[Floats, int]:
        """Logits `(R, C)` of what was launched, and how many of them had to be computed again in float32."""

    def recover(self) -> str | None:
        """Free what a failed batch held. What is broken for good, if this process can't go on."""


class Assignment(NamedTuple):
    """What a worker is to load.

    Attributes:
        bundle: its folder, whose hashes the parent has compared.
        base: folder of the base model, or None.
        overrides: `key=value`.
        devices: one, or those that the layers are laid over.
        threads: for the CPU's part; 0: as the environment says.
        largest: the largest forward pass that it will be asked for.
        beside: workers, it included, that share this machine's memory.
        pointwise: a reward model is to score one text a row (`Config.pointwise`).
        trust: what the person at the command permits.
    """

    bundle: Path
    base: Path | None
    overrides: tuple[str, ...]
    devices: tuple[str, ...]
    threads: int
    largest: LargestPass
    beside: int
    pointwise: bool = False
    trust: Trust = Trust()


class Loaded(NamedTuple):
    """A model that can score.

    Attributes:
        scorer: from sequences to logits.
        layout: how it lays out a batch.
        what: device, layout and why, for people.
        budget: tokens of a forward pass that the memory suffices for, where it is less than was asked for.
    """

    scorer: Scorer
    layout: str
    what: str
    budget: int | None = None


Loader = Callable[[Assignment], Loaded]


@dataclass(frozen=True, slots=True)
class Prepared:
    """The rows of a test file, as one model sees them.

    Attributes:
        encoded: by row, then order, what a worker gets of it (`Item.ids`).
        inputs: what is known of it without reading it.
    """

    encoded: Sequence[tuple[Any, ...]]
    inputs: SequenceIndex


@dataclass(frozen=True, slots=True)
class ModelCost:
    """What a model takes, known before it is loaded.

    Attributes:
        linear: operations a token (or other unit of `SequenceIndex.lengths`).
        quadratic: operations for each squared length of a sequence.
        bytes: of its weights on a device.
        speed: operations a second of one worker, by kind of device, before a pass was timed; without `cuda`, it
            computes on the CPU where there is a GPU, too.
        moved: bytes of weights that each forward pass writes and reads again, as it dequantises them; or that it reads.
        launched: seconds of a GPU's forward pass, however few its tokens and weights.
    """

    linear: float
    quadratic: float
    bytes: int
    speed: Mapping[str, float]
    moved: float = 0.0
    launched: float = 0.0

    def speed_on(self, gpu: bool) -> float:
        """Operations a second of a worker that was given a GPU, or a CPU."""
        return self.speed.get("cuda" if gpu else "cpu", self.speed["cpu"])


class Approach(Protocol):
    """One way in which rows become logits.

    Attributes:
        sections: sections of the config that it reads besides those that all do (`config.COMMON`).
        module: what a worker imports for it; workers on CPUs are forked from a process that has imported it.
        uses_gpu: whether its workers compute on a GPU where there is one.
        unit: what a row's length counts, in the plural.
    """

    sections: frozenset[str]
    module: str
    uses_gpu: bool
    unit: str

    def check(self, config: Config) -> None:
        """Raises `ConfigError` for settings that can't go together, before a row is read."""

    def start(self, config: Config) -> Process:
        """Join the processes that train together."""

    def trainer(self, run: Run, process: Process) -> Trainer:
        """Read the run's rows as the model sees them, once for all folds."""

    def recipe(self, bundle: Bundle) -> str:
        """A key that bundles have in common whose models see the same of a row."""

    def encode(self, bundle: Bundle, rows: Sequence[Row]) -> Sequence[tuple[Any, ...]]:
        """Some rows as the model sees them, by row, then order."""

    def prepare(self, bundle: Bundle, source: RowSource, folder: Path) -> Prepared:
        """A file's rows as the model sees them, kept in the folder; the first rows, if `source.step` ends it."""

    def longest(self, bundle: Bundle) -> int:
        """The largest length of a row that there can be."""

    def index(self, encoded: Sequence[tuple[Any, ...]]) -> SequenceIndex:
        """Lengths, shared starts and duplicates of encoded rows."""

    def cost(self, bundle: Bundle, base: Path | None) -> ModelCost:
        """What its model takes, from its config and the heads of its files."""

    def identity(self, bundle: Bundle, devices: Sequence[str]) -> dict[str, object]:
        """What besides bundle and rows decides its logits to the bit: versions, dtype, settings of scoring."""

    def load(self, bundle: Bundle, assignment: Assignment) -> Loaded:
        """Load the model for a worker, in the worker."""

    def score_probes(self, bundle: Bundle, base: Path | None) -> tuple[Floats, str]:
        """Logits `(P, O, C)` of the bundle's probe rows here and now, and the dtype computed in."""
