"""What a run is expected to need, against what it writes, holds and keeps."""

import re
from dataclasses import replace
from math import ceil

import pytest
import torch
from stage_runs import WINDOWS, plan_of, run_of
from tiny_models import fit_arguments, load_whole, random_tokens, validate_arguments
from torch import nn

import callbacks.preflight
from nowag_pl import ArmorCompressor, MagnitudePruner, NoWagPruner, NoWagQuantizer, NoWagTrellis, needs
from nowag_pl.compressors import Compressor
from nowag_pl.compressors.budget import Budget
from nowag_pl.files import read_tensors
from nowag_pl.lit.metrics import Divergence, Perplexity
from nowag_pl.models.checkpoint import Checkpoint
from nowag_pl.models.streaming import StreamedModel
from nowag_pl.needs import DataShape, StageNeeds, Training, stages_of_fit
from nowag_pl.reports.needs_table import Available
from nowag_pl.run.store import ArtefactStore
from nowag_pl.stages.plan import (
    CalibrationSettings,
    ExportSettings,
    FinetuningSettings,
    GuidanceSettings,
    ReportSettings,
    RotationSettings,
)
from nowag_pl.stages.sizes import Holding, LinearSizes, ModelSizes, methods_of
from nowag_pl.stages.teacher import TeacherSettings

pytest_plugins = ["tiny_fixtures"]

PRUNER = NoWagPruner(pattern=(2, 4))
QUANTIZER = NoWagQuantizer(subvector_dim=4, codebook_size=32, max_iters=1)
COMPRESSORS = [
    NoWagPruner(sparsity=0.3),
    NoWagPruner(sparsity=0.3, structured="columns"),
    MagnitudePruner(pattern=(1, 4)),
    PRUNER,
    QUANTIZER,
    NoWagQuantizer(subvector_dim=5, codebook_size=12, max_iters=1),
    ArmorCompressor(block_size=16, max_iters=1),
]
EVALUATION = {"one": random_tokens(5, 24, seed=1), "two": random_tokens(3, 24, seed=2)}
DATA = DataShape(24, {name: len(tokens) for name, tokens in EVALUATION.items()}, 2)


class Untold(Compressor):
    def compress(self, linear, second_moment):
        raise NotImplementedError


def sizes_of(folder, compressor=PRUNER, **plan) -> ModelSizes:
    run = run_of(folder, folder.parent / "unused", compressor, **plan)
    return ModelSizes.of(run.checkpoint, methods_of(run))


@pytest.fixture
def sizes(model_folder):
    return sizes_of(model_folder(dtype=torch.bfloat16))


def changed(sizes: ModelSizes, **changes: int) -> ModelSizes:
    return replace(sizes, total=sizes.total._replace(**changes))


@pytest.mark.parametrize("compressor", COMPRESSORS, ids=repr)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sizes_of_a_linear_are_those_of_what_the_method_makes(compressor, dtype):
    linear = nn.Linear(32, 24, dtype=dtype)
    expected = LinearSizes.of(compressor.compress(linear, torch.rand(32)), [], dtype.itemsize)
    foreseen = LinearSizes.of(linear, [compressor], dtype.itemsize)
    assert foreseen == expected._replace(compressing=compressor.working_bytes((24, 32)))
    assert foreseen.held >= foreseen.stored == foreseen.candidates > 0


def test_method_that_cannot_tell_counts_as_dense():
    sizes = LinearSizes.of(nn.Linear(32, 24), [Untold()], 4)
    assert (sizes.values, sizes.packed) == (32 * 24, 0)
    assert sizes.held == sizes.stored == 4 * 32 * 24
    told = LinearSizes.of(nn.Linear(32, 24), [QUANTIZER], 4)
    assert sizes.restoring > told.restoring
    assert sizes.keeping > told.keeping


