"""Ranks that end together: a process that stops, for whatever reason, is not waited for."""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
import sys
import threading
import warnings
from typing import Any

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.utilities.exceptions import SIGTERMException

__all__ = ["PeerWatch"]

_GOODBYE = b"."
_JOIN = 60.0  # seconds in which all ranks must have joined


class PeerWatch(Callback):
    """Ends this rank when another one is gone; does nothing in a run of one process.

    Every rank keeps a connection to the first one. The operating system closes it when a process dies, so
    that also a killed one is noticed at once, and one on a machine without power within 40 seconds. The
    others have ``grace`` seconds to end by themselves; then they are ended, wherever they wait.

    Differs from upstream: NCCL waits ten minutes for a rank that is gone, and a process on another node, or
    one that outlives a killed first rank, is ended by nobody.

    Args:
        grace: seconds between the end of another rank and that of this one.
    """

    def __init__(self, grace: float = 15.0) -> None:
        super().__init__()
        self.grace = grace
        self._connections: dict[int, socket.socket] = {}
        self._over = threading.Event()

    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        """Connect the ranks; without a network between them there is a warning and no watch."""
        if trainer.world_size == 1:
            return
        self._over.clear()
        server: socket.socket | None = None
        told: tuple[str, int, bytes] = ("", 0, b"")
        if trainer.global_rank == 0:
            server = socket.create_server(("", 0), backlog=trainer.world_size)
            host = os.environ.get("MASTER_ADDR") or "127.0.0.1"
            told = (host, server.getsockname()[1], secrets.token_bytes(16))
        host, port, token = trainer.strategy.broadcast(told)
        try:
            if server is not None:
                self._accept(server, trainer.world_size, token)
            else:
                connection = socket.create_connection((host, port), timeout=_JOIN)
                connection.sendall(token + trainer.global_rank.to_bytes(4, "big"))
                self._connections = {0: connection}
        except OSError as error:
            warnings.warn(f"a rank that dies will not end the others: {error}", stacklevel=2)
            return
        finally:
            if server is not None:
                server.close()
        for rank, connection in self._connections.items():
            _keep_alive(connection)
            threading.Thread(target=self._listen, args=(rank, connection), daemon=True).start()

    def _accept(self, server: socket.socket, world_size: int, token: bytes) -> None:
        server.settimeout(_JOIN)
        while len(self._connections) < world_size - 1:
            connection, _ = server.accept()
            connection.settimeout(_JOIN)
            said = connection.recv(len(token) + 4, socket.MSG_WAITALL)
            if secrets.compare_digest(said[: len(token)], token):
                self._connections[int.from_bytes(said[len(token) :], "big")] = connection
            else:  # somebody else found the port
                connection.close()

    def _listen(self, rank: int, connection: socket.socket) -> None:
        connection.settimeout(None)
        try:
            said = connection.recv(1)
        except OSError:
            said = b""
        if said == _GOODBYE or self._over.is_set():
            return
        for other in list(self._connections.values()):  # the first rank passes it on
            _close(other)
        if not self._over.wait(self.grace):
            print(
                f"error: rank {rank} has stopped, see its log: this rank ends too", file=sys.stderr
            )
            sys.stderr.flush()
            os._exit(1)

    def teardown(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        """Say that this rank is done."""
        self._leave(_GOODBYE)

    def on_exception(self, trainer: Trainer, pl_module: Any, exception: BaseException) -> None:
        """Let the others know at once; of a signal they all know."""
        if isinstance(exception, SIGTERMException):
            self._leave(_GOODBYE)
        else:
            for connection in self._connections.values():
                _close(connection)

    def _leave(self, word: bytes) -> None:
        self._over.set()
        for connection in self._connections.values():
            with contextlib.suppress(OSError):
                connection.sendall(word)
            _close(connection)
        self._connections = {}


def _keep_alive(connection: socket.socket) -> None:
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (("TCP_KEEPIDLE", 10), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 6)):
        if hasattr(socket, name):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def _close(connection: socket.socket) -> None:
    with contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)  # wakes the thread that listens
    connection.close()
