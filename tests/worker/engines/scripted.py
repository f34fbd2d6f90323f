"""An engine that acts out faults: it keeps the protocol and does what the "model" tells it, a JSON list of acts.

python scripted.py DIR MARKER
"""

import json
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from hashlib import sha256
from pathlib import Path
from typing import Any

Act = list[Any]

SLEEPER = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"

MEASUREMENT = {
    "quality": None,
    "latency": {
        "batch_size": 1, "num_threads": 1, "num_runs": 10, "p50_ms": 1.0, "p90_ms": 1.0, "p99_ms": 1.0, "mean_ms": 1.0,
    },
    "throughput_per_second": 1.0, "peak_memory_bytes": 1, "file_bytes": 1, "parameters": 1, "nonzero_parameters": 1,
    "macs": None,
}  # fmt: skip
METRICS = {
    "baseline": MEASUREMENT,
    "result": MEASUREMENT,
    "comparison": {
        "latency_ratio": {"value": 1.0, "low": 1.0, "high": 1.0}, "file_ratio": 1.0, "parameters_ratio": 1.0,
        "macs_ratio": None, "peak_memory_ratio": None, "quality_change": None, "equivalence": [],
    },
    "steps": [],
    "layers": [],
    "verdict": {"outcome": "no_difference", "summary": "acted out"},
    "environment": {"processor": "none", "num_cores": 1, "runtime": "none", "num_threads": 1, "versions": {}},
}  # fmt: skip
FACTS = {
    "inputs": [], "outputs": [], "dynamic_batch": True, "batch_size": None, "exported_in": "eval", "parameters": 1,
    "buffers": 0, "parameter_bytes": 4, "macs": None, "uncounted_operators": [], "layers": [], "tied": [],
    "capabilities": [],
}  # fmt: skip


