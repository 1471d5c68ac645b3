"""A rotated model computes the same as the dense one, is compressed in its place, and is learned once."""

import pytest
import torch
from stage_runs import WINDOWS, run_of
from tiny_models import artefacts, load_whole, random_tokens

from nowag_pl.files import read_json
from nowag_pl.models.rotation import folded_state, values_of
from nowag_pl.models.streaming import StreamedModel
from nowag_pl.run.layout import GUIDANCE, ROTATED_MODEL, ROTATION_MOMENTS
from nowag_pl.stages import rotation as stage
from nowag_pl.stages.plan import GuidanceSettings, RotationSettings

pytest_plugins = ["tiny_fixtures"]

SHORT = RotationSettings(num_steps=4, blocks_per_step=2)
BIASED = {"attention_bias": True, "mlp_bias": True}


def rotating(folder, run_dir, settings=SHORT, **more):
    run = run_of(folder, run_dir, **more)
    run.plan.rotation = settings
    return run


@pytest.mark.parametrize(
    ("family", "specifics", "settings"),
    [
        ("llama", {"tied": True, **BIASED}, SHORT),
        ("llama3", {}, RotationSettings("hadamard")),
        ("qwen2", {}, SHORT),
        ("qwen3", {}, SHORT),
        ("mistral", {}, RotationSettings(num_steps=2, stream=False)),
    ],
)
def test_logits_are_those_of_the_dense_model(family, specifics, settings, model_folder, tmp_path):
    folder = model_folder(family, **specifics)
    run = rotating(folder, tmp_path / "run", settings)
    run.rotate(WINDOWS)
    tokens = random_tokens(2, 24, seed=3)
    with torch.no_grad():
        dense, rotated = (
            load_whole(each)(tokens, use_cache=False).logits for each in (folder, tmp_path / "run" / ROTATED_MODEL)
        )
    torch.testing.assert_close(rotated, dense, rtol=0, atol=1e-4 * float(dense.abs().max()))
    weights = [model.load_block(1).get_parameter("self_attn.v_proj.weight") for model in (run.dense, run.model)]
    assert not torch.allclose(*weights)
    assert read_json(tmp_path / "run" / ROTATED_MODEL / "config.json")["tie_word_embeddings"] is False


def test_a_head_stays_tied_where_the_last_norm_allows_it(model_folder, tmp_path):
    model = StreamedModel(rotating(model_folder(tied=True), tmp_path).checkpoint)
    model.skeleton.get_parameter("model.norm.weight").fill_(0.7)
    from nowag_pl.models.rotation import rotated_ends

    ends = rotated_ends(model, torch.eye(32).flip(0))
    assert ends.config.tie_word_embeddings
    assert ends.lm_head.weight is ends.model.embed_tokens.weight
    assert torch.equal(ends.lm_head.weight.flip(1), model.skeleton.get_input_embeddings().weight)


def test_what_is_rotated_is_compressed_and_compared_with_the_dense_model(model_folder, tmp_path):
    folder = model_folder()
    run = rotating(folder, tmp_path / "run")
    run.rotate(WINDOWS)
    assert not (tmp_path / "run" / ROTATION_MOMENTS).exists()
    run.calibrate(WINDOWS)
    run.compress()
    compressed = run.compressed().load_block(0).mlp.up_proj.weight
    rotated = run.model.load_block(0).mlp.up_proj.weight
    kept = compressed != 0
    assert torch.equal(compressed[kept], rotated[kept])
    assert run.reference({"text": WINDOWS}, 4) is not None
    assert run.num_parameters == sum(p.numel() for p in load_whole(folder).parameters())
    whole = run.compressed().assemble()
    assert torch.equal(whole.model.embed_tokens.weight, run.model.skeleton.get_input_embeddings().weight)