@pytest.mark.parametrize("compressor", COMPRESSORS, ids=repr)
def test_what_gradients_keep_of_a_weight_is_foreseen(compressor):
    linear = compressor.compress(nn.Linear(192, 96, bias=False), torch.rand(192)).float().requires_grad_()
    own = {tensor.untyped_storage().data_ptr() for tensor in linear.state_dict().values()}
    kept = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        linear(torch.randn(1, 192, requires_grad=True))
    measured = sum(storage.nbytes() for address, storage in kept.items() if address not in own) / (96 * 192)
    keeping = LinearSizes.of(linear, [], 4).keeping / (96 * 192)
    # Vectors are kept, too.
    assert measured - 0.2 <= keeping <= 1.2 * measured


@pytest.mark.parametrize(
    ("family", "compressor", "plan"),
    [
        ("llama", PRUNER, {}),
        ("qwen2", QUANTIZER, {"mode": "propagated"}),
        ("phi3", PRUNER, {"mode": "corrected"}),
        ("llama", NoWagPruner(update="refit"), {"ignore": ("blocks:0",)}),
        ("llama", PRUNER, {"targets": ("mlp.*",), "overrides": {"down_proj": QUANTIZER}}),
    ],
)
def test_expected_disk_is_what_is_written(family, compressor, plan, model_folder, tmp_path):
    run = run_of(model_folder(family, tied=family == "qwen2"), tmp_path / "run", compressor, **plan)
    sizes = ModelSizes.of(run.checkpoint, methods_of(run))
    run.calibrate(WINDOWS)
    run.compress()
    run.reference(EVALUATION, 2)
    run.compressed().save(tmp_path / "export")
    run.compressed().save(tmp_path / "dense", "dense")

    def written(folder):
        files = (tmp_path / folder).glob("*.safetensors")
        tensors = {f"{file}.{name}": tensor for file in files for name, tensor in read_tensors(file)[0].items()}
        biases = sum(tensor.nbytes for name, tensor in tensors.items() if name.endswith(".bias"))
        return sum(tensor.nbytes for tensor in tensors.values()), biases

    stages = needs.compression(sizes, CalibrationSettings(len(WINDOWS), mode=plan.get("mode", "dense")), 24)
    stored, biases = written("run/compressed")
    assert sum(stage.disk for stage in stages) == written("run/moments")[0] + stored - biases
    assert needs.export(sizes, 2).disk == 2 * written("export")[0]
    assert needs.export(sizes, 1, dense=True).disk == written("dense")[0]
    arrays = sum(file.stat().st_size - 128 - 80 for file in (tmp_path / "run" / "reference").glob("*.npy"))
    assert needs.reference(sizes, DATA, 2).disk == arrays
    as_it_is = ModelSizes.of(Checkpoint(str(tmp_path / "export")))
    assert as_it_is.stored == written("export")[0]
    assert (as_it_is.compressed_block, as_it_is.trained_values) == (sizes.compressed_block, sizes.trained_values)
    assert not as_it_is.is_compressed_here


def test_sizes_are_those_of_the_model(model_folder):
    folder = model_folder("phi3", dtype=torch.bfloat16)
    model, sizes = StreamedModel(Checkpoint(str(folder))), sizes_of(folder)
    # Gate and up are one linear.
    assert (sizes.itemsize, sizes.hidden, sizes.widest, sizes.num_blocks) == (2, 32, 96, 3)
    assert sizes.dense_block == sum(parameter.nbytes for parameter in model.load_block(0).parameters())
    assert sizes.skeleton == sum(parameter.nbytes for parameter in model.skeleton.parameters())
    assert sizes.linear.weights == 96 * 32


def test_linears_that_stay_dense_are_counted_as_such(model_folder):
    every, some = sizes_of(model_folder()), sizes_of(model_folder(), targets=["mlp.*"], ignore=["blocks:0"])
    attention = 4 * (2 * 32 * 32 + 2 * 16 * 32)
    mlp = 4 * 3 * 32 * 48
    assert some.others - every.others == 3 * attention + mlp
    assert some.dense_blocks == every.dense_blocks
    assert some.dense_block == every.dense_block
    # The first block stays as it is.
    assert some.compressed_block == some.dense_block > every.compressed_block


