"""Several processes: the weights of one, one word about what went wrong, and no mix that can't work."""

from __future__ import annotations

import json
import os
import signal
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
from safetensors.torch import load_file

from pairclf.config import Config, dump_config, resolve
from pairclf.data.arena import generate, write_lmsys
from pairclf.errors import ConfigError
from pairclf.jobs import launch, processes
from pairclf.jobs.fit import fit
from pairclf.jobs.launch import ILLEGAL, gathered_weights, make_accelerator, mode_of, prepare_model, refuse_illegal
from pairclf.jobs.optimizers import make_optimizer, trained_weights
from pairclf.jobs.processes import WorkerError, run_processes
from pairclf.model.engine import build

ROOT = Path(__file__).parents[2]
LAUNCHES = sorted((ROOT / "configs" / "accelerate").glob("*.yaml"))
ENGINES = sorted((ROOT / "configs" / "deepspeed").glob("*.json"))


def arena(folder: Path, base: Path, name: str, **sections: dict[str, Any]) -> tuple[Path, Config]:
    """A config on a small arena in `folder`, whose uneven steps end in batches that one process has and one has not."""
    tree: dict[str, dict[str, Any]] = {
        "data": {"folder": str(folder), "train": ["train.csv"]},
        "folds": {"n": 2},
        "inputs": {"max_length": 128},
        "model": {"base": str(base), "quantization": "none", "lora": {"rank": 2, "dropout": 0.0}},
        "train": {"max_steps": 3, "rows_per_step": 7, "rows_per_batch": 3, "learning_rate": 1e-3, "log_every": 1},
    }
    for section, values in sections.items():
        tree[section] = {**tree[section], **values}
    config = resolve({"task": "lmsys", "output": str(folder / name), **tree})
    path = folder / f"{name}.yaml"
    path.write_text(dump_config(config))
    return path, config


def saved(run: Path) -> dict[str, torch.Tensor]:
    bundle = run / "fold0" / "bundle"
    return load_file(bundle / "adapter" / "adapter_model.safetensors") | load_file(bundle / "head.safetensors")


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


@pytest.mark.slow
def test_processes_2_trains_the_weights_of_one(
    tmp_path: Path, base_of: Callable[[str], Path], cli: Callable[..., tuple[int, str]]
) -> None:
    write_lmsys(generate(40, seed=1), tmp_path, n_test=4)
    path, config = arena(tmp_path, base_of("gemma2"), "one", model={"quantization": "nf4"})
    fit(config, 0)
    code, text = cli("train", path, "--fold", "0", f"output={tmp_path / 'two'}", "--processes", "2")
    assert code == 0, text
    assert_same_training(tmp_path / "one", tmp_path / "two")


SMALL_RUN = """
import os, sys
from pathlib import Path
from pairclf.jobs.processes import become_worker
become_worker()
import torch
from pairclf.config import load_config
from pairclf.jobs.fit import fit
from pairclf.model.engine import Classifier
forward = Classifier.forward
def small(self, inputs, *more, **named):
    if os.environ["RANK"] == "1" and self.training and inputs["input_ids"].numel() > 300:
        raise torch.OutOfMemoryError("a test's")
    return forward(self, inputs, *more, **named)
Classifier.forward = small
fit(load_config(Path(sys.argv[1])), 0)
"""


