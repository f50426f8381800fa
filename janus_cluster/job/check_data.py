"""A job's data, looked at before the job is queued, by a process of its own: reading data belongs to training.

`janus-cluster config check` prints all that was found, `submit` refuses what training would refuse for certain.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass

from janus_cluster.errors import UsageError
from janus_cluster.job.schema import JobConfig

MODULE = "janus_cluster.janusvln.data.desk"
# A list of 300 MB is parsed in half a minute; a file system that is slower than this is left to the nodes.
TIMEOUT_S = 180.0


@dataclass(frozen=True, kw_only=True, slots=True)
class DataReport:
    """Lines on what was found, and warnings."""

    lines: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()


def check_data(job: JobConfig, *, timeout_s: float = TIMEOUT_S) -> DataReport:
    """What is known of the data of a training job. A look that failed or took too long is a warning.

    Raises: UsageError where training would be refused for certain.
    """
    if job.kind != "train" or not job.data.roots:
        return DataReport()
    try:
        done = subprocess.run(
            [sys.executable, "-m", MODULE],
            input=job.data.model_dump_json(),
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )
        answer = json.loads(done.stdout)
    except subprocess.TimeoutExpired:
        return DataReport(warnings=(f"data: not checked: it took longer than {timeout_s:g} s; training will check it",))
    except ValueError:
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        return DataReport(warnings=(f"data: not checked ({last}); training will check it",))
    if "error" in answer:
        raise UsageError(answer["error"], hint=answer["hint"])
    return DataReport(lines=tuple(answer["lines"]), warnings=tuple(answer["warnings"]))
