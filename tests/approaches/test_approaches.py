"""Every approach keeps the contract, and one that breaks a point of it fails the check of that point."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

import polars as pl
import pytest
from check_approach import CHECKS, Case, Killed
from encoder_decoders_support import tiny_encoder_decoder
from models_support import with_lm_head
from tests_support import make_rows, write_csv

from pairclf import approaches
from pairclf.approaches import APPROACHES
from pairclf.approaches import prompt_trainer as prompting
from pairclf.approaches.classical import ClassicalApproach, ClassicalTrainer, FittedClassical
from pairclf.approaches.classical_model import MODELS, ClassicalModel
from pairclf.approaches.classical_vectors import Space
from pairclf.approaches.finetune import train as loop
from pairclf.approaches.protocol import Approach, Prepared, Process
from pairclf.bundles import bundle as bundles
from pairclf.bundles.bundle import Bundle, Saved
from pairclf.config import SECTIONS, Config, Model, resolve
from pairclf.config.section import choices
from pairclf.data.rows import to_rows
from pairclf.inputs.cache import RowSource
from pairclf.model import readout as readouts
from pairclf.run import Run, Split
from pairclf.scores.metrics import Floats
from pairclf.task import AB, Row

LABELS: dict[str, Any] = {
    "name": "labels", "fields": ["text"], "classes": ["rude", "long", "empty"], "multi_label": True,
}  # fmt: skip
TASKS: dict[str, Any] = {"pairs": "lmsys", "no ties": "wsdm", "labels": LABELS}


@contextmanager
def killed_finetune() -> Iterator[None]:
    """After two of four steps."""
    steps, take = count(1), loop._optimizer_step

    def take_or_die(*arguments: Any) -> float:
        if next(steps) > 2:
            raise Killed
        return take(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "_optimizer_step", take_or_die)
        yield


@contextmanager
def killed_classical() -> Iterator[None]:
    """When the IDF and the SVD are fitted, and the models are not."""

    def die(*arguments: Any, **options: Any) -> None:
        raise Killed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Space, "vectors", die)
        yield


@contextmanager
def killed_prompt() -> Iterator[None]:
    """While the base is asked for the label mass."""

    def die(*arguments: Any) -> None:
        raise Killed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prompting, "label_mass", die)
        yield


KILLED = {"finetune": killed_finetune, "prompt": killed_prompt, "classical": killed_classical}
TOLERANCE = {"finetune": 1e-4, "prompt": 1e-4, "classical": 0.0}


def write_rows(path: Path, task: str) -> None:
    rows = make_rows(16)
    if task == "pairs":
        write_csv(path, rows)
        return
    cells: list[dict[str, object]] = []
    for number, row in enumerate(rows):
        texts = {name: " ".join(map(str, turns)) for name, turns in row.fields.items()}
        if task == "no ties":
            cells.append({"id": row.id, **texts, "winner": f"model_{'ab'[number % 2]}"})
        else:
            yes = {name: int(number % (place + 2) == 0) for place, name in enumerate(LABELS["classes"])}
            cells.append({"id": row.id, "text": " ".join(texts.values()), **yes})
    pl.DataFrame(cells).write_csv(path)


READOUTS: dict[str, dict[str, Any]] = {
    "head": {},
    "label_tokens": {
        "model": {
            "readout": "label_tokens",
            "label_words": {"winner_model_a": "A", "winner_model_b": "B", "winner_tie": "t"},
        },
        "train": {"loss": "vocabulary"},
    },
    "reward": {"model": {"readout": "reward"}, "train": {"center_rewards_coefficient": 0.01}},
}
"""Settings of the approach `finetune` for each readout."""

ENCODER_DECODERS: dict[str, dict[str, Any]] = {
    "t5-head": {"train": {"layout": "padded"}},
    "t5-label_tokens": {
        "model": READOUTS["label_tokens"]["model"],
        "train": {"layout": "padded", "loss": "vocabulary"},
    },
}
"""Settings of the approach `finetune` on an encoder-decoder."""

PROMPTS: dict[str, dict[str, Any]] = {
    "zero-shot": {"model": READOUTS["label_tokens"]["model"], "prompt": {"k": 0}},
    "nearest": {
        "model": READOUTS["label_tokens"]["model"],
        "prompt": {"k": 2, "examples": "nearest", "max_length": 100},
        "inputs": {"max_length": 400},
    },
    "rationale": {
        "model": READOUTS["label_tokens"]["model"],
        "prompt": {"k": 0, "rationale": 3},
        "inputs": {"max_length": 200},
    },
    "few-shot": {"model": READOUTS["label_tokens"]["model"], "prompt": {"k": 4, "calibration": "batch"}},
}
"""Settings of the approach `prompt`."""

YES_NO: dict[str, Any] = {"readout": "label_tokens", "label_words": {"yes": "Y", "no": "N"}}

VARIANTS = {
    **READOUTS,
    **ENCODER_DECODERS,
    "encoder": {"model": {"lora": None, "pooling": "mean"}, "train": {"learning_rate": 5e-3, "layer_decay": 0.7}},
    **PROMPTS,
    "yes or no": {"model": YES_NO, "inputs": {"max_length": 200}, "train": {"loss": "vocabulary"}},
    "yes or no, few-shot": {"model": YES_NO, "prompt": {"k": 3, "calibration": "contextual"}},
    "lightgbm": {"classical": {"model": "lightgbm", "n_estimators": 8, "learning_rate": 0.5, "min_child_samples": 1}},
    "svm": {"classical": {"model": "svm"}},
    "nb": {"classical": {"model": "nb"}},
    "knn": {"classical": {"model": "knn", "n_neighbors": 3}},
    "tree": {"classical": {"model": "tree", "min_child_samples": 1}},
    "stack": {"classical": {"model": "stack", "estimators": list(MODELS), "n_estimators": 8, "min_child_samples": 1}},
}


def make_case(
    approach: str, task: str, folder: Path, base: Path | None, readout: str = "head", *, here: bool = False
) -> Case:
    write_rows(folder / "train.csv", task)
    sections: dict[str, dict[str, Any]] = {
        "finetune": {
            "inputs": {"max_length": 96, "num_proc": 1},
            "model": {"base": str(base), "quantization": "none", "lora": {"r": 2, "lora_dropout": 0.1}},
            "train": {"num_train_epochs": 2, "save_steps": 1, "global_batch_size": 4, "learning_rate": 3e-2},
        },
        "prompt": {
            "inputs": {"max_length": 640, "num_proc": 1},
            "model": {"base": str(base), "quantization": "none"},
            "prompt": {},
        },
        "classical": {"classical": {"n_features": 512}},
    }
    for section, settings in VARIANTS[readout].items():
        sections[approach][section] |= settings
    tree = {
        "task": TASKS[task],
        "approach": approach,
        "output_dir": str(folder / "run"),
        "data": {"folder": str(folder), "train": "train.csv"},
        "folds": {"n_splits": 2, "near_duplicate_threshold": None},
        **sections[approach],
    }
    return Case(resolve(tree), folder, KILLED[approach], TOLERANCE[approach], here=here)


def test_every_approach_has_its_sections_and_a_contract() -> None:
    assert APPROACHES.keys() == SECTIONS.keys() == KILLED.keys()
    assert READOUTS.keys() == readouts.READOUTS.keys() == {*choices(Model.model_fields["readout"].annotation)}


HEADS = [("classical", task, variant) for task in TASKS for variant in ("head", "stack")] + [
    ("finetune", task, "head") for task in ("pairs", "labels")
]
CASES = [*HEADS, ("finetune", "pairs", "label_tokens"), ("finetune", "pairs", "reward")]
CASES += [("finetune", "pairs", kind) for kind in ENCODER_DECODERS]
CASES += [("finetune", "pairs", "encoder")]
CASES += [("prompt", "pairs", kind) for kind in PROMPTS]
CASES += [("finetune", "labels", "yes or no"), ("prompt", "labels", "yes or no, few-shot")]
CASES += [("classical", "pairs", name) for name in [*MODELS][1:]]
"""A model with a head does not know what its classes mean: two or three are the same to it."""

THOROUGH = [("classical", task, "stack") for task in ("no ties", "labels")]
THOROUGH += [("finetune", "pairs", name) for name in ("label_tokens", "t5-head")] + [("prompt", "pairs", "zero-shot")]
THOROUGH += [("prompt", "pairs", "rationale"), ("prompt", "labels", "yes or no, few-shot")]
THOROUGH += [("classical", "pairs", name) for name in [*MODELS][1:]]
"""Cases with siblings: each task, readout and way to prompt is in a case that is left, all classical models in one."""


@pytest.fixture(
    scope="module",
    params=[pytest.param(case, marks=[pytest.mark.thorough] * (case in THOROUGH), id="-".join(case)) for case in CASES],
)
def case(
    request: pytest.FixtureRequest, base_of: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Case]:
    approach, task, readout = request.param
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "estimate_resources", lambda *_: None)
        base = base_of("bert" if readout == "encoder" else "llama") if approach != "classical" else None
        if readout in ENCODER_DECODERS:
            tiny_encoder_decoder("t5", base := tmp_path_factory.mktemp("base"))
        elif base is not None and readout not in ("head", "encoder"):
            base = with_lm_head(base, tmp_path_factory.mktemp("base"), tied=True, initializer_range=0.3)
        yield make_case(approach, task, tmp_path_factory.mktemp("contract"), base, readout)


@pytest.mark.parametrize("check", CHECKS)
def test_approach_keeps_the_contract(case: Case, check: str) -> None:
    CHECKS[check](case)


# --- broken ones -----------------------------------------------------------------------------------------------------


@dataclass
class Spoils:
    """What a broken approach does to what a sound one has computed.

    Attributes:
        scored: to the logits of rows, wherever they are computed.
        trained_on: to the rows that it trains on; it is told whether it resumes.
        fitted: to the logits that a fitted model gives; it is told how many models its trainer has fitted before.
        saved: to the model, as it is saved.
        prepared: to a file's rows, as workers get them.
        probes: to the logits of a bundle's probes.
    """

    scored: Callable[[Sequence[Row], Floats], Floats] = lambda rows, logits: logits
    trained_on: Callable[[pl.DataFrame, bool], pl.DataFrame] = lambda rows, resumes: rows
    fitted: Callable[[int, Floats], Floats] = lambda before, logits: logits
    saved: Callable[[ClassicalModel], ClassicalModel] = lambda model: model
    prepared: Callable[[Prepared], Prepared] = lambda prepared: prepared
    probes: Callable[[Bundle, Floats], Floats] = lambda bundle, logits: logits


class SpoiledModel:
    """A classical model whose logits are spoiled."""

    def __init__(self, model: ClassicalModel, spoils: Spoils) -> None:
        self.task = model.task
        self.model = model
        self._spoils = spoils

    def logits(self, rows: Sequence[Row]) -> Floats:
        return self._spoils.scored(rows, self.model.logits(rows))


class SpoiledFitted:
    """A fitted model that gives and saves what is spoiled."""

    def __init__(self, model: SpoiledModel, extracted: Any, before: int, spoils: Spoils) -> None:
        self._model = model
        self._extracted = extracted
        self._before = before
        self._spoils = spoils
        self.record: dict[str, float] = {}

    def logits(self, rows: pl.DataFrame) -> Floats:
        return self._spoils.fitted(self._before, self._model.logits(to_rows(rows, self._model.task)))

    def save(self, folder: Path) -> Saved:
        return FittedClassical(self._spoils.saved(self._model.model), self._extracted, 0).save(folder)


class SpoiledTrainer(ClassicalTrainer):
    """Trains on spoiled rows."""

    def __init__(self, run: Run, spoils: Spoils) -> None:
        super().__init__(run)
        self._before = count()
        self._spoils = spoils

    def fit(self, split: Split, folder: Path, *, resume: bool | None, trust_checkpoint: bool) -> Any:
        rows = self._spoils.trained_on(split.training, bool(resume))
        fitted = super().fit(Split(rows, split.held_out), folder, resume=resume, trust_checkpoint=trust_checkpoint)
        model = SpoiledModel(fitted._model, self._spoils)
        return SpoiledFitted(model, self._extracted, next(self._before), self._spoils)


class SpoiledApproach(ClassicalApproach):
    """The classical approach, spoiled."""

    module = __name__

    def __init__(self, **spoils: Any) -> None:
        self._spoils = Spoils(**spoils)

    def trainer(self, run: Run, process: Process) -> ClassicalTrainer:
        return SpoiledTrainer(run, self._spoils)

    def prepare(self, bundle: Bundle, source: RowSource, folder: Path) -> Prepared:
        return self._spoils.prepared(super().prepare(bundle, source, folder))

    def score_probes(self, bundle: Bundle, base: Path | None) -> tuple[Floats, str]:
        logits, dtype = super().score_probes(bundle, base)
        return self._spoils.probes(bundle, logits), dtype

    def _model(self, bundle: Bundle) -> Any:
        return SpoiledModel(super()._model(bundle), self._spoils)


class OtherSections(SpoiledApproach):
    """Says that it reads what it does not."""

    sections = frozenset({"classical", "train"})


def sees_copies(rows: Sequence[Row], logits: Floats) -> Floats:
    """A row that stands beside its copy has another score."""
    return logits + (len(rows) - len({str(row.fields) for row in rows}))


def forgets_to_sort_back(rows: Sequence[Row], logits: Floats) -> Floats:
    """Rows that come in the opposite order get each other's scores."""
    ids = [int(row.id) for row in rows]
    return logits[::-1] if ids == sorted(ids, reverse=True) else logits


