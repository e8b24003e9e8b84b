"""Rows that are longer than what the base was made for: refused where they can't be scored, else named."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from decoders_support import shrunk
from support.runs import run_config
from tests_support import make_rows, write_csv
from transformers import CONFIG_MAPPING, AutoModel, LlamaConfig

from pairclf.approaches.finetune.trainer import FinetuneTrainer
from pairclf.config import Config
from pairclf.errors import ModelError
from pairclf.inspect.lengths import compare
from pairclf.inspect.show import show_rows
from pairclf.model.engine import build
from pairclf.model.positions import exceeded_limit, position_limit
from pairclf.run import Run

TABLES = ("gpt2", "opt", "gptj", "gpt_neo", "gpt_bigcode", "biogpt", "openai-gpt", "ctrl", "codegen")
ENDLESS = ("llama", "gpt_neox", "mistral", "gemma2", "falcon")
NONE = ("bloom", "mamba")


@pytest.mark.parametrize("kind", [*TABLES, *ENDLESS, *NONE])
def test_the_limit_is_the_longest_row_that_the_model_takes(kind: str) -> None:
    settings = shrunk(CONFIG_MAPPING[kind]())
    limit, model = position_limit(settings), AutoModel.from_config(settings).eval()
    assert (limit and (limit.tokens, limit.is_hard)) == (None if kind in NONE else (128, kind in TABLES))
    assert exceeded_limit(settings, 128) is None
    assert exceeded_limit(settings, 129) == limit
    row = torch.ones(1, 129, dtype=torch.long)
    with torch.inference_mode():
        model(row[:, :128])
        if kind not in TABLES:
            model(row)
        else:
            with pytest.raises((IndexError, RuntimeError)):
                model(row)


@pytest.mark.parametrize(
    ("rope", "positions", "tokens"),
    [
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}, 64, 256),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}, 256, 256),
        ({"rope_type": "yarn", "factor": float("inf"), "original_max_position_embeddings": 64}, 64, 64),
        ({"rope_type": "yarn", "factor": float("nan"), "original_max_position_embeddings": 64}, 64, 64),
        ({"rope_type": "linear", "factor": 4.0}, 256, 256),
        ({"rope_type": "default"}, 64, 64),
    ],
)
def test_stretched_positions_count(rope: dict[str, object], positions: int, tokens: int) -> None:
    settings = LlamaConfig(max_position_embeddings=positions, rope_parameters={"rope_theta": 1e4, **rope})
    limit = position_limit(settings)
    assert limit is not None
    assert (limit.tokens, limit.is_hard) == (tokens, False)


@pytest.fixture
def config_on(base_of: Callable[[str], Path], tmp_path: Path) -> Callable[..., Config]:
    """`config_on("opt")`: a run on a base of 128 positions, with the tokenizer of the other tiny bases."""

    def make(kind: str, max_length: int) -> Config:
        base, settings = tmp_path / kind, shrunk(CONFIG_MAPPING[kind]())
        settings.vocab_size = 320
        shutil.copytree(base_of("llama"), base, dirs_exist_ok=True)
        AutoModel.from_config(settings).save_pretrained(base)
        write_csv(tmp_path / "train.csv", make_rows(8))
        return run_config(tmp_path, base, inputs={"max_length": max_length})

    return make


@pytest.mark.parametrize(
    ("kind", "behind"),
    [("opt", "it has no position for a token behind them"), ("gpt_neox", "it was not trained on the positions behind")],
)
def test_train_show_and_lengths_say_so(
    config_on: Callable[..., Config], capsys: pytest.CaptureFixture[str], kind: str, behind: str
) -> None:
    config, process = config_on(kind, 129), SimpleNamespace(is_main_process=True)
    says = f"128 tokens; {behind}"

    def printed() -> str:
        return " ".join(capsys.readouterr().err.split())

    def train(config: Config) -> Any:
        return FinetuneTrainer(Run(config), process)  # type: ignore[arg-type]

    if kind == "opt":
        for start in (train, lambda config: build(config, torch.device("cpu"))):
            with pytest.raises(ModelError, match=rf"inputs\.max_length=129 .*{says}.*\n.*set inputs\.max_length=128"):
                start(config)
    else:
        train(config)
        assert says in printed()
    assert says in next(show_rows(config, [], None, coloured=False)).plain
    tables, _ = compare(config, at="120,129", data=None, rows=None, tflops=1.0, out=None)
    assert says in str(tables[0].caption)

    fitting = config_on(kind, 128)
    train(fitting)
    assert "positions" not in printed()
    assert next(show_rows(fitting, [], None, coloured=False)).plain.startswith("row ")
    tables, _ = compare(fitting, at="120,128", data=None, rows=None, tflops=1.0, out=None)
    assert tables[0].caption is None
