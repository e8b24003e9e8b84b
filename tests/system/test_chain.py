"""The chain through the command line: files in, folds, bundles, scores, submission out; and what is wrong is said."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import polars as pl
import pytest
from safetensors.torch import load_file
from support.runs import TEST_ROWS, bundles_of, run_config
from support.wsdm import write_wsdm

from pairclf.bundles.bundle import open_bundle
from pairclf.bundles.inputs import builder_of
from pairclf.config import dump_config, load_config
from pairclf.data.scores import read_scores
from pairclf.demo.arena import generate, write_lmsys
from pairclf.inference.predict import predict
from pairclf.model.inputs import open_inputs
from pairclf.run import labelled_rows
from pairclf.runs.evaluate import evaluate, scored
from pairclf.runs.fit import fit
from pairclf.task import LMSYS

PACKAGE = ["package", "{config}", "package.owner=somebody"]
pytestmark = pytest.mark.usefixtures("quick_workers")


def write_config(folder: Path, base: Path, task: str = "lmsys", suffix: str = "csv") -> Path:
    """A config file on a small arena in `folder`."""
    data = {"train": [f"train.{suffix}"], "test": f"test.{suffix}"}
    config = run_config(folder, base, task, data=data, model={"quantization": "nf4"}, train={"max_steps": 2})
    path = folder / "config.yaml"
    path.write_text(dump_config(config))
    return path


@pytest.fixture
def run(trained_run: Callable[[str], Path]) -> Path:
    """A folder with arena, config, and a finished cross-validation under `run`; to read only."""
    return trained_run("gemma2")


def test_cv_scores_every_row_by_the_model_that_never_saw_it(run: Path) -> None:
    folds = pl.read_csv(run / "run" / "folds.csv", schema_overrides={"id": pl.String})
    oof = read_scores(run / "run" / "oof.parquet", LMSYS)
    assert sorted(oof["id"]) == sorted(folds["id"]) == sorted(pl.read_csv(run / "train.csv", infer_schema=False)["id"])
    joined = oof.join(folds, on="id")
    assert joined.select((pl.col("models").list.first() == "fold" + pl.col("fold").cast(pl.String)).all()).item()
    assert oof["orders"].unique().to_list() == [2]
    assert read_scores(run / "run" / "oof-ab.parquet", LMSYS)["orders"].unique().to_list() == [1]


def test_predict_has_the_samples_ids_in_its_order(
    run: Path, tmp_path: Path, cli: Callable[..., tuple[int, str]]
) -> None:
    sample = pl.read_csv(run / "sample_submission.csv", infer_schema=False).reverse()
    sample.write_csv(tmp_path / "sample.csv")
    out, scores = tmp_path / "submission.csv", tmp_path / "scores.parquet"
    code, text = cli(
        "predict", *bundles_of(run), "--data", run / "test.csv", "--sample", tmp_path / "sample.csv", "--out", out,
        "--scores", scores,
    )  # fmt: skip
    assert code == 0, text
    written = pl.read_csv(out, infer_schema=False)
    assert written.columns == sample.columns
    assert written["id"].to_list() == sample["id"].to_list()
    assert read_scores(scores, LMSYS)["models"].list.len().to_list() == [2] * TEST_ROWS


def test_predict_mirrors_the_scores_of_a_mirrored_file(run: Path, tmp_path: Path) -> None:
    """Swap TTA makes A and B exchangeable, row by row."""
    test = pl.read_csv(run / "test.csv", infer_schema=False)
    mirrored = test.rename({"response_a": "response_b", "response_b": "response_a"}).select(test.columns)
    mirrored.reverse().write_csv(tmp_path / "test.csv")
    straight = predict(bundles_of(run)[:1], run / "test.csv", tmp_path / "a.csv")
    swapped = predict(bundles_of(run)[:1], tmp_path / "test.csv", tmp_path / "b.csv")
    both = straight.join(swapped, on="id", suffix="_m")
    a, b, tie = LMSYS.classes
    for left, right in ((a, f"{b}_m"), (b, f"{a}_m"), (tie, f"{tie}_m")):
        assert (both[left] - both[right]).abs().max() <= 1e-5  # type: ignore[operator]


def test_predict_gives_a_row_the_same_scores_alone(run: Path, tmp_path: Path) -> None:
    test = pl.read_csv(run / "test.csv", infer_schema=False)
    test[3:4].write_csv(tmp_path / "one.csv")
    whole = predict(bundles_of(run)[:1], run / "test.csv", tmp_path / "a.csv")
    alone = predict(
        bundles_of(run)[:1], tmp_path / "one.csv", tmp_path / "b.csv", overrides=["predict.tokens_per_batch=1"]
    )
    assert alone["id"].to_list() == [test["id"][3]]
    difference = (
        whole.filter(pl.col("id") == test["id"][3]).select(LMSYS.classes).to_numpy()
        - alone.select(LMSYS.classes).to_numpy()
    )
    assert abs(difference).max() <= 1e-5


def test_predict_scores_one_order_with_swap_off(run: Path, tmp_path: Path) -> None:
    single = predict(bundles_of(run)[:1], run / "test.csv", tmp_path / "a.csv", overrides=["predict.swap=off"])
    assert single["orders"].unique().to_list() == [1]


def test_verify_accepts_and_refuses(run: Path, tmp_path: Path, cli: Callable[..., tuple[int, str]]) -> None:
    code, text = cli("verify", *bundles_of(run))
    assert code == 0, text
    assert text.count("verified") == 2
    copy = Path(shutil.copytree(bundles_of(run)[0], tmp_path / "bundle"))
    head = bytearray((copy / "head.safetensors").read_bytes())
    head[-1] ^= 1
    (copy / "head.safetensors").write_bytes(head)
    code, text = cli("verify", copy)
    assert code == 2
    assert "head.safetensors" in text
    assert "Traceback" not in text


def test_evaluate_knows_prior_swap_and_best(run: Path, cli: Callable[..., tuple[int, str]]) -> None:
    code, text = cli("evaluate", run / "config.yaml", "--truth", run / "truth.parquet")
    assert code == 0, text
    for words in ("class prior", "best possible", "the swap gained", "of the way"):
        assert words in text


def test_evaluate_calls_perfect_scores_the_best_possible(run: Path, tmp_path: Path) -> None:
    config = load_config(run / "config.yaml")
    labelled = labelled_rows(config)
    truth = pl.read_parquet(run / "truth.parquet").filter(pl.col("id").is_in(labelled["id"].implode()))
    perfect = truth.with_columns(orders=pl.lit(1, pl.Int32), models=pl.lit(["truth"]))
    perfect.select("id", *LMSYS.classes, "orders", "models").write_parquet(tmp_path / "s.parquet")
    judged = evaluate(labelled, scored(tmp_path / "s.parquet", LMSYS), LMSYS, truth=run / "truth.parquet")
    assert judged.best is not None
    assert judged.model["log_loss"] < judged.prior["log_loss"]
    assert judged.model["log_loss"] == pytest.approx(judged.best, abs=0.3)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["train", "{config}", "train.epoch=2"], "nearest is train.num_train_epochs"),
        (["train", "{config}", "--fold", "2"], "fold 2 does not exist"),
        (["train", "missing.yaml"], "there is no config missing.yaml"),
        (["train", "{config}", "data.train=[gone.csv]"], "gone.csv"),
        (["train", "{config}", "data.train=[]"], "data.train names no file"),
        (["cv", "{config}", "folds.run=[5]"], "fold 5 does not exist"),
        (["cv", "{config}", "folds.run=[0,0]"], "a fold twice"),
        (["cv", "{config}", "folds.n_splits=3"], "folds.csv"),
        (["evaluate", "{config}", "output_dir=nowhere"], "nowhere"),
        (["evaluate", "{config}", "--truth", "{folder}/test.csv"], "'winner_tie'] are missing; the file has ['id',"),
        (["verify", "nowhere"], "no bundle"),
        (["check", "{folder}/train.csv", "--task", "imdb"], "no preset"),
        (["predict", "{bundle}", "--data", "{folder}/nothing.csv"], "nothing.csv"),
        (["predict", "{bundle}", "--data", "{folder}/test.csv", "inputs.max_length=9"], "can't be set"),
        (["package", "{config}", "output_dir=nowhere"], "no bundle"),
        (PACKAGE, "package.base_model_source"),
        ([*PACKAGE, "package.base_model_source=a/b", "--out", "{folder}"], "will not be replaced"),
        (["predict", "{bundle}", "{bundle}", "--data", "{folder}/test.csv"], "given twice"),
        (["predict", "{bundle}", "--data", "{folder}/test.csv", "--out", "{folder}/test.csv"], "are the same"),
        (["predict", "{bundle}", "--data", "{folder}/test.csv", "--out", "{folder}"], "a folder"),
        (["check", "{folder}/train.csv", "--out", "{folder}/train.csv/audit.json"], "no folder"),
        (["rehearse", "{bundle}", "--test", "{folder}/test.csv", "--sample", "{folder}/test.csv"], "no package"),
    ],
    ids=lambda value: " ".join(value[:2]) if isinstance(value, list) else "",
)  # fmt: skip
def test_command_says_what_is_wrong_in_one_message_with_exit_code_2(
    run: Path, cli: Callable[..., tuple[int, str]], arguments: Sequence[str], words: str
) -> None:
    places = {"config": run / "config.yaml", "folder": run, "bundle": bundles_of(run)[0]}
    code, text = cli(*(argument.format(**places) for argument in arguments))
    assert code == 2
    assert words in text
    assert "error:" in text
    assert "Traceback" not in text


def test_train_refuses_a_row_that_leaks_into_both_sides(
    run: Path, cli: Callable[..., tuple[int, str]], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(run, tmp_path / "copy"))
    folds = pl.read_csv(folder / "run" / "folds.csv", infer_schema=False)
    shared = folds.filter(pl.col("group").is_duplicated())["id"][0]
    moved = (
        pl.when(pl.col("id") == shared).then(1 - pl.col("fold").cast(pl.Int64)).otherwise(pl.col("fold").cast(pl.Int64))
    )
    folds.with_columns(moved.alias("fold")).write_csv(folder / "run" / "folds.csv")
    code, text = cli(
        "train", run / "config.yaml", f"data.folder={folder}", f"output_dir={folder / 'run'}", "--fold", "0"
    )
    assert code == 2
    assert "share their id or prompt" in text


def test_predict_leaves_the_old_submission_on_a_full_disk(
    run: Path, tmp_path: Path, cli: Callable[..., tuple[int, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    import errno
    import os

    out = tmp_path / "submission.csv"
    out.write_text("old")

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(out))

    monkeypatch.setattr(os, "replace", full)
    code, text = cli("predict", bundles_of(run)[0], "--data", run / "test.csv", "--out", out)
    assert code == 2
    assert "No space left" in text
    assert "Traceback" not in text
    assert {entry.name for entry in tmp_path.iterdir()} == {"submission.csv", "submission.work"}  # the journal's
    assert out.read_text() == "old"


def test_predict_refuses_bundles_of_different_tasks(
    run: Path, tmp_path: Path, base_of: Callable[[str], Path], cli: Callable[..., tuple[int, str]]
) -> None:
    write_wsdm(generate(40, seed=2), tmp_path, n_test=10)
    path = write_config(tmp_path, base_of("llama"), "wsdm", "parquet")
    code, text = cli("train", path)
    assert code == 0, text
    other = tmp_path / "run" / "all" / "bundle"
    out, sample = tmp_path / "submission.csv", tmp_path / "sample_submission.csv"
    code, text = cli("predict", other, "--data", tmp_path / "test.parquet", "--sample", sample, "--out", out)
    assert code == 0, text
    assert set(pl.read_csv(tmp_path / "submission.csv")["winner"]) <= {"model_a", "model_b"}
    code, text = cli("predict", other, bundles_of(run)[0], "--data", run / "test.csv")
    assert code == 2
    assert "different tasks" in text


def test_train_gives_the_same_bytes_with_the_same_seed(
    run: Path, tmp_path: Path, cli: Callable[..., tuple[int, str]]
) -> None:
    code, text = cli("train", run / "config.yaml", f"output_dir={tmp_path}", "--fold", "0", "folds.n_splits=2")
    assert code == 0, text
    bundles = [bundles_of(run)[0], tmp_path / "fold0" / "bundle"]
    adapters = [(bundle / "adapter" / "adapter_model.safetensors").read_bytes() for bundle in bundles]
    assert adapters[0] == adapters[1]
    submissions = [tmp_path / f"{number}.csv" for number in range(2)]
    for bundle, submission in zip(bundles, submissions, strict=True):
        predict([bundle], run / "test.csv", submission)
    assert submissions[0].read_bytes() == submissions[1].read_bytes()


def test_pairclf_names_an_unknown_command() -> None:
    result = subprocess.run([sys.executable, "-m", "pairclf", "trian"], capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert "No such command" in result.stderr


def test_doctor_finds_this_machine_well(cli: Callable[..., tuple[int, str]]) -> None:
    code, text = cli("doctor")
    assert code == 0, text
    assert "nf4" in text


def test_check_and_predict_print_ids_that_look_like_markup(
    run: Path, tmp_path: Path, cli: Callable[..., tuple[int, str]]
) -> None:
    test = pl.read_csv(run / "test.csv", infer_schema=False)
    test.with_columns(id="[/b]" + pl.col("id"), response_b=pl.col("response_a")).write_csv(tmp_path / "[b].csv")
    code, text = cli("check", tmp_path / "[b].csv", "--unlabelled", "--out", tmp_path / "audit.json")
    assert code == 0, text
    assert "[/b]" in text
    code, text = cli("predict", bundles_of(run)[0], "--data", tmp_path / "[b].csv", "--out", tmp_path / "[b]s.csv")
    assert code == 0, text
    assert "[b]s.csv" in text


def test_check_writes_what_it_found(run: Path, tmp_path: Path, cli: Callable[..., tuple[int, str]]) -> None:
    code, text = cli("check", run / "train.csv", "--out", tmp_path / "audit.json")
    assert code == 0, text
    assert "Audit" in text
    assert json.loads((tmp_path / "audit.json").read_text())


def test_show_and_lengths_answer_on_the_runs_rows(
    run: Path, tmp_path: Path, cli: Callable[..., tuple[int, str]]
) -> None:
    config = run / "config.yaml"
    row = labelled_rows(load_config(config))["id"][5]
    code, shown = cli("show", config, "--row", row)
    assert code == 0
    assert f"row {row}, order AB" in shown
    assert f"row {row}, order BA" in shown
    test_id = pl.read_csv(run / "test.csv", infer_schema=False)["id"][0]
    assert f"row {test_id}, order BA" in cli("show", config, "--data", run / "test.csv", "--row", test_id)[1]
    code, shown = cli("show", config, "--row", "nobody")
    assert code == 2
    assert "nobody" in shown
    code, shown = cli("lengths", config, "--at", "100,200", "--rows", "25000", "--out", tmp_path)
    assert code == 0
    assert "What is cut" in shown
    assert {path.name for path in tmp_path.iterdir()} == {"lengths.json", "lengths.html"}
    assert cli("lengths", config, "--at", "5")[0] == 2


def test_cv_makes_one_token_cache_for_all_folds(run: Path) -> None:
    assert len(list((run / "run" / "tokens").glob("*/tokens.json"))) == 1


def test_bundle_keeps_the_wording_and_the_repairs_of_its_training(
    base_of: Callable[[str], Path], tmp_path: Path
) -> None:
    """The chat template is written out: a later one, or today's date in it, changes nothing that a model sees."""
    base = tmp_path / "base"
    shutil.copytree(base_of("llama"), base)
    template = "Today is {{ date_string }}.<start_of_turn>{{ messages[0]['content'] }}<end_of_turn>"
    (base / "chat_template.jinja").write_text(template)
    write_lmsys(generate(16, seed=1), tmp_path, n_test=4)
    rules = {"control_character": "fix"}
    path = write_config(tmp_path, base)
    config = load_config(path, ["inputs.template=judge", "inputs.max_length=400", f"data.rules={json.dumps(rules)}"])
    bundle = open_bundle(fit(config, None))
    assert config.inputs.template.apply_chat_template
    kept = bundle.config.inputs.template
    assert not kept.apply_chat_template
    assert kept.text.startswith("Today is 26 Jul 2024.<start_of_turn>Two assistants")
    assert bundle.config.data.rules.control_character == "fix"
    shown = builder_of(bundle).tokenizer
    assert shown.fingerprint == open_inputs(config).builder.tokenizer.fingerprint
    test = pl.read_csv(tmp_path / "test.csv", infer_schema=False)
    for name, text in (("plain", "Hi"), ("noisy", "\\u0000Hi\\u0007")):
        prompts = pl.Series("prompt", [f'["{text}"]'] * len(test))
        test.with_columns(prompts).write_csv(tmp_path / f"{name}.csv")
    plain, noisy = (
        predict([bundle.folder], tmp_path / f"{name}.csv", tmp_path / "s.csv") for name in ("plain", "noisy")
    )
    assert plain.equals(noisy)


