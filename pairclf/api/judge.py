"""Judges: trained models that stay loaded, for scoring rows and ranking answers from Python."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import polars as pl
from rich.table import Table

from pairclf.api.arguments import checked
from pairclf.console import Tables, number, progress, table
from pairclf.data.answers import ANSWERS, read_answers
from pairclf.data.formats import CHUNK
from pairclf.data.rows import in_memory
from pairclf.errors import ConfigError, DataError, IncompleteError, quoted
from pairclf.inference.ensemble import Ensemble, open_ensemble
from pairclf.inference.loop import PredictionResult
from pairclf.inference.rank import check_kinds, contest_of, ranking_of, rewards_of_pairs
from pairclf.inference.resident import ResidentEnsemble
from pairclf.inference.state import ORDER_NAMES
from pairclf.scores.figures import METRICS
from pairclf.scores.metrics import Floats
from pairclf.task import AB, BA, REWARD, Task
from pairclf.trust import Trust, grant

if TYPE_CHECKING:
    from pairclf.runs.evaluation_report import ReportedEvaluation

Frame: TypeAlias = pl.DataFrame | Mapping[str, Sequence[Any]] | Any
"""Rows: polars, a dict of lists, or pandas, which is no dependency and has no types here."""

HUB_ID = r"[\w.-]+/[\w.-]+"
"""A model of the hub, as `owner/name`."""


@checked
def load(
    source: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    *overrides: str,
    device: str | Sequence[str] = "auto",
    base: str | os.PathLike[str] | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    linked_files: bool = False,
) -> Judge:
    """Open trained models, to score and rank with.

    The hash of every file is compared before anything is scored. The models load in worker processes at the first
    call, and stay loaded until `Judge.close`. Permissions hold for this process from now on, as those of a command do.

    Args:
        source: a bundle's folder, such as `runs/demo/fold0/bundle`, or a run's, whose bundles have equal weights;
            several of these; an ensemble's YAML file, as `pairclf.blend` writes it; or a bundle on the Hugging Face
            hub, `owner/name`.
        overrides: `key=value` for settings under `predict`, such as `predict.swap=off`; `model.dtype` and
            `model.attn_implementation`.
        device: cpu, cuda:0, several in a list, or auto: every GPU, or the CPU.
        base: folder of the base model on this machine; None: as the bundle says. A base that is neither there nor in
            the hub's cache is an error, unless `HF_HUB_OFFLINE=0` is set.
        revision: commit, branch or tag of the bundle on the hub; the commit is printed.
        trust_remote_code: run the Python files that come with a model; they can do anything that you can do.
        linked_files: accept symbolic links to files in a bundle, as in the Hugging Face cache.

    Raises:
        BundleError: a folder holds no bundle, or its manifest was changed.
        ConfigError: the bundles can't be used together, or an override can't be set.
        ModelError: the hub has no such bundle, or can't be reached.
    """
    names = [source] if isinstance(source, str | os.PathLike) else list(source)
    if not names:
        raise ConfigError("source names no bundle", remedy='pairclf.load("RUN/fold0/bundle")')
    paths, from_hub = [], False
    for name in names:
        if isinstance(name, str) and re.fullmatch(HUB_ID, name) and not Path(name).exists():
            from pairclf.api.hub import fetch_bundle

            paths.append(fetch_bundle(name, revision))
            from_hub = True
        else:
            paths.append(Path(name))
    if revision is not None and not from_hub:
        raise ConfigError(f"revision={quoted(revision)} is of a bundle on the hub, and none is given", remedy="omit it")
    # The hub's cache holds links to its own files, whose hashes are compared as those of all others.
    grant(Trust(remote_code=trust_remote_code, linked_files=linked_files or from_hub))
    settings = [*overrides, *_device_override(device)]
    return Judge(open_ensemble(paths, None if base is None else Path(base), settings), settings)


def _device_override(device: str | Sequence[str]) -> list[str]:
    if device == "auto":
        return []
    devices = [device] if isinstance(device, str) else device
    if unknown := [name for name in devices if not re.fullmatch(r"cpu|cuda(:\d+)?", name)]:
        raise ConfigError(f"device={quoted(unknown[0])} is unknown", remedy="auto, cpu, cuda:0, or a list of such")
    return [f"predict.devices=[{', '.join(devices)}]"]


@contextmanager
def _offline() -> Iterator[None]:
    """Workers that start within download nothing unasked: a bundle may be a stranger's."""
    before = os.environ.get("HF_HUB_OFFLINE")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    try:
        yield
    finally:
        if before is None:
            del os.environ["HF_HUB_OFFLINE"]


