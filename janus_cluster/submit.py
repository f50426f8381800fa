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
from typing import Any

from janus_cluster.config.check_data import check_data
from janus_cluster.config.home import runs_dir, sandbox_home, site_dir
from janus_cluster.config.load import LoadedJob, find_job_file, load_job
from janus_cluster.config.resolve import resolve_job
from janus_cluster.config.schema import JobConfig, MemoryPlan, ResolvedJob
from janus_cluster.errors import JanusError, SandboxFailed, UsageError
from janus_cluster.preflight.calibration import with_baseline
from janus_cluster.render.bundle import collect_manifest, render_job_yaml, write_bundle
from janus_cluster.rundir import RunDir
from janus_cluster.send import Cluster, run_locked, send, signals_held
from janus_cluster.site.exclude import Exclusion, decide_exclusion, merge_hosts
from janus_cluster.site.nodes import live_nodes
from janus_cluster.snapshot import read_package

# A controller that does not answer in this time does not hold up a submission for a question on the side.
_ASK_NODES_S = 10.0


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
class Planned:
    """The job as it was `given`, and as it will be resolved: with the keys that training.memory: auto stands for."""

    given: LoadedJob
    loaded: LoadedJob
    memory: MemoryPlan | None


@dataclass(frozen=True, kw_only=True)
class Submission:
    """What became of it. `job_id` is None after a dry run."""

    run: RunDir
    resolved: ResolvedJob
    command: Sequence[str]
    job_id: str | None
    source: str
    slurm_conf: Path | None = field(default=None)
    # Which nodes are left out, and why.
    notes: Sequence[str] = ()
    # What a look at the data found on this machine.
    data_warnings: Sequence[str] = ()

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
    planned = load_planned(request, environ)
    loaded = planned.loaded
    slurm_conf = sandbox_conf(environ) if request.cluster == "sandbox" and not request.dry_run else None
    _require_cluster(request, slurm_conf)
    run_path = new_run_path(loaded.config, environ, cwd)
    if request.cluster != "local" and not request.dry_run and loaded.config.preflight.use_node_memory:
        from janus_cluster.observe.harvest import remember_recent

        remember_recent(run_path.parent)
    resolved = resolve_job(
        loaded,
        run_dir=run_path,
        cluster=request.cluster,
        environ=environ,
        cwd=cwd,
        python=sys.executable,
        memory=planned.memory,
    )
    resolved = with_baseline(resolved, site_dir(environ))
    check_paths(resolved, source=loaded.source, origins=loaded.origins)
    # Not in resolved.json: that follows from the job alone, and data may change before the nodes read them.
    data_warnings = check_data(resolved.job).warnings
    exclusion = exclude_bad_nodes(resolved, slurm_conf=slurm_conf, site=site_dir(environ), now=time.time())
    resolved = resolved.model_copy(
        update={"sbatch_options": _with_option(resolved.sbatch_options, "exclude", exclusion.option)}
    )
    code = read_package()
    manifest = collect_manifest(loaded.path, code=code)
    if planned.memory is not None:
        manifest["memory"] = {"option": planned.memory.option.words, "planned_gb": planned.memory.option.planned_gb}
    with signals_held("the job is being handed over") as came:
        run = write_bundle(
            resolved,
            job_yaml_text=render_job_yaml(planned.given.config, source=loaded.source, sets=request.sets),
            secrets={name: environ[name] for name in resolved.secret_names},
            manifest=manifest,
            code=code,
            final_dir=run_path,
        )
        job_id = _send_or_remove(run, request, slurm_conf, came)
        if came and job_id:
            print(f"submitted as job {job_id} all the same; janus-cluster cancel {job_id} ends it", file=sys.stderr)
    return Submission(
        run=run,
        resolved=resolved,
        command=_command(run, request.cluster, slurm_conf),
        job_id=job_id,
        source=loaded.source,
        slurm_conf=slurm_conf,
        notes=exclusion.notes,
        data_warnings=data_warnings,
    )


def _send_or_remove(run: RunDir, request: Request, slurm_conf: Path | None, came: Sequence[int]) -> str | None:
    """The run is submitted and recorded, or its folder is gone. Returns: the job id; None after a dry run."""
    try:
        if came:
            raise KeyboardInterrupt
        if request.dry_run:
            return None
        with run_locked(run):
            return send(run, request.cluster, slurm_conf=slurm_conf)
    except BaseException:
        shutil.rmtree(run.path, ignore_errors=True)
        raise


