"""janus-cluster data: a job's data, made ready before any GPU is asked for."""

from __future__ import annotations

import os
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import click

from janus_cluster.cli.options import json_option
from janus_cluster.cli.submit import CLUSTERS, job_options
from janus_cluster.run.text import to_json

if TYPE_CHECKING:
    from janus_cluster.desk.submit import Request
    from janus_cluster.run.records.submission import Cluster

# A job on one node without GPUs. The user's own --set follow these.
INDEX_JOB = (
    "kind=index",
    "nodes=1",
    "hardware.device=cpu",
    "hardware.gpus_per_node=0",
    "hardware.processes_per_node=1",
    "environment.profile=cpu",
    "preflight.enabled=false",
    "training.memory=manual",
    "slurm.exclusive=false",
    "slurm.cpus-per-task=8",
    "slurm.time=04:00:00",
)


@click.group(
    epilog="""\b
Examples:
  janus-cluster data index my.yaml            make the index here, with a progress bar
  janus-cluster data index my.yaml --submit   as a job without GPUs

\b
See also: docs/data.md
"""
)
def data() -> None:
    """Make a job's index of data before its GPUs are asked for."""


@data.command(
    "index",
    epilog="""\b
Examples:
  janus-cluster data index my.yaml
  janus-cluster data index my.yaml --submit --set slurm.partition=cpu --follow
  janus-cluster data index my.yaml --submit --cluster local

\b
Exit codes: 0 the index is there, 2 training would refuse the data.
With --submit those of submit.

\b
See also: docs/data.md
""",
)
@job_options
@click.option("--submit", is_flag=True, help="As a job of its own: one node, 8 CPUs, no GPU.")
@click.option("--cluster", type=CLUSTERS, default="slurm", show_default=True, help="With --submit: where it runs.")
@click.option("--follow", is_flag=True, help="With --submit: follow the log to the end.")
@json_option
def index(
    *,
    job: str | None,
    nodes: int | None,
    sets: tuple[str, ...],
    submit: bool,
    cluster: Cluster,
    follow: bool,
    as_json: bool,
) -> int:
    """Read JOB's data once and keep the index where training looks for it: its first attempt only checks it.

    What training would refuse is refused here: bad samples, absent trajectories, samples of too many tokens (counted
    where model.path has a tokenizer). The index is written to data.index_dir, by default beside the run folders.
    """
    from janus_cluster.desk.submit import Request

    if not submit:
        return _index_here(Request(job=job, nodes=nodes, sets=sets), as_json=as_json)
    request = Request(job=job, nodes=1, sets=(*INDEX_JOB, *sets), cluster=cluster)
    return _submit_index(request, follow=follow, as_json=as_json)


def _index_here(request: Request, *, as_json: bool) -> int:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    from janus_cluster.desk.submit import load_request, new_run_path
    from janus_cluster.janusvln.data.indexing import Reporter
    from janus_cluster.job.resolve import resolve_job
    from janus_cluster.run.paths import RunDir
    from janus_cluster.training.build_index import build_index

    loaded = load_request(request, os.environ)
    # No run: with one, the index would be written beside it.
    run = RunDir(new_run_path(loaded.config, os.environ, Path.cwd()))
    job = resolve_job(
        loaded, run_dir=run.path, cluster="local", environ=os.environ, cwd=Path.cwd(), python=sys.executable
    ).job
    index_dir = Path(job.data.index_dir) if job.data.index_dir else run.data_index
    console = Console(stderr=True)
    echo = partial(click.echo, err=as_json)
    if not console.is_terminal:
        split = build_index(job, index_dir=index_dir, reporter=Reporter(report=echo))
    else:
        columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
        with Progress(*columns, console=console, transient=True) as bar:
            task = bar.add_task("reading", total=1.0)
            reporter = Reporter(
                report=echo, progress=lambda what, share: bar.update(task, description=what, completed=share)
            )
            split = build_index(job, index_dir=index_dir, reporter=reporter)
    if as_json:
        samples = {"train": len(split.train), "held_out": len(split.held_out), "bad": split.num_bad}
        click.echo(to_json({"index_dir": str(index_dir), "samples": samples}))
    else:
        echo(f"index: {index_dir}")
    return 0


def _submit_index(request: Request, *, follow: bool, as_json: bool) -> int:
    from janus_cluster.cli.follow import follow_to_end
    from janus_cluster.cli.submit import describe
    from janus_cluster.desk.submit import submit as submit_run

    done = submit_run(request, environ=os.environ, cwd=Path.cwd())
    click.echo(to_json(done.to_json()) if as_json else describe(done))
    return follow_to_end(done.run, out_is_stderr=as_json) if follow else 0
