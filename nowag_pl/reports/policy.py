"""The section of a report on training from rewards: what answers were like at the start and at the end."""

from collections.abc import Mapping, Sequence
from typing import Any

from nowag_pl.reports.figures.canvas import to_svg
from nowag_pl.reports.figures.curves import line_figure
from nowag_pl.reports.templating import render

_FEW = 10  # steps of which a mean is shown
_TITLES = {
    "reward": ("reward, before length counts", "{:.3f}"),
    "accuracy": ("share of right answers", "{:.1%}"),
    "mean_length": ("tokens of an answer", "{:.1f}"),
    "length_over_budget": ("the same, over the budget", "{:.2f}"),
    "lambda": ("price of length", "{:.4f}"),
    "share_capped": ("answers whose loss by length is at its cap", "{:.1%}"),
    "share_at_maximum": ("answers of the longest length", "{:.1%}"),
    "share_clipped": ("tokens whose ratio is cut", "{:.1%}"),
    "kl": ("KL to the reference (nats per token)", "{:.4f}"),
    "entropy": ("entropy (nats per token)", "{:.3f}"),
}


def policy_section(policy: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return what the template of the section shows; nothing in the table where there was no such training.

    Args:
        policy: as the objective reports it.
    """
    if policy is None:
        return {"table": []}
    history, budget = policy["history"], policy["budget"]
    table = []
    for name, (title, form) in _TITLES.items():
        if values := history.get(name):
            first, last = (form.format(_mean(few)) for few in (values[:_FEW], values[-_FEW:]))
            table.append({"title": title, "first": first, "last": last})
    lengths = {"mean over answers": history["mean_length"]}
    note = f"Means over {_FEW} steps each, in which answers are sampled to some of {policy['num_prompts']} prompts."
    if budget is not None:
        lengths["budget"] = [budget["tokens"]] * len(history["mean_length"])
        note += f" The budget is {budget['tokens']} tokens on average."
    shares = {name: history[name] for name in ("reward", "accuracy", "lambda") if name in history}
    return {
        "table": table,
        "length_figure": to_svg(line_figure("Length of answers", lengths, "step", "tokens")),
        "reward_figure": to_svg(line_figure("Reward, right answers and the price of length", shares, "step", "")),
        "note": note,
        "answers": _answers(policy["answers"]),
    }


def policy_page(policy: Mapping[str, Any], title: str) -> str:
    """Return the page of a training from rewards that no compression came before.

    Args:
        policy: as the objective reports it.
        title: of the page.
    """
    return render("policy.html", title=title, policy=policy_section(policy))


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _answers(shown: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[dict[str, str]]:
    def told(row: Mapping[str, Any]) -> str:
        return f"{row['answer']}\n({row['tokens']} tokens, reward {row['reward']:.2f})"

    return [{"when": when, "prompt": row["prompt"], "answer": told(row)} for when in shown for row in shown[when]]
