"""The last layer at the read tokens alone gives the logits of the whole one, and computes no more than it says."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from models_support import (
    as_built,
    forget_what_went_before,
    logits_of,
    one_at_a_time,
    related_items,
    see_the_siblings,
    topology_of,
)

from pairclf.config import Config
from pairclf.model import attention
from pairclf.model.batch import Batch, Piece, Topology
from pairclf.model.engine import Classifier, Layout
from pairclf.model.layouts import packed, shared
from pairclf.model.trim import FAMILIES, last_layer, why_not_trimmed

LAYOUTS = pytest.mark.parametrize("layout", [packed, shared])


@LAYOUTS
@pytest.mark.parametrize("kind", FAMILIES)
def test_every_family_gives_the_logits_of_the_whole_layer(
    config_for: Callable[..., Config], kind: str, layout: Layout
) -> None:
    classifier = as_built(config_for(kind))
    trimmed = logits_of(classifier, layout(related_items()), trim=True)
    assert (trimmed - one_at_a_time(classifier, related_items())).abs().max() <= 1e-5


@LAYOUTS
@pytest.mark.parametrize(
    "model",
    [
        {"lora": None},
        {"lora": {"rank": 4, "dora": True}},
        {"quantization": "nf4"},
        {"quantization": "nf4", "dtype": "float16"},
        {"head": "two_layer"},
    ],
    ids=str,
)
def test_adapters_and_quantised_weights_stay_what_they_are(
    config_for: Callable[..., Config], model: dict[str, object], layout: Layout
) -> None:
    classifier = as_built(config_for("gemma2", model=model))
    trimmed = logits_of(classifier, layout(related_items()), trim=True)
    allowed = 2e-2 if "dtype" in model else 1e-5
    assert (trimmed - one_at_a_time(classifier, related_items())).abs().max() <= allowed


def _read_one_too_early(batch: Batch) -> Batch:
    return replace(batch, read_at=batch.read_at - 1)


def _see_one_token_less(batch: Batch) -> Batch:
    """In the last layer alone."""
    topology = topology_of(batch)
    paths = tuple((*before, (start, max(start + 1, stop - 1))) for *before, (start, stop) in topology.paths)
    return replace(batch, inputs={**batch.inputs, "topology": Topology(topology.pieces, paths)})


def _only_paths(spoil: Callable[[Batch], Batch]) -> Callable[[Batch], Batch]:
    def wrong(batch: Batch) -> Batch:
        topology = Topology(topology_of(batch).pieces, topology_of(spoil(batch)).paths)
        return replace(batch, inputs={**batch.inputs, "topology": topology})

    return wrong


@pytest.mark.parametrize(
    "spoil",
    [
        _read_one_too_early,
        _see_one_token_less,
        _only_paths(forget_what_went_before),
        _only_paths(see_the_siblings),
    ],
)
@pytest.mark.parametrize("kind", ["gemma2", "llama"])
def test_a_wrong_place_or_path_in_the_last_layer_shows(
    config_for: Callable[..., Config], kind: str, spoil: Callable[[Batch], Batch]
) -> None:
    classifier, batch = as_built(config_for(kind)), shared(related_items())
    right, wrong = (logits_of(classifier, one, trim=True) for one in (batch, spoil(batch)))
    assert (right - wrong).abs().max() > 1e-3


def test_a_window_that_the_last_layer_ignores_shows(
    config_for: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    classifier, batch = as_built(config_for("mistral")), shared(related_items())
    right, sequence = logits_of(classifier, batch, trim=True), attention._sequence

    def wrong(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scores: attention.Scores) -> torch.Tensor:
        return sequence(query, key, value, scores._replace(window=None) if query.shape[2] == 1 else scores)

    monkeypatch.setattr(attention, "_sequence", wrong)
    assert (logits_of(classifier, batch, trim=True) - right).abs().max() > 1e-3


def rows_seen(classifier: Classifier, batch: Batch, *, trim: bool) -> dict[str, list[int]]:
    """Rows of each matrix product `(rows, in) @ (in, out)`, by module."""
    seen: dict[str, list[int]] = {}
    handles = [
        module.register_forward_hook(
            lambda _module, given, _out, name=name: seen.setdefault(name, []).append(given[0][..., 0].numel())
        )
        for name, module in classifier.backbone.named_modules()
        if name.endswith("_proj")
    ]
    logits_of(classifier, batch, trim=trim)
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize("lora", [None, {"rank": 4}], ids=["whole", "lora"])
def test_the_last_layer_computes_the_read_tokens_and_all_keys_and_values(
    config_for: Callable[..., Config], lora: dict[str, object] | None
) -> None:
    classifier = as_built(config_for("llama", model={"lora": lora}))
    lone, trie = packed(related_items()), shared(related_items())
    tokens = {"lone": lone.tokens, "trie": sum(piece.stop - piece.start for piece in topology_of(trie).pieces)}
    assert tokens["trie"] < 0.7 * tokens["lone"]
    for name, batch in (("lone", lone), ("trie", trie)):
        reads = len(batch.read_at)
        whole, trimmed = (rows_seen(classifier, batch, trim=trim) for trim in (False, True))
        assert {tuple(rows) for rows in whole.values()} == {(tokens[name],)}
        last = {module.rsplit(".", 1)[-1]: rows for module, rows in trimmed.items() if "layers.1." in module}
        assert {tuple(rows) for module, rows in trimmed.items() if "layers.0." in module} == {(tokens[name],)}
        assert last.pop("k_proj") == [tokens[name], reads]  # the layer's own, of the read tokens, is set aside
        assert last.pop("v_proj") == [tokens[name], reads]
        assert {module: tuple(rows) for module, rows in last.items()} == dict.fromkeys(last, (reads,))


def test_nothing_stays_behind(config_for: Callable[..., Config]) -> None:
    classifier, batch = as_built(config_for("llama")), packed(related_items())
    before = logits_of(classifier, batch)
    logits_of(classifier, batch, trim=True)
    with pytest.raises(IndexError):
        logits_of(classifier, replace(batch, read_at=batch.read_at + 1_000), trim=True)
    assert not last_layer(classifier.backbone)._forward_pre_hooks
    assert torch.equal(logits_of(classifier, batch), before)


def test_what_is_not_known_is_not_trimmed(config_for: Callable[..., Config]) -> None:
    classifier = as_built(config_for("llama"))
    assert why_not_trimmed(classifier.backbone) is None
    classifier.backbone.config.model_type = "olmo"  # type: ignore[union-attr]
    assert "olmo" in str(why_not_trimmed(classifier.backbone))
    stock = as_built(config_for("llama", model={"attention": "sdpa"}, train={"layout": "padded"}))
    assert "attention=sdpa" in str(why_not_trimmed(stock.backbone))


def test_a_read_token_is_a_piece_of_its_own() -> None:
    topology = topology_of(shared(related_items())).at_ends()
    assert [piece[:2] for piece in topology.pieces] == [(read, read + 1) for read in range(15)]
    assert topology.pieces[1] == Piece(1, 2, topology.paths[1])
