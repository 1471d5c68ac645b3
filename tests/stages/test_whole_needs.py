"""What stages with the whole model are expected to need, against what such models hold and write."""

from dataclasses import replace

import pytest
import torch
from test_pipeline_run import everything
from tiny_models import fit_arguments, load_whole, random_tokens, validate_arguments
from torch import nn

import callbacks.preflight
from nowag_pl import ArmorCompressor, NoWagPruner, NoWagQuantizer
from nowag_pl.lit.metrics import Divergence, Perplexity
from nowag_pl.models.checkpoint import Checkpoint
from nowag_pl.models.streaming import StreamedModel
from nowag_pl.modules import CompressedLinear
from nowag_pl.pipeline import block_needs
from nowag_pl.pipeline.preflight import Available, host_bytes
from nowag_pl.pipeline.sizes import ModelSizes
from nowag_pl.pipeline.whole_needs import (
    DISTILLATION_BYTES,
    LOSS_BYTES,
    Holding,
    Training,
    frozen_values,
    packed_bytes,
    questions_needs,
    trained_values,
    training_needs,
    whole_validation_needs,
)
from nowag_pl.stages.teacher import TeacherSettings

pytest_plugins = ["tiny_fixtures"]

TRAINING = Training(seq_len=24, batch_size=2, eval_batch_size=1)
COMPRESSORS = [
    NoWagPruner(sparsity=0.3),
    NoWagPruner(pattern=(2, 4)),
    NoWagQuantizer(subvector_dim=4, codebook_size=32, max_iters=1),
    NoWagQuantizer(subvector_dim=6, codebook_size=12, max_iters=1),
    ArmorCompressor(block_size=16, max_iters=1),
]


@pytest.fixture
def sizes(model_folder):
    return ModelSizes.of(StreamedModel(Checkpoint(str(model_folder(dtype=torch.bfloat16)))), NoWagPruner())


def compress(compressor, shape=(96, 192)) -> CompressedLinear:
    linear = compressor.compress(nn.Linear(shape[1], shape[0], bias=False), torch.rand(shape[1]))
    for parameter in linear.parameters():
        parameter.data = parameter.data.float()
    return linear.requires_grad_()


@pytest.mark.parametrize("compressor", COMPRESSORS, ids=repr)
def test_what_gradients_keep_of_a_weight_is_foreseen(compressor):
    linear, kept = compress(compressor), {}
    own = {tensor.untyped_storage().data_ptr() for tensor in linear.state_dict().values()}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        linear(torch.randn(1, linear.in_features, requires_grad=True))
    measured = sum(storage.nbytes() for address, storage in kept.items() if address not in own) / (96 * 192)
    expected = linear.gradient_bytes / (96 * 192)
    assert measured - 0.2 <= expected <= 1.2 * measured  # 0.2: vectors


@pytest.mark.parametrize("compressor", [COMPRESSORS[1], COMPRESSORS[2]], ids=repr)
def test_model_in_training_is_what_is_foreseen(compressor, model_folder, tmp_path):
    run = everything(model_folder("llama"), tmp_path / "run", compressor)
    run.compressed().save(tmp_path / "export")
    model = run.compressed().assemble()
    parameters = dict(model.named_parameters())
    linears = {name: module for name, module in model.named_modules() if isinstance(module, CompressedLinear)}
    trained = sum(p.numel() for name, p in parameters.items() if name.rpartition(".")[0] in linears)
    in_blocks = sum(p.numel() for name, p in parameters.items() if "layers." in name)
    packed = sum(buffer.nbytes for linear in linears.values() for buffer in linear.buffers())
    sizes = ModelSizes.of(run.model, compressor)
    for each in (sizes, ModelSizes.as_it_is(Checkpoint(str(tmp_path / "export")))):
        assert (each.values, trained_values(each)) == (trained, in_blocks)
        assert frozen_values(each) == sum(p.numel() for p in parameters.values()) - in_blocks
        assert packed <= packed_bytes(each) <= packed + 2 * trained
        assert each.weights == sum(linear.in_features * linear.out_features for linear in linears.values())
    assert sizes.is_compressed_here
    assert not each.is_compressed_here


