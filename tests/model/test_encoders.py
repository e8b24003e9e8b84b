"""Encoders: what their family asks of rows, positions, weights and settings, and what is refused before any work."""

from __future__ import annotations

import copy
import json
import runpy
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from models_support import as_built, logits_of, one_at_a_time, related_items
from safetensors.torch import load_file
from support.tokenizers import tiny_tokenizer
from tests_support import make_rows, write_csv
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer, DebertaV2Tokenizer, PreTrainedTokenizerFast

from pairclf.approaches.torch_models import open_run
from pairclf.config import Config, override, resolve
from pairclf.errors import ModelError
from pairclf.inputs.sequences import Item
from pairclf.inputs.tokenise import TurnTokenizer, add_line_break, keeps_line_breaks
from pairclf.model import isolation
from pairclf.model.engine import build, build_frozen
from pairclf.model.inputs import open_inputs
from pairclf.model.isolation import probe
from pairclf.model.layouts import packed
from pairclf.model.positions import first_position, position_limit
from pairclf.model.scoring import ClassifierScorer
from pairclf.run import Run
from pairclf.task import Row

CPU = torch.device("cpu")
ROOT = Path(__file__).parents[2]


# --- rows and positions ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_packed_rows_together_are_longer_than_the_table_of_positions(
    config_for: Callable[..., Config], kind: str
) -> None:
    classifier = as_built(config_for(kind, model={"lora": None}))
    random = np.random.default_rng(0)
    rows = [Item(row, 0, random.integers(3, 260, 300 + row, dtype=np.int32)) for row in range(5)]
    assert sum(len(row.ids) for row in rows) > classifier.backbone.config.max_position_embeddings  # type: ignore[union-attr, operator]
    assert (logits_of(classifier, packed(rows)) - one_at_a_time(classifier, rows)).abs().max() <= 1e-5


