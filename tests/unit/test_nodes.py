"""Jobs on several nodes: what is printed, parsed, refused and shared out."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from checkpoint_by_hand import write_checkpoint

from epctl.config import LaunchSection, ResolvedConfig, resolve_config
from epctl.errors import ConfigError, InputError, LaunchError
from epctl.launch import nodes, nodes_start
from epctl.launch.command import launch_command, rank_environment
from epctl.launch.devices import Placement
from epctl.launch.hostfile import Host, parse_hostfile, read_hostfile
from epctl.launch.slurm import sbatch_script

EIGHT = (8, "nvidia-smi lists 8")
NO_GPU = (0, "no nvidia-smi")


def settings(**flags: Any) -> ResolvedConfig:
    return resolve_config(flags={key.replace("__", "."): value for key, value in flags.items()})


# --- placement and command


def test_ranks_are_shared_out_evenly_over_nodes() -> None:
    config = settings(launch__num_nodes=2, parallel__ep=8).config
    placement = nodes.place_job(config, EIGHT)
    assert (placement.num_ranks, placement.ranks_per_node) == (16, 8)
    assert "on each of 2 nodes" in placement.reason
    cpu = nodes.place_job(settings(launch__num_nodes=2, parallel__ep=4).config, NO_GPU)
    assert (cpu.num_ranks, cpu.ranks_per_node) == (4, 2)
    with pytest.raises(ConfigError, match="3 ranks cannot be shared out over 2 nodes"):
        nodes.place_job(settings(launch__num_nodes=2, parallel__num_ranks=3).config, NO_GPU)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"launch__num_nodes": 2}, "2 nodes need a place to meet, got None"),
        ({"launch__num_nodes": 2, "launch__rendezvous": "node0"}, "got 'node0'"),
        ({"launch__num_nodes": 2, "launch__rendezvous": "node0:1"}, "one run folder"),
        ({"launch__node_rank": 1}, "node rank 1 does not exist among 1 nodes"),
        ({"launch__launcher": "deepspeed", "launch__max_restarts": 1}, "restarts nothing"),
    ],
)
def test_incomplete_node_settings_are_refused(flags: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        nodes.require_node_settings(settings(**flags).config)


def test_command_of_two_nodes_names_the_meeting_place() -> None:
    launch = LaunchSection(
        num_nodes=2, node_rank=1, rendezvous="node0:29500", max_restarts=3, local_address="10.0.0.2"
    )
    command = launch_command(Path("/runs/r"), Placement("cpu", 4, "", 2), launch=launch)
    assert command[4:13] == [
        "--nnodes=2",
        "--rdzv-backend=c10d",
        "--rdzv-endpoint=node0:29500",
        "--rdzv-id=r",
        "--rdzv-conf=is_host=0",
        "--local-addr=10.0.0.2",
        "--nproc-per-node=2",
        "--max-restarts=3",
        "--monitor-interval=0.2",
    ]


def test_deepspeed_launcher_gets_the_number_of_ranks() -> None:
    launch = LaunchSection(launcher="deepspeed")
    command = launch_command(Path("/runs/r"), Placement("cpu", 2, ""), launch=launch)
    assert command[1:] == [
        *("-m", "deepspeed.launcher.runner", "--num_gpus=2", "--no_local_rank", "--module"),
        *("epctl.runtime.worker", "/runs/r", "train"),
    ]


def test_environment_of_gpu_ranks_is_clean() -> None:
    gpu = Placement("cuda", 8, "")
    environment = rank_environment(gpu, {"TORCH_CUDA_ARCH_LIST": "8.0;9.0a+PTX 10.0f"})
    assert environment["TORCH_CUDA_ARCH_LIST"] == "8.0;9.0+PTX 10.0"
    assert environment["PYTORCH_CUDA_ALLOC_CONF"] == "expandable_segments:True"
    assert "TORCH_DISABLE_SHARE_RDZV_TCP_STORE" not in environment
    kept = rank_environment(gpu, {"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:64"})
    assert kept["PYTORCH_CUDA_ALLOC_CONF"] == "max_split_size_mb:64"
    for launch in (LaunchSection(num_nodes=2), LaunchSection(max_restarts=1)):
        environment = rank_environment(gpu, {}, launch)
        assert environment["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] == "1"


def test_nodes_get_the_chosen_settings_and_not_their_neighbours_own() -> None:
    resolved = settings(
        parallel__ep=8,
        data__train=("a b.jsonl", "c'd.jsonl"),
        run__output="/shared/run",
        launch__hostfile="hosts",
        launch__node_rank=0,
        launch__max_restarts=2,
        launch__slurm_time="1:00:00",
    )
    arguments = nodes.node_arguments(resolved)
    assert arguments[0] == "train"
    again = resolve_config(settings=arguments[2::2], flags={})
    assert again.config.data.train == ("a b.jsonl", "c'd.jsonl")
    assert again.given() == {
        key: value
        for key, value in resolved.given().items()
        if key in ("parallel.ep", "data.train", "launch.max_restarts")
    }


def test_a_node_without_a_run_folder_gives_up(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="did not appear in 0 s"):
        nodes.wait_for_folder(tmp_path / "run", seconds=0.3)


# --- hostfile


def test_hostfile_with_comments_and_blank_lines() -> None:
    text = "# cluster\nworker-1 slots=8\n\nroot@10.0.0.2   slots = 8 # second\n"
    assert parse_hostfile(text) == [Host("worker-1", 8), Host("root@10.0.0.2", 8)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("worker-1", "line 1: `worker-1` is not `HOST slots=N`"),
        ("a slots=8\nb slots=x", "line 2"),
        ("a slots=0", "line 1"),
        ("-oProxyCommand=x slots=1", "line 1"),
        ("a b slots=1", "line 1"),
        ("a slots=8\na slots=8", "line 2: host `a` stands there twice"),
        ("a slots=8\nb slots=4", "hosts have 4 and 8 slots"),
        ("# nothing\n", "names no host"),
    ],
)
def test_bad_hostfiles_say_their_line(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_hostfile(text)


def test_missing_hostfile() -> None:
    with pytest.raises(ConfigError, match="cannot read hostfile"):
        read_hostfile(Path("/nonexistent/hosts"))


SSH_LINE = (
    "ssh -tt -o BatchMode=yes {host} 'cd /work && exec {python} -m epctl train "
    "--set parallel.ep=4 --output /shared/run --num-ranks 8 --nnodes 2 --node-rank {rank} "
    "--rdzv 10.0.0.1:29500'"
)


def test_ssh_lines_of_a_hostfile() -> None:
    resolved = settings(parallel__ep=4, run__output="/shared/run", launch__hostfile="hosts")
    hosts = [Host("root@10.0.0.1", 4), Host("worker-2", 4)]
    lines = [shlex.join(c) for c in nodes_start.ssh_commands(resolved, hosts, Path("/work"))]
    assert lines == [
        SSH_LINE.format(host="root@10.0.0.1", python=sys.executable, rank=0),
        SSH_LINE.format(host="worker-2", python=sys.executable, rank=1),
    ]


def test_a_failing_node_is_named_and_the_others_end(
    sink: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nodes_start, "GRACE_SECONDS", 0.3)
    commands = [["sleep", "600"], [sys.executable, "-c", "raise SystemExit(6)"]]
    with pytest.raises(LaunchError, match=r"node 1 \(`b`\) failed first") as caught:
        nodes_start.run_commands(commands, ["a", "b"], sink[0])
    assert caught.value.exit_code == 6
    nodes_start.run_commands([["true"], ["true"]], ["a", "b"], sink[0])


# --- Slurm

SCRIPT = r"""#!/bin/bash
#SBATCH --job-name=epctl-run
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --time=24:00:00
#SBATCH --output=/shared/run-slurm-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --gpus-per-node=8
#SBATCH --partition=gpu
#SBATCH --signal=TERM@120

