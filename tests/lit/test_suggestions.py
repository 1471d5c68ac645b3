import argparse
import inspect

import pytest
from jsonargparse import ArgumentParser

from callbacks.compression import ModelCompression
from nowag_pl import compressors
from nowag_pl.lit.suggestions import HelpFormatter, suggestion

OPTIONS = ["--calibration.num_sequences", "--data.eval_files", "--run_dir", "--trainer.accelerator"]


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("unrecognized arguments: --calibration.num_sequnces=3", "--calibration.num_sequences"),
        ("unrecognized arguments: --run_dri x", "--run_dir"),
        ("Subcommand 'fit' does not accept option 'data.evalfiles'", "data.eval_files"),
        ("Problem with given class_path 'nowag_pl.NoWagPruner':\n  Option 'sparsty' is not accepted", "sparsity"),
        (
            "Problem with given class_path 'nowag_pl.NoWagQuantizer':\n Option 'subvectordim' is not accepted",
            "subvector_dim",
        ),
        ("- Expected a dot import path string: NoWagPrunner", "nowag_pl.NoWagPruner"),
        ("- Problem with given class_path 'nowag_pl.WandaPrunr':\n no attribute", "nowag_pl.WandaPruner"),
        ("Expected a typing.Literal['block', 'model']. Got value: modl", "model"),
        ("Expected dtype to be 'auto' or one of ['bfloat16', 'float32'], but got 'floot32'.", "float32"),
        ("argument subcommand: invalid choice: 'fti' (choose from 'fit', 'validate')", "fit"),
        ("argument subcommand: invalid choice: 'compre' (choose from validate, compare)", "compare"),
        ("unrecognized arguments: --something.else.entirely", None),
        ("Problem with given class_path 'no.such.Thing':\n Option 'sparsty' is not accepted", None),
        ("Expected a number, but got three.", None),
    ],
)
def test_nearest_name_is_found(message, expected):
    assert suggestion(message, OPTIONS) == expected


def test_missing_file_is_looked_for_beside_it_and_among_the_configurations(tmp_path, monkeypatch):
    (tmp_path / "configs" / "method").mkdir(parents=True)
    (tmp_path / "configs" / "method" / "nowag_p_50.yaml").touch()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "recipe.yaml").touch()
    monkeypatch.chdir(tmp_path)
    said = "Parser key \"config\": File does not exist: '{}'"
    assert suggestion(said.format(tmp_path / "nowag_p_5.yaml")) == "configs/method/nowag_p_50.yaml"
    assert suggestion(said.format(tmp_path / "mine" / "recepi.yaml")) == "mine/recipe.yaml"
    assert suggestion(said.format(tmp_path / "mine" / "zzz.yaml")) is None


def test_help_begins_with_a_capital_letter():
    parser = ArgumentParser(formatter_class=HelpFormatter)
    parser.add_argument("--seq_len", type=int, default=3, help="tokens per window.")
    parser.add_argument("--quiet", help=argparse.SUPPRESS)
    assert "Tokens per window. (type: int, default: 3)" in parser.format_help()


def test_help_of_the_method_lists_every_compressor():
    methods = [each for each in vars(compressors).values() if inspect.isclass(each) and each.__module__ != "abc"]
    names = [each.__name__ for each in methods if issubclass(each, compressors.Compressor)]
    assert len(names) >= 7
    text = inspect.getdoc(ModelCompression)
    assert [name for name in names if name not in text] == []
