"""Settings: strict, all errors at once, the nearest key named, and every shipped YAML readable through the real CLI."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from pairclf.cli import app
from pairclf.config import (
    MAX_YAML,
    RENAMED,
    Config,
    deciding_settings,
    describe_config,
    dump_config,
    load_config,
    override,
    parse_yaml,
    resolve,
    run_folder,
    setting_changes,
    settings,
)
from pairclf.config.renamed import ELSEWHERE
from pairclf.errors import ConfigError
from pairclf.inference.ensemble import read_ensemble

ROOT = Path(__file__).parents[1]
SHIPPED = sorted(
    path for path in (ROOT / "configs").rglob("*.yaml") if path.parent.name not in ("accelerate", "deepspeed", "sweeps")
)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_every_shipped_config_is_read_by_the_cli(path: Path) -> None:
    result = CliRunner().invoke(app, ["config", str(path)])
    assert result.exit_code == 0, result.output
    assert resolve(parse_yaml(result.stdout, path)) == load_config(path)


def test_dump_and_description_read_back_as_the_same_config() -> None:
    config = resolve({"task": "wsdm", "train": {"learning_rate": 3e-5}, "predict": {"swap": "off"}})
    assert resolve(parse_yaml(dump_config(config), "dump")) == config
    assert resolve(parse_yaml(describe_config(config), "description")) == config


def test_every_setting_has_help() -> None:
    assert [key for key, help_text in settings(Config) if len(help_text) < 5] == []


def test_all_errors_are_shown_at_once_and_name_the_nearest_key() -> None:
    with pytest.raises(ConfigError) as caught:
        resolve({"train": {"lerning_rate": 1, "num_train_epochs": "many"}, "modl": {}, "seed": -1})
    text = str(caught.value)
    assert "4 settings" in text
    for part in (
        "train.lerning_rate",
        "train.learning_rate",
        "modl",
        "nearest is model",
        "train.num_train_epochs",
        "seed",
    ):
        assert part in text


@pytest.mark.parametrize(("former", "new"), RENAMED.items())
def test_a_former_key_is_refused_and_the_error_names_todays(former: str, new: str, tmp_path: Path) -> None:
    *sections, key = former.split(".")
    path = tmp_path / "x.yaml"
    path.write_text("".join(f"{name}: {{" for name in sections) + f"{key}: 1" + "}" * len(sections))
    for read in (lambda: override(Config(), [f"{former}=1"]), lambda: load_config(path)):
        with pytest.raises(ConfigError, match=rf"\n  {re.escape(former)} is now {re.escape(new)}\n"):
            read()


def test_a_misspelt_former_key_leads_to_todays() -> None:
    with pytest.raises(ConfigError, match=r"train\.epoch: no such setting; the nearest is train\.num_train_epochs"):
        override(Config(), ["train.epoch=2"])


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("train.lr", "pairclf calls it train.learning_rate"),
        ("num_fewshot", "pairclf calls it prompt.k"),
        ("lr", "pairclf calls it train.learning_rate"),
        ("train.gradient_accumulation_steps", "pairclf calls it train.global_batch_size"),
        ("model.name", "pairclf calls it model.base"),
        ("weight_decay", "its whole name is train.weight_decay"),
        ("train.r", "its whole name is model.lora.r"),
        ("epochs", "its whole name is train.num_train_epochs"),
        ("train.temperature", "its whole name is predict.temperature or train.distill.temperature"),
        ("train.learnin_rate", "the nearest is train.learning_rate"),
        ("task.label", "pairclf calls it task.label_column"),
        ("task.target", "pairclf calls it task.label_column"),
        ("train.trainBatchSize", "pairclf calls it train.global_batch_size"),
        ("folds.folds", "pairclf calls it folds.n_splits"),
        ("train.zebra", "no name is near to it"),
    ],
)
def test_a_name_of_another_library_or_section_leads_to_ours(key: str, meant: str) -> None:
    with pytest.raises(ConfigError, match=rf"\n  {re.escape(key)}: no such setting; {re.escape(meant)}\n"):
        override(Config(), [f"{key}=1"])


def test_names_of_other_libraries_lead_to_settings_and_are_none_themselves() -> None:
    known = {key for key, _ in settings(Config)}
    assert set(ELSEWHERE.values()) <= known
    assert not ELSEWHERE.keys() & {*known, *(key.rpartition(".")[2] for key in known)}


def test_every_renamed_key_leads_to_a_setting_and_is_none_itself() -> None:
    known = {key for key, _ in settings(Config)}
    assert set(RENAMED.values()) <= known
    assert not RENAMED.keys() & known


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"model": {"lora": None}}, "quantization=nf4 freezes"),
        ({"inputs": {"budget_shares": {"prompt": 0.2, "response_a": 0.5, "response_b": 0.3}}}, "must give response_a"),
        ({"inputs": {"budget_shares": {"prompt": 0.5, "response_a": 0.5, "response_b": 0.5}}}, "sum to at most 1"),
        ({"inputs": {"truncation": {"prompt": "head"}}}, "each of the task's fields"),
        ({"task": "imdb"}, "no preset"),
        ({"seed": 2**32}, "seed"),
        ({"train": {"num_train_epochs": float("inf")}}, "finite"),
        ({"folds": {"run": []}}, "at least 1 item"),
    ],
)
def test_contradictions_are_refused(tree: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        resolve(tree)


def test_overrides_lie_on_the_file_and_the_file_on_what_it_extends(tmp_path: Path) -> None:
    (tmp_path / "configs").mkdir()
    (tmp_path / "base.yaml").write_text("train: {num_train_epochs: 3, max_grad_norm: 0.5}\nseed: 1\n")
    path = tmp_path / "configs" / "x.yaml"
    path.write_text("extends: ../base.yaml\ntrain: {num_train_epochs: 2}\n")
    config = load_config(path, ["train.learning_rate=1e-5", "predict.swap=off", "model.lora.target_modules=[q_proj]"])
    assert (config.train.num_train_epochs, config.train.max_grad_norm, config.seed) == (2, 0.5, 1)
    assert config.train.learning_rate == 1e-5
    assert config.predict.swap == "off"  # a word, as in YAML 1.2, and not False
    assert config.model.lora is not None
    assert config.model.lora.target_modules == ["q_proj"]
    assert config.output_dir == Path("runs/x")


OVERRIDES = (
    ["prompt.k=0"],
    ["prompt.k=0", "prompt.rationale=8"],
    ["prompt.examples=nearest", "prompt.k=2"],
    ["inputs.template.preset=judge"],
    ["inputs.template.turns=interleaved"],
    ["model.readout=reward"],
    ["model.readout=head", "model.label_words={}"],
    ["train.max_steps=0"],
    ["model.lora=null", "model.quantization=none"],
    ["task=wsdm"],
)


@pytest.mark.parametrize("name", ["fewshot-gemma", "reward-gemma", "t5gemma", "arxiv-2512.12677-instruction"])
def test_a_saved_config_takes_overrides_as_its_source_does(name: str) -> None:
    """What was derived for it is derived anew: the wording, an example's template, a layout."""

    def outcome(read: Callable[[], Config]) -> str:
        try:
            return dump_config(read())
        except ConfigError as error:
            return str(error).partition("\n  where")[0]

    path = ROOT / f"configs/recipes/{name}.yaml"
    saved = resolve(parse_yaml(dump_config(load_config(path)), path))
    for overrides in OVERRIDES:
        read = outcome(lambda overrides=overrides: load_config(path, overrides))
        assert outcome(lambda overrides=overrides: override(saved, overrides)) == read, overrides
    if name == "fewshot-gemma":
        zero_shot = override(saved, ["prompt.k=0"])
        assert (zero_shot.num_examples, zero_shot.prompt.template) == (0, "")
        assert "{examples}" not in zero_shot.inputs.template.text


