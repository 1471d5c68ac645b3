"""Every shipped configuration parses in every combination and means what its name says."""

import re
import shlex
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from tiny_models import ROOT

import main as command_line
from nowag_pl import MagnitudePruner, NoWagPruner, NoWagQuantizer, WandaPruner
from nowag_pl.data.sources import HubDataset

CONFIGS = ROOT / "configs"
METHODS = {
    "nowag_p_50": NoWagPruner(sparsity=0.5),
    "nowag_p_2_4": NoWagPruner(pattern=(2, 4)),
    "nowag_p_4_8": NoWagPruner(pattern=(4, 8)),
    "nowag_vq_2bit": NoWagQuantizer(subvector_dim=6, codebook_size=4096),
    "nowag_vq_2bit_small": NoWagQuantizer(subvector_dim=4, codebook_size=256),
    "wanda_50": WandaPruner(sparsity=0.5),
    "magnitude_50": MagnitudePruner(sparsity=0.5),
}
DATA = ["local_text", "wikitext2_c4"]
SHIPPED = sorted(path.relative_to(ROOT).as_posix() for path in CONFIGS.rglob("*.yaml"))


@pytest.fixture
def parse(monkeypatch, tmp_path):
    """Parse and instantiate a fit from the command line, and run nothing."""
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")
    monkeypatch.setattr(command_line.CompressionCLI, "_run_subcommand", lambda self, subcommand: None)

    def run(*arguments: str) -> SimpleNamespace:
        cli = command_line.main(["fit", f"--run_dir={tmp_path / 'run'}", *arguments])
        settings = cli.config_init["fit"]
        return SimpleNamespace(cli=cli, settings=settings, compressor=settings.compression.compressor)

    return run


@pytest.fixture(autouse=True)
def quiet():
    import logging
    import warnings

    logger = logging.getLogger("nowag_pl")
    level = logger.level
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecations between Lightning and jsonargparse
        yield
    logger.setLevel(level)


def config(name: str) -> str:
    return f"--config={CONFIGS / name}.yaml"


def test_every_method_has_a_test_here():
    assert {path.stem for path in (CONFIGS / "method").glob("*.yaml")} == set(METHODS)
    assert {path.stem for path in (CONFIGS / "data").glob("*.yaml")} == set(DATA)


@pytest.mark.parametrize("data", [None, *DATA])
@pytest.mark.parametrize("method", METHODS)
def test_combination_means_what_it_says(method, data, parse):
    parsed = parse(config(f"method/{method}"), *([config(f"data/{data}")] if data else []))
    assert parsed.compressor == METHODS[method]
    assert type(parsed.compressor) is type(METHODS[method])
    datamodule = parsed.cli.datamodule
    if data == "local_text":
        assert datamodule.calibration_files == ["calibration.txt"]
        assert datamodule.eval_files == {"held_out": "eval.txt"}
        assert datamodule.calibration_dataset is None
    elif data == "wikitext2_c4":
        assert datamodule.calibration_dataset == HubDataset(
            "allenai/c4", split="train[:20000]", data_files="en/c4-train.00000-of-01024.json.gz"
        )
        expected = HubDataset("Salesforce/wikitext", name="wikitext-2-raw-v1", split="test")
        assert datamodule.eval_datasets == {"wikitext2": expected}
        assert datamodule._seq_len == 4096
    else:
        assert datamodule.eval_names == ["python-docs"]
    assert parsed.cli.model.checkpoint.path == "embedded"
    assert parsed.cli.trainer.max_epochs == 0


def test_order_of_the_files_does_not_matter(parse):
    parsed = parse(config("data/local_text"), config("method/nowag_p_2_4"))
    assert parsed.compressor == METHODS["nowag_p_2_4"]


def test_without_a_file_half_of_the_weights_go(parse):
    assert parse().compressor == NoWagPruner(sparsity=0.5)


def test_later_method_replaces_the_earlier_one(parse):
    assert parse(config("method/nowag_p_50"), config("method/nowag_vq_2bit")).compressor == METHODS["nowag_vq_2bit"]


