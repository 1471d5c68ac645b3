"""Every shipped configuration parses in every combination and means what its name says."""

import re
import shlex
import sys
from math import ceil
from types import SimpleNamespace

import pytest
import yaml
from test_docs import make_parser
from tiny_models import ROOT
from torch import nn
from transformers import LlamaConfig

import main as command_line
from nowag_pl import (
    ArmorCompressor,
    MagnitudePruner,
    NoWagPruner,
    NoWagQuantizer,
    NoWagTrellis,
    SparseGPTPruner,
    WandaPruner,
    needs,
)
from nowag_pl.compressors.budget import Budget
from nowag_pl.data.sources import HubDataset
from nowag_pl.lit.stage import Stage
from nowag_pl.models.checkpoint import Checkpoint
from nowag_pl.stages.plan import CalibrationSettings, Plan
from nowag_pl.stages.sizes import Holding, ModelSizes

CONFIGS = ROOT / "configs"
PLUS = {"weighting": "output", "update": "alternating", "refit_scales": True, "damping": 0.03}
METHODS = {
    **{f"nowag_trellis_{bits}bit_plus": NoWagTrellis(bits=bits) for bits in (3, 4)},
    "nowag_trellis_2bit_plus": NoWagTrellis(bits=2, state_bits=14),
    "armor_2_4": ArmorCompressor(pattern=(2, 4), block_size=32),
    "armor_2_4_full": ArmorCompressor(
        pattern=(2, 4), block_size=32, max_iters=20000, learning_rate=1e-3, schedule="constant", tolerance=0.0
    ),
    "nowag_p_50": NoWagPruner(sparsity=0.5),
    "nowag_p_50_plus": NoWagPruner(sparsity=0.5, update="alternating"),
    "nowag_p_2_4_plus": NoWagPruner(pattern=(2, 4), update="alternating"),
    "nowag_vq_2bit_plus": NoWagQuantizer(subvector_dim=6, codebook_size=4096, **PLUS),
    "nowag_vq_2bit_small_plus": NoWagQuantizer(subvector_dim=4, codebook_size=256, **PLUS),
    "nowag_p_2_4": NoWagPruner(pattern=(2, 4)),
    "nowag_p_4_8": NoWagPruner(pattern=(4, 8)),
    "nowag_vq_2bit": NoWagQuantizer(subvector_dim=6, codebook_size=4096),
    "nowag_vq_2bit_d7": NoWagQuantizer(subvector_dim=7, codebook_size=2**14),
    "nowag_vq_2bit_small": NoWagQuantizer(subvector_dim=4, codebook_size=256),
    **{f"nowag_trellis_{bits}bit": NoWagTrellis(bits=bits) for bits in (2, 3, 4)},
    "wanda_50": WandaPruner(sparsity=0.5),
    "sparsegpt_50": SparseGPTPruner(sparsity=0.5),
    "magnitude_50": MagnitudePruner(sparsity=0.5),
}
RECIPES = {  # hub id, hidden, intermediate, key and value size, blocks, vocabulary, context
    "llama_2_7b": ("meta-llama/Llama-2-7b-hf", 4096, 11008, 4096, 32, 32000, 4096),
    "llama_2_13b": ("meta-llama/Llama-2-13b-hf", 5120, 13824, 5120, 40, 32000, 4096),
    "llama_2_70b": ("meta-llama/Llama-2-70b-hf", 8192, 28672, 1024, 80, 32000, 4096),
    "llama_3_8b": ("meta-llama/Meta-Llama-3-8B", 4096, 14336, 1024, 32, 128256, 8192),
    "llama_3_70b": ("meta-llama/Meta-Llama-3-70B", 8192, 28672, 1024, 80, 128256, 8192),
}
FOLDERS = {  # groups of the files in a folder
    "budget": {"compression"},
    "data": {"data"},
    "finetuning": {"finetuning"},
    "method": {"compression"},
    "recipes": {"seed_everything", "model", "data", "calibration", "report"},
    "trainer": {"trainer"},
}
DATA = ["local_text", "wikitext2_c4", "redpajama", "slimpajama"]
SHIPPED = sorted(path.relative_to(ROOT).as_posix() for path in CONFIGS.rglob("*.yaml"))
GROUPS = {path: FOLDERS[path.split("/")[1]] for path in SHIPPED}
MODES = {method: "corrected" for method in METHODS if method.endswith("_plus")} | {"sparsegpt_50": "propagated"}
GROUPS |= {f"configs/method/{method}.yaml": {"calibration", "compression"} for method in MODES}
GROUPS |= {path: {"model", "trainer"} for path in SHIPPED if path.endswith("distillation.yaml")}
_TRAINING = {"seed_everything", "model", "compression", "data", "trainer"}
GROUPS |= {f"configs/recipes/{name}.yaml": _TRAINING for name in ("embedded_model", "small_moe")}
GROUPS |= {f"configs/recipes/{name}arithmetic.yaml": _TRAINING | {"run_dir"} for name in ("", "laconic_")}
GROUPS |= {f"configs/recipes/laconic_{size}.yaml": _TRAINING | {"lr_scheduler"} for size in ("1_5b", "32b")}


