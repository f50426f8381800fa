"""`--follow`: the log of a run that was just sent, to its end."""

from __future__ import annotations

import os
import sys

import click

from janus_cluster.cli.observe import print_status
from janus_cluster.desk.harvest import remember_bad_nodes
from janus_cluster.job.home import site_dir
from janus_cluster.observe.tail import tail
from janus_cluster.preflight.calibration import remember_gates
from janus_cluster.run.paths import RunDir


def follow_to_end(run: RunDir, *, out_is_stderr: bool) -> int:
    """Print the log until the run has ended, then its last state. Returns: the job's exit code."""
    click.echo("", err=out_is_stderr)
    # The state that is printed below has the card of a failure.
    out = sys.stderr if out_is_stderr else sys.stdout
    code = tail(run, out=out, show_card=out_is_stderr, on_failure=remember_bad_nodes)
    remember_gates(site_dir(os.environ), [run])
    if not out_is_stderr:
        print_status([run])
    return code