def test_what_was_set_stays_whatever_is_overridden(tmp_path: Path) -> None:
    text = "A{prompt}B{response_a}C{response_b}D"
    config = override(resolve({"inputs": {"template": {"text": text}}}), ["inputs.template.preset=judge"])
    assert config.inputs.template.text == text
    path = tmp_path / "a.yaml"
    path.write_text("inputs: {template: judge}", encoding="utf-8")
    template = load_config(path, ["inputs.template.add_special_tokens=true"]).inputs.template
    assert (template.preset, template.add_special_tokens) == ("judge", True), "and not the other preset"


@pytest.mark.parametrize("saved", [False, True])
@pytest.mark.parametrize("task", [{}, {"task": "lmsys"}, {"task": "wsdm"}])
def test_a_part_of_a_preset_task_can_be_replaced(task: dict[str, object], saved: bool) -> None:
    source, change = resolve({**task, "approach": "classical"}), ["task.metric=brier", "output_dir=x"]
    other = override(source, change) if saved else load_config({**task, "approach": "classical"}, change)
    assert other.task == source.task.model_copy(update={"metric": "brier"})


def test_a_setting_that_a_former_version_lacked_had_its_default() -> None:
    now = deciding_settings(resolve({"task": "lmsys", "model": {"base": "b"}}))
    for key in now:
        if "." in key and now[key] is not None:
            other = {name: value for name, value in now.items() if name != key}
            assert setting_changes(now, other).keys() <= {key}
    before = {key: value for key, value in now.items() if key != "model.lora.use_rslora"}
    assert setting_changes(now, before) == {}
    assert setting_changes(now | {"model.lora.use_rslora": True}, before).keys() == {"model.lora.use_rslora"}
    whole = deciding_settings(resolve({"task": "lmsys", "model": {"base": "b", "quantization": "none", "lora": None}}))
    assert "model.lora" in setting_changes(whole, now)
    assert "model.lora.r" in setting_changes(now, whole)


