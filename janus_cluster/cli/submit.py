"""The commands that make and check runs: submit, resume, preflight. They parse, call and print."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from janus_cluster.cli.options import ProfileName, json_option, nodes_option, runs_dir_option
from janus_cluster.desk.submit import Request, Submission, load_planned
from janus_cluster.run.next_command import command_for
from janus_cluster.run.records.submission import Cluster
from janus_cluster.run.text import counted, to_json

if TYPE_CHECKING:
    from janus_cluster.job.resolved import ResolvedJob
    from janus_cluster.run.paths import RunDir

CLUSTERS = click.Choice(["slurm", "local", "sandbox"])


def job_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """JOB, --nodes and --set, as every command that reads a job file takes them."""
    function = click.option(
        "--set", "sets", multiple=True, metavar="KEY=VALUE", help="Override one key, e.g. training.learning_rate=3e-5."
    )(function)
    function = nodes_option("Number of nodes, 1 to 64; default: the job file's.")(function)
    return click.argument("job", required=False)(function)


@click.command(
    epilog="""\b
Examples:
  janus-cluster submit --nodes 2                       jobs/train_2node.yaml
  janus-cluster submit --nodes 4                       the same job on four nodes
  janus-cluster submit my.yaml --set training.num_epochs=3 --follow
  janus-cluster submit demo --cluster local --follow   the whole flow on this machine, no Slurm
  janus-cluster submit --nodes 1 --dry-run             write the run folder, queue nothing
  janus-cluster submit my.yaml --rehearse              stopped on purpose: does it go on?

\b
Exit codes: 0 submitted, 2 wrong input or refused by sbatch (nothing is left behind), 21 no Slurm,
or an answer of sbatch that was lost, 25 refused for now by a limit of your user, account or QOS.
With --follow the job's own: 10 and 11 of the gate, 12 training failed, 13 stopped on purpose;
24 it is queued and cannot start.
With --rehearse: 0 all was proven, 14 something was not.

\b
See also: docs/two-nodes.md, docs/configuration.md
"""
)
@job_options
@click.option("--cluster", type=CLUSTERS, default="slurm", show_default=True, help="Where it runs.")
@click.option("--dry-run", is_flag=True, help="Write the run folder and stop; needs no Slurm and no torch.")
@click.option("--follow", is_flag=True, help="Follow the log to the end and end with the job's exit code.")
@click.option(
    "--rehearse",
    is_flag=True,
    help="Run a few steps only, stop them on purpose, and see that they go on at the exact next step.",
)
@click.option("--no-preflight", is_flag=True, help="Train without the gate.")
@click.option("--exclude", metavar="NODES", help="Nodes to keep away from, as sbatch --exclude takes them.")
@click.option("--name", help="Name of the run; default: the job file's.")
@json_option
def submit(
    *,
    job: str | None,
    nodes: int | None,
    sets: tuple[str, ...],
    cluster: Cluster,
    dry_run: bool,
    follow: bool,
    rehearse: bool,
    no_preflight: bool,
    exclude: str | None,
    name: str | None,
    as_json: bool,
) -> int:
    """Check, render and submit JOB: a job file, or a shipped one (train_1node, train_2node, preflight, demo).

    Without JOB the shipped one: train_1node for --nodes 1, else train_2node. Everything is checked before anything is
    written; the run folder holds all that the nodes need. All mistakes are listed at once, each with file, key and
    what is allowed. With --json, --follow and --rehearse report on stderr.
    """
    from janus_cluster.desk.submit import submit as submit_run

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
    if rehearse:
        from janus_cluster.cli.rehearse import run_rehearsal

        if dry_run or follow:
            raise click.UsageError("--rehearse runs and follows a job of its own: not with --dry-run or --follow")
        return run_rehearsal(request, as_json=as_json)
    done = submit_run(request, environ=os.environ, cwd=Path.cwd())
    if as_json:
        click.echo(to_json(done.to_json()))
        for note in done.notes:
            click.echo(note, err=True)
    else:
        click.echo(describe(done))
    if follow and not dry_run:
        from janus_cluster.cli.follow import follow_to_end

        return follow_to_end(done.run, out_is_stderr=as_json)
    return 0


@click.command(
    epilog="""\b
Examples:
  janus-cluster resume 4711               a job that was preempted, cancelled or broke
  janus-cluster resume demo --follow      the newest run of that name
  janus-cluster resume 4711 --nodes 1     one node instead of two, the effective batch kept
  janus-cluster resume 4711 --set deepspeed.profile=zero2 --set slurm.time=12:00:00

\b
Exit codes: 0 sent, 2 it is live, has completed or cannot continue, 21 unknown whether it
still runs, 22 no such run, 25 refused for now by a limit. With --follow the job's own.

