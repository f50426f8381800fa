"""`janus-cluster sandbox up|down|status|fault|heal`: parse, call, print."""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import click

from janus_cluster.cli.options import json_option
from janus_cluster.job.home import sandbox_home
from janus_cluster.run.text import to_json
from janus_cluster.sandbox import faults, lifecycle
from janus_cluster.sandbox.layout import MOST_NODES
from janus_cluster.sandbox.state import Fault, SandboxStatus, load_info
from janus_cluster.sandbox.versions import SlurmBuild

NOT_RUNNING = 1


def _epilog(*examples: str, exit_codes: str = "") -> str:
    codes = f"\n\b\nExit codes: {exit_codes}\n" if exit_codes else ""
    lines = "".join(f"  {line}\n" for line in examples)
    return f"\b\nExamples:\n{lines}{codes}\n\b\nSee also: docs/two-nodes.md, docs/preflight.md\n"


@click.group(
    epilog=_epilog(
        "janus-cluster sandbox up",
        "janus-cluster submit demo --cluster sandbox --follow",
        "janus-cluster sandbox fault slow-link h800-02 --rate 400mbit",
        "janus-cluster sandbox down",
        exit_codes="0 done, 1 (status) it does not run, 23 it could not be started or stopped.",
    )
)
def sandbox() -> None:
    """A real Slurm of several nodes on this machine, to rehearse on.

    slurmctld and two or more slurmd with eight pretended GPUs each, in $JANUS_HOME/sandbox. Started by root, each node
    is a host of its own: host name, network with rails ib0…ib7, and /mnt/node. The Slurm is the one on PATH, or that
    of the prefix in $SLURM_ROOT (bin/srun, sbin/slurmctld, …).
    """


@sandbox.command(
    epilog=_epilog(
        "janus-cluster sandbox up",
        "janus-cluster sandbox up --nodes 4",
        "janus-cluster sandbox up --mode plain --accounting",
    )
)
@click.option("--nodes", type=int, metavar="N", help=f"Number of nodes, 1 to {MOST_NODES}; default: 2.")
@click.option(
    "--mode",
    type=click.Choice(["auto", "namespaces", "plain"]),
    default="auto",
    show_default=True,
    help="namespaces: true hosts, needs root; plain: slurmd processes, needs nothing; auto: the first that works.",
)
@click.option("--accounting", is_flag=True, help="With sacct: slurmdbd on a private MariaDB (1-2 s more).")
@json_option
def up(nodes: int | None, mode: Literal["auto", "namespaces", "plain"], accounting: bool, as_json: bool) -> None:
    """Start it, and return when all nodes are idle."""
    home = sandbox_home()
    was_running = load_info(home) is not None and lifecycle.status(home).state == "running"
    began = time.monotonic()
    info = lifecycle.up(home, nodes=nodes, mode=mode, accounting=accounting)
    if as_json:
        click.echo(to_json({"was_running": was_running, **lifecycle.status(home).to_json()}))
        return
    kind = f"{len(info.nodes)} nodes, {info.mode}, {SlurmBuild(info.slurm_version, info.slurm_root).title}"
    if was_running:
        click.echo(f"the sandbox runs already ({kind}) in {info.home}")
    else:
        click.echo(f"the sandbox runs ({kind}) in {info.home}; {time.monotonic() - began:.1f} s")
    click.echo(f"  {render_exports(info.slurm_conf, info.slurm_root)}    for sinfo, squeue and sbatch by hand")
    click.echo("next:  janus-cluster submit demo --cluster sandbox --follow")


@sandbox.command(epilog=_epilog("janus-cluster sandbox down", "JANUS_HOME=/tmp/other janus-cluster sandbox down"))
@json_option
def down(as_json: bool) -> None:
    """End it: no process, namespace or mount is left; the logs are."""
    home = sandbox_home()
    was_there = lifecycle.down(home)
    if as_json:
        click.echo(to_json({"home": str(home), "was_there": was_there, "logs": str(home / "logs")}))
    elif was_there:
        click.echo(f"the sandbox is down; its logs: {home / 'logs'}")
    else:
        click.echo(f"no sandbox in {home}")


@sandbox.command(
    epilog=_epilog(
        "janus-cluster sandbox status",
        "janus-cluster sandbox status --json",
        exit_codes="0 it runs, 1 it does not.",
    )
)
@json_option
@click.pass_context
def status(ctx: click.Context, as_json: bool) -> None:
    """Show nodes, daemons and faults in force. Exit 0 when it runs, 1 when it does not."""
    found = lifecycle.status(sandbox_home())
    click.echo(to_json(found.to_json()) if as_json else render_status(found))
    if found.state != "running":
        ctx.exit(NOT_RUNNING)


@sandbox.group(
    epilog=_epilog(
        "janus-cluster sandbox fault cut-link h800-02 --rail ib3",
        "janus-cluster sandbox fault hide-path h800-02 /mnt/node/data",
    )
)
def fault() -> None:
    """Put a real fault on one node, until `heal` or `down`."""


