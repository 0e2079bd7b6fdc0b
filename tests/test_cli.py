"""The `flame` command."""

import argparse
import subprocess
import sys
import types

import pytest

from flame import cli
from flame.errors import ConfigError


@pytest.fixture
def command(monkeypatch):
    """A subcommand `probe` that works on a job and records its arguments."""
    module = types.ModuleType("flame.probe", doc="Probe the command line.\n\nMore.")
    module.seen = []
    module.error = None

    def add_arguments(parser):
        parser.add_argument("job")
        parser.add_argument("overrides", nargs=argparse.REMAINDER)
        parser.add_argument("--world-size", type=int, default=1)

    def main(args):
        module.seen.append(args)
        if module.error:
            raise module.error
        return 7

    module.add_arguments, module.main = add_arguments, main
    monkeypatch.setitem(sys.modules, "flame.probe", module)
    monkeypatch.setitem(cli.COMMANDS, "probe", cli.Command("flame.probe", "probe", takes_settings=True))
    return module


@pytest.mark.parametrize(
    "arguments",
    [
        ["job.toml", "--training.steps", "3", "--checkpoint.enable"],
        ["--training.steps", "3", "--checkpoint.enable", "job.toml"],
        ["--training.steps=3", "job.toml", "--checkpoint.enable"],
        ["--job.config_file", "job.toml", "--training.steps", "3", "--checkpoint.enable"],
    ],
)
def test_settings_may_stand_anywhere(command, arguments):
    assert cli.main(["probe", *arguments]) == 7
    (args,) = command.seen
    assert args.job == "job.toml" and args.overrides == ["--training.steps=3", "--checkpoint.enable"]


def test_own_options_and_settings_mix(command):
    assert cli.main(["probe", "--world-size", "8", "job.toml", "--training.steps", "3"]) == 7
    assert command.seen[0].world_size == 8 and command.seen[0].overrides == ["--training.steps=3"]


def test_errors_for_the_user_have_no_traceback_and_exit_code_2(command, capsys):
    command.error = ConfigError("the key is wrong")
    assert cli.main(["probe", "job.toml"]) == 2
    assert capsys.readouterr().err == "error: the key is wrong\n"


def test_other_errors_keep_their_traceback(command):
    command.error = RuntimeError("a bug")
    with pytest.raises(RuntimeError):
        cli.main(["probe", "job.toml"])


def test_a_missing_job_is_all_that_is_asked_for(capsys):
    with pytest.raises(SystemExit):
        cli.main(["train"])
    assert capsys.readouterr().err.endswith("the following arguments are required: job\n")


def test_unknown_command_suggests_the_nearest(capsys):
    assert cli.main(["trian"]) == 2
    assert "did you mean 'train'?" in capsys.readouterr().err


def test_help_lists_commands_and_keys(command, capsys):
    assert cli.main(["--help"]) == 0
    overview = capsys.readouterr().out
    assert all(name in overview for name in cli.COMMANDS)
    with pytest.raises(SystemExit) as stop:
        cli.main(["probe", "job.toml", "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert "Probe the command line." in text and "--training.seq_len (default: 2048)" in text


def test_starting_the_command_imports_nothing_heavy():
    code = "import sys, flame.cli; flame.cli.main(['--help']); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], stdout=subprocess.DEVNULL, check=False).returncode == 0


def test_python_dash_m_flame_is_the_command():
    result = subprocess.run([sys.executable, "-m", "flame", "--version"], capture_output=True, text=True, check=False)
    assert result.returncode == 0 and result.stdout.startswith("flame ")
