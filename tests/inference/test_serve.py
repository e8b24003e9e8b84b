"""Batches of any size have the scores that `predict` gives the whole file; and what goes wrong costs no answer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import pandas as pd
import polars as pl
import pytest
from clocks_support import AMPLE, clock_in, turned_crew
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from polars.testing import assert_frame_equal
from support.faults import PASS, faulty, quick, unloadable
from support.runs import random_bundle
from tests_support import make_rows, write_csv

from pairclf.bundles import bundle as bundles
from pairclf.config import resolve
from pairclf.errors import BundleError, ConfigError, DataError, ModelError
from pairclf.inference import pool as crew
from pairclf.inference import predict as job
from pairclf.inference import resident
from pairclf.inference.predict import predict
from pairclf.inference.serve import Server
from pairclf.rehearsal.shared_clock import SharedClock
from pairclf.scores import probabilities
from pairclf.scores.metrics import Floats
from pairclf.task import LMSYS, WSDM

ROWS = 14
PRIOR = (0.5, 0.3, 0.2)
COLUMNS = ["id", *LMSYS.classes]
AMPLY = {"seconds": AMPLE, "batch_seconds": AMPLE}


@pytest.fixture(scope="module", autouse=True)
def _quick_workers() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for module in (resident, job):
            patch.setattr(module, "ProcessPool", partial(crew.ProcessPool, load=quick))
        yield


@pytest.fixture(scope="module")
def folder(base_of: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`fold0/bundle`, `fold1/bundle`, `wsdm/bundle`; `test.csv`, whose ids are numbers and whose last row is broken."""
    made = tmp_path_factory.mktemp("serve")
    model = {"base": str(base_of("llama")), "quantization": "none", "lora": {"r": 2}}
    config = resolve({"model": model, "inputs": {"max_length": 128}})
    for seed in (0, 1):
        random_bundle(made / f"fold{seed}" / "bundle", config, seed=seed, fold=seed, prior=PRIOR)
    wsdm = resolve({"task": "wsdm", "model": model, "inputs": {"max_length": 128}})
    random_bundle(made / "wsdm" / "bundle", wsdm, seed=2, prior=(0.6, 0.4))
    write_csv(made / "rows.csv", make_rows(ROWS))
    rows = pl.read_csv(made / "rows.csv").drop(LMSYS.classes)
    broken = {"id": ROWS, "prompt": None, "response_a": '["half', "response_b": "[null]"}
    pl.concat([rows, pl.DataFrame([broken], schema=rows.schema)]).write_csv(made / "test.csv")
    return made


@pytest.fixture(scope="module")
def whole(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> pl.DataFrame:
    out = tmp_path_factory.mktemp("whole") / "submission.csv"
    predict(both(folder), folder / "test.csv", out)
    return pl.read_csv(out)


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Server]:
    with closing(Server(both(folder), **AMPLY)) as made:
        yield made


def both(folder: Path) -> list[Path]:
    return [folder / f"fold{fold}" / "bundle" for fold in (0, 1)]


def rows_of(folder: Path) -> pl.DataFrame:
    return pl.read_csv(folder / "test.csv")


def served(server: Server, rows: pl.DataFrame, cuts: Sequence[int]) -> pl.DataFrame:
    edges = [0, *sorted(cuts), len(rows)]
    return pl.concat([server.predict(rows[start:end]) for start, end in pairwise(edges)])


def values(scores: pl.DataFrame) -> Floats:
    return scores.select(LMSYS.classes).to_numpy()


def inject(monkeypatch: pytest.MonkeyPatch, kind: str, row: int | None = None) -> None:
    load = unloadable if kind == "load" else partial(faulty, kind=kind, row=row)
    monkeypatch.setattr(resident, "ProcessPool", partial(crew.ProcessPool, load=load))


# --- one way to a score ----------------------------------------------------------------------------------------------


@settings(max_examples=8, deadline=None, suppress_health_check=list(HealthCheck))
@given(cuts=st.lists(st.integers(0, ROWS + 1), max_size=5))
def test_batches_of_any_size_have_the_whole_files_scores(
    cuts: list[int], folder: Path, whole: pl.DataFrame, server: Server
) -> None:
    """Also a row with a missing cell, a broken one and a list of nulls, and batches without a row."""
    assert_frame_equal(served(server, rows_of(folder), cuts), whole, abs_tol=1e-5)


def test_without_the_un_swap_they_have_not(
    folder: Path, whole: pl.DataFrame, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probabilities, "unswap", lambda scores, task: scores)
    assert np.abs(values(served(server, rows_of(folder), [5])) - values(whole)).max() > 1e-3


def test_an_ensembles_file_with_weights_and_temperatures(folder: Path, tmp_path: Path) -> None:
    first, second = both(folder)
    path = tmp_path / "ensemble.yaml"
    entries = f"[{{bundle: {first}, weight: 3, temperature: 2}}, {{bundle: {second}}}]"
    path.write_text(f"members: {entries}\ntemperature: 1.5")
    wanted = predict([path], folder / "test.csv", tmp_path / "submission.csv")
    with closing(Server([path], **AMPLY)) as server:
        np.testing.assert_allclose(values(served(server, rows_of(folder), [4])), values(wanted), atol=1e-5)


