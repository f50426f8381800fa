"""The sandbox on a real Slurm of one's choice, under host names of every kind."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from janus_cluster.errors import SandboxFailed
from janus_cluster.run.paths import RunDir
from janus_cluster.sandbox import SandboxInfo, down, load_info, status, up
from janus_cluster.sandbox.accounting import start_database
from janus_cluster.sandbox.daemons import end_daemons, start_daemon
from janus_cluster.sandbox.layout import layout_of
from janus_cluster.sandbox.programs import namespaces_problem, search_path, slurm_programs
from janus_cluster.sandbox.state import Daemon
from tests.conftest import not_tested, require_slurm
from tests.tiny_data import write_tiny_data

pytestmark = pytest.mark.slurm


@pytest.fixture
def build(tmp_path: Path) -> Path:
    """A prefix of its own with this machine's Slurm; its sbatch writes down that it was used."""
    require_slurm()
    root = tmp_path / "slurm"
    (root / "bin").mkdir(parents=True)
    (root / "sbin").mkdir()
    for name in (*slurm_programs(), "sacct"):
        found = shutil.which(name, path=search_path())
        assert found is not None
        (root / Path(found).parent.name / name).symlink_to(Path(found).resolve())
    write_wrapper(root / "bin" / "sbatch", f'echo "$@" >>{root}/sbatch.used')
    return root


def write_wrapper(program: Path, before: str) -> None:
    """The program, and a shell line before it."""
    real = program.resolve()
    program.unlink()
    program.write_text(f'#!/bin/sh\n{before}\nexec {real} "$@"\n')
    program.chmod(0o755)


def janus(home: Path, *argv: str, cwd: Path, **environ: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "janus_cluster.cli", *argv],
        cwd=cwd,
        env=os.environ | {"JANUS_HOME": str(home)} | environ,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )


def test_daemons_clients_and_jobs_are_all_of_slurm_root(
    build: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    home = tmp_path_factory.mktemp("r")
    write_tiny_data(tmp_path / "demo_data")
    done = janus(home, "sandbox", "up", "--json", cwd=tmp_path, SLURM_ROOT=str(build))
    try:
        assert done.returncode == 0, done.stderr
        shown = json.loads(done.stdout)
        assert shown["slurm_root"] == str(build) and shown["slurm_version"]
        info = load_info(home / "sandbox")
        assert info is not None
        started = {d.name: Path(f"/proc/{d.pid}/cmdline").read_text().split("\0")[0] for d in info.daemons}
        for name in ("slurmctld", "slurmd-h800-01", "slurmd-h800-02"):
            assert Path(started[name]).is_relative_to(build), started
        # Later commands do not need the variable.
        assert (
            f"slurm    Slurm {info.slurm_version} in {build}" in janus(home, "sandbox", "status", cwd=tmp_path).stdout
        )
        script = ("--set", "environment.setup=['command -v srun scontrol', 'exit 0']")
        sent = janus(home, "submit", "demo", "--nodes", "2", "--cluster", "sandbox", "--json", *script, cwd=tmp_path)
        assert sent.returncode == 0, sent.stderr
        assert json.loads(sent.stdout)["command"][0] == f"{build}/bin/sbatch"
        run = RunDir(Path(json.loads(sent.stdout)["run_dir"]))
        assert str(run.path) in (build / "sbatch.used").read_text()
        deadline = time.monotonic() + 30
        while not run.batch_log.exists() or "scontrol" not in run.batch_log.read_text():
            assert time.monotonic() < deadline
            time.sleep(0.1)
        assert run.batch_log.read_text().split()[:2] == [f"{build}/bin/srun", f"{build}/bin/scontrol"]
        refused = janus(home, "sandbox", "up", cwd=tmp_path, SLURM_ROOT="/usr")
        assert refused.returncode == 23
        assert f"in {build} runs in" in refused.stderr
    finally:
        down(home / "sandbox")


def test_a_slurm_for_one_slurmd_a_host_is_refused_plainly(
    build: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    scontrol = build / "bin" / "scontrol"
    real = scontrol.resolve()
    scontrol.unlink()
    scontrol.write_text(f'#!/bin/sh\n{real} "$@" | sed /^MULTIPLE_SLURMD/d\n')
    scontrol.chmod(0o755)
    home = tmp_path_factory.mktemp("m") / "sandbox"
    monkeypatch.setenv("SLURM_ROOT", str(build))
    with pytest.raises(SandboxFailed, match="was built without --enable-multiple-slurmd") as caught:
        up(home)
    assert "SLURM_ROOT" in str(caught.value.hint)
    assert status(home).state == "down"


def test_no_daemon_complains_of_a_setting_of_its_version(sandbox: SandboxInfo) -> None:
    logs = list((Path(sandbox.home) / "logs").glob("slurm*.log"))
    assert len(logs) == 3
    found = [line for log in logs for line in log.read_text().splitlines() if "error" in line]
    words = ("Timeout", "cgroup", "Cgroup", "slurm.conf", "plugin type", "deprecated")
    assert [line for line in found if any(word in line for word in words)] == []


@pytest.mark.parametrize(
    ("address", "loopback_only"), [("127.0.0.1", True), ("127.0.1.1", False), ("192.0.2.7", False)]
)
def test_plain_mode_runs_steps_whatever_address_the_host_name_has(
    address: str, loopback_only: bool, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    require_slurm()
    if (problem := namespaces_problem()) is not None:
        not_tested(f"NOT TESTED: host names of other addresses. {problem}")
    home = tmp_path_factory.mktemp("v")
    (tmp_path / "hosts").write_text(f"127.0.0.1 localhost\n{address} janus-host\n")
    command = f"{sys.executable} -m janus_cluster.cli sandbox"
    script = f"""
        set -e
        mount --bind {tmp_path}/hosts /etc/hosts
        hostname janus-host
        ip link set lo up
        ip link add v0 type veth peer name v1
        ip addr add 192.0.2.7/24 dev v0
        ip link set v0 up
        trap '{command} down >/dev/null' EXIT
        {command} up --mode plain >/dev/null
        SLURM_CONF={home}/sandbox/etc/slurm.conf srun -N2 --ntasks=2 sh -c 'echo $SLURMD_NODENAME'
    """
    done = subprocess.run(
        ["unshare", "--mount", "--uts", "--net", "sh", "-c", script],
        env=os.environ | {"JANUS_HOME": str(home)},
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.split()) == ["h800-01", "h800-02"]
    conf = (home / "sandbox" / "etc" / "slurm.conf").read_text()
    assert ("NoInAddrAny" in conf) is loopback_only


def test_the_database_of_accounting_exists_before_slurmdbd_asks_for_it(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    require_slurm(accounting=True)
    layout = layout_of(tmp_path_factory.mktemp("d"))
    for folder in (layout.etc, layout.state, layout.run, layout.logs):
        folder.mkdir(parents=True)
    started: list[Daemon] = []

    def start(name: str, argv: Sequence[str], env: dict[str, str]) -> Daemon:
        environ: dict[str, Any] = {"PATH": search_path(), **env}
        started.append(start_daemon(name, argv, env=environ, cwd=layout.home, output=layout.output(name)))
        return started[0]

    try:
        start_database(layout, start)
        assert (layout.state / "mariadb" / "slurm_acct").is_dir()
    finally:
        end_daemons(started, grace_s=20)
