"""The `flame` command: finds the module of a subcommand and runs it. Nothing heavy is imported before that.

A subcommand's module has ``add_arguments(parser)`` and ``main(args) -> int``. One that works on a job has an argument
`job`, and finds the settings given as ``--section.key value`` in ``args.overrides``, wherever they stood.
"""

from __future__ import annotations

import argparse
import importlib
import logging
import sys
from dataclasses import dataclass

from flame import __version__
from flame.errors import FlameError, unknown_name


@dataclass(frozen=True)
class Command:
    """A subcommand.

    Attributes:
        module: where it is.
        help: what it does, in a line.
        takes_settings: whether it works on a job whose keys can be set on the command line.
    """

    module: str
    help: str
    takes_settings: bool = False


COMMANDS = {
    "train": Command("flame.train", "train a job on this process; with several, torchrun -m flame.train", True),
    "plan": Command("flame.plan", "tell a job's parameters, FLOPs, memory and layout, without a GPU", True),
    "tokenize": Command("flame.data.tokenize", "tokenize data beforehand"),
    "train-tokenizer": Command("flame.data.train_tokenizer", "train a byte-level BPE tokenizer"),
    "convert": Command("flame.checkpoint.convert", "convert checkpoints to and from the Hugging Face format"),
    "generate": Command("flame.evaluation.generate", "continue texts with a trained model"),
    "evaluate": Command("flame.evaluation.perplexity", "loss and perplexity of a trained model on text files"),
    "doctor": Command("flame.doctor", "check every kernel against its fp64 reference on this machine"),
}

USAGE_ERROR = 2


def main(arguments: list[str] | None = None) -> int:
    """Run a subcommand. A FlameError is shown without a traceback and makes the exit code 2."""
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        return run(arguments)
    except FlameError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return USAGE_ERROR
    except BrokenPipeError:  # the reader of our output has gone, as in `flame plan JOB.toml | head`
        sys.stderr.close()
        return 1


def run(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(overview())
        return 0
    if arguments[0] == "--version":
        print(f"flame {__version__}")
        return 0
    name = arguments[0]
    if name not in COMMANDS:
        raise FlameError(unknown_name("command", name, COMMANDS))
    command = COMMANDS[name]
    module = importlib.import_module(command.module)
    parser = argparse.ArgumentParser(
        prog=f"flame {name}",
        description=(module.__doc__ or command.help).strip().splitlines()[0],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    module.add_arguments(parser)
    # Warnings of the config and the like; a command that trains sets up its own logging.
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    return module.main(parse(parser, command, arguments[1:]))


def parse(parser: argparse.ArgumentParser, command: Command, arguments: list[str]) -> argparse.Namespace:
    """Arguments of a subcommand; settings of a job may stand before, between and after the others."""
    if not command.takes_settings:
        return parser.parse_args(arguments)
    from flame.config.document import help_text
    from flame.config.entries import split_arguments

    settings, others = split_arguments(arguments)
    job_file = [setting for setting in settings if setting.startswith("--job.config_file=")]  # as in fla-org/flame
    others = [setting.partition("=")[2] for setting in job_file] + others
    if "-h" in others or "--help" in others:
        parser.epilog, others = help_text(), ["--help"]
    namespace = parser.parse_args(others)
    rest = [setting for setting in settings if setting not in job_file]
    namespace.overrides = [*rest, *(getattr(namespace, "overrides", None) or [])]
    return namespace


def overview() -> str:
    """What `flame --help` shows."""
    width = max(map(len, COMMANDS)) + 2
    lines = [f"  {name:<{width}}{command.help}" for name, command in COMMANDS.items()]
    return "\n".join(
        [
            "usage: flame COMMAND ...",
            "",
            *lines,
            "",
            "flame COMMAND --help tells what a command takes; the keys of a job",
        ]
        + ["are listed by flame train --help."]
    )


if __name__ == "__main__":
    sys.exit(main())
