"""The pages of a run in loggers of experiments, one method for each kind.

TensorBoard sorts groups of scalars by name. What belongs to single blocks and linears is in groups that begin with
"within", after divergence, perplexity and the loss of a training.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from nowag_pl.reports.averages import mean_over_weights, num_weights
from nowag_pl.reports.figures.canvas import to_pixels
from nowag_pl.reports.figures.curves import codeword_figure, line_figure
from nowag_pl.reports.figures.linears import linear_drawing, linears_drawing
from nowag_pl.reports.show import Show
from nowag_pl.reports.views import LinearView
from nowag_pl.run.wording import COMPRESSED_PHASES
from nowag_pl.stages.damage import Damage

_WORST = 5  # linears that a summary names
_COLUMNS = {"dense_perplexity": ".3f", "perplexity": ".3f", "kl_divergence": ".4f", "top1_agreement": ".3f"}
_TABLE = ("perplexity", "kl_divergence")  # figures by text and phase in the table of runs


class Board:
    """Shows one run. The number of a block is the step of its entries.

    Args:
        shows: the loggers that show it.
    """

    def __init__(self, shows: Sequence[Show]) -> None:
        self._shows = shows

    def linear(self, view: LinearView) -> None:
        """Show one linear: images before and after normalisation, histograms, codewords."""
        title = f"block {view.block}, {view.name}"
        self._figure(f"weights/{view.name}", linear_drawing(view), view.block)
        for key, values in view.histograms.items():
            for show in self._shows:
                show.histogram(f"{key}/{view.name}", values, view.block)
        if view.codewords is not None:
            parts = view.codewords
            figure = codeword_figure(title, parts.points, parts.codewords, parts.counts)
            self._figure(f"codewords/{view.name}", figure, view.block)

    def heat_maps(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Show loss, sparsity and bits of every linear, those of them that differ between linears."""
        figure, _ = linears_drawing(rows)
        if figure is not None:
            self._figure("model/linears", figure, 0)

    def experts(self, statistics: Mapping[str, Any]) -> None:
        """Show how many calibration tokens each expert saw: the fewest and most by block, and all of them as a table.

        Args:
            statistics: as :meth:`CompressionRun.expert_statistics` gives them.
        """
        lines = ["| experts | tokens of each |", "|---|---|"]
        for row in statistics["tokens"]:
            ends = {"fewest": min(row["tokens"]), "most": max(row["tokens"])}
            for show in self._shows:
                show.scalars({f"experts/{key}_tokens": value for key, value in ends.items()}, row["block"])
            lines.append(f"| block {row['block']}, {row['name']} | {' '.join(map(str, row['tokens']))} |")
        lines += ["", f"Without any token: {', '.join(statistics['unseen']) or 'none'}."]
        lines += ["", f"Kept dense: {', '.join(statistics['dense'])}."]
        for show in self._shows:
            show.text("experts/tokens", "\n".join(lines))

    def finetuning(self, statistics: Sequence[Mapping[str, Any]]) -> None:
        """Show the held-out error of every block by epoch, and before and after.

        Args:
            statistics: error "before" and "after" of every block, and after each epoch ("curve").
        """
        curves = {f"block {index}": [row["before"], *row["curve"]] for index, row in enumerate(statistics)}
        for index, row in enumerate(statistics):
            self._scalars({f"within_blocks/held_out_error_{key}": row[key] for key in ("before", "after")}, index)
        figure = line_figure("Held-out error of each block", curves, "epoch", "relative error", ordered=True)
        self._figure("model/finetuning", figure, 0)

    def damage(self, phase: str, damage: Damage) -> None:
        """Show the error of every block's output, and the divergence after it."""
        for index, values in enumerate(zip(damage.alone, damage.accumulated, damage.divergence, strict=True)):
            names = ("error_alone", "error_accumulated", "kl_divergence_after")
            self._scalars({f"within_blocks/{n}_{phase}": v for n, v in zip(names, values, strict=True)}, index)

    def summary(
        self,
        phase: str,
        title: str,
        rows: Sequence[Mapping[str, Any]],
        metrics: Mapping[str, Mapping[str, float]],
        seq_len: int,
    ) -> None:
        """Show the summary as text."""
        for show in self._shows:
            show.text(f"summary/{phase}", summary_markdown(title, rows, metrics, seq_len))

    def hyperparameters(
        self,
        phase: str,
        settings: Mapping[str, Any],
        rows: Sequence[Mapping[str, Any]],
        metrics: Mapping[str, Mapping[str, float]],
    ) -> None:
        """Enter the run in the table of runs, with its settings and perplexities."""
        figures = {f"within_linears/mean_{key}": mean_over_weights(rows, key) for key in ("loss", "bits_per_weight")}
        for text, values in metrics.items():
            figures |= {f"{key}/{text}/{phase}": value for key, value in values.items() if key in _TABLE}
            if "dense_perplexity" in values:
                figures[f"perplexity/{text}/dense"] = values["dense_perplexity"]
        step = list(COMPRESSED_PHASES).index(phase)
        for show in self._shows:
            show.table_of_runs(_readable(settings), figures, is_new=step == 0)
        self._scalars(figures, step)

    def _scalars(self, values: Mapping[str, float], step: int) -> None:
        for show in self._shows:
            show.scalars(values, step)

    def _figure(self, tag: str, figure: Any, step: int) -> None:
        pixels = to_pixels(figure)
        for show in self._shows:
            show.image(tag, pixels, step)


