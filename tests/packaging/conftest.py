"""A bundle without a model, and a package whose notebook scores without one."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from pairclf.config import Config, dump_config
from pairclf.files import sha256_tree
from pairclf.model.bundle import FORMAT, MANIFEST, Manifest
from pairclf.packaging import build
from pairclf.packaging.wheelhouse import repack

SMALL = "iniconfig"  # stands for what Kaggle's image lacks: pure Python, and nothing in the notebook needs it


@pytest.fixture
def config() -> Config:
    return Config.model_validate({"package": {"owner": "someone", "name": "a-notebook", "wheels": [SMALL]}})


@pytest.fixture
def bundle(tmp_path: Path, config: Config) -> Path:
    return _write_bundle(tmp_path / "bundle", config, "fold0")


@pytest.fixture
def write_bundle() -> Callable[[Path, Config, str], Path]:
    return _write_bundle


def _write_bundle(folder: Path, config: Config, name: str) -> Path:
    """A folder that `open_bundle` accepts; its weights are no weights."""
    for part in ("adapter/adapter_model.safetensors", "head.safetensors", "tokenizer/tokenizer.json"):
        (folder / part).parent.mkdir(parents=True, exist_ok=True)
        (folder / part).write_text(f"{{}} {part}")
    (folder / "config.yaml").write_text(dump_config(config), encoding="utf-8")
    manifest = Manifest(
        format=FORMAT,
        name=name,
        fold=0,
        base=config.model.base,
        base_fingerprint="f" * 64,
        dtype="float32",
        classes=list(config.task.classes),
        metrics={"log_loss": 1.01},
        versions={},
        files=sha256_tree(folder),
        probes=[],
    )
    sealed = replace(manifest, seal=manifest.sealed())
    (folder / MANIFEST).write_text(json.dumps(asdict(sealed)), encoding="utf-8")
    return folder


@pytest.fixture
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that stands for the package registry: pip looks nowhere else."""
    folder = tmp_path / "registry"
    folder.mkdir()
    repack(SMALL, folder)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    return folder


Packager = Callable[..., Path]


@pytest.fixture
def packaged(tmp_path: Path, config: Config, bundle: Path, registry: Path, monkeypatch: pytest.MonkeyPatch) -> Packager:
    """`packaged(code, after=id)`: a package whose notebook has the real one's cells up to `id`, and then `code`."""

    def make(code: str, after: str = "install") -> Path:
        real = build.shipped(build.TEMPLATE).read_text(encoding="utf-8")
        head, cell, tail = real.partition(f"# %% {after}\n")
        template = tmp_path / "template.py"
        template.write_text(head + cell + tail.partition("# %%")[0] + f"# %% score\n{code}", encoding="utf-8")
        with monkeypatch.context() as patch:
            patch.setattr(build, "shipped", lambda name: template)
            return build.package(config, [bundle], tmp_path / "package")

    return make


@pytest.fixture
def competition(tmp_path: Path) -> tuple[Path, Path]:
    """A test file and its sample submission."""
    test, sample = tmp_path / "rows.csv", tmp_path / "sample.csv"
    test.write_text(
        'id,prompt,response_a,response_b\n7,"[""p""]","[""a""]","[""b""]"\n3,"[""q""]","[""c""]","[""d""]"\n'
    )
    thirds = "0.3333333,0.3333333,0.3333334"
    sample.write_text(f"id,winner_model_a,winner_model_b,winner_tie\n7,{thirds}\n3,{thirds}\n")
    return test, sample
