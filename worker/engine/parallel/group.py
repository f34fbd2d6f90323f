"""The ranks of a step as one of them sees them: its place in the mesh, and whom it talks to.

They talk through torch.distributed, with gloo about what lies in main memory and with NCCL about what lies on GPUs.
Neither has any authorization: the sandbox lets TCP through only where the network is the engine's own.
"""

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import FileStore
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.distributed_c10d import _set_pg_timeout

from app.recipes.parallel import Parallel
from worker.engine.devices import CPU
from worker.engine.errors import StepFailed

MEETING_SECONDS = 600.0
"""For one rank to write a checkpoint while the others wait."""
LOOPBACK = "lo" if sys.platform == "linux" else "lo0"


class RankFinished(Exception):
    """The training is over on a rank other than 0, which alone goes on with the technique."""


@dataclass
class Group:
    """All ranks. A coordinate is a rank's place on an axis of the mesh, counted from 0."""

    plan: Parallel
    rank: int
    mesh: DeviceMesh
    control: dist.ProcessGroup
    """All ranks, with gloo: for what the hosts tell each other."""
    patient: dist.ProcessGroup
    """The same, to wait in for as long as a checkpoint may take to be written."""
    device: torch.device
    """What this rank computes on."""
    waited_seconds: float = 0.0
    """Time that this rank's main thread has waited for others."""

    def coordinate(self, axis: str) -> int:
        """Return this rank's place on an axis."""
        return self.mesh.get_local_rank(axis)

    def along(self, axis: str) -> dist.ProcessGroup:
        """Return the ranks that differ from this one on an axis only."""
        return self.mesh.get_group(axis)

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Count the time of a block as waiting for others."""
        started_at = time.perf_counter()
        try:
            yield
        finally:
            self.waited_seconds += time.perf_counter() - started_at

    def sum(self, tensor: Tensor, axis: str) -> Tensor:
        """Return the sum of a tensor over an axis, without gradients; the same bits on each of its ranks."""
        result = tensor.detach().clone()
        with self.waiting():
            dist.all_reduce(result, group=self.along(axis))
        return result

    def meet(self) -> None:
        """Wait for all ranks, for as long as a checkpoint may take to be written."""
        with self.waiting():
            dist.barrier(self.patient)

    def gather(self, value: object) -> list[object]:
        """Return a small value of every rank, in their order."""
        found: list[object] = [None] * self.plan.num_ranks
        with self.waiting():
            dist.all_gather_object(found, value, group=self.control)
        return found

    def decide(self, answer: bool) -> bool:
        """Return rank 0's answer."""
        decision = torch.tensor(answer)
        with self.waiting():
            dist.broadcast(decision, 0, group=self.control)
        return bool(decision)


def spread(tensor: Tensor, source: int, ranks: dist.ProcessGroup | None = None) -> None:
    """Give every rank the bits that a tensor has on one of them; ranks None: on all. As bytes, because gloo does not
    know every type that a buffer may have."""
    own = tensor.detach().contiguous()
    dist.broadcast(as_bytes(own), group=ranks, group_src=source)
    if not tensor.is_contiguous():
        tensor.detach().copy_(own)


def as_bytes(tensor: Tensor) -> Tensor:
    """Return the memory of a contiguous tensor."""
    return tensor.reshape(-1).view(torch.uint8)


_current: list[Group] = []


def current_group() -> Group:
    """Return the group that this process is a rank of."""
    assert _current, "a step with a parallel plan runs inside `joined`"
    return _current[-1]


@contextmanager
def joined(
    plan: Parallel, rank: int, meeting_point: Path, num_threads: int, device: torch.device = CPU
) -> Iterator[Group]:
    """Be a rank for the duration of the block: meet the others at a file that all know, leave at the end."""
    os.environ["GLOO_SOCKET_IFNAME"] = os.environ["NCCL_SOCKET_IFNAME"] = LOOPBACK
    on_gpus = device.type == "cuda"
    threads_before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    store = FileStore(str(meeting_point), plan.num_ranks)
    limit = timedelta(seconds=plan.timeout_seconds)
    try:
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if on_gpus else "gloo",
            store=store,
            rank=rank,
            world_size=plan.num_ranks,
            timeout=limit,
        )
        # A group that is not told how long to wait waits for half an hour.
        control = dist.new_group(backend="gloo", timeout=limit)
        patient = dist.new_group(backend="gloo", timeout=limit + timedelta(seconds=MEETING_SECONDS))
        kind = "cuda" if on_gpus else "cpu"
        mesh = init_device_mesh(kind, tuple(plan.axes.values()), mesh_dim_names=tuple(plan.axes))
        for axis in plan.axes:
            _set_pg_timeout(limit, mesh.get_group(axis))
    except RuntimeError as failure:
        torch.set_num_threads(threads_before)
        if not any(word in str(failure) for word in ("Permission denied", "Operation not permitted", "unreachable")):
            raise
        raise StepFailed(
            f"the ranks of a parallel step cannot reach each other: {str(failure)[:300]}",
            code="no_private_network",
            fix="Run the worker where the sandbox gives the engine a network of its own (bubblewrap or namespaces, see "
            "the health page), or leave parallel out.",
        ) from failure
    group = Group(plan, rank, mesh, control, patient, device)
    _current.append(group)
    try:
        yield group
    finally:
        _current.remove(group)
        torch.set_num_threads(threads_before)
        dist.destroy_process_group()
