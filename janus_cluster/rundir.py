"""RunDir: the only place that knows a path inside a run folder, and the only writer of small files in it.

<run>/
  job.yaml         the job as given, after --set           resolved.json  every value, and where it came from
  job.sbatch       the script that Slurm runs              env.sh         every exported variable and its reason
  ds_config.json   what DeepSpeed gets                     manifest.json  git state, versions, sha256 of inputs
  submission.json  where it was sent, and the job id       status.json    written by the running attempt only
  submitit/        what submitit keeps of the submission   submit.lock    held while submit or resume sends the run
  attempt.lock     held by the attempt that runs
  metrics.jsonl    one line per event of training          secrets.env    0600; values that no other file may hold
  bad_data.jsonl   what of the data could not be used, and why
  data.json        which samples the newest attempt drew from
  code/            janus_cluster as it was submitted; every attempt imports it from here
  history/<n>/     the files of the first two lines as they were before the n-th change (`resume`, or an attempt that
                   took a smaller option of training.memory: auto)
  retry.json       which node the one retry of preflight.on_fail left out, and why
  preflight/attempt_<n>/  facts.<node>.json, connect.<node>.json, all_reduce.<node>.json, counters.<node>.json,
                          rails.json, nccl.<node>.<pid>.log, verdict.<node>.json, verdict.json, verdict.md
  logs/batch.log          what the batch script and the attempt itself said
  logs/attempt_<n>/       <node>.log, <node>.rank<r>.log, torchrun/<node>/ (its error files), attempt.json (from which
                          step, and how it ended), stop.json (asked to stop), heartbeats/rank<r>.json,
                          versions.json (packages that it ran with)
  checkpoints/checkpoint-<step>/ (whole), .partial/ (being written), checkpoint-<step>.broken/ (found damaged on resume)
      export/      export-janusvln/ (the published layout)      evaluation/
      report/ (pages and pictures; may be deleted)
"""

from __future__ import annotations

