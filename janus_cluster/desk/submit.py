"""From a job file to a submitted run: load, prepare (resolve, check, render), hand over (write, send). In this order.

Nothing is written before everything is checked; a refused submission leaves no run folder behind.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shlex
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from janus_cluster.desk.bad_nodes import live_nodes
from janus_cluster.desk.encoding import require_same_bytes
from janus_cluster.desk.exclude import Exclusion, decide_exclusion, merge_hosts
from janus_cluster.desk.fewer_nodes import with_fewer_nodes
from janus_cluster.desk.send import Prepared, hand_over, require_cluster, run_locked
from janus_cluster.errors import JanusError, UsageError
from janus_cluster.job.check_data import check_data
from janus_cluster.job.home import runs_dir, site_dir
from janus_cluster.job.load import LoadedJob, find_job_file, load_job
from janus_cluster.job.resolve import resolve_job, with_absolute_paths
from janus_cluster.job.resolved import MemoryPlan, ResolvedJob
from janus_cluster.job.schema import JobConfig
from janus_cluster.modelspec.check_weights import check_weights
from janus_cluster.preflight.calibration import with_baseline
from janus_cluster.run.bundle import render_bundles, render_job_yaml, run_written
from janus_cluster.run.manifest import collect_manifest
from janus_cluster.run.next_command import PROGRAM
from janus_cluster.run.paths import RunDir
from janus_cluster.run.records.submission import Cluster
from janus_cluster.run.snapshot import read_package

# A controller that does not answer in this time does not delay a submission for an optional question.
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

    def command(self) -> str:
        """What the user typed, for a shell in any folder."""
        job = str(Path(self.job).absolute()) if self.job and Path(self.job).is_file() else self.job
        words = [PROGRAM, "submit", *([job] if job else [])]
        words += ["--nodes", str(self.nodes)] if self.nodes is not None else []
        words += ["--cluster", self.cluster] if self.cluster != "slurm" else []
        words += [word for text in self.sets for word in ("--set", text)]
        words += [] if self.preflight else ["--no-preflight"]
        words += ["--exclude", self.exclude] if self.exclude else []
        return shlex.join([*words, *(["--name", self.name] if self.name else [])])


@dataclass(frozen=True, kw_only=True)
class Planned:
    """The job as `given`, and as it will be resolved: with the keys that training.memory: auto chose."""

    given: LoadedJob
    loaded: LoadedJob
    memory: MemoryPlan | None


@dataclass(frozen=True, kw_only=True)
class Submission:
    """Result of `submit`. `job_id` is None after a dry run."""

    run: RunDir
    resolved: ResolvedJob
    command: Sequence[str]
    job_id: str | None
    source: str
    slurm_conf: Path | None = field(default=None)
    # Which nodes are left out, and why.
    notes: Sequence[str] = ()
    # Findings of a look at the data on this machine.
    data_warnings: Sequence[str] = ()

    def to_json(self) -> dict[str, Any]:
        """The contract of `submit --json`."""
        return {
            "run_dir": str(self.run.path),
            "sbatch": str(self.run.links.job_sbatch),
            "job_id": self.job_id,
            "command": list(self.command),
            "env": {v.name: v.value for v in self.resolved.env},
            "ds_config": self.resolved.ds_config,
            "effective_batch": self.resolved.effective_batch_size,
        }

    @property
    def shell_line(self) -> str:
        """The command that does the same by hand."""
        prefix = ["JANUS_LAUNCHER=local"] if self.resolved.cluster == "local" else []
        prefix += [f"SLURM_CONF={shlex.quote(str(self.slurm_conf))}"] if self.slurm_conf else []
        return " ".join([*prefix, shlex.join(self.command)])


def submit(request: Request, *, environ: Mapping[str, str], cwd: Path) -> Submission:
    """Write the run folder and, unless it is a dry run, queue or start the job.

    Raises: UsageError (nothing written), SlurmUnavailable, SandboxFailed, SubmitFailed (nothing left).
    """
    planned = load_planned(request, environ)
    code = read_package()
    prepared = prepare(request, planned, environ=environ, cwd=cwd, code=code)
    if prepared.resolved.job.kind == "train":
        check_weights(prepared.resolved.job.model)
    # Not in resolved.json: that follows from the job alone, and data may change before the nodes read them.
    data_warnings = check_data(prepared.resolved.job).warnings
    job_id = hand_over(prepared, _new_run(prepared, code), is_dry_run=request.dry_run)
    return Submission(
        run=prepared.run,
        resolved=prepared.resolved,
        command=_command(prepared),
        job_id=job_id or None,
        source=planned.loaded.source,
        slurm_conf=prepared.slurm_conf,
        notes=prepared.notes,
        data_warnings=data_warnings,
    )


def prepare(
    request: Request, planned: Planned, *, environ: Mapping[str, str], cwd: Path, code: Mapping[str, bytes]
) -> Prepared:
    """Resolve, check and render the job for a run folder of its own. Nothing is written.

    Raises: UsageError, SlurmUnavailable, SandboxFailed.
    """
    loaded = planned.loaded
    slurm_conf = None if request.dry_run else require_cluster(request.cluster, environ)
    run_path = new_run_path(loaded.config, environ, cwd)
    if request.cluster != "local" and not request.dry_run and loaded.config.preflight.use_node_memory:
        from janus_cluster.desk.harvest import remember_recent

        remember_recent(run_path.parent)

    def resolve(job: LoadedJob, memory: MemoryPlan | None, bundle: int) -> ResolvedJob:
        found = resolve_job(
            job,
            run_dir=run_path,
            cluster=request.cluster,
            environ=environ,
            cwd=cwd,
            python=sys.executable,
            memory=memory,
            bundle=bundle,
        )
        return with_baseline(found, site_dir(environ))

    resolved = resolve(loaded, planned.memory, 1)
    require_same_bytes(resolved)
    check_paths(resolved, source=loaded.source, origins=loaded.origins)
    exclusion = exclude_bad_nodes(resolved, slurm_conf=slurm_conf, site=site_dir(environ), now=time.time())
    resolved, *fewer = (
        each.model_copy(update={"sbatch_options": _with_option(each.sbatch_options, "exclude", exclusion.option)})
        for each in with_fewer_nodes(resolved, loaded, resolve)
    )
    bundles = render_bundles(
        resolved,
        fewer_nodes=fewer,
        job_yaml_text=render_job_yaml(
            with_absolute_paths(planned.given.config, cwd), source=loaded.source, sets=request.sets
        ),
        secrets={name: environ[name] for name in resolved.secret_names},
        manifest=collect_manifest(loaded.path, code=code),
    )
    return Prepared(
        run=RunDir(run_path),
        resolved=resolved,
        bundles=bundles,
        cluster=request.cluster,
        slurm_conf=slurm_conf,
        notes=exclusion.notes,
    )


@contextlib.contextmanager
def _new_run(prepared: Prepared, code: Mapping[str, bytes]) -> Iterator[None]:
    """Write the run folder, and keep others from sending it inside the block."""
    keeps_code = prepared.resolved.job.environment.code == "snapshot"
    with run_written(prepared.run, prepared.bundles, code=code if keeps_code else {}), run_locked(prepared.run):
        yield


def exclude_bad_nodes(resolved: ResolvedJob, *, slurm_conf: Path | None, site: Path, now: float) -> Exclusion:
    """The nodes that sbatch is to avoid: the job's own list and those recorded as bad."""
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
        num_nodes=resolved.job.nodes_min or resolved.job.nodes,
        site_nodes=_site_nodes(resolved, slurm_conf),
        now=now,
        wanted=options.get("nodelist"),
        is_gated=keys.enabled,
    )


