"""Answers that a model samples to prompts, and the probabilities of their tokens.

The draws of an answer depend on the seed, the step, the prompt and its number among the answers to it alone: neither on
the other answers of a batch nor on the number of processes.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from nowag_pl.functional.policy_gradient import token_entropy
from nowag_pl.functional.ranges import check_real, check_whole
from nowag_pl.modules import CompressedLinear
from nowag_pl.modules.running.unpacking import unpack_linears

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class SamplingSettings:
    """How answers are sampled.

    Attributes:
        group_size: answers to each prompt.
        max_new_tokens: tokens after which an answer is cut off.
        temperature: divisor of the logits, for sampling and for the probabilities that are trained.
        top_p: sample among the most likely tokens whose probabilities add up to this. The probabilities that are
            trained are those of all tokens.
        batch_size: answers that pass through the model together, in sampling and in training; the others wait, so that
            a step of any size fits in memory. The loss does not depend on it.
        seed: seed of the draws.
    """

    group_size: int = 4
    max_new_tokens: int = 1024
    temperature: float = 1.0
    top_p: float = 1.0
    batch_size: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("group_size", "max_new_tokens", "batch_size"):
            check_whole(f"sampling.{name}", getattr(self, name), 1)
        check_whole("sampling.seed", self.seed, 0)
        check_real("sampling.temperature", self.temperature, above=True)
        check_real("sampling.top_p", self.top_p, most=1.0, above=True)


class Answers(NamedTuple):
    """Sampled answers.

    Attributes:
        prompts: token ids `[answers, prompt_tokens]`, padded on the left.
        prompt_mask: which of them are none of the padding.
        tokens: token ids `[answers, tokens]`, padded on the right.
        mask: which of them the model has sampled, the stop token included.
    """

    prompts: Tensor
    prompt_mask: Tensor
    tokens: Tensor
    mask: Tensor

    @property
    def lengths(self) -> Tensor:
        """Tokens of each answer, its stop token included."""
        return self.mask.sum(dim=1)

    def part(self, rows: slice) -> "Answers":
        """Return some of the answers."""
        return Answers(*(tensor[rows] for tensor in self))


def stop_tokens(model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """Return the tokens that end an answer: those of generation_config.json, or else the tokenizer's.

    Args:
        model: a whole model.
        tokenizer: its tokenizer.

    Raises:
        ValueError: there are none.
    """
    ends = model.generation_config
    found: Any = ends.eos_token_id if ends is not None and ends.eos_token_id is not None else tokenizer.eos_token_id
    if found is None:
        raise ValueError(
            "Expected a model with tokens that end an answer (eos_token_id in generation_config.json), but got none."
        )
    return [found] if isinstance(found, int) else [int(token) for token in found]


def uniform_draws(settings: SamplingSettings, step: int, samples: Iterable[tuple[int, int]]) -> Tensor:
    """Return the draws of answers, uniform in [0, 1), `[answers, max_new_tokens]`.

    Args:
        settings: give the seed.
        step: number of the step of the training.
        samples: number of the prompt, and of the answer among those to it.
    """
    rows = [
        np.random.default_rng([settings.seed, step, prompt, answer]).random(settings.max_new_tokens, dtype=np.float32)
        for prompt, answer in samples
    ]
    return torch.from_numpy(np.stack(rows))


class _Draws:
    """Leaves one token at each position, by the inverse of the cumulative distribution; for `generate`."""

    def __init__(self, draws: Tensor, prompt_length: int, temperature: float, top_p: float) -> None:
        self._draws = draws
        self._prompt_length = prompt_length
        self._temperature = temperature
        self._top_p = top_p

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        draws = self._draws[:, input_ids.shape[1] - self._prompt_length, None]
        token = drawn_tokens(scores, draws, self._temperature, self._top_p)
        return torch.full_like(scores, -torch.inf).scatter(1, token, 0.0)


def drawn_tokens(logits: Tensor, draws: Tensor, temperature: float, top_p: float) -> Tensor:
    """Return a token for each draw, `[answers, 1]`.

    Args:
        logits: `[answers, vocabulary]`.
        draws: uniform in [0, 1), `[answers, 1]`.
        temperature: divisor of the logits.
        top_p: probability of the most likely tokens among which is drawn.
    """
    probabilities = (logits.double() / temperature).softmax(dim=-1)
    if top_p < 1:
        ordered, order = probabilities.sort(dim=-1, descending=True)
        before = ordered.cumsum(dim=-1) - ordered
        probabilities = torch.zeros_like(ordered).scatter(1, order, ordered * (before < top_p))
    cumulative = probabilities.cumsum(dim=-1)
    token = torch.searchsorted(cumulative, draws.double() * cumulative[:, -1:], right=True)
    return token.clamp_max(logits.shape[-1] - 1)


def left_padded(prompts: Sequence[Sequence[int]], padding: int) -> tuple[Tensor, Tensor]:
    """Return token ids `[prompts, tokens]` padded on the left, and which of them are no padding.

    >>> left_padded([[5], [6, 7]], 0)[0].tolist()
    [[0, 5], [6, 7]]
    """
    longest = max(len(prompt) for prompt in prompts)
    rows = [[padding] * (longest - len(prompt)) + list(prompt) for prompt in prompts]
    kept = [[False] * (longest - len(prompt)) + [True] * len(prompt) for prompt in prompts]
    return torch.tensor(rows), torch.tensor(kept)


@torch.no_grad()
def sample_answers(
    model: "PreTrainedModel",
    prompts: Sequence[Sequence[int]],
    draws: Tensor,
    settings: SamplingSettings,
    stops: Sequence[int],
    synchronized: bool = False,
) -> Answers:
    """Sample an answer to each prompt by the model's own `generate`, in eval mode.

    The weights of compressed linears are restored once for all answers, where memory allows.

    Args:
        model: a whole model, on its device.
        prompts: token ids of each prompt; a prompt that gets several answers is there several times.
        draws: result of :func:`uniform_draws`.
        settings: temperature, lengths and batch size.
        stops: tokens that end an answer.
        synchronized: let all ranks generate equally many tokens, as a sharded model needs it.
    """
    tokens, kept = (each.to(model.device) for each in left_padded(prompts, stops[0]))
    was_training = model.training
    packed = [each for each in model.modules() if isinstance(each, CompressedLinear) and not each.is_unpacked]
    model.eval()
    if packed and not synchronized:
        unpack_linears(model, next(model.parameters()).dtype)
    try:
        parts = [
            _generated(model, tokens[rows], kept[rows], draws[rows], settings, stops, synchronized)
            for rows in batches(len(tokens), settings.batch_size)
        ]
    finally:
        model.train(was_training)
        for linear in packed:
            linear.pack()
    longest = max(part.shape[1] for part in parts)
    written = torch.cat([torch.nn.functional.pad(part, (0, longest - part.shape[1]), value=stops[0]) for part in parts])
    is_stop = torch.isin(written, torch.tensor(list(stops), device=written.device))
    # A token counts if no stop token stands before it.
    mask = is_stop.cumsum(dim=1) - is_stop.long() == 0
    return Answers(tokens, kept, written, mask)


def _generated(
    model: "PreTrainedModel",
    tokens: Tensor,
    kept: Tensor,
    draws: Tensor,
    settings: SamplingSettings,
    stops: Sequence[int],
    synchronized: bool,
) -> Tensor:
    """Return what one batch writes, `[answers, tokens]`, cut to the positions at which an answer is not over."""
    from transformers import GenerationConfig

    # The others are set, as transformers would take what is not from the model's own settings.
    generation = GenerationConfig(
        max_new_tokens=settings.max_new_tokens,
        do_sample=False,
        num_beams=1,
        temperature=1.0,
        top_p=1.0,
        top_k=50,
        repetition_penalty=1.0,
        no_repeat_ngram_size=0,
        min_length=0,
        eos_token_id=list(stops),
        pad_token_id=stops[0],
        use_cache=True,
    )
    drawn = _Draws(draws.to(model.device), tokens.shape[1], settings.temperature, settings.top_p)
    generate: Any = model.generate
    written = generate(
        tokens,
        attention_mask=kept.long(),
        generation_config=generation,
        logits_processor=[drawn],
        synced_gpus=synchronized,
    )
    return written[:, tokens.shape[1] :]


def batches(count: int, batch_size: int) -> list[slice]:
    """Return the parts of as many items, each of at most `batch_size`.

    >>> batches(5, 2)
    [slice(0, 2, None), slice(2, 4, None), slice(4, 5, None)]
    """
    return [slice(start, min(start + batch_size, count)) for start in range(0, count, batch_size)]


def token_log_probabilities(model: "PreTrainedModel", answers: Answers, temperature: float) -> tuple[Tensor, Tensor]:
    """Return the log-probability of every token of answers, and the entropy there without gradient, in nats.

    Args:
        model: a whole model.
        answers: to prompts.
        temperature: divisor of the logits.

    Returns:
        `[answers, tokens]` each, in float32; what stands on padding means nothing.
    """
    tokens = torch.cat([answers.prompts, answers.tokens], dim=1)
    kept = torch.cat([answers.prompt_mask, answers.mask], dim=1).long()
    places = (kept.cumsum(dim=1) - 1).clamp_min(0)
    length = answers.tokens.shape[1]
    logits = model(
        input_ids=tokens, attention_mask=kept, position_ids=places, use_cache=False, logits_to_keep=length + 1
    ).logits
    logits = logits[:, :-1].float() / temperature
    log_probability = logits.log_softmax(dim=-1).gather(2, answers.tokens[:, :, None])[:, :, 0]
    return log_probability, token_entropy(logits.detach())
