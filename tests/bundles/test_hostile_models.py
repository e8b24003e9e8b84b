"""Bundles and bases from a stranger: hashes and seal fit, and what they ask for is refused before it happens.

Every hostile folder is a good bundle with one thing changed. A canary is the file that the hostile code would write.
"""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from peft import PeftModel
from test_bundle import write_bundle

from pairclf.approaches.finetune.approach import FinetuneApproach
from pairclf.approaches.protocol import Assignment
from pairclf.bundles import bundle as bundles
from pairclf.bundles.base import resolve_base
from pairclf.bundles.bundle import open_bundle
from pairclf.bundles.contents import MANIFEST, TRAINED_ON
from pairclf.bundles.manifest import read_manifest, seal_of
from pairclf.config import resolve
from pairclf.errors import BundleError, ConfigError, ModelError, PairclfError
from pairclf.files import sha256_tree, write_json
from pairclf.inference.verify import verify
from pairclf.inputs.sequences import LargestPass
from pairclf.model.backbone import load_tokenizer
from pairclf.model.inputs import open_inputs
from pairclf.trust import Trust, grant

Change = Callable[[Path], object]
CODE = """
from pathlib import Path
from transformers import PreTrainedTokenizerFast
Path(r"{canary}").touch()
class Evil(PreTrainedTokenizerFast):
    pass
"""


@pytest.fixture(autouse=True)
def _trust_nobody() -> Any:
    yield
    grant(Trust())