def _site_nodes(resolved: ResolvedJob, slurm_conf: Path | None) -> frozenset[str] | None:
    """The nodes that this Slurm could give to the job; None where it cannot be asked, as for a dry run elsewhere.

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
    """The job that the request names, with training.memory: auto resolved: here, and in amend.py for a resumed run.

    Raises: UsageError, also where nothing fits into the memory.
    """
    given = load_request(request, environ)
    if given.config.training.memory == "manual":
        return Planned(given=given, loaded=given, memory=None)
    # plan/ takes a while to import, and manual jobs do not need it.
    from janus_cluster.plan.auto import plan_memory_keys

    loaded, memory = plan_memory_keys(given)
    return Planned(given=given, loaded=loaded, memory=memory)


def load_request(request: Request, environ: Mapping[str, str]) -> LoadedJob:
    """The job that the request names, with its options applied. Raises: UsageError."""
    options: dict[str, Any] = {"nodes": request.nodes, "name": request.name}
    if not request.preflight:
        options["preflight.enabled"] = False
    path = find_job_file(request.job, nodes=request.nodes)
    # The sandbox is another Slurm than the site's.
    site = site_dir(environ) if request.cluster != "sandbox" else None
    loaded = load_job(path, sets=request.sets, environ=environ, options=options, site=site)
    if not request.exclude:
        return loaded
    own = loaded.config.slurm.get("exclude")
    hosts = own if isinstance(own, list) else [own] if isinstance(own, str) else []
    # The job's own list is kept: excluding one node more must not bring the others back.
    both = merge_hosts(*hosts, request.exclude)
    return load_job(path, sets=request.sets, environ=environ, options=options | {"slurm.exclude": both}, site=site)


def check_paths(resolved: ResolvedJob, *, source: str, origins: Mapping[str, str]) -> None:
    """Require that this machine sees what the job reads, before anything is queued.

    `preflight.require_paths` are checked by the gate only, on the nodes.
    Raises: UsageError naming key and path.
    """
    job = resolved.job
    wanted = [("model.path", job.model.path), ("model.vggt_path", job.model.vggt_path)]
    wanted += [("data.roots", root.path) for root in job.data.roots]
    missing = [
        (key, path)
        for key, path in wanted
        if path is not None and not os.path.exists(path)  # noqa: PTH110 - a path too long for stat is just missing
    ]
    if missing:
        problems = [f"{origins.get(key, source)}: {key}: {path}: no such file or folder" for key, path in missing]
        raise UsageError.of_many(problems, hint=_where_to_mend({key: origins.get(key, source) for key, _ in missing}))


def _where_to_mend(origins: Mapping[str, str]) -> str:
    """What to type for paths that are missing, by the origin of each key."""
    variables = dict.fromkeys(name for origin in origins.values() for name in re.findall(r"\$(\w+)", origin))
    options = [key for key, origin in origins.items() if origin == "--set"]
    of_file = [key for key, origin in origins.items() if origin != "--set" and "$" not in origin]
    ways = ["export " + " ".join(f"{name}=PATH" for name in variables)] if variables else []
    ways += [" ".join(f"--set {key}=PATH" for key in options)] if options else []
    ways += [f"mend {', '.join(of_file)} in the job file, or add --set {of_file[0]}=PATH"] if of_file else []
    return "; ".join(ways)


def runs_folder(job: JobConfig, environ: Mapping[str, str], cwd: Path) -> Path:
    """Where the job's run folders are made; `runs_dir` of the job overrides JANUS_HOME."""
    return cwd / Path(os.path.expanduser(job.runs_dir)) if job.runs_dir else runs_dir(environ, cwd)


def new_run_path(job: JobConfig, environ: Mapping[str, str], cwd: Path) -> Path:
    """<runs folder>/<name>-<utc time>-<short id>."""
    base = runs_folder(job, environ, cwd)
    stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
    return base / f"{job.name}-{stamp}-{secrets.token_hex(2)}"


def _command(prepared: Prepared) -> list[str]:
    if prepared.cluster == "local":
        from janus_cluster.desk.local import local_command

        return local_command(prepared.run.links)
    # Where the sandbox's Slurm is not the one on PATH, its own sbatch.
    from janus_cluster.slurm.client_env import client_env

    path = client_env(prepared.slurm_conf).get("PATH") if prepared.slurm_conf else None
    sbatch = (shutil.which("sbatch", path=path) if path else None) or "sbatch"
    return [sbatch, str(prepared.run.links.job_sbatch)]
