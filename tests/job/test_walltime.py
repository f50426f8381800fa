"""Slurm's time limit, and whether it leaves time to work beside the stop signal."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from janus_cluster.errors import UsageError
from janus_cluster.job.resolved import ResolvedJob
from janus_cluster.job.walltime import parse_walltime_min, stop_lead_s


@pytest.mark.parametrize(
    ("text", "minutes"),
    [
        ("60", 60),
        ("90:30", 91),
        ("24:00:00", 1440),
        ("00:30:00", 30),
        ("0:0:1", 1),
        ("1-0", 1440),
        ("2-12", 3600),
        ("1-02:03", 1563),
        ("1-02:03:04", 1564),
        ("UNLIMITED", None),
        ("infinite", None),
    ],
)
def test_walltime_is_read_as_slurm_reads_it(text: str, minutes: int | None) -> None:
    assert parse_walltime_min(text) == minutes


@pytest.mark.parametrize(
    "text", ["", "0", "00:00:00", "1:2:3:4", "24h", "1-24", "1-", "-5", "1.5", "12:60", "1:60:00", "１２", " 5", "5 "]
)
def test_no_walltime_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"allowed|UNLIMITED"):
        parse_walltime_min(text)


@pytest.mark.parametrize(
    ("signal", "lead_s"), [(None, 0), ("B:USR1", 60), ("B:USR1@300", 300), ("RB:SIGUSR1@5", 5), ("B:10@90", 90)]
)
def test_the_lead_of_the_stop_signal(signal: str | None, lead_s: int) -> None:
    assert stop_lead_s({} if signal is None else {"signal": signal}) == lead_s


@pytest.mark.parametrize(
    "sets", [["slurm.time=5"], ["slurm.time=00:00:30"], ["slurm.time=1:00:00", "slurm.signal=B:USR1@3600"]]
)
def test_a_time_limit_within_the_signals_lead_is_refused_with_what_to_type(
    resolve: Callable[..., ResolvedJob], sets: list[str]
) -> None:
    with pytest.raises(UsageError) as caught:
        resolve("demo", sets=sets, cluster="slurm")
    for part in ("slurm.time", "slurm.signal", "--set slurm.time="):
        assert part in str(caught.value)
    # Without Slurm nothing sends that signal.
    assert not [w for w in resolve("demo", sets=sets, cluster="local").warnings if "slurm." in w]


@pytest.mark.parametrize(
    ("sets", "parts"),
    [
        (["slurm.time=10"], ["600 s less 300 s", "leave 240 s of each attempt"]),
        (["slurm.time=6"], ["leave 0 s"]),
        (["slurm.signal=B:USR1@60"], ["60 s after the signal", "may take 240 s", "slurm.signal=B:USR1@300"]),
        (["slurm.signal=B:USR1@300", "restart.stop_timeout_s=400"], ["may take 400 s", "slurm.signal=B:USR1@460"]),
        (["slurm.no-requeue=true"], ["slurm.no-requeue", "--set restart.on_stop=end"]),
        (["slurm.requeue=false"], ["slurm.requeue: false", "JobRequeue", "--set restart.on_stop=end"]),
        (["slurm.time-min=10"], ["slurm.time-min: 10: 600 s less 300 s", "leave 240 s of each attempt"]),
    ],
)
def test_times_that_cost_work_are_warned_of_with_the_arithmetic(
    resolve: Callable[..., ResolvedJob], sets: list[str], parts: list[str]
) -> None:
    (warning,) = [w for w in resolve("demo", sets=sets, cluster="slurm").warnings if w.startswith("slurm.")]
    for part in parts:
        assert part in warning


@pytest.mark.parametrize("sets", [[], ["slurm.no-requeue=true", "restart.on_stop=end"], ["slurm.time=UNLIMITED"]])
def test_times_that_work_together_are_not_warned_of(resolve: Callable[..., ResolvedJob], sets: list[str]) -> None:
    assert not [w for w in resolve("demo", sets=sets, cluster="slurm").warnings if w.startswith("slurm.")]
