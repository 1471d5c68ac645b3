"""What another program leaves of the weights becomes a folder, and is measured like our own."""

import json
import shutil
import sys
from argparse import Namespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from benchmarks import peers
from benchmarks.peer_scripts import dense_folder
from benchmarks.peers import PEERS, Peer
from nowag_pl.models.checkpoint import Checkpoint

pytest_plugins = ["tiny_fixtures"]

SCRIPT = """
from dense_folder import linear_names, main_arguments, parser, weights, write, zeros
from safetensors.torch import load_file

made = parser(None)
made.add_argument("--below", type=float)
args = main_arguments(made)
tokens = load_file(args.work / "calibration.safetensors")["tokens"]
assert tokens.shape == (128, 32)
tensors, linears = weights(args.model), {}
for name, moment in load_file(args.work / "moments.safetensors").items():
    weight = tensors[f"{name}.weight"]
    assert moment.shape == weight.shape[1:]
    linears[name] = weight * (weight.abs() > args.below)
write(args, linears, ["torch"], bits_per_weight=9.0, sparsity=zeros(linears))
"""


@pytest.mark.slow
def test_script_of_a_peer_is_run_measured_and_kept(model_folder, workplace, tmp_path, monkeypatch):
    (tmp_path / "scripts").mkdir()
    shutil.copy(dense_folder.__file__, tmp_path / "scripts")
    (tmp_path / "scripts" / "zero_script.py").write_text(SCRIPT)
    shared = tmp_path / "shared" / "data"
    shared.mkdir(parents=True)
    for name, source in {"wikitext2-raw-test.txt": "eval.txt", "prose-calibration.txt": "calibration.txt"}.items():
        (shared / name).write_bytes((workplace / source).read_bytes())
    settings = {"little": ("--below=0.001",), "much": ("--below=0.1",)}
    monkeypatch.setattr(peers, "PEERS", {"zero": Peer("zero_script.py", (), settings)})
    monkeypatch.setattr(peers, "SCRIPTS", tmp_path / "scripts")
    monkeypatch.setattr(peers, "SEQ_LEN", 32)
    monkeypatch.setattr(peers, "ROOT", tmp_path)
    monkeypatch.chdir(tmp_path)
    arguments = ["--peers=zero", f"--python={sys.executable}", f"--model={model_folder()}", "--windows=3"]
    places = [f"--shared={shared.parent}", f"--output={tmp_path / 'runs'}", f"--results={tmp_path / 'results.json'}"]
    monkeypatch.setattr(sys, "argv", ["peers", *arguments, *places])
    peers.main()
    little, much = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert little["kl_divergence"] < much["kl_divergence"]
    assert 0 < little["sparsity"] < much["sparsity"] < 1
    assert little["windows"] == 3
    monkeypatch.setattr("subprocess.run", None)
    monkeypatch.setattr(peers, "compare", None)
    monkeypatch.setattr(peers, "hardware", lambda threads: {})
    peers.main()


def test_folder_differs_in_the_given_linears_alone(model_folder, tmp_path):
    name = "model.layers.1.mlp.up_proj"
    args = Namespace(model=model_folder(), output=tmp_path / "out", started=0.0)
    dense_folder.write(args, {name: torch.ones(48, 32)}, ["torch"], bits_per_weight=1.0, sparsity=0.0)
    before, after = (load_file(folder / "model.safetensors") for folder in (model_folder(), tmp_path / "out"))
    assert {key for key in before if not torch.equal(before[key], after[key])} == {f"{name}.weight"}
    assert Checkpoint(str(tmp_path / "out")).tokenizer("text") == Checkpoint(str(model_folder())).tokenizer("text")


@pytest.mark.parametrize("linears", [{}, {"model.other": torch.ones(2, 2)}])
def test_folder_of_other_linears_is_refused(linears, model_folder, tmp_path):
    args = Namespace(model=model_folder(), output=tmp_path / "out", started=0.0)
    with pytest.raises(ValueError, match="Expected linears of the model, but got"):
        dense_folder.write(args, linears, ["torch"], bits_per_weight=1.0, sparsity=0.0)


def test_weights_that_were_not_rounded_are_found(generator):
    codes = torch.randint(4, (6, 2, 8), generator=generator)
    scales = torch.rand(6, 2, 1, generator=generator)
    weight = (scales * (codes - 1.5)).view(6, 16)
    dense_folder.check_grid({"a": weight}, 2, 8)
    weight[3, 5] += 0.01
    weight[3, :4] = torch.arange(4.0)
    with pytest.raises(ValueError, match="at most 4 values in a group of a, but got"):
        dense_folder.check_grid({"a": weight}, 2, 8)


def test_tied_head_is_untied_before_a_peer_sees_it(model_folder):
    model = dense_folder.load(model_folder(tied=True))
    model.lm_head.weight.data.zero_()
    assert model.model.embed_tokens.weight.abs().sum() > 0


def test_rows_of_different_settings_have_different_names():
    names = [name for peer in PEERS.values() for name in peer.settings]
    assert len(names) == len(set(names)) > 10
    assert all((peers.SCRIPTS / peer.script).is_file() for peer in PEERS.values())


def test_quantizer_of_llama_cpp_joins_rows_and_weights_columns(generator):
    pytest.importorskip("libggml")
    gguf = pytest.importorskip("gguf")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(peers.SCRIPTS)
        import llama_cpp_script
    weight = torch.randn(8, 64, generator=generator).numpy()
    importance = np.tile([100.0, 0.01], 32)
    ggml, kind = llama_cpp_script.library(), gguf.GGMLQuantizationType.Q2_K
    left = llama_cpp_script.quantized(ggml, weight, importance, kind)
    errors = np.square(left - weight).mean(axis=0)
    assert errors[::2].mean() < errors[1::2].mean() < np.square(weight).mean()
    with pytest.raises(ValueError, match="Expected a multiple of 4 rows, but got 6"):
        llama_cpp_script.quantized(ggml, weight[:6], importance, kind)