def _readable(settings: Mapping[str, Any]) -> dict[str, str | int | float | bool]:
    """Return settings that a table can show; hashes mean nothing to a reader."""
    shown = {name: value for name, value in settings.items() if value is not None and not name.endswith("sha256")}
    return {name: value if isinstance(value, (bool, int, float)) else str(value) for name, value in shown.items()}


def summary_markdown(
    title: str, rows: Sequence[Mapping[str, Any]], metrics: Mapping[str, Mapping[str, float]], seq_len: int
) -> str:
    """Return the number of weights, their bits and loss, and the cost in quality, in a few lines of Markdown.

    Args:
        title: model and method.
        rows: statistics of every linear, as :meth:`CompressionRun.statistics` gives them.
        metrics: evaluation text to metric ("perplexity", "dense_perplexity", "kl_divergence", "top1_agreement") to
            value.
        seq_len: tokens per evaluation window.
    """
    bits, sparsity, loss = (mean_over_weights(rows, key) for key in ("bits_per_weight", "sparsity", "loss"))
    lines = [
        f"### {title}",
        "",
        f"{len(rows)} linears with {num_weights(rows):,} weights: **{bits:.3f} bits per weight**, "
        f"sparsity {sparsity:.1%}, mean loss {loss:.4f} (0 is exact, 1 is nothing kept).",
        "",
        f"| text, windows of {seq_len} tokens | dense perplexity | perplexity | KL (nats) | top-1 |",
        "|---|---|---|---|---|",
    ]
    for text, values in metrics.items():
        cells = [_number(values, key, spec) for key, spec in _COLUMNS.items()]
        lines.append(f"| {text} | {' | '.join(cells)} |")
    worst = sorted(rows, key=lambda row: -row["loss"])[:_WORST]
    lines += ["", "The linears that lost most:", "", "| linear | shape | loss | bits per weight |", "|---|---|---|---|"]
    for row in worst:
        shape = " x ".join(map(str, row["shape"]))
        lines.append(f"| {row['name']} | {shape} | {row['loss']:.4f} | {row['bits_per_weight']:.3f} |")
    return "\n".join(lines)


def _number(values: Mapping[str, float], key: str, spec: str) -> str:
    return format(values[key], spec) if key in values else ""
