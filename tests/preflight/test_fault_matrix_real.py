"""The fault matrix on real processes: one fault at a time on h800-02 of a real two-node Slurm, and on this host alone.

A fault is shell lines in the mount namespace of the node that has it: a broken folder is mounted over the sound one, a
small or read-only file system over a large one. Everything else (the job, its options, the other node) is the same for
all. The hardware is pretended (programs on PATH, a sysfs tree); so the profile is h800-ib with the bandwidth floors of
a machine without GPUs, as a site would edit its own copy.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fault_cases import BAD, CASES, GOOD, Case, Found
from fault_workshop import Workshop, build_workshop

from janus_cluster.sandbox import SandboxInfo, fault, heal
from janus_cluster.sandbox.hosts import holder_name, slurmd_name
from janus_cluster.sandbox.layout import layout_of
from janus_cluster.sandbox.lifecycle import load_running
from janus_cluster.sandbox.programs import namespaces_problem
from tests.conftest import not_tested

EXIT_CODES = {"PASS": 0, "WARN": 1, "FAIL": 2, "ERROR": 3}


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    return build_workshop(tmp_path_factory.mktemp("matrix"))


def judge(done: subprocess.CompletedProcess[str], expected: Found | None) -> dict[str, Any]:
    """The report has `expected` and nothing else; None: it is a PASS."""
    assert done.stdout, done.stderr
    report: dict[str, Any] = json.loads(done.stdout)
    results = [*report["cross_node"], *(r for of_node in report["nodes"].values() for r in of_node)]
    odd = {(r["id"], r["node"], r["state"], r["measured"]) for r in results if r["state"] not in ("PASS", "SKIP")}
    state = expected.state if expected else "PASS"
    assert (report["verdict"], report["exit_code"], done.returncode) == (state, *[EXIT_CODES[state]] * 2), odd
    assert report["exclude"] == (expected.excluded if expected else []), odd
    if expected is None:
        assert odd == set()
        return report
    assert {check for check, _, _, _ in odd} == {expected.check, *expected.also}, odd
    assert expected.node == "both" or GOOD not in {node for _, node, _, _ in odd}, odd
    named = [r for r in results if r["id"] == expected.check and r["state"] == expected.state]
    assert [r["node"] for r in named] == ([GOOD, BAD] if expected.node == "both" else [expected.node])
    for r in named:
        assert expected.word in r["measured"]
        assert r["expected"] and r["threshold_source"] and r["fix"]
    return report


@pytest.fixture(scope="module")
def nodes(sandbox: SandboxInfo, workshop: Workshop) -> SandboxInfo:
    """The sandbox, with a /dev/shm on both nodes that is large enough whatever this machine has."""
    if sandbox.mode != "namespaces":
        not_tested("NO NAMESPACES HERE, so faults of single hosts were not tested: they need root")
    (workshop.folder / "home" / "sandbox").symlink_to(sandbox.home)
    for node in sandbox.nodes:
        on_node(sandbox, node.name, "mount -o remount,size=16g /dev/shm")
    return sandbox


def on_node(sandbox: SandboxInfo, node: str, line: str, names: dict[str, str] | None = None) -> None:
    """The shell line has run among the mounts of that node."""
    holder = sandbox.daemon(holder_name(node))
    assert holder is not None
    argv = ["nsenter", f"--target={holder.pid}", "--mount", "--", "sh", "-euc", line]
    subprocess.run(argv, env=os.environ | (names or {}), check=True)


@contextlib.contextmanager
def faulty_node(sandbox: SandboxInfo, case: Case, names: dict[str, str]) -> Iterator[None]:
    """The fault is on h800-02 inside the block, and gone after it."""
    # As it runs now: another test may have ended a slurmd and started it again.
    slurmd, node = load_running(layout_of(Path(sandbox.home))).daemon(slurmd_name(BAD)), sandbox.node(BAD)
    assert slurmd is not None and node is not None
    with contextlib.ExitStack() as undo:
        if case.memlock_bytes is not None:
            # slurm.conf hands down slurmd's own limit (PropagateResourceLimitsExcept=MEMLOCK), as on real sites.
            before = resource.prlimit(slurmd.pid, resource.RLIMIT_MEMLOCK)
            resource.prlimit(slurmd.pid, resource.RLIMIT_MEMLOCK, (case.memlock_bytes, before[1]))
            undo.callback(resource.prlimit, slurmd.pid, resource.RLIMIT_MEMLOCK, before)
        if case.lines:
            on_node(sandbox, BAD, case.lines, names)
            undo.callback(on_node, sandbox, BAD, f"umount {case.lines.split()[-1]}", names)
        if case.blocked_ports:
            # Slurm itself uses others.
            assert not 15000 <= sandbox.controller_port <= 31000
            rule = ["ipproto", "tcp", "dport", case.blocked_ports, "blackhole"]
            subprocess.run(["ip", "-n", str(node.namespace), "rule", "add", *rule], check=True)
            undo.callback(subprocess.run, ["ip", "-n", str(node.namespace), "rule", "del", *rule], check=True)
        if case.runs_size:
            undo.enter_context(shared_tmpfs(sandbox, Path(names["RUNS"]), case.runs_size))
        yield


# From linux/mount.h and sched.h; util-linux of 2022 cannot hand a mount to another namespace.
ATTACH = """
import ctypes, os, sys
OPEN_TREE, MOVE_MOUNT, AT_FDCWD, CLONE, EMPTY_PATH, NEWNS = 428, 429, -100, 1, 4, 0x20000
libc, folder = ctypes.CDLL(None, use_errno=True), sys.argv[1].encode()
tree = libc.syscall(OPEN_TREE, AT_FDCWD, folder, CLONE)
assert tree >= 0, os.strerror(ctypes.get_errno())
assert libc.setns(os.open(f"/proc/{sys.argv[2]}/ns/mnt", os.O_RDONLY), NEWNS) == 0, os.strerror(ctypes.get_errno())
assert libc.syscall(MOVE_MOUNT, tree, b"", AT_FDCWD, folder, EMPTY_PATH) == 0, os.strerror(ctypes.get_errno())
"""


@contextlib.contextmanager
def shared_tmpfs(sandbox: SandboxInfo, folder: Path, size: str) -> Iterator[None]:
    """One small file system is mounted on the folder, on this machine and on both nodes."""
    with contextlib.ExitStack() as undo:
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], check=True)
        undo.callback(subprocess.run, ["umount", str(folder)], check=True)
        for node in sandbox.nodes:
            holder = sandbox.daemon(holder_name(node.name))
            assert holder is not None
            subprocess.run([sys.executable, "-c", ATTACH, str(folder), str(holder.pid)], check=True)
            undo.callback(on_node, sandbox, node.name, f"umount {folder}")
        yield


def run(workshop: Workshop, argv: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        argv, cwd=workshop.folder, env=workshop.env, capture_output=True, text=True, check=False, timeout=600
    )


def run_job(workshop: Workshop, *options: str) -> subprocess.CompletedProcess[str]:
    return run(workshop, workshop.command("--nodes", "2", "--cluster", "sandbox", sets=options))


@pytest.mark.slurm
def test_sound_nodes_pass_as_a_job(nodes: SandboxInfo, workshop: Workshop) -> None:
    report = judge(run_job(workshop), None)
    assert {r["phase"] for r in report["nodes"][BAD]} == {"static", "active"}


@pytest.mark.slurm
@pytest.mark.parametrize("name", CASES)
def test_a_fault_of_one_node_is_found_by_the_job_and_blamed_on_it(
    nodes: SandboxInfo, workshop: Workshop, name: str
) -> None:
    case = CASES[name]
    if name == "clock skew" and shutil.which("cc") is None:
        not_tested("NO C COMPILER HERE, so a wrong clock was not tested: apt-get install gcc libc6-dev")
    with faulty_node(nodes, case, workshop.bad_node(case.tree)):
        done = run_job(workshop, *case.options)
    judge(done, case.job)


def run_here(workshop: Workshop, case: Case) -> subprocess.CompletedProcess[str]:
    """`preflight --local` among mounts of its own, with the fault among them."""
    if problem := namespaces_problem():
        not_tested(f"faults of this host were not tested: {problem}")
    small_runs = f"mount -t tmpfs -o size={case.runs_size} tmpfs $RUNS" if case.runs_size else ""
    # /dev/shm of this machine may be of any size.
    lines = ["mount -t tmpfs -o size=16g tmpfs /dev/shm", small_runs, case.lines, 'exec "$@"']
    argv = ["unshare", "--mount", "sh", "-euc", "\n".join(lines), "sh"]
    if case.memlock_bytes is not None:
        # The hard one too: job.sbatch raises a soft limit as far as it may.
        argv = ["prlimit", f"--memlock={case.memlock_bytes}:{case.memlock_bytes}", *argv]
    names = workshop.bad_node(case.tree)
    return run(replace(workshop, env=workshop.env | names), [*argv, *workshop.command("--local", sets=case.options)])


@pytest.mark.train
def test_this_host_passes_where_it_has_no_fault(workshop: Workshop) -> None:
    judge(run_here(workshop, Case(job=Found(check="", word=""))), None)


@pytest.mark.train
@pytest.mark.parametrize("name", [name for name, case in CASES.items() if isinstance(case.found_locally, Found)])
def test_the_same_fault_is_found_on_this_host_alone(workshop: Workshop, name: str) -> None:
    expected = CASES[name].found_locally
    assert isinstance(expected, Found)
    judge(run_here(workshop, CASES[name]), expected)


@pytest.mark.train
def test_where_the_run_folder_cannot_be_made_nothing_is_run(workshop: Workshop) -> None:
    done = run_here(workshop, CASES["read-only output"])
    assert (done.returncode, done.stdout) == (2, "")
    assert "Read-only file system" in done.stderr
    assert workshop.names["RUNS"] in done.stderr


@pytest.mark.slurm
def test_a_node_that_is_gone_is_named(nodes: SandboxInfo, workshop: Workshop) -> None:
    """slurmd of h800-02 ends after the job was given the node and before its first step."""
    began, go = workshop.folder / "began", workshop.folder / "go"
    wait = f"touch {began}; while [ ! -e {go} ]; do sleep 0.1; done"
    argv = workshop.command("--nodes", "2", "--cluster", "sandbox", sets=["preflight.timeout_s=20"], setup=wait)
    with subprocess.Popen(
        argv, cwd=workshop.folder, env=workshop.env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as job:
        deadline = time.monotonic() + 30
        while not began.exists() and time.monotonic() < deadline:
            time.sleep(0.1)
        fault(Path(nodes.home), "stop-slurmd", BAD)
        try:
            go.touch()
            out, err = job.communicate(timeout=600)
        finally:
            heal(Path(nodes.home))
    judge(subprocess.CompletedProcess(argv, job.returncode, out, err), CASES["absent node"].job)
