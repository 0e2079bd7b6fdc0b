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
    ).required = False  # argparse would ask for it beside a missing job


def main(args: argparse.Namespace) -> int:
    """Run the job; 0 when it is done or was asked to stop, 1 when it could not go on."""
    # Read when torch loads its threads. Spinning threads that wait for one another on busy cores are 20 times slower.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    start_logging()
    try:
        run(args.job, args.overrides)
    except FlameError as error:
        # No waiting for other ranks here: those that have not met the error wait in vain for this one.
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 1
    return 0


def run(path: str, overrides: list[str]) -> None:
    """Train the job in file `path`; under torchrun, an error of any rank shows up in its summary."""
    from torch.distributed.elastic.multiprocessing.errors import record

    from flame.config import load_job
    from flame.parallel import distributed
    from flame.trainer import Trainer

    @record
    def train() -> None:
        try:
            job = load_job(path, overrides)
            world = distributed.initialize(job.comm)
            Trainer(job, world).train()
            distributed.shut_down()
        except FlameError as error:
            # The summary shows every rank's; the text says all there is to say.
            raise error.with_traceback(None) from None

    train()


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
