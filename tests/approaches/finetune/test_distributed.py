"""Several processes: the weights of one, one word about what went wrong, and no mix that can't work."""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from accelerate.utils import DistributedType
from encoder_decoders_support import tiny_encoder_decoder
from safetensors.torch import load_file
from support.forked import forked

from pairclf.approaches.finetune import distributed as launch
from pairclf.approaches.finetune.distributed import (
    ILLEGAL_SETTINGS,
    check_settings,
    gathered_weights,
    make_accelerator,
    mode_of,
    prepare_model,
)
from pairclf.approaches.finetune.optimizers import make_optimizer, trained_weights
from pairclf.bundles.bundle import open_bundle
from pairclf.config import Config, dump_config, load_config, resolve
from pairclf.demo.arena import generate, write_lmsys
from pairclf.errors import ConfigError
from pairclf.model.engine import Classifier, build
from pairclf.runs import processes
from pairclf.runs.fit import fit
from pairclf.runs.processes import WorkerError, run_processes

ROOT = Path(__file__).parents[3]
LAUNCHES = sorted((ROOT / "configs" / "accelerate").glob("*.yaml"))
ENGINES = sorted((ROOT / "configs" / "deepspeed").glob("*.json"))


def arena(folder: Path, base: Path, name: str, **sections: dict[str, Any]) -> tuple[Path, Config]:
    """A config on a small arena in `folder`, whose uneven steps end in batches that one process has and one has not."""
    tree: dict[str, dict[str, Any]] = {
        "data": {"folder": str(folder), "train": ["train.csv"]},
        "folds": {"n_splits": 2},
        "inputs": {"max_length": 128},
        "model": {"base": str(base), "quantization": "none", "lora": {"r": 2, "lora_dropout": 0.0}},
        "train": {
            "max_steps": 3,
            "global_batch_size": 7,
            "per_device_train_batch_size": 3,
            "learning_rate": 1e-3,
            "logging_steps": 1,
        },
    }
    for section, values in sections.items():
        tree[section] = {**tree[section], **values}
    config = resolve({"task": "lmsys", "output_dir": str(folder / name), **tree})
    path = folder / f"{name}.yaml"
    path.write_text(dump_config(config))
    return path, config


def saved(run: Path) -> dict[str, torch.Tensor]:
    bundle = open_bundle(run / "fold0" / "bundle")
    weights = next((bundle.files.adapter if bundle.config.model.lora else bundle.files.backbone).glob("*.safetensors"))
    return load_file(weights) | load_file(bundle.folder / "head.safetensors")


def logged(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "fold0" / "metrics.jsonl").read_text().splitlines()]


def assert_same_training(one: Path, other: Path) -> None:
    """The gradients' norms are compared, too: AdamW moves alike with gradients that are twice as large."""
    left, right = saved(one), saved(other)
    assert left.keys() == right.keys()
    assert max(float((left[name] - right[name]).abs().max()) for name in left) <= 1e-5
    for was, is_now in zip(logged(one), logged(other), strict=True):
        for name in ("loss", "gradient_norm", "learning_rate"):
            assert is_now[name] == pytest.approx(was[name], rel=1e-4)


def in_two_processes(
    folder: Path, function: Callable[..., None], *arguments: object, environment: dict[str, str] | None = None
) -> list[str]:
    """Run it in two processes that know of each other, as `run_processes` would start them; returns what they print."""
    shared = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    outputs = [folder / f"{rank}.output" for rank in range(2)]
    workers = [
        forked(
            as_worker,
            {**shared, **(environment or {}), "RANK": str(rank), "LOCAL_RANK": str(rank)},
            function,
            *arguments,
            output=output,
        )
        for rank, output in enumerate(outputs)
    ]
    for worker in workers:
        worker.join()
    texts = [" ".join(output.read_text().split()) for output in outputs]
    assert [worker.exitcode for worker in workers] == [0, 0], texts
    return texts


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def as_worker(environment: dict[str, str], function: Callable[..., None], *arguments: object) -> None:
    os.environ.update(environment)
    function(*arguments)


def fit_first_fold(path: Path) -> None:
    fit(load_config(path), 0)


MODELS: dict[str, dict[str, Any]] = {
    "gemma2": {"model": {"quantization": "nf4"}},
    "bert": {"model": {"lora": None, "pooling": "mean"}},
    "t5": {"model": {"lora": {"r": 2, "lora_dropout": 0.0}}, "train": {"layout": "padded"}},
}
"""A base of each family, and how it is trained."""


