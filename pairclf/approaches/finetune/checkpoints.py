"""Checkpoints: an interrupted training resumes to exactly the weights of an uninterrupted one.

    checkpoints/
      step-00000200/             step-00000213-stopped/, if a signal had it written
        state.json               the place in the training, and what it must agree with
        weights.safetensors      trained weights, by name
        optimizer.safetensors    its tensors; the rest of its state stands in state.json
        average.safetensors      the moving average, where there is one
        engine/                  instead of the two above, under DeepSpeed and FSDP: as they save themselves, in
                                 pickles; state.json has their signature, and others' are not loaded
      best-00000150.safetensors  the best weights so far, where those are kept

A checkpoint folder is complete or absent. It stores no random state: each step seeds its own random numbers.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from pairclf.approaches.finetune.optimizers import copy_weights
from pairclf.approaches.finetune.signatures import is_signed, key_path, signature
from pairclf.approaches.finetune.step import Examples, HeldOut, TrainState
from pairclf.config import Config, deciding_settings, setting_changes
from pairclf.console import console
from pairclf.errors import CheckpointError
from pairclf.files import MAX_JSON, atomic_file, atomic_folder, parsed, read_plain, sha256_file, write_json

CHECKPOINTS = "checkpoints"
STATE = "state.json"
ENGINE = "engine"
STOPPED_SUFFIX = "-stopped"
FORMAT = 2

_CHECKPOINT_NAME = re.compile(
    rf"step-\d{{8,}}({STOPPED_SUFFIX})?|\.tmp-step-\d{{8,}}({STOPPED_SUFFIX})?(-[0-9a-f]{{8}})?"
)


@dataclass(slots=True)
class BestEvaluation:
    """The best evaluation so far."""

    step: int
    score: float


@dataclass(slots=True)
class TrainingProgress:
    """Progress of a training, without its tensors.

    Attributes:
        step: optimizer steps done, skipped ones included.
        is_finished: whether training is complete.
        skipped: steps skipped because loss or gradient was not finite; `skipped_in_a_row`: those just before.
        best: best evaluation; `evaluations_since_best`: evaluations after it.
        log: state of `TrainingLog`.
    """

    step: int = 0
    is_finished: bool = False
    skipped: int = 0
    skipped_in_a_row: int = 0
    best: BestEvaluation | None = None
    evaluations_since_best: int = 0
    log: dict[str, Any] = field(default_factory=dict)


class Checkpoints:
    """The checkpoints of one training.

    Args:
        folder: where they lie.
        keep: how many stay.
        identity: settings and fingerprints of the rows, which must match when a training is resumed.
        trusted: whether to load engine files that another user wrote: their pickles can run any code.
    """

    def __init__(self, folder: Path, keep: int, identity: dict[str, Any], *, trusted: bool = False) -> None:
        self.folder = folder
        self._keep = keep
        self._identity = identity
        self._trusted = trusted

    def complete(self, *, due: bool = False) -> list[Path]:
        """Complete checkpoints, oldest first; with `due`, only those written on schedule and not for a signal."""
        folders = sorted(path.parent for path in self.folder.glob(f"step-*/{STATE}") if not path.parent.is_symlink())
        return [path for path in folders if not (due and path.name.endswith(STOPPED_SUFFIX))]

    def save(self, progress: TrainingProgress, train_state: TrainState, *, due: bool) -> None:
        """Write a checkpoint atomically and delete superseded ones. Every process must call it.

        Args:
            state: where the training stands.
            learner: its tensors.
            due: whether it is written on schedule, and not for a signal: `train.average_checkpoints` counts only those.

        Raises:
            CheckpointError: the disk is full, or can't be written to; older checkpoints are untouched.
        """
        path = self.folder / f"step-{progress.step:08d}{'' if due else STOPPED_SUFFIX}"
        try:
            with _atomic_folder(path, train_state.accelerator) as new:
                digests: dict[str, str] = {}
                if train_state.engine:
                    train_state.accelerator.save_state(str(new / ENGINE), safe_serialization=True)
                    train_state.accelerator.wait_for_everyone()
                    digests = _digests(new / ENGINE, train_state.accelerator)
                if train_state.accelerator.is_main_process:
                    self._write(new, progress, train_state, signature(digests) if train_state.engine else None)
        except (OSError, SafetensorError) as error:  # safetensors hides the system's error in its own
            raise _write_error(f"the checkpoint of step {progress.step}", path, error) from error
        if train_state.accelerator.is_main_process:
            self._delete_old()
            self._delete_best(progress)

    def _write(self, new: Path, progress: TrainingProgress, train_state: TrainState, signed: str | None) -> None:
        optimizer: dict[str, Any] = {}
        if not train_state.engine:
            save_file(_on_cpu(train_state.weights), new / "weights.safetensors")
            tensors, optimizer = flattened(train_state.optimizer.state_dict())
            save_file(_on_cpu(tensors), new / "optimizer.safetensors")
        if _averages_of(train_state):
            save_file(_on_cpu(_averages_of(train_state)), new / "average.safetensors")
        scaler = train_state.accelerator.scaler
        tree = {
            "format": FORMAT,
            "identity": self._identity,
            "state": asdict(progress),
            "optimizer": optimizer,
            "scaler": scaler.state_dict() if scaler is not None else None,
            "engine": signed,
        }
        write_json(new / STATE, tree)

    def _delete_old(self) -> None:
        due, newest = self.complete(due=True), self.complete()[-1]
        kept = {*due[-self._keep :], newest}
        for path in set(self.complete()) - kept:
            (path / STATE).unlink()  # first: without it a folder that is half deleted is no checkpoint
        for path in self.folder.iterdir():
            # What was killed half-way goes too. A link is not ours; the folder may be one, and hold others' files.
            if path not in kept and _CHECKPOINT_NAME.fullmatch(path.name) and path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)

    def _delete_best(self, progress: TrainingProgress) -> None:
        """Delete best weights that neither a checkpoint nor the running training refers to."""
        bests = [_state_of(path)["state"]["best"] for path in self.complete()]
        named = {_best_name(best["step"]) for best in bests if best} | (
            {_best_name(progress.best.step)} if progress.best else set()
        )
        for path in self.folder.glob("best-*.safetensors"):
            if path.name not in named:
                path.unlink()

    def restore(self, train_state: TrainState) -> TrainingProgress | None:
        """Load the newest checkpoint into the training state and return its progress; None if there is none.

        Raises:
            CheckpointError: it belongs to another config or to other rows, or is damaged.
        """
        folders = self.complete()
        if not folders:
            return None
        path = folders[-1]
        try:
            tree = _state_of(path)
            self._check(tree, path)
            self._fill(path, tree, train_state)
            best = tree["state"].pop("best")
            progress = TrainingProgress(**tree["state"], best=BestEvaluation(**best) if best else None)
            if train_state.config.train.keep_weights == "best" and progress.best:
                self.load_best(progress.best.step)  # fail now if they are missing, and not after the last step
        except (SafetensorError, FileNotFoundError, ValueError, LookupError, TypeError, AttributeError) as error:
            raise CheckpointError(
                f"the checkpoint is damaged: {' '.join(str(error).split())[:200]}",
                where=path,
                remedy="delete this folder and resume with --resume from the one before",
            ) from error
        return progress

    def _check(self, tree: dict[str, Any], path: Path) -> None:
        if tree["format"] != FORMAT:
            raise CheckpointError(
                f"the checkpoint has format {tree['format']}, this pairclf reads {FORMAT}", where=path
            )
        if differing := list(setting_changes(self._identity, dict(tree["identity"])).values()):
            raise CheckpointError(
                "the checkpoints belong to another training: " + ", ".join(differing[:5]),
                where=path,
                remedy="use the same settings and rows, or start over with --no-resume",
            )

    def _fill(self, path: Path, tree: dict[str, Any], train_state: TrainState) -> None:
        if train_state.engine:
            self._refuse_strangers(path, tree.get("engine"), train_state.accelerator)
            train_state.accelerator.load_state(str(path / ENGINE))
        else:
            copy_weights(load_file(path / "weights.safetensors"), train_state.weights)
            train_state.optimizer.load_state_dict(
                unflattened(load_file(path / "optimizer.safetensors"), tree["optimizer"])
            )
        if _averages_of(train_state):
            copy_weights(load_file(path / "average.safetensors"), _averages_of(train_state))
        if train_state.accelerator.scaler is not None:
            train_state.accelerator.scaler.load_state_dict(tree["scaler"])

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
                "the engine files of the checkpoint were not written by this user on this machine, or were changed "
                "since; they are pickles, which can run any code",
                where=path / ENGINE,
                remedy="if you trust its author, add --trust-checkpoint; to go on from your own on another "
                f"machine, copy {key_path()} there; or start over with --no-resume",
            )

    def weights_of(self, path: Path) -> dict[str, Tensor]:
        """The trained weights in one checkpoint."""
        return load_file(path / "weights.safetensors")

    def save_best(self, progress: TrainingProgress, weights: Mapping[str, Tensor]) -> None:
        """Keep the weights of the look that is `state.best`; older ones go with the checkpoints that name them.

        Raises:
            CheckpointError: as `save`.
        """
        assert progress.best is not None
        path = self.folder / _best_name(progress.best.step)
        try:
            with atomic_file(path) as temporary:
                save_file(_on_cpu(weights), temporary)
        except (OSError, SafetensorError) as error:
            raise _write_error(f"the best weights, of step {progress.step},", path, error) from error
        self._delete_best(progress)

    def load_best(self, step: int) -> dict[str, Tensor]:
        """The weights that `save_best` kept."""
        return load_file(self.folder / _best_name(step))


def _state_of(checkpoint: Path) -> Any:
    """The content of `state.json`. Raises `ValueError` if it is not JSON, or no regular file."""
    try:
        return parsed(read_plain(checkpoint / STATE, MAX_JSON))
    except OSError as error:
        raise ValueError(f"{STATE} can't be read: {error.strerror}") from error


def discard(folder: Path) -> None:
    """Delete all checkpoints of a training; of what is linked there, the link alone."""
    if folder.is_symlink():
        folder.unlink()
        return
    for progress in folder.glob(f"step-*/{STATE}"):
        if not progress.parent.is_symlink():
            progress.unlink()  # first: without it a half-deleted folder is no checkpoint
    if folder.exists():
        shutil.rmtree(folder)


def identity_of(config: Config, examples: Examples, held_out: HeldOut | None) -> dict[str, Any]:
    """What decides weights and scores: `deciding_settings`, and the fingerprints of the rows."""
    unseen = None if held_out is None else held_out.fingerprint
    return {**deciding_settings(config), "rows": examples.fingerprint, "held-out rows": unseen}


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
            remedy="free some space, set output_dir to another disk, or lower train.save_total_limit",
        )


def _digests(folder: Path, accelerator: Accelerator) -> dict[str, str]:
    """`sha256_tree`, of which every process computes a part."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    mine = files[accelerator.process_index :: accelerator.num_processes]
    parts = gather_object([{path.relative_to(folder).as_posix(): sha256_file(path) for path in mine}])
    return {name: digest for part in parts for name, digest in part.items()}


