"""Kaggle's client turned to a fake Kaggle on loopback."""

from __future__ import annotations

import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fake_kaggle import KEY, USER, FakeKaggle, serve
from kaggle_support import Ticks

from pairclf.publish import push as push_module
from pairclf.publish import submit as submit_module


@pytest.fixture
def ticks() -> Ticks:
    return Ticks()


@pytest.fixture
def kaggle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeKaggle]:
    """A fake Kaggle, which Kaggle's client takes for the real one; any other host is a failure."""
    home = tmp_path / "home"
    home.mkdir()
    for name in ("KAGGLE_API_TOKEN", "KAGGLE_API_ENVIRONMENT", "KAGGLE_KERNEL_RUN_TYPE"):
        monkeypatch.delenv(name, raising=False)
    for name in ("XDG_STATE_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"HOME": home, "KAGGLE_CONFIG_DIR": home, "KAGGLE_USERNAME": USER, "KAGGLE_KEY": KEY}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(tempfile, "tempdir", str(home))  # where the client keeps notes on uploads
    connect = socket.socket.connect

    def loopback(self: socket.socket, address: Any) -> None:
        assert address[0] in ("127.0.0.1", "localhost"), f"{address} is not loopback"
        connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", loopback)
    from kagglesdk import kaggle_env

    with serve() as fake:
        monkeypatch.setitem(kaggle_env._env_to_endpoint, kaggle_env.KaggleEnv.PROD, fake.url)
        yield fake


@pytest.fixture
def rehearsed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any package has passed its rehearsal, in 300 s."""
    for module in (push_module, submit_module):
        monkeypatch.setattr(module, "read_passed", lambda folder: SimpleNamespace(notebook=300.0))
