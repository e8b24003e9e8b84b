"""`make bench`: every benchmark has a record whose arguments parse; one that fails stops no other."""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.scripts import BENCHMARKS, benchmark_script

every, steps = benchmark_script("all"), benchmark_script("steps")
Figures = dict[str, Any]


class ParsedError(Exception):
    """The arguments parse."""


def test_every_benchmark_has_a_record() -> None:
    scripts = {path.stem for path in BENCHMARKS.glob("*.py")} - {*every.HELPERS}
    assert scripts == {*map(every.script_of, every.RECORDS)}
    assert list(every.RECORDS) == sorted(every.RECORDS)


def test_small_arguments_are_those_of_the_scripts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    given: list[str] = []
    for method in ("parse_args", "parse_intermixed_args"):
        parse = getattr(argparse.ArgumentParser, method)

        def parsed(self: argparse.ArgumentParser, *_: object, parse: Any = parse) -> None:
            parse(self, given)
            raise ParsedError

        monkeypatch.setattr(argparse.ArgumentParser, method, parsed)
    for name in every.RECORDS:
        command = every.command_of(name, tmp_path)
        assert command[1] == str(BENCHMARKS / f"{every.script_of(name)}.py")
        given[:] = command[2:]
        with pytest.raises(ParsedError):
            benchmark_script(every.script_of(name)).main()
    given.append("--nonsense")
    with pytest.raises(SystemExit):
        benchmark_script("training").main()


def ticking() -> Iterator[float]:
    """Ten seconds a look."""
    yield from range(0, 10_000, 10)


def test_steps_are_done_once_and_in_time(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results, calls = tmp_path / "new" / "results.jsonl", list[tuple[str, float]]()
    fails = {"b"}

    def run(step: Any, seconds: float, log: Path) -> Figures:
        calls.append((step.name, seconds))
        assert log == results.parent / f"{step.name}.log"
        if step.name in fails:
            raise steps.StepError("no luck")
        return {"figure": step.name}

    plan = [steps.Step(name, ["true"], 15.0) for name in "abcd"]
    # Looks at the clock: when it begins, and before and after each step.
    found = steps.run_steps(plan, results, seconds=65, clock=ticking().__next__, run=run)
    assert calls == [("a", 15.0), ("b", 15.0), ("c", 15.0)], "the fourth would begin after 70 seconds"
    assert found["a"] == {"name": "a", "took_s": 10, "figure": "a"}
    assert found["b"] == {"name": "b", "took_s": 10, "error": "no luck"}
    assert "d: left for the next call" in capsys.readouterr().out
    assert found.pop("d") == steps.LEFT
    assert [json.loads(line) for line in results.read_text().splitlines()] == list(found.values())

    fails.clear()
    calls.clear()
    found = steps.run_steps(plan, results, seconds=32, clock=ticking().__next__, run=run)
    assert calls == [("b", 15.0), ("d", 2.0)], "the last one has what is left"
    assert found.keys() == set("abcd")
    assert found["b"] == {"name": "b", "took_s": 10, "figure": "b"}


def python(code: str) -> Any:
    return steps.Step("step", [sys.executable, "-c", code], 60.0)


def test_a_process_leaves_its_last_line_of_json(tmp_path: Path) -> None:
    code = "import sys; print('{\"a\": 1}'); print('[2]'); print('{\"a\": 3}'); print('bye', file=sys.stderr)"
    assert steps.run_process(python(code), 60.0, tmp_path / "log") == {"a": 3}
    assert "bye" in (tmp_path / "log").read_text()


@pytest.mark.parametrize(
    ("code", "seconds", "message"),
    [
        ("print('{\"a\": 1}'); raise SystemExit('no luck')", 60.0, "exit code 1: no luck"),
        ("print('text')", 60.0, "no line of JSON"),
        ("import os, time; os.fork(); time.sleep(60)", 0.5, "more than 0 s"),
    ],
)
def test_a_process_that_fails_says_why(tmp_path: Path, code: str, seconds: float, message: str) -> None:
    with pytest.raises(steps.StepError, match=message):
        steps.run_process(python(code), seconds, tmp_path / "log")


def test_nothing_is_left_of_a_step_when_the_benchmark_is_ended(tmp_path: Path) -> None:
    """A queue's limit and a closed terminal, too, would leave a process that holds the GPU."""
    code = f"import os, time; print(os.getpid(), flush=True); os.kill({os.getpid()}, 15); time.sleep(60)"
    with pytest.raises(SystemExit) as ended:
        steps.run_process(python(code), 60.0, tmp_path / "log")
    assert ended.value.code == 128 + signal.SIGTERM
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "log").read_text()), 0)


def test_a_line_that_is_not_whole_is_of_a_step_that_is_not_done(tmp_path: Path) -> None:
    results, calls = tmp_path / "results.jsonl", list[str]()
    results.write_text('{"name": "a", "figure": 1}\n{"name": "b", "fig')

    def run(step: Any, *_: object) -> Figures:
        calls.append(step.name)
        return {"figure": 2}

    plan = [steps.Step(name, ["true"], 15.0) for name in "abc"]
    found = steps.run_steps(plan, results, seconds=60, clock=lambda: 0.0, run=run)
    assert calls == ["b", "c"]
    assert [found[name]["figure"] for name in "abc"] == [1, 2, 2]
    assert steps.read_results(results).keys() >= {"a", "c"}


def test_the_report_has_every_benchmark(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, fails = tmp_path / "bench.json", {"audit"}

    def run(step: Any, *_: object) -> Figures:
        if step.name in fails:
            raise steps.StepError("no luck")
        return {"packed_over_single": 1.25}

    def call() -> tuple[int, Figures]:
        code = every.main(["--out", str(out), "--only", "audit", "training", "gpu"], clock=ticking().__next__, run=run)
        return code, json.loads(out.read_text())

    code, report = call()
    assert code == 1
    assert report["benchmarks"]["audit"]["error"] == "no luck"
    training = report["benchmarks"]["training"]
    assert training["packed_over_single"] == 1.25
    assert training["command"] == "python benchmarks/training.py --quick"
    assert "1.05 over one row" in training["goal_at_full_size"]
    printed = capsys.readouterr().out
    assert "no luck" in printed
    assert "packed_over_single 1.25" in printed
    assert json.loads(printed.splitlines()[-1])["failed"] == ["audit"]

    fails.clear()
    assert call()[0] == 0
    assert "training: done before" in capsys.readouterr().out
    fails.add("training")
    assert call()[0] == 1, "after a run without failures all begin anew"
