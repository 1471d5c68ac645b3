"""Policy gradient: the model learns from rewards of its own answers, within a budget of length (arXiv:2602.14468)."""

from dataclasses import asdict
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint as recomputed
from torch.utils.data import Dataset

from nowag_pl.data.prompts import Prompt, PromptSource, prompts_digest
from nowag_pl.data.rewards import Reward, total_reward
from nowag_pl.functional.length_budget import LengthBudget, length_penalty, shaped_rewards, updated_price
from nowag_pl.functional.policy_gradient import (
    PolicySettings,
    group_advantages,
    is_clipped,
    low_variance_kl,
    policy_losses,
)
from nowag_pl.functional.ranges import check_whole
from nowag_pl.lit.batches import ResumableLoader, Share, SharedBatches
from nowag_pl.lit.datamodule import data_of
from nowag_pl.lit.objectives.base import Objective
from nowag_pl.lit.objectives.controller import FIGURES, Controller, Rollout
from nowag_pl.lit.objectives.shown import show_answers
from nowag_pl.lit.text_module import TextModule
from nowag_pl.models.adapters import adapters_removed
from nowag_pl.models.checkpoint import Checkpoint
from nowag_pl.models.generation import chat_tokens
from nowag_pl.models.rollouts import (
    Answers,
    SamplingSettings,
    batches,
    sample_answers,
    stop_tokens,
    token_log_probabilities,
    uniform_draws,
)
from nowag_pl.run.ranks import Ranks

Reference = Literal["start", "dense"]


