"""The pages of a run in TensorBoard, one method for each kind."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from nowag_pl.reports.averages import mean_over_weights, num_weights
from nowag_pl.reports.figures.canvas import to_pixels
from nowag_pl.reports.figures.curves import codeword_figure, line_figure
from nowag_pl.reports.figures.linears import linear_drawing, linears_drawing
from nowag_pl.reports.views import BlockErrors, LinearView
from nowag_pl.run.wording import COMPRESSED_PHASES, HELD_OUT_ERROR

_WORST = 5  # linears that a summary names
_COLUMNS = {"dense_perplexity": ".3f", "perplexity": ".3f", "kl_divergence": ".4f"}
_TABLE = ("perplexity", "kl_divergence")  # figures by text and phase in the table of runs


class Board:
    """Writes to one run of TensorBoard. The number of a block is the step of its entries.

    Args:
        writer: writer of the run.
        folder: folder of the writer's files; the table of runs (HPARAMS) is written to a folder in it.
    """

    def __init__(self, writer: SummaryWriter, folder: Path) -> None:
        self._writer = writer
        self._folder = folder

    def linear(self, view: LinearView) -> None:
        """Show one linear: images before and after normalisation, histograms, codewords."""
        title = f"block {view.block}, {view.name}"
        self._figure(f"weights/{view.name}", linear_drawing(view), view.block)
        for key, values in view.histograms.items():
            self._writer.add_histogram(f"{key}/{view.name}", values.cpu(), view.block)
        if view.codewords is not None:
            parts = view.codewords
            figure = codeword_figure(title, parts.points, parts.codewords, parts.counts)
            self._figure(f"codewords/{view.name}", figure, view.block)

    def heat_maps(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Show loss, sparsity and bits of every linear, blocks from top to bottom."""
        self._figure("model/linears", linears_drawing(rows), 0)

    def experts(self, statistics: Mapping[str, Any]) -> None:
        """Show how many calibration tokens each expert saw: the fewest and most by block, and all of them as a table.

        Args:
            statistics: as :meth:`CompressionRun.expert_statistics` gives them.
        """
        lines = ["| experts | tokens of each |", "|---|---|"]
        for row in statistics["tokens"]:
            for key, value in {"fewest": min(row["tokens"]), "most": max(row["tokens"])}.items():
                self._writer.add_scalar(f"experts/{key}_tokens", value, row["block"])
            lines.append(f"| block {row['block']}, {row['name']} | {' '.join(map(str, row['tokens']))} |")
        lines += ["", f"Without any token: {', '.join(statistics['unseen']) or 'none'}."]
        lines += ["", f"Kept dense: {', '.join(statistics['dense'])}."]
        self._writer.add_text("experts/tokens", "\n".join(lines))

    def finetuning(self, logs: Path, statistics: Sequence[Mapping[str, Any]]) -> None:
        """Show the held-out error of every block by epoch, and before and after.

        Args:
            logs: folder of the blocks' own event files.
            statistics: error "before" and "after" of every block.
        """
        curves = {}
        for index, row in enumerate(statistics):
            folder = logs / f"block_{index:03d}"
            errors = _scalars(folder, HELD_OUT_ERROR) if folder.is_dir() else []
            curves[f"block {index}"] = [row["before"], *errors]
            for key in ("before", "after"):
                self._writer.add_scalar(f"finetuning/held_out_error_{key}", row[key], index)
        figure = line_figure("Held-out error of each block", curves, "epoch", "relative error", ordered=True)
        self._figure("model/finetuning", figure, 0)

    def block_errors(self, phase: str, errors: BlockErrors) -> None:
        """Show the error of every block's output."""
        for kind, values in {"alone": errors.alone, "accumulated": errors.accumulated}.items():
            for index, value in enumerate(values):
                self._writer.add_scalar(f"block_error/{kind}_{phase}", value, index)

    def summary(
        self,
        phase: str,
        title: str,
        rows: Sequence[Mapping[str, Any]],
        metrics: Mapping[str, Mapping[str, float]],
        seq_len: int,
    ) -> None:
        """Show the summary as text."""
        self._writer.add_text(f"summary/{phase}", summary_markdown(title, rows, metrics, seq_len))

    def hyperparameters(
        self,
        phase: str,
        settings: Mapping[str, Any],
        rows: Sequence[Mapping[str, Any]],
        metrics: Mapping[str, Mapping[str, float]],
    ) -> None:
        """Enter the run in the table of runs, with its settings and perplexities.

        No "experiment" is declared: TensorBoard then combines the settings and figures of all runs that it finds.
        """
        keys = ("loss", "sparsity", "bits_per_weight")
        figures = {f"linears/{key}": mean_over_weights(rows, key) for key in keys}
        for text, values in metrics.items():
            figures |= {f"{key}/{text}/{phase}": value for key, value in values.items() if key in _TABLE}
            if "dense_perplexity" in values:
                figures[f"perplexity/{text}/dense"] = values["dense_perplexity"]
        with SummaryWriter(str(self._folder / "hparams")) as writer:
            step = list(COMPRESSED_PHASES).index(phase)
            if step == 0:
                _, start, end = hparams(_readable(settings), figures)
                for summary in (start, end):
                    writer.file_writer.add_summary(summary)
            for key, value in figures.items():
                writer.add_scalar(key, value, step)

    def _figure(self, tag: str, figure: Any, step: int) -> None:
        self._writer.add_image(tag, to_pixels(figure), step, dataformats="HWC")


def _readable(settings: Mapping[str, Any]) -> dict[str, str | int | float | bool]:
    """Return settings that a table can show; hashes mean nothing to a reader."""
    shown = {name: value for name, value in settings.items() if value is not None and not name.endswith("sha256")}
    return {name: value if isinstance(value, (bool, int, float)) else str(value) for name, value in shown.items()}


def _scalars(folder: Path, tag: str) -> list[float]:
    """Return the values of a scalar in a folder of event files, one for each step."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    if tag not in events.Tags()["scalars"]:
        return []
    by_step = {scalar.step: scalar.value for scalar in events.Scalars(tag)}  # an epoch that was done again counts once
    return [by_step[step] for step in sorted(by_step)]


def summary_markdown(
    title: str, rows: Sequence[Mapping[str, Any]], metrics: Mapping[str, Mapping[str, float]], seq_len: int
) -> str:
    """Return the number of weights, their bits and loss, and the cost in quality, in a few lines of Markdown.

    Args:
        title: model and method.
        rows: statistics of every linear, as :meth:`CompressionRun.statistics` gives them.
        metrics: evaluation text to metric ("perplexity", "dense_perplexity", "kl_divergence") to value.
        seq_len: tokens per evaluation window.
    """
    bits, sparsity, loss = (mean_over_weights(rows, key) for key in ("bits_per_weight", "sparsity", "loss"))
    lines = [
        f"### {title}",
        "",
        f"{len(rows)} linears with {num_weights(rows):,} weights: **{bits:.3f} bits per weight**, "
        f"sparsity {sparsity:.1%}, mean loss {loss:.4f} (0 is exact, 1 is nothing kept).",
        "",
        f"| text, windows of {seq_len} tokens | dense perplexity | perplexity | KL (nats) |",
        "|---|---|---|---|",
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
