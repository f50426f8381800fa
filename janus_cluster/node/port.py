"""A free TCP port for the rendezvous: derived from the job id so that jobs differ, probed so that it is really free."""

from __future__ import annotations

import contextlib
import errno
import socket

from janus_cluster.errors import JanusError

# Below Linux's default range of ephemeral ports (32768-60999), so that no outgoing connection takes it meanwhile.
_FIRST, _COUNT, _TRIES = 15000, 16000, 200
_BACKLOG = 128


def create_listener(port: int) -> socket.socket:
    """A listener on all addresses of this host, IPv4 and where it has them IPv6, as torch's own. 0: any port.

    Raises: OSError.
    """
    if socket.has_dualstack_ipv6():
        try:
            return socket.create_server(("", port), family=socket.AF_INET6, backlog=_BACKLOG, dualstack_ipv6=True)
        except OSError as e:
            # A host may have the protocol and no addresses of it.
            if e.errno == errno.EADDRINUSE:
                raise
    return socket.create_server(("", port), backlog=_BACKLOG)


def find_free_port(*, seed: int) -> int:
    """A port that could be bound on all interfaces of this host. Raises: JanusError after 200 busy ones."""
    for i in range(_TRIES):
        port = _FIRST + (seed * 131 + i * 7) % _COUNT
        # A connection of the phase before, in TIME_WAIT, blocks no port: create_server sets SO_REUSEADDR.
        with contextlib.suppress(OSError), create_listener(port):
            return port
    raise JanusError(f"no free TCP port among {_TRIES} from {_FIRST} on", hint="ss -ltn shows what listens")