@pytest.mark.parametrize(("family", "tied"), [("llama", False), ("qwen2", True), ("phi3", False)])
def test_dense_model_is_counted_as_it_is(family, tied, model_folder):
    folder = model_folder(family, tied=tied)
    sizes = ModelSizes.of(Checkpoint(str(folder)))
    assert sizes.trained_values == sum(parameter.numel() for parameter in load_whole(folder).parameters())
    assert (sizes.frozen_values, sizes.total, sizes.is_compressed_here) == (0, LinearSizes(), False)
    validation = needs.validation(sizes, DATA, Holding())
    assert validation.host == sizes.dense_block
    assert validation.device <= needs.validation(sizes_of(folder), DATA, Holding()).device


def test_full_second_moments_are_counted_for_all_linears_where_one_needs_them(model_folder):
    full = NoWagPruner(sparsity=0.5, update="refit")
    plain, some = sizes_of(model_folder()), sizes_of(model_folder(), overrides={"down_proj": full})
    widths = [linear.in_features for linear in StreamedModel(Checkpoint(str(model_folder()))).linears(0).values()]
    assert (plain.block.pairs, some.block.pairs) == (0, sum(width**2 for width in widths))
    # Three matrices in float64.
    assert some.linear.compressing > plain.linear.compressing + 3 * 8 * max(widths) ** 2
    settings = CalibrationSettings(7, batch_size=3)
    (stage,) = needs.compression(some, settings, 24)
    assert stage.host == some.compressed_block + 4 * some.block.pairs
    little = replace(some, skeleton=0, linear=some.linear._replace(compressing=-needs.CHUNK_BYTES))
    gathering = some.dense_block + some.activations(3 * 24) + 8 * some.block.pairs
    assert needs.compression(little, settings, 24)[0].device == gathering


@pytest.mark.parametrize(
    ("mode", "update", "names", "streams"),
    [
        ("dense", None, ["calibration", "compression"], [1, 0]),
        ("dense", "refit", ["compression"], [1]),
        ("propagated", None, ["compression"], [1]),
        ("corrected", None, ["compression"], [2]),
    ],
)
def test_sequences_pass_once(mode, update, names, streams, model_folder):
    sizes = sizes_of(model_folder(), NoWagPruner(sparsity=0.5, update=update))
    stages = needs.compression(sizes, CalibrationSettings(5, mode=mode), 24)
    assert [stage.stage for stage in stages] == names
    assert [stage.shared_host for stage in stages] == [number * sizes.hidden_states(5, 24) for number in streams]
    assert "calibration.num_sequences" in stages[0].host_option


def test_corrected_compression_needs_both_models_drifts_and_a_matrix_to_invert(sizes):
    sizes = replace(sizes, linear=sizes.linear._replace(compressing=0))
    settings = CalibrationSettings(7, mode="corrected", batch_size=3)
    (stage,) = needs.compression(sizes, settings, 24)
    both = sizes.dense_block + sizes.compressed_block + 2 * sizes.activations(72)
    num_weights = sizes.dense_block // sizes.itemsize
    assert stage.device - both - needs.CHUNK_BYTES == 12 * num_weights + 44 * sizes.widest**2
    larger = replace(sizes, linear=sizes.linear._replace(compressing=50 * sizes.widest**2))
    assert needs.compression(larger, settings, 24)[0].device - stage.device == 10 * sizes.widest**2


@pytest.mark.parametrize("compressor", [PRUNER, QUANTIZER, ArmorCompressor(block_size=16, max_iters=1)], ids=repr)
def test_finetuning_of_a_block_takes_what_is_expected(compressor):
    """Wide linears, beside which activations are nothing; gradients of an earlier batch are there already."""
    linears = [compressor.compress(nn.Linear(384, 384, bias=False), torch.rand(384)) for _ in range(4)]
    block = nn.Sequential(*linears).float().requires_grad_()
    optimizer = torch.optim.AdamW(block.parameters())

    def accumulate():
        block(torch.randn(1, 384)).square().mean().backward()

    accumulate()
    optimizer.step()
    states = [tensor for state in optimizer.state.values() for tensor in state.values()]
    gradients = [parameter.grad for parameter in block.parameters()]
    held = sum(tensor.nbytes for tensor in (*block.state_dict().values(), *states, *gradients))
    each = [LinearSizes.of(linear, [], 4) for linear in linears]
    total = LinearSizes.summed(each)
    sizes = ModelSizes(1, 0, 0, 0, 4, 0, 0, 0, 0, total.values, total, total, LinearSizes.largest(each), True)
    measured = held + peak_of(accumulate)
    assert measured <= needs.finetuning(sizes, FinetuningSettings(), 24, 1).device <= 1.1 * measured


