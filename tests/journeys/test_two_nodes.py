"""Two nodes, as torchrun and SLURM describe them by environment, give what one process gives."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tiny_models import HARD_TIMEOUT, ROOT, finish, fit_arguments, start, subprocess_environment

pytest_plugins = ["tiny_fixtures"]

TWO_NODES = ["--trainer.devices=1", "--trainer.num_nodes=2", "--trainer.strategy=ddp"]


def free_port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def slurm(node: int, port: str) -> dict[str, str]:
    """Return what SLURM tells the task of a node."""
    return {
        "SLURM_JOB_ID": "17",
        "SLURM_JOB_NAME": "nowag",
        "SLURM_NTASKS": "2",
        "SLURM_NTASKS_PER_NODE": "1",
        "SLURM_NNODES": "2",
        "SLURM_PROCID": str(node),
        "SLURM_NODEID": str(node),
        "SLURM_LOCALID": "0",
        "SLURM_NODELIST": "localhost",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
    }


def torchrun(arguments, node: int, port: str, log: Path) -> "subprocess.Popen[bytes]":
    """Start torchrun's agent of a node, and by it the process."""
    agent = ["-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=1", f"--node_rank={node}"]
    agent += ["--master_addr=127.0.0.1", f"--master_port={port}", str(ROOT / "main.py"), *map(str, arguments)]
    own = {"cwd": log.parent, "env": subprocess_environment(), "start_new_session": True}
    with open(log, "wb") as file:
        return subprocess.Popen([sys.executable, *agent], stdout=file, stderr=subprocess.STDOUT, **own)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("launcher", ["torchrun", "slurm"])
def test_two_nodes_give_what_one_process_gives(launcher, command_line, model_folder, workplace, tmp_path):
    assert command_line(fit_arguments(workplace, model_folder(), tmp_path / "one")).code == 0
    arguments, port = fit_arguments(workplace, model_folder(), tmp_path / "two", *TWO_NODES), free_port()
    logs = [tmp_path / "node_0", tmp_path / "node_1"]
    if launcher == "torchrun":
        processes = [torchrun(arguments, node, port, log) for node, log in enumerate(logs)]
    else:
        processes = [start(arguments, log, **slurm(node, port)) for node, log in enumerate(logs)]
    for process, log in zip(processes, logs, strict=True):
        finish(process, log, 2 * HARD_TIMEOUT)
    one, two = (json.loads((tmp_path / name / "report.json").read_text()) for name in ("one", "two"))
    for phase in ("dense", "one_shot"):
        found, expected = (report["perplexity"]["held_out"][phase] for report in (two, one))
        assert found == pytest.approx(expected, rel=1e-6)
    assert len(list((tmp_path / "two" / "reference").glob("*_of_2.npy"))) == 2
    for rank in range(2):
        assert f"rank {rank}: " in (tmp_path / "two" / "logs" / f"rank_{rank:03d}.log").read_text()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_node_that_stops_answering_is_named(model_folder, workplace, tmp_path):
    arguments = fit_arguments(workplace, model_folder(num_blocks=12), tmp_path / "run", *TWO_NODES)
    port, logs = free_port(), [tmp_path / "node_0", tmp_path / "node_1"]
    nodes = [start(arguments, log, NOWAG_PL_TIMEOUT="20", **slurm(node, port)) for node, log in enumerate(logs)]
    try:
        began, first = time.monotonic(), Path(tmp_path / "run" / "moments" / "block_000.safetensors")
        while not first.exists() and time.monotonic() - began < 2 * HARD_TIMEOUT:
            time.sleep(0.05)
        os.killpg(nodes[1].pid, signal.SIGSTOP)
        assert nodes[0].wait(2 * HARD_TIMEOUT) != 0
    finally:
        for node in nodes:
            if node.poll() is None:
                os.killpg(node.pid, signal.SIGKILL)
                node.wait()
    assert "but rank 1 did not come" in logs[0].read_text()