def test_a_run_resumes_and_refuses_another_rotation(model_folder, tmp_path, monkeypatch):
    run = rotating(model_folder(), tmp_path / "run")
    run.rotate(WINDOWS)
    whole = artefacts(tmp_path / "run" / ROTATED_MODEL)
    again = rotating(model_folder(), tmp_path / "run")
    with monkeypatch.context() as patch:
        patch.setattr(stage, "gather_moments", None)
        again.rotate(WINDOWS)
    (tmp_path / "run" / ROTATED_MODEL / "config.json").unlink()
    again.rotate(WINDOWS)
    assert artefacts(tmp_path / "run" / ROTATED_MODEL) == whole
    with pytest.raises(ValueError, match=r"rotation\.num_steps = 4, not 5"):
        rotating(model_folder(), tmp_path / "run", RotationSettings(num_steps=5, blocks_per_step=2)).rotate(WINDOWS)


def test_moments_are_those_of_normalised_hidden_states(model_folder, tmp_path):
    run = rotating(model_folder(), tmp_path / "run")
    stage.gather_moments(run.dense, run.store, stage.Tokens(WINDOWS, 3))
    found = run.store.read(ROTATION_MOMENTS, 1)[0]
    seen = {}
    model = load_whole(model_folder())
    block = model.model.layers[1]
    block.input_layernorm.register_forward_pre_hook(lambda _, args: seen.update(norm=args[0]))
    block.self_attn.o_proj.register_forward_pre_hook(lambda _, args: seen.update(output=args[0]))
    with torch.no_grad():
        model(WINDOWS)
    hidden = (seen["norm"] / seen["norm"].square().mean(-1, keepdim=True).sqrt()).flatten(0, 1)
    torch.testing.assert_close(found["input_layernorm"], hidden.T @ hidden / len(hidden), rtol=1e-3, atol=1e-4)
    heads = seen["output"].flatten(0, 1).unflatten(1, (4, 8))
    expected = torch.einsum("thi,thj->hij", heads, heads) / len(heads)
    torch.testing.assert_close(found["self_attn.o_proj"], expected, rtol=1e-4, atol=1e-5)
    values = values_of(folded_state(run.dense.load_block(1)), hidden.square().mean(0), found["self_attn.o_proj"])
    assert values.value.shape == (2, 8, 32)


def test_guidance_weights_the_tokens_of_a_rotation_and_stays_as_it_is(model_folder, tmp_path):
    run = rotating(model_folder(), tmp_path / "run", guidance=GuidanceSettings())
    run.rotate(WINDOWS)
    before = artefacts(tmp_path / "run" / GUIDANCE)
    plain = rotating(model_folder(), tmp_path / "plain")
    plain.rotate(WINDOWS)
    guided, unguided = (each.model.load_block(1).mlp.up_proj.weight for each in (run, plain))
    assert not torch.allclose(guided, unguided)
    run.calibrate(WINDOWS)
    assert artefacts(tmp_path / "run" / GUIDANCE) == before
    of_rotated = run_of(tmp_path / "run" / ROTATED_MODEL, tmp_path / "again", guidance=GuidanceSettings())
    of_rotated.calibrate(WINDOWS)
    for name, weights in run.store.read(GUIDANCE, 1)[0].items():
        torch.testing.assert_close(of_rotated.store.read(GUIDANCE, 1)[0][name], weights, rtol=1e-2, atol=1e-8)


@pytest.mark.parametrize(("family", "found"), [("gemma2", "feedforward"), ("phi3", "missing"), ("olmo2", "norm")])
def test_other_families_are_refused(family, found, model_folder, tmp_path):
    with pytest.raises(ValueError, match=f"built like Llama's.*{found}.*rotation.kind to none"):
        rotating(model_folder(family), tmp_path / "run").rotate(WINDOWS)


def test_settings_are_checked():
    with pytest.raises(ValueError, match=r"rotation\.blocks_per_step of at least 1"):
        RotationSettings(blocks_per_step=0)
    with pytest.raises(ValueError, match=r"rotation\.learning_rate above 0"):
        RotationSettings(learning_rate=0)
