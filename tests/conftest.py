"""What tests share: tiny models that are made here, with a tokenizer to match, and rows for them. No network."""

from __future__ import annotations

import gc
import os
import signal
import sys
from collections.abc import Callable, Iterator
from copy import deepcopy
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck
from hypothesis import settings as hypothesis_settings
from support.tokenizers import tiny_tokenizer

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # the suite runs in several processes
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # as the command line sets it

gc.disable()  # until all modules are imported, where collecting garbage takes a quarter of the time

from pairclf.config import Config, resolve

if TYPE_CHECKING:
    from support.browser import Browser

    from pairclf.model.engine import Classifier

# How long an example takes says something about the machine, and not about the code.
for profile, examples in {"quick": 20, "thorough": 100}.items():
    hypothesis_settings.register_profile(
        profile, deadline=None, suppress_health_check=[HealthCheck.too_slow], max_examples=examples
    )

DISPOSITIONS = {
    signal.SIGINT: signal.default_int_handler,
    signal.SIGTERM: signal.SIG_DFL,
    signal.SIGCHLD: signal.SIG_DFL,
}
"""What each test starts with, and the processes that it starts. SIGHUP stays as it was: `nohup make test` must outlive
its terminal."""

SHARED = Path(__file__).parents[2] / "shared"
"""Real data and models, where a checkout has them beside it."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--notebooks", type=int, default=8, help="simulated in tests/inference/test_loop.py")
    parser.addoption("--kills", type=int, default=2, help="kills at random moments in test_predict and test_files")
    parser.addoption("--thorough", action="store_true", help="also run what has a shorter sibling in the suite")


def pytest_configure(config: pytest.Config) -> None:
    hypothesis_settings.load_profile("thorough" if config.getoption("--thorough") else "quick")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """The longest first, so that no worker waits for them at the end; `thorough` ones only if they are asked for."""
    for item in items:
        if item.get_closest_marker("thorough") and not config.getoption("--thorough"):
            item.add_marker(pytest.mark.skip(reason="has a shorter sibling in the suite; --thorough runs it too"))
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """Before all fixtures: a shell that starts the suite in the background has it ignore SIGINT, and children inherit
    that; and no test starts with what another one left."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, DISPOSITIONS)
    for number, handler in DISPOSITIONS.items():
        signal.signal(number, handler)


@pytest.fixture(scope="module", autouse=True)
def _few_objects_to_collect() -> None:
    """Every training ends in a collection of garbage: it need not walk through all that libraries made at import."""
    gc.collect()
    gc.freeze()
    gc.enable()


@pytest.fixture(scope="session", autouse=True)
def _state(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What pairclf notes about packages on this machine is the tests' own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_STATE_HOME", str(tmp_path_factory.mktemp("state")))
        yield


@pytest.fixture(scope="session", autouse=True)
def _made_once() -> Iterator[None]:
    """The tree of commands takes 50 ms to make at each call of one, and a bundle's settings 10 ms to parse."""
    import typer.main

    from pairclf.config import parse

    trees: dict[str, object] = {}
    construct = parse._Loader.get_single_data

    def parsed_once(loader: parse._Loader) -> object:
        text = str(loader.buffer)
        if text not in trees:
            trees[text] = construct(loader)
        return deepcopy(trees[text])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parse._Loader, "get_single_data", parsed_once)
        patch.setattr(typer.main, "get_command", cache(typer.main.get_command))
        yield


@pytest.fixture(scope="session", autouse=True)
def _preloaded_server() -> Iterator[None]:
    from support.forked import preload

    with pytest.MonkeyPatch.context() as patch:
        preload(patch)
        yield


@pytest.fixture(scope="session")
def shared() -> Path:
    if not SHARED.is_dir():
        pytest.skip("no folder `shared` beside the checkout")
    return SHARED


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """A headless Chromium for tests of pages, which have the mark `thorough`."""
    from support.browser import started

    with started(tmp_path_factory.mktemp("browser")) as browser:
        yield browser


@pytest.fixture(scope="session")
def minilm() -> Path:
    """A folder with all-MiniLM-L6-v2, as `../shared/models/minilm.py` makes one; `PAIRCLF_MINILM` says where it is."""
    folder = os.environ.get("PAIRCLF_MINILM")
    if folder is None:
        pytest.skip("PAIRCLF_MINILM names no folder with all-MiniLM-L6-v2")
    return Path(folder)


_ALTERNATING = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 32}

_NO_DROPOUT: dict[str, object] = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "pad_token_id": 0}
ENCODERS: dict[str, dict[str, object]] = {
    "bert": _NO_DROPOUT,
    "roberta": _NO_DROPOUT,
    "xlm-roberta": _NO_DROPOUT,
    "electra": _NO_DROPOUT | {"embedding_size": 64},
    "deberta-v2": _NO_DROPOUT
    | {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 16, "share_att_key": True}
    | {"norm_rel_ebd": "layer_norm", "position_biased_input": False, "type_vocab_size": 0},  # DeBERTa-v3's
    "modernbert": dict.fromkeys(["pad_token_id", "bos_token_id", "cls_token_id", "eos_token_id", "sep_token_id"], 0)
    | {"layer_types": ["sliding_attention", "full_attention"], "local_attention": 32},  # 16 tokens to either side
    "eurobert": dict.fromkeys(["pad_token_id", "bos_token_id", "eos_token_id", "mask_token_id"], 0),
}

