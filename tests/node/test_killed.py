"""What a node's log holds of a torchrun that was killed, and of the kernel's memory killer."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from janus_cluster.node.oom import read_oom_kills
from janus_cluster.node.task import _run_training
from janus_cluster.preflight.sysfs import NodeRoot


def cgroup(folder: Path, *, version: int, kills: int) -> NodeRoot:
    """A root in which this process has such a memory cgroup."""
    line, path, name = {
        2: ("0::/job_7/step_1", "sys/fs/cgroup/job_7/step_1", "memory.events"),
        1: ("9:memory:/job_7/step_1", "sys/fs/cgroup/memory/job_7/step_1", "memory.oom_control"),
    }[version]
    (folder / "proc" / "self").mkdir(parents=True, exist_ok=True)
    (folder / "proc" / "self" / "cgroup").write_text(f"12:cpu:/other\n{line}\n" if version == 1 else f"{line}\n")
    (folder / path).mkdir(parents=True, exist_ok=True)
    (folder / path / name).write_text(f"oom 3\noom_kill {kills}\noom_group_kill 9\n")
    return NodeRoot.of(str(folder))


@pytest.mark.parametrize("version", [1, 2])
def test_the_kernels_count_is_read_from_both_versions(version: int, tmp_path: Path) -> None:
    assert read_oom_kills(cgroup(tmp_path, version=version, kills=2)) == 2


def test_without_a_memory_cgroup_there_are_none(tmp_path: Path) -> None:
    (tmp_path / "sys").mkdir()
    assert read_oom_kills(NodeRoot.of(str(tmp_path))) == 0


def test_what_killed_training_is_in_the_nodes_log(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    root = cgroup(tmp_path, version=2, kills=1)
    events = root.sys / "fs/cgroup/job_7/step_1/memory.events"
    kills_itself = f"import os; open({str(events)!r}, 'w').write('oom_kill 3\\n'); os.kill(os.getpid(), 9)"
    assert _run_training([sys.executable, "-c", kills_itself], os.environ, None, root) == 137
    assert capfd.readouterr().out.splitlines() == [
        "memory: the kernel ended 2 processes of this job (oom_kill of its memory cgroup)",
        "torchrun of this node was ended by SIGKILL",
    ]
    assert _run_training([sys.executable, "-c", "raise SystemExit(3)"], os.environ, None, root) == 3
    assert capfd.readouterr().out == ""
