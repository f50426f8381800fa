"""A free TCP port for the rendezvous: derived from the job id so that jobs differ, probed so that it is really free."""

from __future__ import annotations

import socket

from janus_cluster.errors import JanusError

# Below Linux's default range of ephemeral ports (32768-60999), so that no outgoing connection takes it meanwhile.
_FIRST, _COUNT, _TRIES = 15000, 16000, 200


def find_free_port(*, seed: int) -> int:
    """A port that could be bound on all interfaces of this host just now. Raises: JanusError after 200 busy ones."""
    for i in range(_TRIES):
        port = _FIRST + (seed * 131 + i * 7) % _COUNT
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
            # As the listeners that follow do: a connection of the phase before, in TIME_WAIT, takes no port away.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("", port))
                probe.listen()
            except OSError:
                continue
        return port
    raise JanusError(f"no free TCP port among {_TRIES} from {_FIRST} on", hint="ss -ltn shows what listens")
