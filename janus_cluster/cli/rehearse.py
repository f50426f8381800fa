"""`submit --rehearse`: print its progress and result."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import click

from janus_cluster.cli.observe import print_status
from janus_cluster.desk.rehearse import exit_code_of, rehearse
from janus_cluster.desk.submit import Request
from janus_cluster.run.text import to_json


def run_rehearsal(request: Request, *, as_json: bool) -> int:
    """Run the rehearsal and print what it proved. Returns: the exit code of the command."""

    def log(line: str) -> None:
        click.echo(line, err=as_json)

    done, claims = rehearse(request, environ=os.environ, cwd=Path.cwd(), log=log)
    code = exit_code_of(claims, done.run)
    failed = [claim.name for claim in claims if claim.state == "FAILED"]
    if as_json:
        listed = [{"name": c.name, "state": c.state, "evidence": c.evidence} for c in claims]
        value = {"run_dir": str(done.run.path), "job_id": done.job_id, "exit_code": code, "claims": listed}
        click.echo(to_json(value))
        return code
    log("")
    if not failed:
        log(f"rehearsed: the job can be stopped and continues. The real run: {request.command()}")
        return code
    sys.stdout.flush()
    # The card of a failed run has what to type next.
    print_status([done.run])
    log(f"rehearsal failed: {'; '.join(failed)}")
    return code
