"""Starting a job whose nodes are elsewhere: by sbatch, or by ssh along a hostfile."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

from epctl.config import ResolvedConfig, RunConfig
from epctl.errors import ConfigError, LaunchError
from epctl.interval import parse_interval
from epctl.launch.hostfile import Host, read_hostfile
from epctl.launch.nodes import DEFAULT_PORT, node_arguments
from epctl.launch.slurm import sbatch_script
from epctl.output import Output

POLL_SECONDS = 0.1
# What ranks of other nodes get to end by themselves after one has failed.
GRACE_SECONDS = 30.0


def starts_elsewhere(config: RunConfig, *, print_only: bool) -> bool:
    """True if this process starts no rank itself; raises ConfigError for a lone `--print`."""
    elsewhere = config.launch.launcher == "slurm" or config.launch.hostfile is not None
    if print_only and not elsewhere:
        raise ConfigError(
            "`--print` shows what `--launcher slurm` or `--hostfile` would start",
            hint="use `--dry-run` for a job on this machine",
        )
    return elsewhere


def start_elsewhere(
    resolved: ResolvedConfig, output: Output, *, print_only: bool, check: bool
) -> None:
    """Prints, or submits or runs, the job.

    Raises ConfigError for missing settings, LaunchError with the code of what failed.
    """
    if check:
        raise ConfigError("`--check` runs on this machine", hint="leave out the launcher")
    config = resolved.config
    if config.launch.launcher == "slurm":
        text = sbatch_script(
            config, _shared_folder(config), sys.executable, node_arguments(resolved)
        )
        if parse_interval(config.checkpoint.every) is None:
            output.warning("`checkpoint.every` is off: a requeued job begins again")
        if print_only:
            output.text(text)
        else:
            submit(text, output)
        return
    hosts = read_hostfile(Path(config.launch.hostfile or ""))
    commands = ssh_commands(resolved, hosts, Path.cwd())
    if print_only:
        output.text("\n".join(map(shlex.join, commands)))
    else:
        run_commands(commands, [host.name for host in hosts], output)


def _shared_folder(config: RunConfig) -> Path:
    folder = config.run.output or config.run.resume
    if folder is None:
        raise ConfigError(
            "a job on other machines needs a run folder on a shared disk",
            hint="name it with `--output`",
        )
    return Path(folder).absolute()


def submit(script: str, output: Output) -> None:
    """Hands the script to sbatch; raises ConfigError if there is none here."""
    program = shutil.which("sbatch")
    if program is None:
        raise ConfigError(
            "there is no `sbatch` on this machine", hint="add `--print` and submit it elsewhere"
        )
    result = subprocess.run([program], input=script, capture_output=True, text=True)
    if result.returncode != 0:
        message = f"sbatch refused the job: {result.stderr.strip()}"
        raise LaunchError(message, exit_code=result.returncode)
    output.text(result.stdout.strip())


def ssh_commands(resolved: ResolvedConfig, hosts: list[Host], folder: Path) -> list[list[str]]:
    """Returns one ssh command a host; the first host is node 0 and the place to meet."""
    config = resolved.config
    where = ["--resume"] if config.run.resume is not None else ["--output"]
    rendezvous = config.launch.rendezvous or f"{_bare(hosts[0].name)}:{DEFAULT_PORT}"
    commands = []
    for node_rank, host in enumerate(hosts):
        epctl = [
            *(sys.executable, "-m", "epctl", *node_arguments(resolved)),
            *(*where, str(_shared_folder(config))),
            *("--num-ranks", str(sum(h.slots for h in hosts)), "--nnodes", str(len(hosts))),
            *("--node-rank", str(node_rank), "--rdzv", rendezvous),
        ]
        remote = f"cd {shlex.quote(str(folder))} && exec {shlex.join(epctl)}"
        # -tt: the remote epctl gets SIGHUP when this side ends, and ends its ranks.
        commands.append(["ssh", "-tt", "-o", "BatchMode=yes", host.name, remote])
    return commands


def _bare(name: str) -> str:
    """Returns the host of `user@host`."""
    return name.rpartition("@")[2]


def run_commands(commands: list[list[str]], names: list[str], output: Output) -> None:
    """Runs all at once; when one fails the others get time to end, then are ended.

    Raises LaunchError that names the host that failed first, with its code.
    """
    processes = [
        subprocess.Popen(command, stdin=subprocess.DEVNULL, env=dict(os.environ))
        for command in commands
    ]
    output.note(f"started {len(processes)} nodes: {', '.join(names)}")
    first: int | None = None
    deadline = float("inf")
    try:
        while any(process.poll() is None for process in processes):
            failed = [i for i, process in enumerate(processes) if process.poll() not in (None, 0)]
            if failed and first is None:
                first, deadline = failed[0], time.monotonic() + GRACE_SECONDS
            if time.monotonic() > deadline:
                break
            time.sleep(POLL_SECONDS)
    finally:
        for process in processes:
            if process.poll() is None:
                process.terminate()
            process.wait()
    codes = [process.returncode for process in processes]
    if first is None:
        first = next((i for i, code in enumerate(codes) if code != 0), None)
    if first is not None:
        code = codes[first]
        message = f"node {first} (`{names[first]}`) failed first, exit code {code}"
        raise LaunchError(message, exit_code=code if code > 0 else 128 - code)
