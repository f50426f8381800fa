"""A site whose Slurm programs are scripts on PATH."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from janus_cluster.run.paths import RunDir
from tests.tiny_data import write_tiny_data

LOST = "echo 'sbatch: error: Batch job submission failed: Socket timed out on send/recv operation' >&2; exit 1"
# JobID, State, exit_code, RestartCnt, NodeList, StartTime, SubmitTime, Reason, Command, Name
IN_QUEUE = r"printf '4711\037PENDING\0370\0370\037\037N/A\037%s\037Priority\037%s\037demo\037\n' $(date +%s)"
UNKNOWN = "echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1"
SILENT = "echo 'slurm_load_jobs error: Unable to contact slurm controller (connect failure)' >&2; exit 1"


class Site:
    """Slurm's programs as scripts; each call is written to `calls` with SLURM_CLUSTERS."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "bin").mkdir()
        write_tiny_data(folder / "demo_data")
        for name in ("sbatch", "srun", "squeue", "scontrol", "scancel"):
            self.script(name, UNKNOWN if name in ("squeue", "scontrol") else "true")
        self.environ = {
            "JANUS_HOME": str(folder / "home"),
            "PATH": f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}",
        }

    def script(self, program: str, text: str) -> None:
        path = self.folder / "bin" / program
        head = f'echo "{program} [$SLURM_CLUSTERS] $*" >> {self.folder}/calls; for last; do :; done'
        keep = f'echo "$last" > {self.folder}/script' if program == "sbatch" else ""
        path.write_text(f"#!/bin/sh\n{head}\n{keep}\n{text}\n")
        path.chmod(0o755)

    def queue_holds_the_job(self) -> None:
        self.script("squeue", f'{IN_QUEUE} "$(cat {self.folder}/script)"')

    def calls(self, program: str) -> list[str]:
        return [line for line in (self.folder / "calls").read_text().splitlines() if line.startswith(program)]

    def janus(self, *argv: str, **environ: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "janus_cluster.cli", *argv],
            cwd=self.folder,
            env=os.environ | self.environ | environ,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
            timeout=600,
        )

    def runs(self) -> list[RunDir]:
        folder = self.folder / "home" / "runs"
        return [RunDir(path) for path in sorted(folder.iterdir())] if folder.exists() else []
