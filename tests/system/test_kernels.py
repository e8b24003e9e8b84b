"""Real kernels: what `package` built scores in the rehearsal what `predict` scores here, whatever happens to it.

The other faults meet cheaper kernels: tests/rehearsal has the real first cell, and cells that only write files;
tests/packaging/test_notebook.py the cells in one process.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import polars as pl
import pytest
from support.kernels import block, use_light_image
from support.packages import (
    TEST_ROWS,
    alike,
    assert_scores_as_here,
    classical_package,
    encoder_package,
    files_of,
    predicted,
    prompt_package,
    random_package,
)

from pairclf.files import sha256_tree
from pairclf.rehearsal.rehearse import Options, rehearse
from pairclf.rehearsal.report import RehearsalReport, read_passed

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def top(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder that holds all that rehearsals leave on this machine."""
    folder = tmp_path_factory.mktemp("kernels")
    with pytest.MonkeyPatch.context() as patch:
        use_light_image(patch)
        for name in ("XDG_STATE_HOME", "XDG_CACHE_HOME"):
            patch.setenv(name, str(folder / "machine" / name))
        yield folder


@pytest.fixture(scope="module")
def notebook(top: Path) -> Path:
    """A package with a notebook, rehearsed without faults."""
    return undisturbed(random_package(top / "notebook"))


@pytest.fixture(scope="module")
def classical(top: Path) -> Path:
    """A package of a bundle without a language model, for a machine without a GPU: trained, packaged and rehearsed
    where torch can't be imported, here and in the image of the kernel.

    Its kernel is a script: Jupyter takes a second to start, and the demo's test has a notebook.
    """
    block(top / "blocked")
    places = [str(top / "blocked"), *sys.path]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(places)}
    subprocess.run([sys.executable, "-c", WITHOUT_TORCH, top / "classical"], env=environment, check=True)
    assert not (top / "blocked" / "imported").exists(), "torch was asked for"
    return top / "classical" / "package"


WITHOUT_TORCH = """import sys
from pathlib import Path
from pairclf.rehearsal import workspace
from support.kernels import make_image_without_torch
from test_kernels import classical_package, undisturbed
workspace.make_image = make_image_without_torch
undisturbed(classical_package(Path(sys.argv[1]), machine_shape="None", kernel_type="script"))
"""


def undisturbed(package: Path) -> Path:
    """Rehearse a package without faults."""
    before = sha256_tree(package)
    test, sample = files_of(package.parent)
    rehearse(package, Options(test=test, sample=sample, layouts=("flat",)))
    assert before.items() <= sha256_tree(package).items(), "a package is not changed by its rehearsal"
    return package


def run(package: Path, name: str) -> RehearsalReport:
    """The report of a rehearsal with that fault."""
    test, sample = files_of(package.parent)
    (report,) = rehearse(package, Options(test=test, sample=sample, layouts=("flat",), late=0.2, inject=(name,))).runs
    assert report.fault == name
    assert report.passed
    assert json.loads((package / "rehearsal" / f"report-{name}.json").read_text())["passed"]
    return report


def submission(package: Path, name: str | None = None) -> Path:
    return package / "rehearsal" / ("submission.csv" if name is None else f"submission-{name}.csv")


def test_classical_kernel_gives_the_submission_of_predict(classical: Path, tmp_path: Path) -> None:
    """Its batches follow another pace, under its deadline."""
    report = read_passed(classical)
    assert_scores_as_here(classical, report, tmp_path, tolerance=1e-5)
    metadata = json.loads((classical / "kernel" / "kernel-metadata.json").read_text())
    assert (metadata["enable_gpu"], metadata["machine_shape"]) == (False, "")
    assert {"cell check", "cell install", "cell verify", "cell predict"} <= report.seconds.keys()


# --- what cheaper kernels show too, and the demo's, which is undisturbed ---------------------------------------------


@pytest.mark.thorough
@pytest.mark.parametrize("name", ["classical", "notebook"])
def test_kernel_goes_on_after_kills(request: pytest.FixtureRequest, name: str) -> None:
    package = request.getfixturevalue(name)
    report = run(package, "kill")
    assert report.scored is not None
    assert report.scored.both_orders == TEST_ROWS
    (executed,) = (package / "rehearsal").glob("executed-kill.*")
    assert "predict was killed" in executed.read_text()
    assert alike(submission(package), submission(package, "kill"), tolerance=1e-5)


@pytest.mark.thorough
def test_notebook_gives_the_submission_of_predict(notebook: Path, tmp_path: Path) -> None:
    report = read_passed(notebook)
    assert_scores_as_here(notebook, report, tmp_path, tolerance=1e-5)
    assert report.memory_peak > 200e6
    here, there = report.projections
    assert there.judged
    assert there.machine == "2 x Tesla T4"
    assert there.rows == 25_000
    assert 0 < there.predict < 3600, "a model of a million parameters"
    assert here.predict > report.seconds["cell predict"]


