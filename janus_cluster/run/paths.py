"""RunDir: the only place that knows a path inside a run folder. Types for its files: run/records/.

<run>/
  bundles/<n>/     one submission, or one smaller option of training.memory: auto. Written once, never changed:
      job.yaml         the job as given, after --set       resolved.json  every value and its origin
      job.sbatch       the script that Slurm runs          env.sh         every exported variable and its reason
      ds_config.json   what DeepSpeed gets                 manifest.json  git state, versions, sha256 of inputs
      each_node.sh     environment.setup_each_node, where the job has any
      secrets.env      0600; values that no other file may hold
  job.yaml, …      relative links to the newest submitted bundle, for people; no program of ours reads through them
  code/            janus_cluster as it was submitted; every attempt imports it from here
  submission.json  where it was sent, which bundle, and the job id
  status.json      written by the running attempt only
  submitit/        what submitit keeps of the submission
  submit.lock      held while submit or resume sends the run
  attempt.lock     held by the attempt that runs
  metrics.jsonl    one line per event of training
  bad_data.jsonl   what of the data could not be used, and why
  data.json        which samples the newest attempt drew from
  retry.json       which node the one retry of preflight.on_fail left out, and why
  preflight/attempt_<n>/  facts.<node>.json, connect.<node>.json, all_reduce.<node>.json, counters.<node>.json,
                          rails.json, nccl.<node>.<pid>.log, verdict.<node>.json, verdict.json, verdict.md
  logs/batch.log          output of the batch script and of the attempt itself
  logs/script_failure.json  why job.sbatch ended before the attempt could begin
  logs/attempt_<n>/       <node>.log, <node>.rank<r>.log, torchrun/<node>/ (its error files), attempt.json (bundle,
                          first step, how it ended), stop.json (asked to stop), heartbeats/rank<r>.json,
                          failures/rank<r>.json (the exception that ended the rank),
                          stall/ (what each rank was doing in a hang: rank<r>.json, trace_rank<r> of
                          torch's flight recorder, analysis.txt of torch's own analysis),
                          health/<node>.jsonl (GPUs and links of a node, every 30 s),
                          versions.json (packages that it ran with)
  checkpoints/checkpoint-<step>/ (whole), .partial/ (being written), checkpoint-<step>.broken/ (found damaged on resume)
      export/      export-janusvln/ (the published layout)      evaluation/      simulation/
      report/ (pages and pictures; may be deleted)
"""

from __future__ import annotations

import glob
import re
from dataclasses import dataclass
from pathlib import Path

from janus_cluster.job.home import BATCH_LOG


@dataclass(frozen=True)
class BundleDir:
    """The files of one bundle. Attributes are paths; nothing is created by naming them."""

    path: Path

    @property
    def number(self) -> int:
        return int(self.path.name)

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
    def each_node_sh(self) -> Path:
        return self.path / "each_node.sh"

    @property
    def ds_config_json(self) -> Path:
        return self.path / "ds_config.json"

    @property
    def manifest_json(self) -> Path:
        return self.path / "manifest.json"

    @property
    def secrets_env(self) -> Path:
        return self.path / "secrets.env"


@dataclass(frozen=True)
class RunDir:
    """One run folder. Attributes are paths; nothing is created by naming them."""

    path: Path

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def bundles(self) -> Path:
        return self.path / "bundles"

    def bundle(self, number: int) -> BundleDir:
        return BundleDir(self.bundles / str(number))

    def bundle_numbers(self) -> list[int]:
        """The numbers of the bundles that were written, ascending."""
        return sorted(int(p.name) for p in self.bundles.glob("[0-9]*") if p.name.isdigit())

    @property
    def links(self) -> BundleDir:
        """The links to the newest submitted bundle: what people are shown and may type."""
        return BundleDir(self.path)

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
        """Beside the run folders, where all nodes see it: later runs on the same data find it there."""
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
    def export(self) -> Path:
        return self.path / "export"

    @property
    def published_export(self) -> Path:
        return self.path / "export-janusvln"

    @property
    def evaluation(self) -> Path:
        return self.path / "evaluation"

    @property
    def simulation(self) -> Path:
        return self.path / "simulation"

    @property
    def report(self) -> Path:
        return self.path / "report"

    @property
    def logs(self) -> Path:
        return self.path / "logs"

    @property
    def batch_log(self) -> Path:
        return self.path / BATCH_LOG

    @property
    def script_failure_json(self) -> Path:
        return self.logs / "script_failure.json"

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

    def rank_failures(self, attempt: int) -> list[Path]:
        """The files of the ranks that ended with an exception."""
        return sorted(self.rank_failure_json(attempt, 0).parent.glob("rank*.json"))

    def rank_failure_json(self, attempt: int, rank: int) -> Path:
        return self.attempt_logs(attempt) / "failures" / f"rank{rank}.json"

    def stall(self, attempt: int) -> Path:
        return self.attempt_logs(attempt) / "stall"

    def stall_json(self, attempt: int, rank: int) -> Path:
        return self.stall(attempt) / f"rank{rank}.json"

    def stall_trace_prefix(self, attempt: int) -> Path:
        """torch adds the rank."""
        return self.stall(attempt) / "trace_rank"

    def stall_trace(self, attempt: int, rank: int) -> Path:
        return self.stall(attempt) / f"{self.stall_trace_prefix(attempt).name}{rank}"

    def stall_analysis(self, attempt: int) -> Path:
        return self.stall(attempt) / "analysis.txt"

    def health_jsonl(self, attempt: int, node: str) -> Path:
        return self.attempt_logs(attempt) / "health" / f"{node}.jsonl"

    def health_files(self, attempt: int) -> dict[str, Path]:
        """Node → its file, of the nodes that have one."""
        return {p.stem: p for p in sorted(self.health_jsonl(attempt, "x").parent.glob("*.jsonl"))}

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