def test_labels_where_the_competition_wants_labels(folder: Path, tmp_path: Path) -> None:
    bundle = folder / "wsdm" / "bundle"
    predict([bundle], folder / "test.csv", tmp_path / "submission.csv")
    with closing(Server([bundle], **AMPLY)) as server:
        rows = rows_of(folder)
        assert_frame_equal(server.predict(rows), pl.read_csv(tmp_path / "submission.csv"))
        sample = pl.DataFrame({"id": rows["id"], "winner": ["model_a"] * len(rows)})
        assert server.predict(rows, sample)["winner"].unique().is_in(WSDM.classes).all()
        assert server.predict(rows[:0]).schema == {"id": pl.Int64(), "winner": pl.String()}


# --- what comes in, and what goes out --------------------------------------------------------------------------------


def test_the_answer_has_the_samples_columns_ids_and_order(folder: Path, whole: pl.DataFrame, server: Server) -> None:
    rows = rows_of(folder)[:6]
    columns = ["winner_tie", "id", "winner_model_a", "winner_model_b"]
    sample = whole[:6].select(columns).reverse()
    lags = pl.DataFrame({"day": [1, 2]})
    given = server.predict(rows.with_columns(extra=pl.lit("?")), lags, sample)
    assert_frame_equal(given, sample, abs_tol=1e-5)
    with pytest.raises(DataError, match="lack 1 ids"):
        server.predict(rows[1:], sample)
    with pytest.raises(DataError, match=r"columns \['response_b'\] are missing"):
        server.predict(rows.drop("response_b"))


def test_pandas_frames_categories_and_ids_of_any_kind(folder: Path, whole: pl.DataFrame, server: Server) -> None:
    rows = rows_of(folder)[:4].with_columns(pl.col("prompt").cast(pl.Categorical))
    frame = pd.read_csv(folder / "test.csv").iloc[2:4]  # with an index that does not begin at 0
    np.testing.assert_allclose(values(server.predict(rows)), values(whole)[:4], atol=1e-5)
    np.testing.assert_allclose(values(server.predict(frame)), values(whole)[2:4], atol=1e-5)
    odd = rows.with_columns(id=pl.Series(["x", None, "x", ""]))
    answer = server.predict(odd)
    assert answer["id"].to_list() == ["x", None, "x", ""]
    np.testing.assert_allclose(values(answer), values(whole)[:4], atol=1e-5)
    with pytest.raises(DataError, match="no id"):
        server.predict(rows.drop("id"))
    with pytest.raises(DataError, match="a dict"):
        server.predict({"id": [1]})


def test_the_report_counts(folder: Path) -> None:
    with closing(Server(both(folder)[:1], **AMPLY)) as server:
        served(server, rows_of(folder), [3])
        report = server.report()
    seconds = report.pop("seconds")
    total = ROWS + 1
    assert report == {"rows": total, "both": total, "one": 0, "priors": 0, "failed": 0, "batches": 2}
    assert seconds > 0


# --- time ------------------------------------------------------------------------------------------------------------


def test_when_the_time_is_over_there_are_priors_at_once(folder: Path, tmp_path: Path) -> None:
    clock = clock_in(tmp_path)
    with closing(Server(both(folder)[:1], **AMPLY, clock=clock)) as server:
        rows = rows_of(folder)
        assert (np.abs(values(server.predict(rows)) - PRIOR).max(axis=1) > 1e-3).all()
        clock.turn(AMPLE)
        np.testing.assert_allclose(values(server.predict(rows)), np.tile(PRIOR, (len(rows), 1)))
        assert server.report()["priors"] == len(rows)


def slowed(monkeypatch: pytest.MonkeyPatch, folder: Path) -> SharedClock:
    """Passes of `PASS` seconds, by the clock that is returned; a row alone is a pass with `ALONE`."""
    clock = clock_in(folder)
    monkeypatch.setattr(resident, "ProcessPool", turned_crew(clock, partial(faulty, kind="slow", clock=clock)))
    return clock


ALONE = ["predict.swap=off", "predict.tokens_per_batch=1"]


