"""Figures about GPUs: once, in one file, and without contradicting each other."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from pairclf.hardware import MACHINES, PROFILES, SUSTAINED, peak_of_name

PACKAGE = Path(__file__).parents[1] / "pairclf"
OTHERS = sorted(path for path in PACKAGE.rglob("*.py") if path.name != "hardware.py" and "_shipped" not in path.parts)


def speeds(source: str) -> list[float]:
    """Numbers that can only be a GPU's operations a second (10^12 itself is a unit)."""
    nodes = [node.value for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Constant)]
    return [one for one in nodes if isinstance(one, float) and one > 1e12 and one < 1e17 and one % 1e11 == 0]


def tflops_defaults(source: str) -> list[float]:
    """Numbers that stand as the default of a parameter `tflops`."""
    functions = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef)]
    pairs = [
        pair
        for one in functions
        for pair in (
            *zip(reversed(one.args.args), reversed(one.args.defaults), strict=False),
            *zip(one.args.kwonlyargs, one.args.kw_defaults, strict=True),
        )
    ]
    return [value.value for name, value in pairs if name.arg == "tflops" and isinstance(value, ast.Constant)]


def test_no_other_module_holds_the_speed_of_a_gpu() -> None:
    sources = {path.relative_to(PACKAGE): path.read_text(encoding="utf-8") for path in OTHERS}
    found = {path: [*speeds(source), *tflops_defaults(source)] for path, source in sources.items()}
    measured = Path("approaches/finetune/resource_forecast.py")  # operations of a pass that is timed: no speed
    assert found.pop(measured) == [5e13]
    assert {path for path, numbers in found.items() if numbers} == set()


def test_the_speed_of_a_gpu_is_found_elsewhere() -> None:
    assert speeds("SPEED = {'cuda': 24e12, 'cpu': 3e10}; UNIT = 1e12") == [24e12]
    assert tflops_defaults("def lengths(config, tflops: float = 48): ...") == [48]
    assert tflops_defaults("def lengths(*, tflops=PROFILES['t4x2'].tflops): ...") == []


def test_a_machine_has_the_gpus_of_its_profile() -> None:
    counts = {name: PROFILES[one.profile].count for name, one in MACHINES.items() if one.profile is not None}
    assert (
        counts
        == {name: MACHINES[name].gpus for name in counts}
        == {"NvidiaTeslaT4": 2, "NvidiaL4": 4}
        | dict.fromkeys(("NvidiaL4X1", "NvidiaTeslaA100", "NvidiaH100", "NvidiaRtxPro6000"), 1)
    )


@pytest.mark.parametrize("name", list(PROFILES))
def test_no_profile_sustains_more_than_the_peak(name: str) -> None:
    peak = peak_of_name(PROFILES[name].name)
    assert peak is not None
    assert 0.3 <= PROFILES[name].flops / peak <= 0.7


def test_profiles_of_data_sheets_are_marked_so_and_named_as_the_driver_names_the_gpu() -> None:
    unmeasured = {name for name, profile in PROFILES.items() if profile.source.startswith("data sheet: ")}
    assert unmeasured == {"3090", "4090", "5090", "rtxpro6000"}
    drivers = {
        "3090": "NVIDIA GeForce RTX 3090 Ti",
        "4090": "NVIDIA GeForce RTX 4090",
        "5090": "NVIDIA GeForce RTX 5090",
        "rtxpro6000": "NVIDIA RTX PRO 6000 Blackwell Server Edition",
    }
    assert {name: peak_of_name(driver) for name, driver in drivers.items()} == {
        name: 2 * PROFILES[name].flops for name in drivers
    }


def test_figures_are_derived_from_one_t4() -> None:
    assert PROFILES["t4"].flops == PROFILES["t4x2"].flops == SUSTAINED["cuda"] == 24e12
    assert PROFILES["t4x2"].tflops == 48
