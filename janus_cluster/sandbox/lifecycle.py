"""up, down and status of a sandbox. One at a time per folder: a lock is held while any of them changes things."""

from __future__ import annotations

import getpass
import os
import re
import shutil
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Literal

from janus_cluster.errors import SandboxFailed, UsageError
from janus_cluster.run.lock import open_lock, take_lock
from janus_cluster.sandbox import accounting as acct
from janus_cluster.sandbox import network as net
from janus_cluster.sandbox import render, versions
from janus_cluster.sandbox.daemons import (
    as_daemons,
    boot_id,
    end_daemons,
    find_job_pids,
    find_slurm_pids,
    is_alive,
    tail,
)
from janus_cluster.sandbox.hiding import show_path
from janus_cluster.sandbox.hosts import MUNGED, SLURMCTLD, Starter, is_holder, slurmd_name
from janus_cluster.sandbox.layout import (
    CONTROLLER,
    DEFAULT_NODES,
    GPUS_PER_NODE,
    MOST_NODES,
    PARTITION,
    Layout,
    layout_of,
    node_names,
)
from janus_cluster.sandbox.ports import is_loopback, pick_ports
from janus_cluster.sandbox.programs import namespaces_problem, require_success, run_program, search_path
from janus_cluster.sandbox.state import Mode, Node, SandboxInfo, SandboxStatus, load_info
from janus_cluster.sandbox.versions import SlurmBuild, find_slurm
from janus_cluster.slurm.client_env import write_client_env

START_LIMIT_S = 40.0
_LOCK_LIMIT_S = 120.0
_JOBS_LIMIT_S = 2.0
# "idle*" and the like (with a star) mean that the node does not respond.
_READY_STATES = ("idle", "allocated", "mixed", "completing")
_CONTROLLER_PORT = 6817
_ACCOUNTING_PORT = 6819


def up(
    home: Path,
    *,
    nodes: int | None = None,
    mode: Literal["auto", "namespaces", "plain"] = "auto",
    accounting: bool = False,
) -> SandboxInfo:
    """All nodes of the sandbox in `home` are idle, or it ran already. `nodes` None: two, or as many as it has.

    Raises:  UsageError for a number of nodes that it cannot have.
             SandboxFailed if a program is missing, if another kind of sandbox runs here, or if Slurm does not start;
             nothing of what was started is then left but the logs.
    """
    if nodes is not None and not 1 <= nodes <= MOST_NODES:
        raise UsageError(f"--nodes {nodes}: a sandbox has 1 to {MOST_NODES} nodes", hint=f"--nodes {MOST_NODES}")
    layout = layout_of(home)
    layout.home.mkdir(parents=True, exist_ok=True)
    with locked(layout):
        running = load_info(layout.home)
        if running is not None and _judge_state(running) == "running" and running.complete:
            return _require_same_kind(running, nodes, mode, accounting)
        # Also what an earlier one left whose folder was deleted: its slurmd would end the jobs of this one.
        _take_down(layout, running)
        slurm = find_slurm(accounting=accounting)
        starter = _prepare(layout, nodes or DEFAULT_NODES, _choose_mode(mode), accounting, slurm)
        try:
            _start_everything(starter)
        except BaseException:
            _take_down(layout, starter.info)
            raise
        return starter.info


def down(home: Path) -> bool:
    """No process, namespace, interface or mount of the sandbox is left; its logs are.

    Returns: whether there was anything to take down.
    """
    layout = layout_of(home)
    # The folder may have been deleted under a running sandbox: its namespaces are still found by name.
    left_over = can_have_namespaces() and bool(net.find_namespaces(layout.tag))
    if not layout.home.is_dir() and not left_over:
        return False
    layout.home.mkdir(parents=True, exist_ok=True)
    with locked(layout):
        info = load_info(layout.home)
        if info is None and not left_over:
            return False
        _take_down(layout, info)
        return True