@pytest.mark.parametrize("kind", ["gemma2", "bert", pytest.param("t5", marks=pytest.mark.thorough)])
def test_fit_in_two_processes_trains_the_weights_of_one(
    tmp_path: Path, base_of: Callable[[str], Path], without_forecast: None, kind: str
) -> None:
    write_lmsys(generate(40, seed=1), tmp_path, n_test=4)
    if kind == "t5":
        tiny_encoder_decoder(kind, base := tmp_path / "base")
    else:
        base = base_of(kind)
    _, config = arena(tmp_path, base, "one", **MODELS[kind])
    fit(config, 0)
    path, _ = arena(tmp_path, base, "two", **MODELS[kind])
    in_two_processes(tmp_path, fit_first_fold, path)
    assert_same_training(tmp_path / "one", tmp_path / "two")


@pytest.mark.thorough
@pytest.mark.slow
def test_processes_2_trains_the_weights_of_one(
    tmp_path: Path, base_of: Callable[[str], Path], cli: Callable[..., tuple[int, str]]
) -> None:
    write_lmsys(generate(40, seed=1), tmp_path, n_test=4)
    path, config = arena(tmp_path, base_of("gemma2"), "one", model={"quantization": "nf4"})
    fit(config, 0)
    code, text = cli("train", path, "--fold", "0", f"output_dir={tmp_path / 'two'}", "--processes", "2")
    assert code == 0, text
    assert_same_training(tmp_path / "one", tmp_path / "two")


def fit_with_little_memory(path: Path) -> None:
    """The second process has none for batches of more than 300 tokens."""
    forward = Classifier.forward

    def limited(self: Classifier, inputs: Any, *more: Any, **named: Any) -> torch.Tensor:
        if os.environ["RANK"] == "1" and self.training and inputs["input_ids"].numel() > 300:
            raise torch.OutOfMemoryError("a test's")
        return forward(self, inputs, *more, **named)

    Classifier.forward = limited  # type: ignore[method-assign]
    fit_first_fold(path)


def test_fit_in_two_processes_halves_the_batches_of_all_if_one_lacks_memory(
    tmp_path: Path, base_of: Callable[[str], Path]
) -> None:
    write_lmsys(generate(40, seed=1), tmp_path, n_test=4)
    _, config = arena(tmp_path, base_of("gemma2"), "one")
    fit(config, 0)
    path, _ = arena(tmp_path, base_of("gemma2"), "two")
    texts = in_two_processes(tmp_path, fit_with_little_memory, path)
    assert "out of memory at step 1" in texts[0]
    assert_same_training(tmp_path / "one", tmp_path / "two")


def fit_with_engine(mode: str, paths: list[Path]) -> None:
    for path in paths:
        config = load_config(path, [f"output_dir={path}-{mode}"])
        assert mode_of(make_accelerator(config)) == mode
        fit(config, 0)


@pytest.mark.thorough
@pytest.mark.slow
@pytest.mark.parametrize(("mode", "models"), [("zero2", ["none", "nf4"]), ("zero3", ["none"])], ids=["zero2", "zero3"])
def test_fit_under_deepspeed_trains_the_weights_of_one_process(
    tmp_path: Path, base_of: Callable[[str], Path], mode: str, models: list[str]
) -> None:
    """One after the other in the same processes, as `cv` trains folds."""
    pytest.importorskip("deepspeed")
    write_lmsys(generate(40, seed=1), tmp_path, n_test=4)
    runs = [arena(tmp_path, base_of("llama"), name, model={"quantization": name}) for name in models]
    for _, config in runs:
        fit(config, 0)
    settings = str(ROOT / "configs" / "deepspeed" / f"{mode}.json")
    environment = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_CONFIG_FILE": settings}
    in_two_processes(tmp_path, fit_with_engine, mode, [path for path, _ in runs], environment=environment)
    for path, config in runs:
        assert config.output_dir is not None
        assert_same_training(config.output_dir, Path(f"{path}-{mode}"))


# --- what the parent does about its workers; those below do no more than fail ---


@pytest.fixture
def work(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., int]:
    """`work(script)`: two processes of a script that knows its `rank`, in a folder of its own."""
    start = "import os, signal, sys, time\nfrom pathlib import Path\nfrom pairclf.runs.processes import *\n"
    start += f"become_worker(); rank = int(os.environ['RANK']); os.chdir({str(tmp_path)!r})\n"

    def run(script: str) -> int:
        monkeypatch.setattr(processes, "COMMAND", (sys.executable, "-c", start + script))
        return run_processes(2, [])

    return run


