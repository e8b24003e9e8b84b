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
from pairclf.model.batch import Batch, Segment, Topology
from pairclf.model.engine import Classifier
from pairclf.model.layouts import packed, shared
from pairclf.model.trim import LAYERS, last_layer, why_not_trimmed


def assert_trimmed_is_whole(classifier: Classifier, allowed: float = 1e-5) -> None:
    alone = one_at_a_time(classifier, related_items())
    assert classifier.isolation.trimmed is None
    for layout in (packed, shared) if classifier.family.causal else (packed,):
        assert (logits_of(classifier, layout(related_items()), trim=True) - alone).abs().max() <= allowed


@pytest.mark.parametrize("kind", LAYERS)
def test_trim_gives_the_logits_of_the_whole_layer(classifier_of: Callable[[str], Classifier], kind: str) -> None:
    assert_trimmed_is_whole(classifier_of(kind))


@pytest.mark.parametrize(
    "model",
    [
        {"lora": None},
        {"lora": {"r": 4, "use_dora": True}},
        {"quantization": "nf4"},
        {"quantization": "nf4", "dtype": "float16"},
        {"head": "two_layer"},
    ],
    ids=str,
)
def test_trim_goes_with_adapters_and_quantised_weights(
    config_for: Callable[..., Config], model: dict[str, object]
) -> None:
    assert_trimmed_is_whole(as_built(config_for("gemma2", model=model)), 2e-2 if "dtype" in model else 1e-5)


def _read_one_too_early(batch: Batch) -> Batch:
    return replace(batch, read_at=batch.read_at - 1)


def _see_one_token_less(batch: Batch) -> Batch:
    """In the last layer alone."""
    topology = topology_of(batch)
    paths = tuple((*before, (start, max(start + 1, stop - 1))) for *before, (start, stop) in topology.paths)
    return replace(batch, inputs={**batch.inputs, "topology": Topology(topology.segments, paths)})


def _only_paths(spoil: Callable[[Batch], Batch]) -> Callable[[Batch], Batch]:
    def wrong(batch: Batch) -> Batch:
        topology = Topology(topology_of(batch).segments, topology_of(spoil(batch)).paths)
        return replace(batch, inputs={**batch.inputs, "topology": topology})

    return wrong


@pytest.mark.parametrize(
    "spoil",
    [
        pytest.param(_read_one_too_early, id="read_at"),
        pytest.param(_see_one_token_less, id="one_token_less"),
        pytest.param(_only_paths(forget_what_went_before), id="no_prefix"),
        pytest.param(_only_paths(see_the_siblings), id="siblings"),
    ],
)
def test_trim_with_a_wrong_place_or_path_changes_logits(
    classifier_of: Callable[[str], Classifier], spoil: Callable[[Batch], Batch]
) -> None:
    batch = shared(related_items())
    for classifier in map(classifier_of, ("gemma2", "llama")):
        right, wrong = (logits_of(classifier, one, trim=True) for one in (batch, spoil(batch)))
        assert (right - wrong).abs().max() > 1e-3


def _read_one_too_late(batch: Batch) -> Batch:
    return replace(batch, read_at=batch.read_at + 1)


@pytest.mark.parametrize("kind", ["bert", "modernbert", "eurobert"])
def test_trim_of_an_encoder_with_a_wrong_place_or_path_changes_logits(
    classifier_of: Callable[[str], Classifier], kind: str
) -> None:
    """The first token is read, and sees those behind it."""
    classifier, batch = classifier_of(kind), packed(related_items())
    right = logits_of(classifier, batch, trim=True)
    for spoil in (_read_one_too_late, _see_one_token_less):
        assert (logits_of(classifier, spoil(batch), trim=True) - right).abs().max() > 1e-3


def test_trim_is_refused_where_the_last_layer_sees_a_window_to_both_sides(
    classifier_of: Callable[[str], Classifier],
) -> None:
    backbone = classifier_of("modernbert").backbone
    backbone.config.layer_types.reverse()  # type: ignore[union-attr]
    try:
        assert "sees a window around each token" in str(why_not_trimmed(backbone))
    finally:
        backbone.config.layer_types.reverse()  # type: ignore[union-attr]


def test_trim_without_the_window_changes_logits(
    classifier_of: Callable[[str], Classifier], monkeypatch: pytest.MonkeyPatch
) -> None:
    classifier, batch = classifier_of("mistral"), shared(related_items())
    right, sequence = logits_of(classifier, batch, trim=True), attention._sequence

    def wrong(
        query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scores: attention.ScoreOptions
    ) -> torch.Tensor:
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


@pytest.mark.parametrize("lora", [None, {"r": 4}], ids=["whole", "lora"])
def test_trim_computes_the_read_tokens_and_all_keys_and_values(
    config_for: Callable[..., Config], lora: dict[str, object] | None
) -> None:
    classifier = as_built(config_for("llama", model={"lora": lora}))
    lone, trie = packed(related_items()), shared(related_items())
    tokens = {
        "lone": int(lone.lengths.sum()),
        "trie": sum(piece.stop - piece.start for piece in topology_of(trie).segments),
    }
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


def test_trim_leaves_no_hooks(classifier_of: Callable[[str], Classifier]) -> None:
    classifier, batch = classifier_of("llama"), packed(related_items())
    before = logits_of(classifier, batch)
    logits_of(classifier, batch, trim=True)
    with pytest.raises(IndexError):
        logits_of(classifier, replace(batch, read_at=batch.read_at + 1_000), trim=True)
    assert not last_layer(classifier.backbone)._forward_pre_hooks
    assert torch.equal(logits_of(classifier, batch), before)


def test_why_not_trimmed_names_what_is_not_known(config_for: Callable[..., Config]) -> None:
    classifier = as_built(config_for("llama"))
    assert why_not_trimmed(classifier.backbone) is None
    classifier.backbone.config.model_type = "olmo"  # type: ignore[union-attr]
    assert "olmo" in str(why_not_trimmed(classifier.backbone))
    stock = as_built(config_for("llama", model={"attn_implementation": "sdpa"}, train={"layout": "padded"}))
    assert "attn_implementation=sdpa" in str(why_not_trimmed(stock.backbone))


def test_at_ends_makes_each_read_token_a_piece() -> None:
    topology = topology_of(shared(related_items())).at_ends()
    assert [piece[:2] for piece in topology.segments] == [(read, read + 1) for read in range(15)]
    assert topology.segments[1] == Segment(1, 2, topology.paths[1])
