from __future__ import annotations

import errno
import json
import os
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import numpy as np
import pytest
import yaml
from support.packages import hollow_wheelhouse
from tests_support import hollow_bundle as write_bundle

from pairclf.config import Config, Submission, resolve
from pairclf.errors import BundleError, ConfigError, PackagingError, PairclfError
from pairclf.files import sha256_file, sha256_tree
from pairclf.inference.ensemble import Ensemble, open_ensemble
from pairclf.packaging import build, payload
from pairclf.packaging.build import package
from pairclf.packaging.build_record import identity_of, read_build
from pairclf.packaging.metadata import KERNEL_METADATA, READ_BY_THE_CLIENT, Limits
from pairclf.packaging.package_inputs import read_package_inputs
from pairclf.packaging.payload import verify_package
from pairclf.task import Task
from pairclf.trust import Trust, grant


@pytest.fixture(autouse=True)
def _wheels(monkeypatch: pytest.MonkeyPatch) -> None:
    hollow_wheelhouse(monkeypatch)


def changed(config: Config, **settings: object) -> Config:
    return config.model_copy(update={"package": config.package.model_copy(update=settings)})


def metadata_of(made: Path) -> dict[str, object]:
    found: dict[str, object] = json.loads((made / "kernel" / KERNEL_METADATA).read_text())
    return found


@pytest.mark.parametrize("kernel", ["notebook", "script", "server"])
def test_folder_is_complete_and_the_same_each_time(config: Config, bundle: Path, tmp_path: Path, kernel: str) -> None:
    config = changed(config, kernel_type=kernel)
    made = package(config, [bundle], tmp_path / "a")
    files = sha256_tree(made)
    assert files == sha256_tree(package(config, [bundle], tmp_path / "b"))
    record = read_build(made)
    code = (made / "kernel" / record.code_file).read_text()
    assert record.code_file == ("a-notebook.py" if kernel == "script" else "a-notebook.ipynb")
    assert metadata_of(made)["code_file"] == record.code_file
    (packed,) = record.bundles
    assert packed.orders == record.orders == 2
    assert packed.folder == f"fold0-{packed.seal[:8]}"
    assert sha256_tree(made / "bundle" / packed.folder) == sha256_tree(bundle)
    assert [part.folder for part in record.parts] == ["bundle", "wheels"]
    for part in record.parts:
        folder = made / part.folder
        assert sha256_file(folder / part.marker) == part.sha256
        assert part.sha256 in code
        uploaded = sha256_tree(folder, without=frozenset({*READ_BY_THE_CLIENT, part.marker}))
        assert json.loads((folder / part.marker).read_text())["files"] == uploaded
    assert metadata_of(made)["dataset_sources"] == [part.source for part in record.parts]
    assert re.search(r"\| log loss 1\.0100(, [^|]*)? \| equal \| `", code)  # the fold's metric, and a plain mean


def test_record_says_in_how_many_orders_each_model_sees_a_row(config: Config, bundle: Path, tmp_path: Path) -> None:
    reward = resolve({"model": {"readout": "reward"}, "package": config.package.model_dump()})
    bundles = [bundle, write_bundle(tmp_path / "reward", reward, "fold1")]
    record = read_build(package(config, bundles, tmp_path / "a"))
    assert [packed.orders for packed in record.bundles] == [2, 1]
    assert record.orders == 1


@pytest.mark.parametrize("kernel", ["notebook", "server"])
def test_kernel_runs_a_models_code_only_if_package_was_told_to(
    config: Config, bundle: Path, tmp_path: Path, kernel: str
) -> None:
    written = []
    for number, trust in enumerate((Trust(), Trust(remote_code=True))):
        grant(trust)
        try:
            made = package(changed(config, kernel_type=kernel), [bundle], tmp_path / str(number))
        finally:
            grant(Trust())
        cells = json.loads((made / "kernel" / read_build(made).code_file).read_text())["cells"]
        written.append("".join("".join(cell["source"]) for cell in cells))
    plain, trusting = written
    assert "TRUST = []" in plain
    assert "--trust-remote-code" not in plain
    assert 'TRUST = ["--trust-remote-code"]' in trusting
    assert "**Python files that come with the model are run here**" in trusting