def test_run_processes_workers_know_of_each_other_and_share_the_cores(
    work: Callable[..., int], monkeypatch: Any
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS")
    threads = max(1, len(os.sched_getaffinity(0)) // 2)
    script = "assert os.environ['WORLD_SIZE'] == '2' and os.environ['LOCAL_RANK'] == str(rank)\n"
    assert work(f"{script}assert os.environ['OMP_NUM_THREADS'] == '{threads}'") == 0


def test_run_processes_raises_an_error_of_all_workers_once(work: Callable[..., int]) -> None:
    with pytest.raises(WorkerError, match=r"^the disk is full$") as caught:
        work("leave_error('the disk is full'); sys.exit(2)")
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("rank", [0, 1])
def test_run_processes_ends_the_other_worker_after_an_error_of_one(
    work: Callable[..., int], monkeypatch: Any, rank: int
) -> None:
    monkeypatch.setattr(processes, "GRACE", 0.5)
    with pytest.raises(WorkerError, match="row 7"):
        work(f"if rank != {rank}: time.sleep(600)\nleave_error('row 7 is bad'); sys.exit(2)")


@pytest.mark.parametrize("rank", [0, 1])
def test_run_processes_names_a_killed_worker_and_ends_the_other(
    work: Callable[..., int], monkeypatch: Any, rank: int
) -> None:
    monkeypatch.setattr(processes, "GRACE", 0.5)
    with pytest.raises(WorkerError, match=f"process {rank} of 2 was ended by SIGKILL") as caught:
        work(f"if rank == {rank}: os.kill(os.getpid(), signal.SIGKILL)\ntime.sleep(600)")
    assert caught.value.exit_code == 128 + signal.SIGKILL


def test_run_processes_shows_the_traceback_of_the_first_to_fail(
    work: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    later = """
first = Path(os.environ[ERRORS], "1.traceback")
while not rank and not first.exists():
    time.sleep(0.05)
time.sleep(0.1)  # the times of two files are told apart in hundredths of a second
raise ValueError(f"bug in {rank}")
"""
    assert work(later) == 1
    shown = capsys.readouterr().err
    assert "ValueError: bug in 1" in shown
    assert shown.count("Traceback") == 1


def test_run_processes_passes_sigterm_on_and_waits(work: Callable[..., int], tmp_path: Path) -> None:
    """A worker that writes a checkpoint for longer than `GRACE`, while the other has left long ago."""
    script = """
def save(number, frame):
    time.sleep(0 if rank else processes_grace)
    Path(f"saved{rank}").touch()
    leave_error("stopped; go on with --resume")
    sys.exit(143)
processes_grace = 1.5
signal.signal(signal.SIGTERM, save)
Path(f"ready{rank}").touch()
time.sleep(600)
"""

    def interrupt() -> None:
        while len(list(tmp_path.glob("ready*"))) < 2:
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    before, grace = signal.getsignal(signal.SIGTERM), processes.GRACE
    processes.GRACE = 0.2
    threading.Thread(target=interrupt, daemon=True).start()
    try:
        with pytest.raises(WorkerError, match="--resume") as caught:
            work(script)
    finally:
        processes.GRACE = grace
    assert caught.value.exit_code == 143
    assert {path.name for path in tmp_path.glob("saved*")} == {"saved0", "saved1"}
    assert signal.getsignal(signal.SIGTERM) is before


def test_processes_option_is_refused_under_a_launcher(
    config_for: Callable[..., Config], cli: Callable[..., tuple[int, str]], monkeypatch: Any, tmp_path: Path
) -> None:
    (tmp_path / "config.yaml").write_text(dump_config(config_for()))
    monkeypatch.setenv("LOCAL_RANK", "0")
    code, text = cli("train", tmp_path / "config.yaml", "--processes", "2")
    assert code == 2
    assert "LOCAL_RANK is set" in text


# --- what can't work is refused ---


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"ACCELERATE_MIXED_PRECISION": "no", "MASTER_PORT": "29500"}, "asked for several processes and started one"),
        ({"ACCELERATE_USE_FSDP": "true"}, "runs FSDP only on GPUs"),
    ],
)
def test_make_accelerator_refuses_a_launch_that_is_not_what_it_says(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], words: str
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=words):
        make_accelerator(resolve({}))


def test_make_accelerator_refuses_more_processes_than_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "pick_device", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    with pytest.raises(ConfigError, match=r"3 processes .* 2 GPU"):
        make_accelerator(resolve({}))


