"""Bundles go to the hub and come back with the same scores; a local folder stands for the hub."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import create_autospec

import huggingface_hub
import numpy as np
import pytest
import yaml
from huggingface_hub import CommitOperationAdd, CommitOperationDelete
from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError
from support.runs import bundles_of

import pairclf
from pairclf.api.hub import _link
from pairclf.bundles.contents import MANIFEST
from pairclf.errors import ConfigError, ModelError

ROW = {"prompt": "what?", "response_a": "good answer", "response_b": "bad answer"}


class LocalHub:
    """Stands for the hub: repositories are folders, commits are numbered, and the cache has links, as the real one."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.private: dict[str, bool] = {}
        self.commits: dict[str, list[str]] = {}

    def create_repo(self, repo_id: str, *, private: bool, exist_ok: bool) -> None:
        assert exist_ok
        self.private.setdefault(repo_id, private)
        self.commits.setdefault(repo_id, ["0"])
        (self.folder / repo_id / "0").mkdir(parents=True, exist_ok=True)

    def _latest(self, repo_id: str) -> Path:
        if repo_id not in self.private:
            raise RepositoryNotFoundError("404", response=SimpleNamespace(headers={}, request=None))  # type: ignore[arg-type]
        return self.folder / repo_id / self.commits[repo_id][-1]

    def list_repo_files(self, repo_id: str) -> list[str]:
        latest = self._latest(repo_id)
        return [path.relative_to(latest).as_posix() for path in latest.rglob("*") if path.is_file()]

    def create_commit(self, repo_id: str, operations: list[Any], *, commit_message: str) -> SimpleNamespace:
        latest = self._latest(repo_id)
        commit = hashlib.sha1(f"{latest.name} {commit_message}".encode()).hexdigest()
        new = shutil.copytree(latest, self.folder / repo_id / commit)
        for operation in operations:
            path = new / operation.path_in_repo
            if isinstance(operation, CommitOperationDelete):
                path.unlink()
            elif isinstance(operation, CommitOperationAdd):
                path.parent.mkdir(parents=True, exist_ok=True)
                with operation.as_file() as stream:
                    path.write_bytes(stream.read())
        self.commits[repo_id].append(commit)
        return SimpleNamespace(oid=commit)

    def snapshot_download(self, repo_id: str, *, revision: str | None, ignore_patterns: list[str]) -> str:
        source = self._latest(repo_id) if revision is None else self.folder / repo_id / revision
        snapshot = self.folder / "cache" / repo_id.replace("/", "--") / source.name
        for file in source.rglob("*"):
            if file.is_file():  # with the card, as somebody who fetches the whole repository has it
                link = snapshot / file.relative_to(source)
                link.parent.mkdir(parents=True, exist_ok=True)
                link.unlink(missing_ok=True)
                link.symlink_to(file)
        return str(snapshot)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> LocalHub:
    local = LocalHub(tmp_path / "hub")
    checked: Any = SimpleNamespace()  # arguments are those that the real client takes
    for name in ("create_repo", "list_repo_files", "create_commit"):
        function = create_autospec(getattr(huggingface_hub.HfApi, name))
        function.side_effect = lambda _, *given, name=name, **named: getattr(local, name)(*given, **named)
        setattr(checked, name, partial(function, None))
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: checked)
    download = create_autospec(huggingface_hub.snapshot_download, side_effect=local.snapshot_download)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    return local


