"""job.sbatch: one self-contained, readable script. Pure, apart from reading the shipped templates."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Mapping
from pathlib import Path

from janus_cluster.errors import UsageError
from janus_cluster.job.env import check_setup
from janus_cluster.job.resolved import ResolvedJob
from janus_cluster.job.resources import templates_dir
from janus_cluster.job.templates import template_environment
from janus_cluster.run.paths import RunDir

# What sbatch's own parser takes unquoted. Everything else goes between double quotes, where it (like a shell)
# takes a backslash as the escape of the next character, and expands nothing (seen with sbatch 22.05).
_PLAIN = re.compile(r"[A-Za-z0-9_./:,=+@%*\[\]~^-]+", re.ASCII)


def render_sbatch(resolved: ResolvedJob, *, templates: Mapping[str, str] | None = None) -> str:
    """The text of job.sbatch for this job; `templates` are the texts by file name (default: the shipped ones).

    Raises: UsageError for a value that a script cannot hold: a line break, a control character, a secret.
    """
    run = RunDir(Path(resolved.run_dir))
    bundle = run.bundle(resolved.bundle)
    _check_printable("run folder", resolved.run_dir)
    _check_printable("environment.python", resolved.python)
    for name, value in resolved.sbatch_options.items():
        _check_printable(f"slurm.{name}", value or "")
    check_setup(resolved.job.environment.setup, key="environment.setup")
    keeps_code = resolved.job.environment.code == "snapshot"
    if keeps_code and os.pathsep in resolved.run_dir:
        raise UsageError(
            f"run folder: {resolved.run_dir!r} holds {os.pathsep!r}, where PYTHONPATH is split: the code in it could "
            "not be imported",
            hint="choose another runs_dir (or JANUS_HOME), or --set environment.code=installed",
        )
    environment = template_environment(templates or templates_dir() / "sbatch")
    environment.filters |= {"quote": shlex.quote, "sbatch": quote_sbatch}
    return environment.get_template(template_name(resolved)).render(
        job=resolved.job,
        version=resolved.janus_version,
        run_dir=resolved.run_dir,
        run_name=run.name,
        script=str(bundle.job_sbatch),
        bundle=bundle.number,
        env_sh=str(bundle.env_sh),
        batch_log=str(run.batch_log),
        script_failure=str(run.script_failure_json),
        python=resolved.python,
        setup=resolved.job.environment.setup,
        code=str(run.code) if keeps_code else None,
        sbatch_options=resolved.sbatch_options,
        processes_per_node=resolved.processes_per_node,
        effective_batch_size=resolved.effective_batch_size,
    )


def render_each_node(resolved: ResolvedJob) -> str | None:
    """The script that starts a task on each node; None where the job has no setup_each_node. Raises: UsageError."""
    lines = resolved.job.environment.setup_each_node
    if not lines:
        return None
    check_setup(lines, key="environment.setup_each_node")
    template = template_environment(templates_dir() / "sbatch").get_template("each_node.sh.j2")
    return template.render(setup=lines)


def template_name(resolved: ResolvedJob) -> str:
    """The template of this job: the gate or the index of the data alone, or training on one node or on several."""
    if resolved.job.kind != "train":
        return f"{resolved.job.kind}.sbatch.j2"
    return "train_1node.sbatch.j2" if resolved.job.nodes == 1 else "train_nodes.sbatch.j2"


def quote_sbatch(value: str | None) -> str:
    """What follows the name in an #SBATCH line: nothing for a switch, else = and the value as sbatch reads it."""
    if value is None:
        return ""
    if _PLAIN.fullmatch(value):
        return f"={value}"
    escaped = value.replace("\\", "\\\\").replace('"', '\\"')
    return f'="{escaped}"'


def _check_printable(what: str, text: str) -> None:
    bad = next((c for c in text if not c.isprintable()), None)
    if bad is not None:
        raise UsageError(f"{what}: {text!r} holds {bad!r}, which a script cannot carry", hint="choose a plain name")