def test_settings_of_a_strangers_bundle_choose_no_files_and_no_wheels(config: Config, tmp_path: Path) -> None:
    hostile = changed(config, ensemble=tmp_path / "e.yaml", image_freezes=tmp_path, extra_packages=["evil"])
    folder = write_bundle(
        tmp_path / "b", hostile.model_copy(update={"data": resolve({"data": {"test": "x.csv"}}).data}), "fold0"
    )
    read, bundles, _ = read_package_inputs([folder], ["package.time_limit_hours=3"])
    assert bundles == [folder]
    assert (read.package.ensemble, read.package.image_freezes, read.package.extra_packages) == (None, None, [])
    assert read.data.test_file is None
    assert (read.package.time_limit_hours, read.package.owner) == (3, config.package.owner)
    (folder / "config.yaml").write_text("extends: /etc/hostname\n")
    with pytest.raises(BundleError, match="changed, added or removed"):
        read_package_inputs([folder], [])


def test_identity_is_that_of_what_is_uploaded(config: Config, bundle: Path, tmp_path: Path) -> None:
    first = read_build(package(config, [bundle], tmp_path / "out"))
    elsewhere = config.model_copy(update={"output_dir": tmp_path / "runs" / "lmsys" / "x"})
    again = read_build(package(elsewhere, [bundle], tmp_path / "out"))
    assert again.identity == first.identity
    assert again.config == "lmsys/x"
    others = [
        read_build(package(changed(config, deadline="8h"), [bundle], tmp_path / "other")),
        read_build(package(config, [write_bundle(tmp_path / "new", config, "fold1")], tmp_path / "other")),
    ]
    assert len({first.identity, *(one.identity for one in others)}) == 3


def test_out_of_fold_loss_is_over_the_rows_of_all_folds(config: Config, tmp_path: Path) -> None:
    def written(name: str, loss: float, rows: float) -> Path:
        return write_bundle(tmp_path / name, config, name, metrics={"log_loss": loss, "rows": 7.0, "weight": rows})

    one = written("x", 1.0, 100.0)
    assert read_build(package(config, [one], tmp_path / "out")).out_of_fold == 1.0
    twice = package(config, [one, written("y", 2.0, 300.0)], tmp_path / "out")
    assert read_build(twice).out_of_fold is None, "both held out fold 0"
    blend = tmp_path / "ensemble.yaml"
    blend.write_text("{mean: geometric, members: [{bundle: x}, {bundle: y}], out_of_fold: {log_loss: 0.9}}")
    blended = package(changed(config, ensemble=blend), [], tmp_path / "out")
    assert read_build(blended).out_of_fold == 0.9, "as `pairclf blend` has measured it"
    (packed,) = (blended / "bundle").rglob("ensemble-*.yaml")
    assert "mean: geometric" in packed.read_text()


