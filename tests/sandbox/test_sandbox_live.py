"""The sandbox on real Slurm: what jobs see, what faults do, and that nothing is left behind."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import pytest

from janus_cluster.errors import SandboxFailed, UsageError
from janus_cluster.sandbox import SandboxInfo, down, fault, heal, load_info, status, up
from janus_cluster.sandbox.daemons import find_job_pids, is_alive
from janus_cluster.sandbox.layout import layout_of
from janus_cluster.sandbox.lifecycle import node_states
from janus_cluster.sandbox.network import find_namespaces, find_pids
from janus_cluster.sandbox.programs import find_missing, namespaces_problem
from janus_cluster.sandbox.state import Mode
from tests.conftest import not_tested, require_slurm

pytestmark = pytest.mark.slurm

# A connection from node 2 to node 1 over one rail, and how long 1 MB took.
EXCHANGE = """
import os, socket, sys, time
mine, address, size = sys.argv[1], sys.argv[2], 1_000_000
if os.environ["SLURM_NODEID"] == "0":
    server = socket.create_server((address, 29555))
    connection, peer = server.accept()
    left = size
    while left: left -= len(connection.recv(min(left, 65536)))
    connection.sendall(b"k")
    print("peer", peer[0])
else:
    while True:
        try:
            client = socket.create_connection((address, 29555), timeout=30)
            break
        except ConnectionRefusedError:
            time.sleep(0.02)
    start = time.monotonic()
    client.sendall(bytes(size))
    client.recv(1)
    print("seconds", time.monotonic() - start)
