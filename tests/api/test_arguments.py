"""Arguments of a wrong type are one error that names them, and errors speak of arguments instead of options."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

import pairclf
from pairclf.api.arguments import in_python
from pairclf.errors import ConfigError, DataError, PairclfError

WRONG: dict[str, tuple[Callable[[Any], object], str]] = {
    "load": (lambda _: pairclf.load(3), "source=3 is of type int; it must be str | path"),  # type: ignore[arg-type]
    "load several": (lambda _: pairclf.load([3]), r"source=\[3\] is of type list"),  # type: ignore[list-item]
    "load none": (lambda _: pairclf.load([]), "source names no bundle"),
    "override": (lambda _: pairclf.load("x", 5), "overrides=5 is of type int"),  # type: ignore[arg-type]
    "fit": (lambda _: pairclf.fit(None), "config=None .* the path of a YAML file, or a dict"),  # type: ignore[arg-type]
    "fold": (lambda _: pairclf.fit({}, fold="0"), "fold='0' is of type str; .* int"),  # type: ignore[arg-type]
    "folds": (lambda _: pairclf.cross_validate({}, folds=3), "folds=3 .* Sequence"),  # type: ignore[arg-type]
    "scores": (lambda _: pairclf.evaluate({}, scores=3), "scores=3 .* str | path"),  # type: ignore[arg-type]
    "runs": (lambda _: pairclf.compare("a", 3), "runs=3 is of type int"),  # type: ignore[arg-type]
    "out": (lambda _: pairclf.blend("a", out=3), "out=3 is of type int"),  # type: ignore[arg-type]
    "entries": (lambda _: pairclf.sweep({}, 3), "entries=3 is of type int"),  # type: ignore[arg-type]
    "frame": (lambda judge: judge.predict(5), "rows can't be taken from a int"),
    "answers": (lambda judge: judge.rank("p", [1, 2]), r"answers=\[1, 2\] .* Sequence\[str\]"),
    "pairs": (lambda judge: judge.rank("p", ["a", "b"], pairs="x"), "pairs='x' is of type str"),
    "folder": (lambda judge: judge.export_transformers(3), "folder=3 is of type int"),
    "rows": (lambda _: pairclf.PairClassifier().fit(None, ["tie"]), r"X is an array of shape \(\)"),
    "y": (lambda _: pairclf.PairClassifier().fit([["a", "b", "c"]], None), r"y has the shape \(\)"),
    "labels": (lambda _: pairclf.PairClassifier(labels=5).fit([["a"] * 3], ["tie"]), "labels=5 is no dict"),
}


@pytest.fixture(scope="module")
def judge(classical_bundles: list[Path]) -> Iterator[pairclf.Judge]:
    with pairclf.load(classical_bundles, device="cpu") as loaded:
        yield loaded


@pytest.mark.parametrize("name", WRONG)
def test_an_argument_of_a_wrong_type_is_named(name: str, judge: pairclf.Judge) -> None:
    call, words = WRONG[name]
    with pytest.raises(PairclfError, match=words):
        call(judge)


def test_values_of_other_libraries_are_taken(classical_config: dict[str, Any], judge: pairclf.Judge) -> None:
    assert len(pairclf.cross_validate(classical_config, folds=np.array([0, 1])).bundles) == 2  # type: ignore[arg-type]
    for answers in (np.array(["good answer", "bad answer"]), pl.Series(["good answer", "bad answer"])):
        assert judge.rank("p", answers)["rank"].to_list() == [1, 2]  # type: ignore[arg-type]


def test_errors_name_arguments(
    classical_config: dict[str, Any], judge: pairclf.Judge, tmp_path: Path, cli: Callable[..., tuple[int, str]]
) -> None:
    """The same errors, of which the command line names the options."""
    with pytest.raises(DataError, match=r"^pairs=1 does not connect 3 different answers[\s\S]*give pairs=N, 2"):
        judge.rank("p", ["a", "b", "c"], pairs=1)
    with pytest.raises(ConfigError, match=r"^method='best' is unknown"):
        pairclf.blend(classical_config, method="best")
    pairclf.cross_validate(classical_config).scores[:20].write_parquet(tmp_path / "few.parquet")
    with pytest.raises(DataError, match=r"\(folds=\[N\]\), or compare the rows that all have: common=True"):
        pairclf.compare(classical_config, tmp_path / "few.parquet")
    with pytest.raises(ConfigError, match="give config=CONFIG, whose") as caught:
        pairclf.blend(tmp_path / "few.parquet")
    assert caught.value.remedy is not None
    assert caught.value.remedy in str(caught.value)
    assert "give --config CONFIG, whose" in cli("blend", tmp_path / "few.parquet", "--figures-only")[1]


def test_commands_and_other_options_stay_as_they_are() -> None:
    hints = {"folds": list[int], "resume": bool | None, "out": str}
    for text, python in {
        "run `pairclf cv CONFIG --fold 0` first": None,
        "torchrun --standalone; --test-time": None,
        "go on with --resume, or --no-resume": "go on with resume=True, or resume=False",
        "--out a/b.yaml exists; --figures-only": "out=a/b.yaml exists; out=None",
        "--fold 2, --out": "folds=[2], out",
    }.items():
        assert in_python(text, hints) == (python or text)
