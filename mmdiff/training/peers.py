"""Lifelines between the processes of a run: each is notified at once when another is gone, and ends with a clear error.

JAX's coordination service does the same later, or by aborting with a stack of C++ functions: at once if process 0 is gone, as its client
then loses its connection. So every process i > 0 reaches the service through a relay of its own, which never breaks, and process 0
serves the relays at its public port:

    process i:  JAX's client -> relay at 127.0.0.1  ->  process 0, HOST:PORT: relay -> JAX's service at 127.0.0.1
                lifeline                            ->  process 0, HOST:PORT: lifeline

A lifeline begins with HELLO and the number of its process. Both ends then send a byte now and then, and LEAVING before they end as
they should. One that breaks, or is silent for too long, belongs to a process that is gone.
"""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable

HELLO = b"mmdiff  "  # 8 bytes, unlike the first of HTTP/2; the number of the process follows, 8 digits
ALIVE, LEAVING = b".", b"!"
CONNECT_SECONDS = 10.0


class Peers:
    """The lifelines and relays of one process.

    Args:
      process: its number.
      lost: called in a thread, with the number of a process that is gone; it ends this process.
      silence: seconds without a byte after which a process counts as gone.
    """

    def __init__(self, process: int, lost: Callable[[int], None], silence: float):
        self._process, self._lost, self._silence = process, lost, silence
        self._lifelines: list[socket.socket] = []
        self._closing = False

    def serve(self, port: int) -> int:
        """Process 0: takes the others' connections at `port`; returns the local port where JAX's service must listen.

        Raises:
          OSError: the port is in use.
        """
        both = socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if both else socket.AF_INET
        public = socket.create_server(("", port), family=family, dualstack_ipv6=both, backlog=1024)
        inner = _free_port()
        self._start(self._accept, public, lambda accepted: self._first(accepted, inner))
        return inner

    def connect(self, host: str, port: int) -> int:
        """Process i: waits for process 0 at HOST:PORT; returns the local port where JAX's client finds the service."""
        lifeline = _connect((host, port))
        lifeline.sendall(HELLO + b"%08d" % self._process)
        self._start(self._watch, lifeline, 0)
        relay = socket.create_server(("127.0.0.1", 0))
        self._start(self._accept, relay, lambda accepted: self._join(accepted, _connect((host, port)), hold=True))
        return relay.getsockname()[1]

    def leave(self, in_peace: bool) -> None:
        """This process ends and watches the others no more. If not `in_peace`, they will find it gone."""
        if self._closing:
            return
        self._closing = True
        for lifeline in self._lifelines if in_peace else ():
            with contextlib.suppress(OSError):
                lifeline.sendall(LEAVING)

    def _accept(self, server: socket.socket, use: Callable[[socket.socket], None]) -> None:
        while True:
            accepted, _ = server.accept()
            self._start(use, accepted)

    def _first(self, accepted: socket.socket, inner: int) -> None:
        """A connection to process 0 is a lifeline or goes to the service, by its first bytes."""
        with contextlib.suppress(OSError, ValueError):
            accepted.settimeout(self._silence)
            first = accepted.recv(16, socket.MSG_PEEK | socket.MSG_WAITALL)
            if first.startswith(HELLO):
                self._watch(accepted, int(accepted.recv(16, socket.MSG_WAITALL)[len(HELLO) :]))
            elif first:
                accepted.settimeout(None)
                self._join(accepted, _connect(("127.0.0.1", inner)), hold=False)

    def _watch(self, lifeline: socket.socket, process: int) -> None:
        _quick(lifeline)
        self._lifelines.append(lifeline)
        self._start(self._beat, lifeline)
        lifeline.settimeout(self._silence)
        received = ALIVE
        with contextlib.suppress(OSError):  # silence is a TimeoutError
            while received and LEAVING not in received:
                received = lifeline.recv(64)
        if LEAVING not in received and not self._closing:
            self._lost(process)

    def _beat(self, lifeline: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while True:
                lifeline.sendall(ALIVE)
                time.sleep(min(self._silence / 8, 5.0))

    def _join(self, near: socket.socket, far: socket.socket, hold: bool) -> None:
        """Relays between the two. With `hold`, a close of the far one is not passed on: the lifeline reports what it means."""
        _quick(near), _quick(far)
        self._start(_relay, near, far)
        _relay(far, near, close=not hold)

    @staticmethod
    def _start(target: Callable, *args: object) -> None:
        threading.Thread(target=target, args=args, daemon=True, name="mmdiff-peers").start()


def _relay(source: socket.socket, sink: socket.socket, close: bool = True) -> None:
    with contextlib.suppress(OSError):
        while received := source.recv(1 << 16):
            sink.sendall(received)
    for end in (source, sink) if close else ():
        with contextlib.suppress(OSError):
            end.shutdown(socket.SHUT_RDWR)


def _connect(where: tuple[str, int]) -> socket.socket:
    """A connection, however long it takes until somebody listens."""
    while True:
        try:
            made = socket.create_connection(where, timeout=CONNECT_SECONDS)
            made.settimeout(None)
            return made
        except OSError:
            time.sleep(0.1)


def _quick(connection: socket.socket) -> None:
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]
