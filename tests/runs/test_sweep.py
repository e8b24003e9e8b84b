"""A sweep trains each combination once on the same rows, and says which effects exceed the noise."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from pairclf.config import load_config
from pairclf.errors import ConfigError
from pairclf.run import FOLDS, Paths, trained_as
from pairclf.runs import halving
from pairclf.runs.cv import cross_validate
from pairclf.runs.held_out import open_runs
from pairclf.runs.processes import WorkerError
from pairclf.runs.sweep import Arm, Effect, Sweep, _effect, effects_of, plan_sweep, render, train_arms
from pairclf.scores.intervals import Estimate
from pairclf.scores.metrics import row_losses
from pairclf.scores.significance import SeedNoise

Cli = Callable[..., tuple[int, str]]
ROOT = Path(__file__).parents[2]
SHIPPED = sorted((ROOT / "configs" / "sweeps").glob("*.yaml"))
ENTRIES = ["classical.C=0.01,1", "seed=0,1"]


class Trainer:
    """`pairclf cv` in this process, and what it was called with."""

    def __init__(self, fails: str = "") -> None:
        self.calls: list[str] = []
        self.fails = fails

    def __call__(self, arguments: Sequence[str]) -> int:
        command, path, *overrides, last = arguments
        assert (command, last) == ("cv", "--resume")
        config = load_config(Path(path), overrides)
        self.calls.append(str(config.output_dir).rpartition("/")[2])
        if self.fails and self.fails in self.calls[-1]:
            raise WorkerError("out of memory", exit_code=1)
        cross_validate(config, resume=True)
        return 0


@pytest.fixture(scope="module")
def planned(arms: Path, tmp_path_factory: pytest.TempPathFactory) -> Sweep:
    """A finished sweep, to read only."""
    path = tmp_path_factory.mktemp("sweep") / "config.yaml"
    path.write_text(f"extends: {arms / 'plain.yaml'}\noutput_dir: {path.parent / 'run'}\n")
    sweep = plan_sweep(path, ENTRIES)
    trainer = Trainer()
    assert len(train_arms(sweep, train=trainer)) == 4
    assert trainer.calls == ["C-0.01_seed-0", "C-0.01_seed-1", "C-1_seed-0", "C-1_seed-1"]
    return sweep


def test_all_combinations_are_trained_on_the_same_rows_and_once(planned: Sweep) -> None:
    assert [arm.settings for arm in planned.arms] == [
        {"classical.C": strength, "seed": seed} for strength in (0.01, 1) for seed in (0, 1)
    ]
    folds = {(arm.folder / FOLDS).read_bytes() for arm in planned.arms}
    assert len(folds) == 1, "a seed would otherwise make folds of its own"
    for arm in planned.arms:
        assert trained_as(Paths(arm.folder, 0))["classical.C"] == arm.settings["classical.C"]
        assert not Paths(arm.folder, 1).bundle.exists()
    again = Trainer()
    assert len(train_arms(plan_sweep(planned.path, ENTRIES), train=again)) == 4
    assert again.calls == []


def test_effects_are_paired_means_over_the_other_axes(planned: Sweep) -> None:
    result = effects_of(planned, planned.arms)
    common = open_runs([arm.folder for arm in planned.arms], folds=[0])
    losses = [row_losses(run.probabilities, common.targets) for run in common.runs]
    (effect,) = result.effects
    best, other = effect.levels
    assert (effect.keys, best.values, other.runs) == (("classical.C",), {"classical.C": 1}, 2)
    assert best.figure == pytest.approx((losses[2].mean() + losses[3].mean()) / 2)
    assert other.to_best.value == pytest.approx(np.mean(losses[0] + losses[1] - losses[2] - losses[3]) / 2)
    assert result.noise is not None
    assert (result.noise.degrees, result.noise.deviation) == (2, 0.0)  # nothing of this model is random
    saved = json.loads((planned.folder / "sweep.json").read_text())
    assert saved == json.loads(json.dumps(result.as_dict()))
    assert [arm["settings"] for arm in saved["arms"]] == [arm.settings for arm in planned.arms]


def effect_of(
    figures: Sequence[float], deviation: float, noise: SeedNoise | None = None, values: Sequence[object] = (8, 16, 32)
) -> Effect:
    """The effect of three ranks whose losses have draws that move apart by `deviation`."""
    generator = np.random.default_rng(0)
    estimates = [Estimate(value, value + deviation * generator.normal(size=2000)) for value in figures]
    arms = [Arm({"model.lora.r": value}, (), load_config(ROOT / "configs/lmsys/classical.yaml")) for value in values]
    return _effect(("model.lora.r",), arms, estimates, 1, noise, 1000)


def test_small_effects_are_not_distinguishable_and_large_ones_warn_at_the_edge() -> None:
    small = effect_of([0.951, 0.950, 0.949], 0.002)
    assert [level.decision and level.decision.is_real for level in small.levels] == [None, False, False]
    assert small.remark == ""
    large = effect_of([0.97, 0.96, 0.95], 0.001)
    assert [level.decision and level.decision.is_real for level in large.levels] == [None, True, True]
    assert large.remark == "the best model.lora.r=32 is at the edge of the grid: try values above"
    assert "try values below" in effect_of([0.95, 0.96, 0.97], 0.001).remark
    assert effect_of([0.97, 0.95, 0.96], 0.001).remark == ""
    assert effect_of([0.97, 0.96, 0.95], 0.001, values=("a", "b", "c")).remark == ""
    noisy = effect_of([0.97, 0.96, 0.95], 0.001, SeedNoise(0.02, 0.0007, 3))
    assert [level.decision and level.decision.is_real for level in noisy.levels] == [None, False, False]


def test_seeds_that_move_all_values_alike_are_no_noise_of_the_axis() -> None:
    """What counts is how the effect itself differs between seeds."""
    base = load_config(ROOT / "configs/lmsys/classical.yaml")
    arms = [Arm({"model.lora.r": rank, "seed": seed}, (), base) for rank in (8, 16) for seed in (0, 1, 2)]
    draws = 1e-4 * np.random.default_rng(0).normal(size=(6, 2000))

    def real(losses: Sequence[float]) -> bool:
        figures = [Estimate(value, value + own) for value, own in zip(losses, draws, strict=True)]
        effect = _effect(("model.lora.r",), arms, figures, 1, None, 1000)
        (_, other) = effect.levels
        assert other.decision is not None
        assert other.runs == 3
        return other.decision.is_real

    assert real([0.950, 0.970, 0.930, 0.945, 0.9651, 0.9249])  # 8 is worse by .005 with each seed
    assert not real([0.950, 0.970, 0.930, 0.955, 0.955, 0.925])  # by -.005, .015 and .005


def test_what_is_printed_says_so_plainly(planned: Sweep) -> None:
    result = effects_of(planned, planned.arms[:3])
    (table,) = render(result)
    assert "3 of 4 runs are finished" in str(table.caption)
    noiseless = replace(result, noise=None, effects=[effect_of([0.95, 0.95, 0.95], 0.001)])
    caption = str(render(noiseless)[0].caption)
    assert "the values of model.lora.r are not distinguishable" in caption
    assert "noise of seeds: unknown" in caption
    equal = replace(result, effects=[effect_of([0.95, 0.96, 0.97], 0.001, SeedNoise(0.0, 0.0, 1))])
    assert "the runs of each value are equal, and one is enough" in str(render(equal)[0].caption)


def test_a_budget_starts_no_run_that_would_end_later(
    planned: Sweep, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sweep = plan_sweep(planned.path, [*ENTRIES, f"output_dir={tmp_path / 'run'}"])
    trainer, now = Trainer(), [0.0]

    def an_hour(arguments: Sequence[str]) -> int:
        now[0] += 3600
        return trainer(arguments)

    finished = train_arms(sweep, hours=2.5, train=an_hour, clock=lambda: now[0])
    assert len(finished) == len(trainer.calls) == 2
    assert "2 runs not started; the same command continues" in " ".join(capsys.readouterr().err.split())
    with pytest.raises(ConfigError, match="1 run of the sweep finished"):
        effects_of(sweep, finished[:1])


def test_permissions_go_to_the_trainings(arms: Path, tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(f"extends: {arms / 'plain.yaml'}\noutput_dir: {tmp_path / 'run'}\n")
    given: list[str] = []

    def train(arguments: Sequence[str]) -> int:
        given.extend(arguments)
        return 1

    assert train_arms(plan_sweep(path, ["seed=0,1"]), options=["--trust-remote-code"], train=train) == []
    assert given.count("--trust-remote-code") == 2


def test_a_run_that_fails_does_not_end_the_sweep(
    planned: Sweep, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sweep = plan_sweep(planned.path, ["classical.C=0.01,1", f"output_dir={tmp_path / 'run'}"])
    finished = train_arms(sweep, train=Trainer(fails="C-0.01"))
    assert [arm.settings["classical.C"] for arm in finished] == [1]
    assert "failed, and the next one is tried: out of memory" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("as_error", [False, True])
def test_a_signal_ends_the_sweep(planned: Sweep, tmp_path: Path, as_error: bool) -> None:
    """A training that was asked to end has kept its checkpoint, and no other one is started."""
    calls = []

    def ended(arguments: Sequence[str]) -> int:
        calls.append(arguments)
        if as_error:
            raise WorkerError("stopped by SIGINT", exit_code=130)
        return 130

    sweep = plan_sweep(planned.path, ["classical.C=0.01,1", f"output_dir={tmp_path / 'run'}"])
    with pytest.raises(WorkerError if as_error else KeyboardInterrupt):
        train_arms(sweep, train=ended)
    assert len(calls) == 1


def test_settings_go_in_step(arms: Path) -> None:
    sweep = plan_sweep(
        arms / "plain.yaml", ["classical.C+classical.max_iter=1+100,2+200", "classical.ngram_range=[1, 1],[1, 2]"]
    )
    assert [tuple(arm.settings.values()) for arm in sweep.arms] == [
        (1, 100, [1, 1]), (1, 100, [1, 2]), (2, 200, [1, 1]), (2, 200, [1, 2])
    ]  # fmt: skip
    assert sweep.arms[3].config.classical.ngram_range == (1, 2)
    assert len({arm.folder for arm in sweep.arms}) == 4


def test_settings_of_all_runs_are_in_their_names(arms: Path) -> None:
    """Or another sweep of the same axis would find its folders taken."""
    first, other = (plan_sweep(arms / "plain.yaml", ["seed=0,1", f"classical.C={value}"]) for value in (1, 2))
    assert [arm.folder.name for arm in first.arms] == ["seed-0_C-1", "seed-1_C-1"]
    assert not {arm.folder for arm in first.arms} & {arm.folder for arm in other.arms}


def test_names_that_would_be_equal_are_told_apart(arms: Path) -> None:
    sweep = plan_sweep(
        arms / "plain.yaml",
        [
            "classical.analyzer=word,char",
            "classical.ngram_range=[1,2],[1, 3]",
            *[
                f"classical.{key}={value},{value + 1}"
                for key, value in {"max_iter": 10**30, "C": 10**30, "n_features": 2**20}.items()
            ],
        ],
    )
    assert len({arm.folder for arm in sweep.arms}) == 32


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        ([], "nothing is varied"),
        (["seed=0"], "every setting has one value"),
        (["classical.C=1,2", "classical.C=3,4"], "classical.C stands in two axes"),
        (["classical.C+seed=1+2,3"], "needs 2 values in each place"),
        (["data.max_rows=10,20"], "data.max_rows can't be varied: it decides which rows are held out"),
        (["classical.C=1,-2"], "classical.C: Input should be greater than 0"),
        (["clasical.C=1,2"], "no such setting"),
        (["classical.C=1,[2"], "not valid YAML"),
    ],
)
def test_what_can_not_be_swept(arms: Path, entries: list[str], words: str) -> None:
    with pytest.raises(ConfigError, match=words.replace("[", r"\[")):
        plan_sweep(arms / "plain.yaml", entries)


def test_the_file_of_a_sweep_is_checked(arms: Path, tmp_path: Path) -> None:
    path = tmp_path / "sweep.yaml"
    for text, words in (
        ("axes: [{classical.C: [1, 2], seed: [1]}]", "as many values of each of its settings"),
        ("axes: [{classical.C: [1, 2]}], fold: [0]", "fold: no such setting; the nearest is folds"),
    ):
        path.write_text(f"{{config: {arms / 'plain.yaml'}, {text}}}")
        with pytest.raises(ConfigError, match=words):
            plan_sweep(path)


def test_the_command_trains_in_processes_of_their_own(planned: Sweep, cli: Cli) -> None:
    """Here nothing is left to train."""
    code, text = cli("sweep", planned.path, *ENTRIES)
    assert code == 0, text
    assert "C-0.01_seed-0 is finished" in text
    assert "classical.C: log loss on 74 rows" in text
    code, text = cli("sweep", planned.path, *ENTRIES, "--json")
    assert code == 0
    assert json.loads(text[text.index("{") : text.rindex("}") + 1])["finished"] == 4


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_sweeps_can_be_planned(path: Path, arms: Path) -> None:
    sweep = plan_sweep(path, [f"data.folder={json.dumps(str(arms))}", "model.base=embedded:llama-tiny"])
    assert len(sweep.arms) == 4
    assert {
        arm.config.model.lora.lora_alpha / arm.config.model.lora.r for arm in sweep.arms if arm.config.model.lora
    } == {2}


def test_trainings_share_their_tokens_and_get_the_hours_that_are_left(arms: Path, tmp_path: Path) -> None:
    """Half an hour a run, and two folds: the fit check of each fold may ask for half of what is left."""
    places = [f"data.folder={json.dumps(str(arms))}", f"output_dir={json.dumps(str(tmp_path / 'run'))}"]
    sweep, now = plan_sweep(SHIPPED[0], ["model.base=embedded:llama-tiny", *places], [0, 1]), [0.0]
    configs = []

    def half_an_hour(arguments: Sequence[str]) -> int:
        configs.append(load_config(sweep.path, [part for part in arguments[2:] if not part.startswith("--")]))
        now[0] += 1800
        return 1

    assert train_arms(sweep, hours=1.7, train=half_an_hour, clock=lambda: now[0]) == []
    assert [config.train.max_hours for config in configs] == pytest.approx([0.85, 0.6, 0.35])
    assert {config.data.cache_dir for config in configs} == {sweep.folder / "tokens"}


@pytest.mark.thorough
def test_the_rank_ablation_on_a_tiny_model(arms: Path, tmp_path: Path, cli: Cli) -> None:
    """arXiv 2512.12677 has rank 8 within 2% of the F1 of rank 16."""
    small = ["inputs.max_length=96", "inputs.num_proc=1", "train.max_steps=4", "train.eval_steps=2", "folds.n_splits=2"]
    places = [f"data.folder={json.dumps(str(arms))}", f"output_dir={json.dumps(str(tmp_path / 'run'))}"]
    code, text = cli("sweep", SHIPPED[0], "model.base=embedded:llama-tiny", *small, *places, "--json")
    assert code == 0, text
    result = json.loads((tmp_path / "run" / "sweep" / "sweep.json").read_text())
    assert (result["finished"], result["runs"]) == (4, 4)
    assert result["seed_noise"]["degrees"] == 2
    (effect,) = result["effects"]
    assert effect["settings"] == ["model.lora.r", "model.lora.lora_alpha"]
    assert [value["is_worse"] for value in effect["values"]] == [None, False]


def four_by_two(base: Arm) -> list[Arm]:
    """Four values, two seeds each."""
    return [replace(base, settings={"classical.C": value, "seed": seed}) for value in (1, 2, 3, 4) for seed in (0, 1)]


def test_settings_of_the_worse_half_leave_where_they_are_really_worse(
    planned: Sweep, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Value 2 is worse and in the better half; 3 in the worse half and within the noise; 4 leaves, both seeds."""
    arms, noise = four_by_two(planned.arms[0]), np.random.default_rng(0).normal(0, 0.001, (8, 500))
    figures = [0.900, 0.901, 0.902, 0.901, 0.902, 0.903, 0.980, 0.981]
    found = [Estimate(figure, figure + draws) for figure, draws in zip(figures, noise, strict=True)]
    common = open_runs([planned.arms[0].folder, planned.arms[1].folder], folds=[0])
    monkeypatch.setattr(halving, "figures_of_arms", lambda arms, folds: (common, found))
    trained: list[tuple[list[object], list[int]]] = []

    def train(part: Sweep) -> list[Arm]:
        trained.append(([arm.settings["classical.C"] for arm in part.arms], part.folds))
        return part.arms

    sweep = replace(planned, arms=arms, folds=[0, 1])
    finished, left = halving.halve_arms(sweep, train)
    assert trained == [([1, 1, 2, 2, 3, 3, 4, 4], [0]), ([1, 1, 2, 2, 3, 3], [0, 1])]
    assert finished == arms[:6]
    assert [(one.settings, one.folds) for one in left] == [({"classical.C": 4}, [0])]
    assert left[0].to_best == pytest.approx(0.08)
    assert left[0].threshold < 0.08
    with pytest.raises(ConfigError, match="the sweep has one"):
        halving.halve_arms(replace(sweep, folds=[0]), train)
    assert halving.halve_arms(sweep, lambda part: []) == ([], [])  # out of time: nobody is judged
    result = effects_of(planned, planned.arms, left)
    assert result.as_dict()["left"][0]["settings"] == {"classical.C": 4}
    assert "left after 1 fold: {'classical.C': 4} (+0.0800)" in str(render(result)[0].caption)
