"""Faults that are real: the cable is cut, the rail is slow, the path is gone, slurmd is dead, on one node only."""

from __future__ import annotations

import re
import signal
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from janus_cluster.errors import SandboxFailed, UsageError
from janus_cluster.sandbox.daemons import end_daemons, signal_daemon
from janus_cluster.sandbox.hiding import hide_path, show_path
from janus_cluster.sandbox.hosts import Starter, slurmd_name, without_daemon
from janus_cluster.sandbox.layout import NUM_RAILS, layout_of
from janus_cluster.sandbox.lifecycle import load_running, locked, wait_until_idle
from janus_cluster.sandbox.network import rail_port
from janus_cluster.sandbox.programs import require_success
from janus_cluster.sandbox.state import Fault, SandboxInfo

KINDS = ("cut-link", "slow-link", "hide-path", "stop-slurmd")
ALL_RAILS = "all"
RAILS = tuple(f"ib{rail}" for rail in range(NUM_RAILS))
_BITS = {"kbit": 10**3, "mbit": 10**6, "gbit": 10**9}


def fault(
    home: Path, kind: str, node: str, *, rail: str = ALL_RAILS, rate: str = "400mbit", path: str = ""
) -> SandboxInfo:
    """The fault is in force on that node until `heal` or `down`.

    kind:    cut-link     the rail's cable is out, both ways (all: Slurm loses the node too)
             slow-link    the rail carries `rate` and no more, each way, e.g. 400mbit
             hide-path    `path` is gone on this node: anything below /mnt/node; elsewhere a folder, which is then
                          empty, as a share that was not mounted
             stop-slurmd  slurmd has ended; its jobs go on until Slurm gives the node up
    Raises:  UsageError for a wrong argument, SandboxFailed if nothing runs or plain mode cannot do it.
    """
    _require_known(kind, KINDS, "fault")
    _require_known(rail, (ALL_RAILS, *RAILS), "rail")
    layout = layout_of(home)
    with locked(layout):
        starter = Starter(layout, load_running(layout))
        _require_known(node, starter.info.node_names, "node")
        if kind == "stop-slurmd":
            _stop_slurmd(starter, node)
            return starter.info
        if starter.info.mode != "namespaces":
            raise SandboxFailed(
                f"{kind} needs nodes with a network and mounts of their own; this sandbox runs in mode plain",
                hint="as root: janus-cluster sandbox down, then up --mode namespaces",
            )
        if kind == "hide-path":
            starter.remember(_with_fault(starter.info, Fault(kind, node, hide_path(starter.info, layout, node, path))))
            return starter.info
        if kind == "slow-link":
            parse_rate(rate)
        detail = {"rail": rail} if kind == "cut-link" else {"rail": rail, "rate": rate}
        starter.remember(_with_fault(starter.info, Fault(kind, node, detail)))
        _set_links(starter.info)
        return starter.info


def heal(home: Path, kind: str | None = None, node: str | None = None, *, wait_s: float = 60) -> SandboxInfo:
    """The faults of that kind and node (default: all) are undone, and nodes without a fault take jobs again.

    Raises:  UsageError for a wrong argument, SandboxFailed if nothing runs or the nodes are not back in wait_s.
    """
    _require_known(kind or KINDS[0], KINDS, "fault")
    layout = layout_of(home)
    with locked(layout):
        starter = Starter(layout, load_running(layout))
        names = starter.info.node_names
        _require_known(node or names[0], names, "node")
        before = starter.info.faults
        for found in before:
            if kind in (None, found.kind) and node in (None, found.node):
                _undo(starter, found)
                left = tuple(f for f in starter.info.faults if f != found)
                starter.remember(replace(starter.info, faults=left))
        healed = tuple(f for f in before if f not in starter.info.faults)
        _set_links(starter.info)
        _report_in(starter.info, {f.node for f in healed if f.kind == "cut-link"})
        healthy = [n for n in names if not any(f.node == n and _loses_node(f) for f in starter.info.faults)]
        wait_until_idle(starter.info, layout, nodes=healthy, limit_s=wait_s)
        return starter.info


def parse_rate(rate: str) -> int:
    """Bits per second of a rate as tc writes it. Raises: UsageError."""
    found = re.fullmatch(r"(\d{1,6}(?:\.\d{1,3})?)(kbit|mbit|gbit)", rate)
    bits = int(float(found.group(1)) * _BITS[found.group(2)]) if found else 0
    if not 8_000 <= bits <= 400 * 10**9:
        raise UsageError(
            f"--rate {rate!r}: a rate is a number and kbit, mbit or gbit, from 8kbit to 400gbit, e.g. 400mbit"
        )
    return bits