def _averages_of(train_state: TrainState) -> dict[str, Tensor]:
    return train_state.average.averages if train_state.average else {}


@contextmanager
def _atomic_folder(path: Path, accelerator: Accelerator) -> Iterator[Path]:
    """`atomic_folder` for all processes at once: the main one makes it and moves it, the others write into it."""
    if not accelerator.is_main_process:
        yield Path(broadcast_object_list([""])[0])
        accelerator.wait_for_everyone()
        return
    with atomic_folder(path, known_by=STATE) as new:
        broadcast_object_list([str(new)])
        yield new
        accelerator.wait_for_everyone()


def _write_error(what: str, path: Path, error: Exception) -> CheckpointError:
    why = error.strerror if isinstance(error, OSError) and error.strerror else error
    remedy = "free some disk space and resume with --resume: older checkpoints are intact"
    return CheckpointError(f"{what} can't be written: {why}", where=path, remedy=remedy)


def _best_name(step: int) -> str:
    return f"best-{step:08d}.safetensors"


def _on_cpu(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies that share no memory with each other, as safetensors wants them."""
    return {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}


def flattened(tree: Any, prefix: str = "") -> tuple[dict[str, Tensor], Any]:
    """Split a tree of dicts, lists, numbers and tensors: tensors by path, and the tree with their paths instead.

    >>> import torch
    >>> flattened({0: {"step": 3, "exp_avg": torch.zeros(1)}})
    ({'/0/exp_avg': tensor([0.])}, {'items': [[0, {'items': [['step', 3], ['exp_avg', {'tensor': '/0/exp_avg'}]]}]]})
    """
    if isinstance(tree, Tensor):
        return {prefix: tree}, {"tensor": prefix}
    if isinstance(tree, dict):
        values = {key: flattened(value, f"{prefix}/{key}") for key, value in tree.items()}
        return _merged(values.values()), {"items": [[key, rest] for key, (_, rest) in values.items()]}
    if isinstance(tree, list | tuple):
        elements = [flattened(value, f"{prefix}/{place}") for place, value in enumerate(tree)]
        return _merged(elements), [rest for _, rest in elements]
    return {}, tree


def _merged(parts: Iterable[tuple[dict[str, Tensor], Any]]) -> dict[str, Tensor]:
    return {name: tensor for tensors, _ in parts for name, tensor in tensors.items()}


def unflattened(tensors: Mapping[str, Tensor], tree: Any) -> Any:
    """The inverse of `flattened`, but for tuples, which come back as lists."""
    if isinstance(tree, dict):
        if "tensor" in tree:
            return tensors[tree["tensor"]]
        return {key: unflattened(tensors, value) for key, value in tree["items"]}
    if isinstance(tree, list):
        return [unflattened(tensors, value) for value in tree]
    return tree