PADDED_ONLY = {"deberta-v2"}

KINDS: dict[str, dict[str, object]] = {
    **ENCODERS,
    "gemma2": {"sliding_window": 32, "query_pre_attn_scalar": 16},
    "gemma3_text": {**_ALTERNATING, "query_pre_attn_scalar": 16},
    "llama": {},
    "mistral": {"sliding_window": 32},
    "qwen2": {},
    "qwen3": {**_ALTERNATING, "use_sliding_window": True},
}
"""Architectures of tiny models, and what they need beyond their sizes."""


def tiny_model(kind: str, folder: Path) -> None:
    """Random weights, two layers, NF4-sized; `kind` is a key of `KINDS`."""
    import torch
    from transformers import AutoConfig, AutoModel

    torch.manual_seed(0)
    config = AutoConfig.for_model(
        kind,
        vocab_size=320,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=1024,
        **KINDS[kind],
    )
    AutoModel.from_config(config).save_pretrained(folder)


@pytest.fixture(scope="session")
def base_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`base_of("gemma2")` is a folder with a tiny base model of that architecture and its tokenizer, to read only."""

    @cache
    def make(kind: str) -> Path:
        from support.runs import shared_folder

        def fill(folder: Path) -> None:
            tiny_tokenizer(folder, closing=kind in ENCODERS)
            tiny_model(kind, folder)

        return shared_folder(tmp_path_factory, kind, fill)

    return make


@pytest.fixture(scope="session")
def trained_run(
    base_of: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[[str], Path]]:
    """`trained_run("llama")` is a folder with an arena, `config.yaml` and a finished cross-validation under `run`.

    It is trained once for all tests, which only read it: `support.runs.copy_run` makes a copy to spoil.
    """
    from support.runs import RUNS, run_config, shared_folder, train_run

    from pairclf.files import sha256_tree

    before: dict[Path, dict[str, str]] = {}

    @cache
    def make(kind: str) -> Path:
        def fill(folder: Path) -> None:
            train_run(folder, run_config(folder, base_of(kind), model=RUNS[kind]))

        folder = shared_folder(tmp_path_factory, f"trained-{kind}", fill)
        before[folder] = {name: digest for name, digest in sha256_tree(folder).items() if name != "run/log.txt"}
        return folder

    yield make
    for folder, files in before.items():
        assert files.items() <= sha256_tree(folder).items(), f"a test has changed {folder}, which others read"


@pytest.fixture
def quick_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers of `predict` do not estimate their memory, which takes longer than all else that a tiny model does."""
    from support.faults import quick

    from pairclf.inference.pool import ProcessPool

    monkeypatch.setattr("pairclf.inference.predict.ProcessPool", partial(ProcessPool, load=quick))


@pytest.fixture
def without_forecast(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trainings do not estimate their memory and hours first, which takes a fifth of a small one's time."""
    monkeypatch.setattr("pairclf.approaches.finetune.train.estimate_resources", lambda *_: None)


@pytest.fixture(scope="session")
def config_for(base_of: Callable[[str], Path]) -> Callable[..., Config]:
    """`config_for("gemma2", model={...}, train={...})`: a small config on a tiny base."""

    def make(kind: str = "gemma2", **sections: dict[str, object]) -> Config:
        tree: dict[str, dict[str, object]] = {
            "inputs": {"max_length": 160},
            "model": {"base": str(base_of(kind)), "quantization": "none", "lora": {"r": 4, "lora_dropout": 0.0}},
            "train": {"global_batch_size": 8, "per_device_train_batch_size": 8, "learning_rate": 1e-2},
        }
        if kind in PADDED_ONLY:
            tree["train"]["layout"] = "padded"
        for name, section in sections.items():
            tree[name] = {**tree.get(name, {}), **section}
        return resolve(tree)

    return make


@pytest.fixture(scope="session")
def classifier_of(config_for: Callable[..., Config]) -> Callable[[str], Classifier]:
    """`classifier_of("llama")` on a tiny base, to read only."""

    @cache
    def make(kind: str) -> Classifier:
        from models_support import as_built

        return as_built(config_for(kind))

    return make


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    """`cli("verify", folder)` -> exit code, and what a user reads."""

    from pairclf.cli import main

    def call(*arguments: object) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["pairclf", *map(str, arguments)])
        monkeypatch.setenv("PYTHONSAFEPATH", "")  # what `main` sets is not for the tests that come later
        capsys.readouterr()
        with pytest.raises(SystemExit) as left:
            main()
        read = capsys.readouterr()
        code = left.value.code
        assert isinstance(code, int | None)
        return code or 0, " ".join((read.out + read.err).split())

    return call
