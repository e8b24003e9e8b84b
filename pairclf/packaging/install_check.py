"""What to carry so that pairclf installs on an image, and the check that nothing else is needed.

A resolver answers both. Stubs stand for the image's packages beside the wheels (`image_profiles.py`). The check uses no
index: pip runs for an interpreter of that version, or uv if this machine has none.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import distributions
from pathlib import Path

import uv
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from pairclf.errors import PackagingError
from pairclf.packaging.commands import run_command
from pairclf.packaging.image_profiles import (
    ImageProfile,
    is_stub,
    parse_version,
    profile_path,
    read_profile,
    stub_version,
    write_stubs,
)
from pairclf.packaging.interpreters import find_interpreter, full_version

UV_PLATFORM = "x86_64-manylinux_2_34"  # Kaggle's image stands on Ubuntu 22.04, whose glibc is 2.35
BY_TAGS = "by tags and stubs"


@dataclass(frozen=True, slots=True)
class Resolution:
    """How pairclf installs on one image."""

    carried: Mapping[str, Version]
    """What comes along, by project; pairclf is not among them."""
    kept: Mapping[str, Version]
    """What is needed and is the image's."""
    notes: Sequence[str] = field(default_factory=list)
    """What is carried in another version than the image's, or than the one that was validated here."""


def is_of_the_driver(project: str) -> bool:
    """Whether it is torch or of the CUDA family. The image's versions fit its GPU driver, so no others are carried."""
    return project in ("torch", "triton", "pytorch-triton") or project.startswith(("nvidia-", "cuda-"))


def resolve(own: Path, extra: Sequence[str], profile: ImageProfile) -> Resolution:
    """Find out what to carry, so that a wheel and its requirements install on an image.

    What the image has in a version that will do stays the image's; the rest comes in the version that is installed
    here, which is what the models were validated with, or the newest where that does not run on the image's Python.

    Args:
        own: pairclf's wheel; its requirements are read by the image's Python.
        extra: projects to be carried even though the image may have them.
        profile: the image.

    Raises:
        PackagingError: the image's torch will not do, something of the CUDA family would have to come along, or
            there is no answer.
    """
    installed = _installed_here()
    image = profile.without({*extra, _name(own)})
    pins = _resolve(own, extra, image, installed)
    if replaced := [name for name, version in pins.items() if name in image.versions and not is_stub(version)]:
        # the image's would not do: then the version that was validated here rather than the newest one
        pins = _resolve(own, extra, image, installed, replaced)
    carried = {name: version for name, version in pins.items() if not is_stub(version)}
    if wrong := sorted(filter(is_of_the_driver, carried)):
        raise PackagingError(
            f"for the image with Python {profile.python}, {wrong[0]} would have to come along; it must be the image's",
            where="package.extra_packages",
            remedy=f"leave out what asks for it; if the image has {wrong[0]}, refresh its profile in "
            "package.image_freezes",
        )
    kept = {name: profile.versions[name] for name, version in pins.items() if is_stub(version)}
    return Resolution(carried, kept, [*_notes(carried, profile, extra, installed)])


def _resolve(
    own: Path, extra: Sequence[str], image: ImageProfile, installed: Mapping[str, Version], replaced: Iterable[str] = ()
) -> dict[str, Version]:
    preferred = {**installed, **{name: stub_version(version) for name, version in image.versions.items()}}
    preferred |= {name: installed[name] for name in replaced if name in installed}
    fixed = {name: version for name, version in preferred.items() if is_stub(version) and is_of_the_driver(name)}
    with tempfile.TemporaryDirectory() as scratch:
        stubs = Path(scratch, "stubs")
        write_stubs(image, stubs)
        requirements = [f"{_name(own)} @ {own.resolve().as_uri()}", *extra]
        return compile_pins(image.python, requirements, preferred, "--find-links", str(stubs), fixed=fixed)


def _notes(
    carried: Mapping[str, Version], profile: ImageProfile, extra: Sequence[str], installed: Mapping[str, Version]
) -> Iterable[str]:
    for name, version in sorted(carried.items()):
        what = f"Python {profile.python}: {name} {version} is carried"
        if name in profile.unknown:
            yield f"{what}; which one the image has, its profile does not say"
        elif name in profile.versions and name not in extra:
            yield f"{what}: the image's {profile.versions[name]} will not do"
        if name in installed and installed[name] != version:
            yield f"{what}, and not {installed[name]}, which is installed here: it does not go with that image"
        elif name not in installed:
            yield f"{what}, the newest: it is not installed here, so nothing was validated with it"