def test_a_batch_that_would_take_too_long_ends_in_time_with_what_is_known(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And what comes back later is not taken for the next batch's."""
    rows, limit = rows_of(folder), 6 * PASS
    wanted = values(predict(both(folder)[:1], folder / "test.csv", tmp_path / "submission.csv", overrides=ALONE))
    clock = slowed(monkeypatch, tmp_path)
    settings = {"batch_seconds": limit, "overrides": ALONE, "clock": clock}
    with closing(Server(both(folder)[:1], seconds=AMPLE, **settings)) as server:
        first = values(server.predict(rows))
        assert clock() <= limit
        second = values(server.predict(rows.reverse()))[::-1]
        assert clock() <= 2 * limit
        assert 1 <= server.report()["one"] < 2 * len(rows)
    for answer in (first, second):
        right, prior = (np.abs(answer - one).max(axis=1) < 1e-5 for one in (wanted, np.array(PRIOR)))
        assert (right | prior).all()
        assert right.any()
        assert prior.any()


def test_where_both_orders_of_all_rows_would_take_too_long_rows_have_one(
    folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """By the pace of the first batch; and where few rows are expected, the same time suffices for both."""
    clock = slowed(monkeypatch, tmp_path)
    rows = rows_of(folder)
    for expected, kind in ((100_000, "one"), (len(rows), "both")):
        settings = {"batch_seconds": AMPLE, "clock": clock}
        with closing(Server(both(folder)[:1], seconds=10_000 * PASS, rows=expected, **settings)) as server:
            for start in range(0, 8, 2):
                server.predict(rows[start : start + 2])
            report = server.report()
            assert report["priors"] == 0
            assert report[kind] >= 6, report  # of the first batch nothing was known


# --- faults ----------------------------------------------------------------------------------------------------------


def test_a_poisoned_row_has_the_prior_and_all_others_their_scores(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    wanted = values(predict(both(folder)[:1], folder / "test.csv", tmp_path / "submission.csv"))
    inject(monkeypatch, "nan", row=2)
    with closing(Server(both(folder)[:1], **AMPLY)) as server:
        answers = [values(server.predict(rows_of(folder)[start : start + 5])) for start in (0, 5)]
        report = server.report()
    wanted[[2, 7]] = PRIOR
    np.testing.assert_allclose(np.concatenate(answers), wanted[:10], atol=1e-5)
    assert (report["priors"], report["failed"], report["both"]) == (2, 2, 8)
    assert "row 2 could not be scored" in capsys.readouterr().err


@pytest.mark.slow
def test_a_row_that_kills_its_worker_has_the_prior_and_later_ones_another_worker(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    overrides, rows = ["predict.swap=off", "predict.tokens_per_batch=1"], rows_of(folder)[:5]
    wanted = values(predict(both(folder)[:1], folder / "test.csv", tmp_path / "submission.csv", overrides=overrides))
    inject(monkeypatch, "die", row=2)
    with closing(Server(both(folder)[:1], **AMPLY, overrides=overrides)) as server:
        answers = [values(server.predict(batch)) for batch in (rows[:3], rows[3:])]
    wanted[2] = PRIOR
    np.testing.assert_allclose(np.concatenate(answers), wanted[:5], atol=1e-5)


def test_memory_that_does_not_suffice_for_three_sequences(
    folder: Path, whole: pl.DataFrame, monkeypatch: pytest.MonkeyPatch
) -> None:
    inject(monkeypatch, "memory")
    with closing(Server(both(folder), **AMPLY)) as server:
        assert_frame_equal(served(server, rows_of(folder), [9]), whole, abs_tol=1e-5)
        assert server.report()["failed"] == 0


def test_a_member_that_does_not_load_is_left_out_and_named(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    alone = predict(both(folder)[:1], folder / "test.csv", tmp_path / "submission.csv")
    inject(monkeypatch, "load")
    with closing(Server(both(folder), **AMPLY)) as server:
        np.testing.assert_allclose(values(served(server, rows_of(folder), [9])), values(alone), atol=1e-5)
    assert capsys.readouterr().err.count("the second one does not load") == 1


def test_nobody_loads(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inject(monkeypatch, "load")
    rows = rows_of(folder)
    with closing(Server(both(folder)[1:], **AMPLY)) as server, pytest.raises(BundleError, match="does not load"):
        server.predict(rows)
    with closing(Server(both(folder)[1:], **AMPLY, strict=False)) as server:
        np.testing.assert_allclose(values(server.predict(rows)), np.tile(PRIOR, (len(rows), 1)))


def test_a_changed_bundle_is_refused(folder: Path, base_of: Callable[[str], Path], tmp_path: Path) -> None:
    config = bundles.open_bundle(both(folder)[0]).config
    bundle = random_bundle(tmp_path / "fold0" / "bundle", config, prior=PRIOR)
    (bundle / "tokenizer" / "tokenizer_config.json").write_text("{}")
    with closing(Server([bundle], **AMPLY)) as server, pytest.raises(BundleError, match="changed, added or removed"):
        server.predict(rows_of(folder))


def test_what_can_not_be_served_is_refused_when_the_server_is_made(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = both(folder)
    (tmp_path / "cascade.yaml").write_text(f"members: [{{bundle: {first}}}, {{bundle: {second}, share: 0.25}}]")
    with pytest.raises(ConfigError, match=r"members.1.share=0.25"):
        Server([tmp_path / "cascade.yaml"], **AMPLY)
    monkeypatch.setattr(resident, "process_memory", lambda processes: 1000)
    with pytest.raises(ModelError, match="into memory together"):
        Server([first, second], **AMPLY)
