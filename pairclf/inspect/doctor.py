"""`doctor`: check this machine's packages, extras, devices, disk, 4-bit arithmetic, saving of models and tokens."""

from __future__ import annotations

import os
import platform
import shutil
import tempfile
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, distribution, version
from pathlib import Path

import torch
from huggingface_hub import get_token
from packaging.requirements import Requirement
from rich.table import Table
from rich.text import Text

from pairclf.console import counted, table
from pairclf.errors import PairclfError
from pairclf.files import home_folder, write_text
from pairclf.model.backbone import name_of, pick_device, pick_dtype

Finding = tuple[str, bool | None, str]
"""What was looked at, whether it is well (None: it is not there, and not every user needs it), and what was found."""


def examine() -> list[Finding]:
    """Every check, in the order in which they matter; none of them changes anything."""
    checks: list[Callable[[], list[Finding]]] = [
        _python,
        _requirements,
        _extras,
        _devices,
        _four_bit,
        _writing,
        _tokens,
    ]
    return [finding for check in checks for finding in check()]


def _python() -> list[Finding]:
    return [("python", True, f"{platform.python_version()}, {os.cpu_count()} cores")]


def _requirements() -> list[Finding]:
    """Each dependency of pairclf against the version that is installed."""
    return [_package(requirement) for requirement in _required("")]


def _required(extra: str) -> list[Requirement]:
    """What pairclf requires besides with an extra, or at all."""
    requirements = [Requirement(line) for line in distribution("pairclf").requires or []]
    plain = [one for one in requirements if one.marker is None or one.marker.evaluate({"extra": ""})]
    if not extra:
        return plain
    return [one for one in requirements if one not in plain and one.marker and one.marker.evaluate({"extra": extra})]


def _package(requirement: Requirement) -> Finding:
    try:
        installed = version(requirement.name)
    except PackageNotFoundError:
        return requirement.name, False, f"not installed; pip install '{requirement}'"
    fits = requirement.specifier.contains(installed, prereleases=True)
    return requirement.name, fits, installed if fits else f"{installed}; pip install '{requirement}'"


def _extras() -> list[Finding]:
    """Each extra of pairclf, and which of its packages are not there."""
    findings: list[Finding] = []
    for extra in distribution("pairclf").metadata.get_all("Provides-Extra") or []:
        absent = [name for name, fits, _ in map(_package, _required(extra)) if not fits]
        found = f"without {', '.join(absent)}; pip install 'pairclf[{extra}]'" if absent else "installed"
        findings.append((f"extra {extra}", None if absent else True, found))
    return findings


def _tokens() -> list[Finding]:
    """Whether the hub's and Kaggle's clients would find a credential; none is shown or sent."""
    home, own = home_folder() or Path("/"), os.environ.get("KAGGLE_CONFIG_DIR")
    folders = [home / ".kaggle", Path(os.environ.get("XDG_CONFIG_HOME") or home / ".config") / "kaggle"]
    folders += [Path(own)] if own else []
    files = [folder / name for folder in folders for name in ("access_token", "credentials.json", "kaggle.json")]
    kaggle = any(map(os.environ.get, ("KAGGLE_API_TOKEN", "KAGGLE_KEY"))) or any(path.is_file() for path in files)
    missing = "none; set {}, or run `{} auth login`: {} need it"
    return [
        ("HF_TOKEN", True, "found")
        if get_token()
        else ("HF_TOKEN", None, missing.format("HF_TOKEN", "hf", "gated models such as Gemma and Llama")),
        ("Kaggle's token", True, "found")
        if kaggle
        else ("Kaggle's token", None, missing.format("KAGGLE_API_TOKEN", "kaggle", "`pairclf push` and `submit`")),
    ]


def _devices() -> list[Finding]:
    findings: list[Finding] = []
    if not torch.cuda.is_available():
        build = f"torch {torch.__version__} was built {'for CUDA' if torch.version.cuda else 'without CUDA'}"
        findings.append(("GPU", None, f"none ({build}): the CPU computes, which suits tiny models alone"))
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        findings.append((f"cuda:{index}", True, f"{device.name}, {device.total_memory / 2**30:.1f} GiB"))
    dtype, why = pick_dtype("auto", pick_device())
    findings.append(("computes in", True, f"{name_of(dtype)} on {pick_device()} ({why})"))
    return findings


def _four_bit() -> list[Finding]:
    """One NF4 matrix product on the device, against the same product unquantised."""
    try:
        import bitsandbytes as bnb

        device = pick_device()
        weight = torch.randn(64, 64, generator=torch.Generator().manual_seed(0)).to(device)
        packed, state = bnb.functional.quantize_4bit(weight, quant_type="nf4")
        error = float((bnb.functional.dequantize_4bit(packed, state) - weight).abs().mean())
    except (ImportError, RuntimeError, AttributeError) as failure:
        return [("nf4", False, f"bitsandbytes fails here: {failure}")]
    return [("nf4", error < 0.2, f"works on {device} (mean rounding error {error:.3f} of a unit normal)")]


def _writing() -> list[Finding]:
    free = shutil.disk_usage(Path.cwd()).free / 2**30
    findings: list[Finding] = [("disk", free > 2, f"{free:.1f} GiB free here; a fold of a 9B adapter takes about 0.5")]
    try:
        with tempfile.TemporaryDirectory(dir=Path.cwd()) as folder:
            write_text(Path(folder) / "probe", "probe")
    except OSError as failure:
        return [*findings, ("writing", False, f"the current folder can't be written to: {failure}")]
    return findings


def render(findings: list[Finding]) -> Table:
    """A table with one line per check."""
    checks_table = table("pairclf doctor", "check", "", "found")
    checks_table.columns[2].justify = "left"
    marks = {True: Text("ok", "green"), False: Text("not ok", "red"), None: Text("none", "yellow")}
    for name, well, detail in findings:
        checks_table.add_row(name, marks[well], detail)
    return checks_table


def doctor() -> Table:
    """Examine this machine.

    Raises:
        PairclfError: something that pairclf needs does not work; the message lists it.
    """
    findings = examine()
    if wrong := [f"{name}: {detail}" for name, well, detail in findings if well is False]:
        raise PairclfError(f"{counted(len(wrong), 'check')} failed:\n  " + "\n  ".join(wrong))
    return render(findings)
