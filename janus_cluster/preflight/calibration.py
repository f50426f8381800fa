"""The site's measurements: a baseline that later runs are judged against, and each node's results in every gate.

    <site>/baseline.json           per profile and number of nodes: test → median, from `preflight --calibrate`
    <site>/history/<node>.jsonl    one line per gate: rates, failed checks, partners

Both are written on the login node, from run folders: compute nodes need not see its home. A baseline reaches them
inside resolved.json.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from janus_cluster.errors import GateFailed, GateUndetermined
from janus_cluster.job.resolved import ResolvedJob
from janus_cluster.preflight.all_reduce import busbw_gb_per_s
from janus_cluster.run.current import current_bundle
from janus_cluster.run.files import read_json, write_json_atomically
from janus_cluster.run.next_command import command_for
from janus_cluster.run.paths import RunDir
from janus_cluster.run.records.bundle import ResolvedRecord
from janus_cluster.run.records.gate import AllReduceRecord
from janus_cluster.run.records.rails import RailTest, best_rates
from janus_cluster.run.records.verdict import Verdict

_SCHEMA_VERSION = 1
_FEWEST_RUNS = 3  # a median of fewer is no evidence


def measured_rates(facts: Mapping[str, Any], *, statistic: str) -> dict[str, float]:
    """Test → rate, from the record of one node's probe. TFLOP/s for gemm, GB/s for the rest."""
    rates = {
        "all_reduce": busbw_gb_per_s(
            facts["times_s"], payload_bytes=facts["payload_bytes"], world_size=facts["world_size"]
        ),
        "gemm": min(float(r["tflops"]) for r in facts["gemm"]),
    }
    if part := facts.get("intra_node"):
        rates["intra_node"] = busbw_gb_per_s(
            part["times_s"], payload_bytes=part["payload_bytes"], world_size=part["num_ranks"]
        )
    tests = [RailTest.from_json(test) for test in facts.get("rails", [])]
    for name, together in (("rail", False), ("rails_together", True)):
        best = best_rates((test for test in tests if test.together == together), statistic=statistic)
        rates |= {f"{name}.{rail}": rate for (node, rail), rate in best.items() if node == facts["node"] and rate}
    return rates


def load_baseline(site: Path, profile: str, *, num_nodes: int) -> dict[str, float]:
    """Test → rate that this site calibrated; {} where it has not. Raises: ValueError for a damaged file."""
    path = site / "baseline.json"
    if not path.exists():
        return {}
    found = read_json(path)["profiles"].get(_key(profile, num_nodes), {})
    return {str(test): float(rate) for test, rate in found.get("measured", {}).items()}


def with_baseline(resolved: ResolvedJob, site: Path) -> ResolvedJob:
    """The job with this site's baseline among its thresholds, so that nodes without the site's folder judge by it."""
    measured = load_baseline(site, resolved.preflight_profile, num_nodes=resolved.job.nodes)
    if not measured:
        return resolved
    row = {**resolved.preflight_thresholds["baseline"], "measured": measured}
    return resolved.model_copy(update={"preflight_thresholds": resolved.preflight_thresholds | {"baseline": row}})


def write_baseline(site: Path, run: RunDir) -> dict[str, float]:
    """<site>/baseline.json holds the medians of this run's last gate, beside those of other profiles.

    Raises: GateFailed where the gate did not pass: a faulty pair of nodes must not become the reference.
            GateUndetermined where it measured nothing.
    """
    verdict, by_node, profile = _load_gate(run, run.attempts()[-1])
    if verdict.state not in ("PASS", "WARN"):
        message = f"not calibrated: the preflight is {verdict.state}"
        is_other_kind = any(r.id == "gpu.model" and r.state == "FAIL" and not r.blames_node for r in verdict.results)
        unfit = "no figures of these GPUs: janus-cluster preflight --profile any --calibrate"
        raise GateFailed(message, hint=unfit if is_other_kind else command_for("status", run))
    rates: dict[str, list[float]] = {}
    for own in by_node.values():
        for test, rate in own.items():
            rates.setdefault(test, []).append(rate)
    if not rates:
        raise GateUndetermined("not calibrated: nothing was measured", hint="janus-cluster preflight --calibrate")
    path = site / "baseline.json"
    site.mkdir(parents=True, exist_ok=True)
    whole: dict[str, Any] = read_json(path) if path.exists() else {"schema_version": _SCHEMA_VERSION, "profiles": {}}
    medians = {test: statistics.median(values) for test, values in rates.items()}
    whole["profiles"][_key(profile, len(verdict.nodes))] = {
        "created_at": time.time(),
        "run": run.name,
        "nodes": list(verdict.nodes),
        "measured": medians,
    }
    write_json_atomically(path, whole)
    return medians