def render_shaper(interface: str, rate: str | None) -> str:
    """tc's line that holds what leaves by `interface` down to `rate`; None: lets it run free, as a new veth does.

    The bucket holds 10 ms, and 32 kB at least: with less, the kernel's timer and not the rate would be the limit.
    """
    if rate is None:
        return f"qdisc replace dev {interface} root noqueue"
    burst_bytes = max(32_000, parse_rate(rate) // 8 // 100)
    return f"qdisc replace dev {interface} root tbf rate {rate} burst {burst_bytes}b latency 400ms"


def _require_known(value: str, allowed: Sequence[str], what: str) -> None:
    if value not in allowed:
        raise UsageError(f"{what} {value!r}: there is {', '.join(allowed)}")


def _with_fault(info: SandboxInfo, new: Fault) -> SandboxInfo:
    """A second slow-link on the same rail replaces the first."""

    def is_same(old: Fault) -> bool:
        rails = (old.detail.get("rail"), new.detail.get("rail"))
        return old.kind == new.kind and old.node == new.node and "path" not in new.detail and rails[0] == rails[1]

    return replace(info, faults=(*(f for f in info.faults if not is_same(f)), new))


def _loses_node(found: Fault) -> bool:
    """Whether this fault cuts Slurm off from the node: Slurm uses ib0."""
    return found.kind == "stop-slurmd" or (found.kind == "cut-link" and found.detail.get("rail") in (ALL_RAILS, "ib0"))


def _undo(starter: Starter, found: Fault) -> None:
    """Undo what is not a link; links follow from the list of faults."""
    if found.kind == "stop-slurmd":
        starter.start_slurmd(found.node)
        starter.wait_for_slurmd(found.node)
    elif found.kind == "hide-path":
        show_path(starter.info, found)


def _report_in(info: SandboxInfo, nodes: Iterable[str]) -> None:
    """Those nodes are registered with slurmctld: slurmd registers again on SIGHUP; without it, that took 64 s."""
    for node in nodes:
        daemon = info.daemon(slurmd_name(node))
        if daemon is not None:
            signal_daemon(daemon, signal.SIGHUP)


def _stop_slurmd(starter: Starter, node: str) -> None:
    name = slurmd_name(node)
    daemon = starter.info.daemon(name)
    if daemon is None:
        raise SandboxFailed(f"slurmd of {node} is stopped already", hint="janus-cluster sandbox heal")
    # Written down first: if we are interrupted, the sandbox must not look degraded.
    starter.remember(_with_fault(without_daemon(starter.info, name), Fault("stop-slurmd", node)))
    end_daemons([daemon])


def render_links(faults: Sequence[Fault], node: str, *, index: int) -> dict[str, str]:
    """The batch lines that put a node's rails into the state that `faults` ask for, whatever state they are in.

    Returns: "links" (ip, at the bridges' end: the node sees its carrier go, as with a pulled cable), "towards" (tc, at
             the bridges' end) and "away" (tc, at the node's end).
    """
    links, towards, away = [], [], []
    for rail in RAILS:
        port = rail_port(index, RAILS.index(rail))
        here = [f for f in faults if f.node == node and f.detail.get("rail") in (rail, ALL_RAILS)]
        rates = [f.detail["rate"] for f in here if f.kind == "slow-link"]
        links.append(f"link set {port} {'down' if any(f.kind == 'cut-link' for f in here) else 'up'}")
        # Of two faults that slow one rail, the later one sets the rate.
        towards.append(render_shaper(port, rates[-1] if rates else None))
        away.append(render_shaper(rail, rates[-1] if rates else None))
    return {name: "\n".join([*lines, ""]) for name, lines in (("links", links), ("towards", towards), ("away", away))}


def _set_links(info: SandboxInfo) -> None:
    """Every rail has the state of info.faults."""
    if info.network is None:
        return
    fabric = info.network.controller_namespace
    for index, node in enumerate(info.nodes):
        lines = render_links(info.faults, node.name, index=index)
        require_success(["ip", "-n", fabric, "-batch", "-"], stdin=lines["links"])
        require_success(["tc", "-n", fabric, "-batch", "-"], stdin=lines["towards"])
        require_success(["tc", "-n", str(node.namespace), "-batch", "-"], stdin=lines["away"])
