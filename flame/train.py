"""Train: `torchrun -m flame.train JOB.toml [--section.key value ...]`, or plain `python -m flame.train` on one device."""

from __future__ import annotations

import argparse
import logging
import os
import sys

from flame.errors import FlameError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `flame train`."""
    parser.add_argument("job", help="job file (TOML)")
    parser.add_argument(
        "overrides", nargs=argparse.REMAINDER, metavar="--section.key value", help="any key of the job file"
    )


def main(args: argparse.Namespace) -> int:
    """Run the job; 0 when it is done or was asked to stop, 1 when it could not go on."""
    # Read when torch loads its threads. Spinning threads that wait for one another on busy cores are 20 times slower.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from flame.config import load_job
    from flame.parallel import distributed
    from flame.trainer import Trainer

    start_logging()
    try:
        job = load_job(args.job, args.overrides)
        world = distributed.initialize(job.comm.init_timeout_seconds)
        Trainer(job, world).train()
    except FlameError as error:
        # Every rank meets the same error; ranks that do not would wait in vain for this one, so leave at once.
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 1
    distributed.shut_down()
    return 0


def start_logging() -> None:
    """Rank 0 tells how training goes, the others only what is wrong."""
    level = logging.INFO if os.environ.get("RANK", "0") == "0" else logging.WARNING
    logging.basicConfig(
        level=level, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", stream=sys.stdout, force=True
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="flame train", description=__doc__)
    add_arguments(parser)
    sys.exit(main(parser.parse_args()))
