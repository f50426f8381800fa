"""`janus-cluster nodes`: list the nodes that submissions avoid and why; forgive one, or add one by hand."""

from __future__ import annotations

import time

import click

from janus_cluster.cli.options import json_option
from janus_cluster.desk.bad_nodes import NodeRecord, add_node, forgive_nodes, load_nodes
from janus_cluster.errors import UsageError
from janus_cluster.run.text import clean_line, to_json
from janus_cluster.run.times import render_age

_CLUSTERS = click.Choice(["slurm", "sandbox"])


@click.group(
    "nodes",
    invoke_without_command=True,
    epilog="""\b
Examples:
  janus-cluster nodes
  janus-cluster nodes forgive h800-02
  janus-cluster nodes add h800-01 --reason "fan broken, ticket 12"

\b
See also: docs/preflight.md, docs/troubleshooting.md
""",
)
@click.option("--all", "show_all", is_flag=True, help="Forgiven and forgotten ones, too.")
@click.option("--json", "as_json", is_flag=True, help="A JSON list; nothing else on stdout.")
@click.pass_context
def nodes(ctx: click.Context, show_all: bool, as_json: bool) -> None:
    """List the nodes that submissions keep away from, with reason, run and age.

    A node gets here when it fails the gate, breaks under a run (Xid) or is lost, as soon as status, tail or submit
    look at that run; it is used again after preflight.forget_nodes_after_days (7 days).
    """
    if ctx.invoked_subcommand is not None:
        return
    now = time.time()
    found = [r for r in load_nodes() if show_all or r.is_live(now=now)]
    if as_json:
        click.echo(to_json([_to_json(r, now) for r in found]))
    elif not found:
        click.echo("no node is recorded as bad")
    else:
        click.echo("\n".join(_describe(r, now) for r in found))


def _to_json(record: NodeRecord, now: float) -> dict[str, object]:
    return {
        "node": record.node,
        "cluster": record.cluster,
        "kind": record.kind,
        "reason": record.reason,
        "run": record.run,
        "attempt": record.attempt,
        "age_s": round(now - record.time, 1),
        "excluded": record.is_live(now=now),
    }


def _describe(record: NodeRecord, now: float) -> str:
    where = "" if record.cluster == "slurm" else f" ({record.cluster})"
    run = f", run {record.run}" if record.attempt is not None else ""
    state = "" if record.is_live(now=now) else "  forgiven" if record.forgiven_at is not None else "  forgotten"
    return clean_line(
        f"{record.node}{where}  {record.kind}: {record.reason}  [{render_age(record.time, now=now)}{run}]{state}"
    )


@nodes.command(
    "forgive",
    epilog="""\b
Examples:
  janus-cluster nodes forgive h800-02
  janus-cluster nodes forgive --all

\b
Exit codes: 0 forgiven, 2 nothing is held against that node.

\b
See also: docs/preflight.md
""",
)
@click.argument("names", nargs=-1, metavar="[NODE]...")
@click.option("--all", "everything", is_flag=True, help="Every node.")
@json_option
def forgive(names: tuple[str, ...], everything: bool, as_json: bool) -> None:
    """Use NODE again from the next submission on."""
    if bool(names) == everything:
        raise UsageError("name the nodes, or give --all", hint="janus-cluster nodes lists them")
    done = forgive_nodes(None if everything else names, now=time.time())
    unknown = sorted(set(names) - set(done))
    if as_json and not unknown:
        click.echo(to_json({"forgiven": list(done)}))
        return
    if done:
        click.echo(f"forgiven: {', '.join(done)}", err=as_json)
    if unknown:
        raise UsageError(f"nothing is held against {', '.join(unknown)}", hint="janus-cluster nodes lists them")
    if not done:
        click.echo("no node is recorded as bad")


@nodes.command(
    "add",
    epilog="""\b
Examples:
  janus-cluster nodes add h800-01 --reason "fan broken, ticket 12"
  janus-cluster nodes add h800-02 --cluster sandbox --reason "to try a submission without it"

\b
See also: docs/preflight.md
""",
)
@click.argument("name", metavar="NODE")
@click.option("--reason", required=True, help="Why; it is shown at every submission that keeps away from NODE.")
@click.option("--cluster", type=_CLUSTERS, default="slurm", show_default=True, help="Which Slurm's node.")
@json_option
def add(name: str, reason: str, cluster: str, as_json: bool) -> None:
    """Keep away from NODE from the next submission on."""
    record = add_node(name, cluster=cluster, reason=reason, now=time.time())
    if as_json:
        click.echo(to_json(_to_json(record, record.time)))
    else:
        click.echo(f"remembered: {_describe(record, record.time)}")
