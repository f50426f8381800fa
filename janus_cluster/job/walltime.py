"""Slurm's time limit, the stop signal before it, and whether the two leave time to work. Pure functions."""

from __future__ import annotations

import re
from collections.abc import Mapping

from janus_cluster.job.schema import Restart

_WALLTIME = re.compile(
    r"(?P<minutes>\d+)"
    r"|(?P<m>\d+):(?P<s>[0-5]?\d)"
    r"|(?P<h>\d+):(?P<hm>[0-5]?\d):(?P<hs>[0-5]?\d)"
    r"|(?P<d>\d+)-(?P<dh>[01]?\d|2[0-3])(?::(?P<dm>[0-5]?\d)(?::(?P<ds>[0-5]?\d))?)?",
    re.ASCII,
)
_UNIT_S = {"d": 86400, "dh": 3600, "h": 3600, "minutes": 60, "m": 60, "hm": 60, "dm": 60, "s": 1, "hs": 1, "ds": 1}
_UNLIMITED = frozenset(["UNLIMITED", "INFINITE"])
_LEAD = re.compile(r"@(\d+)$")
# sbatch(1), --signal: the time without @<seconds>, and how much earlier than asked the signal may come.
_DEFAULT_LEAD_S = 60
_EARLY_S = 60
# Less than this for the gate, loading and training makes no progress that a stop would not undo.
_SHORT_S = 300
# From the signal to the ranks and from the checkpoint to the requeue.
_AROUND_STOP_S = 30


def parse_walltime_min(text: str) -> int | None:
    """Minutes of a Slurm time limit, rounded up as Slurm does; None: without limit. Raises: ValueError."""
    if text.upper() in _UNLIMITED:
        return None
    match = _WALLTIME.fullmatch(text)
    if match is None:
        raise ValueError(
            "no time limit; allowed: minutes, MM:SS, HH:MM:SS, D-HH, D-HH:MM, D-HH:MM:SS, e.g. 24:00:00, 2-12"
        )
    total_s = sum(_UNIT_S[unit] * int(count) for unit, count in match.groupdict().items() if count)
    if total_s == 0:
        raise ValueError("0 means no limit to Slurm; write UNLIMITED if that is meant")
    return -(-total_s // 60)


def stop_lead_s(options: Mapping[str, str | None]) -> int:
    """Seconds from the stop signal to the time limit, as the #SBATCH lines ask; 0: no signal is asked for."""
    signal = options.get("signal")
    if signal is None:
        return 0
    found = _LEAD.search(signal)
    return int(found[1]) if found else _DEFAULT_LEAD_S


def find_time_conflicts(options: Mapping[str, str | None]) -> list[str]:
    """The time limit and the stop signal where together they leave no time to work."""
    (key, limit), lead_s = _shortest(options), stop_lead_s(options)
    if limit is None or limit > lead_s:
        return []
    return [
        f"slurm.{key}: {options[key]!r} is {limit} s, and the stop signal comes {lead_s} s before the end "
        f"(slurm.signal: {options['signal']}): nothing would run. "
        f"Type --set slurm.{key}={-(-lead_s // 60) + 30}, or --set slurm.signal=B:USR1@<less than {limit}>"
    ]


def warn_of_times(options: Mapping[str, str | None], restart: Restart) -> list[str]:
    """What of the time limit, the stop signal and restart.on_stop will cost work, with the arithmetic."""
    (key, limit), lead_s = _shortest(options), stop_lead_s(options)
    found: list[str] = []
    left = None if limit is None else limit - lead_s - _EARLY_S
    if lead_s and left is not None and left < _SHORT_S:
        found.append(
            f"slurm.{key}: {options[key]}: {limit} s less {lead_s} s (slurm.signal) less up to {_EARLY_S} s, by "
            f"which Slurm may be early, leave {max(0, left)} s of each attempt for the gate, loading and training"
        )
    if lead_s and lead_s < restart.stop_timeout_s + _AROUND_STOP_S:
        found.append(
            f"slurm.signal: {options['signal']}: Slurm ends the job {lead_s} s after the signal, but the ranks may "
            f"take {restart.stop_timeout_s} s to their checkpoint (restart.stop_timeout_s); type "
            f"--set slurm.signal=B:USR1@{restart.stop_timeout_s + 60}, or a smaller restart.stop_timeout_s"
        )
    if restart.on_stop == "requeue" and "no-requeue" in options:
        found.append(
            "slurm.no-requeue: Slurm will refuse to requeue this job, so after a stop signal it ends "
            "(restart.on_stop: requeue); take the key out, or --set restart.on_stop=end"
        )
    if restart.on_stop == "requeue" and not {"requeue", "no-requeue"} & set(options):
        found.append(
            "slurm.requeue: false: the site's JobRequeue decides whether Slurm requeues this job; where it does not, "
            "the job ends after a stop signal (restart.on_stop: requeue); take the key out, or "
            "--set restart.on_stop=end"
        )
    return found


def _shortest(options: Mapping[str, str | None]) -> tuple[str, int | None]:
    """The option that bounds the job's time most narrowly, and its seconds; None: no limit.

    With time-min Slurm may start the job with any limit from that one on.
    """
    minutes = {key: parse_walltime_min(text) for key in ("time", "time-min") if (text := options.get(key))}
    limits = {key: 60 * number for key, number in minutes.items() if number is not None}
    return min(limits.items(), key=lambda item: item[1], default=("time", None))