class Judge(Tables):
    """Trained models that score rows and rank answers. `pairclf.load` opens one. Not thread-safe.

    Use it in a `with` block, or close it: its workers keep the models in memory.

    Args:
        ensemble: the models.
        overrides: those with which it was opened.

    Attributes:
        ensemble: the models, with their weights and temperatures.
    """

    def __init__(self, ensemble: Ensemble, overrides: Sequence[str] = ()) -> None:
        self.ensemble = ensemble
        self._overrides = list(overrides)
        self._resident: dict[bool, ResidentEnsemble] = {}

    @property
    def task(self) -> Task:
        """The task of the models: the fields of a row, and the classes."""
        return self.ensemble.task

    @property
    def classes(self) -> tuple[str, ...]:
        """The classes, in the order of the columns of `predict`."""
        return self.task.classes

    @property
    def is_rewarding(self) -> bool:
        """Whether all models are reward models."""
        return all(member.bundle.config.model.one_sided for member in self.ensemble.members)

    def __enter__(self) -> Judge:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the workers. The next call starts others."""
        for resident in self._resident.values():
            resident.close()
        self._resident.clear()

    # --- rows --------------------------------------------------------------------------------------------------------

    @checked
    def predict(
        self,
        frame: Frame | None = None,
        /,
        *,
        orders: bool = False,
        rewards: bool = False,
        strict: bool = True,
        **columns: Any,
    ) -> pl.DataFrame:
        """Probabilities of rows, as `pairclf predict` writes them.

        The rows are scored in parts, so that only their texts are in memory at once. Cells may hold what cells of files
        may: a text, or the turns of a conversation.

        Args:
            frame: a polars or pandas DataFrame, or a dict of lists, with the columns of the task's test files.
            orders: add the probabilities of both orders of the two sides, `CLASS_AB` and `CLASS_BA`; those of BA are
                un-swapped.
            rewards: add the rewards of both sides, `reward_FIELD`, of reward models; NaN where a row has no score.
            strict: raise if a row could not be scored; else it has the prior.
            columns: in place of a frame, the task's fields by name: texts for one row, or lists for several; and `id`.

        Returns:
            `id`, and a probability a class; one row for each row, in their order. Without a column of ids they are
            numbered from 0.

        Raises:
            DataError: a column is missing, or rows can't be read.
            ConfigError: `orders` for a task whose rows have one order, or `rewards` of models that give none.
            BundleError: a file of a bundle was changed.
            ModelError: no model can be loaded.
            IncompleteError: with `strict`, names the rows without a score.
        """
        rows, names = self._rows_of(frame, columns)
        if orders and self.ensemble.orders == 1:
            raise ConfigError("orders=True: the models score each row in one order alone", remedy="leave it away")
        if rewards and not self.is_rewarding:
            raise ConfigError("rewards=True: not all models are reward models", remedy="leave it away")
        name = names.get("id", "id")
        ids = rows[name] if name is not None and name in rows.columns else pl.int_range(len(rows), eager=True)
        ids = ids.alias("id")
        # A member for the most uncertain rows has to see all of them.
        size = len(rows) if any(member.share < 1 for member in self.ensemble.members) else CHUNK
        empty = np.zeros((0, len(self.classes)))
        parts = [
            self._scores_table(
                ids[:0], dict.fromkeys(self._endings(orders), empty), np.zeros((0, 2)) if rewards else None
            )
        ]
        with progress("rows", len(rows), visible=len(rows) > size) as advance:
            for start in range(0, len(rows), size or 1):
                chunk, of_chunk = rows[start : start + size], ids[start : start + size]
                parts.append(self._probabilities(chunk, of_chunk, names, orders=orders, rewards=rewards, strict=strict))
                advance(len(chunk))
        return pl.concat(parts)

    def _rows_of(
        self, frame: Frame | None, columns: Mapping[str, Any]
    ) -> tuple[pl.DataFrame, Mapping[str, str | None]]:
        """The rows, and how the task's columns are called in them."""
        if (frame is None) == (not columns):
            raise DataError(
                "rows are given as a frame or as columns, and these are both or none",
                remedy=f"judge.predict(frame), or judge.predict({'=..., '.join(self.task.fields)}=...)",
            )
        if frame is not None:
            return self._table_of(frame, self.task.fields), self.ensemble.data.test.columns
        if unknown := sorted({*columns} - {"id", *self.task.fields}):
            raise DataError(
                f"{', '.join(unknown)} are neither fields of task {self.task.name!r} nor arguments of predict",
                remedy=f"the fields are {', '.join(self.task.fields)}, and `id` may be given; other settings are those "
                "of pairclf.load",
            )
        return self._table_of({name: self._cells(name, cell) for name, cell in columns.items()}, ()), {}

    def _table_of(self, frame: Frame, read: Sequence[str]) -> pl.DataFrame:
        """A polars frame of what a user gives; `read`: the columns that will be read, besides `id`, by our names.

        Raises:
            DataError: it is no table.
        """
        if not isinstance(frame, Mapping):
            names = self.ensemble.data.test.columns
            return in_memory(frame, {names.get(name) or name for name in ("id", *read)})
        try:
            return in_memory(pl.DataFrame(dict(frame)))
        except (TypeError, ValueError, pl.exceptions.PolarsError) as error:
            what = f"the columns {list(frame)} make no table: {str(error).splitlines()[0]}"
            raise DataError(what, remedy="give lists of equal length, one type a column; or a text for each") from error

    def _cells(self, field: str, cells: Any) -> Any:
        """A column; one text is a row, and where a field has turns, its only one."""
        if not isinstance(cells, str):
            return cells
        return [[cells]] if self.task.multi_turn and field in self.task.fields else [cells]

    def _probabilities(
        self,
        rows: pl.DataFrame,
        ids: pl.Series,
        names: Mapping[str, str | None],
        *,
        orders: bool,
        rewards: bool,
        strict: bool,
    ) -> pl.DataFrame:
        resident = self._loaded(self.ensemble)
        inputs = resident.encode(rows, names)
        result = resident.score(inputs, swap="full" if orders else self.ensemble.settings.swap)
        if strict:
            _refuse_incomplete(result, ids)
        values = [result.state.probabilities(order=order) for order in ([None, AB, BA] if orders else [None])]
        of_sides = rewards_of_pairs(self.ensemble, result.state) if rewards else None
        return self._scores_table(ids, dict(zip(self._endings(orders), values, strict=True)), of_sides)

    @staticmethod
    def _endings(orders: bool) -> list[str]:
        """Endings of the columns: of the mean, and of both orders."""
        return ["", *(f"_{name}" for name in ORDER_NAMES if orders)]

    def _scores_table(self, ids: pl.Series, values: Mapping[str, Floats], rewards: Floats | None) -> pl.DataFrame:
        tables = [
            pl.DataFrame(part, schema=[f"{name}{ending}" for name in self.classes]) for ending, part in values.items()
        ]
        if rewards is not None:
            tables.append(pl.DataFrame(rewards, schema=[f"{REWARD}_{name}" for name in self.task.swap_fields or ()]))
        return pl.concat([ids.to_frame(), *tables], how="horizontal")

    def _loaded(self, ensemble: Ensemble) -> ResidentEnsemble:
        """The models in their workers. A reward model is loaded otherwise for ranking, and not twice at once."""
        pointwise = not ensemble.task.swappable and self.task.swappable
        if pointwise not in self._resident:
            self.close()
            with _offline():
                self._resident[pointwise] = ResidentEnsemble(ensemble, self._overrides, time.monotonic)
        resident = self._resident[pointwise]
        resident.wait_until_loaded(float("inf"))
        return resident

    # --- answers -----------------------------------------------------------------------------------------------------

    @checked
    def rank(
        self,
        prompt: str | Frame,
        answers: Sequence[str] | None = None,
        *,
        pairs: int | None = None,
        strict: bool = True,
    ) -> pl.DataFrame:
        """Rank answers to a prompt, best of n, as `pairclf rank` does.

        A reward model scores each answer once. Other models compare all pairs in both orders, and the strengths are
        those of Bradley and Terry's model, or of Davidson's where there are ties.

        Args:
            prompt: a prompt; or a frame of prompts, with their list of `answers` in each row.
            answers: any number of answers to the one prompt.
            pairs: most pairs of a prompt's answers that are compared; None: all.
            strict: raise if an answer could not be ranked; else it has no rank.

        Returns:
            `id`, `answer` (its number in the prompt, from 0), `strength` or `reward`, and `rank`: 1 is the best, and
            equal answers share a rank. One row an answer, in their order.

        Raises:
            DataError: there are no answers, or too many for all pairs.
            ConfigError: the task has no two sides, or `pairs` for a reward model.
            BundleError, ModelError, IncompleteError: as `predict`.
        """
        check_kinds(self.ensemble, pairs)
        if answers is not None and not isinstance(prompt, str):
            raise DataError("a frame of prompts has its answers itself", remedy=f"put them into its column {ANSWERS!r}")
        given = self._one_prompt(prompt, answers) if isinstance(prompt, str) else prompt
        rows = self._table_of(given, [*self.task.fields, ANSWERS])
        columns: Mapping[str, str | None] = {} if isinstance(prompt, str) else self.ensemble.data.test.columns
        listed = read_answers(rows, self.task, self.ensemble.data.rules, columns)
        contest = contest_of(self.ensemble, listed, pairs)
        result = None
        if len(contest.rows):
            resident = self._loaded(contest.ensemble if contest.pointwise else self.ensemble)
            result = resident.score(resident.encode(contest.rows, {}), swap="full")
        ranking = ranking_of(listed, contest, None if result is None else result.state)
        if strict and result is not None:
            _refuse_incomplete(result, contest.rows["id"])
        return ranking

    def _one_prompt(self, prompt: str, answers: Sequence[str] | None) -> dict[str, list[Any]]:
        shared = [name for name in self.task.fields if name not in (self.task.swap_fields or ())]
        if answers is None or len(shared) != 1:
            raise DataError(
                f"a prompt of task {self.task.name!r} has the fields {shared}, and a list of answers",
                remedy="judge.rank(prompt, [answer, ...]); or judge.rank(frame) with these columns and `answers`",
            )
        return {"id": ["prompt"], shared[0]: self._cells(shared[0], prompt), ANSWERS: [list(answers)]}

    # --- sharing -----------------------------------------------------------------------------------------------------

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool = True,
        license: str | None = None,
        data: str = "",
        evaluation: ReportedEvaluation | None = None,
    ) -> str:
        """Upload the bundle to the Hugging Face hub, with a model card; `pairclf.load("owner/name")` opens it there.

        A bundle holds some rows of the data, as probes: their texts are uploaded, too.

        Args:
            repo_id: `owner/name`; it is created if it does not exist.
            private: whether a new repository is private.
            license: the licence's name on the hub, such as apache-2.0, for the card; None: the card says that none is
                given, and that those of base and data hold.
            data: what the card says of the training data: their source and terms.
            evaluation: of the run, by `pairclf.evaluate`: the card then has intervals, slices and biases.

        Returns:
            The commit, for `pairclf.load(repo_id, revision=...)`.

        Raises:
            ConfigError: there are several bundles.
            ModelError: the hub refuses it, or can't be reached.
        """
        from pairclf.api.card import Card
        from pairclf.api.hub import push_bundle

        folder = self._only_bundle("push_to_hub")
        return push_bundle(folder, repo_id, private=private, card=Card(license, data, evaluation))

    @checked
    def export_transformers(self, folder: str | os.PathLike[str]) -> Path:
        """Write the bundle as a folder that transformers' `AutoModelForSequenceClassification` opens without pairclf.

        Logits are the same, in float32; a reward model becomes one with one label, which reads a prompt and one answer.
        See `pairclf export --to transformers`.

        Raises:
            ConfigError: there are several bundles.
            ModelError: the architecture has no such class, or the readout is none that such a class has.
        """
        bundle = self._only_bundle("export_transformers")
        from pairclf.approaches.finetune.stock import export_stock

        return export_stock(bundle, Path(folder), base=self.ensemble.members[0].base)

    def _only_bundle(self, method: str) -> Path:
        if len(self.ensemble.members) > 1:
            raise ConfigError(
                f"{method} takes one bundle, and the judge has {len(self.ensemble.members)}",
                remedy="load one of them; or average the adapters of folds into one bundle: pairclf merge",
            )
        return self.ensemble.members[0].bundle.folder

    # --- display -----------------------------------------------------------------------------------------------------

    def __repr__(self) -> str:
        return f"<Judge: {', '.join(member.name for member in self.ensemble.members)}; {', '.join(self.classes)}>"

    def tables(self) -> Iterator[Table]:
        metric = self.task.metric
        members = table(
            f"Judge: {', '.join(self.classes)}", "bundle", "approach", "base", "weight", METRICS[metric].title
        )
        for member in self.ensemble.members:
            manifest = member.bundle.manifest
            score = number(manifest.metrics.get(metric))
            members.add_row(member.name, manifest.approach, manifest.base or "-", f"{member.weight:g}", score)
        yield members


def _refuse_incomplete(result: PredictionResult, ids: pl.Series) -> None:
    """Raise `IncompleteError` if a row or a model could not be used."""
    failed = {ids[row]: why for failures in result.state.failed for (row, _), why in failures.items()}
    without = ids.filter(pl.Series(result.state.num_orders() == 0)).to_list()
    lost = [f"{name} ({why})" for name, why in result.lost_models.items()]
    if failed or without or lost:
        causes = list(dict.fromkeys([*lost, *failed.values()]))[:3]
        raise IncompleteError(
            f"not all could be scored: {'; '.join(causes)}",
            rows=list(dict.fromkeys([*failed, *without])),
            remedy="strict=False: such rows have the other order, other models or the prior",
        )
