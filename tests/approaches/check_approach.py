"""The contract of an approach, as checks that any entry of `APPROACHES` runs through (after `check_estimator`).

    for check in CHECKS.values():
        check(Case(config, folder, killed=...))

A check raises where the approach breaks the contract: an assertion of its own, or an error of pairclf's.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import polars as pl
import pytest
import yaml
from support.packages import hollow_wheelhouse

from pairclf.approaches import approach_of, verify_probes
from pairclf.approaches.protocol import Assignment, Scorer
from pairclf.bundles.bundle import Bundle, open_bundle, write_bundle
from pairclf.bundles.manifest import TOLERANCE
from pairclf.bundles.probes import pick_probes
from pairclf.config import SECTIONS, Config, describe_config, override, resolve
from pairclf.data.identity import row_hashes
from pairclf.data.rows import to_rows
from pairclf.data.scores import class_matrix, read_logits, read_scores
from pairclf.errors import BundleError, ConfigError
from pairclf.files import sha256_tree
from pairclf.inference import predict as prediction
from pairclf.inference.messages import BatchScored, Clock, Event, Job, WorkerReady
from pairclf.inference.pool import WorkerModel, _items
from pairclf.inference.verify import verify
from pairclf.inference.worker import load_bundle
from pairclf.inputs.sequences import Item, LargestPass
from pairclf.packaging.build import package
from pairclf.packaging.build_record import read_build
from pairclf.run import OOF, OOF_LOGITS, Paths, Run, Split
from pairclf.runs import fit as fitting
from pairclf.runs.cv import cross_validate
from pairclf.scores.metrics import Floats, class_prior
from pairclf.scores.probabilities import mean_of_orders
from pairclf.task import AB, BA, Row, Task


class Killed(BaseException):
    """What ends a training half-way in place of a signal."""


class Trial(NamedTuple):
    """A model that was trained with fold 0 held out: its bundle, the rows held out, and what it gave them itself."""

    bundle: Bundle
    held_out: pl.DataFrame
    logits: Floats


@dataclass(frozen=True)
class Case:
    """An approach on some rows.

    Attributes:
        config: of a run on a few rows in two folds; it names the approach.
        folder: for all that the checks write.
        killed: a context in which a training is ended half-way by `Killed`.
        tolerance: how far two ways to the same logit may be apart.
        here: workers are part of this process, and each forward pass has one sequence.
    """

    config: Config
    folder: Path
    killed: Callable[[], AbstractContextManager[object]]
    tolerance: float
    here: bool = False

    @property
    def task(self) -> Task:
        return self.config.task

    @cached_property
    def run(self) -> Run:
        return Run(self.config)

    @cached_property
    def _scorers(self) -> dict[Path, Scorer]:
        """By bundle: a model is loaded once."""
        return {}

    @cached_property
    def first(self) -> Trial:
        """Trained once for all checks."""
        return self.train("first")

    def train(self, name: str, *, killed: bool = False) -> Trial:
        """Train with fold 0 held out, as `fit_fold` does it; if it is killed first, resume."""
        approach, split = approach_of(self.config), self.run.split(0)
        trainer = approach.trainer(self.run, approach.start(self.config))
        if killed:
            with self.killed(), pytest.raises(Killed):
                trainer.fit(split, self.folder / name, resume=None, trust_checkpoint=False)
            trainer = approach.trainer(self.run, approach.start(self.config))
        resume = True if killed else None
        fitted = trainer.fit(split, self.folder / name, resume=resume, trust_checkpoint=False)
        assert fitted is not None
        held_out = held_out_of(split)
        logits = fitted.logits(held_out)
        folder = self.folder / name / "bundle"
        folder.mkdir()
        write_bundle(
            folder,
            trainer.config,
            fitted.save(folder),
            name=name,
            fold=0,
            metrics={},
            prior=class_prior(np.array(split.training["target"].to_list()), split.training["weight"]).tolist(),
            probes=pick_probes(to_rows(held_out, self.task), logits),
        )
        return Trial(open_bundle(folder), held_out, logits)

    def score(self, rows: Sequence[Row], bundle: Bundle | None = None) -> Floats:
        """Logits `(N, O, C)` of the saved model, all rows in one forward pass, as a worker has them computed."""
        bundle = bundle or self.first.bundle
        approach = approach_of(bundle.config)
        encoded = approach.encode(bundle, rows)
        orders = len(encoded[0])
        items = [Item(row, order, one.ids) for row, shown in enumerate(encoded) for order, one in enumerate(shown)]
        if bundle.folder not in self._scorers:
            largest = LargestPass(bundle.config.inputs.max_length, 4096, orders)
            self._scorers[bundle.folder] = approach.load(bundle, assignment_of(bundle, largest)).scorer
        return collected(self._scorers[bundle.folder], items).reshape(len(rows), orders, -1)

    @property
    def rows(self) -> list[Row]:
        return to_rows(self.first.held_out, self.task)


def held_out_of(split: Split) -> pl.DataFrame:
    assert split.held_out is not None
    return split.held_out


def assignment_of(bundle: Bundle, largest: LargestPass) -> Assignment:
    return Assignment(bundle.folder, None, (), ("cpu",), 1, largest, 1)


def collected(scorer: Scorer, items: Sequence[Item]) -> Floats:
    logits, _ = scorer.collect(items, scorer.launch(items))
    return logits


def assert_close(one: Floats, other: Floats, tolerance: float) -> None:
    assert one.shape == other.shape
    assert np.isfinite(one).all()
    assert np.abs(one - other).max() <= tolerance


# --- settings --------------------------------------------------------------------------------------------------------


def sections_are_those_of_the_table(case: Case) -> None:
    approach = approach_of(case.config)
    assert approach.sections == set(SECTIONS[case.config.approach])
    assert import_module(approach.module)


def settings_that_it_does_not_read_are_errors(case: Case) -> None:
    name, printed = case.config.approach, yaml.safe_load(describe_config(case.config))
    others = {section for sections in SECTIONS.values() for section in sections} - {*SECTIONS[name]}
    assert not printed.keys() & others
    assert printed.keys() >= {*SECTIONS[name], "data", "predict"}
    assert resolve(printed) == override(case.config, []) == case.config
    for section in others:
        with pytest.raises(
            ConfigError, match=rf"changes? nothing: approach={name} does not read the section {section}"
        ):
            override(case.config, [OFF_DEFAULT[section]])


OFF_DEFAULT = {
    "inputs": "inputs.max_length=77",
    "model": "model.dtype=float32",
    "train": "train.learning_rate=0.7",
    "classical": "classical.C=7",
    "prompt": "prompt.k=7",
}
"""A setting of each section that some approach does not read, off its default."""


# --- the model on disk -----------------------------------------------------------------------------------------------


def a_saved_model_gives_the_logits_of_the_fitted_one(case: Case) -> None:
    assert_close(case.score(case.rows), case.first.logits, case.tolerance)


def a_changed_byte_is_refused(case: Case) -> None:
    """In any file of the bundle."""
    copy = Path(shutil.copytree(case.first.bundle.folder, case.folder / "changed"))
    files = sorted(sha256_tree(copy))
    assert {"bundle.json", "config.yaml"} < {*files}
    for name in files:
        content = (copy / name).read_bytes()
        place = len(content) // 2
        (copy / name).write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        with pytest.raises(BundleError):
            open_bundle(copy)
        (copy / name).write_bytes(content)
    open_bundle(copy)


def probes_verify(case: Case) -> None:
    allowed = max(TOLERANCE["float32"] * (case.tolerance > 0), case.tolerance)
    assert verify_probes(case.first.bundle) <= allowed


# --- rows ------------------------------------------------------------------------------------------------------------


def a_rows_neighbours_do_not_matter(case: Case) -> None:
    """Whatever stands in the other places of a forward pass."""
    rows, logits = case.rows, case.score(case.rows)
    for place in (0, len(rows) // 2):
        others = [rows[place]] * len(rows)
        assert_close(case.score(others)[place], logits[place], case.tolerance)
        assert_close(case.score([rows[place]])[0], logits[place], case.tolerance)


def the_order_of_rows_does_not_matter(case: Case) -> None:
    assert_close(case.score(case.rows[::-1])[::-1], case.score(case.rows), case.tolerance)


def exchanged_sides_exchange_the_orders(case: Case) -> None:
    """Order BA of a row is order AB of the row with its sides exchanged; with one order, so are the columns."""
    logits = case.score(case.rows)
    assert logits.shape[1] == case.config.orders
    if case.task.swap_fields is None:
        return
    a, b = case.task.swap_fields
    exchanged = [Row(row.id, {**row.fields, a: row.fields[b], b: row.fields[a]}) for row in case.rows]
    assert np.ptp(logits, axis=0).max() > 10 * case.tolerance, "the rows are told apart"
    if logits.shape[1] == 1:
        assert_close(case.score(exchanged)[:, AB], logits[:, AB][:, list(case.task.swapped_columns)], case.tolerance)
        return
    assert_close(case.score(exchanged)[:, AB], logits[:, BA], case.tolerance)
    assert_close(case.score(exchanged)[:, BA], logits[:, AB], case.tolerance)


# --- training --------------------------------------------------------------------------------------------------------


def the_same_seed_gives_the_same_model(case: Case) -> None:
    first = case.first
    assert_close(case.train("again").logits, first.logits, 0)


def killed_and_resumed_ends_the_same(case: Case) -> None:
    first = case.first
    assert_close(case.train("killed", killed=True).logits, first.logits, 0)


def out_of_fold_rows_are_the_held_out_ones(case: Case) -> None:
    """Each once, with the logits of the bundle that never saw it."""
    output = case.folder / "cv"
    config = case.config.model_copy(update={"output_dir": output})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fitting, "verify_probes", lambda bundle: 0.0)  # another check's matter
        bundles = cross_validate(config)
    run = Run(config)
    assert sorted(read_scores(output / OOF, case.task)["id"]) == sorted(run.frame["id"])
    for fold, folder in enumerate(bundles):
        held_out = held_out_of(run.split(fold))
        scores = read_scores(Paths(output, fold).folder / OOF, case.task)
        assert scores["id"].to_list() == held_out["id"].to_list()
        kept = read_logits(Paths(output, fold).folder / OOF_LOGITS, case.task)
        assert kept["id"].to_list() == held_out["id"].to_list()
        assert kept["row_hash"].to_list() == row_hashes(held_out, case.task)["row_hash"].to_list()
        logits = case.score(to_rows(held_out, case.task), open_bundle(folder))
        assert_close(class_matrix(scores, case.task), mean_of_orders(logits, case.task, 1.0), max(case.tolerance, 1e-9))


# --- workflows -------------------------------------------------------------------------------------------------------


class CrewHere:
    """Workers in this process, who are done at once."""

    def __init__(self, models: Sequence[WorkerModel], groups: Sequence[tuple[str, ...]], *, clock: Clock) -> None:
        self._models = models
        self._numbers = count()
        self._events: list[Event] = []
        self._scorer: Scorer

    def load(self, member: int) -> Sequence[int]:
        model = self._models[member]
        loaded = load_bundle(Assignment(model.bundle_folder, None, model.overrides, ("cpu",), 1, model.largest, 1))
        self._scorer, number = loaded.scorer, next(self._numbers)
        self._events.append(WorkerReady(number, 0.1, loaded.layout, loaded.what))
        return [number]

    def submit(self, work: Job) -> None:
        logits = collected(self._scorer, _items(work, self._models[work.member].encoded))
        self._events.append(BatchScored(0, work, logits, 0, 0.1))

    def wait(self, seconds: float) -> list[Event]:
        events, self._events = self._events, []
        return events

    def restart(self, worker: int) -> int:
        raise NotImplementedError

    def drop_queue(self) -> None:
        """Nothing is queued."""

    def close(self) -> None:
        """Nobody works."""


def workers_give_the_logits_of_the_fitted_model(case: Case) -> None:
    trial, task = case.first, case.task
    cells = [pl.col(name).map_elements(list_or_text(task), return_dtype=pl.String) for name in task.fields]
    trial.held_out.select("id", *cells).write_csv(case.folder / "test.csv")
    with pytest.MonkeyPatch.context() as patch:
        if case.here:
            patch.setattr(prediction, "ProcessPool", CrewHere)
            patch.setattr(prediction, "warm_up_workers", lambda members: None)
        overrides = [f"predict.tokens_per_batch={1 if case.here else 512}", "predict.devices=[cpu]"]
        arguments = (trial.bundle.folder,), case.folder / "test.csv", case.folder / "submission.csv"
        scores = prediction.predict(*arguments, overrides=overrides, strict=True)
    assert scores["id"].to_list() == trial.held_out["id"].to_list()
    expected = mean_of_orders(trial.logits, task, 1.0)
    assert_close(class_matrix(scores, task), expected, max(case.tolerance, 1e-9))


def list_or_text(task: Task) -> Callable[[Any], str]:
    """A cell of a test file."""
    return lambda turns: json.dumps(list(turns)) if task.multi_turn else "\n".join(turns)


def a_package_holds_a_bundle_that_verifies(case: Case) -> None:
    """Without its training's folders, and without a network."""
    settings = {"owner": "someone", "name": "a-notebook"}
    if case.task.name != "lmsys":
        settings["competition"] = "of-our-own"
    config = resolve(case.config.model_dump(mode="json", exclude={*case.config.unread()}) | {"package": settings})
    base = None
    if case.first.bundle.manifest.needs_base:
        base = Path(case.first.bundle.config.model.base)
        config.package.base_model_source = "someone/base/transformers/tiny/1"
    with pytest.MonkeyPatch.context() as patch:
        hollow_wheelhouse(patch)
        made = package(config, [case.first.bundle.folder], case.folder / "package")
    assert read_build(made).package.base_model_source == config.package.base_model_source
    (packed,) = [made / "bundle" / one.folder for one in read_build(made).bundles]
    ((_, verified),) = verify([packed], base, None)
    assert verified["rows"] == len(case.first.bundle.manifest.probes) > 0


CHECKS: dict[str, Callable[[Case], None]] = {
    check.__name__: check
    for check in (
        sections_are_those_of_the_table,
        settings_that_it_does_not_read_are_errors,
        a_saved_model_gives_the_logits_of_the_fitted_one,
        a_changed_byte_is_refused,
        probes_verify,
        a_rows_neighbours_do_not_matter,
        the_order_of_rows_does_not_matter,
        exchanged_sides_exchange_the_orders,
        the_same_seed_gives_the_same_model,
        killed_and_resumed_ends_the_same,
        out_of_fold_rows_are_the_held_out_ones,
        workers_give_the_logits_of_the_fitted_model,
        a_package_holds_a_bundle_that_verifies,
    )
}
