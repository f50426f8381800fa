"""Steps and the master address of an allocation, with a stand-in for srun on PATH."""

from __future__ import annotations

import json
import socket
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from janus_cluster.errors import SlurmUnavailable
from janus_cluster.node.slurm_launcher import SlurmLauncher

pytestmark = pytest.mark.slow


def launcher(*nodes: str) -> SlurmLauncher:
    return SlurmLauncher("slurm", "7", nodes)


def test_a_name_that_leads_to_where_node_1_is_spoken_to_is_the_address() -> None:
    assert launcher("localhost", "127.0.0.2").master_addr() == "localhost"


def test_a_name_that_means_something_else_on_its_own_host_is_not_used() -> None:
    # As /etc/hosts of Debian has it: the host's own name is 127.0.1.1, and 127.0.0.1 leads to the others here.
    assert launcher("127.0.1.1", "127.0.0.2").master_addr() == "127.0.0.1"


@pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason="this host has no IPv6")
def test_a_peer_with_ipv6_alone_is_reached_from_an_address_of_that_kind() -> None:
    assert launcher("127.0.1.1", "::1").master_addr() == "::1"
    assert launcher("::1", "::1").master_addr() == "::1"


def test_one_node_needs_no_other_address() -> None:
    assert launcher("127.0.1.1").master_addr() == "127.0.1.1"


@pytest.mark.parametrize(
    ("scontrol", "address"),
    [
        ("echo NodeName=$4 NodeAddr=127.0.0.3", "127.0.0.1"),
        ("echo Node $4 not found; exit 1", "127.0.1.1"),
    ],
    ids=["known to Slurm", "hidden by PrivateData"],
)
def test_a_peer_that_does_not_resolve_is_asked_of_slurm(
    scontrol: str, address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "scontrol").write_text(f"#!/bin/sh\n{scontrol}\n")
    (tmp_path / "scontrol").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert launcher("127.0.1.1", "no-such-host.invalid").master_addr() == address


def test_a_step_gets_all_of_the_node_for_any_tasks_of_the_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = tmp_path / "seen.json"
    srun = tmp_path / "srun"
    srun.write_text(
        f"#!{sys.executable}\nimport json, os, sys\njson.dump([dict(os.environ), sys.argv], open({str(seen)!r}, 'w'))\n"
    )
    srun.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "64")
    monkeypatch.setenv("SLURM_TRES_PER_TASK", "cpu=8")
    monkeypatch.setenv("KEPT", "yes")
    step = launcher("n1").start(["true"], end_together=True)
    assert step.wait(timeout_s=30, on_wait=lambda _: None) == 0
    environ, argv = json.loads(seen.read_text())
    assert "--mem=0" in argv and "--cpu-bind=none" in argv
    assert environ["KEPT"] == "yes"
    assert not {"SLURM_CPUS_PER_TASK", "SLURM_TRES_PER_TASK"} & set(environ)


def test_a_step_has_the_jobs_own_options_of_srun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "srun").write_text(f"#!/bin/sh\necho $* > {tmp_path}/seen\n")
    (tmp_path / "srun").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    extra = ("--container-image=x",)
    step = SlurmLauncher("slurm", "7", ("n1",), srun_extra=extra).start(["/bin/task"], end_together=True)
    assert step.wait(timeout_s=30, on_wait=lambda _: None) == 0
    assert "--container-image=x /bin/task" in (tmp_path / "seen").read_text()