def test_every_trained_value_has_a_gradient_and_two_moments(sizes):
    more = changed(sizes, values=sizes.total.values + 1000)
    one, two = (needs.end_to_end(each, DATA, Training(2), Holding()) for each in (sizes, more))
    assert two.device - one.device == 16 * 1000
    assert two.disk - one.disk == 12 * 1000
    ddp = [needs.end_to_end(each, DATA, Training(2), Holding(num_ranks=4)).device for each in (sizes, more)]
    # And buckets.
    assert ddp[1] - ddp[0] == 20 * 1000


def test_sharding_divides_states_but_not_restored_weights(sizes):
    whole, sharded = Holding(), Holding(num_ranks=4, sharded=True)
    for holding in (whole, sharded):
        one, two = (needs.end_to_end(each, DATA, Training(50), holding) for each in (changed(sizes, keeping=0), sizes))
        assert two.device - one.device == sizes.total.keeping
    large = replace(changed(sizes, values=10**6), skeleton=0, block=LinearSizes(), compressed_block=0)
    states = [needs.end_to_end(large, DATA, Training(50), holding).device for holding in (whole, sharded)]
    divisible = 16 * large.trained_values + large.total.packed
    assert states[0] - states[1] == divisible - ceil(divisible / 4)


def test_a_sharded_model_is_made_a_block_at_a_time(sizes):
    holding = Holding(4, sharded=True, streams=False, widened=True)
    built = max(ceil(max(sizes.compressed_block, sizes.skeleton) / 4), sizes.linear.held)
    assert needs.end_to_end(sizes, DATA, Training(2), holding).built == built
    assert needs.validation(sizes, DATA, holding).built == built
    # One of random weights is made whole, with trained values in float32.
    whole = 4 * sizes.trained_values + sizes.itemsize * sizes.frozen_values + sizes.total.packed
    assert needs.end_to_end(sizes, DATA, Training(2), replace(holding, random=True)).built == whole


@pytest.mark.parametrize(
    ("teacher", "per_logit"), [(None, needs.LOSS_BYTES), (TeacherSettings(), needs.DISTILLATION_BYTES)]
)
def test_logits_of_a_batch_are_counted_as_many_as_are_there_together(teacher, per_logit, sizes):
    wide = replace(sizes, vocabulary=sizes.vocabulary + 1)
    for batch_size, counted in ((50, 50 * 24), (500, 0)):
        one, two = (needs.end_to_end(each, DATA, Training(batch_size, teacher), Holding()) for each in (sizes, wide))
        assert two.device - one.device == per_logit * counted
    assert "data.train_batch_size" in one.device_option
    evaluating = replace(DATA, eval_batch_size=5000)
    assert "data.eval_batch_size" in needs.end_to_end(sizes, evaluating, Training(2), Holding()).device_option