class Actor:
    """The acts, one method each."""

    def __init__(self, directory: Path, marker: str, plan: dict[str, Any]) -> None:
        self.directory = directory
        self.marker = marker
        self.plan = plan

    def say(self, stage: str, fraction: float = 0.0, **more: object) -> None:
        print(json.dumps({"stage": stage, "fraction": fraction, **more}), flush=True)

    def show_devices(self) -> None:
        self.say("devices", message=os.environ["CUDA_VISIBLE_DEVICES"])

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds)

    def count(self, steps: int, seconds: float) -> None:
        for step in range(steps):
            self.say(f"step_{step}", step / steps)
            time.sleep(seconds)

    def ignore_sigterm(self) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)

    def leave_grandchild(self) -> None:
        subprocess.Popen([sys.executable, "-S", "-c", SLEEPER, self.marker], start_new_session=True)

    def exit(self, status: int) -> None:
        os._exit(status)

    def exit_in_thread(self) -> None:
        thread = threading.Thread(target=sys.exit, args=(3,))
        thread.start()
        thread.join()

    def kill_self(self, number: int) -> None:
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        signal.signal(number, signal.SIG_DFL) if number != signal.SIGKILL else None
        subprocess.run(["/bin/kill", f"-{number}", str(os.getpid())], check=True)
        time.sleep(5)

    def print_raw(self, text: str, times: int = 1) -> None:
        for _ in range(times):
            os.write(1, text.encode())

    def flood(self, stream: int, megabytes: int) -> None:
        block = (b"x" * 99 + b"\n") * 10486
        for _ in range(megabytes):
            os.write(stream, block)

    def allocate(self, size_bytes: int) -> None:
        self.block = bytearray(size_bytes)

    def fill_gpu(self, block_bytes: int, blocks: int) -> None:
        """Allocate and write block after block on the first GPU, and say how far it is."""
        import torch

        self.blocks = []
        for number in range(blocks):
            self.blocks.append(torch.ones(block_bytes, dtype=torch.uint8, device="cuda"))
            torch.cuda.synchronize()
            self.say("filling", message=str(number + 1))

    def write(self, name: str, text: str) -> None:
        path = self.directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    def write_bytes(self, name: str, size_bytes: int) -> None:
        with (self.directory / name).open("wb") as file:
            for _ in range(size_bytes // 2**20):
                file.write(b"\1" * 2**20)

    def link(self, target: str, name: str) -> None:
        path = self.directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.symlink_to(target)

    def lock_directory(self, name: str) -> None:
        path = self.directory / name
        (path / "inner").mkdir(parents=True)
        (path / "inner" / "file").write_text("x")
        (path / "inner").chmod(0)
        path.chmod(0)

    def nest(self, name: str, depth: int) -> None:
        """Folders in each other, deeper than a path can name and than a function can call itself."""
        os.chdir(self.directory / name)
        for _ in range(depth):
            Path("d").mkdir()
            os.chdir("d")

    def many_folders(self, name: str, count: int) -> None:
        for number in range(count):
            (self.directory / name / str(number)).mkdir()

    def hide(self, name: str, size_bytes: int) -> None:
        """A folder that can be written to but not listed."""
        (self.directory / name).mkdir()
        self.write_bytes(f"{name}/file", size_bytes)
        (self.directory / name).chmod(0o300)

    def hole(self, size_bytes: int) -> None:
        """Claim a file that is long and takes no space."""
        path = self.directory / "out" / "artifacts" / "model.onnx"
        path.parent.mkdir(parents=True)
        with path.open("wb") as file:
            file.truncate(size_bytes)
        told = {"name": path.name, "media_type": "a/b", "size_bytes": size_bytes, "sha256": "0" * 64}
        self.result({"metrics": METRICS, "artifacts": [told]})

    def fork_bomb(self) -> None:
        started = []
        try:
            while True:
                started.append(subprocess.Popen(["/bin/sleep", "600"]))
        except OSError as error:
            print(f"fork stopped after {len(started)}: {error}", file=sys.stderr, flush=True)

    def open_files(self) -> None:
        opened = []
        try:
            while True:
                opened.append(os.open("/dev/null", os.O_RDONLY))
        except OSError as error:
            for handle in opened[-10:]:
                os.close(handle)
            print(f"stopped at {len(opened)} files: {error}", file=sys.stderr, flush=True)

    def spin(self) -> None:
        while True:
            pass

    def take_signals(self) -> None:
        """Let a file that grows too large end the process, as it does where nobody looks."""
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)

    def many_artifacts(self, count: int, name: str = "") -> None:
        told = [{"name": name or f"{number}.onnx", "media_type": "a/b", "size_bytes": 1, "sha256": "0" * 64}
                for number in range(count)]  # fmt: skip
        self.result({"metrics": METRICS, "artifacts": told})

    def hard_link(self) -> None:
        """Two names of one file."""
        path = self.directory / "out" / "artifacts" / "model.onnx"
        path.parent.mkdir(parents=True)
        path.write_text("artifact")
        os.link(path, self.directory / "out" / "other")

    def pipe(self) -> None:
        path = self.directory / "out" / "artifacts" / "model.onnx"
        path.parent.mkdir(parents=True)
        os.mkfifo(path)

    def artifact(self, text: str = "artifact", name: str = "model.onnx", **lies: object) -> None:
        """Finish well, or nearly: `lies` replace what the result truly is."""
        path = self.directory / "out" / "artifacts" / "model.onnx"
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.is_symlink() and not path.is_fifo():
            path.write_text(text)
        told = {
            "name": name,
            "media_type": "application/octet-stream",
            "size_bytes": len(text),
            "sha256": sha256(text.encode()).hexdigest(),
            **lies,
        }
        self.result({"metrics": METRICS, "artifacts": [told]})

    def result(self, result: object) -> None:
        (self.directory / "out" / "result.json").write_text(json.dumps(result))

    def checkpoint(self, text: str, step: int = 0, **lies: object) -> None:
        """Write a checkpoint and tell of it."""
        folder = self.directory / "out" / "checkpoints"
        folder.mkdir(exist_ok=True)
        name = f"{len(list(folder.iterdir()))}-{os.getpid()}-{time.monotonic_ns()}"
        (folder / name).write_text(text)
        digest = sha256(text.encode()).hexdigest()
        told = {"name": name, "size_bytes": len(text), "sha256": digest, **lies}
        self.say("training", 0.25, step=step, checkpoint=told)

    def wait_for_stop(self, text: str) -> None:
        """Train until the worker stops; then write a checkpoint and end."""
        assert sys.stdin.readline() == "stop\n"
        self.checkpoint(text)
        os._exit(75)

    def unless_resumed(self, acts: list[Act]) -> None:
        """Do these where there is nothing to go on from; else tell what there is."""
        names = self.plan["checkpoints"]
        if not names:
            return self.act(acts)
        texts = [(self.directory / "in" / name).read_text() for name in names]
        self.say("training", 0.5, step=0, resumed=names[0], message=" ".join(texts))

    def unless_split(self, acts: list[Act]) -> None:
        """Do these where batches are as large as the recipe says."""
        if self.plan["split_batches"] == 1:
            self.act(acts)

    def print_error(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    def out_of_memory(self) -> None:
        self.result({"error": {"code": "out_of_memory", "detail": "memory ran out", "fix": "none"}})
        os._exit(0)

    def act(self, acts: list[Act]) -> None:
        """Do one act after the other."""
        for name, *arguments in acts:
            takes_names = name in ("artifact", "checkpoint", "say") and arguments and isinstance(arguments[-1], dict)
            named = arguments.pop() if takes_names else {}
            getattr(self, name)(*arguments, **named)

    def finish(self) -> None:
        """Finish well, whatever the action is."""
        if self.plan["action"] == "check_model":
            self.result({"model": FACTS})
        else:
            self.artifact()


def main() -> None:
    """Keep the protocol."""
    directory, marker = Path(sys.argv[1]), sys.argv[2]
    if any("canary-of-" in value for value in os.environ.values()):
        sys.exit("a secret of the service is in the environment of an engine")
    print('{"stage": "ready", "fraction": 0}', flush=True)
    if sys.stdin.readline() != "go\n":
        return
    plan = json.loads((directory / "in" / "plan.json").read_text())
    actor = Actor(directory, marker, plan)
    actor.say("started")
    if plan["action"] == "verify":
        broken = [name for name in plan["artifacts"] if "broken" in (directory / "in" / name).read_text()]
        error = {"code": "verification_failed", "detail": f"broken: {broken}", "fix": "none"} if broken else None
        actor.result({"error": error})
        return
    actor.act(json.loads((directory / "in" / plan["model"]["file"]).read_text()))


if __name__ == "__main__":
    main()