def compile_pins(
    python: str,
    requirements: Sequence[str],
    preferred: Mapping[str, Version],
    *options: str,
    fixed: Mapping[str, Version] | None = None,
) -> dict[str, Version]:
    """Let uv resolve for another Python than this one, with wheels for Linux on x86-64: `{project: version}`.

    Args:
        preferred: taken where nothing speaks against it, instead of the newest.
        fixed: taken, or there is no answer.

    A requirement that is the address of a file is left out of the answer.

    Raises:
        PackagingError: there is no answer; in uv's words.
    """
    with tempfile.TemporaryDirectory() as scratch:
        asked, pins, constraints = (Path(scratch, name) for name in ("asked.in", "pins.txt", "fixed.txt"))
        asked.write_text("".join(f"{line}\n" for line in requirements), encoding="utf-8")
        pins.write_text(_lines(preferred), encoding="utf-8")  # uv prefers what the file that it writes held before
        constraints.write_text(_lines(fixed or {}), encoding="utf-8")
        command = [uv.find_uv_bin(), "pip", "compile", str(asked), "--output-file", str(pins), *options]
        command += ["--constraints", str(constraints), "--python-version", python, "--python-platform", UV_PLATFORM]
        command += ["--python", sys.executable]  # the version above counts, and uv would fetch a Python of that one
        command += ["--only-binary", ":all:", "--no-header", "--no-annotate", "--quiet", "--color", "never"]
        what = f"for Python {python} there is no set of wheels that goes together"
        remedy = "it needs a package registry, as uv's settings name it; what the image holds: package.image_freezes"
        run_command(command, what, remedy, cwd=Path(scratch))
        answer = [Requirement(line) for line in pins.read_text(encoding="utf-8").splitlines() if line.strip()]
    return {
        canonicalize_name(requirement.name): Version(next(iter(requirement.specifier)).version)
        for requirement in answer
        if requirement.url is None
    }


def _lines(pins: Mapping[str, Version]) -> str:
    return "".join(f"{name}=={version}\n" for name, version in pins.items())


def check_wheels_suffice(
    folder: Path, requirements: Mapping[str, Sequence[str]], images: Path | None
) -> dict[str, str]:
    """Check that the wheels in `folder` install on each image, without an index; nothing is written.

    Args:
        requirements: `{python: [project==version]}`, what the notebook installs.
        images: folder of profiles; None: pairclf's own.

    Returns:
        `{python: how}`: "CPython 3.12.1", or "by tags and stubs" if this machine has no such Python.

    Raises:
        PackagingError: a wheel is missing, is for another Python or machine, or contradicts the image or another wheel.
    """
    proofs = {}
    for python, pins in requirements.items():
        pinned = dict(pin.split("==") for pin in pins)
        profile = read_profile(python, profile_path(python, images)).without(pinned)
        with tempfile.TemporaryDirectory() as scratch:
            stubs = Path(scratch, "stubs")
            write_stubs(profile, stubs)
            interpreter = find_interpreter(python)
            if interpreter is None:
                offline = ("--no-index", "--find-links", str(folder.resolve()), "--find-links", str(stubs))
                resolved, proofs[python] = compile_pins(python, pins, {}, *offline), BY_TAGS
            else:
                resolved, proofs[python] = _dry_run(interpreter, python, pins, folder, stubs), full_version(interpreter)
        if unasked := sorted(name for name, version in resolved.items() if name not in pinned and not is_stub(version)):
            raise PackagingError(
                f"for Python {python} the wheels in {folder} need {unasked[0]} too, which is not installed",
                remedy="package again",
            )
    return proofs


def _dry_run(interpreter: Path, python: str, pins: Sequence[str], folder: Path, stubs: Path) -> dict[str, Version]:
    """What pip, run for that interpreter, would install: `{project: version}`."""
    report = stubs.parent / "report.json"
    command = [sys.executable, "-m", "pip", "--python", str(interpreter), "install", "--dry-run", "--ignore-installed"]
    command += ["--no-index", "--only-binary=:all:", "--find-links", str(folder.resolve()), "--find-links", str(stubs)]
    command += ["--no-cache-dir", "--report", str(report), *pins]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PIP_")}
    environment |= {"PIP_CONFIG_FILE": os.devnull, "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    what = f"the wheels do not install on {full_version(interpreter)} with what the image has"
    remedy = f"package again; what the image with Python {python} holds stands in package.image_freezes"
    run_command(command, what, remedy, where=folder, environment=environment)
    installed = [entry["metadata"] for entry in json.loads(report.read_text(encoding="utf-8"))["install"]]
    return {canonicalize_name(entry["name"]): Version(entry["version"]) for entry in installed}


def _installed_here() -> dict[str, Version]:
    """Versions in this environment, without local labels, which registries do not have."""
    versions = ((entry.name, parse_version(entry.version)) for entry in distributions())
    return {canonicalize_name(name): Version(version.public) for name, version in versions if version is not None}


def _name(wheel: Path) -> str:
    return canonicalize_name(wheel.name.split("-")[0])
