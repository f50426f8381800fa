"""The commands that make and check runs: submit, preflight, render, config. They parse, call and print."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from janus_cluster.errors import GateUndetermined
from janus_cluster.submit import Cluster, Request, Submission, load_request

if TYPE_CHECKING:
    from janus_cluster.config.schema import ResolvedJob

CLUSTERS = click.Choice(["slurm", "local", "sandbox"])


def job_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """JOB, --nodes and --set, as every command that reads a job file takes them."""
    function = click.option(
        "--set", "sets", multiple=True, metavar="KEY=VALUE", help="Override one key, e.g. training.learning_rate=3e-5."
    )(function)
    function = click.option("--nodes", type=int, metavar="1|2", help="Number of nodes; wins over the job file.")(
        function
    )
    return click.argument("job", required=False)(function)


@click.command(
    epilog="""\b
Examples:
  janus-cluster submit --nodes 2                          jobs/train_2node.yaml with $MODEL_PATH, $DATA_ROOT, …
  janus-cluster submit my.yaml --set training.num_epochs=3 --follow
  janus-cluster submit demo --cluster local --follow      the whole flow on this machine, no Slurm
  janus-cluster submit --nodes 1 --dry-run                write the run folder, queue nothing
"""
)
@job_options
@click.option("--cluster", type=CLUSTERS, default="slurm", show_default=True, help="Where it runs.")
@click.option("--dry-run", is_flag=True, help="Write the run folder and stop; needs no Slurm and no torch.")
@click.option("--follow", is_flag=True, help="Follow the log to the end and end with the job's exit code.")
@click.option("--no-preflight", is_flag=True, help="Train without the gate.")
@click.option("--exclude", metavar="NODES", help="Nodes to keep away from, as sbatch --exclude takes them.")
@click.option("--name", help="Name of the run; default: the job file's.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object and nothing else.")
def submit(
    *,
    job: str | None,
    nodes: int | None,
    sets: tuple[str, ...],
    cluster: Cluster,
    dry_run: bool,
    follow: bool,
    no_preflight: bool,
    exclude: str | None,
    name: str | None,
    as_json: bool,
) -> int:
    """Check, render and submit JOB: a job file, or a shipped one (train_1node, train_2node, preflight, demo)."""
    from janus_cluster.submit import submit as submit_run

    request = Request(
        job=job,
        nodes=nodes,
        sets=sets,
        cluster=cluster,
        dry_run=dry_run,
        preflight=not no_preflight,
        exclude=exclude,
        name=name,
    )
    done = submit_run(request, environ=os.environ, cwd=Path.cwd())
    if as_json:
        click.echo(json.dumps(done.to_json(), indent=2, ensure_ascii=False))
    else:
        click.echo(describe(done))
    if follow and not dry_run:
        return _follow(done, out_is_stderr=as_json)
    return 0


def _follow(done: Submission, *, out_is_stderr: bool) -> int:
    """The run has ended; its log went by, and its last state is printed. Returns: the job's exit code."""
    from janus_cluster.observe.cli import print_status
    from janus_cluster.observe.tail import tail

    click.echo("", err=out_is_stderr)
    code = tail(done.run, out=sys.stderr if out_is_stderr else sys.stdout)
    if not out_is_stderr:
        print_status([done.run])
    return code


def describe(done: Submission) -> str:
    """What will run, where it lies, and what to type next."""
    resolved, job = done.resolved, done.resolved.job
    rows = [
        ("job", f"{job.name} ({done.source})"),
        (
            "ranks",
            f"{job.nodes} node{'s' * (job.nodes > 1)} × {resolved.processes_per_node} = {resolved.world_size}, "
            f"{job.hardware.device}",
        ),
    ]
    if job.kind == "train":
        rows += _describe_training(resolved)
    gate = (
        f"preflight, thresholds {resolved.preflight_profile}"
        if job.preflight.enabled
        else "off (preflight.enabled: false)"
    )
    rows += [("gate", gate), ("environment", job.environment.profile)]
    rows += [("warning", text) for text in resolved.warnings]
    rows += [("run folder", str(done.run.path)), ("command", done.shell_line)]
    if done.job_id is None:
        rows += [("dry run", "nothing was queued"), ("next", f"less {done.run.job_sbatch}"), ("", done.shell_line)]
    else:
        rows += [("job id", done.job_id), ("next", f"janus-cluster tail {done.job_id}")]
        rows += [("", f"janus-cluster status {done.job_id}"), ("", f"janus-cluster cancel {done.job_id}")]
    return "\n".join(f"{label:<12} {text}".rstrip() for label, text in rows)


def _describe_training(resolved: ResolvedJob) -> list[tuple[str, str]]:
    job, t = resolved.job, resolved.job.training
    length = f"{t.max_steps} steps" if t.max_steps else f"{t.num_epochs:g} epochs"
    return [
        ("model", f"{job.model.preset}{', ' + job.model.path if job.model.path else ''}"),
        ("data", f"{', '.join(r.path for r in job.data.roots)}; history {job.data.history}, {job.data.image_mode}"),
        (
            "batch",
            f"{t.per_device_batch_size} per rank × {t.gradient_accumulation_steps} accumulated × {resolved.world_size} "
            f"ranks = effective batch {resolved.effective_batch_size}",
        ),
        ("training", f"{length}, learning rate {t.learning_rate:g}, {t.precision}, DeepSpeed {job.deepspeed.profile}"),
    ]