"""


def run(info: SandboxInfo, *argv: str, timeout_s: float = 60) -> str:
    """What the Slurm command printed."""
    done = subprocess.run(
        argv, env=os.environ | info.env(), capture_output=True, text=True, timeout=timeout_s, check=False
    )
    assert done.returncode == 0, f"{argv}: {done.stderr}"
    return done.stdout


def wait_for(holds: Callable[[], bool], limit_s: float) -> float:
    """How long it took until it held."""
    start = time.monotonic()
    while not holds():
        assert time.monotonic() - start < limit_s
        time.sleep(0.1)
    return time.monotonic() - start


def job_state(info: SandboxInfo, job_id: str) -> str:
    shown = run(info, "scontrol", "--oneliner", "show", "job", job_id)
    return next(word.removeprefix("JobState=") for word in shown.split() if word.startswith("JobState="))


@pytest.fixture
def hosts(sandbox: SandboxInfo) -> Iterator[SandboxInfo]:
    """The sandbox where each node is a host of its own; healed afterwards."""
    if sandbox.mode != "namespaces":
        not_tested(f"NOT TESTED: nodes that are hosts of their own. {namespaces_problem()}")
    yield sandbox
    heal(Path(sandbox.home))


def test_both_nodes_are_idle_and_a_second_up_shows_that_it_runs(sandbox: SandboxInfo) -> None:
    assert set(node_states(sandbox)) == {"h800-01", "h800-02"}
    # As it is written down now: a test of another file may have ended and started daemons of this session's Slurm.
    before = load_info(Path(sandbox.home))
    assert before is not None and up(Path(sandbox.home)) == before
    assert status(Path(sandbox.home)).state == "running"
    with pytest.raises(SandboxFailed) as caught:
        up(Path(sandbox.home), mode="plain" if sandbox.mode == "namespaces" else "namespaces")
    assert caught.value.hint == "janus-cluster sandbox down"


def test_a_batch_job_sees_two_true_hosts_with_eight_gpus_each(hosts: SandboxInfo, tmp_path: Path) -> None:
    for node in hosts.nodes:
        (Path(node.mnt) / "own.txt").write_text(f"of {node.name}")
    show = (
        'echo "$(hostname)|$CUDA_VISIBLE_DEVICES|$(ip -4 -o addr show ib0)|$(cat /mnt/node/own.txt)|$SLURM_JOB_ACCOUNT"'
    )
    script = tmp_path / "job.sh"
    script.write_text(f"#!/bin/bash\nsrun bash -c '{show}'\n")
    options = ["--nodes=2", "--ntasks-per-node=1", "--exclusive", "--gres=gpu:h800:8", "--time=5", "--account=any"]
    job_id = run(hosts, "sbatch", "--parsable", *options, f"--output={tmp_path}/out", str(script)).strip()
    # sbatch --wait would do, but looks every 2, 4, 8 s.
    wait_for(lambda: job_state(hosts, job_id) == "COMPLETED", 30)
    rows = sorted(line.split("|") for line in (tmp_path / "out").read_text().splitlines())
    assert [row[0] for row in rows] == ["h800-01", "h800-02"]
    for row, node in zip(rows, hosts.nodes, strict=True):
        assert row[1] == "0,1,2,3,4,5,6,7"
        assert f"inet {node.address}/28" in row[2]
        assert row[3] == f"of {node.name}"


def exchange(info: SandboxInfo, tmp_path: Path, rail: str) -> tuple[str, float]:
    """Who connected, and the seconds that 1 MB took from h800-02 to h800-01 over that rail."""
    (tmp_path / "exchange.py").write_text(EXCHANGE)
    address = info.nodes[0].rails[rail]
    out = run(info, "srun", "-N2", "--ntasks=2", sys.executable, str(tmp_path / "exchange.py"), rail, address)
    words = dict(line.split() for line in out.splitlines())
    return words["peer"], float(words["seconds"])


def test_nodes_talk_over_each_rail_and_a_slow_rail_is_slow_alone(hosts: SandboxInfo, tmp_path: Path) -> None:
    fault(Path(hosts.home), "slow-link", "h800-02", rail="ib3", rate="8mbit")
    peer, slow_s = exchange(hosts, tmp_path, "ib3")
    assert peer == hosts.nodes[1].rails["ib3"]
    # 1 MB at 8 Mbit/s is 1 s, less what the first full bucket and the socket's buffers take.
    assert slow_s > 0.7
    assert exchange(hosts, tmp_path, "ib0")[1] < 0.3
    heal(Path(hosts.home))
    assert exchange(hosts, tmp_path, "ib3")[1] < 0.3


def test_a_job_reaches_the_other_host_by_its_name(hosts: SandboxInfo) -> None:
    lines = run(hosts, "srun", "-N2", "--ntasks=2", "getent", "hosts", "h800-02").splitlines()
    assert [line.split() for line in lines] == [[hosts.nodes[1].address, "h800-02"]] * 2


def test_a_hidden_path_is_gone_on_one_node_only_and_comes_back(hosts: SandboxInfo, tmp_path: Path) -> None:
    shared = tmp_path / "share"
    shared.mkdir()
    (shared / "f").touch()
    for node in hosts.nodes:
        (Path(node.mnt) / "weights").write_text("w")

    def seen(path: str) -> dict[str, bool]:
        command = f'if [ -e "{path}" ]; then echo $SLURMD_NODENAME yes; else echo $SLURMD_NODENAME no; fi'
        out = run(hosts, "srun", "-N2", "--ntasks=2", "sh", "-c", command)
        return {line.split()[0]: line.split()[1] == "yes" for line in out.splitlines()}

    home = Path(hosts.home)
    fault(home, "hide-path", "h800-02", path="/mnt/node/weights")
    fault(home, "hide-path", "h800-01", path=str(shared))
    assert seen("/mnt/node/weights") == {"h800-01": True, "h800-02": False}
    assert seen(str(shared / "f")) == {"h800-01": False, "h800-02": True}
    heal(home, node="h800-02")
    assert seen("/mnt/node/weights") == {"h800-01": True, "h800-02": True}
    assert [f.node for f in status(home).faults] == ["h800-01"]
    heal(home)
    assert seen(str(shared / "f")) == {"h800-01": True, "h800-02": True}
    assert (Path(hosts.nodes[1].mnt) / "weights").read_text() == "w"


def test_paths_that_cannot_be_hidden_are_refused(hosts: SandboxInfo, tmp_path: Path) -> None:
    (tmp_path / "f").touch()
    for path in ("relative", "/", "/mnt/node", "/mnt/node/../x", "/mnt/node/none", str(tmp_path / "f"), "/tmp"):
        with pytest.raises(UsageError, match="--path"):
            fault(Path(hosts.home), "hide-path", "h800-01", path=path)
    assert status(Path(hosts.home)).faults == ()


def test_a_cut_link_loses_the_node_and_its_job_and_heals_at_once(hosts: SandboxInfo) -> None:
    home = Path(hosts.home)
    script = ["--no-requeue", "--nodes=1", "--nodelist=h800-02", "--output=/dev/null", "--wrap", "sleep 300"]
    job_id = run(hosts, "sbatch", "--parsable", *script).strip()
    wait_for(lambda: job_state(hosts, job_id) == "RUNNING", 15)
    fault(home, "cut-link", "h800-02")
    # SlurmdTimeout is 15 s; with the pings before it 14 to 37 s were seen.
    wait_for(lambda: job_state(hosts, job_id) == "NODE_FAIL", 75)
    assert node_states(hosts)["h800-02"].startswith("down")
    assert node_states(hosts)["h800-01"] == "idle"
    heal(home)
    wait_for(lambda: node_states(hosts)["h800-02"] == "idle", 30)
    assert run(hosts, "srun", "--nodelist=h800-02", "hostname").strip() == "h800-02"


def test_a_stopped_slurmd_takes_no_job_until_it_is_healed(sandbox: SandboxInfo) -> None:
    home = Path(sandbox.home)
    before = (load_info(home) or sandbox).daemon("slurmd-h800-02")
    assert before is not None
    fault(home, "stop-slurmd", "h800-02")
    try:
        assert not is_alive(before)
        assert status(home).state == "running"
        with pytest.raises(SandboxFailed, match="stopped already"):
            fault(home, "stop-slurmd", "h800-02")
    finally:
        heal(home)
    after = (load_info(home) or sandbox).daemon("slurmd-h800-02")
    assert after is not None and after.pid != before.pid
    assert run(sandbox, "srun", "--nodelist=h800-02", "echo", "here").strip() == "here"


def left_of(home: Path, info: SandboxInfo) -> list[str]:
    """All that still runs or exists of a sandbox."""
    layout = layout_of(home)
    left = [d.name for d in info.daemons if is_alive(d)]
    left += [f"job process {pid}" for pid in find_job_pids(layout.slurm_conf, layout.spool)]
    if info.network is not None:
        namespaces = find_namespaces(layout.tag)
        left += [*namespaces, *(f"pid {pid}" for pid in find_pids(namespaces))]
        left += [p.name for p in Path("/sys/class/net").iterdir() if p.name == info.network.host_interface]
    left += [line for line in Path("/proc/mounts").read_text().splitlines() if str(layout.home) in line]
    return left


@pytest.mark.parametrize("mode", ["namespaces", "plain"])
def test_down_leaves_nothing_but_logs_even_with_a_stubborn_job(
    mode: Literal["namespaces", "plain"], sandbox: SandboxInfo, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """A second sandbox beside the session's: neither is in the other's way."""
    if mode == "namespaces" and sandbox.mode != mode:
        not_tested(f"NOT TESTED: mode namespaces. {namespaces_problem()}")
    home = tmp_path_factory.mktemp("d") / "sandbox"
    info = up(home, mode=mode)
    try:
        wrap = "trap '' TERM; srun sleep 301 & setsid sleep 302 & wait"
        job_id = run(info, "sbatch", "--parsable", "-N2", "--ntasks=2", "--output=/dev/null", "--wrap", wrap).strip()
        layout = layout_of(home)
        wait_for(lambda: job_state(info, job_id) == "RUNNING", 15)
        wait_for(lambda: len(find_job_pids(layout.slurm_conf, layout.spool)) >= 5, 15)
    finally:
        assert down(home)
    assert left_of(home, info) == []
    assert (home / "logs" / "slurmctld.log").stat().st_size > 0
    assert not down(home)
    assert set(node_states(sandbox).values()) == {"idle"}


def test_the_commands_print_json_and_nothing_else(hosts: SandboxInfo) -> None:
    def janus(*argv: str) -> Any:
        environ = os.environ | {"JANUS_HOME": str(Path(hosts.home).parent)}
        command = [sys.executable, "-m", "janus_cluster.cli", "sandbox", *argv, "--json"]
        done = subprocess.run(command, env=environ, capture_output=True, text=True, check=True, timeout=600)
        return json.loads(done.stdout)

    running = janus("up")
    assert (running["was_running"], running["state"], len(running["nodes"])) == (True, "running", 2)
    try:
        slow = janus("fault", "slow-link", "h800-02", "--rail", "ib3", "--rate", "100mbit")
        assert [(f["kind"], f["node"], f["detail"]["rail"]) for f in slow["faults"]] == [
            ("slow-link", "h800-02", "ib3")
        ]
    finally:
        assert janus("heal") == {"faults": []}


def test_plain_nodes_give_eight_gpus_each(tmp_path_factory: pytest.TempPathFactory) -> None:
    require_slurm()
    home = tmp_path_factory.mktemp("p") / "sandbox"
    info = up(home, mode="plain")
    try:
        command = 'echo "$SLURMD_NODENAME $CUDA_VISIBLE_DEVICES"'
        out = run(info, "srun", "-N2", "--ntasks-per-node=1", "--exclusive", "--gres=gpu:h800:8", "sh", "-c", command)
        assert sorted(out.splitlines()) == ["h800-01 0,1,2,3,4,5,6,7", "h800-02 0,1,2,3,4,5,6,7"]
        with pytest.raises(SandboxFailed, match="mode plain"):
            fault(home, "cut-link", "h800-01")
    finally:
        down(home)


def test_a_killed_sandbox_is_replaced_by_the_next_up(tmp_path_factory: pytest.TempPathFactory) -> None:
    require_slurm()
    home = tmp_path_factory.mktemp("k") / "sandbox"
    first = up(home)
    try:
        for daemon in first.daemons:
            os.kill(daemon.pid, signal.SIGKILL)
        wait_for(lambda: not any(is_alive(d) for d in first.daemons), 5)
        assert status(home).state == "stale"
        second = up(home)
        assert set(node_states(second).values()) == {"idle"}
        slurmctld = second.daemon("slurmctld")
        assert slurmctld is not None
        os.kill(slurmctld.pid, signal.SIGKILL)
        wait_for(lambda: not is_alive(slurmctld), 5)
        assert status(home).state == "degraded"
        assert set(node_states(up(home)).values()) == {"idle"}
        assert (home / "logs.previous" / "slurmctld.log").exists()
    finally:
        down(home)


def test_down_finds_hosts_whose_folder_was_deleted(
    sandbox: SandboxInfo, tmp_path_factory: pytest.TempPathFactory
) -> None:
    if sandbox.mode != "namespaces":
        not_tested(f"NOT TESTED: a deleted folder. {namespaces_problem()}")
    home = tmp_path_factory.mktemp("x") / "sandbox"
    info = up(home)
    try:
        shutil.rmtree(home)
    finally:
        assert down(home)
    assert left_of(home, info) == []


@pytest.mark.parametrize("mode", ["namespaces", "plain"])
def test_up_ends_what_runs_of_a_sandbox_whose_folder_was_deleted(
    sandbox: SandboxInfo, tmp_path_factory: pytest.TempPathFactory, mode: Mode
) -> None:
    if sandbox.mode != "namespaces" and mode == "namespaces":
        not_tested(f"NOT TESTED: a deleted folder. {namespaces_problem()}")
    home = tmp_path_factory.mktemp("y") / "sandbox"
    first = up(home, mode=mode)
    try:
        shutil.rmtree(home)
        second = up(home, mode=mode)
        assert [d.name for d in first.daemons if is_alive(d)] == []
        assert all(is_alive(d) for d in second.daemons)
        assert set(node_states(second).values()) == {"idle"}
    finally:
        down(home)


def test_a_sandbox_that_cannot_start_shows_the_log_and_leaves_nothing(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    require_slurm()
    home = tmp_path_factory.mktemp("f") / "sandbox"
    broken = tmp_path / "slurmd"
    broken.write_text("#!/bin/sh\necho slurmd: no spare parts >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    try:
        with pytest.raises(SandboxFailed, match="no spare parts"):
            up(home)
        assert find_namespaces(layout_of(home).tag) == []
    finally:
        down(home)
    assert load_info(home) is None
    assert (home / "logs").is_dir()


def test_with_accounting_sacct_knows_the_job_and_an_unknown_account_is_taken(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    require_slurm(accounting=True)
    home = tmp_path_factory.mktemp("a") / "sandbox"
    info = up(home, accounting=True)
    try:
        job_id = run(info, "sbatch", "--parsable", "-N2", "-A", "x", "-o", "/dev/null", "--wrap", "true").strip()
        shows = ["sacct", "-X", "-n", "-P", "-j", job_id, "--format=State,NodeList"]
        wait_for(lambda: run(info, *shows).strip() == "COMPLETED|h800-[01-02]", 30)
        with pytest.raises(SandboxFailed):
            up(home, mode="plain" if info.mode == "namespaces" else "namespaces", accounting=True)
        assert up(home) == info
    finally:
        down(home)
    assert left_of(home, info) == []
    assert find_missing(accounting=True) == {}
