"""LightGBM's files: native code reads none of their lines, and trees that it would leave are refused."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from classical_support import TOPICS, fitted, rows_of

from pairclf.approaches import classical_model
from pairclf.approaches.classical_model import check, load
from pairclf.config import Classical
from pairclf.errors import BundleError, ConfigError
from pairclf.task import LMSYS

SMALL = Classical(
    model="lightgbm", n_features=64, n_components=2, n_estimators=8, learning_rate=0.3, min_child_samples=3
)


SPOILED = {
    "end": (r"\nend of trees", ""),
    "rounds": (r"Tree=0", "Tree=0\nTree=0"),
    "feature": (r"split_feature=\d+", "split_feature=100000"),
    "circle": (r"left_child=\S+", "left_child=0"),
    "leaf": (r"left_child=\S+", "left_child=-1000"),
    "values": (r"leaf_value=\S+ ", "leaf_value="),
    "nodes": (r"num_leaves=\d+", "num_leaves=100000"),
    "category": (r"decision_type=\d+", "decision_type=1"),
    "twice": (r"num_cat=0", "num_cat=0\nnum_cat=1"),
    "no leaf": (r"num_leaves=\d+\n(.*\n)*?leaf_value=.*", "num_leaves=0\nnum_cat=0\nleaf_value="),
    "linear": (r"is_linear=0", "is_linear=2"),
    "underscore": (r"left_child=(\S+)", r"left_child=\g<1>_0"),  # 10 to Python, 1 to LightGBM
    "overflow": (r"left_child=\S+", f"left_child={2**64}"),
    "infinite": (r"leaf_value=\S+", "leaf_value=inf"),
}
"""What LightGBM's native code would follow out of its arrays, or for ever."""


@pytest.mark.parametrize("name", SPOILED)
def test_trees_that_lead_out_of_themselves_are_refused(name: str, tmp_path: Path) -> None:
    fitted(TOPICS, 30, SMALL).save(tmp_path / "classical.safetensors")
    trees, (pattern, text) = tmp_path / "lightgbm-0.txt", SPOILED[name]
    spoiled, count = re.subn(pattern, text, trees.read_text(), count=1)
    assert count == 1
    trees.write_text(spoiled)
    with pytest.raises(BundleError, match=r"can't be read: "):
        load(tmp_path / "classical.safetensors", TOPICS, SMALL)


@pytest.mark.parametrize("line", ["objective=multiclass num_class:3", "num_class=3", "tree_sizes="])
def test_what_a_file_says_of_its_trees_is_not_believed(line: str, tmp_path: Path) -> None:
    """LightGBM writes past its arrays with another number of classes, and reads past the text with other sizes."""
    model, path, (rows, _) = fitted(TOPICS, 30, SMALL), tmp_path / "classical.safetensors", rows_of(TOPICS, 8, seed=1)
    model.save(path)
    trees = tmp_path / "lightgbm-0.txt"
    written = trees.read_text()
    assert written.count(f"\n{line}") == 1
    trees.write_text(written.replace(f"\n{line}", f"\n{line}9999999"))
    assert np.array_equal(load(path, TOPICS, SMALL).logits(rows), model.logits(rows))


def test_more_nodes_than_the_settings_allow_are_refused(tmp_path: Path) -> None:
    for kind in ("tree", "lightgbm"):
        settings = Classical(model=kind, n_features=64, n_components=2, min_child_samples=3)
        fitted(TOPICS, 60, settings).save(tmp_path / "classical.safetensors")
        with pytest.raises(BundleError, match=r"at most 3|1 to 2 leaves"):
            load(tmp_path / "classical.safetensors", TOPICS, settings.model_copy(update={"num_leaves": 2}))


@pytest.mark.parametrize("change", ["missing", "no model", "other inputs"])
def test_other_trees_are_refused(change: str, tmp_path: Path) -> None:
    fitted(TOPICS, 30, SMALL).save(tmp_path / "classical.safetensors")
    trees = tmp_path / "lightgbm-0.txt"
    if change == "missing":
        trees.unlink()
    elif change == "no model":
        trees.write_text("no trees")
    else:
        (tmp_path / "other").mkdir()
        fitted(LMSYS, 30, SMALL).save(tmp_path / "other" / "classical.safetensors")
        trees.write_text((tmp_path / "other" / trees.name).read_text())
    with pytest.raises(BundleError, match="must be" if change == "other inputs" else "can't be read") as caught:
        load(tmp_path / "classical.safetensors", TOPICS, SMALL)
    assert caught.value.where == tmp_path


def test_without_lightgbm_the_config_is_refused_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    check(SMALL, LMSYS)
    monkeypatch.setattr(classical_model, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"(?s)not installed.*pip install lightgbm"):
        check(SMALL, LMSYS)