def test_a_circle_of_extends_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_text("extends: x.yaml\n")
    with pytest.raises(ConfigError, match="comes back"):
        load_config(path)


@pytest.mark.parametrize("text", ["- a list\n", "a: [1\n", "\x00", "a: " + "[" * 20_000])
def test_a_file_that_is_no_mapping_is_an_error(tmp_path: Path, text: str) -> None:
    path = tmp_path / "x.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError):
        load_config(path)


BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{name}: &{name} [{','.join(['*' + before] * 9)}]\n" for before, name in zip("abcdefghi", "bcdefghij", strict=True)
)
"""343 bytes that stand for three billion values."""

MERGED = "a: &a {x: 1}\n" + "".join(
    f"{name}: &{name} {{<<: [{','.join(['*' + before] * 9)}]}}\n"
    for before, name in zip("abcdefghi", "bcdefghij", strict=True)
)


@pytest.mark.parametrize("text", [BOMB, MERGED, "model:\n  label_words: &a [{x: *a}]\n", "- &a [*a]\n"])
def test_aliases_of_aliases_are_refused_in_few_words(tmp_path: Path, text: str) -> None:
    path = tmp_path / "x.yaml"
    path.write_text(text)
    for read in (
        lambda: load_config(path),
        lambda: read_ensemble([path]),
        lambda: override(Config(), [f"data={text}"]),
    ):
        with pytest.raises(ConfigError) as raised:
            read()
        assert len(str(raised.value)) < 1000


def test_an_alias_is_no_fault(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_text("data:\n  train: &a [x.csv]\n  ignore_columns: *a\n")
    assert load_config(path).data.ignore_columns == ["x.csv"]


LONG = "x" * 1_000_000


TREES: list[dict[str, object]] = [
    {"seed": LONG},
    {"seed": [LONG] * 1000},
    {"seed": 10**5000},
    {"task": LONG},
    {"seed": [[[[["x" * 1000] * 10] * 10] * 10] * 10] * 10},
    {LONG: 1},
    {f"setting{number}": 1 for number in range(5000)},
    {"model": {"label_words": {LONG: 1}}},
    {"folds": {"run": ["x"] * 5000}},
]


@pytest.mark.parametrize("tree", TREES, ids=range(len(TREES)))
def test_an_error_quotes_no_more_than_can_be_read(tree: dict[str, object]) -> None:
    with pytest.raises(ConfigError) as raised:
        resolve(tree)
    assert len(str(raised.value)) < 25_000


@pytest.mark.parametrize("tail", ["=1", "", "=[1", "=*x"])
def test_a_long_override_is_quoted_in_part(tail: str) -> None:
    with pytest.raises(ConfigError) as raised:
        override(resolve({}), [LONG + tail])
    assert len(str(raised.value)) < 25_000


EXTENDED = ["fifo", "/dev/zero", "/dev/stdin", "large.yaml", "http://host/x.yaml", "a\0b", LONG]


@pytest.mark.parametrize("extended", EXTENDED, ids=range(len(EXTENDED)))
def test_only_a_regular_file_is_extended(tmp_path: Path, extended: str) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "large.yaml").write_text("#" * (MAX_YAML + 1))
    path = tmp_path / "x.yaml"
    path.write_text(json.dumps({"extends": extended[:900_000]}))
    with pytest.raises(ConfigError, match=r"can't be read|there is no config|has the character U\+0000"):
        load_config(path)
    for name in ("fifo", "large.yaml"):
        with pytest.raises(ConfigError, match="can't be read"):
            read_ensemble([(tmp_path / name).rename(tmp_path / f"{name}.yaml")])


@pytest.mark.parametrize("wrong", ["train.num_train_epochs", "=3", "train.num_train_epochs=[1", "train.epoch=3"])
def test_a_malformed_override_is_an_error(wrong: str) -> None:
    with pytest.raises(ConfigError):
        override(resolve({}), [wrong])


