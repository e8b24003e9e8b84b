"""`push`: upload a rehearsed package to Kaggle and run its kernel.

Each step checks the present state first, so it can be repeated after any failure: uploaded parts are skipped,
interrupted uploads continue, and a kernel whose newest version is this one is not pushed again.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import Field

from pairclf.config import Section, checked
from pairclf.console import console, counted, stdout
from pairclf.errors import PackagingError
from pairclf.files import is_regular, write_json, write_private
from pairclf.packaging.build_record import Build, own_note, parse_json, read_build
from pairclf.packaging.commands import tail
from pairclf.packaging.metadata import KERNEL, KERNEL_METADATA, LIMITS, PackagePart
from pairclf.packaging.payload import verify_package
from pairclf.packaging.secret_search import refuse_secrets
from pairclf.publish.client import FAILED_KERNEL, KaggleClient, KaggleError, KaggleKernel, KernelOutput, WaitClock
from pairclf.publish.dry_run import DryRun
from pairclf.publish.ledger import now
from pairclf.publish.uploads import PartUpload, upload_folder
from pairclf.rehearsal.report import read_passed

SUBMISSIONS = ("submission.parquet", "submission.csv")
"""Kaggle's gateways write the first; a notebook of ours the second."""
DATASET_BYTES = 2 * LIMITS.size
"""Of one dataset, older builds included: a part has at most the half of it."""

_PROCESSING = 3600.0  # seconds in which Kaggle unpacks an upload
_QUEUE = 7200.0  # seconds in which a kernel gets a machine, beside the competition's hours
_TAIL = 25  # lines of a failed kernel's log
_TRIES = 10  # of a version that is refused although the dataset says that it is ready


class Pushed(Section):
    """The kernel's version that holds a build: `$XDG_STATE_HOME/pairclf/pushed/IDENTITY.json`.

    It is kept on the machine that pushed, and not in the package: a stranger's would say which version is submitted.
    """

    build: str = Field(description="the build's identity")
    kernel: str = Field(description="owner/slug")
    version: int = Field(description="of the kernel")
    url: str = Field(description="of its page")
    when: str = Field(description="UTC")
    output: str | None = Field(None, description="name of the submission that its run left; null: not complete")
    seconds: float | None = Field(None, description="of that run, by its log")
    run: bool = Field(True, description="whether the version was started when it was saved")


def push(folder: Path, *, go: bool, run: bool = True, clock: WaitClock | None = None) -> None:
    """Upload a package's parts and kernel to Kaggle, and wait until the kernel's run is complete.

    `run=False`: save the kernel's version without starting it, to look at it on Kaggle; it can't be submitted.

    `go=False`: print the requests that a first push sends, and send none.

    Raises:
        PackagingError: no rehearsal of this very build passed, or a file was changed since; a secret would be sent;
            Kaggle refused something; a wait was too long; the kernel's run failed, with the end of its log.
    """
    read_passed(folder)
    build = read_build(folder)
    verify_package(folder, build)
    refuse_secrets(folder, build.package.owner, [KERNEL, *(part.folder for part in build.parts)])
    kaggle = KaggleClient(clock or WaitClock()) if go else KaggleClient(WaitClock(sleep=lambda seconds: None), DryRun())
    if not go:
        _summarise(folder, build)
    with upload_folder(build, dry=kaggle.dry) as uploads:
        if kaggle.user.lower() != build.package.owner.lower():
            kaggle.say(f"note: signed in as {kaggle.user}; the package is {build.package.owner}'s")
        uploaded = {
            part.source: _upload_part(PartUpload(folder, part, kaggle, uploads), kaggle) for part in build.parts
        }
        versions = {source: version for source, version in uploaded.items() if version is not None}
        kernel = _prepare_kernel(folder / KERNEL, uploads / KERNEL, versions)
        pushed = kaggle.retry(build.kernel, lambda: _push_kernel(build, kernel, kaggle, run))
        if run:
            _wait_for_run(build, pushed, kaggle)
    if not go:
        console.print("nothing was sent: these are the requests of a first push, which --go sends")


def _summarise(folder: Path, build: Build) -> None:
    """Print what a push uploads."""
    for part in build.parts:
        files = sum(path.is_file() for path in (folder / part.folder).rglob("*"))
        stdout.print(
            f"{part.kind} {part.source}: {part.folder}/, {counted(files, 'file')}, {part.bytes / 1e6:,.2f} MB, private"
        )
    machine, metadata = build.package.machine_shape, _metadata(folder / KERNEL)
    kind, competition = metadata["kernel_type"], build.package.competition
    stdout.print(
        f"kernel {build.kernel}: {kind} {build.code_file} on {machine}, for {competition}, private, no internet"
    )
    stdout.print()