def append_history(site: Path, run: RunDir) -> list[Path]:
    """Every judged gate of this run has one line in the file of each of its nodes, however often this is called."""
    written = []
    for attempt in run.attempts():
        try:
            verdict, by_node, profile = _load_gate(run, attempt)
        except GateUndetermined:
            continue
        for node in verdict.nodes:
            line = {
                "schema_version": _SCHEMA_VERSION,
                "time": verdict.created_at,
                "run": run.name,
                "attempt": attempt,
                "job_id": verdict.job_id,
                "profile": profile,
                "partners": [n for n in verdict.nodes if n != node],
                "state": verdict.state,
                "not_passed": [
                    r.id for r in verdict.results if node in r.node.split(",") and r.state in ("FAIL", "WARN", "ERROR")
                ],
                "rates": by_node.get(node, {}),
            }
            path = site / "history" / f"{node}.jsonl"
            if _append_once(path, line):
                written.append(path)
    return written


def remember_gates(site: Path, runs: Iterable[RunDir]) -> None:
    """The gates of these runs are in their nodes' history, where the site's folder can be written."""
    for run in runs:
        try:
            append_history(site, run)
        except (OSError, KeyError):
            continue  # a home that is read-only, or a history of another shape: no reason to fail


def load_history(site: Path, node: str) -> list[dict[str, Any]]:
    """The node's recorded gates, oldest first; a truncated line is left out."""
    path = site / "history" / f"{node}.jsonl"
    found = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found


def with_own_history(verdict: Verdict, site: Path, run: RunDir) -> Verdict:
    """The verdict, each slow rate compared with the same nodes in earlier gates: evidence where a pair is blamed."""
    try:
        _, by_node, profile = _load_gate(run, run.attempts()[-1])
    except (GateUndetermined, IndexError):
        return verdict
    earlier = {
        node: [x for x in load_history(site, node) if x.get("run") != run.name and x.get("profile") == profile]
        for node in verdict.nodes
    }
    results = []
    for r in verdict.results:
        comparisons = []
        for node in r.node.split(",") if r.state in ("FAIL", "WARN") else []:
            rate = by_node.get(node, {}).get(r.id)
            rates = [x["rates"][r.id] for x in earlier.get(node, []) if r.id in x.get("rates", {})]
            if rate is not None and len(rates) >= _FEWEST_RUNS:
                share = rate / statistics.median(rates)
                comparisons.append(f"{node}: {share:.2f} of its own median over {len(rates)} runs")
        results.append(replace(r, fix="; ".join([r.fix, *comparisons])) if comparisons else r)
    return replace(verdict, results=tuple(results))


def _append_once(path: Path, line: Mapping[str, Any]) -> bool:
    path.parent.mkdir(parents=True, exist_ok=True)
    if any(
        (old["run"], old["attempt"]) == (line["run"], line["attempt"])
        for old in load_history(path.parent.parent, path.stem)
    ):
        return False
    with path.open("a", encoding="utf-8") as f:
        f.write(json.dumps(line, ensure_ascii=False) + "\n")
    return True


def _load_gate(run: RunDir, attempt: int) -> tuple[Verdict, dict[str, dict[str, float]], str]:
    """(verdict, node → rates, profile) of one attempt.

    Raises: GateUndetermined where it has no verdict, or the run folder is incomplete.
    """
    if (verdict := Verdict.load(run.verdict_json(attempt))) is None:
        raise GateUndetermined(f"attempt {attempt} of {run.name} has no verdict")
    found = {node: AllReduceRecord.load(run.all_reduce_json(attempt, node)) for node in verdict.nodes}
    try:
        profile, statistic = _load_profile(run)
        by_node = {node: measured_rates(r.values, statistic=statistic) for node, r in found.items() if r is not None}
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise GateUndetermined(f"attempt {attempt} of {run.name} cannot be read: {e}") from e
    return verdict, by_node, profile


def _load_profile(run: RunDir) -> tuple[str, str]:
    """(its name, its statistic of rails). Raises: OSError, ValueError, KeyError, TypeError."""
    resolved = ResolvedRecord.read(current_bundle(run).resolved_json)
    if resolved.preflight_profile is None:
        raise ValueError("resolved.json: key preflight_profile is missing")
    return resolved.preflight_profile, str(resolved.preflight_thresholds["rails"]["statistic"])


def _key(profile: str, num_nodes: int) -> str:
    return f"{profile}, {num_nodes} node{'s' * (num_nodes > 1)}"