def test_single_setting_on_top_of_a_file(parse):
    parsed = parse(config("method/nowag_vq_2bit"), "--compression.compressor.codebook_size=16")
    assert parsed.compressor == NoWagQuantizer(subvector_dim=6, codebook_size=16)


def test_single_setting_on_top_of_the_default(parse):
    assert parse("--compression.compressor.sparsity=0.7").compressor == NoWagPruner(sparsity=0.7)


def test_pattern_alone_on_top_of_the_default(parse):
    assert parse("--compression.compressor.pattern=[2, 4]").compressor == NoWagPruner(pattern=(2, 4))


def test_compression_can_be_left_out(parse):
    assert not parse("--compression.enabled=false").cli.config.fit.compression.enabled


def test_recipe_of_the_embedded_model_trains_from_scratch(parse):
    parsed = parse(config("recipes/embedded_model"))
    assert parsed.cli.model.random_init
    assert parsed.cli.trainer.max_epochs > 0


def test_run_dir_is_named_after_model_and_method(monkeypatch, tmp_path):
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")
    monkeypatch.setattr(command_line.CompressionCLI, "_run_subcommand", lambda self, subcommand: None)
    monkeypatch.chdir(tmp_path)
    names = set()
    for more in ([], [config("method/nowag_p_2_4")], [config("method/nowag_vq_2bit")], ["--model.path=a/b"]):
        if more == ["--model.path=a/b"]:
            (tmp_path / "a" / "b").mkdir(parents=True)
            (tmp_path / "a" / "b" / "config.json").write_text("{}")
        names.add(command_line.main(["fit", *more]).model.run_dir)
    assert len(names) == 4
    assert all(re.fullmatch(r"runs/[\w.-]+", name) for name in names)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("path", SHIPPED)
def test_header_holds_the_command_with_its_own_path(path):
    header = re.match(r"(#.*\n)+", (ROOT / path).read_text()).group()
    text = re.sub(r"\\\n#", " ", header)
    commands = [line.lstrip("# ") for line in text.splitlines() if re.match(r"#\s+python main\.py", line)]
    assert any(path in command for command in commands), header
    assert len(header.splitlines()) >= 2


@pytest.mark.parametrize("path", SHIPPED)
def test_command_of_the_header_parses(path, monkeypatch, tmp_path, parse):
    text = re.sub(r"\\\n#", " ", (ROOT / path).read_text())
    command = next(line.lstrip("# ") for line in text.splitlines() if re.match(r"#\s+python main\.py", line))
    words = shlex.split(command)
    assert words[:3] == ["python", "main.py", "fit"]
    monkeypatch.chdir(ROOT)
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    command = command.replace("<folder or hub id>", str(model))
    parse(*shlex.split(command)[3:])


@pytest.mark.parametrize("path", SHIPPED)
def test_file_holds_no_absolute_path_and_no_foreign_group(path):
    text = (ROOT / path).read_text()
    assert not re.search(r"(?<![\w.<:/-])/(home|root|tmp|work|mnt|data)\b", text)
    groups = set(yaml.safe_load(text))
    folder = Path(path).parent.name
    assert groups == {"method": {"compression"}, "data": {"data"}}.get(folder, groups)


def test_nothing_parses_with_a_misspelt_key(parse, tmp_path, capsys):
    text = (CONFIGS / "method" / "nowag_p_50.yaml").read_text()
    (tmp_path / "wrong.yaml").write_text(text.replace("sparsity", "sparsety"))
    with pytest.raises(SystemExit):
        parse(f"--config={tmp_path / 'wrong.yaml'}")
    assert "sparsety" in capsys.readouterr().err


def test_help_names_the_groups(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["main.py", "fit", "--help"])
    with pytest.raises(SystemExit) as exit_:
        command_line.main(["fit", "--help"])
    assert exit_.value.code == 0
    text = capsys.readouterr().out
    for option in ("--model.path", "--data.seq_len", "--calibration.num_sequences", "--compression.compressor"):
        assert option in text