def exclude_bad_nodes(resolved: ResolvedJob, *, slurm_conf: Path | None, site: Path, now: float) -> Exclusion:
    """What sbatch is told to keep away from: the job's own list and the nodes that the site remembers as bad."""
    options, keys = resolved.sbatch_options, resolved.job.preflight
    given = options.get("exclude")
    if resolved.cluster == "local" or not keys.use_node_memory:
        return Exclusion(option=given)
    days = keys.forget_nodes_after_days
    remembered = live_nodes(resolved.cluster, now=now, forget_after_days=days, folder=site)
    if not remembered:
        return Exclusion(option=given)
    return decide_exclusion(
        given,
        remembered,
        num_nodes=resolved.job.nodes,
        site_nodes=_site_nodes(resolved, slurm_conf),
        now=now,
        wanted=options.get("nodelist"),
        is_gated=keys.enabled,
    )


def _site_nodes(resolved: ResolvedJob, slurm_conf: Path | None) -> frozenset[str] | None:
    """The nodes that this Slurm could give to the job; None where it cannot be asked, as for a dry run away from it.

    Those with the job's GPUs, where any has them by that name: a partition may hold nodes of other kinds.
    """
    from janus_cluster.slurm.commands import Slurm, has_gpus

    try:
        usable = Slurm(conf=slurm_conf, timeout_s=_ASK_NODES_S).usable_nodes(resolved.sbatch_options.get("partition"))
    except JanusError:
        return None
    hardware = resolved.job.hardware
    fitting = {node for node, gres in usable.items() if hardware.gpus_per_node and has_gpus(gres, hardware.gpu_type)}
    return frozenset(fitting or usable) or None


def _with_option(options: Mapping[str, str | None], name: str, value: str | None) -> dict[str, str | None]:
    return dict(options) if value is None else {**options, name: value}


def load_planned(request: Request, environ: Mapping[str, str]) -> Planned:
    """The job that the request names, with training.memory: auto become keys: here, and in amend.py for a resumed run.

    Raises: UsageError, also where nothing fits into the memory.
    """
    given = load_request(request, environ)
    if given.config.training.memory == "manual":
        return Planned(given=given, loaded=given, memory=None)
    # plan/ takes a while to import, and manual jobs need nothing of it.
    from janus_cluster.plan.auto import plan_memory_keys

    loaded, memory = plan_memory_keys(given)
    return Planned(given=given, loaded=loaded, memory=memory)


def load_request(request: Request, environ: Mapping[str, str]) -> LoadedJob:
    """The job that the request names, with its options over it. Raises: UsageError."""
    if request.nodes not in (None, 1, 2):
        raise UsageError(
            f"--nodes {request.nodes}: there is no job for {request.nodes} nodes; allowed: 1, 2",
            hint="--nodes 2",
        )
    options: dict[str, Any] = {"nodes": request.nodes, "name": request.name}
    if not request.preflight:
        options["preflight.enabled"] = False
    path = find_job_file(request.job, nodes=request.nodes)
    loaded = load_job(path, sets=request.sets, environ=environ, options=options)
    hosts = loaded.config.slurm.get("exclude")
    if not request.exclude:
        return loaded
    # The job's own list is kept: who leaves out one node more does not want the others back.
    both = merge_hosts(",".join(map(str, hosts)) if isinstance(hosts, list) else hosts, request.exclude)
    return load_job(path, sets=request.sets, environ=environ, options=options | {"slurm.exclude": both})


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


def new_run_path(job: JobConfig, environ: Mapping[str, str], cwd: Path) -> Path:
    """runs/<name>-<utc time>-<short id>; `runs_dir` of the job wins over JANUS_HOME."""
    base = cwd / Path(job.runs_dir).expanduser() if job.runs_dir else runs_dir(environ, cwd)
    stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
    return base / f"{job.name}-{stamp}-{secrets.token_hex(2)}"


def _require_cluster(request: Request, slurm_conf: Path | None) -> None:
    if request.dry_run or request.cluster == "local":
        return
    from janus_cluster.slurm.executor import require_slurm

    require_slurm(slurm_conf)


def sandbox_conf(environ: Mapping[str, str]) -> Path:
    from janus_cluster.sandbox.state import load_info

    info = load_info(sandbox_home(environ))
    if info is None:
        raise SandboxFailed("no sandbox Slurm is running", hint="janus-cluster sandbox up")
    return Path(info.slurm_conf)


def _command(run: RunDir, cluster: Cluster, slurm_conf: Path | None) -> list[str]:
    if cluster == "local":
        from janus_cluster.local.submit import local_command

        return local_command(run)
    # Where the sandbox's Slurm is not the one on PATH, its own sbatch.
    from janus_cluster.sandbox.state import client_env

    path = client_env(slurm_conf).get("PATH") if slurm_conf else None
    return [(shutil.which("sbatch", path=path) if path else None) or "sbatch", str(run.job_sbatch)]
