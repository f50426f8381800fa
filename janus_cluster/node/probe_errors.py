"""Why a node's probe did not report: the exception of its ranks, and NCCL's warnings in its own log."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from janus_cluster.diagnosis.evidence import load_rank_errors, parse_last_exception, read_tail
from janus_cluster.diagnosis.failure import is_follow_up
from janus_cluster.diagnosis.known_errors import advice_for
from janus_cluster.preflight.all_reduce import ProbeError
from janus_cluster.run.paths import RunDir
from janus_cluster.run.text import load_secrets

_WARNING = re.compile(r"NCCL WARN (.+)$", re.MULTILINE)
_LONGEST = 300
_MOST_WARNINGS = 2


def load_probe_error(run: RunDir, *, attempt: int, node: str) -> ProbeError | None:
    """The first error of the node's ranks that no other rank explains, and NCCL's last warnings; None for neither."""
    secrets = load_secrets(run)
    log = read_tail(run.node_log(attempt, node), secrets=secrets)
    raised = sorted(load_rank_errors(run, attempt, node, []), key=lambda error: error.time)
    if not raised and (logged := parse_last_exception(log, node, None, time=0.0)) is not None:
        raised = [logged]
    own = [error for error in raised if not is_follow_up(error.message)] or raised
    warnings = read_warnings(run.nccl_logs(attempt, node), secrets=secrets)
    parts = [" ".join(error.message.split())[:_LONGEST] for error in own[:1]]
    parts += [f"NCCL: {text[:_LONGEST]}" for text in warnings]
    if not parts:
        return None
    message = "; ".join(parts)
    return ProbeError(message=message, advice=advice_for(message, node))


def read_warnings(paths: Sequence[Path], *, secrets: dict[str, str]) -> list[str]:
    """NCCL's warnings, each once; the last ones of all ranks' logs."""
    found = [text.strip() for path in paths for text in _WARNING.findall(read_tail(path, secrets=secrets))]
    return list(dict.fromkeys(found))[-_MOST_WARNINGS:]
