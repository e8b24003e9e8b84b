"""Trained runs, and bundles that were never trained: one training serves all tests that only read its files.

Processes of pytest-xdist share a folder, where the first that needs something makes it, under a lock.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from bundles_support import write_model
from filelock import FileLock

from pairclf.bundles.probes import pick_probes
from pairclf.config import Config, dump_config, load_config, resolve
from pairclf.demo.arena import generate, write_lmsys
from pairclf.model.engine import build
from pairclf.model.inputs import open_inputs
from pairclf.model.scoring import by_order, items_of, score
from pairclf.runs.cv import cross_validate
from pairclf.task import Row

RUNS = {"llama": {"quantization": "none", "dtype": "float32"}, "gemma2": {"quantization": "nf4", "dtype": "float32"}}
"""Tiny bases of trained runs, and how they are loaded."""

TEST_ROWS = 24


def shared_folder(factory: pytest.TempPathFactory, name: str, fill: Callable[[Path], None]) -> Path:
    """The folder `name` that all processes of this session share, filled by the first that asks for it."""
    top = factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        top = top.parent
    folder, filled = top / "shared" / name, top / "shared" / f"{name}.filled"
    folder.parent.mkdir(exist_ok=True)
    with FileLock(folder.with_name(f"{name}.lock")):
        if not filled.exists():
            shutil.rmtree(folder, ignore_errors=True)  # what a process left that was stopped
            folder.mkdir()
            fill(folder)
            filled.touch()
    return folder


def run_config(folder: Path, base: Path | str, task: str = "lmsys", **sections: dict[str, object]) -> Config:
    """A small run in `folder`, which holds an arena; its few steps move the folds well apart."""
    tree: dict[str, dict[str, object]] = {
        "data": {"folder": str(folder), "train": ["train.csv"], "test": "test.csv"},
        "folds": {"n_splits": 2},
        "inputs": {"max_length": 128},
        "model": {"base": str(base), "quantization": "none", "lora": {"r": 2, "lora_dropout": 0.0}},
        "train": {"global_batch_size": 4, "max_steps": 3, "learning_rate": 3e-2},
    }
    for name, settings in sections.items():
        tree[name] = {**tree.get(name, {}), **settings}
    return resolve({"task": task, "output_dir": str(folder / "run"), **tree})


def train_run(folder: Path, config: Config) -> None:
    """Write an arena, `config.yaml` and a finished cross-validation into `folder`."""
    write_lmsys(generate(60, seed=1, dirt=0.2), folder, n_test=TEST_ROWS)
    (folder / "config.yaml").write_text(dump_config(config), encoding="utf-8")
    cross_validate(load_config(folder / "config.yaml"))


def config_of(run: Path) -> Config:
    return load_config(run / "config.yaml")


def bundles_of(run: Path) -> list[Path]:
    return [run / "run" / f"fold{fold}" / "bundle" for fold in (0, 1)]


def copy_run(run: Path, folder: Path) -> Config:
    """A copy of a run, to spoil; its config names the copy's own folders."""
    shutil.copytree(run, folder, dirs_exist_ok=True)
    config = config_of(run)
    data = config.data.model_copy(update={"folder": folder})
    config = config.model_copy(update={"output_dir": folder / "run", "data": data})
    (folder / "config.yaml").write_text(dump_config(config), encoding="utf-8")
    return config


def random_bundle(
    folder: Path,
    config: Config,
    *,
    seed: int = 0,
    fold: int | None = 0,
    prior: Sequence[float] | None = None,
    metrics: dict[str, float] | None = None,
    rows: Sequence[Row] = (),
) -> Path:
    """Write a bundle whose head is random and whose adapters change nothing; probe rows are picked from `rows`."""
    folder.mkdir(parents=True)
    config, tokenizer, builder, _ = open_inputs(config)
    classifier = build(config, torch.device("cpu")).eval()
    torch.manual_seed(seed)
    torch.nn.init.normal_(classifier.head.weight, std=0.5)  # type: ignore[arg-type]
    probes = []
    if rows:
        items = items_of(builder.encode(rows), orders=2)
        logits = by_order(items, score(classifier, items, tokens_per_batch=2_000), len(rows))
        probes = pick_probes(rows, logits)
    classes = len(config.task.classes)
    write_model(
        folder,
        classifier,
        config,
        tokenizer,
        name=f"{folder.parent.name}-fold{fold}",
        fold=fold,
        metrics=metrics or {},
        prior=list(prior or [1 / classes] * classes),
        probes=probes,
    )
    return folder
