"""What truncation cut of a run's rows is what its models did not see, and is known without torch."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from support.runs import config_of, copy_run

from pairclf.data.folds import read_folds
from pairclf.model.inputs import open_inputs
from pairclf.run import FOLDS, Paths, labelled_rows, output_of
from pairclf.runs.evaluate import evaluate_run
from pairclf.runs.truncation import less_cut, lost_tokens, truncation_traits
from pairclf.scores import slices
from pairclf.task import AB, LMSYS, Task


def test_lost_tokens_are_those_of_the_models_inputs(trained_run: Callable[[str], Path]) -> None:
    config = config_of(trained_run("llama"))
    labelled = labelled_rows(config)
    folds = read_folds(output_of(config) / FOLDS, labelled, n=config.folds.n_splits)
    lost = lost_tokens(config, labelled, folds)
    assert lost is not None
    assert lost["id"].to_list() == folds["id"].to_list()

    from pairclf.data.rows import to_rows

    builder = open_inputs(config).builder
    rows = folds.select("id").join(labelled, on="id", how="left", maintain_order="left")
    fields = LMSYS.fields

    def of(builder: object) -> list[tuple[int, ...]]:
        encoded = builder.encode(to_rows(rows, LMSYS))  # type: ignore[attr-defined]
        return [tuple(orders[AB].dropped[name] for name in fields) for orders in encoded]

    assert lost.select(fields).rows() == of(builder)
    assert lost.select(fields).rows() != of(builder.within(config.inputs.max_length + 8))  # another budget differs


def test_slices_and_bias_of_truncation_are_evaluated(
    trained_run: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slices, "MIN_ROWS", 4)
    config = config_of(trained_run("llama"))
    judged = evaluate_run(config, None)
    cut = judged.by_row.select(f"cut_{name}" for name in LMSYS.fields)
    masks = {
        "truncation": cut.sum_horizontal() == 0,
        **{f"truncation of {name}": cut[f"cut_{name}"] > 0 for name in LMSYS.fields},
        "truncation of response_a and response_b": cut["cut_response_a"] != cut["cut_response_b"],
    }
    large = {name: int(mask.sum()) for name, mask in masks.items() if 4 <= mask.sum() <= len(cut) - 4}
    assert large  # some slice is large enough
    assert {part.trait: part.rows for part in judged.slices if part.trait.startswith("truncation")} == large
    biases = [part.name for part in judged.slices if part.trait == "bias for"]
    assert "the answer that truncation cut less" in biases


def test_without_tokens_or_bundles_a_note_says_so(
    trained_run: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = copy_run(trained_run("llama"), tmp_path)
    labelled = labelled_rows(config)
    folds = read_folds(output_of(config) / FOLDS, labelled, n=config.folds.n_splits)
    assert lost_tokens(config, labelled, folds.head(0)) is None
    shutil.rmtree(output_of(config) / "tokens")
    assert lost_tokens(config, labelled, folds) is None
    assert "has no tokens of these rows" in " ".join(capsys.readouterr().err.split())
    tokenizer = Paths(output_of(config), 0).bundle / "tokenizer" / "tokenizer.json"
    tokenizer.write_text("{}", encoding="utf-8")
    assert lost_tokens(config, labelled, folds) is None
    assert "the tokenizer fails" in " ".join(capsys.readouterr().err.split())
    shutil.rmtree(Paths(output_of(config), 1).bundle)
    assert lost_tokens(config, labelled, folds) is None
    assert "bundles are gone" in " ".join(capsys.readouterr().err.split())
    classical = config.model_copy(update={"approach": "classical"})
    assert lost_tokens(classical, labelled, folds) is None


def test_no_torch_is_loaded(trained_run: Callable[[str], Path]) -> None:
    code = (
        "import sys\nfrom pathlib import Path\nfrom pairclf.config import load_config\n"
        "from pairclf.runs.evaluate import evaluate_run\n"
        f"judged = evaluate_run(load_config(Path({str(trained_run('llama') / 'config.yaml')!r})), None)\n"
        "print('cut_prompt' in judged.by_row.columns, 'torch' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.split() == ["True", "False"]


def test_rows_are_in_the_slices_of_what_they_lost() -> None:
    lost = pl.DataFrame(
        {"prompt": [0, 3, 0, 0, None], "response_a": [0, 0, 5, 2, None], "response_b": [0, 0, 1, 2, None]}
    )
    assert truncation_traits(lost, LMSYS) == {
        "truncation": ["nothing cut", None, None, None, None],
        "truncation of prompt": [None, "cut", None, None, None],
        "truncation of response_a": [None, None, "cut", "cut", None],
        "truncation of response_b": [None, None, "cut", "cut", None],
        "truncation of response_a and response_b": [None, None, "unequal", None, None],
    }
    assert np.array_equal(less_cut(lost, LMSYS), [-1, -1, 1, -1, -1])
    single = Task(name="one", fields=("text",), classes=("x", "y"))
    assert truncation_traits(pl.DataFrame({"text": [0, 4]}), single) == {
        "truncation": ["nothing cut", None],
        "truncation of text": [None, "cut"],
    }
