"""A report as one HTML file, which contains its figures and needs no network."""

from collections.abc import Mapping, Sequence
from math import nan
from typing import Any

from matplotlib.figure import Figure

from nowag_pl.reports.averages import mean_over_weights
from nowag_pl.reports.figures.canvas import to_svg
from nowag_pl.reports.figures.curves import line_figure
from nowag_pl.reports.figures.linears import by_kind, linears_drawing
from nowag_pl.reports.policy import policy_section
from nowag_pl.reports.templating import render
from nowag_pl.run.wording import BEGINNINGS, PHASES, readable


def report_page(report: Mapping[str, Any]) -> str:
    """Return the page of one run.

    Args:
        report: content of report.json.
    """
    losses, same = linears_drawing(report["linears"])
    figures = {
        "Loss of each linear": [
            line_figure("Loss by block", _by_block(report), "block", "loss", emphasised="whole block"),
            *([losses] if losses is not None else []),
        ],
        "Where the damage arises": _damage_figures(report.get("damage", {})),
        "Finetuning by block": _finetuning_figures(report["finetuned_blocks"]),
    }
    return render(
        "report.html",
        title=f"{report['model']}: {report['method']}",
        report=report,
        tiles=tiles(report),
        quality=quality_rows(report),
        same=same,
        figures={title: list(map(to_svg, drawn)) for title, drawn in figures.items()},
        beginning=BEGINNINGS[report["protocol"][next(iter(report["perplexity"]))].get("bos", "stream")],
        policy=policy_section(report.get("policy")),
        readable=readable,
        phases=PHASES,
    )


def tiles(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return the first figures to see and what they are: quality on the first text, as last measured, beside size."""
    rows, sizes = quality_rows(report), report["bytes"]
    last = [row for row in rows if row["text"] == rows[0]["text"]][-1]
    found = [(f"{last['perplexity']:.2f}", f"perplexity on {last['text']}, dense {rows[0]['perplexity']:.2f}")]
    if last["divergence"] is not None:
        found.append((f"{last['divergence']:.3f}", "KL to dense, nats a token"))
    if last["agreement"] is not None:
        found.append((f"{100 * last['agreement']:.1f} %", "same first choice as dense (top-1)"))
    bits, sparsity = report["bits_per_weight"], report["sparsity"]
    found.append(
        (f"{bits:.2f}", "bits a weight" + (f", {sparsity:.0%} removed".replace("%", " %") if sparsity else ""))
    )
    ratio = sizes["dense_model"] / sizes["model"]
    return [*found, (readable(sizes["model"]), f"whole model, {ratio:.1f} x smaller")]


def _damage_figures(damage: Mapping[str, Any]) -> list[Figure]:
    """Draw the damage after each block, by phase."""
    if not damage:
        return []
    errors, divergence = {}, {}
    for phase in (phase for phase in PHASES if phase in damage):
        title = f", {PHASES[phase]}" if len(damage) > 1 else ""
        errors[f"the block alone{title}"] = damage[phase]["alone"]
        errors[f"with those before it{title}"] = damage[phase]["accumulated"]
        divergence[f"KL{title}"] = damage[phase]["divergence"]
    return [
        line_figure("Error of each block's output", errors, "block", "relative error"),
        line_figure("Divergence after each block", divergence, "block", "KL to dense (nats)"),
    ]


def _finetuning_figures(rows: Sequence[Mapping[str, Any]]) -> list[Figure]:
    """Draw the error of each block before and after finetuning, and by epoch."""
    if not rows:
        return []
    errors = {f"{key} finetuning": [row[key] for row in rows] for key in ("before", "after")}
    found = [line_figure("Output error of each block", errors, "block", "relative error")]
    if any(row.get("curve") for row in rows):
        curves = {f"block {number}": [row["before"], *row["curve"]] for number, row in enumerate(rows)}
        found.append(line_figure("Held-out error by epoch", curves, "epoch", "relative error", ordered=True))
    return found


def quality_rows(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the measured perplexity and divergence by evaluation text and state of the model."""
    rows = []
    for text, figures in report["perplexity"].items():
        for phase in (phase for phase in PHASES if figures.get(phase) is not None):
            rows.append(
                {
                    "text": text,
                    "num_windows": report["protocol"][text]["num_windows"],
                    "phase": PHASES[phase],
                    "perplexity": figures[phase],
                    "ratio": figures[phase] / figures["dense"],
                    "divergence": report["kl_divergence"].get(text, {}).get(phase),
                    "agreement": report.get("top1_agreement", {}).get(text, {}).get(phase),
                }
            )
    return rows


def _by_block(report: Mapping[str, Any]) -> dict[str, list[float]]:
    """Return the loss of each kind of linear over the blocks, and the mean over all weights of a block."""
    rows: dict[int, list[Mapping[str, Any]]] = {}
    losses: dict[str, dict[int, float]] = {}
    for (block, name), of_kind in by_kind(report["linears"]).items():
        rows.setdefault(block, []).extend(of_kind)
        losses.setdefault(name, {})[block] = mean_over_weights(of_kind, "loss")
    # Blocks may be of several kinds.
    kinds = {name: [of_kind.get(block, nan) for block in range(max(rows) + 1)] for name, of_kind in losses.items()}
    return kinds | {"whole block": [mean_over_weights(each, "loss") for _, each in sorted(rows.items())]}
