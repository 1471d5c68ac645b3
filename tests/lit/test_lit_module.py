"""The LightningModule and the trainer around it, without the command line."""

import warnings
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import Callback
from tiny_models import SEQ_LEN, load_whole, random_tokens

from nowag_pl.lit.building import begin_run
from nowag_pl.lit.datamodule import TokenDataModule
from nowag_pl.lit.module import LitCausalLM
from nowag_pl.lit.phases import is_compressing
from nowag_pl.lit.trainer import CompressionTrainer
from nowag_pl.models.checkpoint import Checkpoint
from nowag_pl.stages.plan import Plan

pytest_plugins = ["tiny_fixtures"]


@pytest.fixture(autouse=True)
def quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.fixture
def data(workplace):
    return TokenDataModule(
        [str(workplace / "calibration.txt")],
        {"held_out": str(workplace / "eval.txt")},
        seq_len=SEQ_LEN,
        cache_dir=str(workplace / "cache"),
    )


def trainer(tmp_path, *callbacks, **settings) -> CompressionTrainer:
    return CompressionTrainer(
        accelerator="cpu",
        default_root_dir=tmp_path,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        callbacks=list(callbacks),
        **{"max_epochs": 0} | settings,
    )


class Phases(Callback):
    """Note what is validated."""

    def __init__(self):
        self.seen = []

    def on_validation_end(self, trainer, pl_module):
        self.seen.append((trainer.phase, trainer.state.fn, is_compressing(trainer, "validate")))


def test_fit_without_epochs_validates_once(data, model_folder, tmp_path):
    phases = Phases()
    trainer(tmp_path, phases).fit(LitCausalLM(str(model_folder())), datamodule=data)
    assert phases.seen == [("one_shot", "validate", True)]


def test_fit_with_epochs_validates_before_and_after(data, model_folder, tmp_path):
    phases = Phases()
    settings = {"max_epochs": 1, "limit_train_batches": 2, "num_sanity_val_steps": 0}
    trainer(tmp_path, phases, **settings).fit(LitCausalLM(str(model_folder())), datamodule=data)
    assert phases.seen[0] == ("one_shot", "validate", True)
    assert phases.seen[-1] == ("finetuned", "validate", True)
    assert [function for _, function, _ in phases.seen].count("validate") == 2


def test_validate_compresses_nothing(data, model_folder, tmp_path):
    phases = Phases()
    trainer(tmp_path, phases).validate(LitCausalLM(str(model_folder())), datamodule=data)
    assert [compressing for _, _, compressing in phases.seen] == [False]


def test_forward_is_the_models(model_folder):
    module = LitCausalLM(str(model_folder()))
    module.configure_model()
    tokens = random_tokens(2)
    with torch.no_grad():
        assert torch.equal(module(tokens), load_whole(model_folder())(tokens).logits)


def test_model_is_configured_once(model_folder):
    module = LitCausalLM(str(model_folder()))
    module.configure_model()
    first = module.model
    module.configure_model()
    assert module.model is first


def test_what_was_assembled_is_taken(model_folder):
    module, model = LitCausalLM(str(model_folder())), torch.nn.Identity()
    module.compressed = SimpleNamespace(assemble=lambda: model)
    module.configure_model()
    assert module.model is model


def test_random_start_is_not_the_checkpoint(model_folder):
    module = LitCausalLM(str(model_folder()), random_init=True)
    module.configure_model()
    assert not torch.equal(module.model.lm_head.weight, load_whole(model_folder()).lm_head.weight)


@pytest.mark.parametrize(
    ("run_dir", "random_init", "message"),
    [(None, False, "Expected a run_dir"), ("run", True, "Expected a dense model to compress.*has random weights")],
)
def test_run_wants_a_folder_and_a_dense_model(run_dir, random_init, message, model_folder):
    with pytest.raises(ValueError, match=message):
        begin_run(Checkpoint(str(model_folder())), run_dir, random_init, Plan(), torch.device("cpu"))


def test_vectors_are_not_decayed_and_nothing_is_left_out(data, model_folder, tmp_path):
    groups = []

    class Look(Callback):
        def on_train_start(self, trainer, pl_module):
            groups.extend(trainer.optimizers[0].param_groups)

    module = LitCausalLM(str(model_folder("qwen2")), weight_decay=0.3)
    settings = {"max_epochs": 1, "limit_train_batches": 1}
    trainer(tmp_path, Look(), **settings).fit(module, datamodule=data)
    decays = {parameter: group["weight_decay"] for group in groups for parameter in group["params"]}
    assert set(decays) == set(module.parameters())
    assert all(decay == (0.3 if parameter.ndim >= 2 else 0) for parameter, decay in decays.items())


def test_training_lowers_the_loss(data, model_folder, tmp_path):
    module = LitCausalLM(str(model_folder(seed=5)), learning_rate=0.01)
    values = []

    class Watch(Callback):
        def on_validation_end(self, trainer, pl_module):
            values.append(pl_module.eval_metrics["held_out"]["perplexity"])

    settings = {"max_epochs": 1, "limit_train_batches": 6, "check_val_every_n_epoch": 5}
    trainer(tmp_path, Watch(), **settings).fit(module, datamodule=data)
    assert values[-1] < 0.5 * values[0]
