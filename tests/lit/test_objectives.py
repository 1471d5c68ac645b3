"""Training objectives: their losses against oracles, and a third one that nothing else knows."""

import pytest
import torch
from test_lit_module import data, quiet, trainer  # noqa: F401 - fixtures
from tiny_models import SEQ_LEN, VOCABULARY, load_whole, random_tokens

from nowag_pl.lit.batches import ResumableLoader, SharedBatches
from nowag_pl.lit.datamodule import _Windows, data_of
from nowag_pl.lit.module import LitCausalLM
from nowag_pl.lit.objectives import BalancedNextToken, Distillation, NextToken, Objective

pytest_plugins = ["tiny_fixtures"]


def built(folder, **settings) -> LitCausalLM:
    module = LitCausalLM(str(folder), **settings)
    module.configure_model()
    module.log = lambda *args, **kwargs: None
    return module


def test_next_token_is_the_cross_entropy_of_the_text(model_folder):
    module, tokens = built(model_folder()), random_tokens(2)
    losses = NextToken().losses(module, {"tokens": tokens})
    log_p = load_whole(model_folder())(tokens).logits.detach().double().log_softmax(-1)
    assert losses.shape == (2, tokens.shape[1] - 1)
    for window, position in [(0, 0), (0, 7), (1, tokens.shape[1] - 2)]:
        expected = -log_p[window, position, tokens[window, position + 1]]
        assert float(losses[window, position]) == pytest.approx(float(expected), rel=1e-5)


def test_balanced_next_token_adds_the_use_of_experts(model_folder):
    folder, tokens = model_folder("mixtral"), random_tokens(2)
    module = built(folder)
    losses = {weight: BalancedNextToken(weight).losses(module, {"tokens": tokens}) for weight in (0.0, 0.5)}
    torch.testing.assert_close(losses[0.0], NextToken().losses(module, {"tokens": tokens}))
    probabilities, chosen = [], []
    whole = load_whole(folder)

    def look(_, __, output):
        probabilities.append(output[0].softmax(-1))
        chosen.append(output[2])

    for block in whole.model.layers:
        block.mlp.gate.register_forward_hook(look)
    with torch.no_grad():
        whole(tokens)
    use = torch.stack([(torch.cat(chosen) == expert).float().sum(1) for expert in range(4)], 1).mean(0)
    balance = 4 * (use * torch.cat(probabilities).mean(0)).sum()
    torch.testing.assert_close(losses[0.5] - losses[0.0], (0.5 * balance).expand_as(losses[0.0]), atol=1e-4, rtol=1e-4)


def test_balanced_next_token_wants_experts(model_folder):
    checkpoint = built(model_folder()).checkpoint
    with pytest.raises(ValueError, match="model with experts for BalancedNextToken, but got one of type 'llama'"):
        BalancedNextToken().check(checkpoint)
    with pytest.raises(ValueError, match=r"objective\.balance of at least 0, but got -1"):
        BalancedNextToken(-1)


def test_loss_of_a_step_weighs_windows(model_folder):
    class Given(Objective):
        def losses(self, module, batch):
            return torch.tensor([[1.0, 3.0], [10.0, 30.0]])

    weights = torch.tensor([0.75, 0.25])
    assert float(built(model_folder(), objective=Given()).training_step({"weight": weights}, 0)) == 0.75 * 2 + 0.25 * 20


def test_objective_with_batches_of_its_own_needs_nothing_else(data, model_folder, tmp_path):  # noqa: F811
    seen = []

    class Echo(Objective):
        """Train on two windows of constant tokens."""

        def prepare(self, module):
            self.windows = torch.full((2, SEQ_LEN), 5)

        def train_dataloader(self, module):
            assert data_of(module.trainer) is not None
            return ResumableLoader(_Windows(self.windows), SharedBatches(2, 1))

        def losses(self, module, batch):
            seen.append(batch["tokens"])
            return module(batch["tokens"]).float().square().mean(dim=-1)

    module = LitCausalLM(str(model_folder()), objective=Echo())
    trainer(tmp_path, max_epochs=1, num_sanity_val_steps=0).fit(module, datamodule=data)
    assert [int(tokens.unique()) for tokens in seen] == [5, 5]


def test_distillation_wants_to_be_prepared(model_folder):
    with pytest.raises(RuntimeError, match="prepare before losses"):
        Distillation().losses(built(model_folder()), {})


def test_what_the_result_depends_on_goes_into_the_manifest():
    assert NextToken().settings() == {}
    assert Distillation(2.0, 7, batch_size=3).settings() == {"temperature": 2.0, "top_k": 7}
    assert (NextToken().needs_dense, Distillation().needs_dense) == (False, True)


@pytest.mark.parametrize("family", ["qwen2", "gemma2"])
def test_logits_in_parts_give_the_losses_and_gradients_of_all(family, model_folder, monkeypatch):
    tokens, found = random_tokens(2), []
    for max_bytes in (2**28, 5 * 24 * 2 * VOCABULARY):
        monkeypatch.setattr("nowag_pl.lit.module.CHUNK_BYTES", max_bytes)
        module = built(model_folder(family, tied=False))
        largest = []
        module.model.lm_head.register_forward_hook(lambda _, __, output, seen=largest: seen.append(output.shape[1]))
        losses = NextToken().losses(module, {"tokens": tokens})
        losses.square().sum().backward()
        found.append((losses, {name: each.grad for name, each in module.model.named_parameters()}))
    # The first one is that of the whole forward, which has one position.
    assert max(largest) == 5
    torch.testing.assert_close(found[1][0], found[0][0])
    for name, gradient in found[0][1].items():
        atol = 1e-5 * float(gradient.abs().max())
        torch.testing.assert_close(found[1][1][name], gradient, rtol=1e-4, atol=atol)


def test_recomputed_activations_give_the_same_gradients(data, model_folder, tmp_path):  # noqa: F811
    def trained(recompute: bool) -> dict[str, torch.Tensor]:
        module = LitCausalLM(str(model_folder()), recompute=recompute)
        fit = trainer(tmp_path / str(recompute), max_epochs=1, max_steps=1, num_sanity_val_steps=0)
        fit.fit(module, datamodule=data)
        assert module.model.model.layers[0].gradient_checkpointing == recompute
        return module.model.state_dict()

    kept, recomputed = trained(False), trained(True)
    for name, tensor in kept.items():
        assert torch.equal(recomputed[name], tensor), name