@pytest.mark.thorough
@pytest.mark.slow
def test_one_process_without_memory_halves_the_batches_of_all(
    tmp_path: Path, base_of: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    write_lmsys(generate(40, seed=1), tmp_path, n_test=4)
    _, config = arena(tmp_path, base_of("gemma2"), "one")
    fit(config, 0)
    path, _ = arena(tmp_path, base_of("gemma2"), "two")
    monkeypatch.setattr(processes, "COMMAND", (sys.executable, "-c", SMALL_RUN))
    assert run_processes(2, [str(path)]) == 0
    assert "out of memory at step 1" in " ".join(capfd.readouterr().err.split())
    assert_same_training(tmp_path / "one", tmp_path / "two")


ENGINE_RUN = """
import sys
from pathlib import Path
from pairclf.jobs.processes import become_worker
become_worker()
from pairclf.config import load_config
from pairclf.jobs.fit import fit
from pairclf.jobs.launch import make_accelerator, mode_of
mode, *paths = sys.argv[1:]
for path in paths:
    config = load_config(Path(path), [f"output={path}-{mode}"])
    assert mode_of(make_accelerator(config)) == mode
    fit(config, 0)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mode", "models"), [("zero2", ["none", "nf4"]), pytest.param("zero3", ["none"], marks=pytest.mark.thorough)]
)
def test_deepspeed_trains_the_weights_of_one_process(
    tmp_path: Path, base_of: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, mode: str, models: list[str]
) -> None:
    """LoRA and QLoRA, one after the other in the same processes, as `cv` trains folds."""
    pytest.importorskip("deepspeed")
    write_lmsys(generate(40, seed=1), tmp_path, n_test=4)
    made = [arena(tmp_path, base_of("llama"), name, model={"quantization": name}) for name in models]
    for _, config in made:
        fit(config, 0)
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", str(ROOT / "configs" / "deepspeed" / f"{mode}.json"))
    monkeypatch.setattr(processes, "COMMAND", (sys.executable, "-c", ENGINE_RUN))
    assert run_processes(2, [mode, *(str(path) for path, _ in made)]) == 0
    for path, config in made:
        assert config.output is not None
        assert_same_training(config.output, Path(f"{path}-{mode}"))


# --- what the parent does about its workers; those below do no more than fail ---


@pytest.fixture
def work(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., int]:
    """`work(script)`: two processes of a script that knows its `rank`, in a folder of its own."""
    start = "import os, signal, sys, time\nfrom pathlib import Path\nfrom pairclf.jobs.processes import *\n"
    start += f"become_worker(); rank = int(os.environ['RANK']); os.chdir({str(tmp_path)!r})\n"

    def run(script: str) -> int:
        monkeypatch.setattr(processes, "COMMAND", (sys.executable, "-c", start + script))
        return run_processes(2, [])

    return run


def test_workers_know_of_each_other_and_share_the_cores(work: Callable[..., int], monkeypatch: Any) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS")
    threads = max(1, len(os.sched_getaffinity(0)) // 2)
    script = "assert os.environ['WORLD_SIZE'] == '2' and os.environ['LOCAL_RANK'] == str(rank)\n"
    assert work(f"{script}assert os.environ['OMP_NUM_THREADS'] == '{threads}'") == 0


def test_an_error_of_all_workers_is_said_once_with_its_exit_code(work: Callable[..., int]) -> None:
    with pytest.raises(WorkerError, match=r"^the disk is full$") as caught:
        work("leave_error('the disk is full'); sys.exit(2)")
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("rank", [0, 1])
def test_an_error_of_one_worker_ends_the_other_which_waits_for_it(
    work: Callable[..., int], monkeypatch: Any, rank: int
) -> None:
    monkeypatch.setattr(processes, "GRACE", 0.5)
    with pytest.raises(WorkerError, match="row 7"):
        work(f"if rank != {rank}: time.sleep(600)\nleave_error('row 7 is bad'); sys.exit(2)")


@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_worker_ends_the_other_and_is_named(work: Callable[..., int], monkeypatch: Any, rank: int) -> None:
    monkeypatch.setattr(processes, "GRACE", 0.5)
    with pytest.raises(WorkerError, match=f"process {rank} of 2 was ended by SIGKILL") as caught:
        work(f"if rank == {rank}: os.kill(os.getpid(), signal.SIGKILL)\ntime.sleep(600)")
    assert caught.value.exit_code == 128 + signal.SIGKILL


def test_the_traceback_of_the_first_to_fail_is_the_one_that_is_shown(
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


def test_sigterm_reaches_the_workers_which_are_waited_for(work: Callable[..., int], tmp_path: Path) -> None:
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


def test_processes_under_a_launcher_are_refused(
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
        ({"ACCELERATE_USE_FSDP": "true"}, "runs it on GPUs alone"),
    ],
)
def test_a_launch_that_is_not_what_it_says_is_refused(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], words: str
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=words):
        make_accelerator(resolve({}))


def test_more_processes_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
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


BREAKING = {
    "model.quantization": {"model": {"quantization": "nf4"}},
    "model.dtype": {"model": {"dtype": "float16"}},
    "train.optimizer": {"train": {"optimizer": "adafactor"}},
    "train.evaluate_every": {"train": {"evaluate_every": 5, "keep": "best"}},
    "train.ema": {"train": {"ema": 0.9}},
    "train.average_last": {"train": {"average_last": 2}},
}
"""Of each setting that `ILLEGAL` names, a value that it refuses."""


@pytest.mark.parametrize(
    ("mode", "setting"), [(mode, entry[1]) for entry in ILLEGAL for mode in entry[0]], ids=lambda value: str(value)
)
def test_an_illegal_mix_is_refused_with_reason_and_remedy(mode: str, setting: str) -> None:
    config = resolve({**BREAKING[setting], "model": {"quantization": "none", **BREAKING[setting].get("model", {})}})
    assert mode_of(launched(mode)) == mode
    with pytest.raises(ConfigError, match=f"{setting}=.* can't be trained under .*: ") as caught:
        refuse_illegal(config, launched(mode))
    assert caught.value.remedy
    refuse_illegal(config, launched("plain"))
    refuse_illegal(resolve({"model": {"quantization": "none"}}), launched(mode))


def test_qlora_goes_with_zero_2_and_not_with_zero_3() -> None:
    config = resolve({"model": {"quantization": "nf4"}})
    refused = []
    for mode in ("plain", "zero2", "zero3", "fsdp"):
        try:
            refuse_illegal(config, launched(mode))
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