def launched(mode: str) -> Any:
    """What `mode_of` reads of an Accelerator."""
    kinds = {"plain": DistributedType.MULTI_CPU, "fsdp": DistributedType.FSDP}
    plugin = SimpleNamespace(zero_stage=int(mode.removeprefix("zero")) if "zero" in mode else 0)
    return SimpleNamespace(
        distributed_type=kinds.get(mode, DistributedType.DEEPSPEED),
        state=SimpleNamespace(deepspeed_plugin=plugin),
        device=torch.device("cpu"),
    )


LABELS = {"readout": "label_tokens", "label_words": {"winner_model_a": "A", "winner_model_b": "B", "winner_tie": "t"}}

BREAKING = {
    "train.loss": {"model": LABELS, "train": {"loss": "vocabulary"}},
    "model.label_scoring": {"model": {**LABELS, "label_scoring": "joint"}},
    "model.quantization": {"model": {"quantization": "nf4"}},
    "model.dtype": {"model": {"dtype": "float16"}},
    "train.optim": {"train": {"optim": "adafactor"}},
    "train.eval_steps": {"train": {"eval_steps": 5, "keep_weights": "best"}},
    "train.ema_decay": {"train": {"ema_decay": 0.9}},
    "train.average_checkpoints": {"train": {"average_checkpoints": 2}},
}
"""Of each setting that `ILLEGAL` names, a value that it refuses."""


@pytest.mark.parametrize(
    ("mode", "setting"),
    [(mode, entry[1]) for entry in ILLEGAL_SETTINGS for mode in entry[0]],
    ids=lambda value: str(value),
)
def test_refuse_illegal_gives_reason_and_remedy(mode: str, setting: str) -> None:
    config = resolve({**BREAKING[setting], "model": {"quantization": "none", **BREAKING[setting].get("model", {})}})
    assert mode_of(launched(mode)) == mode
    with pytest.raises(ConfigError, match=f"{setting}=.* can't be trained under .*: ") as caught:
        check_settings(config, launched(mode))
    assert caught.value.remedy
    check_settings(config, launched("plain"))
    check_settings(resolve({"model": {"quantization": "none"}}), launched(mode))


def test_refuse_illegal_allows_qlora_with_zero2_alone() -> None:
    config = resolve({"model": {"quantization": "nf4"}})
    refused = []
    for mode in ("plain", "zero2", "zero3", "fsdp"):
        try:
            check_settings(config, launched(mode))
        except ConfigError:
            refused.append(mode)
    assert refused == ["zero3", "fsdp"]


def test_gathered_weights_are_the_trained_ones_in_float32(config_for: Callable[..., Config]) -> None:
    config = config_for("llama", model={"dtype": "bfloat16"})
    accelerator = make_accelerator(config)
    classifier = build(config, accelerator.device)
    model, _ = prepare_model(accelerator, classifier, make_optimizer(classifier, config.train))
    weights = gathered_weights(accelerator, model)
    assert weights.keys() == trained_weights(classifier).keys()
    assert {one.dtype for one in weights.values()} == {torch.float32}
    assert all(torch.equal(weights[name], one.float()) for name, one in trained_weights(classifier).items())


# --- what is shipped ---


@pytest.mark.parametrize("path", LAUNCHES, ids=lambda path: path.stem)
def test_accelerate_reads_the_shipped_launch_configs(path: Path) -> None:
    """Unknown keys at the top are refused by Accelerate; those of its sections it would pass over."""
    config: Any = load_config_from_file(str(path))
    known = {name for action in launch_command_parser()._actions for name in action.option_strings}
    sections = yaml.safe_load(path.read_text())
    for name in [*sections.get("fsdp_config", {}), *sections.get("deepspeed_config", {})]:
        assert f"--{name}" in known
    if file := sections.get("deepspeed_config", {}).get("deepspeed_config_file"):
        assert ROOT / file in ENGINES
    assert config.num_processes == 2
    assert config.mixed_precision in (None, "no")  # model.dtype decides it


@pytest.mark.parametrize("path", ENGINES, ids=lambda path: path.stem)
def test_deepspeed_reads_the_shipped_configs(path: Path) -> None:
    zero = pytest.importorskip("deepspeed.runtime.zero.config")
    tree = json.loads(path.read_text())
    assert tree.keys() == {"zero_optimization"}  # the rest is pairclf's to say
    assert f"zero{zero.DeepSpeedZeroConfig(**tree['zero_optimization']).stage}" == path.stem
