"""`doctor`: check this machine's package versions, devices, disk, 4-bit arithmetic and saving of models."""

from __future__ import annotations

import os
import platform
import shutil
import tempfile
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, distribution, version
from pathlib import Path

import torch
from packaging.requirements import Requirement
from rich.table import Table
from rich.text import Text

from pairclf.console import counted, table
from pairclf.errors import PairclfError
from pairclf.files import write_text
from pairclf.model.backbone import pick_device, pick_dtype

Finding = tuple[str, bool, str]
"""What was looked at, whether it is well, and what was found."""


def examine() -> list[Finding]:
    """Every check, in the order in which they matter; none of them changes anything."""
    checks: list[Callable[[], list[Finding]]] = [_python, _requirements, _devices, _four_bit, _writing]
    return [finding for check in checks for finding in check()]


def _python() -> list[Finding]:
    return [("python", True, f"{platform.python_version()}, {os.cpu_count()} cores")]


def _requirements() -> list[Finding]:
    """Each dependency of pairclf against the version that is installed."""
    findings = []
    for line in distribution("pairclf").requires or []:
        requirement = Requirement(line)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            installed = version(requirement.name)
        except PackageNotFoundError:
            findings.append((requirement.name, False, f"not installed; pip install '{requirement}'"))
            continue
        fits = requirement.specifier.contains(installed, prereleases=True)
        findings.append((requirement.name, fits, installed if fits else f"{installed}; pip install '{requirement}'"))
    return findings


def _devices() -> list[Finding]:
    findings = []
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        findings.append((f"cuda:{index}", True, f"{device.name}, {device.total_memory / 2**30:.1f} GiB"))
    dtype, why = pick_dtype("auto", pick_device())
    findings.append(("computes in", True, f"{str(dtype).removeprefix('torch.')} on {pick_device()} ({why})"))
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
    findings = [("disk", free > 2, f"{free:.1f} GiB free here; a fold of a 9B adapter takes about 0.5")]
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
    for name, well, detail in findings:
        checks_table.add_row(name, Text("ok", "green") if well else Text("not ok", "red"), detail)
    return checks_table


def doctor() -> Table:
    """Examine this machine.

    Raises:
        PairclfError: something that pairclf needs does not work; the message lists it.
    """
    findings = examine()
    if wrong := [f"{name}: {detail}" for name, well, detail in findings if not well]:
        raise PairclfError(f"{counted(len(wrong), 'check')} failed:\n  " + "\n  ".join(wrong))
    return render(findings)