def test_a_bundle_comes_back_with_its_scores_at_the_revision_that_is_printed(
    hub: LocalHub, classical_bundles: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    with pairclf.load(classical_bundles[0]) as judge:
        first = judge.push_to_hub("me/judge")
        expected = judge.predict(**ROW)
    assert f'revision="{first}"' in capsys.readouterr().err
    assert hub.private == {"me/judge": True}
    with pairclf.load(classical_bundles[1]) as judge:
        second = judge.push_to_hub("me/judge", private=False)
    assert second != first
    with pairclf.load("me/judge", revision=first) as judge:
        assert np.array_equal(judge.predict(**ROW).to_numpy(), expected.to_numpy())
    assert f'revision="{first}"' in capsys.readouterr().err
    assert pairclf.load("me/judge").ensemble.members[0].name == "run-fold1"


def test_links_to_files_of_the_hub_stay_while_others_read_them(tmp_path: Path) -> None:
    """A link that is right is left alone, and a wrong one is replaced at once."""
    files = [tmp_path / name for name in "ab"]
    link, temporary = tmp_path / "bundle/x/link", tmp_path / "1.tmp"
    temporary.symlink_to("left by a process that was killed")
    _link(link, files[0], temporary)
    before = link.lstat().st_ino
    _link(link, files[0], temporary)
    assert (link.readlink(), link.lstat().st_ino) == (files[0], before)
    _link(link, files[1], temporary)
    assert link.readlink() == files[1]
    assert not temporary.is_symlink()


def test_files_of_an_older_bundle_go(hub: LocalHub, classical_bundles: list[Path]) -> None:
    hub.create_repo("me/judge", private=True, exist_ok=True)
    for name in ("head.safetensors", ".gitattributes"):
        (hub.folder / "me/judge/0" / name).write_text("old")
    pairclf.load(classical_bundles[0]).push_to_hub("me/judge")
    names = {"README.md", ".gitattributes", MANIFEST, "config.yaml", "classical.safetensors", "trained_on.parquet"}
    assert {*hub.list_repo_files("me/judge")} == names
    assert not any(name.endswith((".bin", ".pkl", ".pt")) for name in names)


def test_the_card_has_figures_data_biases_and_licence(
    hub: LocalHub, classical_config: dict[str, Any], classical_bundles: list[Path]
) -> None:
    judge = pairclf.load(classical_bundles[0])
    judge.push_to_hub("me/plain")
    plain = (hub._latest("me/plain") / "README.md").read_text()
    evaluation = pairclf.evaluate(classical_config)
    judge.push_to_hub("me/judge", license="apache-2.0", data="Words, made up.", evaluation=evaluation)
    card = (hub._latest("me/judge") / "README.md").read_text()
    header = yaml.safe_load(card.split("---")[1])
    assert header["license"] == "apache-2.0"
    assert "license" not in yaml.safe_load(plain.split("---")[1])
    metrics = judge.ensemble.members[0].bundle.manifest.metrics
    (result,) = header["model-index"][0]["results"]
    assert {entry["type"]: entry["value"] for entry in result["metrics"]}["log_loss"] == round(metrics["log_loss"], 6)
    assert f"| {metrics['log_loss']:.4f} |" in plain
    assert "95% interval" in card
    assert "95% interval" not in plain
    assert "Words, made up." in card
    for part in ("18 prompts", "winner_tie 33.3%", "one order", 'pairclf.load("me/judge")', "approach: classical"):
        assert part in card, part


def test_an_adapter_opens_with_plain_peft(hub: LocalHub, trained_run: Callable[[str], Path]) -> None:
    from peft import PeftModel
    from transformers import AutoModel

    run = trained_run("llama")
    bundle = bundles_of(run)[0]
    pairclf.load(bundle).push_to_hub("me/adapter")
    folder = pairclf.load("me/adapter").ensemble.members[0].bundle.folder
    base = pairclf.load(bundle).ensemble.members[0].bundle.config.model.base
    model = PeftModel.from_pretrained(AutoModel.from_pretrained(base), folder / "adapter")
    assert model.peft_config["default"].r == 2
    assert "opens with plain peft" in (hub._latest("me/adapter") / "README.md").read_text()


def test_errors_name_the_remedy(hub: LocalHub, classical_bundles: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ModelError, match=r"(?s)'me/nothing' is no folder here.*check the path"):
        pairclf.load("me/nothing")
    with pytest.raises(ConfigError, match="takes one bundle, and the judge has 2"):
        pairclf.load(classical_bundles).push_to_hub("me/judge")

    def offline(*_: object, **__: object) -> str:
        raise LocalEntryNotFoundError("no connection")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(ModelError, match="not in the hub's cache"):
        pairclf.load("me/judge")
