from argparse import Namespace

import pytest
import torch

from benchmarks import generation
from nowag_pl import NoWagPruner, save_compressed
from nowag_pl.models.assembly import assemble
from nowag_pl.models.checkpoint import Checkpoint

pytest_plugins = ["tiny_fixtures"]


@pytest.mark.parametrize(("installed", "packed"), [(True, False), (False, True)])
def test_every_way_is_shown_once(installed, packed, monkeypatch, capsys):
    monkeypatch.setattr(generation, "find_spec", lambda name: object() if installed else None)
    ways = generation.ways_of(Namespace(dense="d", compressed=["c"], gguf=["q2_k.gguf"], packed=packed))
    names = [way.name for way in ways]
    assert names[:4] == ["dense bfloat16", "dense float32", "as it opens", "accelerated"]
    assert names[4:] == (["llama.cpp"] if installed else ["packed"])
    assert ("llama-cpp-python is not installed" in capsys.readouterr().err) == (not installed)


@pytest.mark.filterwarnings("ignore")
def test_dense_and_compressed_models_generate_in_turns(model_folder, tmp_path):
    source = model_folder("llama")
    dense = Checkpoint(str(source)).load()
    linears = {
        name: NoWagPruner().compress(linear, torch.ones(linear.in_features))
        for name, linear in dense.named_modules()
        if isinstance(linear, torch.nn.Linear) and "layers" in name
    }
    save_compressed(assemble(Checkpoint(str(source)), linears), tmp_path)
    ways = [generation.Way(str(source), "dense float32"), generation.Way(str(tmp_path), "as it opens")]
    found = generation.speeds(ways, num_tokens=8, rounds=3, threads=1)
    assert all(speed > 0 for speed in found)