\b
See also: docs/reliability.md
"""
)
@click.argument("run")
@nodes_option("Number of nodes from now on, 1 to 64; default: as before.")
@click.option(
    "--set",
    "sets",
    multiple=True,
    metavar="KEY=VALUE",
    help="Change one key from now on; only keys that leave alone what is learnt.",
)
@click.option("--follow", is_flag=True, help="Follow the log to the end and end with the job's exit code.")
@runs_dir_option
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object and nothing else; the log on stderr.")
def resume(
    *, run: str, nodes: int | None, sets: tuple[str, ...], follow: bool, runs_dirs: list[Path], as_json: bool
) -> int:
    """Send RUN once more: same folder, same script, from its newest complete checkpoint. Refused while it is live.

    RUN is a job id, a run name, a job name (its newest run) or a run folder. With --nodes or --set its next
    bundle is written, and the one before it stays as it is; so does the effective batch.
    """
    from janus_cluster.cli.follow import follow_to_end
    from janus_cluster.desk.resume import describe_resumed, resumed_to_json
    from janus_cluster.desk.resume import resume as resume_run
    from janus_cluster.observe.find import find_run

    found = find_run(run, runs_dirs)
    done = resume_run(found, environ=os.environ, nodes=nodes, sets=sets, cwd=Path.cwd())
    click.echo(to_json(resumed_to_json(done)) if as_json else describe_resumed(done))
    return follow_to_end(done.run, out_is_stderr=as_json) if follow else 0


def describe(done: Submission) -> str:
    """What will run, in which folder, and what to type next."""
    resolved, job = done.resolved, done.resolved.job
    rows = [
        ("job", f"{job.name} ({done.source})"),
        (
            "ranks",
            f"{job.nodes} node{'s' * (job.nodes > 1)} × {resolved.processes_per_node} = {resolved.world_size}, "
            f"{job.hardware.device}",
        ),
    ]
    if resolved.fewer_nodes:
        numbers = " or ".join(map(str, sorted(resolved.fewer_nodes)))
        rows.append(("", f"{numbers} nodes also do (nodes_min); the effective batch stays"))
    if job.kind == "train":
        rows += _describe_training(resolved)
    gate = (
        f"preflight, thresholds {resolved.preflight_profile}"
        if job.preflight.enabled
        else "off (preflight.enabled: false)"
    )
    rows += [("gate", gate), ("environment", job.environment.profile)]
    rows += [("warning", text) for text in (*resolved.warnings, *done.data_warnings)]
    rows += [("nodes", note) for note in done.notes]
    rows += [("run folder", str(done.run.path)), ("command", done.shell_line)]
    if done.job_id is None:
        look = f"less {shlex.quote(str(done.run.links.job_sbatch))}"
        rows += [("dry run", "nothing was queued"), ("next", look), ("", done.shell_line)]
    else:
        rows += [("job id", done.job_id), ("next", command_for("tail", done.run))]
        rows += [("", command_for("status", done.run)), ("", command_for("cancel", done.run))]
    return "\n".join(f"{label:<12} {text}".rstrip() for label, text in rows)


def _describe_training(resolved: ResolvedJob) -> list[tuple[str, str]]:
    job, t = resolved.job, resolved.job.training
    length = counted(t.max_steps, "step") if t.max_steps else counted(t.num_epochs, "epoch")
    return [
        ("model", f"{job.model.preset}{', ' + job.model.path if job.model.path else ''}"),
        ("data", f"{', '.join(r.path for r in job.data.roots)}; history {job.data.history}, {job.data.image_mode}"),
        (
            "batch",
            f"{t.per_device_batch_size} per rank × {t.gradient_accumulation_steps} accumulated × "
            f"{counted(resolved.world_size, 'rank')} = effective batch {resolved.effective_batch_size}",
        ),
        ("training", f"{length}, learning rate {t.learning_rate:g}, {t.precision}, DeepSpeed {job.deepspeed.profile}"),
        *_describe_memory(resolved),
    ]


def _describe_memory(resolved: ResolvedJob) -> list[tuple[str, str]]:
    """What training.memory: auto has chosen, and why."""
    if resolved.memory is None:
        return []
    from janus_cluster.plan.auto import describe_memory

    return [("" if i else "memory", line) for i, line in enumerate(describe_memory(resolved.memory))]


@click.command(
    epilog="""\b
Examples:
  janus-cluster preflight --nodes 2                       a job of its own on two nodes
  janus-cluster preflight demo --cluster local            the gate of jobs/demo.yaml, here
  janus-cluster preflight --local                         this host alone, as an H800 node
  janus-cluster preflight --local --profile cpu --json    this host alone, as a rehearsal
  janus-cluster preflight --nodes 2 --calibrate           measure, and judge later runs by it
  janus-cluster preflight --lint-env                      doubtful NCCL, torch and OMP variables

\b
Exit codes: 0 pass, 1 warn, 2 fail, 3 undetermined. --lint-env: 0 no warning, 1 some.