def read_pushed(folder: Path, build: Build) -> Pushed:
    """Read what `push` recorded about this build, on this machine.

    Raises:
        PackagingError: nothing, or its run is not complete.
    """
    pushed, remedy = _noted(build), f"pairclf push {folder} --go"
    if pushed is None:
        raise PackagingError(
            f"this machine has not pushed the build in {folder}",
            where=own_note("pushed", build.identity),
            remedy=f"{remedy}; what is on Kaggle already is left alone",
        )
    if pushed.output is None:
        how = "has not run to its end" if pushed.run else "was saved without a run"
        raise PackagingError(f"version {pushed.version} of {pushed.kernel} {how}", remedy=remedy)
    return pushed


def _noted(build: Build) -> Pushed | None:
    """What this machine recorded about the build's last push; None: nothing."""
    path = own_note("pushed", build.identity)
    if not is_regular(path):
        return None
    return checked(Pushed, parse_json(path), path, f"delete {path}, and push again")


# --- parts -----------------------------------------------------------------------------------------------------------


def _upload_part(shipment: PartUpload, kaggle: KaggleClient) -> int | None:
    """Upload a part unless it exists; returns the version of a model instance."""
    step = _model if shipment.part.kind == "model" else _dataset
    version = kaggle.retry(shipment.part.source, partial(step, shipment, kaggle))
    shipment.clear()
    return version


def _dataset(shipment: PartUpload, kaggle: KaggleClient) -> None:
    """Make the dataset's newest version contain the part."""
    part = shipment.part
    if kaggle.dataset_status(part.source) is None:
        shipment.pack({})
        kaggle.create_dataset(shipment.folder, shipment.upload)
        shipment.mark_sent()
    elif not shipment.sent:
        earlier = f"the last version of {part.source} to be ready"
        listed = kaggle.wait(earlier, _PROCESSING, lambda: _ready(part, kaggle))
        if shipment.complete(listed):
            kaggle.say(f"{part.source} holds {part.marker} already")
            return
        if _holds(part, listed):
            kaggle.say(f"{part.source} holds {part.marker}, but not all of its files: they are brought again")
        shipment.pack(shipment.old_builds(listed, DATASET_BYTES, LIMITS.top))
        _version(shipment, kaggle)
        shipment.mark_sent()
    kaggle.wait(f"{part.source} to be ready", _PROCESSING, lambda: _holds(part, _ready(part, kaggle) or ()) or None)


def _ready(part: PackagePart, kaggle: KaggleClient) -> dict[str, int] | None:
    """The files of a dataset that is ready; `None` while Kaggle processes it.

    Raises:
        PackagingError: it can't be processed.
    """
    status = kaggle.dataset_status(part.source)
    if status in ("failed", "deleted"):
        raise PackagingError(
            f"Kaggle says that {part.source} is {status}", remedy="delete it on its page, and push again"
        )
    return kaggle.dataset_files(part.source) if status == "ready" else None


def _holds(part: PackagePart, listed: Iterable[str]) -> bool:
    """Whether this part is listed, as the newest build or, in a subfolder, as an older one."""
    return part.marker in {path.rpartition("/")[2] for path in listed}


def _version(shipment: PartUpload, kaggle: KaggleClient) -> None:
    """Send a new version. Kaggle answers 403 while it processes the last one, even if the status is `ready`."""
    part, refused = shipment.part, 0

    def send() -> bool | None:
        nonlocal refused
        try:
            kaggle.create_version(shipment.folder, _notes(part), shipment.upload)
        except KaggleError as error:
            refused += error.status == 403
            if error.status != 403 or refused > _TRIES:
                raise
            return None
        return True

    kaggle.wait(f"{part.source} to take a new version", _PROCESSING, send)


def _model(shipment: PartUpload, kaggle: KaggleClient) -> int:
    """Make the model instance's newest version contain the part; returns that version.

    A version, once made, stays as it is and a kernel names the one that it uses: nothing old has to go along.
    """
    part = shipment.part
    version = kaggle.instance_version(part.source)
    if version is not None and shipment.complete(kaggle.instance_files(part.source)):
        kaggle.say(f"{part.source}/{version} holds {part.marker} already")
        return version
    if not shipment.sent:
        shipment.pack({})
        if version is None:
            if not kaggle.has_model(part.source.rsplit("/", 2)[0]):
                kaggle.create_model(shipment.folder)
            kaggle.create_instance(shipment.folder, shipment.upload)
        else:
            kaggle.create_instance_version(part.source, shipment.folder, _notes(part), shipment.upload)
        shipment.mark_sent()

    def arrived() -> int | None:
        return kaggle.instance_version(part.source) if _holds(part, kaggle.instance_files(part.source)) else None

    return kaggle.wait(f"{part.source} to be ready", _PROCESSING, arrived)


def _notes(part: PackagePart) -> str:
    return part.marker.removesuffix(".json")


# --- the kernel ------------------------------------------------------------------------------------------------------