set -euo pipefail

run=/shared/run
if compgen -G "$run/checkpoints/step-*[0-9]/manifest.json" > /dev/null; then
  where=(--resume "$run")
else
  if [ -e "$run" ]; then mv "$run" "$run.before-$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}"; fi
  where=(--output "$run")
fi
nodes=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
head=${nodes%%$'\n'*}
port=$((29500 + SLURM_JOB_ID % 1000))
export EPCTL_RENDEZVOUS="$head:$port"

# SLURM_NODEID is known on each node only, so its shell fills it in.
exec srun --kill-on-bad-exit=1 bash -c \
  'exec "$@" --rdzv "$EPCTL_RENDEZVOUS" --node-rank "$SLURM_NODEID"' epctl \
  python -m epctl train --set 'data.train=["a b.jsonl"]' \
  "${where[@]}"
"""


def slurm_settings(**flags: Any) -> ResolvedConfig:
    return settings(
        **{
            "parallel__num_ranks": 16,
            "launch__num_nodes": 2,
            "launch__launcher": "slurm",
            "launch__slurm_partition": "gpu",
            **flags,
        }
    )


def test_sbatch_script() -> None:
    arguments = ["train", "--set", 'data.train=["a b.jsonl"]']
    script = sbatch_script(slurm_settings().config, Path("/shared/run"), "python", arguments)
    assert script == SCRIPT


@pytest.mark.parametrize("has_checkpoint", [False, True])
def test_sbatch_script_runs_with_a_stand_in_for_slurm(tmp_path: Path, has_checkpoint: bool) -> None:
    """The shell part, with `srun` and `scontrol` of our own: node 1's arguments."""
    run = tmp_path / "run"
    (run / "checkpoints" / "step-0000004.tmp").mkdir(parents=True)
    (run / "checkpoints" / "step-0000004.tmp" / "manifest.json").touch()
    if has_checkpoint:
        write_checkpoint(run, 2)
    stand_ins = {
        "scontrol": "#!/bin/sh\necho node7\necho node8\n",
        "srun": '#!/bin/sh\nshift\nSLURM_NODEID=1 exec "$@"\n',
        "show": '#!/bin/sh\nfor a; do echo "$a"; done\n',
    }
    for name, text in stand_ins.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    config = slurm_settings().config
    script = sbatch_script(config, run, str(tmp_path / "show"), ["train", "--set", "a=[1, 2]"])
    result = subprocess.run(
        ["bash"],
        input=script,
        capture_output=True,
        text=True,
        env={
            "PATH": f"{tmp_path}:/usr/bin:/bin",
            "SLURM_JOB_ID": "12345",
            "SLURM_JOB_NODELIST": "node[7-8]",
        },
    )
    assert result.returncode == 0, result.stderr
    where = "--resume" if has_checkpoint else "--output"
    expected = ["-m", "epctl", "train", "--set", "a=[1, 2]", where, str(run)]
    expected += ["--rdzv", "node7:29845", "--node-rank", "1"]
    assert result.stdout.splitlines() == expected
    assert run.exists() is has_checkpoint
    assert (tmp_path / "run.before-12345-0").exists() is not has_checkpoint


