"""Facts of one node without a job, as one line of JSON: `python -m janus_cluster.preflight.survey [NODE …]`.

The interface is that of the route to the first of the nodes that is another one.
"""

from __future__ import annotations

import json
import os
import socket
import sys
from collections.abc import Sequence
from typing import Any

from janus_cluster.preflight.gpu_query import read_gpu_tables
from janus_cluster.preflight.hca import read_hcas
from janus_cluster.preflight.limits import read_limits
from janus_cluster.preflight.route import read_route
from janus_cluster.preflight.sysfs import NodeRoot

MARK = "janus-cluster survey: "
_TIMEOUT_S = 60.0  # without persistence the first answer of nvidia-smi takes half a minute


def read_survey(root: NodeRoot, *, peer: str | None = None) -> dict[str, Any]:
    """The facts that name a kind of site: GPUs, adapters, limits, and the interface to `peer`. Nothing is written."""
    return {
        "hostname": socket.gethostname(),
        "gpu": read_gpu_tables(timeout_s=_TIMEOUT_S, environ=os.environ),
        "hca": read_hcas(root),
        "limits": read_limits(root),
        "route": read_route(peer, root),
    }


def parse_survey(text: str) -> dict[str, Any] | None:
    """The facts in a node's output, which may have lines of others before them; None where there are none."""
    for line in reversed(text.splitlines()):
        if line.startswith(MARK):
            try:
                value = json.loads(line.removeprefix(MARK))
            except ValueError:
                return None
            return value if isinstance(value, dict) else None
    return None


def find_peer(nodes: Sequence[str]) -> str | None:
    """The first of the nodes that is not this one."""
    own = socket.gethostname().partition(".")[0]
    return next((node for node in nodes if node.partition(".")[0] != own), None)


if __name__ == "__main__":
    print(MARK + json.dumps(read_survey(NodeRoot.of(None), peer=find_peer(sys.argv[1:]))))