def status(home: Path) -> SandboxStatus:
    """What runs, asked of the processes and of Slurm itself."""
    layout = layout_of(home)
    info = load_info(layout.home)
    if info is None:
        return SandboxStatus(state="down", home=str(layout.home))
    state = _judge_state(info)
    nodes = {node.name: "unknown" for node in info.nodes}
    controller = info.daemon(SLURMCTLD)
    # Asked while slurmctld is dead, sinfo would try for 10 s.
    if state != "stale" and controller is not None and is_alive(controller):
        nodes |= node_states(info)
    return SandboxStatus(
        state=state,
        home=str(layout.home),
        mode=info.mode,
        slurm_conf=info.slurm_conf,
        slurm_version=info.slurm_version,
        slurm_root=info.slurm_root,
        accounting=info.accounting,
        nodes=nodes,
        daemons={d.name: is_alive(d) for d in info.daemons},
        faults=info.faults,
    )


def node_states(info: SandboxInfo) -> dict[str, str]:
    """Node name → its state in Slurm's spelling; empty if slurmctld does not answer."""
    done = run_program(["sinfo", "-h", "-N", "-o", "%N %T"], env=info.env(), timeout_s=60)
    if done.returncode != 0:
        return {}
    rows = (line.split() for line in done.stdout.splitlines())
    return {row[0]: row[1] for row in rows if len(row) == 2}


def load_running(layout: Layout) -> SandboxInfo:
    """What is written down of a sandbox that runs. Raises: SandboxFailed if none does."""
    info = load_info(layout.home)
    if info is None or _judge_state(info) != "running":
        raise SandboxFailed(f"no sandbox runs in {layout.home}", hint="janus-cluster sandbox up")
    return info


def wait_until_idle(
    info: SandboxInfo, layout: Layout, *, nodes: Sequence[str] | None = None, limit_s: float = START_LIMIT_S
) -> None:
    """Wait until those nodes (None: all) are ready for jobs. Raises: SandboxFailed with the last lines of the log."""
    deadline, wanted = time.monotonic() + limit_s, nodes if nodes is not None else info.node_names
    while True:
        dead = [d.name for d in info.daemons if not is_alive(d)]
        if dead:
            raise SandboxFailed(f"{dead[0]} ended unexpectedly:\n{tail(layout.log(dead[0]))}")
        states = node_states(info)
        waiting = [n for n in wanted if states.get(n) not in _READY_STATES]
        if not waiting:
            return
        if time.monotonic() > deadline:
            break
        time.sleep(0.05)
    suspects = [slurmd_name(n) for n in waiting] if states else [SLURMCTLD]
    log_ends = "\n".join(tail(layout.log(s)) for s in suspects)
    shown = ", ".join(f"{n} is {states.get(n, 'unknown to slurmctld')}" for n in waiting)
    raise SandboxFailed(f"after {limit_s:g} s {shown}:\n{log_ends}")


@contextmanager
def locked(layout: Layout) -> Iterator[None]:
    """No other up, down, fault or heal works on this folder. Raises: SandboxFailed after two minutes of waiting."""
    with open_lock(layout.lock) as fd:
        try:
            take_lock(fd, wait_s=_LOCK_LIMIT_S)
        except BlockingIOError as e:
            raise SandboxFailed(f"another command has held {layout.lock} for {_LOCK_LIMIT_S:g} s") from e
        yield


def _judge_state(info: SandboxInfo) -> Literal["running", "degraded", "stale"]:
    if info.boot_id != boot_id():
        return "stale"
    alive = [is_alive(d) for d in info.daemons]
    if not any(alive):
        return "stale"
    return "running" if all(alive) and info.complete else "degraded"


def _require_same_kind(info: SandboxInfo, nodes: int | None, mode: str, accounting: bool) -> SandboxInfo:
    runs = SlurmBuild(info.slurm_version, info.slurm_root)
    if os.environ.get(versions.VARIABLE) and (wanted := find_slurm(accounting=accounting)) != runs:
        raise SandboxFailed(
            f"a sandbox with {runs.title} runs in {info.home}; {versions.VARIABLE} names {wanted.title}",
            hint="janus-cluster sandbox down",
        )
    if nodes not in (None, len(info.nodes)):
        has = f"{len(info.nodes)} node{'s' * (len(info.nodes) > 1)}"
        raise SandboxFailed(f"a sandbox with {has} runs in {info.home}", hint="janus-cluster sandbox down")
    if mode not in ("auto", info.mode) or (accounting and not info.accounting):
        has = f"mode {info.mode}, {'with' if info.accounting else 'without'} accounting"
        raise SandboxFailed(f"a sandbox with {has} runs in {info.home}", hint="janus-cluster sandbox down")
    return info