def test_the_run_folder_mirrors_the_path_below_configs() -> None:
    assert run_folder(Path("configs/lmsys/a.yaml")) == Path("runs/lmsys/a")
    assert run_folder(Path("/somewhere/configs/b.yaml")) == Path("runs/b")
    assert run_folder(Path("mine/c.yaml")) == Path("runs/c")


def test_a_task_that_can_not_swap_shows_one_order() -> None:
    task = {"name": "t", "fields": ["text"], "classes": ["u", "v"], "label_column": "label"}
    assert resolve({"task": task}).train.swap == "none"
    with pytest.raises(ConfigError, match="has none"):
        resolve({"task": task, "train": {"swap": "random"}})


@pytest.mark.parametrize("path", sorted((ROOT / "configs" / "accelerate").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_accelerate_file_is_read_by_accelerate(path: Path) -> None:
    from accelerate.commands.config.config_args import load_config_from_file

    loaded = load_config_from_file(str(path))
    assert loaded.num_processes == 2
    assert not loaded.use_cpu
    settings_file = (getattr(loaded, "deepspeed_config", None) or {}).get("deepspeed_config_file")
    assert settings_file is None or "zero_optimization" in json.loads((ROOT / settings_file).read_text())


WORDS = {"winner_model_a": "a", "winner_model_b": "b", "winner_tie": "c"}
PROMPT: dict[str, Any] = {"approach": "prompt", "model": {"readout": "label_tokens", "label_words": WORDS}}


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"train": {"keep_weights": "best"}}, "keep_weights=best needs eval_steps"),
        ({"train": {"early_stopping_patience": 3}}, "early_stopping_patience=3 needs eval_steps"),
        ({"train": {"average_checkpoints": 3}}, "save_total_limit to 3 or more"),
        ({"train": {"average_checkpoints": 2, "save_steps": None}}, "set save_steps"),
        ({"train": {"average_checkpoints": 2, "ema_decay": 0.9}}, "each choose the weights"),
        ({"train": {"average_checkpoints": 2, "keep_weights": "best", "eval_steps": 9}}, "each choose the weights"),
        ({"train": {"consistency_weight": 0.1, "swap": "random"}}, "needs swap=both"),
        ({"train": {"adam_betas": [0.9, 1.0]}}, "from 0 to 1, 1 excluded"),
        ({"model": {"attn_implementation": "sdpa"}}, "set train.layout=padded"),
        ({"model": {"label_words": WORDS, "head": "two_layer"}}, "label_words initialise a linear head"),
        ({"model": {"label_words": {"winner_tie": "c"}}}, "it must name each class"),
        ({"model": {"label_words": WORDS | {"winner_tie": "a"}}}, "gives two classes the same word"),
        ({"model": {"label_words": WORDS | {"winner_tie": ["c", "d"]}}}, "needs one word for each class"),
        ({"model": {"label_scoring": "joint"}}, "changes nothing with readout=head"),
        (PROMPT | {"train": {"max_steps": 0}}, "train.max_steps changes nothing: approach=prompt does not read"),
        ({"prompt": {"k": 2}}, "prompt.k changes nothing: approach=finetune does not read the section prompt"),
        (
            {
                "approach": "classical",
                "inputs": {"max_length": 99},
                "model": {"base": "b", "dtype": "float32"},
                "train": {"learning_rate": 0.1},
            },
            "inputs.max_length, model.base, model.dtype, train.learning_rate change nothing: approach=classical does "
            "not read the sections inputs, model, train; remove what is set there, or set approach=finetune",
        ),
        ({"approach": "prompt"}, "approach=prompt leaves the head of model.readout=head at random"),
        (PROMPT | {"model": {**PROMPT["model"], "lora": {"r": 8}}}, "model.lora changes nothing: approach=prompt"),
        (PROMPT | {"prompt": {"k": 0, "max_length": 90}}, "max_length changes nothing with k=0"),
        (PROMPT | {"prompt": {"k": 0, "examples": "random"}}, "examples changes nothing with k=0"),
        (PROMPT | {"prompt": {"pool": 9}}, "pool=9 changes nothing with examples=fixed"),
        (PROMPT | {"prompt": {"template": "{prompt} {response_a}"}}, "prompt.template must contain {response_b}"),
        (
            PROMPT | {"inputs": {"template": {"text": "{prompt} {response_a} {response_b} {examples}{examples}:"}}},
            "inputs.template.text must contain {examples} exactly once",
        ),
        (
            {"inputs": {"template": {"text": "{examples}{prompt}{response_a}{response_b}:"}}},
            "contains {examples}; allowed placeholders",
        ),
        (
            {
                "task": {"name": "t", "fields": ["text"], "classes": ["u", "v"], "multi_label": True},
                "train": {"distill": {"scores": ["x.parquet"]}},
            },
            "multi_label",
        ),
        (
            {
                "task": {"name": "t", "fields": ["text"], "classes": ["u", "v"], "label_column": "label"},
                "train": {"consistency_weight": 0.5},
            },
            "has none",
        ),
    ],
)
def test_what_can_not_be_trained_or_prompted_is_refused_with_the_reason(tree: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        resolve(tree)


@pytest.mark.parametrize("escape", ["\\0", "\\uD800"])
@pytest.mark.parametrize("text", ['output_dir: "a{}b"', 'members: [{{bundle: "a{}b"}}]', '{{"a{}b": 1}}'])
def test_characters_that_no_path_can_have_are_refused(text: str, escape: str) -> None:
    """Whatever opens such a path raises no error of a file."""
    with pytest.raises(ConfigError, match=r"not valid YAML: .*has the character U\+(0000|D800)"):
        parse_yaml(text.format(escape), "a.yaml")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("data: {folder: a}\nseed: 1\ndata: {train: b.csv}", "the key 'data' stands twice in line 3, column 1"),
        ("members:\n- bundle: a\n  bundle: b", "the key 'bundle' stands twice in line 3, column 3"),
        ("task:\n\tname: a", "cannot start any token in line 2, column 1"),
    ],
)
def test_flaws_of_a_yaml_file_name_their_line(text: str, message: str) -> None:
    """YAML itself takes the last of two equal keys, and all that stands below the first would be lost."""
    with pytest.raises(ConfigError, match=message) as error:
        parse_yaml(text, "a.yaml")
    assert "indent with spaces, never tabs; write each key once" in str(error.value)


