"""Faults of a night that need no Slurm: one fault on two simulated nodes, the card, and the next command as typed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from demo_runs import EVERY, JOB, read_curve, requires_nothing_lost, wait_until

from janus_cluster.run.files import read_json
from janus_cluster.run.paths import RunDir
from tests.conftest import not_tested

pytestmark = pytest.mark.train

STEPS = 3 * EVERY
# Long enough that no run ends before its fault.
MANY = 5000


class Desk:
    """janus-cluster for jobs on this machine, with a home and data of its own; every command runs in another folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.started: list[RunDir] = []
        world = [sys.executable, "-m", "janus_cluster.janusvln.world.demo", str(folder / "data"), "--episodes", "6"]
        subprocess.run(world, check=True, capture_output=True, timeout=600)
        (folder / "elsewhere").mkdir()
        (folder / "bin").mkdir()
        program = folder / "bin" / "janus-cluster"
        program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m janus_cluster.cli "$@"\n')
        program.chmod(0o755)

    def type(self, line: str) -> subprocess.CompletedProcess[str]:
        """What a shell in another folder makes of this line."""
        environ = os.environ | {"JANUS_HOME": str(self.folder / "home"), "DEMO_DATA": str(self.folder / "data")}
        return subprocess.run(
            ["bash", "-c", line],
            cwd=self.folder / "elsewhere",
            env=environ | {"PATH": f"{self.folder / 'bin'}:{os.environ['PATH']}"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
            timeout=600,
        )

    def submit(self, *sets: str, steps: int = MANY) -> RunDir:
        values = [*sets, f"training.max_steps={steps}", "restart.on_failure=never"]
        options = " ".join([*JOB, *(f"--set {value}" for value in values)])
        done = self.type(f"janus-cluster submit demo --nodes 2 --cluster local --json {options}")
        assert done.returncode == 0, done.stderr
        self.started.append(RunDir(Path(json.loads(done.stdout)["run_dir"])))
        return self.started[-1]

    def status(self, run: RunDir) -> dict[str, Any]:
        done = self.type(f"janus-cluster status {run.path} --json")
        assert done.returncode == 0, done.stderr
        value: dict[str, Any] = json.loads(done.stdout)
        return value

    def wait_for_step(self, run: RunDir, step: int) -> None:
        wait_until(lambda: max(read_curve(run), default=0) >= step)

    def wait_for_end(self, run: RunDir, state: str, *, attempt: int = 1) -> dict[str, Any]:
        wait_until(lambda: (s := self.status(run))["state"] == state and s["attempt"] == attempt, pause_s=1.0)
        return self.status(run)

    def end_all(self) -> None:
        """No job that a failed test left is running."""
        for run in self.started:
            self.type(f"janus-cluster cancel {run.path} --yes")


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Desk]:
    desk = Desk(tmp_path_factory.mktemp("night"))
    yield desk
    desk.end_all()


def pid_of(run: RunDir, rank: int) -> int:
    return int(read_json(run.heartbeat_json(1, rank))["pid"])


def wait_until_gone(run: RunDir) -> None:
    """The run's process has ended, whatever it could write of its end."""
    pid = read_json(run.submission_json)["job_id"].removeprefix("local-")
    command_line = Path(f"/proc/{pid}/cmdline")
    wait_until(lambda: not command_line.exists() or not command_line.read_bytes())


def first_failed(status: dict[str, Any]) -> tuple[Any, ...]:
    return status["state"], status["exit_code"], status["card"]["kind"], status["card"]["rank"], status["card"]["node"]


