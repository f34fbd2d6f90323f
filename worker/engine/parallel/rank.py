"""A rank's process: read the work, run the technique to the end of its training, as one of the group.

    python -m worker.engine.parallel.rank SPEC

It says "r" on stdout when it is ready to meet the others, and ends when its stdin does: the engine is gone then.
"""

import json
import os
import sys
import threading
import traceback
from pathlib import Path


def main() -> int:
    """Be a rank; return the exit status."""
    spec = json.loads(sys.argv[1])
    threading.Thread(target=_end_with_parent, name="end-with-parent", daemon=True).start()
    directory, rank = Path(spec["directory"]), int(spec["rank"])

    import torch

    from worker.engine.devices import prepare_device
    from worker.engine.environment import make_repeatable
    from worker.engine.failures import translate_failure
    from worker.engine.parallel.group import RankFinished, joined
    from worker.engine.parallel.launch import write_error
    from worker.engine.parallel.work import read_work
    from worker.engine.techniques.registry import TECHNIQUES

    torch.set_num_interop_threads(1)
    try:
        program, step, context = read_work(directory / "work.pt")
        make_repeatable(spec["num_threads"], context.seed)
        program.device = torch.device(spec["device"])
        prepare_device(program.device)
        os.write(1, b"r")
        os.dup2(2, 1)  # what a library prints belongs to the log
        with joined(step.parallel, rank, directory / "meeting", spec["num_threads"], program.device):
            TECHNIQUES[spec["kind"]].run(program, step, context)
    except RankFinished:
        return 0
    except Exception as failure:  # the edge of the process: rank 0 tells the user
        traceback.print_exc()
        write_error(directory, rank, failure, translate_failure(failure, spec["kind"]))
        return 1
    raise AssertionError("a technique that trains ends in its training here")


def _end_with_parent() -> None:
    os.read(0, 1)
    os._exit(3)


if __name__ == "__main__":
    sys.exit(main())
