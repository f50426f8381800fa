"""Steps and the master address of an allocation, with a stand-in for srun on PATH."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from janus_cluster.errors import SlurmUnavailable
from janus_cluster.slurm.launcher import SlurmLauncher


def launcher(*nodes: str) -> SlurmLauncher:
    return SlurmLauncher("slurm", "7", nodes)


def test_a_name_that_leads_to_where_node_1_is_spoken_to_is_the_address() -> None:
    assert launcher("localhost", "127.0.0.2").master_addr() == "localhost"


def test_a_name_that_means_something_else_on_its_own_host_is_not_used() -> None:
    # As /etc/hosts of Debian has it: the host's own name is 127.0.1.1, and 127.0.0.1 is what speaks to the others here.
    assert launcher("127.0.1.1", "127.0.0.2").master_addr() == "127.0.0.1"


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


def test_a_step_gets_all_of_the_node_whatever_the_job_said_of_tasks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
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


@pytest.mark.parametrize(("spare", "refusal"), [("gpu:h800:8", None), ("gpu:v100:4", "has 0 other nodes")])
def test_a_node_of_another_kind_takes_no_bad_nodes_place(
    spare: str, refusal: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = f"n1 mixed gpu:h800:8\nn2 idle {spare}\nn3 down* gpu:h800:8\ncpu1 idle (null)"
    for name, said in (("sinfo", rows), ("scontrol", "")):
        (tmp_path / name).write_text(f"#!/bin/sh\necho '{said}'\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    words = launcher("n1").requeue_without(["n1"])
    assert words is None if refusal is None else refusal in (words or "")


def test_a_setup_that_took_srun_away_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SlurmUnavailable, match=r"no srun on PATH of n1.*environment\.setup"):
        launcher("n1").start(["true"], end_together=True)
