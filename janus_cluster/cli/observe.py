"""tail, status, list and cancel as click commands: parse, call, print."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from janus_cluster.cli.options import json_option, runs_dir_option
from janus_cluster.errors import UsageError
from janus_cluster.observe import find
from janus_cluster.observe.find import find_run
from janus_cluster.run.next_command import command_for
from janus_cluster.run.paths import RunDir
from janus_cluster.run.text import to_json

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

    from janus_cluster.observe.status import RunStatus

# A controller shared by a whole site can answer one squeue in this time; for `--watch`, and for a user who repeats
# `status` or `list`.
WATCH_S = 15.0
# `status` without a name looks for unfinished runs among this many of the newest.
_RECENT_RUNS = 50
# Columns: wider than any table.
_UNLIMITED = 10_000


@click.command(
    "tail",
    epilog="""\b
Exit codes: the job's own; 0 for a job that still runs (--no-follow), 130 after Ctrl-C,
24 for a job that is queued and for 10 minutes cannot start (held, a failed dependency, …).

\b
See also: docs/troubleshooting.md
""",
)
@click.argument("job")
@click.option(
    "-n",
    "num_lines",
    type=click.IntRange(min=0),
    help="Lines to begin with, all files together. Default: 20; with --since all of them.",
)
@click.option("--rank", type=click.IntRange(min=0), help="Only this global rank.")
@click.option("--node", help="Only this node.")
@click.option("--since", metavar="TIME", help="Only lines from TIME on: 10m, 2h, 1d ago; 14:05; 2026-11-21T14:05[Z].")
@click.option("--grep", metavar="RE", help="Only lines in which this regular expression is found.")
@click.option("--follow/--no-follow", default=True, help="Stay until the job ends, or show what is there and go.")
@click.option("--raw", is_flag=True, help="Every line as it is in the logs, with its time; nothing folded.")
@runs_dir_option
@click.pass_context
def tail(
    ctx: click.Context,
    /,
    *,
    job: str,
    num_lines: int | None,
    rank: int | None,
    node: str | None,
    since: str | None,
    grep: str | None,
    follow: bool,
    raw: bool,
    runs_dirs: list[Path],
) -> None:
    """Show the log of all nodes and ranks of JOB, live, and end with the job's own exit code.

    JOB is a job id, a run name, a job name (its newest run) or a run folder. Ctrl-C leaves the job alone.

    Lines are in the order of their times. Equal lines of several ranks within 2 s are one line: "×16", after
    h800-01,02:0-15. On a terminal, steps and progress bars are one live line at the bottom; in a pipe steps are lines,
    and bars are left out. So are the INFO lines of DeepSpeed and NCCL, unless --grep or --raw asks for them.

    A job that waits shows Slurm's reason and the start that Slurm expects; Slurm is asked every 15 s at most.

    \b
    Examples:
      janus-cluster tail 4711
      janus-cluster tail demo --rank 0
      janus-cluster tail demo --since 10m
      janus-cluster tail demo --node h800-02 --grep 'NCCL|Error'
      janus-cluster tail demo --no-follow -n 100
    """
    from janus_cluster.desk.harvest import remember_bad_nodes
    from janus_cluster.observe.tail import tail as follow_run

    run = find_run(job, runs_dirs)
    code = follow_run(
        run,
        out=sys.stdout,
        num_lines=num_lines,
        rank=rank,
        node=node,
        grep=grep,
        since=since,
        raw=raw,
        follow=follow,
        on_failure=remember_bad_nodes,
    )
    ctx.exit(code)


@click.command(
    "status",
    epilog="""\b
Examples:
  janus-cluster status                   what has not ended, or the newest run
  janus-cluster status 4711 --watch
  janus-cluster status demo --json

\b
Exit codes: 0 the state is shown, whatever it is; 22 no such run.

