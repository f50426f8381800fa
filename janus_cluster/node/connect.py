"""Phase connect: every node reaches node 0 on the master port, node 0 reaches every node back, and clocks are compared.

Node 0 listens on the port that the rendezvous will use. A peer connects, sends a port of its own and its clock;
node 0 answers with its clock and connects back. Lines of JSON; only this exchange proves that node 0 answered.
"""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from janus_cluster.node.port import create_listener
from janus_cluster.run.hosts import join_endpoint

# srun may start one node's task seconds after another's.
LIMIT_S = 15.0
_MOST_BYTES = 4096
_LOOPBACK_BYTES = 64_000_000
_POLL_S = 0.1
# How a listener for both protocols names an IPv4 peer.
_IPV4_IN_IPV6 = "::ffff:"


def exchange(*, node: str, node_rank: int, num_nodes: int, address: str, port: int, token: str) -> dict[str, Any]:
    """The report of this node for connect.<node>.json. `token` identifies the nodes of this attempt."""
    report: dict[str, Any] = {"schema_version": 1, "node": node, "port": port, "error": None}
    try:
        if node_rank == 0:
            report["peers"] = listen(port, num_peers=num_nodes - 1, token=token)
        else:
            report |= call(address, port, node=node, token=token)
    except (OSError, ValueError, KeyError) as e:
        report["error"] = _describe(e)
    return report | {"loopback_gb_per_s": measure_loopback()}


def listen(port: int, *, num_peers: int, token: str, limit_s: float = LIMIT_S) -> list[dict[str, Any]]:
    """What each peer sent, and whether it could be reached back; peers that never connected are missing."""
    deadline = time.monotonic() + limit_s
    peers: list[dict[str, Any]] = []
    # Each in a thread of its own: one that cannot be reached back takes 5 s, and the others would wait behind it.
    with create_listener(port) as server, ThreadPoolExecutor(max_workers=num_peers) as pool:
        answers: list[Future[dict[str, Any] | None]] = []
        while len(peers) < num_peers and (left := deadline - time.monotonic()) > 0:
            server.settimeout(min(left, _POLL_S))
            with contextlib.suppress(TimeoutError):
                connection, (peer_address, *_) = server.accept()
                answers.append(pool.submit(_answer, connection, peer_address.removeprefix(_IPV4_IN_IPV6), token))
            peers = [peer for answer in answers if answer.done() and (peer := answer.result()) is not None]
    return [peer for answer in answers if (peer := answer.result()) is not None]


def _answer(connection: socket.socket, address: str, token: str) -> dict[str, Any] | None:
    """The answer of this peer, and whether it could be reached back; None for a stranger."""
    with connection:
        connection.settimeout(5)
        try:
            hello = _read_line(connection)
            if hello["token"] != token:
                return None
            _write_line(connection, {"token": token, "time_s": time.time()})
            port = int(hello["port"])
        except (OSError, ValueError, KeyError, TypeError):
            return None  # a port scanner, or a job of another user
    return {"node": hello["node"], "back": join_endpoint(address, port), "error": _call_back(address, port, token)}


def _call_back(address: str, port: int, token: str) -> str | None:
    try:
        with socket.create_connection((address, port), timeout=5) as back:
            _write_line(back, {"token": token})
    except OSError as e:
        return _describe(e)
    return None


def call(address: str, port: int, *, node: str, token: str, limit_s: float = LIMIT_S) -> dict[str, Any]:
    """{clock_offset_s}: this node's clock against node 0's, after node 0 answered and called back.

    Raises: OSError with the last problem, ValueError for an answer that cannot be parsed.
    """
    deadline = time.monotonic() + limit_s
    with create_listener(0) as own:
        hello = {"token": token, "node": node, "port": own.getsockname()[1]}
        with _connect_until(address, port, deadline) as connection:
            connection.settimeout(5)
            sent_s = time.time()
            _write_line(connection, hello)
            answer = _read_line(connection)
            received_s = time.time()
        if answer.get("token") != token:
            raise ValueError("another program answered")
        own.settimeout(max(1.0, deadline - time.monotonic()))
        try:
            back, _ = own.accept()
        except TimeoutError:
            raise OSError(f"node 0 answered, but did not reach back port {hello['port']}") from None
        back.close()
    return {"clock_offset_s": (sent_s + received_s) / 2 - float(answer["time_s"])}


def _connect_until(address: str, port: int, deadline: float) -> socket.socket:
    """A connection, tried again while node 0 does not listen yet."""
    while True:
        try:
            return socket.create_connection((address, port), timeout=max(1.0, deadline - time.monotonic()))
        except OSError:
            if time.monotonic() > deadline - 0.5:
                raise
            time.sleep(0.2)


def measure_loopback() -> float | None:
    """GB/s of one TCP stream within this host: its rate without a cable."""
    try:
        with socket.create_server(("127.0.0.1", 0)) as server:
            sender = threading.Thread(target=_send_bytes, args=(server.getsockname(),), daemon=True)
            sender.start()
            server.settimeout(5)
            connection, _ = server.accept()
            with connection:
                connection.settimeout(5)
                buffer, received, begun = bytearray(1 << 20), 0, time.perf_counter()
                while count := connection.recv_into(buffer):
                    received += count
                return received / (time.perf_counter() - begun) / 1e9
    except OSError:
        return None


def _send_bytes(address: tuple[str, int]) -> None:
    chunk = bytes(1 << 20)
    try:
        with socket.create_connection(address, timeout=5) as out:
            for _ in range(_LOOPBACK_BYTES // len(chunk)):
                out.sendall(chunk)
    except OSError:
        return  # the reader reports the error


def _write_line(connection: socket.socket, value: dict[str, Any]) -> None:
    connection.sendall(json.dumps(value).encode() + b"\n")


def _read_line(connection: socket.socket) -> dict[str, Any]:
    data = b""
    while not data.endswith(b"\n") and len(data) < _MOST_BYTES:
        piece = connection.recv(_MOST_BYTES - len(data))
        if not piece:
            break
        data += piece
    value = json.loads(data)
    if not isinstance(value, dict):
        raise ValueError("not an object")
    return value


def _describe(error: Exception) -> str:
    return (error.strerror or str(error)) if isinstance(error, OSError) else f"an unexpected answer: {error}"
