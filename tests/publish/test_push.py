from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import requests
from fake_kaggle import KEY, TOKEN, FakeKaggle, Fault, Run
from kaggle_support import Ticks, small_package
from slugify import slugify

from pairclf.errors import PackagingError
from pairclf.files import cache_folder
from pairclf.hardware import MACHINES
from pairclf.packaging.build_record import own_note, read_build
from pairclf.packaging.metadata import DATASET_METADATA, KERNEL_METADATA, LICENCES
from pairclf.publish import push as push_module
from pairclf.publish.client import KaggleClient, KaggleError, WaitClock
from pairclf.publish.push import push, read_pushed

DROPPED = Fault()
LOST = Fault(after=True)
pytestmark = pytest.mark.usefixtures("rehearsed")


@pytest.fixture
def package(tmp_path: Path) -> Path:
    return small_package(tmp_path / "package")


def uploads() -> list[str]:
    """What is on its way, on this machine."""
    return [path.name for path in (cache_folder() / "uploads").iterdir() if path.suffix != ".lock"]


def held(kaggle: FakeKaggle) -> dict[str, Any]:
    """All that a push leaves on Kaggle."""
    return {
        "datasets": {source: found.versions for source, found in kaggle.datasets.items()},
        "instances": kaggle.instances,
        "kernels": {source: [one.request for one in versions] for source, versions in kaggle.kernels.items()},
    }


def test_push_brings_parts_and_kernel_and_waits_for_the_run(package: Path, kaggle: FakeKaggle, ticks: Ticks) -> None:
    push(package, go=True, clock=ticks.clock)
    build = read_build(package)
    for part in build.parts:
        (version,) = kaggle.datasets[part.source].versions
        local = {
            p.relative_to(package / part.folder).as_posix(): p.read_bytes()
            for p in (package / part.folder).rglob("*")
            if p.is_file()
        }
        del local["dataset-metadata.json"]
        assert version == local
    created = kaggle.bodies("CreateDataset")[0]
    assert (created["isPrivate"], created["licenseName"]) == (True, "apache-2.0")
    (kernel,) = kaggle.bodies("SaveKernel")
    assert kernel["datasetDataSources"] == [part.source for part in build.parts]
    assert kernel["enableInternet"] is False
    assert kaggle.names().index("SaveKernel") > max(
        i for i, name in enumerate(kaggle.names()) if name == "ListDatasetFiles"
    )
    pushed = read_pushed(package, build)
    assert (pushed.version, pushed.output, pushed.seconds) == (1, "submission.csv", 61.0)
    assert uploads() == []


BASE = "google/gemma-2/transformers/gemma-2-9b-it/2"
SETTINGS: list[dict[str, str]] = [
    *({"machine_shape": shape} for shape in MACHINES),
    {"kernel_type": "script", "base_model_source": BASE},
    {"name": "a-run", "license": "CC-BY-SA-4.0"},
    {"name": "n" * 40, "bundles_as": "model", "license": "CC BY-SA 4.0"},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda settings: "-".join(settings.values()))