def _choose_mode(mode: str) -> Mode:
    if mode == "plain":
        return "plain"
    problem = namespaces_problem()
    if problem is None:
        return "namespaces"
    if mode == "namespaces":
        raise SandboxFailed(f"mode namespaces: {problem}", hint="janus-cluster sandbox up --mode plain")
    return "plain"


def _prepare(layout: Layout, num_nodes: int, mode: Mode, accounting: bool, slurm: SlurmBuild) -> Starter:
    """Empty folders, configuration on disk, and a sandbox.json that lists what is about to start."""
    names = node_names(num_nodes)
    _make_folders(layout, names)
    mounts = [str(layout.node_mnt(n)) for n in names]
    if mode == "namespaces":
        plan = net.plan_network(layout.tag, num_nodes=num_nodes)
        network, nodes = plan.network(), plan.nodes(mounts)
        controller_port, dbd_port = _CONTROLLER_PORT, _ACCOUNTING_PORT
    else:
        network = None
        controller_port, dbd_port, *ports = pick_ports(2 + num_nodes, seed=layout.tag)
        nodes = tuple(Node(n, "127.0.0.1", p, m) for n, p, m in zip(names, ports, mounts, strict=True))
    info = SandboxInfo(
        home=str(layout.home),
        mode=mode,
        slurm_conf=str(layout.slurm_conf),
        boot_id=boot_id(),
        accounting=accounting,
        controller_port=controller_port,
        accounting_port=dbd_port if accounting else None,
        slurm_version=slurm.version,
        slurm_root=slurm.root,
        nodes=nodes,
        network=network,
    )
    starter = Starter(layout, info)
    starter.remember(info)
    _write_configuration(layout, info)
    return starter


def _make_folders(layout: Layout, names: Sequence[str]) -> None:
    """The sandbox's folders are there and empty; the logs of the last time are in logs.previous."""
    shutil.rmtree(layout.previous_logs, ignore_errors=True)
    if layout.logs.is_dir():
        layout.logs.rename(layout.previous_logs)
    for folder in (layout.etc, layout.secret, layout.devices, layout.state, layout.run, layout.spool):
        if folder.exists():
            shutil.rmtree(folder)
    if layout.short != layout.home:
        _claim_short_folder(layout.short)
    for folder in (layout.logs, layout.etc, layout.devices, layout.state, layout.run, layout.spool):
        folder.mkdir(mode=0o755)
    layout.secret.mkdir(mode=0o700)
    (layout.state / "slurmctld").mkdir(mode=0o700)
    for node in names:
        layout.node_mnt(node).mkdir(parents=True, exist_ok=True)
        layout.node_hidden(node).mkdir(parents=True, exist_ok=True)


def _claim_short_folder(short: Path) -> None:
    short.mkdir(mode=0o755, exist_ok=True)
    found = short.lstat()
    if short.is_symlink() or found.st_uid != os.getuid():
        raise SandboxFailed(f"{short} belongs to another user", hint="set JANUS_HOME to a folder with a shorter path")


def _write_configuration(layout: Layout, info: SandboxInfo) -> None:
    user = getpass.getuser()
    host = CONTROLLER if info.mode == "namespaces" else socket.gethostname().split(".")[0]
    memory_mb = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2**20
    texts = {
        "slurm.conf": render.render_slurm_conf(
            layout,
            info,
            user=user,
            controller_host=host,
            real_memory_mb=memory_mb,
            loopback_only=info.mode == "plain" and is_loopback(host),
        ),
        "gres.conf": render.render_gres_conf(layout, info),
        "cgroup.conf": render.render_cgroup_conf(info),
    }
    if info.accounting:
        texts["slurmdbd.conf"] = render.render_slurmdbd_conf(layout, info, user=user, controller_host=host)
    for name, text in texts.items():
        path = layout.etc / name
        # slurmdbd refuses a configuration that others may read.
        path.touch(mode=0o600 if name == "slurmdbd.conf" else 0o644)
        path.write_text(text, encoding="ascii")
    write_client_env(layout.slurm_conf, info.env())
    if info.slurm_root is not None:
        layout.task_prolog.write_text(render.render_task_prolog(info.slurm_root), encoding="ascii")
        layout.task_prolog.chmod(0o755)
    layout.munge_key.touch(mode=0o600)
    layout.munge_key.write_bytes(os.urandom(1024))
    for i in range(GPUS_PER_NODE):
        # gres.conf's File= must be a character device; a link to one will do, and needs no root as mknod does.
        (layout.devices / f"nvidia{i}").symlink_to(os.devnull)


