"""Checkpoints: all that a killed training needs to end in the weights that it would have had.

    checkpoints/
      step-00000200/             step-00000213-stopped/, if a signal had it written
        state.json               the place in the training, and what it must agree with
        weights.safetensors      trained weights, by name
        optimizer.safetensors    its tensors; the rest of its state stands in state.json
        average.safetensors      the moving average, where there is one
        engine/                  instead of the two above, under DeepSpeed and FSDP: as they save themselves, in
                                 pickles; state.json has their signature, and others' are not loaded
      best-00000150.safetensors  the best weights so far, where those are kept

A folder is whole or not there. Random numbers are no part of it: they are drawn anew from the number of each step.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from pairclf.config import Config
from pairclf.console import console
from pairclf.errors import CheckpointError
from pairclf.files import MAX_JSON, atomic_file, atomic_folder, parsed, read_plain, sha256_file, write_json
from pairclf.jobs.optimizers import copy_weights
from pairclf.jobs.signatures import is_signed, key_path, signature
from pairclf.jobs.step import Examples, HeldOut, Learner

CHECKPOINTS = "checkpoints"
STATE = "state.json"
ENGINE = "engine"
STOPPED = "-stopped"
FORMAT = 1

_OURS = re.compile(rf"step-\d{{8,}}({STOPPED})?|\.tmp-step-\d{{8,}}({STOPPED})?(-[0-9a-f]{{8}})?")

FREE = (
    *("output", "data", "folds", "inputs.processes", "predict.swap", "predict.tokens_per_batch", "package"),
    *("train.rows_per_batch", "train.tokens_per_batch", "train.layout", "train.gradient_checkpointing"),
    *("train.log_every", "train.trackers", "train.checkpoint_every", "train.checkpoints", "train.max_skipped"),
)
"""Settings that may change between a training and its continuation: they move no weight, but for rounding and
for the masks that dropout draws a batch.

