"""Free TCP ports on the loopback, below the range that outgoing connections take theirs from."""

from __future__ import annotations

import socket

from janus_cluster.errors import SandboxFailed

# Linux gives outgoing connections 32768-60999; a port from there could be taken between our look and Slurm's bind.
_FIRST, _LAST = 17000, 29999


def pick_ports(count: int, *, seed: str) -> list[int]:
    """`count` different ports on which nothing listens; the search begins at the hex seed.

    Raises:  SandboxFailed if there are not so many.
    """
    size = _LAST - _FIRST + 1
    start = int(seed, 16) % size
    found: list[int] = []
    for offset in range(size):
        port = _FIRST + (start + offset) % size
        if _is_free(port):
            found.append(port)
            if len(found) == count:
                return found
    raise SandboxFailed(f"fewer than {count} free ports in {_FIRST}-{_LAST}")


def is_loopback(host: str) -> bool:
    """Whether the host name means 127.0.0.1 alone; Debian's installer writes 127.0.1.1, a LAN has its own address."""
    try:
        found = socket.getaddrinfo(host, None, family=socket.AF_INET, type=socket.SOCK_STREAM)
    except OSError:
        return False
    return {address[0] for *_, address in found} == {"127.0.0.1"}


def _is_free(port: int) -> bool:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as s:
        s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            # On every address: slurmctld may bind there.
            s.bind(("", port))
        except OSError:
            return False
    return True