@pytest.fixture(scope="module")
def saved(base_of: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("good") / "bundle"
    model = {"base": str(base_of("llama")), "quantization": "none", "lora": {"r": 2}}
    write_bundle(resolve({"inputs": {"max_length": 160}, "model": model}), folder)
    return folder


@pytest.fixture(scope="module")
def saved_whole(base_of: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "bundle"
    model = {"base": str(base_of("llama")), "quantization": "none", "lora": None}
    write_bundle(resolve({"inputs": {"max_length": 160}, "model": model}), folder)
    return folder


@pytest.fixture
def copy(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "copy"))


def reseal(folder: Path, **changes: object) -> None:
    """Hashes of the files and a seal that fit, as a stranger makes them."""
    tree = json.loads((folder / MANIFEST).read_text())
    tree |= {"files": sha256_tree(folder, without=frozenset({MANIFEST})), **changes}
    tree["seal"] = seal_of(tree)
    (folder / MANIFEST).write_text(json.dumps(tree))


def edit(path: Path, **changes: object) -> None:
    write_json(path, json.loads(path.read_text()) | changes)


def look(folder: Path) -> None:
    """What `pairclf verify` does."""
    for _ in verify([folder], None, None):
        pass


def write_code(folder: Path, canary: Path) -> None:
    (folder / "evil.py").write_text(CODE.format(canary=canary))
    edit(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": [None, "evil.Evil"]}, tokenizer_class="Evil")


# --- code ------------------------------------------------------------------------------------------------------------


def test_the_unchanged_bundle_is_good(copy: Path) -> None:
    reseal(copy)
    look(copy)
    assert open_bundle(copy).manifest.seal == read_manifest(copy).seal


def test_code_beside_a_bundles_tokenizer_is_refused_and_never_run(
    copy: Path, tmp_path: Path, cli: Callable[..., tuple[int, str]]
) -> None:
    canary = tmp_path / "canary"
    write_code(copy / "tokenizer", canary)
    reseal(copy)
    code, said = cli("verify", copy)
    assert (code, canary.exists()) == (2, False)
    assert "tokenizer/evil.py" in said
    assert "--trust-remote-code" in said
    code, said = cli("verify", copy, "--trust-remote-code")
    assert (code, canary.exists()) == (0, False), said  # tokenizer.json is all that is read
    assert "note: --trust-remote-code" in said
    assert cli("verify", copy)[0] == 2  # what was permitted once is not permitted for good


def test_code_under_another_name_is_refused_by_the_auto_map(copy: Path, tmp_path: Path) -> None:
    """`auto_map` may also name a repository of the hub, and no file has to be there."""
    edit(copy / "tokenizer" / "tokenizer_config.json", auto_map={"AutoTokenizer": [None, "evil/repo--evil.Evil"]})
    reseal(copy)
    with pytest.raises(BundleError, match=r"tokenizer_config\.json names code to run .*auto_map"):
        look(copy)


def test_a_bundle_can_not_permit_its_own_code(copy: Path, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    write_code(copy / "tokenizer", canary)
    config = (copy / "config.yaml").read_text()
    (copy / "config.yaml").write_text(config.replace("label_words: {}", "label_words: {}\n  trust_remote_code: true"))
    reseal(copy)
    with pytest.raises(BundleError):
        look(copy)
    for path in (copy / "tokenizer" / "evil.py", copy / "tokenizer" / "tokenizer_config.json"):
        path.unlink()
    reseal(copy)
    with pytest.raises(BundleError, match="give --trust-remote-code on the command line"):
        look(copy)
    assert not canary.exists()


@pytest.mark.parametrize("value", ["true", "null", "1", "'false'"])
def test_the_old_setting_names_the_flag(value: str) -> None:
    import yaml

    with pytest.raises(ConfigError, match="give --trust-remote-code on the command line"):
        resolve({"model": {"trust_remote_code": yaml.safe_load(value)}})
    assert resolve({"model": {"trust_remote_code": False}}) == resolve({})


def test_a_base_with_code_is_refused_and_named(base_of: Callable[[str], Path], tmp_path: Path) -> None:
    base, canary = Path(shutil.copytree(base_of("llama"), tmp_path / "base")), tmp_path / "canary"
    write_code(base, canary)
    for given in ((str(base), None), ("embedded:gemma2-tiny", base)):
        with pytest.raises(ModelError, match=r"(?s)evil\.py is code.*--trust-remote-code"):
            resolve_base(*given)
    grant(Trust(remote_code=True))
    load_tokenizer(resolve_base(str(base)))
    assert canary.exists()


def test_every_command_that_loads_a_model_has_the_flag() -> None:
    from typer.main import get_command

    from pairclf.cli import app

    commands = get_command(app).commands  # type: ignore[attr-defined]
    asked = {name for name, one in commands.items() if any("--trust-remote-code" in param.opts for param in one.params)}
    loading = "compare cv demo export forecast lengths merge package predict rank show sweep train try verify"
    assert asked == set(loading.split())


@pytest.mark.parametrize("command", ["verify", "predict", "forecast"])
def test_what_a_bundle_names_is_not_fetched_unless_asked_for(
    tmp_path: Path, cli: Callable[..., tuple[int, str]], monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    data = [] if command == "verify" else ["--data", tmp_path / "x.csv"]
    for given, wanted in ((None, "1"), ("0", "0")):
        monkeypatch.delenv("HF_HUB_OFFLINE") if given is None else monkeypatch.setenv("HF_HUB_OFFLINE", given)
        assert cli(command, tmp_path, *data)[0] == 2
        assert os.environ["HF_HUB_OFFLINE"] == wanted


def test_a_bundle_that_can_not_be_loaded_does_not_keep_others_from_being_verified(copy: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(copy, tmp_path / "other"))
    config = (copy / "config.yaml").read_text()
    base = json.loads((copy / MANIFEST).read_text())["base"]
    (copy / "config.yaml").write_text(config.replace(base, "~nobody-of-that-name/x/y"))
    reseal(copy, base="~nobody-of-that-name/x/y")
    found = verify([copy, other], None, tmp_path / "found.json")
    assert next(found)[0] == other
    with pytest.raises(ModelError, match="is no folder here"):
        next(found)


def _index(folder: Path, file: str) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"norm.weight": file}}))


