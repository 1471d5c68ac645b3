"""Adapters inside a model: they begin without effect, come off for a while, and come back from their folder."""

import peft
import pytest
import torch
from tiny_models import load_whole, random_tokens

from nowag_pl import NoWagPruner, SecondMoment
from nowag_pl.models.adapters import (
    AdapterSettings,
    adapters_removed,
    add_adapters,
    save_adapters,
    train_adapters_alone,
)

pytest_plugins = ["tiny_fixtures"]
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")


def logits(model):
    with torch.no_grad():
        return model(random_tokens(1)).logits


@pytest.fixture(params=["dense", "compressed"])
def model(request, model_folder):
    model = load_whole(model_folder())
    if request.param == "compressed":
        name = "model.layers.0.mlp.up_proj"
        linear = model.get_submodule(name)
        moment = SecondMoment(linear.in_features)
        moment.update(torch.randn(64, linear.in_features))
        model.set_submodule(name, NoWagPruner(0.5).compress(linear, moment.compute()))
    return model


def test_adapters_are_trained_alone_and_come_off_and_back(model, model_folder, tmp_path):
    before = logits(model)
    add_adapters(model, AdapterSettings(rank=2, targets=["up_proj", "q_proj"]))
    assert torch.equal(logits(model), before)
    train_adapters_alone(model)
    trained = {name: value for name, value in model.named_parameters() if value.requires_grad}
    assert len(trained) == 3 * 2 * 2  # blocks, targets, matrices
    with torch.no_grad():
        for value in trained.values():
            value.normal_(0, 0.3)
    after = logits(model)
    assert not torch.allclose(after, before, atol=1e-2)
    with adapters_removed(model):
        assert torch.equal(logits(model), before)
    assert torch.equal(logits(model), after)

    save_adapters(model, tmp_path / "adapter", str(model_folder()))
    with adapters_removed(model):
        config = peft.LoraConfig.from_pretrained(tmp_path / "adapter")
        assert config.base_model_name_or_path == str(model_folder())
    reloaded = load_whole(model_folder())
    reloaded.set_submodule("model.layers.0.mlp.up_proj", model.get_submodule("model.layers.0.mlp.up_proj.base_layer"))
    from nowag_pl import lora_for_compressed

    opened = peft.PeftModel.from_pretrained(reloaded, tmp_path / "adapter", config=lora_for_compressed(config))
    torch.testing.assert_close(logits(opened), after)


def test_targets_have_to_be_there(model_folder):
    model = load_whole(model_folder())
    with pytest.raises(ValueError, match="it has no qproj"):
        add_adapters(model, AdapterSettings(targets=["qproj"]))
    with pytest.raises(ValueError, match=r"adapters\.rank of at least 1"):
        AdapterSettings(rank=0)