def test_a_rank_that_sigbus_ended_is_named_beside_a_log_of_500_mb(desk: Desk) -> None:
    run = desk.submit(steps=10 * EVERY)
    desk.wait_for_step(run, EVERY + 1)
    line = b"a line that a library prints again and again\n"
    with run.rank_log(1, "local-02", 1).open("ab") as log:
        for _ in range(500):
            log.write(line * (1_000_000 // len(line)))
    os.kill(pid_of(run, 1), signal.SIGBUS)
    killed_at = time.time()
    status = desk.wait_for_end(run, "FAILED")
    assert first_failed(status) == ("FAILED", 12, "signal", 1, "local-02")
    assert read_json(run.attempt_json(1))["ended_at"] - killed_at < 60
    look, resume, tail = status["next"]
    for command in (f"janus-cluster status {run.name}", look, tail):
        begun = time.monotonic()
        done = desk.type(command)
        assert done.stdout and time.monotonic() - begun < 20, (command, done)
    saved = status["card"]["checkpoint"]["step"]
    done = desk.type(resume)
    assert done.returncode == 0, done.stderr
    desk.wait_for_end(run, "COMPLETED", attempt=2)
    requires_nothing_lost(run, resumed_at=saved, steps=10 * EVERY)


def test_an_exception_of_10000_characters_of_any_bytes_is_a_card_of_one_screen(desk: Desk) -> None:
    hook = desk.folder / "hook" / "sitecustomize.py"
    hook.parent.mkdir()
    hook.write_text(RAISES)
    run = desk.submit(f"environment.variables.PYTHONPATH={hook.parent}")
    status = desk.wait_for_end(run, "FAILED")
    assert first_failed(status) == ("FAILED", 12, "exception", 1, "local-02")
    assert status["card"]["message"].startswith("RuntimeError: a kernel failed \ufffd\ufffd\ufffd 0123456789")
    shown = desk.type(f"janus-cluster status {run.name}").stdout
    assert len(shown) < 4000 and not {"\x1b", "\x07", "\u202e"} & set(shown)
    assert max(map(len, run.batch_log.read_bytes().splitlines())) < 1000
    for command in status["next"]:
        assert desk.type(command).stdout, command
    desk.type(f"janus-cluster cancel {run.name} --yes")


RAISES = r"""
import os, sys
if os.environ.get("RANK") == "1" and "janus_cluster.training" in sys.orig_argv:
    import torch
    calls, backward = [], torch.autograd.backward
    def fail(*args, **kwargs):
        calls.append(1)
        if len(calls) > 2:
            bad = b"\xff\xfe\x80".decode("utf-8", "surrogateescape")
            raise RuntimeError("a kernel\x1b[2J\x1b]0;title\x07 failed " + bad + "\u202e " + "0123456789" * 1000)
        return backward(*args, **kwargs)
    torch.autograd.backward = fail
"""


@contextmanager
def read_only(folder: Path) -> Iterator[None]:
    """Inside the block all that is opened below it is read-only, as on a server that exports it so."""
    subprocess.run(["mount", "--bind", str(folder), str(folder)], check=True)
    try:
        subprocess.run(["mount", "-o", "remount,bind,ro", str(folder)], check=True)
        yield
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def test_a_read_only_run_folder_is_on_the_card_and_the_run_goes_on_once_it_is_writable(desk: Desk) -> None:
    if os.geteuid() != 0:
        not_tested("only root can mount a folder read-only")
    run = desk.submit(steps=STEPS)
    desk.wait_for_step(run, EVERY + 1)
    changed_at = time.monotonic()
    with read_only(run.path):
        wait_until_gone(run)
        status = desk.status(run)
        took_s = time.monotonic() - changed_at
        # No file can take the exit code: the process alone shows that it has ended.
        assert first_failed(status) == ("FAILED", None, "read_only", 0, "local-01")
        assert str(run.checkpoints) in status["card"]["message"] and took_s < 60
        look, resume = status["next"]
        assert "ro" in desk.type(look).stdout.split()[-1].split(",")
        refused = desk.type(resume)
        assert refused.returncode == 2 and "Read-only file system" in refused.stderr
        assert f"findmnt -T {run.path}" in refused.stderr
    assert desk.type(resume).returncode == 0
    desk.wait_for_end(run, "COMPLETED", attempt=2)
    requires_nothing_lost(run, resumed_at=EVERY, steps=STEPS)


def test_a_run_folder_that_was_moved_goes_on_in_its_new_place(desk: Desk) -> None:
    run = desk.submit(steps=STEPS)
    desk.wait_for_step(run, EVERY + 1)
    was = run.path
    moved = RunDir(was.rename(was.with_name("moved")))
    moved_at = time.monotonic()
    refused = desk.type(f"janus-cluster resume {moved.path}")
    assert refused.returncode == 2 and "is RUNNING" in refused.stderr, "two attempts would write into one folder"
    wait_until_gone(moved)
    status = desk.status(moved)
    took_s = time.monotonic() - moved_at
    assert not was.exists(), "it is not made anew"
    assert first_failed(status) == ("FAILED", None, "file_system", 0, "local-01")
    assert took_s < 60
    assert f"the run folder {was} is gone" in status["card"]["message"]
    assert desk.type(status["next"][0]).returncode == 0
    desk.started.append(moved)
    desk.wait_for_end(moved, "COMPLETED", attempt=2)
    requires_nothing_lost(moved, resumed_at=EVERY, steps=STEPS)


CGROUPS = Path("/sys/fs/cgroup/memory")


@pytest.fixture
def small_cgroup() -> Iterator[Path]:
    """A memory cgroup of version 1 in which a process can have 8 MB more than it has."""
    folder = CGROUPS / f"janus-night-{os.getpid()}"
    try:
        folder.mkdir()
        (folder / "memory.limit_in_bytes").write_text(str(8 << 20))
    except OSError as error:
        not_tested(f"NO MEMORY CGROUP HERE, so the kernel's memory killer was not tested: {error}")
    yield folder
    wait_until(lambda: not (folder / "cgroup.procs").read_text())
    folder.rmdir()


def test_a_rank_that_the_kernel_ended_for_want_of_memory_is_named_with_its_count(
    desk: Desk, small_cgroup: Path
) -> None:
    run = desk.submit()
    desk.wait_for_step(run, EVERY + 1)
    rank = pid_of(run, 1)
    agent = parent_of(rank)
    killed_at = time.time()
    for pid in (parent_of(agent), agent, rank):
        (small_cgroup / "cgroup.procs").write_text(str(pid))
    status = desk.wait_for_end(run, "FAILED")
    assert first_failed(status) == ("FAILED", 12, "host_out_of_memory", 1, "local-02")
    assert "SIGKILL ended the process of rank 1; memory: the kernel ended 1 " in status["card"]["message"]
    assert read_json(run.attempt_json(1))["ended_at"] - killed_at < 60
    resume, tail = status["next"]
    assert "--set " in resume and desk.type(tail).stdout
    assert desk.type(resume).returncode == 0
    assert desk.type(f"janus-cluster cancel {run.name} --yes").returncode == 0


def parent_of(pid: int) -> int:
    stat = Path(f"/proc/{pid}/stat").read_text()
    return int(stat[stat.rindex(")") + 1 :].split()[1])