BASES: dict[str, tuple[Change, str]] = {
    "another model": (lambda at: (at / "adapter_config.json").write_text("{}"), "load another model"),
    "auto_map": (lambda at: edit(at / "config.json", auto_map={"AutoModel": "a/b--c.D"}), "names code to run"),
    "code in a part": (
        lambda at: edit(at / "config.json", text_config={"auto_map": {"AutoConfig": "x.Y"}}),
        "names code to run",
    ),
    "processor": (
        lambda at: (at / "processor_config.json").write_text('{"auto_map": {"AutoProcessor": "x.Y"}}'),
        r"processor_config\.json names code to run",
    ),
    "generation": (
        lambda at: (at / "generation_config.json").write_text('{"custom_generate": "evil/repo"}'),
        "names code to run",
    ),
    "kernel": (lambda at: edit(at / "config.json", _attn_implementation="evil/kernels"), "evil/kernels"),
    "kernel in a part": (lambda at: edit(at / "config.json", attn_implementation={"": "evil/k:f"}), "evil/k:f"),
    "experts": (lambda at: edit(at / "config.json", experts_implementation="evil/kernels"), "evil/kernels"),
    "quantiser": (lambda at: edit(at / "config.json", quantization_config={"quant_method": "mxfp4"}), "mxfp4"),
    "weights elsewhere": (lambda at: edit(at / "config.json", transformers_weights="../x.safetensors"), "weights"),
    "shard elsewhere": (lambda at: _index(at, "../../secret.safetensors"), "no safetensors file beside it"),
    "shard by a path": (lambda at: _index(at, "/dev/zero"), "no safetensors file beside it"),
    "no index": (lambda at: (at / "model.safetensors.index.json").write_text("[]"), "no weight_map"),
    "vocabulary elsewhere": (
        lambda at: edit(at / "tokenizer_config.json", vocab_file="/etc/passwd"),
        "vocab_file: '/etc/passwd'",
    ),
    "tokenizer class": (lambda at: edit(at / "tokenizer_config.json", tokenizer_class="AutoModel"), "no tokenizer"),
    "fifo": (lambda at: os.mkfifo(at / "model-2.safetensors"), "neither a file nor a folder"),
    "config is a fifo": (
        lambda at: ((at / "generation_config.json").unlink(missing_ok=True), os.mkfifo(at / "generation_config.json")),
        "neither a file nor a folder",
    ),
    "deep": (lambda at: (at / "config.json").write_text("[" * 100_000), "can't be used"),
    "large": (lambda at: (at / "config.json").write_text(" " * (5 << 20)), "more than"),
}


@pytest.mark.parametrize("name", BASES)
def test_a_base_may_not_ask_for_it(base_of: Callable[[str], Path], tmp_path: Path, name: str) -> None:
    base = Path(shutil.copytree(base_of("llama"), tmp_path / "base"))
    change, message = BASES[name]
    change(base)
    with pytest.raises(ModelError, match=message):
        resolve_base(str(base))


@pytest.mark.parametrize("name", sorted(BASES.keys() - {"fifo", "config is a fifo", "another model", "processor"}))
def test_whole_weights_in_a_bundle_may_not_ask_for_it(saved_whole: Path, tmp_path: Path, name: str) -> None:
    copy = Path(shutil.copytree(saved_whole, tmp_path / "copy"))
    shutil.copy(copy / "tokenizer" / "tokenizer_config.json", copy / "backbone")
    change, message = BASES[name]
    change(copy / "backbone")
    reseal(copy)
    with pytest.raises(BundleError, match=message):
        open_bundle(copy)


