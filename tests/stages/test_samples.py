import torch

from nowag_pl.compressors import MagnitudePruner
from nowag_pl.models.assembly import assemble
from nowag_pl.models.checkpoint import Checkpoint
from nowag_pl.models.generation import continuations, prompt_tokens, unpacked


def test_unpacked_model_predicts_the_same():
    checkpoint = Checkpoint("embedded")
    model, tokens = assemble(checkpoint, {}), torch.arange(20)[None]
    before = model(input_ids=tokens).logits
    for name, linear in list(model.named_modules()):
        if name.endswith("down_proj"):
            model.set_submodule(name, MagnitudePruner(0.5).compress(linear, torch.ones(linear.in_features)))
    model.float()  # as training holds it
    whole = unpacked(checkpoint, model)
    assert {parameter.dtype for parameter in whole.parameters()} == {checkpoint.dtype}
    assert whole.state_dict().keys() == assemble(checkpoint, {}).state_dict().keys()
    after = whole(input_ids=tokens).logits.float()
    torch.testing.assert_close(after, model(input_ids=tokens).logits.float(), rtol=0.05, atol=0.05)
    assert not torch.allclose(after, before.float(), rtol=0.05, atol=0.05)


def test_prompt_is_a_turn_where_there_is_a_template():
    tokenizer = Checkpoint("embedded").tokenizer
    assert prompt_tokens(tokenizer, "The sea").tolist() == [tokenizer("The sea").input_ids]
    tokenizer.chat_template = (
        "{% for turn in messages %}<{{ turn.role }}>{{ turn.content }}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    text = tokenizer.decode(prompt_tokens(tokenizer, "The sea")[0])
    assert text.replace(" ", "") == "<user>Thesea<assistant>"


def test_continuations_are_greedy_and_end_where_the_model_says():
    checkpoint = Checkpoint("embedded")
    model, tokenizer = assemble(checkpoint, {}), checkpoint.tokenizer
    (text,) = continuations(model, tokenizer, ["The sea"], 6)
    tokens = prompt_tokens(tokenizer, "The sea")
    for _ in range(6):
        following = model(input_ids=tokens).logits[0, -1].argmax()
        tokens = torch.cat([tokens, following.view(1, 1)], dim=1)
    assert text == tokenizer.decode(tokens[0, -6:]).strip()
    model.generation_config.eos_token_id = [int(tokens[0, -4])]
    assert continuations(model, tokenizer, ["The sea"], 6) == [tokenizer.decode(tokens[0, -6:-3]).strip()]