def test_roberta_counts_positions_from_behind_its_padding(
    config_for: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone = build(config_for("roberta", model={"lora": None}), CPU).backbone
    assert first_position(backbone) == 1  # RoBERTa's own padding has the id 1, and its positions start at 2
    assert probe(backbone, torch.float32).packed is None
    monkeypatch.setattr(isolation, "first_position", lambda model: 0)
    with pytest.raises(ModelError, match="a row in a padded batch differ from those of the row alone"):
        probe(backbone, torch.float32)


@pytest.mark.parametrize(
    ("kind", "tokens", "is_hard"),
    [("roberta", 1023, True), ("bert", 1024, True), ("deberta-v2", 1024, False), ("modernbert", 1024, False)],
)
def test_rows_beyond_the_positions_are_refused_where_there_are_none(
    config_for: Callable[..., Config], kind: str, tokens: int, is_hard: bool
) -> None:
    config = config_for(kind, inputs={"max_length": tokens + 1})
    limit = position_limit(open_inputs(config).settings)
    assert limit is not None
    assert (limit.tokens, limit.is_hard) == (tokens, is_hard)
    if is_hard:
        with pytest.raises(ModelError, match=rf"set inputs\.max_length={tokens} or less"):
            build(config, CPU)


def test_rows_of_any_length_open_and_close(config_for: Callable[..., Config]) -> None:
    builder = open_inputs(config_for("bert")).builder
    texts = {"empty": "", "short": "yes", "100,000 tokens": "word " * 20_000}
    rows = [Row(name, dict.fromkeys(("prompt", "response_a", "response_b"), (text,))) for name, text in texts.items()]
    for orders in builder.encode(rows):
        for encoded in orders:
            assert (encoded.ids[0], encoded.ids[-1]) == (1, 2)
            assert len(encoded.ids) <= builder.max_length


# --- weights and settings --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lora", [None, {"r": 4}], ids=["whole", "lora"])
def test_weights_are_held_in_float32_whatever_is_computed_in(
    config_for: Callable[..., Config], lora: dict[str, object] | None
) -> None:
    classifier = build(config_for("bert", model={"dtype": "bfloat16", "lora": lora}), CPU)
    assert classifier.dtype == torch.bfloat16
    assert {weight.dtype for weight in classifier.parameters()} == {torch.float32}
    decoder = build(config_for("llama", model={"dtype": "bfloat16"}), CPU)
    assert torch.bfloat16 in {weight.dtype for weight in decoder.parameters()}


@pytest.mark.parametrize("kind", ["bert", "modernbert"])
def test_nf4_encoder_packs_and_trains_adapters_and_head(config_for: Callable[..., Config], kind: str) -> None:
    classifier = as_built(config_for(kind, model={"quantization": "nf4"}))
    alone = one_at_a_time(classifier, related_items())
    for trim in (False, True):
        assert (logits_of(classifier, packed(related_items()), trim=trim) - alone).abs().max() <= 1e-5
    trained = {name for name, weight in classifier.named_parameters() if weight.requires_grad}
    assert {name.split(".")[0] for name in trained} == {"backbone", "head"}
    assert all("lora_" in name for name in trained if name.startswith("backbone."))
    assert not [name for name, _ in classifier.named_modules() if "pooler" in name]


def test_nobody_is_told_of_what_transformers_would_do_with_the_weights(
    config_for: Callable[..., Config], caplog: pytest.LogCaptureFixture
) -> None:
    build(config_for("bert"), CPU)
    assert not [record.message for record in caplog.records if record.name.startswith("transformers")]


def test_rows_that_overflow_float16_are_rescued(config_for: Callable[..., Config]) -> None:
    classifier = build_frozen(config_for("bert", model={"dtype": "float16", "lora": None}), CPU, None, training=False)
    classifier.eval()
    with torch.no_grad():
        for name, factor in (("intermediate", 100), ("output", 100_000)):
            classifier.backbone.get_parameter(f"encoder.layer.0.{name}.dense.weight").mul_(factor)
    whole = copy.deepcopy(classifier).float()
    whole.dtype = torch.float32
    rows = related_items()[:4]
    assert not logits_of(classifier, packed(rows)).isfinite().any()
    logits, rescued = ClassifierScorer(classifier, "packed")(rows)
    assert rescued == len(rows)
    assert np.abs(logits - one_at_a_time(whole, rows).numpy()).max() <= 1e-5


def test_null_settings_become_those_of_the_family(config_for: Callable[..., Config]) -> None:
    for kind, pooling, swap in (("bert", "first", "none"), ("llama", "last", "both")):
        config = open_inputs(config_for(kind)).config
        assert (config.model.pooling, config.train.swap) == (pooling, swap)
    consistent = open_inputs(config_for("bert", train={"consistency_weight": 0.1})).config
    assert consistent.train.swap == "both"
    chosen = open_inputs(config_for("bert", model={"pooling": "mean"}, train={"swap": "random"})).config
    assert (chosen.model.pooling, chosen.train.swap) == ("mean", "random")


# --- refused ---------------------------------------------------------------------------------------------------------

WORDS = {"winner_model_a": "A", "winner_model_b": "B", "winner_tie": "t"}


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"model": {"pooling": "last"}}, r"model\.pooling=last is none of the base's: first, mean\n.*=first or mean"),
        (
            {"model": {"readout": "label_tokens", "label_words": WORDS}},
            "does not tell the next token\n.*readout=head, or",
        ),
        ({"model": {"label_words": WORDS}}, r"model\.label_words: an encoder does not tell.*\n.*remove"),
        ({"model": {"readout": "reward"}}, "which an encoder computes anew beside each"),
        ({"inputs": {"template": {"add_special_tokens": False}}}, r"leaves out the opening token.*'<bos>'"),
    ],
    ids=["pooling", "label_tokens", "label_words", "reward", "special_tokens"],
)
def test_settings_of_decoders_are_refused(
    config_for: Callable[..., Config], sections: dict[str, dict[str, object]], message: str
) -> None:
    with pytest.raises(ModelError, match=message):
        open_inputs(config_for("bert", **sections))


def test_a_tokenizer_without_a_closing_token_is_refused(
    base_of: Callable[[str], Path], config_for: Callable[..., Config], tmp_path: Path
) -> None:
    folder = shutil.copytree(base_of("bert"), tmp_path / "base")
    tiny_tokenizer(folder, closing=False)
    with pytest.raises(ModelError, match=r"puts no closing token around a text.*\n.*post_processor"):
        open_inputs(config_for("bert", model={"base": str(folder)}))


def run_of(config: Config, folder: Path) -> Run:
    write_csv(folder / "train.csv", make_rows(8))
    return Run(override(config, [f"data.folder={folder}", "data.train=train.csv", f"output_dir={folder / 'run'}"]))


def test_packed_deberta_is_refused_before_a_text_is_read(config_for: Callable[..., Config], tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"train\.layout=packed does not go.*DebertaV2Model does not pass.*\n.*padded"):
        open_run(run_of(config_for("deberta-v2", train={"layout": "packed"}), tmp_path))
    with pytest.raises(ModelError, match=r"train\.layout=shared .*sees those behind it.*\n.*=packed or padded"):
        open_run(run_of(config_for("bert", train={"layout": "shared"}), tmp_path))
    assert not (tmp_path / "run" / "tokens").exists()