def test_a_base_in_the_hubs_cache_is_made_of_links(base_of: Callable[[str], Path], tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "0"
    shutil.copytree(base_of("llama"), blobs)
    snapshot.mkdir(parents=True)
    for path in blobs.iterdir():
        (snapshot / path.name).symlink_to(Path("../../blobs") / path.name)
    assert resolve_base(str(snapshot)) == str(snapshot)
    assert load_tokenizer(str(snapshot)).is_fast


# --- files -----------------------------------------------------------------------------------------------------------


def _linked_folder(folder: Path) -> None:
    os.rename(folder / "tokenizer", folder.parent / "elsewhere")
    (folder / "tokenizer").symlink_to(folder.parent / "elsewhere")


def _linked_file(folder: Path) -> None:
    os.rename(folder / "head.safetensors", folder.parent / "head")
    (folder / "head.safetensors").symlink_to(folder.parent / "head")


def _in_place_of(folder: Path, name: str) -> None:
    (folder / name).unlink()
    os.mkfifo(folder / name)


FOLDERS: dict[str, tuple[Change, str]] = {
    "folder link": (_linked_folder, "'tokenizer': a link"),
    "file link": (_linked_file, r"'head\.safetensors': a link \(links to files are permitted by --linked-files\)"),
    "dead link": (lambda at: (at / "adapter" / "x.json").symlink_to("/nowhere"), "'adapter/x.json': a link"),
    "fifo": (lambda at: os.mkfifo(at / "fifo"), "'fifo': no regular file"),
    "config": (lambda at: _in_place_of(at, "config.yaml"), r"'config\.yaml': no regular file"),
    "head": (lambda at: _in_place_of(at, "head.safetensors"), r"'head\.safetensors': no regular file"),
    "manifest": (lambda at: _in_place_of(at, "bundle.json"), "is no bundle"),
    "extra file": (lambda at: (at / "adapter" / "pytorch_model.bin").touch(), "an unknown file"),
    "pickle": (lambda at: (at / "adapter" / "adapter_model.bin").touch(), "an unknown file"),
    "model beside the tokenizer": (lambda at: (at / "tokenizer" / "config.json").write_text("{}"), "an unknown file"),
    "adapter beside it": (lambda at: (at / "tokenizer" / "adapter_config.json").write_text("{}"), "an unknown file"),
    "extra folder": (lambda at: (at / "adapter" / "x").mkdir(), "'adapter/x': an unknown folder"),
    "escapes": (lambda at: (at / "\x1b[2J\n").touch(), "an unknown file"),
    "code": (lambda at: (at / "adapter" / "x.py").touch(), "'adapter/x.py': code"),
}


@pytest.mark.parametrize("name", FOLDERS)
def test_what_does_not_belong_in_a_bundle_is_refused_by_name(copy: Path, name: str) -> None:
    change, message = FOLDERS[name]
    reseal(copy)
    change(copy)
    if name not in ("manifest", "folder link", "config", "head"):
        reseal(copy)
    for opened in (lambda: open_bundle(copy), lambda: open_bundle(copy, verified=True), lambda: read_manifest(copy)):
        with pytest.raises(BundleError, match=message) as raised:
            opened()
        assert "\x1b" not in str(raised.value)


def test_nothing_is_opened_before(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (copy / "x").touch()
    monkeypatch.setattr("pairclf.bundles.manifest.read_plain", lambda *_: pytest.fail("opened a file"))
    monkeypatch.setattr(bundles, "sha256_tree", lambda *_, **__: pytest.fail("hashed the files"))
    with pytest.raises(BundleError, match="'x': an unknown file"):
        open_bundle(copy)


def test_links_to_files_are_permitted_by_their_flag(
    copy: Path, tmp_path: Path, cli: Callable[..., tuple[int, str]]
) -> None:
    """As the kernel lays a bundle's files, and the hub's cache."""
    linked = tmp_path / "linked"
    for path in (one for one in copy.rglob("*") if one.is_file()):
        place = linked / path.relative_to(copy)
        place.parent.mkdir(parents=True, exist_ok=True)
        place.symlink_to(path)
    assert cli("verify", linked)[0] == 2
    code, said = cli("verify", linked, "--linked-files")
    assert code == 0, said
    (linked / "head.safetensors").unlink()
    os.mkfifo(tmp_path / "fifo")
    (linked / "head.safetensors").symlink_to(tmp_path / "fifo")
    code, said = cli("verify", linked, "--linked-files")
    assert (code, "'head.safetensors': a link" in said) == (2, True)


# --- adapter ---------------------------------------------------------------------------------------------------------

ADAPTERS: dict[str, dict[str, object]] = {
    "regex": {"target_modules": "(a|a?)*" * 30 + "b"},
    "another list": {"target_modules": ["q_proj"]},
    "another model": {"auto_mapping": {"base_model_class": "Evil", "parent_library": "evil"}},
    "another kind": {"peft_type": "PROMPT_TUNING"},
    "megatron": {"megatron_core": "evil"},
    "layers": {"layers_pattern": "(a|a?)*b"},
    "rank": {"r": 4},
    "ranks": {"rank_pattern": {"(a|a?)*b": 2}},
    "initialisation": {"init_lora_weights": "loftq"},
    "saved modules": {"modules_to_save": ["layers"]},
}


@pytest.mark.parametrize("name", ADAPTERS)
def test_adapter_config_says_what_config_says(copy: Path, name: str) -> None:
    edit(copy / "adapter" / "adapter_config.json", **ADAPTERS[name])
    reseal(copy)
    (key,) = ADAPTERS[name]
    with pytest.raises(BundleError, match=rf"adapter_config\.json says {key}:") as raised:
        look(copy)
    assert len(str(raised.value)) < 2000


def test_the_adapter_is_built_without_pefts_reading_of_the_file(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    edit(copy / "adapter" / "adapter_config.json", base_model_name_or_path="evil/repo", unknown={"to": "this peft"})
    reseal(copy)
    monkeypatch.setattr(PeftModel, "from_pretrained", lambda *_, **__: pytest.fail("read adapter_config.json"))
    look(copy)


# --- manifest and other data -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"probes": []}, "no probe rows"),
        ({"probes": None}, "probes: Input should be a valid array"),
        ({"probes": [{"id": "1", "fields": {}, "logits": []}]}, "probe '1' has fields"),
        ({"prior": [0.5, 0.5]}, "prior"),
        ({"prior": [0.5, 0.5, 0.5]}, "prior"),
        ({"prior": [2.0, -1.0, 0.0]}, "prior"),
        ({"prior": [float("nan")] * 3}, "prior"),
        ({"metrics": {"log_loss": float("inf")}}, "metrics"),
        ({"metrics": {"log_loss": "low"}}, "metrics"),
        ({"dtype": "pickle"}, "dtype"),
        ({"dtype": ["x" * 100_000]}, "dtype"),
        ({"classes": ["a", "b", "c"]}, "classes"),
        ({"base": "evil/repo"}, "base 'evil/repo', and model.base is"),
        ({"approach": "classical"}, "approach 'classical', and the config's is 'finetune'"),
        ({"weights": "none"}, "base '.*', and model.base is"),
        ({"weights": "whole", "needs_base": False}, "weights: whole, and config.yaml says"),
        ({"weights": "pickle"}, "weights"),
        ({"needs_base": "yes"}, "needs_base"),
        ({"name": "\x1b[2J"}, "name"),
        ({"name": "x" * 10_000}, "name"),
        ({"fold": -1}, "fold"),
        ({"format": "4"}, r"(?s)format '4'.*train it again"),
        ({"files": {"../../x": "0"}}, "changed, added or removed"),
        ({"more": 1}, "more"),
    ],
)
def test_each_field_of_the_manifest_is_looked_at(copy: Path, changes: dict[str, object], message: str) -> None:
    reseal(copy, **changes)
    with pytest.raises(BundleError, match=message) as raised:
        look(copy)
    assert len(str(raised.value)) < 2000
    assert str(raised.value).isprintable() or "\x1b" not in str(raised.value)


def complaint(call: Change, folder: Path) -> str:
    """What a user reads, which is never long; empty: nothing. Any other exception is a traceback, and fails."""
    try:
        call(folder)
    except PairclfError as error:
        return str(error) if len(str(error)) < 4000 else pytest.fail("too long")
    return ""


STRANGE = [
    None,
    True,
    -1,
    1e308,
    float("nan"),
    10**5000,
    "",
    "\ud800",
    "x" * 9000,
    "\x1b]0;x",
    [],
    [[]],
    {},
    {"": None},
]


def mutated(tree: Any, draw: random.Random) -> Any:
    """The tree with a value replaced, removed or doubled somewhere."""
    if draw.random() < 0.25 or not isinstance(tree, (dict, list)) or not tree:
        return draw.choice(STRANGE)
    made = tree.copy()
    place = draw.choice(sorted(made)) if isinstance(made, dict) else draw.randrange(len(made))
    how = draw.random()
    if how < 0.15:
        del made[place]
    elif how < 0.25 and isinstance(made, dict):
        made[draw.choice(["", "x", "seal", "files", "\u202e"])] = draw.choice(STRANGE)
    else:
        made[place] = mutated(made[place], draw)
    return made


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.thorough)])
def test_a_mutated_manifest_is_good_or_refused(copy: Path, seed: int) -> None:
    draw, good = random.Random(seed), json.loads((copy / MANIFEST).read_text())
    refused = 0
    for _ in range(2000 if seed else 300):
        tree = mutated(good, draw)
        if isinstance(tree, dict):
            try:
                tree["seal"] = seal_of(tree)
                text = json.dumps(tree)
            except ValueError:  # a half of a surrogate, or a number of 5,000 digits
                text = json.dumps(good)[: draw.randrange(2000)]
        else:
            text = draw.choice(["null", "[]", "[" * 50_000, "", "\ufeff{}", '{"format": 4}', '{"format": 1e999}'])
        (copy / MANIFEST).write_text(text)
        refused += len(complaint(open_bundle, copy)) > 0
    assert refused > 200