@pytest.mark.thorough
@pytest.mark.parametrize("kind", ["notebook", "classical"])
def test_server_gives_the_submission_of_predict(top: Path, tmp_path: Path, kind: str) -> None:
    if kind == "classical":
        package = classical_package(top / "classical-server", kernel_type="server")
    else:
        package = random_package(top / "server", kernel_type="server")
    assert_scores_as_here(package, read_passed(undisturbed(package)), tmp_path)


WORDS = {"winner_model_a": "A", "winner_model_b": ["B", "b"], "winner_tie": "C"}


@pytest.mark.thorough
@pytest.mark.parametrize("model", [{"readout": "label_tokens", "label_words": WORDS}, {"readout": "reward"}])
def test_notebook_of_another_readout_gives_the_submission_of_predict(
    top: Path, tmp_path: Path, model: dict[str, object]
) -> None:
    package = undisturbed(random_package(top / str(model["readout"]), model=model))
    report = read_passed(package)
    assert alike(predicted(package, tmp_path, [0]), submission(package), tolerance=1e-4)
    assert report.scored is not None
    assert report.scored.both_orders == TEST_ROWS


@pytest.mark.thorough
@pytest.mark.parametrize("real", [False, True], ids=["tiny", "minilm"])
def test_notebook_of_an_encoder_needs_neither_a_gpu_nor_a_base(
    request: pytest.FixtureRequest, top: Path, tmp_path: Path, base_of: Callable[[str], Path], real: bool
) -> None:
    """All of its weights are in the bundle."""
    base = request.getfixturevalue("minilm") if real else base_of("bert")
    package = undisturbed(encoder_package(top / f"encoder-{real}", base))
    assert_scores_as_here(package, report := read_passed(package), tmp_path, tolerance=1e-5)
    metadata = json.loads((package / "kernel" / "kernel-metadata.json").read_text())
    assert (metadata["enable_gpu"], metadata["machine_shape"], metadata["model_sources"]) == (False, "", [])
    assert metadata["dataset_sources"] == [f"someone/a-notebook-{part}" for part in ("bundle", "wheels")]
    (bundle,) = (package / "bundle").glob("run-fold0-*")
    weights = (bundle / "backbone" / "model.safetensors").stat().st_size
    assert report.disk_peak < weights or not real, "nothing of it is copied"
    (here,) = report.projections
    assert here.rows == 25_000


@pytest.mark.thorough
@pytest.mark.parametrize(
    "prompt",
    [{"k": 0}, {"k": 4, "calibration": "batch"}, {"k": 0, "rationale": 6}],
    ids=["zero-shot", "few-shot", "rationale"],
)
def test_notebook_of_a_prompt_gives_the_submission_of_predict(
    top: Path, tmp_path: Path, prompt: dict[str, object], request: pytest.FixtureRequest
) -> None:
    model: dict[str, object] = {"readout": "label_tokens", "label_words": WORDS}
    package = undisturbed(prompt_package(top / request.node.callspec.id, prompt, model))
    assert_scores_as_here(package, read_passed(package), tmp_path)


@pytest.mark.thorough
@pytest.mark.parametrize("name", ["classical", "notebook"])
def test_notebook_scores_what_fits_in_memory(request: pytest.FixtureRequest, name: str) -> None:
    report = run(request.getfixturevalue(name), "oom")
    assert report.scored is not None
    assert report.scored.both_orders + report.scored.one_order > TEST_ROWS / 2, "what fits is scored"


@pytest.mark.thorough
def test_notebook_ends_in_time_with_passes_that_are_too_slow(notebook: Path) -> None:
    report = run(notebook, "slow")
    assert report.speed == 1, "the machine's own slowness uses up nothing of the time"
    assert report.deadline / 2 < report.notebook < 3600 * report.hours, "the passes used it up, and the end was in time"
    assert report.scored is not None
    assert report.scored.prior > 0, "there was no time for all"
    scores = pl.read_parquet(notebook / "rehearsal" / "scores-slow.parquet")
    prior = pl.read_csv(submission(notebook, "slow")).filter(pl.Series(scores["orders"] == 0))
    assert prior.drop("id").unique().height == 1


@pytest.mark.thorough
@pytest.mark.parametrize("name", ["null-rows", "extra-columns"])
def test_notebook_scores_strange_test_files(notebook: Path, name: str) -> None:
    report = run(notebook, name)
    assert report.scored is not None
    assert report.scored.both_orders == TEST_ROWS
    assert alike(submission(notebook), submission(notebook, name)) is (name == "extra-columns")