def test_full_disk_leaves_the_older_package_and_nothing_half_built(
    config: Config, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "built" / "package"
    before = sha256_tree(package(config, [bundle], out))

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    for where, name in (
        *((build, name) for name in ("write_text", "write_json", "fill_wheelhouse", "seal", "write_build")),
        (shutil, "copytree"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(where, name, full)
            with pytest.raises(OSError, match="No space left"):
                package(config, [bundle], out)
    assert sha256_tree(out) == before
    assert [path.name for path in out.parent.iterdir()] == ["package"]


def test_path_of_this_machine_is_not_published(config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/someone-private")
    told = config.model_copy(deep=True)
    told.data.folder = Path("/home/someone-private/data")
    with pytest.raises(PackagingError, match=r"bundle/fold0-\w+/config\.yaml, line \d+: a folder of this machine"):
        package(config, [write_bundle(tmp_path / "bundle", told, "fold0")], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_bundles_that_do_not_go_together(config: Config, bundle: Path, tmp_path: Path) -> None:
    other = Config.model_validate({"task": "wsdm"})
    with pytest.raises(BundleError, match="different tasks"):
        package(config, [bundle, write_bundle(tmp_path / "other", other, "fold1")], tmp_path / "out")
    with pytest.raises(ConfigError, match="given twice"):
        package(config, [bundle, bundle], tmp_path / "out")
    with pytest.raises(PackagingError, match="at least one bundle"):
        package(config, [], tmp_path / "out")


def test_base_models_are_asked_for_where_they_are_needed(config: Config, bundle: Path, tmp_path: Path) -> None:
    def on(base: str, name: str, *, whole: bool = False) -> Path:
        told = config.model_copy(deep=True)
        told.model.base = base
        if whole:
            told.model.lora, told.model.quantization = None, "none"
        return write_bundle(tmp_path / name, told, name)

    gemma, llama = on("google/gemma-2-9b-it", "gemma"), on("meta-llama/Llama-3-8B", "llama")
    whole = on("meta-llama/Llama-3-8B", "whole", whole=True)
    with pytest.raises(PackagingError, match=r"google/gemma-2-9b-it[\s\S]*package\.base_model_source"):
        package(config, [gemma], tmp_path / "out")
    attached = changed(config, base_model_source="someone/gemma")
    with pytest.raises(PackagingError, match=r"2 base models[\s\S]*docs/export\.md"):
        package(attached, [gemma, llama], tmp_path / "out")
    made = package(attached, [gemma, bundle, whole], tmp_path / "out")
    assert metadata_of(made)["dataset_sources"] == [
        *(f"someone/a-notebook-{name}" for name in ("bundle", "wheels")),
        "someone/gemma",
    ]
    needless = package(attached, [whole], tmp_path / "out")
    assert "someone/gemma" not in metadata_of(needless)["dataset_sources"]
    assert read_build(needless).package.base_model_source is None, "nothing asks for it later"


def test_ensemble_keeps_its_weights_and_finds_its_members(config: Config, tmp_path: Path) -> None:
    priors = [0.6, 0.2, 0.2], [0.2, 0.6, 0.2]
    for name, prior in zip(("one", "two"), priors, strict=True):
        write_bundle(tmp_path / "runs" / name, config, name, prior=prior)
    given = tmp_path / "given.yaml"
    given.write_text(
        "members:\n- {bundle: runs/one, weight: 3, base: somewhere}\n"
        "- {bundle: runs/two, weight: 1, share: 0.3, temperature: 1.1}\ntemperature: 1.02\n"
    )
    with pytest.raises(PackagingError, match=r"members.1.share=0.3 .* in batches"):
        package(changed(config, ensemble=given, kernel_type="server"), [], tmp_path / "out")
    swapped = tmp_path / "swapped.yaml"
    swapped.write_text("members:\n- {bundle: runs/one, swap_share: 0.5}\n")
    with pytest.raises(PackagingError, match=r"members.0.swap_share=0.5 .*\n?.* in batches"):
        package(changed(config, ensemble=swapped, kernel_type="server"), [], tmp_path / "out")
    made = package(changed(config, ensemble=given), [], tmp_path / "out")
    (file,) = (made / "bundle").glob("ensemble-*.yaml")
    tree = yaml.safe_load(file.read_text())
    assert tree["temperature"] == 1.02
    assert [(one.get("weight", 1.0), one.get("share"), "base" in one) for one in tree["members"]] == [
        (3.0, None, False),
        (1.0, 0.3, False),
    ]
    ensemble = open_ensemble([file], None, [])
    assert [one.calibration.temperature for one in ensemble.members] == [1.0, 1.1]
    code = (made / "kernel" / "a-notebook.ipynb").read_text()
    assert f'MEMBERS = [\\"{file.name}\\"]' in code
    assert '\\"winner_model_a\\": \\"0.500000000\\"' in code, "the prior is weighted as the blend is"
    assert len(re.findall(r"\| 3 \| `|\| 1 \| `", code)) == 2, "the table has their weights"


@pytest.mark.parametrize("bundles_as", ["dataset", "model"])
def test_package_is_proven_file_by_file(config: Config, bundle: Path, tmp_path: Path, bundles_as: str) -> None:
    made = package(changed(config, bundles_as=bundles_as), [bundle], tmp_path / "out")
    build = read_build(made)
    verify_package(made, build)
    assert identity_of(made, build.code_file, build.parts) == build.identity
    (made / "rehearsal").mkdir()
    verify_package(made, build)
    for path in [path for top in ("kernel", "bundle", "wheels") for path in (made / top).rglob("*") if path.is_file()]:
        content = path.read_bytes()
        flipped = bytes([content[0] ^ 1]) + content[1:]
        path.unlink()  # it may be a hard link to the bundle's own
        with pytest.raises(PackagingError, match=f"{path.name} "):
            verify_package(made, build)
        path.write_bytes(flipped if path.suffix != ".json" else flipped.replace(b"}", b"]"))
        with pytest.raises(PackagingError, match=path.name):
            verify_package(made, build)
        path.write_bytes(content)
    verify_package(made, build)
    (made / "bundle" / "link").symlink_to(tmp_path)
    with pytest.raises(PairclfError, match="'link' is a link"):
        verify_package(made, build)


def test_prior_of_labels_is_the_likeliest_class(tmp_path: Path) -> None:
    config = Config.model_validate({"task": "wsdm", "package": {"owner": "someone", "name": "a-notebook"}})
    with pytest.raises(PackagingError, match="answer model_a, model_b, and lmsys-chatbot-arena asks for"):
        package(config, [write_bundle(tmp_path / "other", config, "other")], tmp_path / "out")
    config = changed(config, competition="wsdm-cup-multilingual-chatbot-arena")
    one = write_bundle(tmp_path / "one", config, "one", prior=[0.4, 0.6])
    made = package(config, [one], tmp_path / "out")
    assert '\\"winner\\": \\"model_b\\"' in (made / "kernel" / "a-notebook.ipynb").read_text()


def test_parts_are_datasets_or_instances_of_their_own(
    config: Config, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = max(path.stat().st_size for path in bundle.rglob("*") if path.is_file())
    monkeypatch.setattr(build, "split", lambda folder, kind: payload.split(folder, kind, Limits(size, 50)))
    record = read_build(package(config, [bundle], tmp_path / "out"))
    assert [part.folder for part in record.of("bundle")] == ["bundle", "bundle-2"]
    as_model = package(changed(config, bundles_as="model"), [bundle], tmp_path / "out")
    assert metadata_of(as_model)["model_sources"] == [
        f"someone/a-notebook-bundle/other/part-{number}/1" for number in (1, 2)
    ]
    for part in read_build(as_model).of("bundle"):
        assert part.kind == "model"
        told = json.loads((as_model / part.folder / "model-instance-metadata.json").read_text())
        assert f"{told['ownerSlug']}/{told['modelSlug']}/{told['framework']}/{told['instanceSlug']}" == part.source


def test_changed_bundle_is_not_packaged(config: Config, bundle: Path, tmp_path: Path) -> None:
    (bundle / "head.safetensors").write_text("other weights")
    with pytest.raises(BundleError, match=r"head\.safetensors"):
        package(config, [bundle], tmp_path / "out")


@pytest.mark.parametrize("kind", ["link to a file", "link to a folder", "pipe"])
def test_bundle_that_brings_other_files_along_is_refused(
    config: Config, bundle: Path, tmp_path: Path, kind: str
) -> None:
    secret = tmp_path / "secret"
    secret.mkdir()
    (secret / "id_ed25519").write_text("secret")
    if kind == "pipe":
        os.mkfifo(bundle / "more")
    else:
        (bundle / "more").symlink_to(secret if kind.endswith("folder") else secret / "id_ed25519")
    with pytest.raises(PairclfError, match=r"'more': (a link|no regular file)"):
        package(config, [bundle], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_prior_that_is_a_tie_names_the_class_that_submissions_name() -> None:
    task = Task(name="t", fields=("text",), classes=("x", "y"), label_column="label", metric="accuracy")
    ensemble = cast(
        Ensemble, SimpleNamespace(task=task, prior=np.array([0.5 - 1e-9, 0.5 + 1e-9]), submission=Submission())
    )
    assert build._prior(ensemble, None)["label"] == "x"


def test_priors_are_probabilities_in_the_columns_of_the_submission(tmp_path: Path) -> None:
    """Where the metric is of probabilities no name is written, and a known sample decides alone."""
    task = Task(name="t", fields=("text",), classes=("0", "1"), label_column="label")
    ensemble = cast(Ensemble, SimpleNamespace(task=task, prior=np.array([0.75, 0.25]), submission=Submission()))
    assert build._prior(ensemble, None) == {"0": "0.750000000", "1": "0.250000000", "label": "0.250000000"}
    sample = tmp_path / "sample.csv"
    sample.write_text("row,p\n1,0\n")
    ensemble.submission.id, ensemble.submission.columns = "row", {"0": "p"}
    assert build._prior(ensemble, sample) == {"p": "0.750000000"}


@pytest.mark.usefixtures("_wheels")
def test_kernel_predicts_with_the_columns_of_the_config(config: Config, bundle: Path, tmp_path: Path) -> None:
    data = resolve(
        {"data": {"test": {"columns": {"id": "row"}}, "submission": {"columns": {"winner_tie": "tie"}}}}
    ).data
    made = package(config.model_copy(update={"data": data}), [bundle], tmp_path / "out")
    record = read_build(made)
    cells = json.loads((made / "kernel" / record.code_file).read_text())["cells"]
    code = "".join("".join(cell["source"]) for cell in cells)
    (settings,) = re.findall(r"^SETTINGS = (.*?)  #", code, re.MULTILINE)
    opened = open_ensemble([bundle], None, json.loads(settings))
    assert opened.data.test.columns == record.columns == {"id": "row"}
    assert opened.data.settled_submission == record.submission == data.settled_submission
    assert '"tie": "' in code
    assert 'IDS = ["row", "row"]' in code