def _start_everything(starter: Starter) -> None:
    layout, info = starter.layout, starter.info
    if info.network is not None:
        net.remove_network(layout.tag)
        net.build_network(net.NetworkPlan(layout.tag, net.parse_subnet(info.network), len(info.nodes)))
        starter.start_hosts()
    starter.start_munged()
    if info.accounting:
        acct.start_database(layout, starter.start_on_controller)
        acct.start_dbd(layout, starter.start_on_controller, slurm_env=info.env())
    starter.start_slurmctld()
    for node in info.node_names:
        starter.start_slurmd(node)
    wait_until_idle(starter.info, layout)
    _require_several_slurmd(starter.info)
    starter.remember(replace(starter.info, complete=True))


def _require_several_slurmd(info: SandboxInfo) -> None:
    """Return only if this Slurm can run several nodes here. Such a build is shown by `scontrol show config`."""
    shown = require_success(["scontrol", "show", "config"], env=info.env())
    if not re.search(r"^MULTIPLE_SLURMD\s*=\s*yes", shown, re.MULTILINE | re.IGNORECASE):
        raise SandboxFailed(
            f"{SlurmBuild(info.slurm_version, info.slurm_root).title} was built without --enable-multiple-slurmd: "
            "its nodes could start here, but no step on more than one",
            hint=f"set {versions.VARIABLE} to a build with that option (Debian's packages have it)",
        )


def _take_down(layout: Layout, info: SandboxInfo | None) -> None:
    """Nothing of the sandbox runs or is mounted. Mounts go with the last process of their namespace."""
    if info is not None and info.boot_id == boot_id():
        _end_jobs(layout, info)
        # slurmctld reports to slurmdbd while it ends, slurmdbd writes to the database, and both sign with munged:
        # in this order each ends within a second, in another they wait for each other.
        written_to = [info.daemon(name) for name in (acct.DBD, acct.DATABASE, MUNGED)]
        # Above 2 s slurmd only waits for a slurmstepd that was killed.
        end_daemons((d for d in info.daemons if d not in written_to and not is_holder(d)), grace_s=3)
        for daemon in written_to:
            end_daemons([daemon] if daemon else [], grace_s=20)
        end_daemons(info.daemons)
    end_daemons(as_daemons(find_slurm_pids(layout.slurm_conf)), grace_s=3)
    if can_have_namespaces():
        end_daemons(as_daemons(net.find_pids(net.find_namespaces(layout.tag))), grace_s=1)
        net.remove_network(layout.tag)
    if layout.short != layout.home and layout.short.is_dir() and layout.short.stat().st_uid == os.getuid():
        shutil.rmtree(layout.short)
    for found in info.faults if info else ():
        # What covers a folder went with the mounts; what was moved aside is still to be moved back.
        if "kept" in found.detail and info is not None:
            show_path(info, found)
    layout.state_json.unlink(missing_ok=True)


def _end_jobs(layout: Layout, info: SandboxInfo) -> None:
    """No job of the sandbox runs: asked of Slurm first, so that slurmstepd cleans up, and then made sure."""
    # Not the controller's: slurmctld's own helper process is in there, and slurmctld needs it to end well.
    existing = net.find_namespaces(layout.tag) if info.network else []
    namespaces = [n.namespace for n in info.nodes if n.namespace is not None and n.namespace in existing]
    known = {d.pid for d in info.daemons}

    def find_pids() -> list[int]:
        return [*find_job_pids(layout.slurm_conf, layout.spool), *(set(net.find_pids(namespaces)) - known)]

    controller = info.daemon(SLURMCTLD)
    if controller and is_alive(controller) and find_pids():
        run_program(["scancel", "--full", "--signal=KILL", f"--partition={PARTITION}"], env=info.env())
        deadline = time.monotonic() + _JOBS_LIMIT_S
        while find_pids() and time.monotonic() < deadline:
            time.sleep(0.05)
    end_daemons(as_daemons(find_pids()), grace_s=0.5)


def can_have_namespaces() -> bool:
    """Whether this user could have made namespaces here at all."""
    return os.geteuid() == 0 and shutil.which("ip", path=search_path()) is not None
