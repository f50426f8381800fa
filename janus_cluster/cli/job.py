"""The commands that look at job files and write nothing: render, config show, check, schema."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Literal

import click

from janus_cluster.cli.options import json_option
from janus_cluster.cli.submit import job_options
from janus_cluster.desk.submit import Request, load_planned, load_request, runs_folder
from janus_cluster.run.text import to_json


@click.command(
    epilog="""\b
Examples:
  janus-cluster render my.yaml --nodes 2          the script that sbatch would get
  janus-cluster render my.yaml --part env         every exported variable and its reason
  janus-cluster render --part ds --set deepspeed.profile=zero2

\b
See also: docs/architecture.md
"""
)
@job_options
@click.option(
    "--part",
    type=click.Choice(["sbatch", "env", "ds"]),
    default="sbatch",
    show_default=True,
    help="The batch script, the variables, or DeepSpeed's JSON.",
)
def render(job: str | None, nodes: int | None, sets: tuple[str, ...], part: Literal["sbatch", "env", "ds"]) -> None:
    """Print what `submit` would write for JOB: the script, the environment or the ZeRO JSON.

    Nothing is written, and no Slurm is asked. Paths of the run folder have <time> and <id> in place of their own.
    """
    from janus_cluster.job.resolve import resolve_job
    from janus_cluster.run.bundle import render_env_of
    from janus_cluster.run.sbatch import render_sbatch

    loaded = load_planned(Request(job=job, nodes=nodes, sets=sets), os.environ).loaded
    run_dir = runs_folder(loaded.config, os.environ, Path.cwd()) / f"{loaded.config.name}-<time>-<id>"
    resolved = resolve_job(
        loaded, run_dir=run_dir, cluster="slurm", environ=os.environ, cwd=Path.cwd(), python=sys.executable
    )
    if part == "ds":
        click.echo(to_json(resolved.ds_config))
    else:
        click.echo(render_sbatch(resolved) if part == "sbatch" else render_env_of(resolved), nl=False)


@click.group(
    epilog="""\b
Examples:
  janus-cluster config show my.yaml          every value and its origin
  janus-cluster config check my.yaml         do the weights fit, can the data be read?
  janus-cluster config schema > job.schema.json

\b
See also: docs/configuration.md
"""
)
def config() -> None:
    """Look at job files: their schema, one job's values and their origins, or its checkpoints and data."""


@config.command(
    "schema",
    epilog="""\b
Examples:
  janus-cluster config schema > job.schema.json
  janus-cluster config schema --markdown > docs/configuration.md

\b
See also: docs/configuration.md
""",
)
@click.option("--markdown", is_flag=True, help="A page for people instead: every key, its default, limits and meaning.")
def config_schema(markdown: bool) -> None:
    """Print the JSON Schema of job files (editors complete keys from it)."""
    from janus_cluster.job.schema import JobConfig

    if markdown:
        from janus_cluster.job.reference import render_reference

        click.echo(render_reference(JobConfig.model_json_schema()), nl=False)
        return
    schema = JobConfig.model_json_schema() | {"$schema": "https://json-schema.org/draft/2020-12/schema"}
    click.echo(to_json(schema))


@config.command(
    "show",
    epilog="""\b
Examples:
  janus-cluster config show my.yaml --set training.seed=3
  janus-cluster config show --nodes 2 --json

\b
See also: docs/configuration.md
""",
)
@job_options
@json_option
def config_show(job: str | None, nodes: int | None, sets: tuple[str, ...], as_json: bool) -> None:
    """Print every value of JOB and its origin: a line of the file, --set, a variable, a default."""
    from janus_cluster.job.load import flatten

    loaded = load_planned(Request(job=job, nodes=nodes, sets=sets), os.environ).loaded
    rows = flatten(loaded.config.model_dump(mode="json"))
    if as_json:
        values = {key: {"value": value, "origin": loaded.origins.get(key, "default")} for key, value in rows}
        click.echo(to_json(values))
        return
    for key, value in rows:
        click.echo(f"{key} = {json.dumps(value, ensure_ascii=False)}    # {loaded.origins.get(key, 'default')}")


@config.command(
    "check",
    epilog="""\b
Examples:
  janus-cluster config check my.yaml
  janus-cluster config check --nodes 2 --set model.path=/models/mine --json

\b
Exit codes: 0 all weights are there and fit and data can be read, 2 some are missing, cut or of
another shape, or training would refuse the data.

\b
See also: docs/model.md
""",
)
@job_options
@json_option
def config_check(job: str | None, nodes: int | None, sets: tuple[str, ...], as_json: bool) -> None:
    """Read the headers of JOB's checkpoints and a part of its data: what will be taken, drawn anew, left out."""
    from janus_cluster.job.check_data import check_data
    from janus_cluster.job.resolve import resolve_job
    from janus_cluster.modelspec.check_weights import check_weights

    # Which weights are taken does not depend on what fits into a GPU.
    loaded = load_request(Request(job=job, nodes=nodes, sets=sets), os.environ)
    resolved = resolve_job(
        loaded, run_dir=Path.cwd() / "runs", cluster="slurm", environ=os.environ, cwd=Path.cwd(), python=sys.executable
    )
    lines = check_weights(resolved.job.model)
    data = check_data(resolved.job)
    if as_json:
        value = {"job": loaded.config.name, "source": loaded.source, "weights": lines}
        value |= {"data": list(data.lines), "warnings": list(data.warnings)}
        click.echo(to_json(value))
        return
    warnings = [f"warning: {text}" for text in data.warnings]
    for line in (f"job: {loaded.config.name} ({loaded.source})", *lines, *data.lines, *warnings):
        click.echo(line)