def test_recomputed_activations_are_those_of_a_block(sizes):
    kept, recomputed = (
        needs.end_to_end(sizes, DATA, Training(50, recompute=each), Holding()) for each in (False, True)
    )
    others = sizes.num_blocks - 1
    each = 50 * 24 * 4 * (13 * sizes.hidden + 5 * sizes.widest)
    inputs = sizes.num_blocks * 4 * 50 * 24 * sizes.hidden
    weights = sizes.total.keeping - sizes.block.keeping
    assert kept.device - recomputed.device == others * each + weights - inputs
    assert "model.recompute=true" in kept.device_option
    assert "model.recompute=true" not in recomputed.device_option


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_that_are_measured_are_counted(dtype, sizes):
    num_tokens, vocabulary = 1024, 4096
    wide = replace(sizes, vocabulary=vocabulary, itemsize=dtype.itemsize)
    tokens = torch.zeros(1, num_tokens, dtype=torch.int64)

    def measure():
        logits = torch.zeros(1, num_tokens, vocabulary, dtype=dtype)
        Perplexity().update(logits, tokens)
        Divergence().update(torch.zeros_like(logits), logits)

    peak = peak_of(measure)
    # Families that cap logits need copies of them.
    assert peak <= wide.measuring(num_tokens) <= 8 / dtype.itemsize * 2 * peak
    assert wide.measuring(10**6, 2**20) < wide.measuring(10**6, 2**26) < 2**26 + 2**26


