"""Run as a script in a fresh process: load a model, run it once, print how far resident memory rose above the runtime.

    python -I memory_child.py onnxruntime|torch|aotinductor MODEL INPUTS.npz NUM_THREADS DEVICE

It imports numpy and the runtime, nothing else, because whatever is imported here would count.
"""

import json
import signal
import sys
from pathlib import Path


def die_with_parent() -> None:
    """Ask the kernel to kill this process when its parent ends (Linux only; elsewhere it ends by itself in seconds)."""
    if sys.platform == "linux":
        import ctypes

        pr_set_pdeathsig = 1
        ctypes.CDLL(None, use_errno=True).prctl(pr_set_pdeathsig, signal.SIGKILL, 0, 0, 0)


def resident_bytes(field: str) -> int:
    """Return VmRSS (now) or VmHWM (the highest so far) of this process; where there is no /proc, the highest."""
    if sys.platform != "linux":
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # Not ru_maxrss: Linux lets a child inherit its parent's peak there.
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def main() -> None:
    """Measure and print one JSON object."""
    die_with_parent()
    runtime, model, inputs, num_threads, device = sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4]), sys.argv[5]
    device_bytes = None
    import numpy as np

    with np.load(inputs, allow_pickle=False) as file:
        arrays = {name: file[name] for name in file.files}
    if runtime == "onnxruntime":
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = num_threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        before = resident_bytes("VmRSS")
        session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        kept = {each.name for each in session.get_inputs()}
        session.run(None, {name: array for name, array in arrays.items() if name in kept})
    else:
        import torch
        import torch.export

        torch.set_num_threads(num_threads)
        # The driver's own memory on the host belongs to the bare runtime.
        torch.zeros(1, device=device)
        before = resident_bytes("VmRSS")
        if runtime == "aotinductor":
            loader = torch._C._aoti.AOTIModelPackageLoader(model, "model", False, 1, -1)
        else:
            program = torch.export.load(model)
            if device != "cpu":
                from torch.export.passes import move_to_device_pass

                program = move_to_device_pass(program, device)
            module = program.module()
        with torch.inference_mode():
            tensors = [torch.from_numpy(array).to(device) for array in arrays.values()]
            if runtime == "aotinductor":
                loader.run(tensors)
            else:
                module(*tensors)
        if device != "cpu":
            torch.cuda.synchronize()
            device_bytes = torch.cuda.max_memory_allocated()
    print(json.dumps({"host_bytes": max(resident_bytes("VmHWM") - before, 0), "device_bytes": device_bytes}))


if __name__ == "__main__":
    main()