@pytest.mark.parametrize(("family", "tied"), [("llama", False), ("qwen2", True), ("phi3", False)])
def test_dense_model_is_counted_as_it_is(family, tied, model_folder):
    folder = model_folder(family, tied=tied)
    sizes = ModelSizes.as_it_is(Checkpoint(str(folder)))
    assert trained_values(sizes) == sum(parameter.numel() for parameter in load_whole(folder).parameters())
    assert (frozen_values(sizes), sizes.compressed, sizes.largest_linear) == (0, 0, 0)
    assert (sizes.hidden, sizes.widest, sizes.num_blocks) == (32, 96 if family == "phi3" else 48, 3)


def test_every_trained_value_has_a_gradient_and_two_moments(sizes):
    more = replace(sizes, values=sizes.values + 1000, compressed=sizes.compressed + 2000)
    one, two = (training_needs(each, TRAINING, Holding()) for each in (sizes, more))
    assert two.device - one.device == 16 * 1000
    assert two.disk - one.disk == 12 * 1000
    ddp = [training_needs(each, TRAINING, Holding(num_ranks=4)).device for each in (sizes, more)]
    assert ddp[1] - ddp[0] == 20 * 1000  # and buckets


def test_sharding_divides_states_but_not_restored_weights(sizes):
    whole, sharded = Holding(), Holding(num_ranks=4, sharded=True)
    less = replace(sizes, keeping=0)
    for holding in (whole, sharded):
        kept = training_needs(sizes, TRAINING, holding).device - training_needs(less, TRAINING, holding).device
        assert kept == round(sizes.keeping * sizes.weights)
    large = replace(sizes, values=10**6, compressed=2 * 10**6, compressed_block=0, skeleton=0)
    states = [training_needs(large, TRAINING, holding).device for holding in (whole, sharded)]
    divisible = 16 * trained_values(large)
    assert states[0] - states[1] == divisible - divisible // 4


def test_every_rank_builds_a_sharded_model_in_float32(sizes):
    on_cuda, num_ranks = Available(2**40, 2**40, 2**40), 4
    needs = training_needs(sizes, TRAINING, Holding(num_ranks, sharded=True))
    parameters = trained_values(sizes) + frozen_values(sizes)
    libraries = host_bytes(block_needs.StageNeeds("", 0), on_cuda, num_ranks)
    assert host_bytes(needs, on_cuda, num_ranks) - libraries == num_ranks * (4 * parameters + packed_bytes(sizes))
    validation = whole_validation_needs(sizes, 24, 1, Holding(num_ranks, sharded=True), widened=True)
    assert validation.built == needs.built


@pytest.mark.parametrize(("distilled", "per_logit"), [(False, LOSS_BYTES), (True, DISTILLATION_BYTES)])
def test_logits_of_a_batch_are_counted(distilled, per_logit, sizes):
    training = replace(TRAINING, distilled=distilled, batch_size=500)
    wide = replace(sizes, vocabulary=sizes.vocabulary + 1)
    one, two = (training_needs(each, training, Holding()) for each in (sizes, wide))
    assert two.device - one.device == per_logit * 500 * 24
    assert "data.train_batch_size" in one.device_option
    evaluating = replace(TRAINING, eval_batch_size=5000)
    assert "data.eval_batch_size" in training_needs(sizes, evaluating, Holding()).device_option


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("compared", [False, True])
def test_logits_that_are_measured_are_counted(dtype, compared, sizes):
    num_tokens, vocabulary = 1024, 4096
    expected = block_needs.measuring_bytes(
        replace(sizes, vocabulary=vocabulary, itemsize=dtype.itemsize), num_tokens, compared
    )
    tokens = torch.zeros(1, num_tokens, dtype=torch.int64)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        logits = torch.zeros(1, num_tokens, vocabulary, dtype=dtype)
        Perplexity().update(logits, tokens)
        if compared:
            Divergence().update(torch.zeros_like(logits), logits)
    held, peak = 0, 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    assert peak <= expected <= 2 * peak


