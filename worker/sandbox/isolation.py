"""The ways to isolate, and what each one is made of."""

from dataclasses import dataclass
from typing import Literal

Method = Literal["bubblewrap", "namespaces", "none"]


@dataclass(frozen=True)
class Isolation:
    """One way to run engines, as it was found to work on this machine."""

    method: Method
    own_user: bool
    """Engines run as a user of their own, which only root can arrange."""
    user_namespace: bool
    landlock: bool
    seccomp: bool
    linux: bool
    shared_proc: bool = False
    """/proc is the one outside, read-only: containers hide parts of theirs, and the kernel then refuses a fresh one."""
    problems: tuple[str, ...] = ()
    """Why better methods were not taken."""

    @property
    def isolates(self) -> bool:
        """Whether a stranger's model may be opened in it."""
        return self.method != "none"

    @property
    def layers(self) -> list[str]:
        """The names of the active layers, as the health page and each job show them."""
        names = []
        if self.method == "bubblewrap":
            names.append("bubblewrap")
        if self.isolates:
            names += ["user_namespace"] if self.user_namespace else []
            names += ["pid_namespace", "network_namespace", "mount_namespace", "ipc_namespace"]
        names += ["separate_user"] if self.own_user else []
        names += ["landlock"] if self.landlock else []
        names += ["seccomp"] if self.seccomp else []
        names += ["no_new_privileges"] if self.linux else []
        return [*names, "resource_limits"]


@dataclass(frozen=True)
class Limits:
    """What one engine may use."""

    memory_bytes: int | None
    file_bytes: int
    cpu_seconds: int | None = None
    num_processes: int = 1024
    num_files: int = 4096

    def as_rlimits(self, isolation: Isolation, *, gpu: bool = False) -> dict[str, int]:
        """Return the limits by the name of the kernel's resource.

        CUDA reserves addresses for all memory of the machine and its GPUs, far beyond what it uses: with a GPU the
        address space is not limited, and the memory of the host is to be limited by a control group.
        """
        limits = {"CORE": 0, "FSIZE": self.file_bytes, "NOFILE": self.num_files}
        if isolation.isolates:
            # Counted by user: only fair where the engine's user is its own, or counted within its namespace.
            limits["NPROC"] = self.num_processes
        if self.memory_bytes is not None and isolation.linux and not gpu:
            limits["AS"] = self.memory_bytes
        if self.cpu_seconds is not None:
            limits["CPU"] = self.cpu_seconds
        return limits