def test_a_mutated_byte_of_any_other_file_is_refused(copy: Path) -> None:
    """Sealed anew: data that makes no sense is an error with a sentence, and no traceback."""
    draw, refused = random.Random(0), 0
    originals = {path: path.read_bytes() for path in copy.rglob("*") if path.is_file() and path.name != MANIFEST}
    for path in sorted(originals):
        for _ in range(3):
            content = bytearray(originals[path])
            start = draw.randrange(min(200, len(content)))
            content[start : start + draw.choice([1, 8, 5000])] = draw.randbytes(draw.choice([0, 1, 8]))
            path.write_bytes(bytes(content))
            reseal(copy)
            refused += len(complaint(look, copy)) > 0
            path.write_bytes(originals[path])
    assert refused > 0


@pytest.mark.parametrize(
    "frame",
    [
        pl.DataFrame({"prompt": ["a"]}),
        pl.DataFrame({"prompts": pl.Series([1], dtype=pl.UInt64)}),
        pl.DataFrame({"prompt": pl.Series([1], dtype=pl.UInt64), "more": [1]}),
        pl.DataFrame(  # 600 bytes; with more zeros it would fill any memory
            {"prompt": pl.Series([1], dtype=pl.UInt64), "sample": pl.Series([[0] * 3000], dtype=pl.List(pl.UInt32))}
        ),
        None,
    ],
)
def test_other_things_than_hashes_of_prompts_are_refused(copy: Path, frame: pl.DataFrame | None) -> None:
    path = copy / TRAINED_ON
    if frame is None:
        path.write_bytes(b"PAR1 is not enough PAR1")
    else:
        frame.write_parquet(path)
    reseal(copy)
    with pytest.raises(BundleError, match=r"trained_on\.parquet can't be used"):
        open_bundle(copy).trained_on()


