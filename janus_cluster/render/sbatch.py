"""job.sbatch: one self-contained, readable script. Pure, apart from the shipped templates that load.py hands in."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Mapping
from pathlib import Path

from janus_cluster.config.schema import ResolvedJob
from janus_cluster.errors import UsageError
from janus_cluster.render.env import check_setup
from janus_cluster.render.load import load_sbatch_templates
from janus_cluster.rundir import RunDir

# What sbatch's own parser takes as it stands. Everything else goes between double quotes, where it (like a shell)
# takes a backslash as the escape of the next character, and expands nothing (seen with sbatch 22.05).
_PLAIN = re.compile(r"[A-Za-z0-9_./:,=+@%*\[\]~^-]+", re.ASCII)


def render_sbatch(resolved: ResolvedJob, *, templates: Mapping[str, str] | None = None) -> str:
    """The text of job.sbatch for this job; `templates` are the texts by file name (default: the shipped ones).

    Raises: UsageError for a value that a script cannot hold: a line break, a control character, a secret.
    """
    import jinja2

    run = RunDir(Path(resolved.run_dir))
    _check_printable("run folder", resolved.run_dir)
    _check_printable("environment.python", resolved.python)
    for name, value in resolved.sbatch_options.items():
        _check_printable(f"slurm.{name}", value or "")
    check_setup(resolved.job.environment.setup)
    keeps_code = resolved.job.environment.code == "snapshot"
    if keeps_code and os.pathsep in resolved.run_dir:
        raise UsageError(
            f"run folder: {resolved.run_dir!r} holds {os.pathsep!r}, where PYTHONPATH is split: the code in it could "
            "not be imported",
            hint="choose another runs_dir (or JANUS_HOME), or --set environment.code=installed",
        )
    environment = jinja2.Environment(
        loader=jinja2.DictLoader(dict(templates or load_sbatch_templates())),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,
        # ${#name} is bash for a length.
        comment_start_string="{##",
        comment_end_string="##}",
    )
    environment.filters |= {"quote": shlex.quote, "sbatch": quote_sbatch}
    return environment.get_template(template_name(resolved)).render(
        job=resolved.job,
        version=resolved.janus_version,
        run_dir=resolved.run_dir,
        run_name=run.name,
        script=str(run.job_sbatch),
        batch_log=str(run.batch_log),
        python=resolved.python,
        setup=resolved.job.environment.setup,
        code=str(run.code) if keeps_code else None,
        sbatch_options=resolved.sbatch_options,
        processes_per_node=resolved.processes_per_node,
        effective_batch_size=resolved.effective_batch_size,
    )


def template_name(resolved: ResolvedJob) -> str:
    """The template of this job: the gate or the index of the data alone, or training on one or two nodes."""
    if resolved.job.kind != "train":
        return f"{resolved.job.kind}.sbatch.j2"
    return f"train_{resolved.job.nodes}node.sbatch.j2"


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
