"""The embedded base models: real architectures, small enough to be committed, open to plain transformers."""

from __future__ import annotations

import json
import re
import runpy
from pathlib import Path

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

import pairclf

EMBEDDED = Path(pairclf.__file__).parent / "embedded"
NAMES = ["gemma2-tiny", "llama-tiny"]
corpus = runpy.run_path(str(Path(__file__).parents[2] / "scripts" / "pretraining_corpus.py"))["corpus"]


@pytest.mark.parametrize("name", NAMES)
def test_it_is_small_and_opens_with_plain_transformers(name: str) -> None:
    folder = EMBEDDED / name
    assert sum(path.stat().st_size for path in folder.glob("*.safetensors")) <= 4 * 2**20
    model = AutoModel.from_pretrained(folder, dtype=torch.float32)
    assert model.config.model_type == name.partition("-")[0]
    widths = {size for module in model.modules() if isinstance(module, torch.nn.Linear) for size in module.weight.shape}
    assert all(size % 64 == 0 for size in widths)  # NF4's block


@pytest.mark.parametrize("name", NAMES)
def test_any_script_survives_the_tokenizer(name: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED / name)
    text = "naïve 東京 Москва العربية हिन्दी 한국어 🙂\n\t<end_of_turn>"
    ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    assert tokenizer.decode(ids) == text
    assert set(tokenizer.all_special_ids).isdisjoint(ids)


@pytest.mark.parametrize("name", NAMES)
def test_it_is_a_language_model_of_the_arena(name: str) -> None:
    """Text of the arena that it has not seen, against the perplexity that its script measured."""
    figures = json.loads((EMBEDDED / name / "pretraining.json").read_text())
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED / name)
    model = AutoModelForCausalLM.from_pretrained(EMBEDDED / name, dtype=torch.float32).eval()
    losses = []
    for text in corpus(60, seed=1):
        ids = torch.tensor([tokenizer(tokenizer.bos_token + text, add_special_tokens=False)["input_ids"]])
        with torch.inference_mode():
            logits = model(ids, use_cache=False).logits[0, :-1]
        losses.append(torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none"))
    assert float(torch.cat(losses).mean()) == pytest.approx(figures["held_out_loss"], abs=0.15)


@pytest.mark.parametrize("name", NAMES)
def test_the_readme_tells_the_figures_of_the_script(name: str) -> None:
    figures = json.loads((EMBEDDED / name / "pretraining.json").read_text())
    text = (EMBEDDED / "README.md").read_text()
    assert f"{figures['parameters']:,}" in text
    assert f"{figures['held_out_perplexity']}" in text


def test_corpus_is_seeded_and_names_no_winner() -> None:
    documents = list(corpus(900, seed=3))
    assert documents == list(corpus(900, seed=3))
    assert documents != list(corpus(300, seed=4))
    text = "\n".join(documents)
    assert not any(word in text.casefold() for word in ("winner", "better", "prefer", " tie"))
    verdicts = set(re.findall("### Verdict\n(.*)", text))
    traits = ("wrong", "right", "broke", "kept", "short", "long", "fair", "misjudged", "stray", "relevant")
    assert verdicts == {word + name for word in traits for name in ("", "A", "B")}, "one word on one response"
