"""`janus-cluster sandbox up|down|status|fault|heal`: parse, call, print."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any, Literal

import click

from janus_cluster.config.home import sandbox_home
from janus_cluster.sandbox import faults, lifecycle
from janus_cluster.sandbox.layout import NODE_NAMES
from janus_cluster.sandbox.state import Fault, SandboxStatus, load_info

NOT_RUNNING = 1


@click.group()
def sandbox() -> None:
    """A real two-node Slurm on this machine, to rehearse on.

    slurmctld and two slurmd with eight pretended GPUs each, in $JANUS_HOME/sandbox. Started by root, each node is a
    host of its own: host name, network with rails ib0…ib7, and /mnt/node.
    """


@sandbox.command()
@click.option(
    "--mode",
    type=click.Choice(["auto", "namespaces", "plain"]),
    default="auto",
    show_default=True,
    help="namespaces: true hosts, needs root; plain: two slurmd, needs nothing; auto: the first that works.",
)
@click.option("--accounting", is_flag=True, help="With sacct: slurmdbd on a private MariaDB (1-2 s more).")
def up(mode: Literal["auto", "namespaces", "plain"], accounting: bool) -> None:
    """Start it, and return when both nodes are idle."""
    home = sandbox_home()
    was_running = load_info(home) is not None and lifecycle.status(home).state == "running"
    began = time.monotonic()
    info = lifecycle.up(home, mode=mode, accounting=accounting)
    if was_running:
        click.echo(f"the sandbox runs already ({info.mode}) in {info.home}")
    else:
        click.echo(f"the sandbox runs ({info.mode}) in {info.home}; {time.monotonic() - began:.1f} s")
    click.echo(f"  export SLURM_CONF={info.slurm_conf}    for sinfo, squeue and sbatch by hand")
    click.echo("next:  janus-cluster submit --cluster sandbox")


@sandbox.command()
def down() -> None:
    """End it: no process, namespace or mount is left; the logs are."""
    home = sandbox_home()
    if lifecycle.down(home):
        click.echo(f"the sandbox is down; its logs: {home / 'logs'}")
    else:
        click.echo(f"no sandbox in {home}")


@sandbox.command()
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.pass_context
def status(ctx: click.Context, as_json: bool) -> None:
    """Show nodes, daemons and faults in force. Exit 0 when it runs, 1 when it does not."""
    found = lifecycle.status(sandbox_home())
    click.echo(json.dumps(found.to_json(), indent=2) if as_json else render_status(found))
    if found.state != "running":
        ctx.exit(NOT_RUNNING)


@sandbox.group()
def fault() -> None:
    """Put a real fault on one node, until `heal` or `down`."""


_node_argument = click.argument("node", type=click.Choice(NODE_NAMES))
_rail_option = click.option(
    "--rail", type=click.Choice([faults.ALL_RAILS, *faults.RAILS]), default=faults.ALL_RAILS, show_default=True
)


@fault.command("cut-link")
@_node_argument
@_rail_option
def cut_link(node: str, rail: str) -> None:
    """Pull the cable of a rail; of all rails, and Slurm loses the node as well (after 15-40 s)."""
    _put("cut-link", node, rail=rail)


@fault.command("slow-link")
@_node_argument
@_rail_option
@click.option("--rate", default="400mbit", show_default=True, help="A number and kbit, mbit or gbit.")
def slow_link(node: str, rail: str, rate: str) -> None:
    """Let a rail carry no more than RATE, each way."""
    _put("slow-link", node, rail=rail, rate=rate)


@fault.command("hide-path")
@_node_argument
@click.argument("path")
def hide_path(node: str, path: str) -> None:
    """Make PATH vanish on one node: anything below /mnt/node; elsewhere a folder, which then is empty."""
    _put("hide-path", node, path=path)


@fault.command("stop-slurmd")
@_node_argument
def stop_slurmd(node: str) -> None:
    """End the node's slurmd; its running jobs go on until Slurm gives the node up."""
    _put("stop-slurmd", node)


@sandbox.command()
@click.option("--kind", type=click.Choice(faults.KINDS), help="Only this kind of fault.")
@click.option("--node", type=click.Choice(NODE_NAMES), help="Only on this node.")
def heal(kind: str | None, node: str | None) -> None:
    """Undo faults (default: all), and return when the healed nodes take jobs again."""
    left = faults.heal(sandbox_home(), kind, node).faults
    click.echo("healed; " + ("no fault is left" if not left else "left: " + "; ".join(map(render_fault, left))))


def render_status(found: SandboxStatus) -> str:
    """The status for people."""
    lines = [f"sandbox  {found.state}" + (f" ({found.mode})" if found.mode else ""), f"folder   {found.home}"]
    lines += [f"node     {name}  {state}" for name, state in found.nodes.items()]
    lines += [f"gone     {name}, see {Path(found.home) / 'logs'}" for name, alive in found.daemons.items() if not alive]
    lines += [f"fault    {render_fault(f)}" for f in found.faults]
    if found.state == "running":
        lines.append(f"use      export SLURM_CONF={found.slurm_conf}")
    else:
        lines.append("next:    janus-cluster sandbox up")
    return "\n".join(lines)


def render_fault(found: Fault) -> str:
    """`cut-link h800-02 rail=ib3`."""
    return " ".join([found.kind, found.node, *(f"{k}={v}" for k, v in found.detail.items() if k != "kept")])


def _put(kind: str, node: str, **detail: Any) -> None:
    info = faults.fault(sandbox_home(), kind, node, **detail)
    click.echo(f"in force: {render_fault(info.faults[-1])}")
    click.echo("next:  janus-cluster sandbox heal")
