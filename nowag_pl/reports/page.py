"""A report as one HTML file, which contains its figures and needs no network."""

from collections.abc import Mapping
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from nowag_pl.reports.averages import mean_over_weights
from nowag_pl.reports.figures.canvas import to_svg
from nowag_pl.reports.figures.curves import line_figure
from nowag_pl.reports.figures.linears import linears_drawing, split_name
from nowag_pl.reports.policy import policy_section
from nowag_pl.run.wording import BEGINNINGS, PHASES, readable


def report_page(report: Mapping[str, Any]) -> str:
    """Return the page of one run.

    Args:
        report: content of report.json.
    """
    finetuned = report["finetuned_blocks"]
    errors = {f"{key} finetuning": [row[key] for row in finetuned] for key in ("before", "after")}
    figure = line_figure("Output error of each block", errors, "block", "relative error") if finetuned else None
    return render(
        "report.html",
        title=f"{report['model']}: {report['method']}",
        report=report,
        quality=quality_rows(report),
        mean_loss=mean_over_weights(report["linears"], "loss"),
        loss_figure=to_svg(line_figure("Loss of each linear", _by_block(report), "block", "loss")),
        linears_figure=to_svg(linears_drawing(report["linears"])),
        finetuning_figure=figure and to_svg(figure),
        beginning=BEGINNINGS[report["protocol"][next(iter(report["perplexity"]))].get("bos", "stream")],
        policy=policy_section(report.get("policy")),
        readable=readable,
        phases=PHASES,
    )


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
                }
            )
    return rows


def render(template: str, **values: Any) -> str:
    """Fill in a template; a name that it lacks is an error."""
    loader = PackageLoader("nowag_pl.reports", "templates")
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template(template).render(values)


def _by_block(report: Mapping[str, Any]) -> dict[str, list[float]]:
    """Return the loss of each kind of linear over the blocks, and the mean over all weights of a block."""
    kinds: dict[str, list[float]] = {}
    blocks: dict[int, list[Mapping[str, Any]]] = {}
    for row in report["linears"]:
        block, name = split_name(row["name"])
        kinds.setdefault(name, []).append(row["loss"])
        blocks.setdefault(block, []).append(row)
    return kinds | {"whole block": [mean_over_weights(rows, "loss") for rows in blocks.values()]}
