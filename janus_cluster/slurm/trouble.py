"""Faults of Slurm itself, by what its programs print: no configuration, munge, another key, no controller. Pure.

Source: messages of 22.05 to 25.05, and captured output.
"""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Trouble:
    """`cause`: what is wrong with this Slurm. `remedy`: what to type."""

    cause: str
    remedy: str


_AWAY = Trouble(
    "its controller does not answer", "scontrol ping   # shows whether the controller is up; the same line then"
)
# First match counts: a munge that is down also ends as an authentication error.
_TROUBLES: tuple[tuple[re.Pattern[str], Trouble], ...] = (
    (
        re.compile(
            r"could not establish a configuration|unable to process configuration file|DNS SRV lookup failed|"
            r"fetch_config|slurm\.conf.{0,40}No such file|Unable to determine this slurmd's NodeName",
            re.IGNORECASE,
        ),
        Trouble(
            "this machine has no configuration of it",
            "export SLURM_CONF=/…/slurm.conf, or do it on a login node of the cluster",
        ),
    ),
    (
        re.compile(r"munge encode failed|failed to access \S*munge|if munged is up|munge\.socket", re.IGNORECASE),
        Trouble(
            "munge does not run on this machine", "munge -n   # fails while munged is down: ask the administrators"
        ),
    ),
    (
        re.compile(
            r"protocol authentication error|invalid (?:authentication )?credential|munge decode failed|"
            r"(?:rewound|expired|replayed) credential|auth(?:entication)? plugin|authentication error|munge",
            re.IGNORECASE,
        ),
        Trouble(
            "it does not accept this machine's credentials",
            "munge -n | ssh CONTROLLER unmunge   # the munge keys or the clocks differ: ask the administrators",
        ),
    ),
    (
        re.compile(r"incompatible .*version|header lengths are longer", re.IGNORECASE),
        Trouble("its version does not fit the programs on PATH", "sinfo --version   # that of this machine"),
    ),
    (
        re.compile(
            r"unable to contact slurm (?:controller|database)|connect(?:ion)? (?:failure|refused)|standby mode|"
            r"socket timed out|slurm controller is not ready|zero bytes were transmitted|"
            r"transport endpoint is not connected|unexpected message received|no route to host|"
            r"temporarily unable to accept job|"
            r"communications? (?:connection )?(?:failure|shutdown|receive|send)",
            re.IGNORECASE,
        ),
        _AWAY,
    ),
)


def find_trouble(message: str) -> Trouble | None:
    """The fault of Slurm itself that a program's message shows; None for a message about a job or an option."""
    return next((trouble for pattern, trouble in _TROUBLES if pattern.search(message)), None)


def no_answer() -> Trouble:
    """A program that printed nothing until its time limit."""
    return _AWAY