def test_slurm_needs_the_number_of_ranks_and_a_plain_path() -> None:
    with pytest.raises(ConfigError, match="needs `--num-ranks`") as caught:
        sbatch_script(slurm_settings(parallel__num_ranks=None).config, Path("/r"), "python", [])
    assert "`--num-ranks 16`" in (caught.value.hint or "")
    with pytest.raises(ConfigError, match="has a space"):
        sbatch_script(slurm_settings().config, Path("/a b"), "python", [])


def test_print_shows_and_submit_hands_over(
    sink: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, stdout, stderr = sink
    resolved = slurm_settings(run__output=str(tmp_path / "run"))
    nodes_start.start_elsewhere(resolved, output, print_only=True, check=False)
    assert stdout.getvalue().startswith("#!/bin/bash\n#SBATCH --job-name=epctl-run\n")
    assert "a requeued job begins again" in stderr.getvalue()
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match="no `sbatch`"):
        nodes_start.start_elsewhere(resolved, output, print_only=False, check=False)
    program = tmp_path / "sbatch"
    program.write_text("#!/bin/sh\nread first\necho Submitted $first\n")
    program.chmod(0o755)
    nodes_start.start_elsewhere(resolved, output, print_only=False, check=False)
    assert stdout.getvalue().endswith("Submitted #!/bin/bash\n")


def test_print_without_another_machine_is_refused() -> None:
    with pytest.raises(ConfigError, match="`--print` shows"):
        nodes_start.starts_elsewhere(settings().config, print_only=True)
    assert not nodes_start.starts_elsewhere(settings().config, print_only=False)


def test_json_values_are_toml_values() -> None:
    """`node_arguments` writes JSON where `--set` reads TOML; they agree on what settings hold."""
    values = {"optim.lr": 1e-7, "run.save": False, "model.tokenizer": 'a "b" \\ é'}
    resolved = resolve_config(flags=values)
    again = resolve_config(settings=nodes.node_arguments(resolved)[2::2], flags={})
    assert again.given() == json.loads(json.dumps(values))
