"""`janus-cluster plan`: memory, time and the best way to train, before anything is queued."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import click

from janus_cluster.cli.options import ProfileName, json_option, nodes_option
from janus_cluster.errors import UsageError
from janus_cluster.job.home import site_dir
from janus_cluster.job.load import LoadedJob, find_job_file, load_job
from janus_cluster.job.nearest import did_you_mean
from janus_cluster.job.schema import JobConfig
from janus_cluster.modelspec.sizes import load_sizes
from janus_cluster.plan.auto import as_trained, plan_memory_keys
from janus_cluster.plan.choose import (
    choose,
    describe_choice,
    nodes_to_plan,
    options_to_type,
    plan_option,
    plan_options,
    plan_other_samples,
    with_wanted_batch,
)
from janus_cluster.plan.hardware import Gpu, find_gpu, known_gpu, known_gpus
from janus_cluster.plan.report import (
    Plan,
    plan_to_json,
    render_choice,
    render_head,
    render_options,
    render_other_samples,
)
from janus_cluster.run.text import to_json

TABLE_WIDTH = 124
_WITHOUT_DEFAULT = re.compile(r"(?<!\$)\$\{([A-Za-z_][A-Za-z0-9_]*)\}")


@click.command(
    epilog="""\b
Examples:
  janus-cluster plan                                      jobs/train_2node.yaml, no variable set
  janus-cluster plan my.yaml --nodes 1 --samples 250000   one node; hours for that many samples
  janus-cluster plan --set model.preset=qwen2.5-vl-3b --set data.history=16
  janus-cluster plan --gpu h200 --json                    every figure and every assumption

\b
See also: docs/performance.md
"""
)
@click.argument("job", required=False)
@nodes_option("This number of nodes only, 1 to 64; default: 1, 2, 4, … up to the job's, and the choice is the job's.")
@click.option("--set", "sets", multiple=True, metavar="KEY=VALUE", help="Override one key, e.g. data.history=4.")
@click.option(
    "--gpu",
    type=ProfileName("gpu"),
    metavar="NAME|PATH",
    help="What to plan for, as hardware.gpu_type takes it; default: the job's, else h800.",
)
@click.option(
    "--samples", type=click.IntRange(min=1), metavar="N", help="Samples of an epoch; default: hours for 100,000."
)
@json_option
def plan(
    *, job: str | None, nodes: int | None, sets: tuple[str, ...], gpu: str | None, samples: int | None, as_json: bool
) -> None:
    """Predict memory and time of JOB for every ZeRO stage, batch and number of nodes, and name the way to take.

    Nothing is read but the job file and, where it is there, config.json of model.path; nothing is written. All options
    have the job's effective batch. What fits comes first.
    """
    made = make_plan(job, nodes=nodes, sets=sets, gpu_name=gpu, samples=samples, environ=os.environ)
    if as_json:
        click.echo(to_json(plan_to_json(made)))
        return
    from rich.console import Console

    console = Console(highlight=False)
    width = console.width if console.is_terminal or "COLUMNS" in os.environ else None
    # rich would cut a table of a pipe at 80 columns.
    console.width = max(console.width, TABLE_WIDTH)
    click.echo("\n".join(render_head(made, width=width)))
    console.print(render_options(made, width=width))
    console.print(render_other_samples(made, width=width))
    click.echo("\n".join(render_choice(made, width=width)))


def make_plan(
    name: str | None,
    *,
    nodes: int | None,
    sets: Sequence[str],
    gpu_name: str | None,
    samples: int | None,
    environ: Mapping[str, str],
) -> Plan:
    """The plan of a job file. Raises: UsageError."""
    loaded = _load(name, nodes=nodes, sets=sets, environ=environ)
    gpu, notes = _gpu_of(loaded.config, gpu_name)
    try:
        # What would be submitted; a GPU of another name than the job's was asked for here.
        loaded, memory = plan_memory_keys(loaded, gpu=gpu if gpu_name else None)
        notes += [] if memory is None else [f"training.memory: auto takes {memory.option.words}"]
    except UsageError as e:
        notes.append(e.message)
    job = as_trained(loaded.config)
    sizes = load_sizes(job.model)
    if job.model.path is None or not Path(job.model.path).is_dir():
        notes.append(f"no folder at model.path: the published sizes of {job.model.preset} are taken")
    ranks = job.hardware.processes_per_node or max(1, job.hardware.gpus_per_node)
    standing = with_wanted_batch(job, ranks_per_node=ranks)
    as_it_is = plan_option(standing, sizes=sizes, ranks_per_node=ranks, gpu=gpu)
    options = plan_options(
        standing,
        sizes=sizes,
        ranks_per_node=ranks,
        gpu=gpu,
        nodes=nodes_to_plan(job.nodes) if nodes is None else (nodes,),
    )
    chosen = choose(options, nodes=job.nodes)
    return Plan(
        source=loaded.source,
        gpu=gpu,
        sizes=sizes,
        as_it_is=as_it_is,
        options=options,
        chosen=chosen,
        reason=describe_choice(chosen, as_it_is, gpu),
        to_type=[] if chosen is None else options_to_type(chosen, job),
        other_samples=plan_other_samples(standing, sizes=sizes, ranks_per_node=ranks, gpu=gpu),
        samples=samples,
        notes=notes,
    )


def _load(name: str | None, *, nodes: int | None, sets: Sequence[str], environ: Mapping[str, str]) -> LoadedJob:
    """The job file; variables that are not set are left as they are written, since planning opens no path."""
    path = find_job_file(name, nodes=nodes)
    text = "\n".join([path.read_text(encoding="utf-8", errors="replace"), *sets])
    unset = {name: f"${name}" for name in _WITHOUT_DEFAULT.findall(text) if not environ.get(name)}
    return load_job(path, sets=sets, environ={**environ, **unset}, options={"nodes": nodes}, site=site_dir(environ))


def _gpu_of(job: JobConfig, name: str | None) -> tuple[Gpu, list[str]]:
    found = find_gpu(name) if name else find_gpu(job.hardware.gpu_type)
    if name and found is None:
        known = known_gpus()
        raise UsageError(f"--gpu {name}: not known{did_you_mean(name, known)}", hint=f"one of: {', '.join(known)}")
    gpu = known_gpu(job.hardware, name) or found or known_gpus()["h800"]
    notes = []
    if job.hardware.device == "cpu":
        notes.append(f"hardware.device is cpu: the figures are those of {gpu.name}s nevertheless")
    elif found is None and job.hardware.gpu_memory_gb is not None:
        notes.append(f"hardware.gpu_type {job.hardware.gpu_type!r}: its memory is the job's, its speed that of an H800")
    elif found is None:
        notes.append(f"hardware.gpu_type {job.hardware.gpu_type!r} is not known here: planned for {gpu.name}")
    return gpu, notes