@pytest.mark.parametrize(("name", "task", "suffix"), [("arena3", "lmsys", "csv"), ("arena2", "wsdm", "parquet")])
def test_train_and_predict_on_real_rows_and_a_real_checkpoint(
    shared: Path, tmp_path: Path, cli: Callable[..., tuple[int, str]], name: str, task: str, suffix: str
) -> None:
    """Rows that people wrote, and a Llama that nobody here made."""
    config = write_config(tmp_path, shared / "models" / "stories260K", task, suffix)
    data = shared / "data" / name
    code, text = cli("train", config, f"data.folder={data}", "data.max_rows=60", "--fold", "0", "folds.n_splits=2")
    assert code == 0, text
    test = (
        pl.read_csv(data / "test.csv", infer_schema=False)
        if suffix == "csv"
        else pl.read_parquet(data / "test.parquet")
    )
    sample = pl.read_csv(data / "sample_submission.csv", infer_schema=False)
    files = {"test": tmp_path / f"test.{suffix}", "sample": tmp_path / "sample.csv", "out": tmp_path / "submission.csv"}
    few = test.sample(40, seed=0, shuffle=True)
    few.write_csv(files["test"]) if suffix == "csv" else few.write_parquet(files["test"])
    sample = sample.filter(pl.col("id").is_in(few["id"].implode()))
    sample.write_csv(files["sample"])
    code, text = cli("predict", tmp_path / "run/fold0/bundle", "--data", files["test"], "--sample", files["sample"],
                     "--out", files["out"])  # fmt: skip
    assert code == 0, text
    written = pl.read_csv(files["out"], infer_schema=False)
    assert written["id"].to_list() == sample["id"].to_list()
    assert written.columns == sample.columns


