"""A worker gives the logits of its bundle, and lets a second batch go before it reads the first."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import Pipe
from pathlib import Path
from queue import SimpleQueue
from typing import cast

import numpy as np
import pytest
import torch
from bundles_support import write_model
from clocks_support import collect
from tests_support import make_rows

from pairclf.approaches import torch_models
from pairclf.bundles.bundle import open_bundle
from pairclf.bundles.inputs import builder_of
from pairclf.config import Config
from pairclf.errors import BundleError, PairclfError, StopError
from pairclf.inference import worker as module
from pairclf.inference.messages import BatchScored, Event, Job, RowOrders, WorkerFailure, WorkerReady
from pairclf.inference.pool import ProcessPool, WorkerModel
from pairclf.inputs.sequences import Item, LargestPass
from pairclf.model.backbone import _placed, load_tokenizer
from pairclf.model.engine import build
from pairclf.model.scoring import ClassifierScorer, items_of
from pairclf.model.weights import load_classifier
from pairclf.scores.metrics import Floats
from pairclf.trust import Trust, grant, granted

CPU = torch.device("cpu")
LARGEST = LargestPass(64, 256, 2)


@pytest.fixture
def saved(config_for: Callable[..., Config], tmp_path: Path) -> Path:
    config = config_for("llama", model={"lora": {"r": 2}})
    classifier = build(config, CPU).eval()
    torch.nn.init.normal_(classifier.head.weight, std=0.5)  # type: ignore[arg-type]
    folder = tmp_path / "bundle"
    write_model(folder, classifier, config, load_tokenizer(config.model.base), fold=0)
    return folder


def test_worker_scores_as_its_bundle(saved: Path, tmp_path: Path) -> None:
    bundle = open_bundle(saved)
    encoded = builder_of(bundle).encode(make_rows(6))
    wanted, _ = ClassifierScorer(load_classifier(bundle, CPU), "packed")(items_of(encoded, orders=2))
    missing = WorkerModel("pairclf.approaches.torch_models", saved, tmp_path / "nowhere", (), encoded, LARGEST)
    crew = ProcessPool(
        [
            WorkerModel("pairclf.approaches.torch_models", saved, None, ("predict.layout=packed",), encoded, LARGEST),
            missing,
        ],
        [("cpu",)],
    )
    try:
        crew.load(0)
        crew.submit(Job(0, 0, tuple(RowOrders(row, (0, 1)) for row in range(6))))
        ready, scored = collect(crew, 2)
        assert isinstance(ready, WorkerReady)
        assert ready.layout == "packed"
        assert ready.what.startswith("cpu, float32; packed")
        assert isinstance(scored, BatchScored)
        assert np.abs(scored.logits - wanted).max() <= 1e-6
        assert scored.logits.dtype == np.float64
        crew.load(1)
        (failed,) = collect(crew, 1)
        assert isinstance(failed, WorkerFailure)
        assert isinstance(failed.error, PairclfError)
        assert failed.error.remedy == "give the folder of the model"
    finally:
        crew.close()


def tell_trust(assignment: module.Assignment) -> module.Loaded:
    raise BundleError(str(granted()))


def test_worker_has_the_permissions_of_its_parent_alone(tmp_path: Path) -> None:
    crew = ProcessPool(
        [WorkerModel("pairclf.approaches.classical", tmp_path, None, (), [], LARGEST)], [("cpu",)], load=tell_trust
    )
    try:
        for trust in (Trust(), Trust(remote_code=True), Trust(linked_files=True)):
            grant(trust)
            crew.load(0)
            (failed,) = collect(crew, 1)
            assert isinstance(failed, WorkerFailure)
            assert failed.what == str(trust)
    finally:
        grant(Trust())
        crew.close()


def test_placed_lays_a_pipeline_by_free_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (100 + device.index, 200))
    gpus = [torch.device("cuda", index) for index in range(3)]
    for quantized in (False, True):
        assert _placed(quantized, gpus[1], [gpus[2]]) == {"device_map": "balanced", "max_memory": {1: 101, 2: 102}}
    assert _placed(False, CPU, []) == {}
    assert _placed(True, CPU, []) == {"device_map": {"": CPU}}


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("layout", ["padded", "packed", "shared"])
def test_pipeline_scores_as_one_gpu(saved: Path, layout: str) -> None:
    one, other = torch.device("cuda", 0), torch.device("cuda", 1)
    bundle = open_bundle(saved)
    items = items_of(builder_of(bundle).encode(make_rows(6)), orders=2)
    alone, _ = ClassifierScorer(load_classifier(bundle, one), layout)(items)
    over_both = load_classifier(bundle, one, others=[other])
    assert len(set(over_both.backbone.hf_device_map.values())) == 2  # type: ignore[union-attr, arg-type, operator]
    piped = ClassifierScorer(over_both, layout)
    first, second = piped.launch(items), piped.launch(items[::-1])
    assert np.abs(piped.collect(items, first)[0] - alone).max() <= 2e-2
    assert np.abs(piped.collect(items[::-1], second)[0][::-1] - alone).max() <= 2e-2


class Told:
    """A scorer that notes what it is asked, and fails where it is told to."""

    def __init__(self, fails: Sequence[str] = (), broken: str | None = None) -> None:
        self.calls: list[str] = []
        self.fails = fails
        self.broken = broken

    def launch(self, items: Sequence[Item]) -> int:
        return self._called(f"launch {items[0].row}", items[0].row)

    def collect(self, items: Sequence[Item], launched: int) -> tuple[Floats, int]:
        return np.zeros((1, 3)), self._called(f"collect {launched}", 0)

    def recover(self) -> str | None:
        return self.broken

    def _called(self, what: str, value: int) -> int:
        self.calls.append(what)
        if what in self.fails:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return value


class Ended(BaseException):
    """The queue is at its end."""


class Finite(SimpleQueue):  # type: ignore[type-arg]
    """A queue whose end is an exception, so that what serves for ever comes back."""

    def get(self, *_: object) -> object:  # type: ignore[override]
        if self.empty():
            raise Ended
        return super().get()


def served(scorer: Told, devices: Sequence[str], count: int) -> Iterator[Event]:
    ours, theirs = Pipe()
    desk = module._JobServer(3, theirs)
    desk.job = Finite()
    for number in range(count):
        desk.job.put((Job(number, 0, (RowOrders(number, (0,)),)), [Item(number, 0, np.zeros(1, dtype=np.int32))]))
    with pytest.raises(Ended):
        desk.serve(scorer, devices)
    while ours.poll():
        yield cast(Event, ours.recv())


def test_desk_on_a_cpu_reads_a_batch_before_the_next() -> None:
    scorer = Told()
    events = list(served(scorer, ["cpu"], 3))
    assert scorer.calls == ["launch 0", "collect 0", "launch 1", "collect 1", "launch 2", "collect 2"]
    assert [event.job.number for event in events if isinstance(event, BatchScored)] == [0, 1, 2]


def test_desk_on_a_gpu_has_two_batches_under_way() -> None:
    scorer = Told()
    events = list(served(scorer, ["cuda:0", "cuda:1"], 3))
    assert scorer.calls == ["launch 0", "launch 1", "collect 0", "launch 2", "collect 1", "collect 2"]
    assert [event.job.number for event in events if isinstance(event, BatchScored)] == [0, 1, 2]


def test_desk_loses_one_batch_when_memory_runs_out() -> None:
    scorer = Told(["launch 1", "collect 2"])
    events = list(served(scorer, ["cuda:0"], 4))
    kinds = {event.job.number: event.kind for event in events if isinstance(event, WorkerFailure) and event.job}
    assert kinds == {1: "memory", 2: "memory"}
    assert [event.job.number for event in events if isinstance(event, BatchScored)] == [0, 3]


def test_desk_ends_with_its_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def end(code: int) -> None:
        raise Ended(code)

    monkeypatch.setattr(module.os, "_exit", end)
    (died,) = served(Told(["launch 0"], broken="the GPU is lost"), ["cuda:0"], 1)
    assert isinstance(died, WorkerFailure)
    assert (died.kind, died.job and died.job.number) == ("died", 0)
    assert died.what.endswith("; the GPU is lost")


def test_device_scorer_says_when_its_gpu_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    def lost(device: object) -> None:
        raise RuntimeError("CUDA error: device-side assert triggered")

    scorer = torch_models.DeviceScorer(cast(ClassifierScorer, None), [torch.device("cuda:0")])
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    assert scorer.recover() is None
    monkeypatch.setattr(torch.cuda, "synchronize", lost)
    assert "device-side assert" in str(scorer.recover())


@pytest.mark.parametrize(
    "error",
    [
        PairclfError("what", where="where", rows=[1, 2], remedy="remedy"),
        BundleError("what", where=Path("folder")),
        StopError("what", signal=15, remedy="remedy"),
    ],
)
def test_errors_survive_pickling(error: PairclfError) -> None:
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is type(error)
    assert (str(again), again.args, vars(again)) == (str(error), error.args, vars(error))
    assert again.exit_code == error.exit_code


def test_failed_knows_every_error_of_full_memory() -> None:
    errors = [
        MemoryError(),
        torch.OutOfMemoryError("x"),
        RuntimeError("[...] DefaultCPUAllocator: can't allocate memory"),
    ]
    assert [module._failure_of(0, None, error).kind for error in errors] == ["memory"] * 3
    assert module._failure_of(0, None, RuntimeError("shapes differ")).kind == "error"


def test_memory_goes_without_a_forecast_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise TypeError("no fake of Params4bit")

    monkeypatch.setattr(torch_models, "footprint", refuse)
    assignment = module.Assignment(Path(), None, (), ("cpu",), 0, LARGEST, 1)
    words, budget = torch_models._memory(cast(ClassifierScorer, None), assignment)
    assert words == "; memory is not foretold (TypeError: no fake of Params4bit)"
    assert budget is None