def test_a_runs_folder_in_place_of_a_config_leads_to_its_config(tmp_path: Path) -> None:
    (tmp_path / "run/fold0").mkdir(parents=True)
    (tmp_path / "run/fold0/config.yaml").write_text("seed: 1\n")
    with pytest.raises(ConfigError, match=r"it is a folder\n.*of this run: .*run/fold0/config\.yaml"):
        load_config(tmp_path / "run")
    with pytest.raises(ConfigError, match="without blanks around `=`"):
        override(Config(), ["seed", "=", "3"])


def test_missing_setting_is_explained_by_a_remedy_that_works(
    tmp_path: Path, cli: Callable[..., tuple[int, str]]
) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("task: {fields: [text], classes: [0, 1], label_column: y}")
    code, text = cli("config", path)
    assert code == 2
    assert "task.name is missing: add `name` below `task` (name of the task)" in text
    command = re.findall(r"remedy: `pairclf (\w+)` prints every setting", text)
    code, text = cli(*command)
    assert code == 0
    assert "swap_fields:" in text
    assert resolve(parse_yaml(describe_config(resolve({})), "printed")) == resolve({})


def test_labels_and_words_of_a_config_may_be_numbers() -> None:
    task = {"name": "t", "fields": ["text"], "classes": [0, 1], "label_column": "y"}
    data = {"train": {"files": "a.csv", "label_column": "y", "labels": {0: 1, True: 0}}}
    config = resolve({"task": task, "data": data, "model": {"label_words": {0: "no", 1: 1}}})
    assert config.data.train[0].labels == {"0": "1", "true": "0"}
    assert config.model.label_words == {"0": ["no"], "1": ["1"]}


def test_test_file_is_a_name_or_a_mapping() -> None:
    for value, file in (("t.csv", Path("data/t.csv")), ({"file": "t.csv"}, Path("data/t.csv")), (None, None)):
        assert resolve({"data": {"folder": "data", "test": value}}).data.test_file == file
    data = resolve({"data": {"test": {"file": "t.csv", "columns": {"id": "row", "prompt": "q"}}}}).data
    assert data.settled_submission.id == "row"
    data.submission.columns = {"winner_tie": "\N{HANDSHAKE} égalité"}
    assert data.of_bundle.test.columns == {"id": "row", "prompt": "q"}
    assert data.of_bundle.test_file is None
    bundle = override(resolve({}), data.naming)
    assert bundle.data.of_bundle == data.of_bundle
    other = override(bundle, ["data.test.columns.id=key", "data.submission.columns={}"]).data.settled_submission
    assert (other.id, other.columns) == ("key", {})
