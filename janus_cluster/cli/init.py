"""`janus-cluster init`: find out what the site is and write its defaults."""

from __future__ import annotations

import os
import shlex
import sys
import time
from pathlib import Path

import click

from janus_cluster.cli.options import json_option
from janus_cluster.run.text import clean_line, to_json


@click.command(
    "init",
    epilog="""\b
Examples:
  janus-cluster init                  asks Slurm and the disks; asks before it writes
  janus-cluster init --probe --yes    also one node's GPUs and network; no question
  janus-cluster init --partition gpu --force

\b
Exit codes: 0 written, or printed only; 2 a file is there already, or no such partition.

\b
See also: docs/preflight.md
""",
)
@click.option("--probe", is_flag=True, help="Run on one node for seconds: its GPUs, adapters and interface.")
@click.option("--partition", metavar="NAME", help="Partition of the jobs; default: the default one, or most GPU nodes.")
@click.option("--yes", is_flag=True, help="Write without asking.")
@click.option("--force", is_flag=True, help="Replace files that are there; the old ones are kept as NAME.old.")
@json_option
def init(*, probe: bool, partition: str | None, yes: bool, force: bool, as_json: bool) -> None:
    """Ask sinfo, scontrol, sacctmgr, the disks and, with --probe, one node; write the site's defaults.

    $JANUS_HOME/site/site.yaml then has partition, account, walltime, GPUs, profile and runs_dir as defaults under every
    job. What could not be found out is printed with the reason. Works without Slurm, too.
    """
    from janus_cluster.desk.site_files import build_site_files, write_site_files
    from janus_cluster.desk.site_survey import survey_site
    from janus_cluster.job.home import site_dir
    from janus_cluster.run.table import fold_line

    facts = survey_site(partition=partition, probes=probe, environ=os.environ, cwd=Path.cwd())
    files = build_site_files(facts, site_dir(os.environ), now=time.time())
    width = os.get_terminal_size().columns if sys.stdout.isatty() else None
    lines = [f"{label:<12} {clean_line(text)}" for label, text in facts.found]
    lines += [f"{'not known':<12} {label}: {clean_line(text)}" for label, text in facts.unknown]
    lines = [fold_line(line, width=width, indent=13) for line in lines]
    for path, text in files.texts.items():
        lines += ["", f"--- {path}", text.rstrip()]
    click.echo("\n".join(lines), err=as_json)
    done: list[str] = []
    if files.texts and (yes or force or _agrees()):
        done = write_site_files(files, force=force)
    closing = done or (["nothing was written; --yes writes it"] if files.texts else ["nothing to write"])
    typed = [f"--partition={partition}"] if partition else []
    again = shlex.join(["janus-cluster", "init", "--probe", *typed, *(["--yes"] if files.texts else [])])
    next_command = files.next_command if done or (probe and not files.texts) else again
    click.echo("\n".join(["", *closing, f"next         {next_command}"]), err=as_json)
    if as_json:
        texts = {str(path): text for path, text in files.texts.items()}
        click.echo(to_json({"found": facts.found, "unknown": facts.unknown, "files": texts, "done": done}))


def _agrees() -> bool:
    return sys.stdin.isatty() and click.confirm("\nWrite this?", err=True)