def test_teacher_is_what_is_written(model_folder, tmp_path):
    run = everything(model_folder("llama"), tmp_path / "run", NoWagPruner())
    sizes, windows = ModelSizes.of(run.model, NoWagPruner()), random_tokens(5, 24, seed=9)
    written = set((tmp_path / "run" / "reference").glob("*.npy"))
    for top_k in (None, 3):
        run.teacher(windows, TeacherSettings(top_k=top_k))
        new = set((tmp_path / "run" / "reference").glob("*.npy")) - written
        written |= new
        needs = block_needs.teacher_needs(sizes, 5, 24, 2, top_k)
        assert sum(file.stat().st_size - 128 for file in new) == needs.disk
        assert needs.shared_host == sizes.hidden_states(5, 24)
    narrow = block_needs.teacher_needs(sizes, 5, 24, 2, None)
    assert needs.device - sizes.skeleton == 20 * 2 * 24 * sizes.vocabulary > narrow.device - sizes.skeleton


def test_questions_need_the_whole_model(sizes):
    model = sizes.skeleton + sizes.compressed + sizes.others
    needs = questions_needs(sizes, 24, 2)
    assert needs.built == model
    assert needs.device - model >= 3 * sizes.itemsize * 48 * sizes.vocabulary


@pytest.fixture
def shown(monkeypatch):
    """Keep what the preflight shows, on a machine that has next to nothing."""
    stages: list[block_needs.StageNeeds] = []
    show = callbacks.preflight.show
    monkeypatch.setattr(Available, "here", classmethod(lambda cls, folder, device: cls(None, 2**14, 2**14)))
    monkeypatch.setattr(callbacks.preflight, "show", lambda each, *rest: (stages.extend(each), show(each, *rest)))
    return stages


@pytest.mark.parametrize("compressing", [True, False])
def test_fit_with_training_shows_its_stages_and_warns(
    compressing, shown, command_line, model_folder, workplace, tmp_path, caplog
):
    options = [
        "--trainer.max_epochs=1",
        "--data.max_train_windows=4",
        "--data.train_batch_size=4",
        "--data.eval_batch_size=1",
    ]
    distilled = ["--model.objective=nowag_pl.lit.objectives.Distillation", "--model.objective.top_k=5"]
    options += distilled if compressing else ["--compression.enabled=false"]
    outcome = command_line(fit_arguments(workplace, model_folder(), tmp_path / "run", *options))
    assert outcome.code == 0, outcome.message
    before = ["calibration", "compression", "dense reference"] if compressing else []
    after = ["teacher", "training"] if compressing else ["training"]
    assert [needs.stage for needs in shown] == [*before, "validation", "export", *after]
    assert "training may need" in caplog.text
    assert "data.train_batch_size" in caplog.text
    assert ("model.objective.top_k" in caplog.text) == compressing
    written = (tmp_path / "run" / "training" / "last.ckpt").stat().st_size
    assert shown[-1].disk * 0.7 < written < shown[-1].disk + 2**17  # and what is beside tensors


@pytest.mark.parametrize("enabled", [True, False])
def test_validate_shows_its_needs_and_warns(enabled, shown, command_line, model_folder, workplace, tmp_path, caplog):
    options = ["--data.eval_batch_size=3", f"--preflight.enabled={enabled}"]
    outcome = command_line(validate_arguments(workplace, model_folder(), tmp_path / "run", *options))
    assert outcome.code == 0, outcome.message
    assert [needs.stage for needs in shown] == ["validation"] * enabled
    assert ("validation may need" in caplog.text) == enabled
    assert ("data.eval_batch_size" in caplog.text) == enabled


def test_validation_alone_holds_no_second_model(model_folder):
    checkpoint = Checkpoint(str(model_folder()))
    alone = ModelSizes.as_it_is(checkpoint)
    made = ModelSizes.of(StreamedModel(checkpoint), NoWagPruner())
    one, two = (block_needs.validation_needs(each, {"text": 9}, 24, 3) for each in (alone, made))
    assert one.shared_host == two.shared_host == alone.hidden_states(9, 24)
    assert one.device < two.device
    assert (one.disk, one.host) == (0, alone.block)