@pytest.mark.parametrize("parts", [1, 2])
def test_pickled_weights_are_refused_until_they_are_converted(
    base_of: Callable[[str], Path], config_for: Callable[..., Config], tmp_path: Path, parts: int
) -> None:
    convert = runpy.run_path(str(ROOT / "scripts/convert_bin.py"))["convert"]
    source, new = shutil.copytree(base_of("bert"), tmp_path / "old"), tmp_path / "new"
    weights = load_file(source / "model.safetensors")
    (source / "model.safetensors").unlink()
    names = [f"pytorch_model-{part}-of-2.bin" for part in (1, 2)] if parts == 2 else ["pytorch_model.bin"]
    held = [{key: weights[key] for key in sorted(weights)[part::parts]} for part in range(parts)]
    for name, part in zip(names, held, strict=True):
        torch.save(part, source / name)
    if parts == 2:
        table = {key: name for name, part in zip(names, held, strict=True) for key in part}
        (source / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": table}))
    old, converted = (config_for("bert", model={"base": str(folder), "lora": None}) for folder in (source, new))
    with pytest.raises(ModelError, match=r"in pytorch_model\.bin, a pickle.*\n.*scripts/convert_bin\.py"):
        open_run(run_of(old, tmp_path))
    assert len(convert(source, new)) == parts
    assert not list(new.glob("*.bin*"))
    expected = as_built(config_for("bert", model={"lora": None})).state_dict()
    found = as_built(converted).state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    with pytest.raises(FileExistsError):
        convert(source, new)


def test_quantised_full_fine_tuning_is_refused() -> None:
    with pytest.raises(Exception, match="freezes the base weights"):
        resolve({"model": {"quantization": "nf4", "lora": None}})


# --- line breaks -----------------------------------------------------------------------------------------------------


def word_piece(*reserved: str) -> PreTrainedTokenizerFast:
    """As BERT's: white space is thrown away."""
    words = ["[PAD]", *reserved, "[UNK]", "a", "b", "##a"]
    backend = Tokenizer(models.WordPiece({word: place for place, word in enumerate(words)}, unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]", pad_token="[PAD]")


def unigram() -> PreTrainedTokenizerFast:
    """As DeBERTa-v3's: a line break is a blank."""
    backend = Tokenizer(models.Unigram([("<unk>", 0.0), ("▁", -1.0), ("▁a", -2.0), ("▁b", -2.0)], unk_id=0))
    backend.normalizer = normalizers.Replace("\n", " ")
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")


def deberta() -> DebertaV2Tokenizer:
    """Of transformers' own class, which puts itself together anew when it is loaded."""
    special = [(name, 0.0) for name in ("[PAD]", "[CLS]", "[SEP]", "[UNK]")]
    return DebertaV2Tokenizer(vocab=[*special, ("▁a", -2.0), ("▁b", -2.0), ("a", -3.0), ("b", -3.0), ("▁", -4.0)])


@pytest.mark.parametrize(
    ("tokenizer", "embeddings", "line_break"),
    [
        pytest.param(word_piece("[unused0]", "[unused1]"), 7, 1, id="reserved"),
        pytest.param(word_piece(), 6, 5, id="behind the last"),
        pytest.param(unigram(), 6, 4, id="unigram"),
        pytest.param(deberta(), 16, 10, id="deberta"),
    ],
)
def test_line_breaks_get_a_token_that_the_base_has_room_for(
    tokenizer: PreTrainedTokenizerFast, embeddings: int, line_break: int, tmp_path: Path
) -> None:
    plain = TurnTokenizer(tokenizer)(["a b", "a  b"], special=False)
    assert not keeps_line_breaks(tokenizer)
    add_line_break(tokenizer, embeddings)
    tokenizer.save_pretrained(tmp_path)
    for kept in (tokenizer, AutoTokenizer.from_pretrained(tmp_path)):
        assert keeps_line_breaks(kept)
        turns = TurnTokenizer(kept)
        broken, two, *same = turns(["a\nb", "a\r\n\nb", "a b", "a  b"], special=False)
        assert (broken == line_break).sum() == 1
        assert (two == line_break).sum() == 2
        assert all(np.array_equal(one, other) for one, other in zip(same, plain, strict=True))
        assert line_break not in turns.control
    before = tokenizer.backend_tokenizer.to_str()
    add_line_break(tokenizer, embeddings)
    assert tokenizer.backend_tokenizer.to_str() == before


def test_line_breaks_stay_as_they_are_where_they_are_kept_or_no_embedding_is_free(
    base_of: Callable[[str], Path],
) -> None:
    tokenizer = word_piece()
    add_line_break(tokenizer, 5)
    assert not keeps_line_breaks(tokenizer)
    byte_level = AutoTokenizer.from_pretrained(base_of("bert"))
    before = byte_level.backend_tokenizer.to_str()
    add_line_break(byte_level, 320)
    assert byte_level.backend_tokenizer.to_str() == before  # it keeps them by itself
