"""Signals and heartbeats of one rank, with real processes: an agent that starts it, and another sender."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from janus_cluster.run.files import read_json
from janus_cluster.run.paths import RunDir
from janus_cluster.training.pulse import Pulse

pytestmark = pytest.mark.slow

# Sits in C for a minute, as a rank does in a collective: no Python handler could run meanwhile.
RANK = """
import ctypes, sys, time
from pathlib import Path
from janus_cluster.run.paths import RunDir
from janus_cluster.training.pulse import Pulse, take_signals
take_signals()
pulse = Pulse(RunDir(Path(sys.argv[1])), attempt=1, rank=0, node="h800-01", hang_timeout_s=2).start()
print("ready", flush=True)
if sys.argv[2] == "works":
    for step in range(600):
        pulse.beat("step", step)
        if pulse.is_asked_to_stop():
            print("stops", flush=True)
            raise SystemExit(0)
        time.sleep(0.05)
pulse.beat("step", 3)
ctypes.CDLL(None).sleep(60)
"""
# Starts the rank as torchrun does, prints its pid, and passes on signals on request.
AGENT = """
import os, signal, subprocess, sys, time
for s in (signal.SIGTERM, signal.SIGUSR1):
    signal.signal(s, signal.SIG_IGN)
rank = subprocess.Popen([sys.executable, "-c", sys.argv[1], *sys.argv[2:]], start_new_session=True)
print(rank.pid, flush=True)
for line in sys.stdin:
    os.killpg(rank.pid, getattr(signal, line.strip()))
    print("code", rank.wait(timeout=600), flush=True)
"""


class Agent:
    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.rank_pid = int(self.read())
        assert self.read() == "ready"

    def read(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def ask(self, signum: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(signum + "\n")
        self.process.stdin.flush()


@contextlib.contextmanager
def agent_of(folder: Path, how: str) -> Iterator[Agent]:
    (folder / "logs" / "attempt_1").mkdir(parents=True)
    argv = [sys.executable, "-c", AGENT, RANK, str(folder), how]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield Agent(process)
        finally:
            process.kill()


@pytest.mark.parametrize("signum", ["SIGTERM", "SIGINT"])
def test_the_agents_signal_ends_a_rank_that_sits_in_a_collective(tmp_path: Path, signum: str) -> None:
    with agent_of(tmp_path, "waits") as agent:
        agent.ask(signum)
        assert agent.read() == f"code {128 + getattr(signal, signum)}"


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGUSR1])
def test_a_stop_signal_of_another_sender_asks_to_stop_at_the_next_step(tmp_path: Path, signum: signal.Signals) -> None:
    with agent_of(tmp_path, "works") as agent:
        os.kill(agent.rank_pid, signum)
        assert {agent.read(), agent.read()} == {
            f"{signum.name}: asked to stop at the next step boundary",
            "stops",
        }


def test_a_rank_that_was_suspended_goes_on_and_still_takes_a_stop(tmp_path: Path) -> None:
    with agent_of(tmp_path, "works") as agent:
        for _ in range(3):
            os.kill(agent.rank_pid, signal.SIGSTOP)
            # Longer than the thread waits for signals.
            time.sleep(0.8)
            os.kill(agent.rank_pid, signal.SIGCONT)
            time.sleep(0.4)
        assert is_running(agent.rank_pid)
        os.kill(agent.rank_pid, signal.SIGUSR1)
        assert "stops" in {agent.read(), agent.read()}


def test_time_in_which_a_rank_was_suspended_is_not_without_progress(tmp_path: Path) -> None:
    with agent_of(tmp_path, "waits") as agent:
        time.sleep(0.2)
        os.kill(agent.rank_pid, signal.SIGSTOP)
        time.sleep(2.5)
        os.kill(agent.rank_pid, signal.SIGCONT)
        went_on_s = time.monotonic()
        # Of its own 2 s without progress it has most before it still.
        assert agent.read().startswith("no progress in 2 s")
        assert time.monotonic() - went_on_s > 1


def test_the_attempts_file_asks_rank_0_to_stop(tmp_path: Path) -> None:
    with agent_of(tmp_path, "works") as agent:
        RunDir(tmp_path).stop_json(1).write_text("{}")
        assert agent.read() == "stops"


def test_a_rank_under_sigstop_does_not_outlive_its_agent(tmp_path: Path) -> None:
    with agent_of(tmp_path, "waits") as agent:
        os.kill(agent.rank_pid, signal.SIGSTOP)
        agent.process.kill()
        agent.process.wait()
        wait_until(lambda: not is_running(agent.rank_pid))


def test_heartbeats_go_on_while_training_hangs_and_show_where(tmp_path: Path) -> None:
    with agent_of(tmp_path, "waits") as agent:
        path = RunDir(tmp_path).heartbeat_json(1, 0)
        wait_until(lambda: path.exists() and read_json(path)["doing"] == "step")
        first = read_json(path)
        wait_until(lambda: read_json(path)["time"] > first["time"])
        later = read_json(path)
        assert (later["count"], later["step"], later["pid"]) == (first["count"], 3, agent.rank_pid)
        assert (later["rank"], later["node"]) == (0, "h800-01")
        assert agent.read() == "no progress in 2 s (step, step 3); the stacks:"


FULL = """
import shutil, sys, time
from pathlib import Path
from janus_cluster.run.paths import RunDir
from janus_cluster.training.pulse import Pulse, take_signals
take_signals()
run = RunDir(Path(sys.argv[1]))
pulse = Pulse(run, attempt=1, rank=0, node="h800-01", hang_timeout_s=1).start()
path = run.heartbeat_json(1, 0)
shutil.rmtree(path.parent)
time.sleep(2)
path.parent.mkdir()
for _ in range(100):
    if path.exists():
        raise SystemExit(0)
    time.sleep(0.1)