The rows that files and folds lead to are compared themselves.
"""


@dataclass(slots=True)
class Best:
    """The best look at the held-out rows so far."""

    step: int
    score: float


@dataclass(slots=True)
class State:
    """Where a training stands, apart from its tensors.

    Attributes:
        step: optimizer steps done, skipped ones included.
        over: whether it was the last one.
        skipped: steps whose loss or gradient was not finite; `in_a_row`: how many of them just now.
        best: of the looks at the held-out rows; `looks_since`: how many there were after it.
        log: what `metrics.jsonl` will tell of, beyond its lines.
    """

    step: int = 0
    over: bool = False
    skipped: int = 0
    in_a_row: int = 0
    best: Best | None = None
    looks_since: int = 0
    log: dict[str, Any] = field(default_factory=dict)


class Checkpoints:
    """The checkpoints of one training.

    Args:
        folder: where they lie.
        keep: how many stay.
        identity: what a continuation must agree with: settings, rows.
        trusted: whether to load an engine's part that this user did not write: its pickles can run any code.
    """

    def __init__(self, folder: Path, keep: int, identity: dict[str, Any], *, trusted: bool = False) -> None:
        self.folder = folder
        self._keep = keep
        self._identity = identity
        self._trusted = trusted

    def found(self, *, due: bool = False) -> list[Path]:
        """Whole checkpoints, the oldest first; with `due` without those that a signal had written in between."""
        found = sorted(path.parent for path in self.folder.glob(f"step-*/{STATE}") if not path.parent.is_symlink())
        return [path for path in found if not (due and path.name.endswith(STOPPED))]

    def save(self, state: State, learner: Learner, *, due: bool) -> None:
        """Write one, whole or not at all, and delete those that are too many. Called by every process.

        Args:
            state: where the training stands.
            learner: its tensors.
            due: whether the settings ask for it, or a signal alone: a mean of checkpoints must not hang on signals.

        Raises:
            CheckpointError: the disk is full, or can't be written to; older checkpoints are untouched.
        """
        path = self.folder / f"step-{state.step:08d}{'' if due else STOPPED}"
        try:
            with _whole(path, learner.accelerator) as new:
                digests: dict[str, str] = {}
                if learner.engine:
                    learner.accelerator.save_state(str(new / ENGINE), safe_serialization=True)
                    learner.accelerator.wait_for_everyone()
                    digests = _digests(new / ENGINE, learner.accelerator)
                if learner.accelerator.is_main_process:
                    self._write(new, state, learner, signature(digests) if learner.engine else None)
        except (OSError, SafetensorError) as error:  # safetensors hides the system's error in its own
            raise _unwritten(f"the checkpoint of step {state.step}", path, error) from error
        if learner.accelerator.is_main_process:
            self._delete_old()
            self._delete_best(state)

    def _write(self, new: Path, state: State, learner: Learner, signed: str | None) -> None:
        optimizer: dict[str, Any] = {}
        if not learner.engine:
            save_file(_on_cpu(learner.weights), new / "weights.safetensors")
            tensors, optimizer = flattened(learner.optimizer.state_dict())
            save_file(_on_cpu(tensors), new / "optimizer.safetensors")
        if _averages(learner):
            save_file(_on_cpu(_averages(learner)), new / "average.safetensors")
        scaler = learner.accelerator.scaler
        tree = {
            "format": FORMAT,
            "identity": self._identity,
            "state": asdict(state),
            "optimizer": optimizer,
            "scaler": scaler.state_dict() if scaler is not None else None,
            "engine": signed,
        }
        write_json(new / STATE, tree)

    def _delete_old(self) -> None:
        due, newest = self.found(due=True), self.found()[-1]
        kept = {*due[-self._keep :], newest}
        for path in set(self.found()) - kept:
            (path / STATE).unlink()  # first: without it a folder that is half deleted is no checkpoint
        for path in self.folder.iterdir():
            # What was killed half-way goes too. A link is not ours; the folder may be one, and hold others' files.
            if path not in kept and _OURS.fullmatch(path.name) and path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)

    def _delete_best(self, state: State) -> None:
        """Best weights that neither a checkpoint nor the training itself would go on with."""
        bests = [_state_of(path)["state"]["best"] for path in self.found()]
        named = {_best_name(best["step"]) for best in bests if best} | (
            {_best_name(state.best.step)} if state.best else set()
        )
        for path in self.folder.glob("best-*.safetensors"):
            if path.name not in named:
                path.unlink()

    def restore(self, learner: Learner) -> State | None:
        """Fill the learner from the newest checkpoint and return its state; None if there is none.

        Raises:
            CheckpointError: it belongs to another config or to other rows, or is damaged.
        """
        found = self.found()
        if not found:
            return None
        path = found[-1]
        try:
            tree = _state_of(path)
            self._check(tree, path)
            self._fill(path, tree, learner)
            best = tree["state"].pop("best")
            state = State(**tree["state"], best=Best(**best) if best else None)
            if learner.config.train.keep == "best" and state.best:
                self.load_best(state.best.step)  # now, and not after the last step
        except (SafetensorError, FileNotFoundError, ValueError, LookupError, TypeError, AttributeError) as error:
            raise CheckpointError(
                f"the checkpoint is damaged: {' '.join(str(error).split())[:200]}",
                where=path,
                remedy="delete this folder and go on with --resume from the one before",
            ) from error
        return state

    def _check(self, tree: dict[str, Any], path: Path) -> None:
        if tree["format"] != FORMAT:
            raise CheckpointError(
                f"the checkpoint has format {tree['format']}, this pairclf reads {FORMAT}", where=path
            )
        saved, here = dict(tree["identity"]), self._identity
        if differing := [
            f"{key}={here.get(key)} (was {saved.get(key)})" for key in here if here[key] != saved.get(key)
        ]:
            raise CheckpointError(
                "the training that stopped was another one: " + ", ".join(differing[:5]),
                where=path,
                remedy="give the settings and rows that it had, or start over with --no-resume",
            )

    def _fill(self, path: Path, tree: dict[str, Any], learner: Learner) -> None:
        if learner.engine:
            self._refuse_strangers(path, tree.get("engine"), learner.accelerator)
            learner.accelerator.load_state(str(path / ENGINE))
        else:
            copy_weights(load_file(path / "weights.safetensors"), learner.weights)
            learner.optimizer.load_state_dict(unflattened(load_file(path / "optimizer.safetensors"), tree["optimizer"]))
        if _averages(learner):
            copy_weights(load_file(path / "average.safetensors"), _averages(learner))
        if learner.accelerator.scaler is not None:
            learner.accelerator.scaler.load_state_dict(tree["scaler"])

    def _refuse_strangers(self, path: Path, signed: object, accelerator: Accelerator) -> None:
        """Do nothing if this user wrote the engine's files and nobody changed them, or if they are trusted.

        Raises:
            CheckpointError: in every process.
        """
        if self._trusted:
            if accelerator.is_main_process:
                console.print(f"{path / ENGINE} is loaded as it is (--trust-checkpoint): its pickles can run any code")
            return
        digests = _digests(path / ENGINE, accelerator)
        whole = not any(entry.is_symlink() for entry in (path / ENGINE, *(path / ENGINE).rglob("*")))
        verdict = [accelerator.is_main_process and whole and is_signed(digests, signed)]
        if not broadcast_object_list(verdict)[0]:
            raise CheckpointError(
                "the engine's part of the checkpoint was not written by this user on this machine, or was changed "
                "since; it is made of pickles, which can run any code",
                where=path / ENGINE,
                remedy="if you trust its author, add --trust-checkpoint; to go on from your own on another "
                f"machine, copy {key_path()} there; or start over with --no-resume",
            )

    def weights_of(self, path: Path) -> dict[str, Tensor]:
        """The trained weights in one checkpoint."""
        return load_file(path / "weights.safetensors")

    def save_best(self, state: State, weights: Mapping[str, Tensor]) -> None:
        """Keep the weights of the look that is `state.best`; older ones go with the checkpoints that name them.

        Raises:
            CheckpointError: as `save`.
        """
        assert state.best is not None
        path = self.folder / _best_name(state.best.step)
        try:
            with atomic_file(path) as temporary:
                save_file(_on_cpu(weights), temporary)
        except (OSError, SafetensorError) as error:
            raise _unwritten(f"the best weights, of step {state.step},", path, error) from error
        self._delete_best(state)

    def load_best(self, step: int) -> dict[str, Tensor]:
        """The weights that `save_best` kept."""
        return load_file(self.folder / _best_name(step))


def _state_of(checkpoint: Path) -> Any:
    """What its `state.json` says. Raises `ValueError` where it is none, or no regular file."""
    try:
        return parsed(read_plain(checkpoint / STATE, MAX_JSON))
    except OSError as error:
        raise ValueError(f"{STATE} can't be read: {error.strerror}") from error


def discard(folder: Path) -> None:
    """Delete all checkpoints of a training; of what is linked there, the link alone."""
    if folder.is_symlink():
        folder.unlink()
        return
    for state in folder.glob(f"step-*/{STATE}"):
        if not state.parent.is_symlink():
            state.unlink()  # first: what is half deleted is no checkpoint
    if folder.exists():
        shutil.rmtree(folder)


def identity_of(config: Config, examples: Examples, held_out: HeldOut | None) -> dict[str, Any]:
    """What decides weights and scores: `settings_of`, and the fingerprints of the rows."""
    unseen = None if held_out is None else held_out.fingerprint
    return {**settings_of(config), "rows": examples.fingerprint, "held-out rows": unseen}


def settings_of(config: Config) -> dict[str, Any]:
    """Every setting but those that are free to change, by dotted name, as JSON has them."""
    free = tuple(f"{name}." for name in FREE if name != "train.checkpoint_every" or config.train.average_last == 1)
    flat = flat_settings(config.model_dump(mode="json"))
    return {key: value for key, value in flat.items() if not f"{key}.".startswith(free)}


def flat_settings(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """`{"train": {"clip": 1}}` -> `{"train.clip": 1}`; lists stay as they are."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= flat_settings(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def check_disk(folder: Path, need: int) -> None:
    """Do nothing if the disk has `need` bytes for checkpoints and bundle.

    Raises:
        CheckpointError: it has not.
    """
    existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    free = shutil.disk_usage(existing).free
    if free < need:
        raise CheckpointError(
            f"checkpoints and bundle need {need / 1e9:.1f} GB, and the disk has {free / 1e9:.1f} GB",
            where=folder,
            remedy="free some space, set output to another disk, or lower train.checkpoints",
        )


