"""The first order of all rows, then what gains most a second; in part where the time ends."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from pairclf.inference.schedule import MIN_SHARE, CandidatePass, reserved_seconds, schedule

seconds = st.floats(1, 1000)
gains = st.floats(0, 0.1)
passes = st.lists(st.tuples(seconds, seconds, gains, gains), min_size=1, max_size=4).map(
    lambda members: [
        CandidatePass(member, rank, time, load if member else 0.0, gain)
        for member, (time, load, *both) in enumerate(members)
        for rank, gain in zip((1, 2), both, strict=True)
    ]
)


@given(passes, st.floats(0, 10_000))
def test_what_is_planned_fits_and_nothing_is_forgotten(given_passes: list[CandidatePass], time: float) -> None:
    stages = schedule(given_passes, time)
    assert sorted(stage.candidate[:2] for stage in stages) == sorted(one[:2] for one in given_passes)
    spent = sum(stage.seconds for stage in stages if stage.share > 0)
    tried = stages[0].seconds if stages[0].share == MIN_SHARE else 0.0  # in any case, also where there is no time
    assert spent <= max(time, tried) + 1e-6
    assert stages[0].candidate[:2] == (0, 1)
    if sum(one.seconds for one in given_passes) + sum(p.load_seconds for p in given_passes if p.rank == 1) <= time:
        assert all(stage.share == 1 for stage in stages)


@given(passes, st.floats(0, 10_000))
def test_a_second_order_has_its_first(given_passes: list[CandidatePass], time: float) -> None:
    shares = {stage.candidate[:2]: stage.share for stage in schedule(given_passes, time)}
    assert all(shares[member, 1] == 1 for (member, rank), share in shares.items() if rank == 2 and share > 0)


def test_gain_by_second_decides() -> None:
    first, swap = CandidatePass(0, 1, 100, 0, 0.15), CandidatePass(0, 2, 100, 0, 0.006)
    other = CandidatePass(1, 1, 100, 50, 0.02)
    assert [stage.candidate for stage in schedule([first, swap, other], 250)] == [first, other, swap]
    assert [stage.candidate for stage in schedule([first, swap, other._replace(load_seconds=400)], 250)][:2] == [
        first,
        swap,
    ]


def test_the_last_pass_is_in_part_and_those_after_it_are_not_begun() -> None:
    first, swap, other = (
        CandidatePass(0, 1, 100, 0, 0.15),
        CandidatePass(0, 2, 100, 0, 0.006),
        CandidatePass(1, 1, 100, 50, 0.001),
    )
    shares = [stage.share for stage in schedule([first, swap, other], 130)]
    assert shares == [1.0, 0.3, 0.0]


def test_time_is_kept_for_other_members() -> None:
    """For those that were chosen before: what comes after must not keep a pass from its end."""
    passes = [CandidatePass(0, 1, 100, 0, 0.15), CandidatePass(0, 2, 100, 0, 0.006), CandidatePass(1, 1, 100, 50, 0.02)]
    stages = schedule(passes, 1000)
    assert [reserved_seconds(stages, *one[:2]) for one in passes] == [0, 150, 100]