# --- tokenizers ------------------------------------------------------------------------------------------------------


def _without_unknown(kind: str) -> dict[str, Any]:
    models = {
        "WordPiece": {"unk_token": "[UNK]", "continuing_subword_prefix": "##", "max_input_chars_per_word": 100},
        "Unigram": {"unk_id": None, "byte_fallback": False, "vocab": [["a", -1.0]]},
    }
    return {"model": {"type": kind, "vocab": {"a": 0}, **models[kind]}}


def _replacing(pattern: str) -> dict[str, Any]:
    return {"normalizer": {"type": "Replace", "pattern": {"Regex": pattern}, "content": "a"}}


TOKENIZERS: dict[str, tuple[dict[str, Any], str]] = {
    "no id for an unknown token": (_without_unknown("Unigram"), "the tokenizer fails: Encountered an unknown token"),
    "no word for an unknown token": (_without_unknown("WordPiece"), "the tokenizer fails: WordPiece error"),
    "a pattern that is given up": (_replacing(r"(([\s\S]*)*)*\d{9}Z"), "the tokenizer fails: Onig: .* retry-limit"),
    "a panic where it is loaded": (
        {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}},
        "the tokenizer fails: Precompiled",
    ),
}


@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_tokenizer_that_fails_is_refused(copy: Path, name: str) -> None:
    changes, says = TOKENIZERS[name]
    edit(copy / "tokenizer" / "tokenizer.json", **changes)
    reseal(copy)
    with pytest.raises(ModelError, match=says):
        look(copy)


@pytest.mark.parametrize(
    ("number", "says"),
    [(4_000_000_000, r"gives a token the id 4,000,000,00\d"), (9_999, r"also writes 'e' \(9999\), 'Ġ' \(10000\)")],
)
def test_ids_that_no_base_has_an_embedding_for_are_refused(copy: Path, tmp_path: Path, number: int, says: str) -> None:
    """tokenizers counts up to the first for minutes; a GPU that is asked for the second is lost to the process."""
    path = copy / "tokenizer" / "tokenizer.json"
    vocabulary = json.loads(path.read_text())["model"]["vocab"]
    edit(
        path, model=json.loads(path.read_text())["model"] | {"vocab": vocabulary | {"e": number, "\u0120": number + 1}}
    )
    reseal(copy)
    with pytest.raises(ModelError, match=says):
        look(copy)
    bundle = open_bundle(copy)
    with pytest.raises(ModelError, match=says):
        FinetuneApproach().load(bundle, Assignment(copy, None, (), ("cpu",), 1, LargestPass(9, 9, 1), 1))
    base = Path(shutil.copytree(bundle.config.model.base, tmp_path / "base"))
    shutil.copy(path, base)
    model = bundle.config.model.model_copy(update={"base": str(base)})
    with pytest.raises(ModelError, match=says):
        open_inputs(bundle.config.model_copy(update={"model": model}))