@pytest.fixture
def parse(monkeypatch, tmp_path):
    """Parse and instantiate a fit from the command line, and run nothing."""
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")
    monkeypatch.setattr(command_line.CompressionCLI, "_run_subcommand", lambda self, subcommand: None)

    def run(*arguments: str) -> SimpleNamespace:
        cli = command_line.main(["fit", f"--run_dir={tmp_path / 'run'}", *arguments])
        plan = Plan()
        for callback in cli.trainer.callbacks:
            if isinstance(callback, Stage):
                callback.announce(plan)
        compressor = plan.compression and plan.compression.compressor
        return SimpleNamespace(cli=cli, plan=plan, seed=cli.config_init["fit"].seed_everything, compressor=compressor)

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


@pytest.mark.parametrize("method", METHODS)
def test_method_means_what_it_says_beside_any_data(method, parse):
    data = [None, *DATA][list(METHODS).index(method) % (len(DATA) + 1)]
    parsed = parse(config(f"method/{method}"), *([config(f"data/{data}")] if data else []))
    assert parsed.compressor == METHODS[method]
    assert type(parsed.compressor) is type(METHODS[method])
    assert parsed.cli.model.checkpoint.path == "embedded"
    assert parsed.cli.trainer.max_epochs == 0
    assert parsed.plan.calibration.mode == MODES.get(method, "dense")
    assert parsed.plan.calibration.guidance is None
    assert (parsed.plan.compression.budget is not None) == (method == "nowag_vq_2bit_small_plus")


def test_without_a_data_file_text_is_the_documentation_of_python(parse):
    assert parse().cli.datamodule.eval_names == ["python-docs"]


def test_local_text_is_calibrated_and_evaluated_on(parse):
    datamodule = parse(config("data/local_text")).cli.datamodule
    assert datamodule.calibration_files == ["calibration.txt"]
    assert datamodule.eval_files == {"held_out": ["eval.txt"]}
    assert datamodule.calibration_dataset is None


C4_VALIDATION = {"split": "validation", "column": "text", "data_files": "en/c4-validation.00000-of-00008.json.gz"}
PAPERS_EVALUATION = {
    "wikitext2": HubDataset("Salesforce/wikitext", name="wikitext-2-raw-v1", split="test", column="text"),
    "c4": HubDataset("allenai/c4", **C4_VALIDATION, protocol="c4"),
    "c4-new": HubDataset("allenai/c4", **C4_VALIDATION, protocol="c4-new"),
}


def test_papers_text_has_both_ways_for_c4(parse):
    datamodule = parse(config("data/wikitext2_c4")).cli.datamodule
    assert datamodule.calibration_dataset == HubDataset(
        "allenai/c4", split="train[:20000]", column="text", data_files="en/c4-train.00000-of-01024.json.gz"
    )
    assert datamodule.eval_datasets == PAPERS_EVALUATION
    assert datamodule._seq_len == 4096


@pytest.mark.parametrize(
    ("data", "path", "data_files"),
    [
        ("redpajama", "json", "hf://datasets/togethercomputer/RedPajama-Data-1T-Sample/*.jsonl"),
        ("slimpajama", "DKYoon/SlimPajama-6B", None),
    ],
)
def test_pajamas_replace_the_calibration_text_alone(data, path, data_files, parse):
    datamodule = parse(config("data/wikitext2_c4"), config(f"data/{data}")).cli.datamodule
    source = datamodule.calibration_dataset
    assert (source.path, source.name, source.split, source.data_files) == (path, None, "train", data_files)
    assert source.streaming
    assert datamodule.eval_datasets == PAPERS_EVALUATION


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
    plan = parse("--compression.enabled=false").plan
    assert (plan.calibration, plan.compression) == (None, None)


def test_budget_goes_after_a_method(parse):
    method = "nowag_vq_2bit_plus"
    parsed = parse(config(f"method/{method}"), config("budget/sensitivity"))
    assert parsed.compressor == METHODS[method]
    assert parsed.plan.compression.budget == Budget(candidates=None, num_sequences=16)