def _digests(folder: Path, accelerator: Accelerator) -> dict[str, str]:
    """`sha256_tree`, of which every process computes a part."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    mine = files[accelerator.process_index :: accelerator.num_processes]
    parts = gather_object([{path.relative_to(folder).as_posix(): sha256_file(path) for path in mine}])
    return {name: digest for part in parts for name, digest in part.items()}


def _averages(learner: Learner) -> dict[str, Tensor]:
    return learner.average.averages if learner.average else {}


@contextmanager
def _whole(path: Path, accelerator: Accelerator) -> Iterator[Path]:
    """`atomic_folder` for all processes at once: the main one makes it and moves it, the others write into it."""
    if not accelerator.is_main_process:
        yield Path(broadcast_object_list([""])[0])
        accelerator.wait_for_everyone()
        return
    with atomic_folder(path, known_by=STATE) as new:
        broadcast_object_list([str(new)])
        yield new
        accelerator.wait_for_everyone()


def _unwritten(what: str, path: Path, error: Exception) -> CheckpointError:
    why = error.strerror if isinstance(error, OSError) and error.strerror else error
    remedy = "free some disk space and go on with --resume: older checkpoints are whole"
    return CheckpointError(f"{what} can't be written: {why}", where=path, remedy=remedy)


def _best_name(step: int) -> str:
    return f"best-{step:08d}.safetensors"


def _on_cpu(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies that share no memory with each other, as safetensors wants them."""
    return {name: one.detach().to("cpu", copy=True).contiguous() for name, one in tensors.items()}