\b
See also: docs/preflight.md
"""
)
@job_options
@click.option("--cluster", type=CLUSTERS, default="slurm", show_default=True, help="Where it runs.")
@click.option("--local", is_flag=True, help="This host alone: --cluster local --nodes 1.")
@click.option(
    "--profile",
    type=ProfileName("preflight"),
    metavar="NAME|PATH",
    help="Thresholds to judge by; default: those of the job's environment.profile.",
)
@click.option("--exclude", metavar="NODES", help="Nodes to keep away from.")
@click.option("--calibrate", is_flag=True, help="Keep what is measured as this site's baseline, if the gate passes.")
@click.option("--lint-env", is_flag=True, help="Only look at variables: those of the job, and those of this shell.")
@click.option("--json", "as_json", is_flag=True, help="Print the verdict as JSON and nothing else.")
def preflight(
    *,
    job: str | None,
    nodes: int | None,
    sets: tuple[str, ...],
    cluster: Cluster,
    local: bool,
    profile: str | None,
    exclude: str | None,
    calibrate: bool,
    lint_env: bool,
    as_json: bool,
) -> int:
    """Run the gate of JOB (default: the shipped preflight job) and print its verdict; nothing is trained.

    The same checks as before training: GPUs, InfiniBand rails, paths, limits, versions, and the bandwidth between all
    ranks. Every verdict has the measured value and the expected one. A check that could not run has not passed.
    """
    request = Request(
        job=job or "preflight",
        nodes=1 if local else nodes,
        sets=("kind=preflight", *_profile_sets(profile, own_job=job is not None), *sets),
        cluster="local" if local else cluster,
        exclude=exclude,
    )
    if lint_env:
        return _lint(request, as_json=as_json)
    return _run_gate(request, as_json=as_json, calibrate=calibrate)


def _profile_sets(profile: str | None, *, own_job: bool) -> list[str]:
    """The --set options that --profile means. A user's own job file keeps its variables: only the thresholds change.

    cpu changes more than thresholds: a host without GPUs can measure nothing else.
    """
    if profile is None:
        return []
    sets = [f"preflight.profile={profile}"]
    if profile == "cpu":
        sets.append("hardware.device=cpu")
    from janus_cluster.job.home import site_dir
    from janus_cluster.job.profiles import profile_names

    keeps_variables = (own_job and profile != "cpu") or profile not in profile_names("env", site_dir(os.environ))
    return sets if keeps_variables else [*sets, f"environment.profile={profile}"]


def _run_gate(request: Request, *, as_json: bool, calibrate: bool = False) -> int:
    """Run the gate as a job and print its verdict. Returns: 0 pass, 1 warn, 2 fail, 3 undetermined."""
    from janus_cluster.desk.submit import submit as submit_run
    from janus_cluster.job.home import site_dir
    from janus_cluster.observe.tail import tail
    from janus_cluster.preflight.calibration import with_own_history
    from janus_cluster.preflight.report import render_verdict
    from janus_cluster.run.records.verdict import EXIT_CODES, Verdict

    done = submit_run(request, environ=os.environ, cwd=Path.cwd())
    click.echo(f"job {done.job_id}: {done.run.path}", err=True)
    tail(done.run, out=sys.stderr, show_card=False)
    attempts = done.run.attempts()
    path = done.run.verdict_json(attempts[-1]) if attempts else None
    if path is None or not path.exists():
        message = f"the preflight job ended without a verdict; next: {command_for('tail', done.run)}"
        click.echo(message, err=True)
        verdict = Verdict(
            state="ERROR", job_id=done.job_id, config_hash=done.resolved.config_hash, nodes=(), created_at=0, results=()
        )
    else:
        verdict = with_own_history(Verdict.require(path), site_dir(os.environ), done.run)
    if as_json:
        click.echo(to_json(verdict.to_report()))
    elif verdict.results:
        from rich.console import Console

        Console().print(render_verdict(verdict))
    _remember(done.run, calibrate=calibrate)
    return EXIT_CODES[verdict.state]


def _remember(run: RunDir, *, calibrate: bool) -> None:
    """Add this gate to its nodes' history in the site's folder and, with --calibrate, write the baseline."""
    from janus_cluster.job.home import site_dir
    from janus_cluster.preflight.calibration import remember_gates, write_baseline

    site = site_dir(os.environ)
    remember_gates(site, [run])
    if calibrate:
        for test, rate in sorted(write_baseline(site, run).items()):
            click.echo(f"baseline {test}: {rate:.4g}", err=True)
        click.echo(f"baseline written: {site / 'baseline.json'}", err=True)


def _lint(request: Request, *, as_json: bool) -> int:
    """Print every warning on the job's variables and on this shell's. Returns: 0 none, 1 some."""
    from janus_cluster.job.resolve import resolve_job
    from janus_cluster.preflight.environment import lint_job_and_shell

    planned = load_planned(request, os.environ)
    resolved = resolve_job(
        planned.loaded,
        run_dir=Path.cwd() / "runs",
        cluster="slurm",
        environ=os.environ,
        cwd=Path.cwd(),
        python=sys.executable,
    )
    warnings = lint_job_and_shell(resolved, os.environ)
    if as_json:
        click.echo(to_json({"warnings": warnings, "exit_code": int(bool(warnings))}))
    else:
        click.echo("\n".join(warnings) or "nothing doubtful among the variables of the job and of this shell")
    return int(bool(warnings))