def ignores_the_swap(rows: Sequence[Row], logits: Floats) -> Floats:
    return logits[:, [AB, AB]]


def read_everything(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Config, "unread", lambda self: [])


def compare_nothing(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(bundles, "_compare_hashes", lambda *arguments: None)


class Broken(NamedTuple):
    """An approach that breaks one point; `fails`: the check of that point, and those that can't hold without it."""

    make: Callable[[], Approach]
    fails: tuple[str, ...]
    patch: Callable[[pytest.MonkeyPatch], None] = lambda patch: None


def other_rows_each_time() -> Approach:
    """A seed that is drawn anew; a resumed training has the first one's."""
    number = count()
    return SpoiledApproach(trained_on=lambda rows, resumes: rows[0 if resumes else next(number) :])


BROKEN = {
    "other sections": Broken(OtherSections, ("sections_are_those_of_the_table",)),
    "reads everything": Broken(SpoiledApproach, ("settings_that_it_does_not_read_are_errors",), read_everything),
    "saves other weights": Broken(
        lambda: SpoiledApproach(
            saved=lambda model: replace(model, space=replace(model.space, idf=1.1 + model.space.idf))
        ),
        (
            "a_saved_model_gives_the_logits_of_the_fitted_one",
            "probes_verify",
            "out_of_fold_rows_are_the_held_out_ones",
            "workers_give_the_logits_of_the_fitted_model",
            "a_package_holds_a_bundle_that_verifies",
        ),
    ),
    "compares no hashes": Broken(SpoiledApproach, ("a_changed_byte_is_refused",), compare_nothing),
    "other probes": Broken(
        lambda: SpoiledApproach(probes=lambda bundle, logits: logits + 1),
        ("probes_verify", "a_package_holds_a_bundle_that_verifies"),
    ),
    "sees its neighbours": Broken(lambda: SpoiledApproach(scored=sees_copies), ("a_rows_neighbours_do_not_matter",)),
    "sees the order": Broken(
        lambda: SpoiledApproach(scored=forgets_to_sort_back), ("the_order_of_rows_does_not_matter",)
    ),
    "ignores the swap": Broken(
        lambda: SpoiledApproach(scored=ignores_the_swap), ("exchanged_sides_exchange_the_orders",)
    ),
    "draws a seed": Broken(other_rows_each_time, ("the_same_seed_gives_the_same_model",)),
    "resumes elsewhere": Broken(
        lambda: SpoiledApproach(trained_on=lambda rows, resumes: rows[2 * resumes :]),
        ("killed_and_resumed_ends_the_same",),
    ),
    "mixes up held-out rows": Broken(
        lambda: SpoiledApproach(fitted=lambda before, logits: logits[::-1] if before else logits),
        ("out_of_fold_rows_are_the_held_out_ones",),
    ),
    "gives workers other rows": Broken(
        lambda: SpoiledApproach(prepared=lambda prepared: replace(prepared, encoded=prepared.encoded[::-1])),
        ("workers_give_the_logits_of_the_fitted_model",),
    ),
    "needs its run folder": Broken(
        lambda: SpoiledApproach(probes=lambda bundle, logits: logits + (bundle.folder.name != "bundle")),
        ("a_package_holds_a_bundle_that_verifies",),
    ),
}


def test_every_point_has_an_approach_that_breaks_it() -> None:
    assert [broken.fails[0] for broken in BROKEN.values()] == list(CHECKS)


DEAR = {
    "out_of_fold_rows_are_the_held_out_ones",
    "workers_give_the_logits_of_the_fitted_model",
    "a_package_holds_a_bundle_that_verifies",
}
"""Checks that take two thirds of the time: in the suite, a broken approach meets those alone that it must fail."""


def failing(case: Case, checks: Iterable[str] = tuple(CHECKS)) -> list[str]:
    """Names of those checks that the approach does not pass."""
    names = []
    assert len(case.first.logits)
    for name in checks:
        try:
            CHECKS[name](case)
        except (Exception, pytest.fail.Exception):  # noqa: BLE001 - an approach may break in any way
            names.append(name)
    return names


def test_a_sound_one_passes_in_one_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(approaches, "_made", lambda name: SpoiledApproach())
    assert failing(make_case("classical", "pairs", tmp_path, None, here=True)) == []


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_approach_fails_its_check(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pytestconfig: pytest.Config
) -> None:
    broken = BROKEN[name]
    left_out = set() if pytestconfig.getoption("--thorough") else DEAR - {*broken.fails}
    case, approach = make_case("classical", "pairs", tmp_path, None, here=True), broken.make()
    monkeypatch.setattr(approaches, "_made", lambda _: approach)
    broken.patch(monkeypatch)
    assert set(failing(case, [check for check in CHECKS if check not in left_out])) == set(broken.fails)