def test_budget_can_be_changed_and_taken_back(parse):
    method = config("method/nowag_vq_2bit_small_plus")
    candidates = parse(method, "--compression.budget.candidates=[{codebook_size: 64}]").plan.compression.budget
    assert candidates == Budget([{"codebook_size": 64}], num_sequences=16)
    assert parse(method, "--compression.budget=null").plan.compression.budget is None


def test_recipe_of_the_embedded_model_trains_from_scratch(parse):
    parsed = parse(config("recipes/embedded_model"))
    assert parsed.cli.model.random_init
    assert parsed.cli.trainer.max_epochs > 0


@pytest.mark.parametrize(
    ("recipe", "tokens", "rate", "ceiling"),
    [("laconic_1_5b", 1500, (0.002, 0.01), 0.1), ("laconic_32b", 2500, (0.001, 0.002), 0.5)],
)
def test_recipe_of_a_length_budget_has_the_published_settings(
    recipe, tokens, rate, ceiling, parse, model_without_weights
):
    module = parse(config(f"recipes/{recipe}"), f"--model.path={model_without_weights}").cli.model
    objective = module.objective
    budget, sampling = objective.budget, objective.sampling
    assert (budget.tokens, budget.ceiling, budget.cap, budget.hit) == (tokens, ceiling, 0.4, 0.1)
    assert rate[0] <= budget.rate <= rate[1]
    assert (sampling.temperature, sampling.top_p, objective.policy.base) == (1.0, 1.0, "grpo")
    assert 3 <= sampling.group_size <= 6
    assert objective.policy.kl_coefficient == 1e-2
    assert [reward.weight for reward in objective.rewards] == [0.9, 0.1]
    assert module.optimizer_settings.learning_rate == 1e-6


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ([], "embedded-NoWagPruner"),
        ([config("method/nowag_p_50")], "embedded-NoWagPruner"),
        (["--compression.compressor.sparsity=0.7"], "embedded-NoWagPruner-sparsity_0.7"),
        ([config("method/nowag_p_2_4")], "embedded-NoWagPruner-pattern_2_4"),
        ([config("method/nowag_vq_2bit")], "embedded-NoWagQuantizer"),
        (
            [config("method/nowag_vq_2bit_small")],
            "embedded-NoWagQuantizer-subvector_dim_4-codebook_size_256",
        ),
        (["--model.path=a/b"], "b-NoWagPruner"),
        (["--compression.budget.num_sequences=4"], "embedded-NoWagPruner-budget"),
        (["--compression.enabled=false"], "embedded-dense"),
    ],
)
def test_run_dir_is_named_after_model_and_what_is_special_of_the_method(arguments, name, monkeypatch, tmp_path):
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")
    monkeypatch.setattr(command_line.CompressionCLI, "_run_subcommand", lambda self, subcommand: None)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "config.json").write_text("{}")
    assert command_line.main(["fit", *arguments]).model.run_dir == f"runs/{name}"
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipe_of_a_published_model_says_everything_but_method_and_text(recipe, parse, model_without_weights):
    hub_id, *_, context = RECIPES[recipe]
    assert yaml.safe_load((CONFIGS / "recipes" / f"{recipe}.yaml").read_text())["model"] == {"path": hub_id}
    parsed = parse(config("data/wikitext2_c4"), config(f"recipes/{recipe}"), f"--model.path={model_without_weights}")
    assert parsed.cli.datamodule._seq_len == context
    assert parsed.plan.calibration.num_sequences == 128
    assert parsed.plan.calibration.seed == parsed.seed == 0
    assert parsed.plan.calibration.mode == "dense"
    assert parsed.cli.trainer.max_epochs == 0


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipe_has_a_command_for_each_method(recipe):
    quantized = "nowag_vq_2bit_d7" if recipe.endswith("70b") else "nowag_vq_2bit"
    expected = [
        f"python main.py fit --config configs/data/wikitext2_c4.yaml --config configs/recipes/{recipe}.yaml "
        f"--config configs/method/{method}.yaml"
        for method in ("nowag_p_50", "nowag_p_4_8", "nowag_p_2_4", quantized)
    ]
    assert [" ".join(command.split()) for command in commands(f"configs/recipes/{recipe}.yaml")] == expected


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipe_tells_the_memory_and_disk_of_the_formulas(recipe, tmp_path):
    """For a model of the recipe's shapes, without weights."""
    _, hidden, intermediate, kv, num_blocks, vocabulary, seq_len = RECIPES[recipe]
    LlamaConfig(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=num_blocks,
        num_attention_heads=hidden // 128,
        num_key_value_heads=kv // 128,
        vocab_size=vocabulary,
        dtype="bfloat16",
    ).save_pretrained(tmp_path)
    checkpoint = Checkpoint(str(tmp_path))
    linears = [name for name, module in checkpoint.build(empty=True).named_modules() if isinstance(module, nn.Linear)]
    data = needs.DataShape(seq_len, {"wikitext2": 200, "c4": 200, "c4-new": 200}, eval_batch_size=1)

    def stages(compressor) -> list[needs.StageNeeds]:
        sizes = ModelSizes.of(checkpoint, {name: [compressor] for name in linears if "layers" in name})
        return [
            *needs.compression(sizes, CalibrationSettings(batch_size=1), seq_len),
            needs.reference(sizes, data, 1),
            needs.validation(sizes, data, Holding()),
            needs.export(sizes, 1),
        ]

    quantizer = METHODS["nowag_vq_2bit_d7" if recipe.endswith("70b") else "nowag_vq_2bit"]
    pruned, quantized = stages(NoWagPruner()), stages(quantizer)
    both = [*pruned, *quantized]
    expected = [
        max(stage.device for stage in both),
        max(stage.host + stage.shared_host for stage in both) + 3 * 2**30,
        needs.export(ModelSizes.of(checkpoint), 1).disk,
        *(sum(stage.disk for stage in each) for each in (pruned, quantized)),
    ]
    text = (CONFIGS / "recipes" / f"{recipe}.yaml").read_text()
    assert [int(number) for number in re.findall(r"(\d+) GiB", text)] == [ceil(size / 2**30) for size in expected]


