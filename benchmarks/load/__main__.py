"""What the API does under load, on one machine with PostgreSQL, as a ratio to a bare FastAPI + SQLAlchemy service.

    python -m benchmarks.load [--only rates depth files] [--soak-minutes 10]

Needs nginx (apt-get install nginx-light), which need not run. Every ratio is of neighbours in time: each round lets
every kind of request run for some seconds, the bare service's among them.
"""

import argparse
import os
from contextlib import ExitStack
from pathlib import Path

from benchmarks.load.client import start_clients
from benchmarks.load.depth import measure_depths
from benchmarks.load.files import measure_files
from benchmarks.load.rates import make_cases, measure, print_rates
from benchmarks.load.soak import soak
from benchmarks.load.world import NUM_OWNERS, open_world

PARTS = ("rates", "depth", "files")
NUM_KINDS = 7
"""Of requests in the soak."""


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", choices=PARTS, default=PARTS)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=2.5, help="of each kind of request in each round")
    parser.add_argument("--connections", type=int, default=8)
    parser.add_argument("--depths", type=int, nargs="+", default=[100, 10_000], help="waiting jobs")
    parser.add_argument("--mebibytes", type=int, default=512, help="of the large file")
    parser.add_argument("--soak-minutes", type=float, default=0, help="0: none")
    parser.add_argument("--directory", type=Path, default=None, help="where everything lies for the time of the run")
    options = parser.parse_args()
    print(
        f"{os.cpu_count()} cores, one API process, {options.connections} connections of {NUM_OWNERS} owners, "
        f"{options.rounds} rounds, {options.seconds:g} s for each kind of request in each\n"
    )
    with open_world(options.directory) as world, start_clients() as clients:
        if "rates" in options.only:
            world.queue_until(options.depths[0])
            print_rates(
                measure(world, clients, make_cases(world, options.connections), options.rounds, options.seconds)
            )
            print()
        if "depth" in options.only:
            measure_depths(world, clients, options.depths, options.connections, options.rounds, options.seconds)
            print()
        if "files" in options.only:
            measure_files(world, options.mebibytes, options.rounds)
            print()
        if options.soak_minutes:
            world.queue_until(options.depths[-1])
            with ExitStack() as stack:
                several = [stack.enter_context(start_clients()) for _ in range(NUM_KINDS)]
                soak(world, several, options.soak_minutes)


if __name__ == "__main__":
    main()
