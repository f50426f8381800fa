"""tail, status, list and cancel as click commands: parse, call, print."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from janus_cluster.config.home import runs_dir
from janus_cluster.errors import UsageError
from janus_cluster.observe import find
from janus_cluster.observe.find import find_run
from janus_cluster.observe.text import to_json
from janus_cluster.rundir import RunDir

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

    from janus_cluster.observe.status import RunStatus

# One squeue in this time is what a controller shared by a whole site can be asked for; by `--watch`, and by who types
# `status` or `list` again and again.
WATCH_S = 15.0
# `status` without a name looks for unfinished runs among this many of the newest.
_RECENT_RUNS = 50
# Columns: wider than any table.
_UNLIMITED = 10_000

_runs_dir_option = click.option(
    "--runs-dir",
    "runs_dirs",
    multiple=True,
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder of run folders; may be repeated. Default: $JANUS_HOME/runs, else ./runs.",
)


def _folders(runs_dirs: tuple[Path, ...]) -> list[Path]:
    return list(runs_dirs) or [runs_dir(os.environ, Path.cwd())]


@click.command(
    "tail",
    epilog="""\b
Exit codes: the job's own; 0 for a job that still runs (--no-follow), 130 after Ctrl-C.

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
@click.option("--raw", is_flag=True, help="Every line as it stands in the logs, with its time; nothing folded.")
@_runs_dir_option
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
    runs_dirs: tuple[Path, ...],
) -> None:
    """Show the log of all nodes and ranks of JOB, live, and end with the job's own exit code.

    JOB is a job id, a run name, a job name (its newest run) or a run folder. Ctrl-C leaves the job alone.

    Lines come in the order of their times. What several ranks say within 2 s of each other is one line: "×16", after
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
    from janus_cluster.observe.tail import tail as follow_run

    run = find_run(job, _folders(runs_dirs))
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
    )
    ctx.exit(code)


@click.command(
    "status",
    epilog="""\b
Examples:
  janus-cluster status                   what has not ended, or the newest run
  janus-cluster status 4711 --watch
  janus-cluster status demo --json
  watch -n1 janus-cluster status         Slurm is asked once in 15 s all the same

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
@_runs_dir_option
def status(jobs: tuple[str, ...], watch: bool, as_json: bool, runs_dirs: tuple[Path, ...]) -> None:
    """Show state, attempt, step, speed, loss and ETA of each JOB, and what failed.

    Without JOB: the runs that have not ended, or the newest one. Below the table, for each run: who says so and how
    old that is; of all ranks the lowest and the highest GPU memory, visual tokens and wait for data; the seconds a step
    beside those that `plan` predicts; the card of a failure; what to type next.
    """
    if watch and as_json:
        raise click.UsageError("--watch is for people and --json for programs: choose one")
    folders = _folders(runs_dirs)
    named = [find_run(job, folders) for job in jobs]
    if as_json:
        values = [s.to_json() for s in _collect(named, folders)]
        click.echo(to_json(values[0] if len(jobs) == 1 else values))
        return
    console = _console()
    _print_status(console, _collect(named, folders), folders)
    try:
        while watch:
            time.sleep(WATCH_S)
            statuses = _collect(named, folders)
            console.clear()
            _print_status(console, statuses, folders)
    except KeyboardInterrupt:
        console.print()


def _collect(named: list[RunDir], folders: list[Path], *, max_age_s: float = WATCH_S) -> list[RunStatus]:
    """The runs that were named, or those that have not ended, or the newest; nodes that they blame are remembered."""
    from janus_cluster.config.home import site_dir
    from janus_cluster.observe.harvest import remember_bad_nodes
    from janus_cluster.observe.status import add_card, add_plan, collect_status
    from janus_cluster.preflight.calibration import remember_gates

    statuses = collect_status(named or find.list_runs(folders)[:_RECENT_RUNS], max_age_s=max_age_s)
    if not named:
        live = [s for s in statuses if not s.state.is_final and s.state.state != "NOT_SUBMITTED"]
        statuses = live or statuses[:1]
    statuses = [add_plan(add_card(s)) for s in statuses]
    for s in statuses:
        remember_bad_nodes(s)
    # Nodes may not see this home: what their gates measured is taken from the run folder when somebody looks.
    remember_gates(site_dir(), [s.run for s in statuses])
    return statuses


def print_status(runs: Sequence[RunDir]) -> None:
    """The table of the runs is on stdout, from what Slurm says at this moment."""
    _print_status(_console(), _collect(list(runs), [], max_age_s=0.0), [])


def _print_status(console: Console, statuses: list[RunStatus], folders: list[Path]) -> None:
    from janus_cluster.observe.status import render_status

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
@_runs_dir_option
def list_runs(limit: int, as_json: bool, runs_dirs: tuple[Path, ...]) -> None:
    """List the runs, newest first, with their states, and who says so.

    One question to Slurm answers for all of them. --json gives the objects of `status --json`, without card and plan.
    """
    from janus_cluster.observe.listing import collect_list, render_list

    folders = _folders(runs_dirs)
    statuses = collect_list(folders, limit=limit, max_age_s=WATCH_S)
    if as_json:
        click.echo(to_json([s.to_json() for s in statuses]))
    elif statuses:
        _print_unfolded(render_list(statuses, width=_console().width))
    else:
        click.echo(_no_runs(folders))


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
@click.option("--json", "as_json", is_flag=True, help="One JSON object; nothing else on stdout.")
@_runs_dir_option
def cancel(job: str, yes: bool, as_json: bool, runs_dirs: tuple[Path, ...]) -> None:
    """End JOB: scancel under Slurm, SIGTERM to its process group on this machine.

    Asks first when more than checkpoint.confirm_cancel_min (10) minutes of work since the last checkpoint would be
    lost; without a terminal to ask on it refuses, unless --yes is given. `resume` goes on with what is left.
    """
    from janus_cluster.observe.cancel import cancel_run, estimate_loss
    from janus_cluster.slurm.recorded import load_submission

    run = find_run(job, _folders(runs_dirs))
    loss = estimate_loss(run, now=time.time())
    if loss.is_much and not yes:
        what = f"{run.name} would lose {loss.minutes:.0f} minutes of work since {loss.since}"
        if not sys.stdin.isatty():
            raise UsageError(what, hint=f"janus-cluster cancel {job} --yes")
        click.confirm(f"{what}. Cancel it?", abort=True, err=as_json)
    said = cancel_run(run)
    if as_json:
        sent = load_submission(run)
        lost = {"minutes": round(loss.minutes, 1), "since": loss.since}
        value = {"run_dir": str(run.path), "job_id": sent.job_id if sent else None, "said": said, "lost": lost}
        click.echo(to_json(value))
    else:
        click.echo(said)


def _console() -> Console:
    from rich.console import Console

    # A pipe has no width: a table folded to 80 columns could not be searched line by line.
    console = Console(soft_wrap=False, highlight=False)
    return console if console.is_terminal else Console(width=220, highlight=False)


def _print_unfolded(what: RenderableType) -> None:
    """The terminal folds long lines itself; a command or table folded by rich could not be copied whole."""
    from rich.console import Console

    Console(width=_UNLIMITED, highlight=False).print(what, soft_wrap=True)


def _no_runs(folders: list[Path]) -> str:
    where = ", ".join(map(str, folders))
    return f"no runs in {where} (JANUS_HOME or --runs-dir names another folder); janus-cluster submit starts one"