def commands(path: str) -> list[str]:
    """Return the commands in the header of a file."""
    text = re.sub(r"\\\n#", " ", (ROOT / path).read_text())
    return [line.lstrip("# ") for line in text.splitlines() if re.match(r"#\s+python main\.py", line)]


@pytest.fixture
def model_without_weights(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    return folder


def test_headers_and_files_keep_the_house_rules():
    for path in SHIPPED:
        text = (ROOT / path).read_text()
        header = re.match(r"(#.*\n)+", text).group()
        assert any(path in command for command in commands(path)), header
        assert len(header.splitlines()) >= 2
        assert not re.search(r"(?<![\w.<:/-])/(home|root|tmp|work|mnt|data)\b", text), path
        assert set(yaml.safe_load(text)) == GROUPS[path], path


@pytest.fixture(scope="module")
def parser():
    """Return a parser that is made once."""
    return make_parser()


# The commands of a recipe differ in the method alone, and every method has a test above.
@pytest.mark.filterwarnings("ignore")  # of what Lightning's own options hold
@pytest.mark.parametrize("path", SHIPPED)
def test_command_of_the_header_parses(path, monkeypatch, parse, parser, model_without_weights):
    """Methods and recipes have tests above that make their objects; a hub id in a file is read as text alone."""
    monkeypatch.chdir(ROOT)
    command = next(each for each in commands(path) if path in each)
    words = shlex.split(command.replace("<folder or hub id>", str(model_without_weights)))
    assert words[:3] == ["python", "main.py", "fit"]
    if path.split("/")[1] in ("method", "recipes"):
        assert parser.parse_args(words[2:]).subcommand == "fit"
    else:
        parse(*words[3:])


def test_nothing_parses_with_a_misspelt_key(parse, tmp_path, capsys):
    text = (CONFIGS / "method" / "nowag_p_50.yaml").read_text()
    (tmp_path / "wrong.yaml").write_text(text.replace("sparsity", "sparsety"))
    with pytest.raises(SystemExit):
        parse(f"--config={tmp_path / 'wrong.yaml'}")
    assert "sparsety" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["fit"], ["--model.path", "--data.seq_len", "--calibration.num_sequences", "--compression.compressor"]),
        (["evaluate"], ["--model.path", "--tasks"]),
        (["compare"], ["--output"]),
        ([], ["fit", "validate", "evaluate", "compare"]),
    ],
)
def test_help_names_groups_and_commands(arguments, expected, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["main.py", *arguments, "--help"])
    with pytest.raises(SystemExit) as exit_:
        command_line.main()
    assert exit_.value.code == 0
    text = capsys.readouterr().out
    assert all(option in text for option in expected)


def test_only_the_parser_of_the_command_is_filled(monkeypatch):
    """Each takes a tenth of a second."""
    filled, fill = [], command_line.CompressionCLI._add_arguments
    monkeypatch.setattr(
        command_line.CompressionCLI, "_add_arguments", lambda self, parser: (filled.append(parser), fill(self, parser))
    )
    monkeypatch.setattr(command_line.CompressionCLI, "parse_arguments", lambda self, parser, args: parser.exit())
    for arguments, number in ((["fit", "--config=a.yaml"], 1), (["compare"], 0), (["--print_completion=bash"], 3)):
        filled.clear()
        with pytest.raises(SystemExit):
            command_line.main(arguments)
        assert len(filled) == number