@pytest.mark.thorough
def test_torchrun_trains_the_weights_of_one_process(run: Path, tmp_path: Path) -> None:
    """torchrun over gloo; `accelerate launch --cpu --num_processes 2` would silently run one."""
    settings = [
        "model.lora.lora_dropout=0",
        "train.per_device_train_batch_size=3",
        "train.global_batch_size=7",
        "folds.n_splits=2",
        "--fold",
        "0",
    ]
    adapters = []
    for count in (1, 2):
        output = tmp_path / str(count)
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(count)]
        command = [*launch, "-m", "pairclf", "train", str(run / "config.yaml"), f"output_dir={output}", *settings]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert f"over {count} process" in " ".join(done.stderr.split())
        adapters.append(load_file(output / "fold0" / "bundle" / "adapter" / "adapter_model.safetensors"))
    one, two = adapters
    assert max(float((one[name] - two[name]).abs().max()) for name in one) <= 1e-5


@pytest.mark.parametrize("lora", ["{r: 2}", "null"], ids=["adapter", "whole"])
def test_verify_accepts_a_model_trained_in_bfloat16(
    run: Path, tmp_path: Path, cli: Callable[..., tuple[int, str]], lora: str
) -> None:
    settings = [
        "model.dtype=bfloat16",
        "model.quantization=none",
        f"model.lora={lora}",
        "train.max_steps=1",
        "folds.n_splits=2",
    ]
    code, text = cli("train", run / "config.yaml", f"output_dir={tmp_path}", "--fold", "0", *settings)
    assert code == 0, text
    code, text = cli("verify", tmp_path / "fold0" / "bundle")
    assert code == 0, text
