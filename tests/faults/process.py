"""A process of the service with one fault in it, or without one of its defences.

    FAULT=after_claim:kill python -m tests.faults.process worker
    WITHOUT=epoch,reaper   python -m tests.faults.process worker.dispatch

The service itself has no hooks: whatever is bent here is bent from outside, in this process alone. What is not in
the service any more under its name fails loudly, when the process starts.
"""

import os
import sys
from importlib import import_module

from tests.faults.bend import FINISHED_IMPORTS
from tests.faults.conditions import CONDITIONS
from tests.faults.defences import DEFENCES
from tests.faults.points import POINTS, make_action

MAINS = {"app": "app.__main__", "worker": "worker.__main__", "worker.dispatch": "worker.dispatch"}


def main() -> None:
    """Import the process's program, bend it, run it."""
    name = sys.argv.pop(1)
    program = import_module(MAINS[name])
    for module in FINISHED_IMPORTS[name]:
        import_module(module)  # those that the program imports late
    condition = os.environ.get("UNDER")
    if condition:
        CONDITIONS[condition]()
    for defence in filter(None, os.environ.get("WITHOUT", "").split(",")):
        DEFENCES[defence].remove(name)
    fault = os.environ.get("FAULT")  # after the defences: it strikes in what takes their place, too
    if fault:
        point, action = fault.split(":")
        POINTS[point](make_action(point, action))
    program.main()


if __name__ == "__main__":
    main()