def peak_of(work) -> int:
    """Return the most memory that is allocated while something works, beside what is there before."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        work()
    held, peak = 0, 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


def test_teacher_is_what_is_written(model_folder, tmp_path):
    run, windows = run_of(model_folder("llama"), tmp_path / "run"), random_tokens(5, 24, seed=9)
    sizes = ModelSizes.of(run.checkpoint, methods_of(run))
    written = set()
    for top_k in (None, 3):
        settings = TeacherSettings(top_k=top_k, batch_size=2)
        run.teacher(windows, settings)
        new = set((tmp_path / "run" / "reference").glob("*.npy")) - written
        written |= new
        stage = needs.teacher(sizes, settings, 5, 24)
        assert sum(file.stat().st_size - 128 - 80 for file in new) == stage.disk
        assert stage.shared_host == sizes.hidden_states(5, 24)
    assert stage.device - sizes.skeleton == 20 * 2 * 24 * sizes.vocabulary


def test_questions_need_the_whole_model(sizes):
    stage = needs.questions(sizes, 24, 2)
    assert stage.built == sizes.skeleton + sizes.others + sizes.total.stored
    assert stage.device - stage.built >= 3 * sizes.itemsize * 48 * sizes.vocabulary


def test_plan_decides_which_stages_there_are(sizes):
    plan = replace(
        plan_of(PRUNER, budget=Budget()),
        finetuning=FinetuningSettings(),
        export=ExportSettings(),
        report=ReportSettings(),
    )
    training = Training(2, TeacherSettings(), 5)
    everything = stages_of_fit(sizes, plan, DATA, Holding(), training)
    first = ["calibration", "compression", "budget", "dense reference", "validation", "finetuning"]
    assert [stage.stage for stage in everything] == [*first, "export", "teacher", "training"]
    assert next(stage for stage in everything if stage.stage == "export").disk == 2 * sizes.stored
    plan = replace(plan, calibration=None, compression=None, finetuning=None)
    alone = replace(sizes, is_compressed_here=False)
    assert [stage.stage for stage in stages_of_fit(alone, plan, DATA, Holding())] == ["validation"]


@pytest.fixture
def shown(monkeypatch):
    """Keep what the preflight shows, on a machine that has next to nothing."""
    stages: list[StageNeeds] = []
    show = callbacks.preflight.show
    monkeypatch.setattr(Available, "here", classmethod(lambda cls, folder, device: cls(None, 2**14, 2**14)))
    monkeypatch.setattr(callbacks.preflight, "show", lambda each, *rest: (stages.extend(each), show(each, *rest)))
    return stages


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--compression.compressor.pattern=[2,5]"], r"layers\.0\.self_attn\.q_proj: .*divisible by 5"),
        (
            ["--compression.compressor=nowag_pl.NoWagQuantizer", "--compression.compressor.codebook_size=180"],
            r"layers\.0\.self_attn\.k_proj: .*180 codewords for 96 subvectors",
        ),
    ],
)
def test_method_that_does_not_fit_is_refused_before_anything_is_computed(
    options, message, command_line, model_folder, workplace, tmp_path
):
    outcome = command_line(fit_arguments(workplace, model_folder(), tmp_path / "run", *options))
    assert outcome.code == 1
    assert re.search(message, outcome.message)
    assert not (tmp_path / "run" / "moments").exists()


@pytest.mark.parametrize("compressing", [True, False])
def test_fit_shows_its_stages_and_warns(compressing, shown, command_line, model_folder, workplace, tmp_path, caplog):
    options = ["--trainer.max_epochs=1", "--data.max_train_windows=4", "--data.train_batch_size=4"]
    options += ["--data.eval_batch_size=1"]
    finetuning = ["--finetuning.enabled=true", "--finetuning.max_epochs=1", "--finetuning.num_sequences=2"]
    distilling = ["--model.objective=nowag_pl.lit.objectives.Distillation", "--model.objective.top_k=5"]
    options += [*finetuning, *distilling] if compressing else ["--compression.enabled=false"]
    outcome = command_line(fit_arguments(workplace, model_folder(), tmp_path / "run", *options))
    assert outcome.code == 0, outcome.message
    before = ["calibration", "compression", "dense reference"] if compressing else []
    between = ["finetuning", "export", "teacher"] if compressing else ["export"]
    assert [stage.stage for stage in shown] == [*before, "validation", *between, "training"]
    # Nothing fits here, and as few sequences at a time as possible come nearest.
    for option in ("calibration.batch_size=1", "report.batch_size=1"):
        assert (f"{option}, as more at a time may not fit" in caplog.text) == compressing
    assert "training may need" in caplog.text
    assert "data.train_batch_size" in caplog.text
    for option in ("model.objective.top_k", "calibration.num_sequences", "finetuning.activations=disk"):
        assert (option in caplog.text) == compressing
    written = (tmp_path / "run" / "training" / "last.ckpt").stat().st_size
    # And what is beside tensors.
    assert shown[-1].disk * 0.7 < written < shown[-1].disk + 2**17


@pytest.mark.parametrize("enabled", [True, False])
def test_validate_shows_its_needs_and_warns(enabled, shown, command_line, model_folder, workplace, tmp_path, caplog):
    options = ["--data.eval_batch_size=3", f"--preflight.enabled={enabled}"]
    outcome = command_line(validate_arguments(workplace, model_folder(), tmp_path / "run", *options))
    assert outcome.code == 0, outcome.message
    assert [stage.stage for stage in shown] == ["validation"] * enabled
    assert ("data.eval_batch_size" in caplog.text) == enabled


def test_guidance_along_both_sides_writes_what_is_expected(model_folder, tmp_path):
    method = NoWagTrellis(state_bits=8, update="two_sided")
    run = run_of(model_folder(), tmp_path / "run", method, guidance=GuidanceSettings())
    sizes = ModelSizes.of(run.checkpoint, methods_of(run))
    run.calibrate(WINDOWS)
    files = [*(tmp_path / "run").glob("guidance/*"), *(tmp_path / "run").glob("output_moments/*")]
    written = sum(tensor.nbytes for file in files for tensor in read_tensors(file)[0].values())
    settings = CalibrationSettings(len(WINDOWS), guidance=GuidanceSettings())
    assert needs.guidance(sizes, settings, 24).disk == written
    one_sided = ModelSizes.of(run.checkpoint, {name: [NoWagTrellis(state_bits=8)] for name in methods_of(run)})
    assert needs.guidance(one_sided, settings, 24).disk == 4 * 21 * WINDOWS.numel()


def test_rotation_writes_no_more_than_is_expected(model_folder, tmp_path, monkeypatch):
    run = run_of(model_folder(tied=True), tmp_path / "run")
    run.plan.rotation = RotationSettings(num_steps=1)
    monkeypatch.setattr(ArtefactStore, "remove", lambda *_: None)
    run.rotate(WINDOWS)
    written = sum(file.stat().st_size for file in (tmp_path / "run" / "rotation").rglob("*.safetensors"))
    sizes = ModelSizes.of(run.checkpoint, methods_of(run))
    names = [stage.stage for stage in stages_of_fit(sizes, run.plan, DATA, Holding())]
    assert names[0] == "rotation"
    assert 0.6 * written < needs.rotation(sizes, run.plan.calibration, 24).disk < 1.2 * written