import errno
import glob
import json
import os
import re
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class RunDir:
    """One run folder. Attributes are paths; nothing is created by naming them."""

    path: Path

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def job_yaml(self) -> Path:
        return self.path / "job.yaml"

    @property
    def resolved_json(self) -> Path:
        return self.path / "resolved.json"

    @property
    def job_sbatch(self) -> Path:
        return self.path / "job.sbatch"

    @property
    def env_sh(self) -> Path:
        return self.path / "env.sh"

    @property
    def secrets_env(self) -> Path:
        return self.path / "secrets.env"

    @property
    def ds_config_json(self) -> Path:
        return self.path / "ds_config.json"

    @property
    def manifest_json(self) -> Path:
        return self.path / "manifest.json"

    @property
    def submission_json(self) -> Path:
        return self.path / "submission.json"

    @property
    def submit_lock(self) -> Path:
        return self.path / "submit.lock"

    @property
    def submitit(self) -> Path:
        return self.path / "submitit"

    @property
    def status_json(self) -> Path:
        return self.path / "status.json"

    @property
    def metrics_jsonl(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def bad_data_jsonl(self) -> Path:
        return self.path / "bad_data.jsonl"

    @property
    def data_json(self) -> Path:
        return self.path / "data.json"

    @property
    def data_index(self) -> Path:
        """Beside the run folders, which lie where all nodes see them: later runs on the same data find it there."""
        return self.path.parent / ".data_index"

    @property
    def code(self) -> Path:
        return self.path / "code"

    def versions_json(self, attempt: int) -> Path:
        return self.attempt_logs(attempt) / "versions.json"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def history(self) -> Path:
        return self.path / "history"

    @property
    def export(self) -> Path:
        return self.path / "export"

    @property
    def published_export(self) -> Path:
        return self.path / "export-janusvln"

    @property
    def evaluation(self) -> Path:
        return self.path / "evaluation"

    @property
    def report(self) -> Path:
        return self.path / "report"

    @property
    def logs(self) -> Path:
        return self.path / "logs"

    @property
    def batch_log(self) -> Path:
        return self.logs / "batch.log"

    def attempt_logs(self, attempt: int) -> Path:
        return self.logs / f"attempt_{attempt}"

    def node_log(self, attempt: int, node: str) -> Path:
        return self.attempt_logs(attempt) / f"{node}.log"

    def rank_log(self, attempt: int, node: str, rank: int) -> Path:
        return self.attempt_logs(attempt) / f"{node}.rank{rank}.log"

    def torchrun_logs(self, attempt: int, node: str) -> Path:
        return self.attempt_logs(attempt) / "torchrun" / node

    @property
    def attempt_lock(self) -> Path:
        return self.path / "attempt.lock"

    def attempt_json(self, attempt: int) -> Path:
        return self.attempt_logs(attempt) / "attempt.json"

    def stop_json(self, attempt: int) -> Path:
        return self.attempt_logs(attempt) / "stop.json"

    def heartbeat_json(self, attempt: int, rank: int) -> Path:
        return self.attempt_logs(attempt) / "heartbeats" / f"rank{rank}.json"

    def preflight(self, attempt: int) -> Path:
        return self.path / "preflight" / f"attempt_{attempt}"

    def facts_json(self, attempt: int, node: str) -> Path:
        return self.preflight(attempt) / f"facts.{node}.json"

    def all_reduce_json(self, attempt: int, node: str) -> Path:
        return self.preflight(attempt) / f"all_reduce.{node}.json"

    def connect_json(self, attempt: int, node: str) -> Path:
        return self.preflight(attempt) / f"connect.{node}.json"

    def counters_json(self, attempt: int, node: str) -> Path:
        return self.preflight(attempt) / f"counters.{node}.json"

    def rails_json(self, attempt: int) -> Path:
        return self.preflight(attempt) / "rails.json"

    def nccl_log_pattern(self, attempt: int, node: str) -> Path:
        """What NCCL_DEBUG_FILE is set to; %p is the process."""
        return self.preflight(attempt) / f"nccl.{node}.%p.log"

    def nccl_logs(self, attempt: int, node: str) -> list[Path]:
        return sorted(self.preflight(attempt).glob(f"nccl.{glob.escape(node)}.*.log"))

    @property
    def retry_json(self) -> Path:
        return self.path / "retry.json"

    def node_verdict_json(self, attempt: int, node: str) -> Path:
        return self.preflight(attempt) / f"verdict.{node}.json"

    def verdict_json(self, attempt: int) -> Path:
        return self.preflight(attempt) / "verdict.json"

    def verdict_md(self, attempt: int) -> Path:
        return self.preflight(attempt) / "verdict.md"

    def attempts(self) -> list[int]:
        """The numbers of the attempts that have begun, ascending."""
        found = (re.fullmatch(r"attempt_(\d+)", p.name) for p in self.logs.glob("attempt_*"))
        return sorted(int(m.group(1)) for m in found if m)

    def begin_attempt(self) -> int:
        """Claim the next attempt number by creating its log folder; safe against a second claimer."""
        self.logs.mkdir(parents=True, exist_ok=True)
        attempt = (self.attempts() or [0])[-1] + 1
        while True:
            try:
                self.attempt_logs(attempt).mkdir()
            except FileExistsError:
                attempt += 1
                continue
            self.preflight(attempt).mkdir(parents=True, exist_ok=True)
            return attempt

    def append_metric(self, record: dict[str, Any]) -> None:
        """One whole line in metrics.jsonl; only global rank 0 of training calls this."""
        line = (json.dumps(record, ensure_ascii=False) + "\n").encode("utf-8")
        with self.metrics_jsonl.open("ab+") as f:
            # What a crash, or a full disk, left of a line must not spoil this one too.
            if f.seek(0, os.SEEK_END):
                f.seek(-1, os.SEEK_END)
                line = line if f.read(1) == b"\n" else b"\n" + line
            f.write(line)

    def read_metrics(self) -> Iterator[dict[str, Any]]:
        """Every whole line of metrics.jsonl; a torn last line is left out."""
        if not self.metrics_jsonl.exists():
            return
        with self.metrics_jsonl.open(encoding="utf-8", errors="replace") as f:
            for line in f:
                if line.endswith("\n"):
                    try:
                        yield json.loads(line)
                    except ValueError:
                        continue


def write_text_atomically(path: Path, text: str, *, mode: int = 0o644) -> None:
    """`path` holds all of `text` or what it held before, whatever happens; readers never see half of it."""
    write_bytes_atomically(path, text.encode("utf-8"), mode=mode)


def write_bytes_atomically(path: Path, data: bytes, *, mode: int = 0o644) -> None:
    """`path` holds all of `data` or what it held before, whatever happens; readers never see half of it."""
    fd, tmp = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(fd, "wb") as f:
            os.fchmod(f.fileno(), mode)
            f.write(data)
            f.flush()
            os.fsync(f.fileno())
        Path(tmp).replace(path)
    except BaseException as e:
        Path(tmp).unlink(missing_ok=True)
        if isinstance(e, OSError) and e.filename is None:
            # A full disk is met in write, where Python does not know the name.
            e.filename = str(path)
        raise


def write_json_atomically(path: Path, value: Any) -> None:
    """`path` holds `value` as indented JSON, or what it held before."""
    write_text_atomically(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def name_of_trouble(error: OSError) -> str:
    """`ENOSPC`: for logs of what was lived through; the system's own words would be taken for the cause of an end."""
    return errno.errorcode.get(error.errno or 0, type(error).__name__)


def read_json(path: Path) -> Any:
    """The file's JSON value. Raises: OSError, ValueError."""
    return json.loads(path.read_text(encoding="utf-8"))