def flattened(tree: Any, prefix: str = "") -> tuple[dict[str, Tensor], Any]:
    """A tree of dicts, lists, numbers and tensors as tensors by path, and the tree with their paths in their place.

    >>> flattened({0: {"step": 3, "exp_avg": torch.zeros(1)}})
    ({'/0/exp_avg': tensor([0.])}, {'items': [[0, {'items': [['step', 3], ['exp_avg', {'tensor': '/0/exp_avg'}]]}]]})
    """
    if isinstance(tree, Tensor):
        return {prefix: tree}, {"tensor": prefix}
    if isinstance(tree, dict):
        parts = {key: flattened(value, f"{prefix}/{key}") for key, value in tree.items()}
        tensors = {name: one for found, _ in parts.values() for name, one in found.items()}
        return tensors, {"items": [[key, rest] for key, (_, rest) in parts.items()]}
    if isinstance(tree, list | tuple):
        found = [flattened(value, f"{prefix}/{place}") for place, value in enumerate(tree)]
        return {name: one for tensors, _ in found for name, one in tensors.items()}, [rest for _, rest in found]
    return {}, tree


def unflattened(tensors: Mapping[str, Tensor], tree: Any) -> Any:
    """The inverse of `flattened`, but for tuples, which come back as lists."""
    if isinstance(tree, dict):
        if "tensor" in tree:
            return tensors[tree["tensor"]]
        return {key: unflattened(tensors, value) for key, value in tree["items"]}
    if isinstance(tree, list):
        return [unflattened(tensors, value) for value in tree]
    return tree