class PolicyGradient(Objective):
    """Train on rewards of the model's own answers, and hold their mean length within a budget if there is one.

    Lifecycle of a step: sample `group_size` answers to each prompt; score them; take what their length costs at the
    present price from the rewards; compare each with its group; one or more updates of the model on the probabilities
    of the sampled tokens; move the price by the mean length.

    Args:
        prompts: prompts with right answers; data.train_batch_size of them make a step on each device.
        rewards: each by class_path, such as nowag_pl.data.rewards.ExactNumber; their weighted sum counts. The first
            one says whether an answer is right.
        sampling: how answers are sampled.
        policy: how rewards become a loss.
        budget: a budget on the mean length of the answers. null: none.
        reference: model whose predictions the trained one is kept near to: "start", as it was before this training, or
            "dense", of a run that compresses.
        updates: steps of the optimizer on the same answers. From the second on, the bounds of `policy` matter.
    """

    reads_text = False
    accumulates = False

    def __init__(
        self,
        prompts: PromptSource,
        rewards: list[Reward],
        sampling: SamplingSettings = SamplingSettings(),  # noqa: B008 - frozen
        policy: PolicySettings = PolicySettings(),  # noqa: B008 - frozen
        budget: LengthBudget | None = None,
        reference: Reference = "start",
        updates: int = 1,
    ) -> None:
        check_whole("objective.updates", updates, 1)
        if not rewards:
            raise ValueError("Expected at least one reward in model.objective, but got none.")
        if budget is not None and budget.tokens > sampling.max_new_tokens:
            raise ValueError(
                f"Expected budget.tokens of at most sampling.max_new_tokens = {sampling.max_new_tokens}, but got "
                f"{budget.tokens}."
            )
        if sampling.group_size == 1 and policy.base != "reinforce++":
            raise ValueError(
                f"Expected sampling.group_size of at least 2 with policy.base={policy.base}, which compares answers to "
                "the same prompt, but got 1."
            )
        self._source, self.rewards, self.sampling = prompts, rewards, sampling
        self.policy, self.budget, self.reference, self.updates = policy, budget, reference, updates
        self.controller = Controller()
        self._reference_model: Any = None

    @property
    def logged(self) -> tuple[str, ...]:  # type: ignore[override]
        """Names of the scalars."""
        return tuple(f"policy/{name}" for name in FIGURES)

    @property
    def needs_dense(self) -> bool:
        """Whether the reference is the dense model of a run that compresses."""
        return self.reference == "dense" and self.policy.kl_coefficient > 0

    @cached_property
    def prompts(self) -> list[Prompt]:
        """The prompts, read when they are needed."""
        return self._source.read()

    def check(self, checkpoint: Checkpoint) -> None:
        """Refuse prompts that leave no room for an answer in the model's context."""
        if not self.prompts:
            raise ValueError("Expected prompts in model.objective, but got none.")
        longest = max(len(chat_tokens(checkpoint.tokenizer, prompt.messages)) for prompt in self.prompts)
        room = checkpoint.max_seq_len
        if room is not None and longest + self.sampling.max_new_tokens > room:
            raise ValueError(
                f"Expected prompts and answers of at most {room} tokens together, the context of {checkpoint.path}, "
                f"but got prompts of up to {longest} and sampling.max_new_tokens of {self.sampling.max_new_tokens}."
            )

    def prepare(self, module: TextModule) -> None:
        """Begin with a price of 0; a checkpoint may say otherwise afterwards."""
        self.controller = Controller()
        self._reference_model = None

    def train_dataloader(self, module: TextModule) -> ResumableLoader:
        """Return shuffled numbers of prompts, `{"index", "weight"}`, each batch once for every update."""
        trainer = module.trainer
        batch_size = data_of(trainer).train_batch_size * trainer.world_size
        ranks = (trainer.global_rank, trainer.world_size)
        shares = SharedBatches(len(self.prompts), batch_size, *ranks, self.sampling.seed, self.updates)
        return ResumableLoader(_Numbers(), shares)

    def loss(self, module: TextModule, batch: dict[str, Tensor]) -> Tensor:
        """Sample and score answers, or take those of the last update; return the loss per token of all ranks."""
        rollout = self.controller.rollout
        if rollout is None or not torch.equal(rollout.numbers, batch["index"].cpu()):
            rollout = self._rollout(module, batch["index"], batch["weight"] > 0)
        loss, old = self._update(module, rollout)
        following = rollout._replace(old=old, update=rollout.update + 1)
        self.controller.rollout = following if following.update < self.updates else None
        return loss

    def _rollout(self, module: TextModule, index: Tensor, counts: Tensor) -> Rollout:
        """Sample answers, score them, compare each with its group, and move the price of length."""
        size, ranks = self.sampling.group_size, Ranks.current()
        answers = self._sampled(module, index)
        rewards, rights = self._scored(module, index, answers)
        counts, lengths = counts.repeat_interleave(size).cpu(), answers.lengths.cpu()
        everyone = zip(*ranks.gather((rewards, rights, lengths, counts)), strict=True)
        all_rewards, all_rights, all_lengths, kept = (torch.cat(parts) for parts in everyone)
        shaped, advantages = self._shaped(all_rewards, all_lengths), torch.zeros_like(all_rewards)
        groups = shaped[kept].view(-1, size)
        advantages[kept] = group_advantages(groups, self.policy.base, self.policy.divide_by_std).flatten()
        self._measure(module, all_rewards[kept], all_rights[kept], all_lengths[kept])
        mine = slice(ranks.rank * len(rewards), (ranks.rank + 1) * len(rewards))
        num_tokens, device = int(all_lengths[kept].sum()), module.device
        return Rollout(index.cpu(), answers, advantages[mine].to(device), counts.to(device), num_tokens, None, 0)

    def _sampled(self, module: TextModule, index: Tensor) -> Answers:
        """Return the answers of this rank, those to each prompt one after the other."""
        model: Any = module.whole
        tokenizer, sampling = module.checkpoint.tokenizer, self.sampling
        samples = [(number, answer) for number in index.tolist() for answer in range(sampling.group_size)]
        prompts = [chat_tokens(tokenizer, self.prompts[number].messages) for number, _ in samples]
        draws = uniform_draws(sampling, self.controller.step, samples)
        return sample_answers(model, prompts, draws, sampling, stop_tokens(model, tokenizer), module.is_sharded)

    def _scored(self, module: TextModule, index: Tensor, answers: Answers) -> tuple[Tensor, Tensor]:
        """Return the weighted reward of every answer, and whether it is right, `[answers]` each.

        Raises:
            ValueError: a reward raises or is not finite; the message names the sample.
        """
        tokenizer, size = module.checkpoint.tokenizer, self.sampling.group_size
        scores, shown = [], []
        for row, (tokens, length) in enumerate(zip(answers.tokens.tolist(), answers.lengths.tolist(), strict=True)):
            number = int(index[row // size])
            prompt = self.prompts[number]
            text = str(tokenizer.decode(tokens[:length], skip_special_tokens=True))
            try:
                scores.append(total_reward(self.rewards, text, prompt.answer))
            except ValueError as error:
                raise ValueError(
                    f"Expected a finite reward for each answer, but {error}. Prompt {number}: {prompt.text[:200]!r}; "
                    f"right answer: {prompt.answer[:200]!r}; answer {row % size} of the model: {text[:500]!r}."
                ) from error
            shown.append({"prompt": prompt.text, "answer": text, "reward": scores[-1][0], "tokens": length})
        show_answers(module, self.controller, shown, size)
        rewards, rights = torch.tensor(scores, dtype=torch.float64).T
        return rewards, rights

    def _shaped(self, rewards: Tensor, lengths: Tensor) -> Tensor:
        if self.budget is None:
            return rewards
        return shaped_rewards(rewards, lengths, self.controller.price, self.budget, self.sampling.max_new_tokens)

    def _measure(self, module: TextModule, rewards: Tensor, rights: Tensor, lengths: Tensor) -> None:
        """Note what the answers of all ranks are like, and move the price by their mean length."""
        controller, mean_length = self.controller, float(lengths.double().mean())
        figures = {
            "reward": float(rewards.mean()),
            "accuracy": float(rights.mean()),
            "mean_length": mean_length,
            "share_at_maximum": float((lengths >= self.sampling.max_new_tokens).double().mean()),
        }
        if self.budget is not None:
            penalty = length_penalty(lengths, controller.price, self.budget)
            is_capped = (penalty >= self.budget.cap) & (penalty > 0)
            figures["length_over_budget"] = mean_length / self.budget.tokens
            figures["lambda"] = controller.price
            figures["share_capped"] = float(is_capped.double().mean())
            controller.price = updated_price(controller.price, mean_length, self.budget)
        controller.step, controller.mean_length = controller.step + 1, mean_length
        self._log(module, figures)

    def _update(self, module: TextModule, rollout: Rollout) -> tuple[Tensor, Tensor]:
        """Return the loss per token of all ranks, and the log-probabilities under the model that has sampled."""
        reference = self._reference(module)
        parts = batches(len(rollout.advantages), self.sampling.batch_size)
        total, sums, old = torch.zeros((), device=module.device), torch.zeros(3, dtype=torch.float64), []
        for rows in parts:
            # What a part keeps for its gradients is computed again, so that only one is in memory at a time.
            arguments = (module, reference, rollout, rows)
            loss, measured, log_probability = (
                self._part(*arguments) if len(parts) == 1 else recomputed(self._part, *arguments, use_reentrant=False)
            )
            total, sums = total + loss, sums + measured
            old.append(log_probability)
        if rollout.update == self.updates - 1:
            means = torch.stack(Ranks.current().gather(sums)).sum(dim=0) / rollout.num_tokens
            named = dict(zip(("share_clipped", "kl", "entropy"), means.tolist(), strict=True))
            self._log(module, named if reference is not None else {k: v for k, v in named.items() if k != "kl"})
        scale = Ranks.current().world_size / rollout.num_tokens
        return total * scale, torch.cat(old) if rollout.old is None else rollout.old

    def _part(self, module: TextModule, reference: Any, rollout: Rollout, rows: slice) -> tuple[Tensor, Tensor, Tensor]:
        """Return the sum of the losses of some answers, sums of what is measured, and the log-probabilities."""
        model: Any = module.whole
        answers, advantages = rollout.answers.part(rows), rollout.advantages[rows].float()
        kept = answers.mask & rollout.counts[rows, None]
        log_p, entropy = token_log_probabilities(model, answers, self.sampling.temperature)
        old = log_p.detach() if rollout.old is None else rollout.old[rows]
        kl, reference_log_p = torch.zeros_like(entropy), None
        if reference is not None:
            # Without its adapters a model is the one before the training.
            with torch.no_grad(), adapters_removed(reference):
                reference_log_p, _ = token_log_probabilities(reference, answers, self.sampling.temperature)
                kl = low_variance_kl(log_p.detach(), reference_log_p)
        losses = policy_losses(log_p, old, reference_log_p, advantages, self.policy)
        bounds = (self.policy.clip_low, self.policy.clip_high)
        clipped = is_clipped(log_p.detach(), old, advantages, *bounds)
        measured = torch.stack([each.double()[kept].sum() for each in (clipped, kl, entropy)]).cpu()
        return losses[kept].sum(), measured, log_p.detach()

    def _reference(self, module: TextModule) -> Any:
        """Return the model whose predictions the trained one is kept near to; None where they do not count."""
        if self.policy.kl_coefficient > 0 and self._reference_model is None:
            if self.reference == "start" and module.adapters is not None:
                self._reference_model = module.whole
            elif self.reference == "start":
                self._reference_model = module.starting_model()
            else:
                dense: Any = module.run.checkpoint.load()
                self._reference_model = dense.requires_grad_(False).to(module.device, torch.float32)
        return self._reference_model

    def _log(self, module: TextModule, figures: dict[str, float]) -> None:
        """Note figures that are the same on all ranks."""
        self.controller.note(figures)
        module.log_dict({f"policy/{name}": value for name, value in figures.items()}, batch_size=1)

    def settings(self) -> dict[str, Any]:
        """Return all settings that reach the result; batch_size does not."""
        described = {
            **{f"sampling.{name}": value for name, value in asdict(self.sampling).items() if name != "batch_size"},
            **{f"policy.{name}": value for name, value in asdict(self.policy).items()},
            **{f"budget.{name}": value for name, value in (asdict(self.budget) if self.budget else {}).items()},
        }
        described |= {f"rewards.{number}": reward.settings() for number, reward in enumerate(self.rewards)}
        described |= {"reference": self.reference, "updates": self.updates}
        return described | {"prompts_sha256": prompts_digest(self.prompts)}

    def state_dict(self) -> dict[str, Any]:
        """Return price, figures and answers that more updates follow on."""
        return self.controller.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what :meth:`state_dict` returned."""
        self.controller.load_state_dict(state)

    def report(self) -> dict[str, Any] | None:
        """Return the figures of every step, and answers of the first and the last one."""
        controller = self.controller
        if not controller.history:
            return None
        return {
            "budget": None if self.budget is None else asdict(self.budget),
            "policy": asdict(self.policy),
            "num_prompts": len(self.prompts),
            "history": controller.history,
            "answers": controller.shown,
        }


class _Numbers(Dataset[dict[str, Tensor]]):
    """Numbers of prompts with their weights, a whole batch at a time."""

    def __getitem__(self, share: Share) -> dict[str, Tensor]:
        return {"index": torch.tensor(share.indices), "weight": torch.tensor(share.weights)}
