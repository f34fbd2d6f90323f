"""A door in front of a server: everything goes through it, until it is told to let nothing, or not this, through.

python -m tests.faults.proxy SOCKET opens one for as long as the process lives, and prints its port.
"""

import contextlib
import signal
import socket
import sys
import threading
from pathlib import Path


class Proxy:
    """Listens on a port of this machine and passes everything on to a unix socket."""

    def __init__(self, target: Path) -> None:
        self._target = target
        self._open = threading.Event()
        self._open.set()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._connections: list[socket.socket] = []
        self._cut: tuple[bytes, bytes] | None = None
        self.num_cuts = 0
        self._ended = False
        threading.Thread(target=self._accept, daemon=True, name="proxy").start()

    def swallow(self) -> None:
        """From now on nothing comes through, in either direction, and no connection is refused or closed."""
        self._open.clear()

    def pass_on(self) -> None:
        """Let everything through again."""
        self._open.set()

    def cut_after(self, first: bytes, then: bytes) -> None:
        """Once: of a connection that has carried the first text, pass on the other too, and cut it before its answer.

        A process has more connections than one, and the other ones are of no concern.
        """
        self._cut = (first, then)

    def close(self) -> None:
        """Cut everything."""
        self._ended = True
        self._open.set()
        for each in (self._listener, *self._connections):
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()

    def _accept(self) -> None:
        while not self._ended:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            server = socket.socket(socket.AF_UNIX)
            try:
                server.connect(str(self._target))
            except OSError:
                client.close()
                continue
            self._connections += [client, server]
            cut = threading.Event()
            for source, sink, asks in ((client, server, True), (server, client, False)):
                threading.Thread(target=self._pump, args=(source, sink, asks, cut), daemon=True).start()

    def _pump(self, source: socket.socket, sink: socket.socket, asks: bool, cut: threading.Event) -> None:
        has_first = False
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                self._open.wait()
                if asks and self._cut is not None:
                    has_first = has_first or self._cut[0] in data
                    if has_first and self._cut[1] in data:
                        self._cut = None
                        self.num_cuts += 1
                        cut.set()
                if not asks and cut.is_set():
                    break  # the server has done it, and nobody hears of it
                sink.sendall(data)
        for each in (source, sink):
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)


if __name__ == "__main__":
    print(Proxy(Path(sys.argv[1])).port, flush=True)
    signal.pause()