def test_all_is_private_offline_and_under_its_name(
    tmp_path: Path, kaggle: FakeKaggle, ticks: Ticks, settings: dict[str, str]
) -> None:
    """As Kaggle's own client reads our metadata, and sends them."""
    build = read_build(small_package(tmp_path / "package", **settings))
    push(tmp_path / "package", go=True, clock=ticks.clock)
    package, (kernel,) = build.package, kaggle.bodies("SaveKernel")
    assert (kernel["slug"], slugify(kernel["newTitle"])) == (build.kernel, package.name)
    assert (kernel["language"], kernel["kernelType"]) == ("python", package.kernel_type)
    assert (kernel["isPrivate"], kernel["enableInternet"], kernel.get("enableTpu", False)) == (True, False, False)
    shape = package.machine_shape.replace("None", "")
    assert (kernel["enableGpu"], kernel.get("machineShape", "")) == (shape != "", shape)
    assert kernel["competitionDataSources"] == [package.competition]
    assert kernel["datasetDataSources"] == [part.source for part in build.parts if part.kind == "dataset"]
    models = [f"{part.source}/1" for part in build.parts if part.kind == "model"]
    assert kernel.get("modelDataSources", []) == models + ([BASE] if package.base_model_source else [])
    for dataset in kaggle.bodies("CreateDataset"):
        assert f"{dataset['ownerSlug']}/{dataset['slug']}" in kernel["datasetDataSources"]
        assert (dataset["isPrivate"], slugify(dataset["title"])) == (True, dataset["slug"])
        assert dataset["licenseName"] in LICENCES
        assert 20 <= len(dataset["subtitle"]) <= 80
    for model, instance in zip(kaggle.bodies("CreateModel"), kaggle.bodies("CreateModelInstance"), strict=True):
        assert (model["isPrivate"], slugify(model["title"])) == (True, model["slug"])
        assert (model["ownerSlug"], model["slug"]) == (instance["ownerSlug"], instance["modelSlug"])
        body = instance["body"]
        assert (body["instanceSlug"], body["framework"]) == ("part-1", "MODEL_FRAMEWORK_OTHER")
        assert body["licenseName"] in LICENCES.values()


def test_kaggles_client_turns_the_internet_on_where_nothing_is_said_and_refuses_long_slugs(
    package: Path, kaggle: FakeKaggle
) -> None:
    """Why the one is always written, and names are limited."""
    client = KaggleClient(WaitClock())
    for path, changes in (
        (package / "kernel" / KERNEL_METADATA, {"enable_internet": None}),
        (package / "bundle" / DATASET_METADATA, {"id": "someone/" + "n" * 51}),
    ):
        tree = json.loads(path.read_text()) | changes
        path.write_text(json.dumps({key: value for key, value in tree.items() if value is not None}))
    with pytest.raises(KaggleError, match="did not attach"):  # the datasets are not there
        client.push_kernel(package / "kernel")
    assert kaggle.bodies("SaveKernel")[0]["enableInternet"] is True
    with pytest.raises(PackagingError, match="slug must be between 6 and 50"):
        client.create_dataset(package / "bundle", str)


def test_repeated_push_changes_nothing(package: Path, kaggle: FakeKaggle, ticks: Ticks) -> None:
    push(package, go=True, clock=ticks.clock)
    before, received = held(kaggle), kaggle.received
    kaggle.calls.clear()
    push(package, go=True, clock=ticks.clock)
    assert held(kaggle) == before
    assert kaggle.received == received
    assert not {"PUT", "StartBlobUpload", "CreateDataset", "CreateDatasetVersion", "SaveKernel"} & set(kaggle.names())


def test_dry_run_prints_every_request_and_sends_none(
    package: Path, kaggle: FakeKaggle, capsys: pytest.CaptureFixture[str], ticks: Ticks
) -> None:
    push(package, go=False)
    shown = capsys.readouterr().out
    assert kaggle.calls == []
    assert not own_note("pushed", read_build(package).identity).exists()
    push(package, go=True, clock=ticks.clock)
    changing = {name for name in kaggle.names() if not name.startswith(("Get", "List")) and name != "PUT"}
    for name in changing:
        assert shown.count(f"/{name}\n") == kaggle.names().count(name), name
    assert shown.count("PUT ") == kaggle.names().count("PUT")
    assert '"enableInternet": false' in shown
    first = shown.partition("\nPOST")[0]
    for said in (
        "dataset someone/a-notebook-bundle: bundle/, 4 files",
        "dataset someone/a-notebook-wheels",
        "no internet",
    ):
        assert said in first
    assert '"slug": "someone/a-notebook"' in shown