@click.command(
    epilog="""\b
Examples:
  janus-cluster preflight --nodes 2                       a job of its own on two nodes
  janus-cluster preflight demo --cluster local            the gate of jobs/demo.yaml, here
  janus-cluster preflight --local                         this host alone, judged as an H800 node
\b
Exit codes: 0 pass, 1 warn, 2 fail, 3 undetermined.
"""
)
@job_options
@click.option("--cluster", type=CLUSTERS, default="slurm", show_default=True, help="Where it runs.")
@click.option("--local", is_flag=True, help="This host alone: --cluster local --nodes 1.")
@click.option("--exclude", metavar="NODES", help="Nodes to keep away from.")
@click.option("--json", "as_json", is_flag=True, help="Print the verdict as JSON and nothing else.")
def preflight(
    *,
    job: str | None,
    nodes: int | None,
    sets: tuple[str, ...],
    cluster: Cluster,
    local: bool,
    exclude: str | None,
    as_json: bool,
) -> int:
    """Run the gate of JOB (default: the shipped preflight job) and print its verdict; nothing is trained."""
    from janus_cluster.observe.tail import tail
    from janus_cluster.preflight.model import EXIT_CODES, Verdict
    from janus_cluster.preflight.report import render_verdict
    from janus_cluster.rundir import read_json
    from janus_cluster.submit import submit as submit_run

    request = Request(
        job=job or "preflight",
        nodes=1 if local else nodes,
        sets=("kind=preflight", *sets),
        cluster="local" if local else cluster,
        exclude=exclude,
    )
    done = submit_run(request, environ=os.environ, cwd=Path.cwd())
    click.echo(f"job {done.job_id}: {done.run.path}", err=True)
    tail(done.run, out=sys.stderr)
    attempts = done.run.attempts()
    path = done.run.verdict_json(attempts[-1]) if attempts else None
    if path is None or not path.exists():
        raise GateUndetermined("the preflight job ended without a verdict", hint=f"janus-cluster tail {done.run.name}")
    verdict = Verdict.from_json(read_json(path))
    if as_json:
        click.echo(json.dumps(verdict.to_json(), indent=2, ensure_ascii=False))
    else:
        from rich.console import Console

        Console().print(render_verdict(verdict))
    return EXIT_CODES[verdict.state]


@click.command()
@job_options
@click.option("--part", type=click.Choice(["sbatch", "env", "ds"]), default="sbatch", show_default=True)
def render(job: str | None, nodes: int | None, sets: tuple[str, ...], part: Literal["sbatch", "env", "ds"]) -> None:
    """Print what `submit` would write for JOB: the script, the environment or the ZeRO JSON."""
    from janus_cluster.config.resolve import resolve_job
    from janus_cluster.render.bundle import render_env_of
    from janus_cluster.render.sbatch import render_sbatch

    request = Request(job=job, nodes=nodes, sets=sets)
    loaded = load_request(request, os.environ)
    run_dir = Path.cwd() / "runs" / f"{loaded.config.name}-<time>-<id>"
    resolved = resolve_job(
        loaded, run_dir=run_dir, cluster="slurm", environ=os.environ, cwd=Path.cwd(), python=sys.executable
    )
    if part == "ds":
        click.echo(json.dumps(resolved.ds_config, indent=2))
    else:
        click.echo(render_sbatch(resolved) if part == "sbatch" else render_env_of(resolved), nl=False)


@click.group()
def config() -> None:
    """Look at job files: their schema, or one job's values and where each came from."""


@config.command("schema")
def config_schema() -> None:
    """Print the JSON Schema of job files (editors complete keys from it)."""
    from janus_cluster.config.schema import JobConfig

    schema = JobConfig.model_json_schema() | {"$schema": "https://json-schema.org/draft/2020-12/schema"}
    click.echo(json.dumps(schema, indent=2, ensure_ascii=False))


@config.command("show")
@job_options
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object and nothing else.")
def config_show(job: str | None, nodes: int | None, sets: tuple[str, ...], as_json: bool) -> None:
    """Print every value of JOB and where it came from: a line of the file, --set, a variable, a default."""
    from janus_cluster.config.load import flatten

    loaded = load_request(Request(job=job, nodes=nodes, sets=sets), os.environ)
    rows = flatten(loaded.config.model_dump(mode="json"))
    if as_json:
        values = {key: {"value": value, "origin": loaded.origins.get(key, "default")} for key, value in rows}
        click.echo(json.dumps(values, indent=2, ensure_ascii=False))
        return
    for key, value in rows:
        click.echo(f"{key} = {json.dumps(value, ensure_ascii=False)}    # {loaded.origins.get(key, 'default')}")
