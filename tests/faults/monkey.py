"""Who breaks things at random, keeps count, and makes good what would stay broken."""

import random
import signal
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress

import redis
from sqlalchemy import make_url

from tests.faults.cases_jobs import children_of, send
from tests.faults.stack import Stack
from tests.worker.conftest import find_processes
from worker.children import Child

NUM_WORKERS = 3


class Monkey:
    """Acts on one service. What it stops or kills, it starts again after a while, as an init system would."""

    def __init__(self, stack: Stack, source: random.Random, *, tiny_disk: bool) -> None:
        self._stack = stack
        self._random = source
        self.counts: Counter[str] = Counter()
        self._later: list[tuple[float, Callable[[], None]]] = []
        self._database_is_well = True
        self._actions: list[tuple[int, Callable[[], None]]] = [
            (4, self.kill_supervisor), (2, self.kill_worker), (2, self.stop_worker_softly), (6, self.kill_engine),
            (4, self.pause_supervisor), (1, self.pause_worker), (2, self.kill_dispatcher), (1, self.kill_api),
            (2, self.wipe_broker), (2, self.kill_broker), (2, self.pause_broker), (4, self.repeat_messages),
        ]  # fmt: skip
        if stack.postgres is not None:
            self._actions += [(2, self.crash_database), (2, self.pause_database), (2, self.cut_database)]
        if tiny_disk:
            self._actions += [(2, self.fill_disk)]

    def start_all(self) -> None:
        """Start the whole service."""
        self._stack.start_api()
        self._stack.start("worker.dispatch")
        for number in range(NUM_WORKERS):
            self._stack.start(PARE_WORKER_CONCURRENCY="2" if number == 0 else "1")

    def act(self) -> None:
        """Do one thing, after a while."""
        until = time.monotonic() + self._random.uniform(0.5, 4)
        while time.monotonic() < until:
            self.revive()
            time.sleep(0.05)
        weights, actions = zip(*self._actions, strict=True)
        self._random.choices(actions, weights)[0]()

    def revive(self) -> None:
        """Do what is due: let go on what is paused, start what has ended."""
        due_at = time.monotonic()
        due = [each for each in self._later if each[0] <= due_at]
        self._later = [each for each in self._later if each[0] > due_at]
        for _, undo in due:
            undo()
        for child in self._stack.children:
            if child.process is not None and child.process.poll() is not None:
                child.process = None  # what it has left behind must end by itself
                self._after(0.2, 3, child.start)

    def heal(self) -> None:
        """Make everything good at once."""
        self._later = [(0.0, undo) for _, undo in self._later]
        self.revive()

    def _note(self, what: str) -> None:
        self.counts[f"fault: {what}"] += 1

    def _after(self, low: float, high: float, undo: Callable[[], None]) -> None:
        self._later.append((time.monotonic() + self._random.uniform(low, high), undo))

    def _find(self, name: str) -> Child | None:
        alive = [child for child in self._stack.children if child.name == name and child.process is not None]
        return self._random.choice(alive) if alive else None

    def _signal_main(self, name: str, number: int, what: str) -> None:
        child = self._find(name)
        if child is not None and child.process is not None and child.process.poll() is None:
            send(number, child.process.pid)
            self._note(what)

    def _pick_supervisor(self) -> int | None:
        child = self._find("worker")
        if child is None or child.process is None:
            return None
        with suppress(FileNotFoundError):
            supervisors = children_of(child.process.pid)
            return self._random.choice(supervisors) if supervisors else None
        return None

    def kill_supervisor(self) -> None:
        process = self._pick_supervisor()
        if process is not None:
            send(signal.SIGKILL, process)
            self._note("supervisor killed")

    def kill_worker(self) -> None:
        self._signal_main("worker", signal.SIGKILL, "worker killed")

    def stop_worker_softly(self) -> None:
        self._signal_main("worker", signal.SIGTERM, "worker told to stop")

    def kill_dispatcher(self) -> None:
        self._signal_main("worker.dispatch", signal.SIGKILL, "dispatcher killed")

    def kill_api(self) -> None:
        self._signal_main("app", signal.SIGKILL, "API killed")

    def kill_engine(self) -> None:
        engines = find_processes(self._stack.bench.marker)
        if engines:
            send(signal.SIGKILL, self._random.choice(sorted(engines)))
            self._note("engine's process killed")

    def pause_supervisor(self) -> None:
        process = self._pick_supervisor()
        if process is not None:
            self._pause(process, 0.5, 9)
            self._note("supervisor paused")

    def pause_worker(self) -> None:
        child = self._find("worker")
        if child is not None and child.process is not None:
            self._pause(child.process.pid, 0.5, 5)
            self._note("worker's main process paused")

    def _pause(self, process: int, low: float, high: float) -> None:
        send(signal.SIGSTOP, process)
        self._after(low, high, lambda: send(signal.SIGCONT, process))

    def wipe_broker(self) -> None:
        with suppress(redis.RedisError, OSError), self._client() as client:
            client.flushall()
            self._note("broker wiped")

    def kill_broker(self) -> None:
        child = self._stack.broker.child
        if child.process is None or child.process.poll() is not None:
            return
        child.process.kill()
        child.process.wait()
        for path in (self._stack.directory / "broker" / "appendonlydir").iterdir():
            path.unlink()
        self._note("broker killed, empty when it is back")
        self._after(0.2, 4, self._stack.broker.start)

    def pause_broker(self) -> None:
        process = self._stack.broker.child.process
        if process is not None and process.poll() is None:
            self._pause(process.pid, 0.5, 6)
            self._note("broker paused")

    def repeat_messages(self) -> None:
        job_ids = sorted(self._stack.history.accepted)[-20:]
        if not job_ids:
            return
        with suppress(Exception):  # the broker may be away: then nothing is repeated
            with self._client() as client:
                client.ping()
            for _ in range(10):
                self._stack.broker.send(self._random.choice(job_ids))
            self._note("ten messages repeated")

    def _client(self) -> redis.Redis:
        return redis.Redis(unix_socket_path=str(self._stack.broker.embedded.socket), socket_timeout=0.5)

    def crash_database(self) -> None:
        server = self._stack.postgres
        assert server is not None
        if self._database_is_well:
            server.stop(signal.SIGQUIT)
            self._note("database crashed")
            self._mend_database(server.start)

    def pause_database(self) -> None:
        server = self._stack.postgres
        assert server is not None
        if self._database_is_well:
            server.signal_all(signal.SIGSTOP)
            self._note("database paused")
            self._mend_database(lambda: server.signal_all(signal.SIGCONT))

    def _mend_database(self, undo: Callable[[], None]) -> None:
        def mend() -> None:
            undo()
            self._database_is_well = True

        self._database_is_well = False
        self._after(0.2, 6, mend)

    def cut_database(self) -> None:
        server = self._stack.postgres
        assert server is not None
        if self._database_is_well:
            name = make_url(self._stack.bench.database.url).database
            server.execute(f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '{name}'")
            self._note("database connections cut")

    def fill_disk(self) -> None:
        ballast = self._stack.directory / "store" / "ballast"
        with suppress(OSError), ballast.open("wb") as file:
            while True:
                file.write(b"\0" * 2**20)
        self._note("store's disk filled")
        self._after(0.5, 4, lambda: ballast.unlink(missing_ok=True))