raise SystemExit(1)
"""


def test_heartbeats_go_on_after_a_full_disk_kept_file_and_log_from_being_written(tmp_path: Path) -> None:
    (tmp_path / "logs" / "attempt_1").mkdir(parents=True)
    # Nothing can be printed, and no heartbeat can be written for two seconds.
    command = [sys.executable, "-c", FULL, str(tmp_path)]
    with Path("/dev/full").open("wb") as full:
        done = subprocess.run(command, stdout=full, stderr=full, timeout=600, check=False)
    # 120: what it could not print at its end.
    assert done.returncode in (0, 120)
    assert RunDir(tmp_path).heartbeat_json(1, 0).exists()


SAVING = """
import sys, time
from pathlib import Path
from janus_cluster.run.paths import RunDir
from janus_cluster.training.pulse import Pulse, take_signals
take_signals()
pulse = Pulse(RunDir(Path(sys.argv[1])), attempt=1, rank=0, node="h800-01", hang_timeout_s=1).start()
pulse.beat("checkpoint", 3)
with open(sys.argv[1] + "/shard", "wb") as f:
    for _ in range(int(sys.argv[2])):
        f.write(bytes(1 << 20))
        time.sleep(0.05)
"""


@pytest.mark.parametrize(("megabytes", "gets_on"), [(40, True), (0, False)])
def test_what_a_rank_writes_while_it_saves_is_progress(tmp_path: Path, megabytes: int, gets_on: bool) -> None:
    code = SAVING + "time.sleep(1)\n"
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path), str(megabytes)], timeout=600, check=False)
    assert done.returncode == 0
    # One beat was training's own; the start may have read and written a megabyte before.
    assert (read_json(RunDir(tmp_path).heartbeat_json(1, 0))["count"] > 3) is gets_on


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_until(is_true: object, *, limit_s: float = 200) -> None:
    assert callable(is_true)
    deadline = time.monotonic() + limit_s
    while not is_true():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_the_first_completed_step_is_reported_at_once_and_only_once(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    path = run.heartbeat_json(1, 0)
    path.parent.mkdir(parents=True)
    # Its thread does not run: the content of the file was written by the call itself.
    pulse = Pulse(run, attempt=1, rank=0, node="h800-01", hang_timeout_s=60)
    pulse.beat("step", 0)
    assert not path.exists()
    pulse.step_done()
    assert read_json(path)["has_stepped"] is True
    path.unlink()
    pulse.step_done()
    assert not path.exists()