def test_dry_run_needs_neither_network_nor_credentials(
    package: Path, kaggle: FakeKaggle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("KAGGLE_USERNAME")
    monkeypatch.delenv("KAGGLE_KEY")
    push(package, go=False)
    with pytest.raises(PackagingError, match="no valid credentials"):
        push(package, go=True)
    assert kaggle.calls == []


def test_credentials_are_neither_printed_nor_stored(
    package: Path, kaggle: FakeKaggle, ticks: Ticks, capsys: pytest.CaptureFixture[str]
) -> None:
    kaggle.faults["SaveKernel"].append(Fault(500, "no"))
    kaggle.faults["CreateDataset"].append(Fault(401, "no"))
    with pytest.raises(PackagingError) as caught:
        push(package, go=True, clock=ticks.clock)
    push(package, go=True, clock=ticks.clock)
    told = capsys.readouterr()
    assert KEY not in told.out + told.err + str(caught.value)
    assert not [path for path in package.rglob("*") if path.is_file() and KEY.encode() in path.read_bytes()]


def test_access_token_is_used_as_the_client_finds_it(
    package: Path, kaggle: FakeKaggle, ticks: Ticks, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("KAGGLE_USERNAME", "KAGGLE_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("KAGGLE_API_TOKEN", "KGAT_an0ther")
    with pytest.raises(PackagingError, match="no valid credentials"):
        push(package, go=True, clock=ticks.clock)
    monkeypatch.setenv("KAGGLE_API_TOKEN", TOKEN)
    push(package, go=True, clock=ticks.clock)
    told = capsys.readouterr()
    assert TOKEN not in told.out + told.err
    assert not [path for path in package.rglob("*") if path.is_file() and TOKEN.encode() in path.read_bytes()]


@pytest.mark.parametrize(("code", "asked"), [("_import_client()", 0), ("import kaggle", 1)])
def test_import_of_the_client_asks_nobody(tmp_path: Path, code: str, asked: int) -> None:
    """Its own import signs in, over the network where there is a token: the second case."""
    script = f"""
import socket
from pairclf.publish.client import _import_client
asked = []
def refuse(*arguments, **_):
    asked.append(arguments)
    raise OSError
socket.getaddrinfo = socket.socket.connect = refuse
{code}
print(bool(asked) + 0)
"""
    environment = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "KAGGLE_API_TOKEN": TOKEN}
    environment |= {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split()[-1] == str(asked)


def test_another_machine_is_another_kernel(package: Path, kaggle: FakeKaggle, ticks: Ticks) -> None:
    push(package, go=True, clock=ticks.clock)
    push(small_package(package, machine_shape="NvidiaL4"), go=True, clock=ticks.clock)
    assert [body["machineShape"] for body in kaggle.bodies("SaveKernel")] == ["NvidiaTeslaT4", "NvidiaL4"]


def test_without_a_passed_rehearsal_nothing_is_sent(
    package: Path, kaggle: FakeKaggle, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pairclf.rehearsal.report import read_passed

    monkeypatch.setattr(push_module, "read_passed", read_passed)
    with pytest.raises(PackagingError, match="never rehearsed"):
        push(package, go=True)
    assert kaggle.calls == []


def test_what_was_changed_after_packaging_is_not_sent(package: Path, kaggle: FakeKaggle, ticks: Ticks) -> None:
    def refused(match: str) -> None:
        with pytest.raises(PackagingError, match=match):
            push(package, go=True, clock=ticks.clock)
        with pytest.raises(PackagingError, match=match):
            push(package, go=False)

    def edited(name: str, old: str, new: str) -> None:
        path = next(package.glob(name))
        text = path.read_text(encoding="utf-8")
        assert old in text
        path.write_text(text.replace(old, new), encoding="utf-8")
        refused(f"{path.relative_to(package)} (is|was)")
        path.write_text(text, encoding="utf-8")

    edited("kernel/a-notebook.ipynb", "print(1)", "print(2)")
    edited("kernel/kernel-metadata.json", '"enable_internet": false', '"enable_internet": true')
    edited("kernel/kernel-metadata.json", '"is_private": true', '"is_private": false')
    edited("bundle/dataset-metadata.json", '"isPrivate": true', '"isPrivate": false')
    edited("bundle/fold0-*/adapter/weights.bin", "weights", "veights")
    edited("wheels/pairclf-wheels-*.json", "wheels", "wheel5")
    for added in (package / "bundle" / "notes.txt", package / "kernel" / "sub" / "more.py"):
        added.parent.mkdir(exist_ok=True)
        added.touch()
        refused(f"{added.relative_to(package)} was added")
        added.unlink()
    weights = next(package.glob("bundle/fold0-*/adapter/weights.bin"))
    weights.rename(package / "elsewhere")
    refused("weights.bin is gone")
    assert kaggle.calls == []
    (package / "elsewhere").rename(weights)
    push(package, go=True, clock=ticks.clock)


def test_secret_that_got_into_a_package_is_not_sent(
    package: Path, kaggle: FakeKaggle, ticks: Ticks, tmp_path: Path
) -> None:
    with pytest.raises(PackagingError, match="a Kaggle token"):
        push(small_package(tmp_path / "told", code="token = 'KGAT_" + "0f3a9c71" * 4 + "'"), go=True, clock=ticks.clock)
    assert kaggle.calls == []


def test_public_kernel_is_not_the_same(package: Path, kaggle: FakeKaggle, ticks: Ticks) -> None:
    push(package, go=True, clock=ticks.clock)
    kaggle.kernels["someone/a-notebook"][-1].request["isPrivate"] = False
    push(package, go=True, clock=ticks.clock)
    assert kaggle.names().count("SaveKernel") == 2


def test_two_pushes_at_once_do_the_work_once(package: Path, kaggle: FakeKaggle) -> None:
    with ThreadPoolExecutor(2) as pool:
        done = [pool.submit(push, package, go=True, clock=Ticks().clock) for _ in range(2)]
    assert [one.result() for one in done] == [None, None]
    assert [len(found.versions) for found in kaggle.datasets.values()] == [1, 1]
    assert kaggle.names().count("SaveKernel") == 1


# --- faults that pass ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "faults"),
    [
        ("StartBlobUpload", [DROPPED, Fault(503)]),
        ("PUT", [Fault(cut=500)]),
        ("PUT", [Fault(503), DROPPED]),
        ("CreateDataset", [Fault(429, headers={"Retry-After": "77"})]),
        ("CreateDataset", [DROPPED]),
        ("CreateDataset", [LOST]),
        ("GetDatasetStatus", [Fault(502), DROPPED]),
        ("ListDatasetFiles", [Fault(429)]),
        ("SaveKernel", [DROPPED]),
        ("SaveKernel", [LOST]),
        ("GetKernelSessionStatus", [Fault(500), Fault(429, headers={"Retry-After": "5"})]),
    ],
)
def test_fault_that_passes_leaves_what_a_clean_push_leaves(
    package: Path, kaggle: FakeKaggle, ticks: Ticks, name: str, faults: list[Fault]
) -> None:
    kaggle.faults[name].extend(faults)
    push(package, go=True, clock=ticks.clock)
    assert [len(found.versions) for found in kaggle.datasets.values()] == [1, 1]
    assert len(kaggle.kernels["someone/a-notebook"]) == 1
    assert kaggle.received == sum(blob.size for blob in kaggle.blobs.values() if blob.content)
    for fault in faults:
        if "Retry-After" in fault.headers:
            assert float(fault.headers["Retry-After"]) in ticks.slept


def test_upload_goes_on_where_it_broke_off(package: Path, kaggle: FakeKaggle, ticks: Ticks) -> None:
    kaggle.faults["PUT"].append(Fault(cut=300))
    push(package, go=True, clock=ticks.clock)
    ranges = [body["range"] for body in kaggle.bodies("PUT")]
    first = [one for one in ranges if "300-" in one]
    assert len(first) == 1
    size = int(first[0].rpartition("/")[2])
    assert f"bytes */{size}" in ranges


def test_upload_that_the_store_forgot_begins_again(package: Path, kaggle: FakeKaggle, ticks: Ticks) -> None:
    kaggle.faults["PUT"].extend([Fault(cut=300), *[Fault(503)] * 100])
    with pytest.raises(KaggleError, match="could not be uploaded"):
        push(package, go=True, clock=ticks.clock)
    kaggle.faults["PUT"].clear()
    kaggle.blobs.clear()
    push(package, go=True, clock=ticks.clock)
    assert [len(found.versions) for found in kaggle.datasets.values()] == [1, 1]


def test_version_waits_while_the_last_one_is_processed(
    package: Path, tmp_path: Path, kaggle: FakeKaggle, ticks: Ticks
) -> None:
    """Old files are sent along: a version holds what comes with it and nothing else."""
    push(package, go=True, clock=ticks.clock)
    newer = small_package(tmp_path / "newer", weights="others", code="print(2)")
    kaggle.faults["CreateDatasetVersion"].extend([Fault(403, "the dataset is being processed")] * 2)
    push(newer, go=True, clock=ticks.clock)
    older, both = kaggle.datasets["someone/a-notebook-bundle"].versions
    assert not kaggle.bodies("CreateDatasetVersion")[-1]["body"].get("deleteOldVersions")
    (marker,) = (part.marker for part in read_build(package).of("bundle"))
    added = {path.relative_to(newer / "bundle").as_posix() for path in (newer / "bundle").rglob("*") if path.is_file()}
    kept = {f"{marker.removesuffix('.json')}/{name}": content for name, content in older.items()}
    assert both.items() >= kept.items()
    assert set(both) == set(kept) | added - {"dataset-metadata.json"}
    assert len(kaggle.datasets["someone/a-notebook-wheels"].versions) == 1
    assert len(kaggle.kernels["someone/a-notebook"]) == 2


def test_older_builds_stay_whole_and_can_be_gone_back_to(tmp_path: Path, kaggle: FakeKaggle, ticks: Ticks) -> None:
    packages = [small_package(tmp_path / name, weights=name, code=name) for name in ("one", "two", "three")]
    for package in packages:
        push(package, go=True, clock=ticks.clock)
    versions = kaggle.datasets["someone/a-notebook-bundle"].versions
    files = versions[-1]
    for package in packages:
        (part,) = read_build(package).of("bundle")
        (marker,) = (name for name in files if name.endswith(part.marker))
        for name, digest in json.loads(files[marker])["files"].items():
            assert hashlib.sha256(files[marker.replace(part.marker, name)]).hexdigest() == digest
    push(packages[0], go=True, clock=ticks.clock)
    assert len(versions) == 3
    assert len(kaggle.kernels["someone/a-notebook"]) == 4


def test_older_file_that_is_not_what_its_marker_says_stops_the_push(
    package: Path, tmp_path: Path, kaggle: FakeKaggle, ticks: Ticks
) -> None:
    push(package, go=True, clock=ticks.clock)
    (version,) = kaggle.datasets["someone/a-notebook-bundle"].versions
    name = next(name for name in version if name.endswith("weights.bin"))
    version[name] = b"changed"
    with pytest.raises(PackagingError, match="is not what its marker says"):
        push(small_package(tmp_path / "newer", weights="others"), go=True, clock=ticks.clock)


@pytest.mark.parametrize("bundles_as", ["dataset", "model"])
def test_part_that_lacks_a_file_is_brought_again(
    tmp_path: Path, kaggle: FakeKaggle, ticks: Ticks, bundles_as: str
) -> None:
    push(small_package(tmp_path / "older", weights="older", bundles_as=bundles_as), go=True, clock=ticks.clock)
    package = small_package(tmp_path / "package", bundles_as=bundles_as)
    push(package, go=True, clock=ticks.clock)
    (part,) = read_build(package).of("bundle")
    versions = kaggle.instances[part.source] if bundles_as == "model" else kaggle.datasets[part.source].versions
    whole = dict(versions[-1])
    versions[-1]["notes.txt"] = b"by hand"
    del versions[-1][next(name for name in whole if name.startswith("fold0-") and name.endswith("weights.bin"))]
    push(package, go=True, clock=ticks.clock)
    assert len(versions) == 3
    assert versions[-1] == whole
    push(package, go=True, clock=ticks.clock)
    assert len(versions) == 3


def test_torn_note_of_an_upload_begins_it_again(
    package: Path, kaggle: FakeKaggle, ticks: Ticks, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = cache_folder() / "uploads" / read_build(package).identity
    folder.mkdir(parents=True)
    (folder / "bundle.json").write_text('{"marker": "pair')
    push(package, go=True, clock=ticks.clock)
    assert "the upload of bundle begins again" in capsys.readouterr().err
    assert read_pushed(package, read_build(package)).version == 1


def test_dataset_with_its_older_files_is_held_to_the_limit(
    package: Path, tmp_path: Path, kaggle: FakeKaggle, ticks: Ticks, monkeypatch: pytest.MonkeyPatch
) -> None:
    push(package, go=True, clock=ticks.clock)
    monkeypatch.setattr(push_module, "DATASET_BYTES", 10_000)
    with pytest.raises(PackagingError, match="1 older builds"):
        push(small_package(tmp_path / "newer", weights="others"), go=True, clock=ticks.clock)
    assert len(kaggle.datasets["someone/a-notebook-bundle"].versions) == 1


# --- faults that stay ------------------------------------------------------------------------------------------------


def test_refusal_that_stays_ends_in_its_words(package: Path, kaggle: FakeKaggle, ticks: Ticks) -> None:
    kaggle.faults["CreateDataset"].append(Fault(403, "Permission 'datasets.create' was denied"))
    with pytest.raises(KaggleError, match=r"403, Permission 'datasets\.create' was denied") as caught:
        push(package, go=True, clock=ticks.clock)
    assert caught.value.status == 403
    assert "SaveKernel" not in kaggle.names()


@pytest.mark.parametrize(
    ("name", "said", "match"),
    [
        ("CreateDataset", {"status": "error", "error": "bad licence"}, "bad licence"),
        ("SaveKernel", {"error": "Maximum batch GPU session count of 2 reached"}, "session count"),
        (
            "SaveKernel",
            {"invalidDatasetSources": ["someone/a-notebook-wheels"]},
            "did not attach dataset someone/a-note",
        ),
        ("SaveKernel", {"invalidModelSources": ["google/gemma/1"]}, "did not attach model google/gemma/1"),
        ("SaveKernel", {"invalidCompetitionSources": ["x"]}, "did not attach competition x"),
    ],
)
def test_error_in_an_answer_of_status_200_is_an_error(
    package: Path, kaggle: FakeKaggle, ticks: Ticks, name: str, said: dict[str, Any], match: str
) -> None:
    kaggle.errors[name] = said
    with pytest.raises(KaggleError, match=match):
        push(package, go=True, clock=ticks.clock)
    assert not own_note("pushed", read_build(package).identity).exists()


def test_failed_kernel_is_told_with_the_end_of_its_log(package: Path, kaggle: FakeKaggle, ticks: Ticks) -> None:
    log = [{"stream_name": "stderr", "time": i, "data": f"line {i}\n"} for i in range(40)]
    kaggle.runs.append(Run(status="ERROR", failure="exit code 1", log=json.dumps(log)))
    with pytest.raises(PackagingError, match=r"ended as error: exit code 1[\s\S]*line 39") as caught:
        push(package, go=True, clock=ticks.clock)
    assert "line 14\n" not in str(caught.value)
    with pytest.raises(PackagingError, match="has not run to its end"):
        read_pushed(package, read_build(package))
    push(package, go=True, clock=ticks.clock)  # a machine that broke is tried again
    assert len(kaggle.kernels["someone/a-notebook"]) == 2
    assert [len(found.versions) for found in kaggle.datasets.values()] == [1, 1]


def test_run_without_a_submission_is_an_error(package: Path, kaggle: FakeKaggle, ticks: Ticks) -> None:
    kaggle.runs.append(Run(files=("scores.parquet",)))
    with pytest.raises(PackagingError, match=r"left no submission\.parquet or submission\.csv"):
        push(package, go=True, clock=ticks.clock)


def test_what_kaggles_gateway_wrote_is_what_is_submitted(package: Path, kaggle: FakeKaggle, ticks: Ticks) -> None:
    kaggle.runs.append(Run(files=("submission.csv", "submission.parquet")))
    push(package, go=True, clock=ticks.clock)
    assert read_pushed(package, read_build(package)).output == "submission.parquet"


def test_version_that_nobody_names_is_no_version(
    package: Path, kaggle: FakeKaggle, ticks: Ticks, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`submit` would send none, and leave it to Kaggle which one is meant."""
    save = FakeKaggle.SaveKernel
    monkeypatch.setattr(FakeKaggle, "SaveKernel", lambda fake, asked: {**save(fake, asked), "versionNumber": 0})
    push(package, go=True, clock=ticks.clock)
    assert read_pushed(package, read_build(package)).version == 1, "as the kernel itself says"
    assert len(kaggle.kernels["someone/a-notebook"]) == 1


def test_every_wait_has_a_limit_and_a_name(package: Path, kaggle: FakeKaggle, ticks: Ticks) -> None:
    kaggle.processing = 10**6
    with pytest.raises(PackagingError, match="min for someone/a-notebook-bundle to be ready, without success"):
        push(package, go=True, clock=ticks.clock)
    kaggle.processing, kaggle.datasets["someone/a-notebook-bundle"].busy = 0, 0
    kaggle.runs.append(Run(polls=10**6))
    with pytest.raises(PackagingError, match="min for the run of someone/a-notebook"):
        push(package, go=True, clock=ticks.clock)


def test_too_many_requests_for_too_long_is_an_error(package: Path, kaggle: FakeKaggle, ticks: Ticks) -> None:
    kaggle.faults["CreateDataset"].extend([Fault(429, headers={"Retry-After": "10000000"})] * 50)
    with pytest.raises(KaggleError, match="429") as caught:
        push(package, go=True, clock=ticks.clock)
    assert caught.value.status == 429
    assert max(ticks.slept) == 900  # whatever the answer asks for


def test_no_request_waits_for_ever(
    package: Path, kaggle: FakeKaggle, ticks: Ticks, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits = []
    send = requests.Session.send

    def noted(self: requests.Session, request: requests.PreparedRequest, **settings: Any) -> requests.Response:
        limits.append(settings.get("timeout"))
        return send(self, request, **settings)

    monkeypatch.setattr(requests.Session, "send", noted)
    push(package, go=True, clock=ticks.clock)
    assert len(limits) == len(kaggle.calls)
    assert None not in limits


def test_dataset_that_failed_is_said_so(package: Path, kaggle: FakeKaggle, ticks: Ticks) -> None:
    push(package, go=True, clock=ticks.clock)
    kaggle.datasets["someone/a-notebook-bundle"].failed = True
    with pytest.raises(PackagingError, match="someone/a-notebook-bundle is failed"):
        push(package, go=True, clock=ticks.clock)


# --- models ----------------------------------------------------------------------------------------------------------


def test_bundles_as_models_and_the_kernel_names_their_version(tmp_path: Path, kaggle: FakeKaggle, ticks: Ticks) -> None:
    package = small_package(tmp_path / "package", bundles_as="model")
    push(package, go=True, clock=ticks.clock)
    push(package, go=True, clock=ticks.clock)
    instance = "someone/a-notebook-bundle/other/part-1"
    assert len(kaggle.instances[instance]) == 1
    assert [body["modelDataSources"] for body in kaggle.bodies("SaveKernel")] == [[f"{instance}/1"]]
    newer = small_package(tmp_path / "newer", bundles_as="model", weights="others")
    push(newer, go=True, clock=ticks.clock)
    assert len(kaggle.instances[instance]) == 2
    assert kaggle.bodies("SaveKernel")[-1]["modelDataSources"] == [f"{instance}/2"]
    kaggle.calls.clear()
    push(newer, go=False)
    assert kaggle.calls == []


# --- killed ----------------------------------------------------------------------------------------------------------


class Killed(BaseException):
    """As a signal would end it: nothing in between catches it."""


BEFORE, AFTER = False, True
KILLS = [
    pytest.param("dataset", BEFORE, id="dataset-before the request"),
    pytest.param("model", AFTER, id="model-after it"),
    pytest.param("dataset", AFTER, id="dataset-after it", marks=pytest.mark.thorough),
    pytest.param("model", BEFORE, id="model-before the request", marks=pytest.mark.thorough),
]


@pytest.mark.parametrize(("bundles_as", "answered"), KILLS)
def test_push_that_is_killed_at_any_request_can_be_repeated(
    tmp_path: Path,
    kaggle: FakeKaggle,
    monkeypatch: pytest.MonkeyPatch,
    pytestconfig: pytest.Config,
    bundles_as: str,
    answered: bool,
) -> None:
    """End state equal to a clean push's, and not a byte is uploaded twice. At all requests with `--thorough`, else at
    the first and last one of each kind."""
    package = small_package(tmp_path / "package", bundles_as=bundles_as)
    push(package, go=True, clock=Ticks().clock)
    clean, received, names = held(kaggle), kaggle.received, kaggle.names()
    last = {name: number for number, name in enumerate(names, 1)}
    first = {name: number for number, name in reversed([*enumerate(names, 1)])}
    stops = range(1, len(names) + 1) if pytestconfig.getoption("--thorough") else {*first.values(), *last.values()}
    send = KaggleClient.send
    left = [0]

    def mortal(self: KaggleClient, *arguments: Any, **settings: Any) -> Any:
        left[0] -= 1
        if left[0] == 0 and not answered:
            raise Killed
        answer = send(self, *arguments, **settings)
        if left[0] == 0:
            raise Killed
        return answer

    monkeypatch.setattr(KaggleClient, "send", mortal)
    for stop in sorted(stops):
        for store in (kaggle.datasets, kaggle.models, kaggle.instances, kaggle.kernels, kaggle.blobs):
            store.clear()
        kaggle.received, left[0] = 0, stop
        own_note("pushed", read_build(package).identity).unlink(missing_ok=True)
        with pytest.raises(Killed):
            push(package, go=True, clock=Ticks().clock)
        left[0] = -1
        push(package, go=True, clock=Ticks().clock)
        assert held(kaggle) == clean, f"killed at request {stop}"
        assert kaggle.received == received, f"killed at request {stop}"


class NewerClient:
    """`kernels_push` of kaggle 2.2.5, for the client that is installed: the version is saved, and not started."""

    def __init__(self, push: Any, kaggle: FakeKaggle) -> None:
        self.push, self.kaggle = push, kaggle

    def __call__(self, folder: str, timeout: None = None, acc: None = None, no_run: bool = False) -> Any:
        if no_run:
            self.kaggle.runs.append(Run(log="", files=()))
        return self.push(folder)


def test_a_version_that_is_saved_without_a_run_is_run_by_the_next_push(
    package: Path, kaggle: FakeKaggle, ticks: Ticks, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made = KaggleClient.__init__

    def init(self: KaggleClient, *arguments: Any) -> None:
        made(self, *arguments)
        self._api.kernels_push = NewerClient(self._api.kernels_push, kaggle)

    monkeypatch.setattr(KaggleClient, "__init__", init)
    for _ in range(2):
        push(package, go=True, run=False, clock=ticks.clock)
    assert kaggle.names().count("SaveKernel") == 1
    assert "saved without a run: " in capsys.readouterr().err
    with pytest.raises(PackagingError, match=r"version 1 of .* was saved without a run"):
        read_pushed(package, read_build(package))
    push(package, go=True, clock=ticks.clock)
    assert read_pushed(package, read_build(package)).version == 2


def test_an_older_client_can_not_save_without_a_run(
    package: Path, kaggle: FakeKaggle, ticks: Ticks, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = KaggleClient.__init__

    def init(self: KaggleClient, *arguments: Any) -> None:
        made(self, *arguments)
        self._api.kernels_push = lambda folder: None

    monkeypatch.setattr(KaggleClient, "__init__", init)
    with pytest.raises(PackagingError, match=r"--no-run needs kaggle 2\.2\.5"):
        push(package, go=True, run=False, clock=ticks.clock)
    assert "SaveKernel" not in kaggle.names()
