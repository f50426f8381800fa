"""What a run folder itself says of its job: status.json and submission.json, read with care."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from janus_cluster.config.home import sandbox_home
from janus_cluster.rundir import RunDir, read_json

Cluster = Literal["slurm", "sandbox", "local"]


@dataclass(frozen=True, kw_only=True)
class StatusFile:
    """status.json, as far as it could be read."""

    state: str
    cluster: str | None = None
    job_id: str | None = None
    attempt: int | None = None
    phase: str | None = None
    nodes: tuple[str, ...] = ()
    exit_code: int | None = None
    signal: int | None = None
    reason: str | None = None
    started_at: float | None = None
    updated_at: float | None = None


@dataclass(frozen=True, kw_only=True)
class Submission:
    """Where a run was sent: submission.json, or what status.json says of a script submitted by hand."""

    cluster: Cluster
    job_id: str | None
    submitted_at: float | None = None
    slurm_conf: Path | None = None

    @property
    def pid(self) -> int | None:
        match = re.fullmatch(r"local-(\d+)", self.job_id or "")
        return int(match.group(1)) if match else None


def load_status(run: RunDir) -> StatusFile | None:
    """status.json of the run; None while there is none that can be read."""
    value = _read_object(run.status_json)
    if not isinstance(value.get("state"), str):
        return None
    nodes = value.get("nodes")
    return StatusFile(
        state=value["state"],
        cluster=_text(value.get("cluster")),
        job_id=_text(value.get("job_id")),
        attempt=_whole(value.get("attempt")),
        phase=_text(value.get("phase")),
        nodes=tuple(n for n in nodes if isinstance(n, str)) if isinstance(nodes, list) else (),
        exit_code=_whole(value.get("exit_code")),
        signal=_whole(value.get("signal")),
        reason=_text(value.get("reason")),
        started_at=_number(value.get("started_at")),
        updated_at=_number(value.get("updated_at")),
    )


def load_submission(run: RunDir) -> Submission | None:
    """Where the run went, the latest word counting; None when it was never submitted."""
    value = _read_object(run.submission_json)
    conf = _text(value.get("slurm_conf"))
    sent = None
    if (cluster := _cluster(value.get("cluster"))) is not None:
        sent = Submission(
            cluster=cluster,
            job_id=_text(value.get("job_id")),
            submitted_at=_number(value.get("submitted_at")),
            slurm_conf=Path(conf) if conf else None,
        )
    status = load_status(run)
    by_hand = _cluster(status.cluster) if status else None
    if status is None or by_hand is None:
        return sent
    if sent and (status.job_id in (None, sent.job_id) or (status.started_at or 0.0) < (sent.submitted_at or 0.0)):
        return sent
    if by_hand == "sandbox" and conf is None and (shipped := sandbox_home() / "etc" / "slurm.conf").exists():
        conf = str(shipped)
    return Submission(cluster=by_hand, job_id=status.job_id, slurm_conf=Path(conf) if conf else None)


def _read_object(path: Path) -> dict[str, Any]:
    try:
        value = read_json(path)
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def _cluster(value: object) -> Cluster | None:
    known: tuple[Cluster, ...] = ("slurm", "sandbox", "local")
    return next((name for name in known if name == value), None)


def _text(value: object) -> str | None:
    return value if isinstance(value, str) and value else None


def _whole(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _number(value: object) -> float | None:
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None