@pytest.mark.parametrize(("spare", "refusal"), [("gpu:h800:8", None), ("gpu:v100:4", "has 0 other nodes")])
def test_a_node_of_another_kind_takes_no_bad_nodes_place(
    spare: str, refusal: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = f"n1 mixed gpu:h800:8\nn2 idle {spare}\nn3 down* gpu:h800:8\ncpu1 idle (null)"
    for name, output in (("sinfo", rows), ("scontrol", "")):
        (tmp_path / name).write_text(f"#!/bin/sh\necho '{output}'\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    words = launcher("n1").requeue_without(["n1"])
    assert words is None if refusal is None else refusal in (words or "")


def test_a_setup_that_took_srun_away_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SlurmUnavailable, match=r"no srun on PATH of n1.*environment\.setup"):
        launcher("n1").start(["true"], end_together=True)


LOST = [
    "Zero Bytes were transmitted or received",
    "Protocol authentication error",
    "Transport endpoint is not connected",
    "Unexpected message received for job 7",
    "Unable to contact slurm controller (connect failure)",
]


def fake_slurm(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    *,
    scontrol: str,
    restarts: int | None,
    state: str = "RUNNING",
    reason: str = "None",
) -> Path:
    """scontrol and squeue as scripts on PATH. Returns: the file with a line for each call of scontrol."""
    row = f"7\x1f{state}\x1f0\x1f{restarts}\x1fn1\x1f1\x1f1\x1f{reason}\x1f/j\x1fj\x1f"
    squeue = "echo down >&2; exit 1" if restarts is None else f"echo '{row}'"
    calls = folder / "calls"
    calls.touch()
    for name, text in (("scontrol", f"echo $* >> {calls}\n{scontrol}"), ("squeue", squeue)):
        (folder / name).write_text(f"#!/bin/sh\n{text}\n")
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/bin:/usr/bin")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    return calls


@pytest.mark.parametrize("message", LOST)
def test_a_requeue_is_tried_again_whatever_the_controller_answers(
    message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer = f"[ $(wc -l < {tmp_path}/calls) -gt 1 ] || {{ echo '{message}' >&2; exit 1; }}"
    calls = fake_slurm(tmp_path, monkeypatch, scontrol=answer, restarts=1)
    assert launcher("n1").requeue() is None
    assert calls.read_text().splitlines() == ["requeue 7"] * 2


@pytest.mark.parametrize(
    "message", ["Invalid job id specified", "Access/permission denied", "Job/step already completing"]
)
def test_a_refusal_that_another_try_cannot_change_ends_it(
    message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = fake_slurm(tmp_path, monkeypatch, scontrol=f"echo '{message}' >&2; exit 1", restarts=1)
    assert message in (launcher("n1").requeue() or "")
    assert len(calls.read_text().splitlines()) == 1


def test_a_requeue_whose_answer_was_lost_is_not_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = fake_slurm(tmp_path, monkeypatch, scontrol=f"echo '{LOST[0]}' >&2; exit 1", restarts=2)
    assert launcher("n1").requeue() is None
    assert len(calls.read_text().splitlines()) == 1


@pytest.mark.parametrize(
    ("seen", "is_ended"),
    [
        ({"state": "COMPLETING", "restarts": 1}, True),
        ({"state": "CANCELLED", "restarts": 1}, True),
        ({"state": "RUNNING", "restarts": 1}, False),
        ({"state": "COMPLETING", "restarts": 1, "reason": "TimeLimit"}, False),
        ({"state": "COMPLETING", "restarts": 2}, False),
        ({"state": "PENDING", "restarts": 2, "reason": "BeginTime"}, False),
        ({"restarts": None}, False),
    ],
)
def test_a_job_that_slurm_ends_is_known_from_one_that_is_requeued_or_whose_time_is_up(
    seen: dict[str, Any], is_ended: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_slurm(tmp_path, monkeypatch, scontrol="exit 1", **seen)
    assert launcher("n1").is_ended_by_slurm() is is_ended


def test_a_requeue_is_given_up_shortly_before_the_job_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = fake_slurm(tmp_path, monkeypatch, scontrol=f"echo '{LOST[0]}' >&2; exit 1", restarts=None)
    monkeypatch.setenv("SLURM_JOB_END_TIME", str(int(time.time()) + 61))
    assert LOST[0] in (launcher("n1").requeue() or "")
    assert len(calls.read_text().splitlines()) > 1
