"""What an extra brings, and what is said where it is not installed: one error, with the line that installs it."""

from __future__ import annotations

import sys
import tomllib
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from pairclf import console
from pairclf.config import Config, resolve
from pairclf.errors import ConfigError, ModelError, PackagingError
from pairclf.packaging import kaggle_extra
from pairclf.packaging.kaggle_extra import require_extra
from pairclf.playground import server

EXTRAS = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]["optional-dependencies"]
ELSEWHERE = {"bench", "browser", "test"}
"""Extras of a checkout: benchmarks and tests leave out what they can't run, and tests need theirs."""
WITHOUT_A_WORD = {"fast"}
"""Extras that only make something faster: all works without them, and tests/inputs/test_fastokens.py shows it."""


@pytest.fixture
def without(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Hide a module, as if it were not installed."""
    return lambda module: monkeypatch.setitem(sys.modules, module, None)


def modules_of(extra: str) -> list[str]:
    return [Requirement(line).name.replace("-", "_") for line in EXTRAS[extra]]


def test_every_extra_is_tested_here() -> None:
    tested = {"kaggle", "deepspeed", "trackers", "jupyter", "sentencepiece", "try"}
    assert EXTRAS.keys() - ELSEWHERE - WITHOUT_A_WORD == tested
    assert sorted(kaggle_extra.PACKAGES) == modules_of("kaggle")


def test_the_page_about_the_installation_lists_every_extra() -> None:
    page = (Path(__file__).parents[1] / "docs/install.md").read_text(encoding="utf-8")
    assert [extra for extra in sorted(EXTRAS.keys() - {"browser"}) if f"[{extra}]'" not in page] == []


@pytest.mark.parametrize("module", kaggle_extra.PACKAGES)
def test_the_kaggle_extra_is_named(without: Callable[[str], None], module: str) -> None:
    require_extra()
    without(module)
    with pytest.raises(PackagingError, match=rf"(?s)needs {module}, not installed.*pip install 'pairclf\[kaggle\]'"):
        require_extra()


@pytest.mark.parametrize(
    "arguments",
    [
        ["demo"],
        ["package", "configs/kaggle/lmsys.yaml"],
        ["rehearse", "kaggle/build/x"],
        ["push", "kaggle/build/x"],
        ["submit", "kaggle/build/x", "-m", "text"],
    ],
    ids=lambda arguments: arguments[0],
)
def test_commands_ask_for_the_kaggle_extra_first(
    without: Callable[[str], None], cli: Callable[..., tuple[int, str]], arguments: Sequence[str]
) -> None:
    without("uv")
    code, said = cli(*arguments)
    assert code == 2
    assert "needs uv, not installed here remedy: pip install 'pairclf[kaggle]'" in said


@pytest.mark.parametrize("module", modules_of("try"))
def test_the_extra_of_try_is_named(
    monkeypatch: pytest.MonkeyPatch, cli: Callable[..., tuple[int, str]], module: str
) -> None:
    monkeypatch.setattr(server, "find_spec", lambda name: None if name == module else ...)
    code, said = cli("try", "no-bundle")
    assert code == 2
    assert f"needs {module} remedy: pip install 'pairclf[try]'" in said


def test_a_client_that_is_not_there_names_the_extra(without: Callable[[str], None]) -> None:
    from pairclf.publish.client import KaggleClient, WaitClock

    without("kagglesdk.kaggle_http_client")
    with pytest.raises(PackagingError, match=r"(?s)package kaggle is not installed.*pip install 'pairclf\[kaggle\]'"):
        KaggleClient(WaitClock())


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return resolve({"output_dir": str(tmp_path), "model": {"base": "embedded:gemma2-tiny"}})


def test_deepspeed_is_named(without: Callable[[str], None], config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    from pairclf.approaches.finetune.distributed import make_accelerator

    without("deepspeed")
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(ConfigError, match=r"(?s)asks for DeepSpeed.*pip install 'pairclf\[deepspeed\]'"):
        make_accelerator(config)


@pytest.mark.parametrize("tracker", ["tensorboard", "wandb", "mlflow", "trackio"])
def test_a_tracker_is_named(without: Callable[[str], None], config: Config, tracker: str) -> None:
    from pairclf.approaches.finetune.monitor import PACKAGES, check_trackers

    for module in PACKAGES[tracker]:
        without(module)
    chosen = config.model_copy(update={"train": config.train.model_copy(update={"report_to": [tracker]})})
    with pytest.raises(ConfigError, match=rf"(?s)names {tracker}, which is not installed.*pip install {tracker}"):
        check_trackers(chosen)


def test_a_tokenizer_of_sentencepiece_is_named(without: Callable[[str], None], tmp_path: Path) -> None:
    """DeBERTa-v3's repository has a spm.model and no tokenizer.json; transformers asks for tiktoken then."""
    from pairclf.model.backbone import load_tokenizer

    without("sentencepiece")
    (tmp_path / "spm.model").write_bytes(b"pieces")
    (tmp_path / "config.json").write_text('{"model_type": "deberta-v2"}')
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "DebertaV2Tokenizer"}')
    with pytest.raises(ModelError, match=r"(?s)can't be loaded.*pip install 'pairclf\[sentencepiece\]'"):
        load_tokenizer(str(tmp_path))


def test_a_notebook_without_widgets_gets_lines_and_one_note(
    without: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    printed: list[str] = []
    without("ipywidgets")
    monkeypatch.setattr(console.console, "is_jupyter", True)
    monkeypatch.setattr(console.console, "print", printed.append)
    monkeypatch.setattr(console, "LOG_SECONDS", 0.0)
    console._widgets_are_missing.cache_clear()
    for _ in range(2):
        with console.progress("rows", total=3) as advance:
            advance(2)
    console._widgets_are_missing.cache_clear()
    note, *lines = printed
    assert note.endswith("pip install 'pairclf[jupyter]'")
    assert [line[:8] for line in lines] == ["rows 2/3"] * 2
