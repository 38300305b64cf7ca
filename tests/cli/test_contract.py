"""The command line's contract: streams, exit codes, error form, strictness, speed."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer

from epctl import cli, errors
from epctl.errors import EXIT_CODE_MEANING, ExitCode

Result = subprocess.CompletedProcess[str]


def epctl(*arguments: str, **environment: str) -> Result:
    return subprocess.run(
        [sys.executable, "-m", "epctl", *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "COLUMNS": "100", **environment},
    )


def test_help_lists_commands_and_exit_codes() -> None:
    result = epctl("--help")
    assert result.returncode == 0
    assert "train" in result.stdout
    flat = " ".join(result.stdout.split())
    for code, meaning in EXIT_CODE_MEANING.items():
        assert f"{int(code)} {meaning}" in flat


def test_help_is_fast_and_never_loads_torch() -> None:
    program = (
        "import sys, time; started = time.process_time()\n"
        "from epctl.cli import app\n"
        "try: app(['train', '--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'deepspeed', 'transformers', 'triton', 'matplotlib'}\n"
        "heavy &= set(sys.modules)\n"
        "print('HEAVY', sorted(heavy), file=sys.stderr)"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert "HEAVY []" in result.stderr
    # Processor time: other tests may share the machine.
    seconds = []
    for _ in range(5):
        before = children_seconds()
        epctl("--help")
        seconds.append(children_seconds() - before)
    assert 0 < min(seconds) < 0.5


def children_seconds() -> float:
    """Processor seconds of all ended children."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def test_no_command_shows_help_and_an_unknown_one_is_a_usage_error() -> None:
    assert "Usage" in epctl().stdout + epctl().stderr
    result = epctl("tarin")
    assert result.returncode == ExitCode.USAGE
    assert result.stdout == ""
    assert "train" in result.stderr  # did you mean


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["--nope"], ExitCode.USAGE, "No such option"),
        (["--ep=0"], ExitCode.CONFIG, "`parallel.ep` = 0 (flag)"),
        (["--zero=4"], ExitCode.CONFIG, "`parallel.zero` = 4 (flag)"),
        (["--optim=mu0n"], ExitCode.CONFIG, "`optim.name` = 'mu0n' (flag)"),
        (["--ep=3"], ExitCode.CONFIG, "does not divide the 64 routed experts"),
        (["--ep=4", "--num-ranks=6"], ExitCode.CONFIG, "4 does not divide the 6 ranks"),
        (["--ep=128"], ExitCode.CONFIG, "128 does not divide the 64 routed experts"),
        (["--device=cuda"], ExitCode.CONFIG, "there is no GPU"),
        (["--set=optim.lrr=1"], ExitCode.CONFIG, "unknown setting `optim.lrr` (--set)"),
        (["--config=absent.toml"], ExitCode.CONFIG, "cannot read config file `absent.toml`"),
        (["--output=/proc/nope"], ExitCode.CONFIG, "cannot create run folder `/proc/nope`"),
    ],
    ids=lambda value: "".join(value) if isinstance(value, list) else None,
)
def test_bad_input_has_its_code_and_says_the_numbers(
    arguments: list[str], code: ExitCode, said: str
) -> None:
    result = epctl("train", *arguments, CUDA_VISIBLE_DEVICES="")
    assert result.returncode == code, result.stderr
    assert said in result.stderr
    assert result.stdout == ""
    assert "Traceback" not in result.stderr


def test_error_form_is_message_blank_line_hint() -> None:
    lines = epctl("train", "--set=optim.lrr=1").stderr.splitlines()
    assert lines[0] == "error: unknown setting `optim.lrr` (--set)"
    assert lines[1] == ""
    assert lines[2].startswith("hint: did you mean `optim.lr`? valid: optim.name, optim.lr,")


def test_more_ranks_than_gpus_is_a_resource_error(tmp_path: Path) -> None:
    """A stand-in nvidia-smi lists two GPUs."""
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\nprintf 'GPU 0: A\\nGPU 1: B\\n'\n")
    program.chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    environment = {key: value for key, value in os.environ.items() if key != "CUDA_VISIBLE_DEVICES"}
    hints = {
        ("--ep=4",): "hint: use `--ep 2`, or `--device cpu`",
        ("--ep=1", "--num-ranks=3"): "hint: use `--ep 1 --num-ranks 2`, or `--device cpu`",
    }
    for arguments, hint in hints.items():
        result = subprocess.run(
            [sys.executable, "-m", "epctl", "train", *arguments],
            capture_output=True,
            text=True,
            env={**environment, "PATH": path},
        )
        assert result.returncode == ExitCode.RESOURCE
        assert "this machine offers 2 (nvidia-smi lists 2)" in result.stderr
        assert hint in result.stderr


def test_traceback_only_with_epctl_debug(tmp_path: Path) -> None:
    quiet = epctl("train", "--ep=3")
    loud = epctl("train", "--ep=3", EPCTL_DEBUG="1")
    assert "Traceback" not in quiet.stderr
    assert "Traceback" in loud.stderr
    assert quiet.returncode == loud.returncode == ExitCode.CONFIG


