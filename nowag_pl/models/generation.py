"""Continuations of prompts, greedy, so that the same model writes the same text every time."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from nowag_pl.models.assembly import fill
from nowag_pl.models.checkpoint import Checkpoint
from nowag_pl.models.state import dense_tensors, held_state

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def continuations(
    model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", prompts: Sequence[str], max_new_tokens: int
) -> list[str]:
    """Return what a model writes after each prompt, special tokens left out.

    Args:
        model: a whole model, on the device on which it runs.
        tokenizer: its tokenizer, perhaps with a chat template.
        prompts: plain texts.
        max_new_tokens: longest continuation.
    """
    from transformers import GenerationConfig

    ends = model.generation_config
    generation = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        eos_token_id=(ends and ends.eos_token_id) or tokenizer.eos_token_id,
        pad_token_id=0,
    )
    generate: Any = model.generate
    texts = []
    for prompt in prompts:
        tokens = prompt_tokens(tokenizer, prompt).to(model.device)
        with torch.no_grad():
            written = generate(tokens, attention_mask=torch.ones_like(tokens), generation_config=generation)
        texts.append(str(tokenizer.decode(written[0, tokens.shape[1] :], skip_special_tokens=True)).strip())
    return texts


def prompt_tokens(tokenizer: "PreTrainedTokenizerBase", prompt: str) -> Tensor:
    """Return the tokens of a prompt `[1, length]`: a user's turn where the tokenizer has a chat template.

    Args:
        tokenizer: a model's tokenizer.
        prompt: plain text.
    """
    return torch.tensor([chat_tokens(tokenizer, [{"role": "user", "content": prompt}])])


def chat_tokens(tokenizer: "PreTrainedTokenizerBase", messages: Sequence[Mapping[str, Any]]) -> list[int]:
    """Return the token ids of a chat after which the assistant writes.

    Args:
        tokenizer: a model's tokenizer; without a chat template the turns are plain text, joined by blank lines.
        messages: turns with role and content.
    """
    has_template = bool(tokenizer.chat_template)
    if has_template:
        turns: Any = list(messages)
        text = str(tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False))
    else:
        text = "\n\n".join(str(message["content"]) for message in messages)
    # A template writes the special tokens itself.
    ids: list[int] = tokenizer(text, add_special_tokens=not has_template)["input_ids"]
    return ids


def unpacked(checkpoint: Checkpoint, model: torch.nn.Module) -> "PreTrainedModel":
    """Return a compressed model with ordinary linears that hold the reconstructed weights, which generate faster.

    Args:
        checkpoint: the dense model.
        model: the compressed one; it stays as it is.
    """
    dense = checkpoint.build(empty=True)
    fill(dense, held_state(dense, dict(dense_tensors(model, checkpoint.dtype)), checkpoint.dtype), checkpoint.dtype)
    return dense.eval()
