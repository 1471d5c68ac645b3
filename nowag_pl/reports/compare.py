"""`python main.py compare`: several runs in a table and a page."""

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from nowag_pl.files import write_text
from nowag_pl.reports.comparison import Protocol, Run, column_names, differences, protocols, read_runs
from nowag_pl.run.wording import COMPRESSED_PHASES


def compare(run_dirs: list[str], output: str = "compare.html") -> None:
    """Compare finished runs: a table on the terminal, and the same with figures in one HTML file.

    Perplexities that were measured on different texts or windows stand in different columns, and it is said why.

    Args:
        run_dirs: run directories, each with a report.json.
        output: HTML file to write, without anything from a network.
    """
    runs = read_runs(run_dirs)
    header, rows = comparison_rows(runs)
    table = Table(title=f"{len(runs)} runs")
    for number, column in enumerate(header):
        table.add_column(column, justify="left" if number < 3 else "right", no_wrap=number in (0, 2))
    for row in rows:
        table.add_row(*row)
    console = Console()
    console.print(table)
    for note in differences(runs):
        console.print(note, style="yellow", markup=False, highlight=False)
    write_text(Path(output), comparison_page(runs))
    console.print(f"Comparison written to {output}", soft_wrap=True, markup=False)


def comparison_rows(runs: Sequence[Run]) -> tuple[list[str], list[list[str]]]:
    """Return the header and the cells of the table: a row for each run and measured state of its model.

    A dense model that several runs have measured in the same way stands there once.
    """
    columns = protocols(runs)
    names = column_names(columns)
    header = ["run", "model", "state", "bits", "sparsity", *names, *(f"KL {name}" for name in names)]
    rows: list[list[str]] = []
    for run in runs:
        model, report = str(run.report["model"]), run.report
        dense = ["", model, "dense", "", "", *_cells(run, columns, "perplexity", "dense"), *[""] * len(columns)]
        if dense not in rows:
            rows.append(dense)
        for phase, title in COMPRESSED_PHASES.items():
            cells = _cells(run, columns, "perplexity", phase)
            if any(cells):
                figures = [f"{report['bits_per_weight']:.3f}", f"{report['sparsity']:.1%}"]
                cells += _cells(run, columns, "kl_divergence", phase)
                rows.append([run.name, model, title, *figures, *cells])
    return header, rows


def comparison_page(runs: Sequence[Run]) -> str:
    """Return the page that compares runs."""
    from nowag_pl.reports.figures.canvas import to_svg  # matplotlib takes a second
    from nowag_pl.reports.figures.curves import scatter_figure
    from nowag_pl.reports.page import render

    header, rows = comparison_rows(runs)
    figures = []
    for protocol, name in zip(protocols(runs), column_names(protocols(runs)), strict=True):
        points, title = _points(runs, protocol), f"Perplexity on {name}"
        figures.append(to_svg(scatter_figure(title, points, "bits per weight", "perplexity", _dense(runs, protocol))))
    return render(
        "comparison.html",
        title=f"Comparison of {len(runs)} runs",
        header=header,
        rows=rows,
        notes=differences(runs),
        figures=figures,
        runs=[{"name": run.name, "method": run.report["method"], "command": run.report.get("command")} for run in runs],
    )


def _cells(run: Run, columns: Sequence[Protocol], metric: str, phase: str) -> list[str]:
    values = [run.figures(metric, column).get(phase) for column in columns]
    return ["" if value is None else f"{value:.{3 if metric == 'perplexity' else 4}f}" for value in values]


def _points(runs: Sequence[Run], protocol: Protocol) -> list[tuple[str, str, float, float]]:
    """Return every measured state of every run by bits per weight and perplexity."""
    points = []
    for run in runs:
        figures = run.figures("perplexity", protocol)
        for phase, title in COMPRESSED_PHASES.items():
            value = figures.get(phase)
            if value is not None:
                points.append((run.name, title, float(run.report["bits_per_weight"]), value))
    return points


def _dense(runs: Sequence[Run], protocol: Protocol) -> dict[str, float]:
    """Return the perplexity of each dense model."""
    found = {}
    for run in runs:
        value = run.figures("perplexity", protocol).get("dense")
        if value is not None:
            found[f"{run.report['model']}, dense"] = value
    return found