def test_every_exception_class_maps_to_its_exit_code(capsys: pytest.CaptureFixture[str]) -> None:
    cases: dict[type[BaseException], int] = {
        errors.ConfigError: 3,
        errors.InputError: 4,
        errors.LayoutError: 4,
        errors.HubError: 5,
        errors.ResourceError: 6,
        errors.GateError: 7,
        ZeroDivisionError: 1,
        KeyboardInterrupt: 130,
    }
    for kind, code in cases.items():
        assert exit_code_of_command(kind("what failed")) == code
        if kind is not KeyboardInterrupt:
            assert "what failed" in capsys.readouterr().err
    assert exit_code_of_command(errors.LaunchError("rank 1 died", exit_code=137)) == 137
    for kind in (errors.ConfigError, errors.InputError, errors.ResourceError):
        assert issubclass(kind, ValueError)


def exit_code_of_command(error: BaseException) -> int:
    """Runs a throw-away app with epctl's own group, whose only command raises `error`."""
    app = typer.Typer(cls=cli.GuardedGroup, pretty_exceptions_enable=False)

    @app.callback()
    def root() -> None: ...

    @app.command()
    def fail() -> None:
        raise error

    with pytest.raises(SystemExit) as stopped:
        app(["fail"])
    return int(stopped.value.code or 0)


def test_dry_run_shows_sources_and_touches_nothing(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text("[optim]\nlr = 0.005\nschedule = 'wsd'\n[train]\nsteps = 7\n")
    flags = ["--ep=4", f"--config={file}", "--dry-run", "--json", "--device=cpu"]
    command = [sys.executable, "-m", "epctl", "train", *flags, "--set", "optim.lr=0.003"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    document: dict[str, Any] = json.loads(result.stdout)
    assert document["config"]["optim.lr"] == {"value": 0.003, "source": "--set"}
    assert document["config"]["train.steps"] == {"value": 7, "source": f"file {file}"}
    assert document["config"]["parallel.ep"] == {"value": 4, "source": "flag"}
    assert document["config"]["optim.beta1"]["source"] == "default"
    stage = document["config"]["parallel.zero"]
    assert stage["source"] == "plan"  # not stated, so the planner's
    assert document["deepspeed"]["zero_optimization"]["stage"] == stage["value"]
    assert "--nproc-per-node=4" in document["command"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run.toml"]


def test_a_missing_train_extra_is_said_with_the_command_that_helps() -> None:
    program = (
        "import importlib.util, sys\n"
        "find = importlib.util.find_spec\n"
        "importlib.util.find_spec = lambda name, *a: None if name == 'torch' else find(name, *a)\n"
        "sys.argv = ['epctl', 'train', '--dry-run', '--device', 'cpu']\n"
        "from epctl.cli import main\n"
        "main()"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.returncode == ExitCode.CONFIG
    assert "error: training needs `torch`, not installed here" in result.stderr
    assert "hint: `pip install 'epctl[train]'`" in result.stderr


@pytest.mark.parametrize("encoding", ["latin-1", "ascii"])
def test_a_terminal_without_utf8_gets_replacements_not_a_crash(encoding: str) -> None:
    human = epctl("inspect", "moonshotai/Moonlight-16B-A3B", PYTHONIOENCODING=encoding)
    assert human.returncode == 0, human.stderr
    machine = epctl("inspect", "moonshotai/Moonlight-16B-A3B", "--json", PYTHONIOENCODING=encoding)
    assert json.loads(machine.stdout)["moe"]["num_experts"] == 64


def test_ignored_setting_is_warned_of(tmp_path: Path) -> None:
    result = epctl(
        "train", "--optim=adamw", "--set=optim.momentum=0.9", "--dry-run", "--device=cpu"
    )
    assert "warning: `optim.momentum` is ignored: the optimizer is adamw" in result.stderr


def test_every_example_in_help_parses() -> None:
    """Each example line of every command, also of sub-commands, runs through the parser."""
    import shlex

    group: Any = typer.main.get_command(cli.app)
    lines = [line for command in all_commands(group) for line in example_lines(command)]
    assert len(lines) >= 20
    for line in lines:
        command, arguments = group, shlex.split(line)[1:]
        while hasattr(command, "commands"):
            command, arguments = command.commands[arguments[0]], arguments[1:]
        assert command.make_context(line, arguments).params, line


def all_commands(command: Any) -> list[Any]:
    children = getattr(command, "commands", {}).values()
    return [command, *(found for child in children for found in all_commands(child))]


def example_lines(command: Any) -> list[str]:
    lines = (line.strip() for line in (command.epilog or "").splitlines())
    return [line for line in lines if line.startswith("epctl ")]


def test_every_command_that_reads_has_json() -> None:
    group: Any = typer.main.get_command(cli.app)
    leaves = [command for command in all_commands(group) if not hasattr(command, "commands")]
    without = [
        command.name
        for command in leaves
        if not any("--json" in parameter.opts for parameter in command.params)
    ]
    assert without == []
