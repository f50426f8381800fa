"""Commands while Slurm itself has a fault: exit code 21, Slurm's message, no advice about the job file."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from fake_site import Site

from janus_cluster.run.paths import RunDir

pytestmark = pytest.mark.slow

FAULTS = {
    "no configuration": "fatal: Could not establish a configuration source",
    "munge is down": 'error: Munge encode failed: Failed to access "/run/munge/munge.socket.2"',
    "another key": "error: Protocol authentication error",
    "no controller": "error: Unable to contact slurm controller (connect failure)",
}


def break_slurm(site: Site, message: str) -> None:
    for program in ("sbatch", "squeue", "scontrol", "scancel", "sinfo", "sacct"):
        site.script(program, f"echo '{program}: {message}' >&2; exit 1")


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(tmp_path)


@pytest.fixture
def queued(site: Site) -> RunDir:
    site.script("sbatch", "echo Submitted batch job 4711")
    assert site.janus("submit", "demo").returncode == 0
    return site.runs()[0]


@pytest.mark.parametrize("fault", FAULTS)
def test_a_submit_is_refused_with_the_message_of_the_fault(site: Site, fault: str) -> None:
    break_slurm(site, FAULTS[fault])
    done = site.janus("submit", "demo")
    assert (done.returncode, site.runs()) == (21, [])
    assert FAULTS[fault].split(": ", 1)[1] in done.stderr and "keys under" not in done.stderr


@pytest.mark.parametrize("command", [("cancel", "--yes"), ("resume",)])
@pytest.mark.parametrize("fault", ["munge is down", "no controller"])
def test_a_later_command_is_as_clear_and_changes_nothing(
    site: Site, queued: RunDir, fault: str, command: tuple[str, ...]
) -> None:
    break_slurm(site, FAULTS[fault])
    done = site.janus(command[0], str(queued.path), *command[1:])
    assert done.returncode == 21
    assert FAULTS[fault].split(": ", 1)[1] in done.stderr and "--cluster local" not in done.stderr
    assert len(site.calls("sbatch")) == 1


@pytest.mark.slow
def test_a_cancel_does_not_wait_long_for_a_controller_that_hangs(site: Site, queued: RunDir) -> None:
    for program in ("squeue", "scontrol", "scancel", "sinfo"):
        site.script(program, "exec sleep 60")
    begun = time.monotonic()
    done = site.janus("cancel", str(queued.path), "--yes")
    assert done.returncode == 21 and time.monotonic() - begun < 20
    assert "job 4711 was not cancelled" in done.stderr and "--cluster local" not in done.stderr


def test_a_sandbox_without_slurms_programs_is_no_slurm(site: Site) -> None:
    # sinfo is on no PATH of this test; daemons are searched in the system's folders, too.
    done = site.janus("submit", "demo", "--cluster", "sandbox", PATH=str(site.folder / "bin"))
    assert (done.returncode, site.runs()) == (21, [])
    assert "this machine has no" in done.stderr and "apt-get install slurm-wlm" in done.stderr