\b
See also: docs/troubleshooting.md
""",
)
@click.argument("jobs", nargs=-1, metavar="[JOB]...")
@click.option("--watch", is_flag=True, help="Show it again every 15 s, until Ctrl-C.")
@click.option(
    "--json", "as_json", is_flag=True, help="One JSON object for one JOB, a list otherwise; nothing else on stdout."
)
@runs_dir_option
def status(jobs: tuple[str, ...], watch: bool, as_json: bool, runs_dirs: list[Path]) -> None:
    """Show state, attempt, step, speed, loss and ETA of each JOB, and what failed.

    Without JOB: the runs that have not ended, or the newest one. Below the table, for each run: the state's source and
    its age; of all ranks the lowest and the highest GPU memory, visual tokens and wait for data; the seconds a step
    beside those that `plan` predicts; the card of a failure; what to type next.
    """
    if watch and as_json:
        raise click.UsageError("--watch is for people and --json for programs: choose one")
    named = [find_run(job, runs_dirs) for job in jobs]
    if as_json:
        values = [s.to_json() for s in _collect(named, runs_dirs)]
        click.echo(to_json(values[0] if len(jobs) == 1 else values))
        return
    console = _console()
    _print_status(console, _collect(named, runs_dirs), runs_dirs)
    try:
        while watch:
            time.sleep(WATCH_S)
            statuses = _collect(named, runs_dirs)
            console.clear()
            _print_status(console, statuses, runs_dirs)
    except KeyboardInterrupt:
        console.print()


def _collect(named: list[RunDir], folders: list[Path]) -> list[RunStatus]:
    """The named runs, or those that have not ended, or the newest; nodes that they blame are recorded."""
    from janus_cluster.desk.harvest import remember_bad_nodes
    from janus_cluster.job.home import site_dir
    from janus_cluster.observe.status import add_card, add_plan, add_slow, collect_status
    from janus_cluster.preflight.calibration import remember_gates

    statuses = collect_status(named or find.list_readable_runs(folders)[:_RECENT_RUNS])
    if not named:
        live = [s for s in statuses if not s.state.is_final and s.state.state != "NOT_SUBMITTED"]
        statuses = live or statuses[:1]
    statuses = [add_slow(add_plan(add_card(s))) for s in statuses]
    for s in statuses:
        remember_bad_nodes(s)
    # Nodes may not see this home: what their gates measured is taken from the run folder on a status.
    remember_gates(site_dir(), [s.run for s in statuses])
    return statuses


def print_status(runs: Sequence[RunDir]) -> None:
    """Print the table of the runs with their present states."""
    _print_status(_console(), _collect(list(runs), []), [])


def _print_status(console: Console, statuses: list[RunStatus], folders: list[Path]) -> None:
    from janus_cluster.observe.status_view import render_status

    if statuses:
        _print_unfolded(render_status(statuses, width=console.width))
    else:
        console.print(_no_runs(folders))


@click.command(
    "list",
    epilog="""\b
Examples:
  janus-cluster list
  janus-cluster list -n 5 --json
  janus-cluster list --runs-dir /shared/team/runs

\b
See also: docs/two-nodes.md
""",
)
@click.option("-n", "limit", type=click.IntRange(min=1), default=20, show_default=True, help="The newest so many runs.")
@click.option("--json", "as_json", is_flag=True, help="A JSON list; nothing else on stdout.")
@runs_dir_option
def list_runs(limit: int, as_json: bool, runs_dirs: list[Path]) -> None:
    """List the runs, newest first, with their states and the states' sources.

    One query of Slurm answers for all of them. --json gives the objects of `status --json`, without card and plan.
    """
    from janus_cluster.observe.listing import collect_list, render_list

    statuses = collect_list(runs_dirs, limit=limit)
    if as_json:
        click.echo(to_json([s.to_json() for s in statuses]))
    elif statuses:
        _print_unfolded(render_list(statuses, width=_console().width))
    else:
        click.echo(_no_runs(runs_dirs))


@click.command(
    "cancel",
    epilog="""\b
Examples:
  janus-cluster cancel 4711
  janus-cluster cancel demo --yes

\b
Exit codes: 0 asked to end, 2 it does not run or much would be lost, 21 no Slurm, 22 no such job.

\b
See also: docs/reliability.md
""",
)
@click.argument("job")
@click.option("--yes", is_flag=True, help="Do not ask, whatever is lost.")
@json_option
@runs_dir_option
def cancel(job: str, yes: bool, as_json: bool, runs_dirs: list[Path]) -> None:
    """End JOB: scancel under Slurm, SIGTERM to its process group on this machine.

    Asks first when more than checkpoint.confirm_cancel_min (10) minutes of work since the last checkpoint would be
    lost; without a terminal to ask on it refuses, unless --yes is given. `resume` goes on with what is left.
    """
    from janus_cluster.desk.cancel import cancel_run, estimate_loss
    from janus_cluster.run.records.submission import load_submission

    run = find_run(job, runs_dirs)
    loss = estimate_loss(run, now=time.time())
    if loss.is_much and not yes:
        what = f"{run.name} would lose {loss.minutes:.0f} minutes of work since {loss.since}"
        if not sys.stdin.isatty():
            raise UsageError(what, hint=command_for("cancel", run, "--yes"))
        click.confirm(f"{what}. Cancel it?", abort=True, err=as_json)
    message = cancel_run(run)
    if as_json:
        sent = load_submission(run)
        lost = {"minutes": round(loss.minutes, 1), "since": loss.since}
        value = {"run_dir": str(run.path), "job_id": sent.job_id if sent else None, "said": message, "lost": lost}
        click.echo(to_json(value))
    else:
        click.echo(message)


def _console() -> Console:
    from rich.console import Console

    # A pipe has no width: a table folded to 80 columns could not be searched line by line.
    console = Console(soft_wrap=False, highlight=False)
    return console if console.is_terminal else Console(width=220, highlight=False)


def _print_unfolded(what: RenderableType) -> None:
    """Print without folding: the terminal folds long lines; a command folded by rich could not be copied whole."""
    from rich.console import Console

    Console(width=_UNLIMITED, highlight=False).print(what, soft_wrap=True)


def _no_runs(folders: list[Path]) -> str:
    where = ", ".join(map(str, folders))
    return f"no runs in {where} (JANUS_HOME or --runs-dir names another folder); janus-cluster submit starts one"