_node_argument = click.argument("node")
_rail_option = click.option(
    "--rail",
    type=click.Choice([faults.ALL_RAILS, *faults.RAILS]),
    default=faults.ALL_RAILS,
    show_default=True,
    help="Which rail of the node.",
)


@fault.command(
    "cut-link",
    epilog=_epilog(
        "janus-cluster sandbox fault cut-link h800-02", "janus-cluster sandbox fault cut-link h800-02 --rail ib3"
    ),
)
@_node_argument
@_rail_option
@json_option
def cut_link(node: str, rail: str, as_json: bool) -> None:
    """Pull the cable of a rail; of all rails, and Slurm loses the node as well (after 15-40 s)."""
    _put("cut-link", node, as_json=as_json, rail=rail)


@fault.command(
    "slow-link",
    epilog=_epilog(
        "janus-cluster sandbox fault slow-link h800-02",
        "janus-cluster sandbox fault slow-link h800-02 --rail ib3 --rate 50mbit",
    ),
)
@_node_argument
@_rail_option
@click.option("--rate", default="400mbit", show_default=True, help="A number and kbit, mbit or gbit.")
@json_option
def slow_link(node: str, rail: str, rate: str, as_json: bool) -> None:
    """Let a rail carry no more than RATE, each way."""
    _put("slow-link", node, as_json=as_json, rail=rail, rate=rate)


@fault.command(
    "hide-path",
    epilog=_epilog(
        "janus-cluster sandbox fault hide-path h800-02 /mnt/node/data",
        "janus-cluster sandbox fault hide-path h800-01 /data/r2r --json",
    ),
)
@_node_argument
@click.argument("path")
@json_option
def hide_path(node: str, path: str, as_json: bool) -> None:
    """Make PATH vanish on one node: anything below /mnt/node; elsewhere a folder, which then is empty."""
    _put("hide-path", node, as_json=as_json, path=path)


@fault.command(
    "stop-slurmd",
    epilog=_epilog(
        "janus-cluster sandbox fault stop-slurmd h800-01", "janus-cluster sandbox fault stop-slurmd h800-02 --json"
    ),
)
@_node_argument
@json_option
def stop_slurmd(node: str, as_json: bool) -> None:
    """End the node's slurmd; its running jobs go on until Slurm gives the node up."""
    _put("stop-slurmd", node, as_json=as_json)


@sandbox.command(
    epilog=_epilog("janus-cluster sandbox heal", "janus-cluster sandbox heal --kind slow-link --node h800-02")
)
@click.option("--kind", type=click.Choice(faults.KINDS), help="Only this kind of fault; default: all.")
@click.option("--node", help="Only on this node; default: all.")
@json_option
def heal(kind: str | None, node: str | None, as_json: bool) -> None:
    """Undo faults (default: all), and return when the healed nodes take jobs again."""
    left = faults.heal(sandbox_home(), kind, node).faults
    if as_json:
        click.echo(to_json({"faults": [asdict(f) for f in left]}))
        return
    click.echo("healed; " + ("no fault is left" if not left else "left: " + "; ".join(map(render_fault, left))))


def render_status(found: SandboxStatus) -> str:
    """The status for people."""
    lines = [f"sandbox  {found.state}" + (f" ({found.mode})" if found.mode else ""), f"folder   {found.home}"]
    if found.slurm_version:
        lines.append(f"slurm    {SlurmBuild(found.slurm_version, found.slurm_root).title}")
    lines += [f"node     {name}  {state}" for name, state in found.nodes.items()]
    lines += [f"gone     {name}, see {Path(found.home) / 'logs'}" for name, alive in found.daemons.items() if not alive]
    lines += [f"fault    {render_fault(f)}" for f in found.faults]
    if found.state == "running":
        lines.append(f"use      {render_exports(str(found.slurm_conf), found.slurm_root)}")
    else:
        lines.append("next:    janus-cluster sandbox up")
    return "\n".join(lines)


def render_exports(slurm_conf: str, slurm_root: str | None) -> str:
    """What a shell needs to reach the sandbox with Slurm's own commands."""
    path = f' PATH="{slurm_root}/bin:$PATH"' if slurm_root else ""
    return f"export SLURM_CONF={slurm_conf}{path}"


def render_fault(found: Fault) -> str:
    """`cut-link h800-02 rail=ib3`."""
    return " ".join([found.kind, found.node, *(f"{k}={v}" for k, v in found.detail.items() if k != "kept")])


def _put(kind: str, node: str, *, as_json: bool, **detail: Any) -> None:
    info = faults.fault(sandbox_home(), kind, node, **detail)
    if as_json:
        click.echo(to_json({"faults": [asdict(f) for f in info.faults]}))
        return
    click.echo(f"in force: {render_fault(info.faults[-1])}")
    click.echo("next:  janus-cluster sandbox heal")