def _prepare_kernel(kernel: Path, staged: Path, versions: Mapping[str, int]) -> Path:
    """Copy the kernel's folder, and write the versions of our model instances into its metadata."""
    shutil.rmtree(staged, ignore_errors=True)
    shutil.copytree(kernel, staged)
    metadata = _metadata(staged)
    others = [source for source in metadata["model_sources"] if source.rpartition("/")[0] not in versions]
    metadata["model_sources"] = [*(f"{source}/{version}" for source, version in versions.items()), *others]
    write_json(staged / KERNEL_METADATA, metadata)
    return staged


def _metadata(kernel: Path) -> dict[str, Any]:
    tree = parse_json(kernel / KERNEL_METADATA)
    assert isinstance(tree, dict)
    return tree


def _push_kernel(build: Build, staged: Path, kaggle: KaggleClient, run: bool) -> Pushed:
    """Push the kernel unless its newest version is this build and has not failed, nor was only saved."""
    existing, noted = kaggle.kernel(build.kernel), _noted(build)
    was_run = noted is None or noted.run
    if existing is not None and _is_same_kernel(existing, staged, build) and (was_run or not run):
        state, _ = kaggle.kernel_status(build.kernel)
        if state not in FAILED_KERNEL:
            kaggle.say(f"{build.kernel}, version {existing.version}, is this build already")
            url = f"https://www.kaggle.com/code/{build.kernel}"
            return _record(build, existing.version, url, kaggle, run=run or (noted is not None and was_run))
    version, url = kaggle.push_kernel(staged, run=run)
    kaggle.say(f"{'pushed' if run else 'saved without a run:'} {build.kernel}, version {version}: {url}")
    if run:
        kaggle.clock.sleep(10.0)  # until its page shows the new run's status, and no longer the last one's
    return _record(build, version, url, kaggle, run=run)


def _is_same_kernel(existing: KaggleKernel, staged: Path, build: Build) -> bool:
    """Whether Kaggle's newest version has our source and our inputs."""
    ours = _metadata(staged)
    keys = {f"{kind}_sources": f"{kind}DataSources" for kind in ("dataset", "model", "competition")}
    machine = existing.metadata.get("machineShape", "") in ("", ours["machine_shape"])  # not every answer names it
    inputs = all(_slugs(ours[key]) == _slugs(existing.metadata.get(name, [])) for key, name in keys.items())
    online, private = existing.metadata.get("enableInternet", False), existing.metadata.get("isPrivate", True)
    code = (staged / build.code_file).read_text(encoding="utf-8")
    return inputs and machine and private and not online and _code(existing.source) == _code(code)


def _slugs(sources: list[str]) -> set[str]:
    """Comparable names: Kaggle writes a framework as `pyTorch`, `pytorch` or `py_torch`."""
    return {source.lower().replace("_", "") for source in sources}


def _code(source: str) -> list[tuple[str, str]]:
    """Type and text of each cell, as Kaggle rewrites a notebook's JSON. A script is one cell."""
    try:
        cells = json.loads(source)["cells"]
    except (ValueError, KeyError, TypeError):
        return [("code", source.strip())]
    return [(cell["cell_type"], "".join(cell["source"]).strip()) for cell in cells]


def _record(build: Build, version: int, url: str, kaggle: KaggleClient, *, run: bool) -> Pushed:
    pushed = Pushed(build=build.identity, kernel=build.kernel, version=version, url=url, when=now(), run=run)
    _write(build, pushed, kaggle)
    return pushed


def _write(build: Build, pushed: Pushed, kaggle: KaggleClient) -> None:
    if not kaggle.dry:
        write_private(own_note("pushed", build.identity), pushed.model_dump_json(indent=2) + "\n")


def _wait_for_run(build: Build, pushed: Pushed, kaggle: KaggleClient) -> None:
    """Wait for the run, and check that it wrote a submission.

    Raises:
        PackagingError: it failed, or wrote no submission; with the end of its log.
    """

    def ended() -> str | None:
        state, said = kaggle.kernel_status(build.kernel)
        if state in FAILED_KERNEL:
            how = f"ended as {state.lower()}{': ' * bool(said)}{said}"
            raise _failed(how, build, pushed, kaggle.kernel_output(build.kernel))
        return state if state == "COMPLETE" else None

    kaggle.wait(f"the run of {build.kernel}", build.package.limit + _QUEUE, ended)
    output = kaggle.kernel_output(build.kernel)
    submissions = [name for name in SUBMISSIONS if name in output.files]
    if not submissions:
        raise _failed(f"left no {' or '.join(SUBMISSIONS)}, but {output.files}", build, pushed, output)
    pushed.output, pushed.seconds = submissions[0], output.seconds
    _write(build, pushed, kaggle)
    kaggle.say(f"{build.kernel}, version {pushed.version}, is complete and left {submissions[0]}")


def _failed(what: str, build: Build, pushed: Pushed, output: KernelOutput) -> PackagingError:
    return PackagingError(
        f"the run of {build.kernel}, version {pushed.version}, {what}; its log ends:\n{tail(output.text, _TAIL)}",
        where=pushed.url,
        remedy="docs/kaggle.md lists what stops a notebook; after a change: package, rehearse, push",
    )
