"""From a job file to a submitted run: load, resolve, check, write the run folder, hand it over. In this order.

Nothing is written before everything is checked; a refused submission leaves no run folder behind.
"""

from __future__ import annotations

import os
import secrets
import shlex
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from janus_cluster.config.home import runs_dir, sandbox_home
from janus_cluster.config.load import LoadedJob, find_job_file, load_job
from janus_cluster.config.resolve import resolve_job
from janus_cluster.config.schema import JobConfig, ResolvedJob
from janus_cluster.errors import JanusError, SandboxFailed, UsageError
from janus_cluster.render.bundle import collect_manifest, render_job_yaml, write_bundle
from janus_cluster.rundir import RunDir, write_json_atomically

Cluster = Literal["slurm", "sandbox", "local"]


@dataclass(frozen=True, kw_only=True)
class Request:
    """What the user typed."""

    job: str | None = None
    nodes: int | None = None
    sets: Sequence[str] = ()
    cluster: Cluster = "slurm"
    dry_run: bool = False
    preflight: bool = True
    exclude: str | None = None
    name: str | None = None


@dataclass(frozen=True, kw_only=True)
class Submission:
    """What became of it. `job_id` is None after a dry run."""

    run: RunDir
    resolved: ResolvedJob
    command: Sequence[str]
    job_id: str | None
    source: str
    slurm_conf: Path | None = field(default=None)

    def to_json(self) -> dict[str, Any]:
        """The contract of `submit --json`."""
        return {
            "run_dir": str(self.run.path),
            "sbatch": str(self.run.job_sbatch),
            "job_id": self.job_id,
            "command": list(self.command),
            "env": {v.name: v.value for v in self.resolved.env},
            "ds_config": self.resolved.ds_config,
            "effective_batch": self.resolved.effective_batch_size,
        }

    @property
    def shell_line(self) -> str:
        """The line that does the same by hand."""
        prefix = ["JANUS_LAUNCHER=local"] if self.resolved.cluster == "local" else []
        prefix += [f"SLURM_CONF={shlex.quote(str(self.slurm_conf))}"] if self.slurm_conf else []
        return " ".join([*prefix, shlex.join(self.command)])


def submit(request: Request, *, environ: Mapping[str, str], cwd: Path) -> Submission:
    """The run folder is written and, unless it is a dry run, the job is queued or running.

    Raises: UsageError (nothing written), SlurmUnavailable, SandboxFailed, SubmitFailed (nothing left).
    """
    loaded = load_request(request, environ)
    _require_cluster(request)
    slurm_conf = _sandbox_conf(environ) if request.cluster == "sandbox" and not request.dry_run else None
    run_path = _new_run_path(loaded.config, environ, cwd)
    resolved = resolve_job(
        loaded, run_dir=run_path, cluster=request.cluster, environ=environ, cwd=cwd, python=sys.executable
    )
    check_paths(resolved, source=loaded.source, origins=loaded.origins)
    run = write_bundle(
        resolved,
        job_yaml_text=render_job_yaml(loaded.config, source=loaded.source, sets=request.sets),
        secrets={name: environ[name] for name in resolved.secret_names},
        manifest=collect_manifest(loaded.path),
        final_dir=run_path,
    )
    command = _command(run, request.cluster)
    job_id: str | None = None
    if not request.dry_run:
        job_id = _send(run, request.cluster, slurm_conf, command)
    return Submission(
        run=run, resolved=resolved, command=command, job_id=job_id, source=loaded.source, slurm_conf=slurm_conf
    )


def load_request(request: Request, environ: Mapping[str, str]) -> LoadedJob:
    """The job that the request names, with its options over it. Raises: UsageError."""
    if request.nodes not in (None, 1, 2):
        raise UsageError(
            f"--nodes {request.nodes}: there is no job for {request.nodes} nodes; allowed: 1, 2",
            hint="janus-cluster submit --nodes 2",
        )
    options: dict[str, Any] = {"nodes": request.nodes, "name": request.name, "slurm.exclude": request.exclude}
    if not request.preflight:
        options["preflight.enabled"] = False
    path = find_job_file(request.job, nodes=request.nodes)
    return load_job(path, sets=request.sets, environ=environ, options=options)


def check_paths(resolved: ResolvedJob, *, source: str, origins: Mapping[str, str]) -> None:
    """What the job reads is there, as this machine sees it, before anything is queued.

    `preflight.require_paths` are the nodes' own business and are looked at by the gate only.
    Raises: UsageError naming key and path.
    """
    job = resolved.job
    wanted = [("model.path", job.model.path), ("model.vggt_path", job.model.vggt_path)]
    wanted += [("data.roots", root.path) for root in job.data.roots]
    problems = [
        f"{origins.get(key, source)}: {key}: {path}: no such file or folder"
        for key, path in wanted
        if path is not None and not os.path.exists(path)  # noqa: PTH110 - a path too long for stat is just missing
    ]
    if problems:
        raise UsageError.of_many(problems, hint="mend the path in the job file, or give it with --set")


def _new_run_path(job: JobConfig, environ: Mapping[str, str], cwd: Path) -> Path:
    """runs/<name>-<utc time>-<short id>; `runs_dir` of the job wins over JANUS_HOME."""
    base = cwd / Path(job.runs_dir).expanduser() if job.runs_dir else runs_dir(environ, cwd)
    stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
    return base / f"{job.name}-{stamp}-{secrets.token_hex(2)}"


def _require_cluster(request: Request) -> None:
    if request.dry_run or request.cluster == "local":
        return
    from janus_cluster.slurm.executor import require_slurm

    require_slurm()


def _sandbox_conf(environ: Mapping[str, str]) -> Path:
    from janus_cluster.sandbox.state import load_info

    info = load_info(sandbox_home(environ))
    if info is None:
        raise SandboxFailed("no sandbox Slurm is running", hint="janus-cluster sandbox up")
    return Path(info.slurm_conf)


def _command(run: RunDir, cluster: Cluster) -> list[str]:
    if cluster == "local":
        from janus_cluster.local.submit import local_command

        return local_command(run)
    return ["sbatch", str(run.job_sbatch)]


def _send(run: RunDir, cluster: Cluster, slurm_conf: Path | None, command: Sequence[str]) -> str:
    try:
        if cluster == "local":
            from janus_cluster.local.submit import submit_local

            job_id = submit_local(run)
        else:
            from janus_cluster.slurm.executor import submit_run

            job_id = submit_run(run, slurm_conf=slurm_conf)
    except (JanusError, KeyboardInterrupt):
        shutil.rmtree(run.path)
        raise
    write_json_atomically(
        run.submission_json,
        {
            "schema_version": 1,
            "cluster": cluster,
            "job_id": job_id,
            "command": list(command),
            "submitted_at": time.time(),
            "slurm_conf": str(slurm_conf) if slurm_conf else None,
        },
    )
    return job_id
