from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from janus_cluster.errors import SandboxFailed
from janus_cluster.sandbox.daemons import (
    end_daemons,
    find_job_pids,
    is_alive,
    parse_start_ticks,
    parse_unix_sockets,
    start_daemon,
    tail,
)
from janus_cluster.sandbox.programs import find_missing, require_programs, require_success, run_program
from janus_cluster.sandbox.state import Daemon

STUBBORN = "import signal, time; signal.signal(15, signal.SIG_IGN); print('ready', flush=True); time.sleep(60)"


def start(tmp_path: Path, *argv: str) -> Daemon:
    return start_daemon("it", argv, env={"PATH": os.environ["PATH"]}, cwd=tmp_path, output=tmp_path / "it.out")


def test_a_daemon_runs_in_its_own_session_and_folder_until_it_is_ended(tmp_path: Path) -> None:
    daemon = start(tmp_path, "sleep", "60")
    try:
        assert is_alive(daemon)
        assert os.getsid(daemon.pid) == daemon.pid
        wait_for(lambda: Path(f"/proc/{daemon.pid}/cwd").readlink() == tmp_path)
    finally:
        end_daemons([daemon])
    assert not is_alive(daemon)
    assert not Path(f"/proc/{daemon.pid}").exists()


def test_a_daemon_that_ignores_sigterm_is_killed(tmp_path: Path) -> None:
    daemon = start(tmp_path, sys.executable, "-c", STUBBORN)
    try:
        wait_for(lambda: "ready" in (tmp_path / "it.out").read_text())
    finally:
        end_daemons([daemon], grace_s=0.2)
    assert not is_alive(daemon)


def test_a_process_that_took_over_the_pid_is_left_alone(tmp_path: Path) -> None:
    daemon = start(tmp_path, "sleep", "60")
    try:
        impostor = replace(daemon, start_ticks=daemon.start_ticks - 1)
        end_daemons([impostor])
        assert not is_alive(impostor)
        assert is_alive(daemon)
    finally:
        end_daemons([daemon])


def test_an_ended_process_that_was_not_collected_is_not_alive(tmp_path: Path) -> None:
    daemon = start(tmp_path, "sleep", "60")
    os.kill(daemon.pid, signal.SIGKILL)
    wait_for(lambda: not is_alive(daemon))
    assert Path(f"/proc/{daemon.pid}").exists()
    end_daemons([daemon])
    os.waitpid(daemon.pid, 0)


def test_start_time_is_read_past_a_hostile_process_name() -> None:
    tail_of_stat = " ".join(["S", *map(str, range(4, 22)), "777", "23"])
    assert parse_start_ticks(f"12 (a) S 1 (b c) {tail_of_stat}") == 777
    assert parse_start_ticks(f"12 (x) Z{tail_of_stat[1:]}") is None


def test_jobs_are_found_by_conf_and_node_and_a_users_shell_is_not(tmp_path: Path) -> None:
    conf = tmp_path / "slurm.conf"
    shell_env = {**os.environ, "SLURM_CONF": str(conf), "SLURM_JOB_ID": "1"}
    job_env = {**shell_env, "SLURMD_NODENAME": "h800-01"}
    with (
        subprocess.Popen(["sleep", "60"], env=shell_env) as shell,
        subprocess.Popen(["sleep", "60"], env=job_env) as job,
    ):
        try:
            wait_for(lambda: job.pid in find_job_pids(conf, tmp_path))
            assert find_job_pids(conf, tmp_path) == [job.pid]
        finally:
            shell.kill()
            job.kill()


def test_sockets_of_a_folder_are_those_below_it_only() -> None:
    text = (
        "Num       RefCount Protocol Flags    Type St Inode Path\n"
        "0000: 00000002 00000000 00010000 0001 01 101 /box/spool/h800-01/h800-01_3.0\n"
        "0000: 00000002 00000000 00010000 0001 01 102 /box/spool2/x\n"
        "0000: 00000002 00000000 00010000 0001 01 103 @abstract\n"
        "0000: 00000002 00000000 00010000 0001 01 104\n"
    )
    assert parse_unix_sockets(text, Path("/box/spool")) == {"101"}


def test_missing_programs_are_each_named_with_their_package(tmp_path: Path) -> None:
    with pytest.raises(SandboxFailed) as caught:
        require_programs(accounting=True, path=str(tmp_path))
    for program, package in find_missing(accounting=True, path=str(tmp_path)).items():
        assert f"{program} (Debian package {package})" in caught.value.message
    assert caught.value.hint == "apt-get install mariadb-server munge slurm-wlm slurmdbd"
    assert caught.value.exit_code == 23


def test_a_failing_program_is_quoted_and_a_hanging_one_is_ended() -> None:
    with pytest.raises(SandboxFailed, match=r"ended with 3: sorry"):
        require_success(["sh", "-c", "echo sorry >&2; exit 3"])
    with pytest.raises(SandboxFailed, match=r"did not end within 0\.2 s"):
        run_program(["sleep", "30"], timeout_s=0.2)


def test_the_tail_of_an_empty_log_is_what_the_daemon_printed(tmp_path: Path) -> None:
    (tmp_path / "d.out").write_text("\n".join(f"line {i}" for i in range(30)))
    shown = tail(tmp_path / "d.log", num_lines=2)
    assert shown.splitlines()[1:] == ["    line 28", "    line 29"]
    assert "nothing in" in tail(tmp_path / "other.log")


def wait_for(holds: Callable[[], bool], limit_s: float = 60) -> None:
    deadline = time.monotonic() + limit_s
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.01)
