"""Two processes with a sharded model take the step of one with the whole model, and write the same folder."""

import socket
import subprocess
import sys
from pathlib import Path

import pytest
import sharded_step
import torch
from safetensors.torch import load_file
from tiny_models import ROOT, random_tokens, subprocess_environment

from nowag_pl import NoWagPruner, NoWagQuantizer
from nowag_pl.lit.precision import widen
from nowag_pl.models.checkpoint import Checkpoint
from nowag_pl.models.format.saving import load_compressed, save_compressed
from nowag_pl.models.selection import find_linears

pytest_plugins = ["tiny_fixtures"]

METHODS = {"mlp": NoWagPruner(pattern=(2, 4)), "attn": NoWagQuantizer(subvector_dim=4, codebook_size=8, max_iters=1)}


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("tied", [False, True])
def test_a_step_of_two_is_the_step_of_one(tied, model_folder, tmp_path):
    model = Checkpoint(str(model_folder("qwen2", tied=tied))).load()
    for name, linear in find_linears(model.model).items():
        method = METHODS["mlp" if "mlp" in name else "attn"]
        model.model.set_submodule(name, method.compress(linear, torch.ones(linear.in_features)))
    save_compressed(model, tmp_path / "model")
    tokens = random_tokens(2, 12).long()
    torch.save(tokens, tmp_path / "tokens.pt")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    own = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, sharded_step.__file__, str(tmp_path / "model"), str(tmp_path)]
    processes = [
        subprocess.Popen(command, env=subprocess_environment() | own | {"RANK": str(rank)}) for rank in range(2)
    ]
    assert [process.wait(800) for process in processes] == [0, 0]
    whole = load_compressed(tmp_path / "model", packed=True)
    widen(whole, everything=False)
    expected = sharded_step.gradients(whole, tokens, [slice(0, 11)], recompute=False)
    for name in ("whole", "parts", "recomputed"):
        loss, found = torch.load(tmp_path / f"{name}.pt")
        assert loss == pytest.approx(expected[0], rel=1e-6)
        assert found.keys() == expected[1].keys()
        for key, gradient in expected[1].items():
            torch.testing.assert_close(found[key], gradient, rtol=1e-3, atol=1e-6, msg=f"{name}: {key}")
    assert_same_folder(tmp_path / "export", tmp_path / "model")


def assert_same_folder(made: Path, expected: Path) -> None:
    """Check that two folders hold the same tensors, in whatever files."""
    tensors = [
        {name: each for file in folder.glob("*.safetensors") for name, each in load_file(file).items()}
        for folder in (made, expected)
    ]
    assert tensors[0].keys() == tensors[1].keys()
    for name, tensor in tensors[1].items():
        assert torch.equal(tensors[0][name], tensor), name
