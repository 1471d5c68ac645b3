"""`python main.py compare`: several runs in a table and a page, without mixing different protocols in one column."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from nowag_pl.files import read_sealed_json, write_text
from nowag_pl.reports.build import REPORT_FILE
from nowag_pl.run.wording import COMPRESSED_PHASES, shown

_NEEDED: dict[str, Any] = {
    "model": str,
    "method": str,
    "seq_len": int,
    "bits_per_weight": int | float,
    "sparsity": int | float,
    "perplexity": Mapping,
}
_PERHAPS: dict[str, Any] = {"protocol": Mapping, "kl_divergence": Mapping, "command": str | list | None}
_MOST_TEXTS = 100


@dataclass(frozen=True)
class Protocol:
    """The text and windows of a measured perplexity. Only equal ones compare.

    Attributes:
        text: name of the evaluation text.
        seq_len: tokens per window.
        num_windows: number of windows; None if an older report lacks it.
        sha256: hash of the tokens of all windows; None if an older report lacks it.
    """

    text: str
    seq_len: int
    num_windows: int | None
    sha256: str | None


@dataclass(frozen=True)
class Run:
    """One report.

    Attributes:
        name: name of its folder, with enough parent folders to distinguish it from the others.
        report: content of report.json.
    """

    name: str
    report: Mapping[str, Any]

    def protocol(self, text: str) -> Protocol:
        """Return the text and windows on which a perplexity of this run was measured."""
        known = self.report.get("protocol", {}).get(text, {})
        return Protocol(text, self.report["seq_len"], known.get("num_windows"), known.get("sha256"))

    def figures(self, metric: str, protocol: Protocol) -> Mapping[str, float | None]:
        """Return "perplexity" or "kl_divergence" by state of the model on this text, if it was measured in this way."""
        text, figures = protocol.text, self.report.get(metric, {})
        return figures[text] if text in figures and self.protocol(text) == protocol else {}


def read_runs(folders: Sequence[str | Path]) -> list[Run]:
    """Read the reports of runs.

    Args:
        folders: run directories.

    Raises:
        ValueError: there are none, or one has no report, or a report that is damaged.
    """
    if not folders:
        raise ValueError("Expected at least one run directory to compare, but got none.")
    runs = []
    for folder, name in zip(folders, _short_names([Path(folder) for folder in folders]), strict=True):
        path = Path(folder) / REPORT_FILE
        if not path.is_file():
            raise ValueError(
                f"Expected a finished run in {folder}, but there is no {REPORT_FILE}. "
                f"python main.py fit --run_dir={folder} writes it at its end."
            )
        report = read_sealed_json(path, required=False)
        _check_report(path, report)
        runs.append(Run(name, report))
    return runs


def _check_report(path: Path, report: Any) -> None:
    """Check what is read of a report, which may be of another version or program.

    Raises:
        ValueError: it lacks something, or holds something else.
    """
    missing = _NEEDED.keys() - report.keys()
    if missing:
        raise ValueError(f"Expected {path} to be a report, but it lacks {sorted(missing)}.")
    for key, kind in (_NEEDED | _PERHAPS).items():
        if key in report and not isinstance(report[key], kind):
            raise ValueError(f"Expected {path} to be a report, but {key} is {str(report[key])[:40]!r}.")
    for key, kind in {
        "protocol": object,
        "perplexity": int | float | None,
        "kl_divergence": int | float | None,
    }.items():
        for text, figures in report.get(key, {}).items():
            if not isinstance(figures, Mapping) or not all(isinstance(figure, kind) for figure in figures.values()):
                raise ValueError(
                    f"Expected {path} to be a report, but {key} of {text[:40]!r} is no mapping of figures."
                )
    if len(report["perplexity"]) > _MOST_TEXTS:
        raise ValueError(f"Expected {path} to have at most {_MOST_TEXTS} texts, but got {len(report['perplexity'])}.")


def protocols(runs: Sequence[Run]) -> list[Protocol]:
    """Return the different ways in which perplexities were measured, each a column of its own."""
    return list(dict.fromkeys(run.protocol(text) for run in runs for text in run.report["perplexity"]))


def column_names(columns: Sequence[Protocol]) -> list[str]:
    """Return a short and different name for each protocol."""
    names = []
    for column in columns:
        same = [other for other in columns if other.text == column.text]
        name = column.text
        if len({other.seq_len for other in same}) > 1:
            name += f", {column.seq_len} tokens"
        alike = [other for other in same if other.seq_len == column.seq_len]
        if len(alike) > 1:
            name += f" ({chr(ord('a') + alike.index(column))})"
        names.append(name)
    return names


def differences(runs: Sequence[Run]) -> list[str]:
    """Explain why perplexities on texts of one name are in different columns."""
    columns = protocols(runs)
    names = dict(zip(columns, column_names(columns), strict=True))
    notes = []
    for text in dict.fromkeys(column.text for column in columns):
        same = [column for column in columns if column.text == text]
        for column in same if len(same) > 1 else ():
            owners = [run.name for run in runs if text in run.report["perplexity"] and run.protocol(text) == column]
            notes.append(f"{names[column]}: {', '.join(owners)}; {_describe(column)}")
        if len(same) > 1:
            reasons = [reason for key, reason in _REASONS.items() if len({getattr(column, key) for column in same}) > 1]
            notes.append(f"Perplexities on {text!r} do not compare across these columns: {', '.join(reasons)} differ.")
    return notes


_REASONS = {"seq_len": "tokens per window (seq_len)", "num_windows": "numbers of windows", "sha256": "the tokens"}


def _describe(protocol: Protocol) -> str:
    if protocol.sha256 is None:
        return f"windows of {protocol.seq_len} tokens; an older report that does not say which"
    return f"{protocol.num_windows} windows of {protocol.seq_len} tokens, SHA-256 {protocol.sha256[:12]}"


def _short_names(folders: Sequence[Path]) -> list[str]:
    """Return the last parts of the paths, as many as distinguish them."""
    parts = [folder.resolve().parts[1:] or ("/",) for folder in folders]
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(each[-length:]) for each in parts]
        if len(set(names)) == len(set(parts)):
            return names
    return [str(folder) for folder in folders]


def compare(run_dirs: list[str], output: str = "compare.html") -> None:
    """Compare finished runs: a table on the terminal, and the same with figures in one HTML file.

    Perplexities that were measured on different texts or windows are in different columns, with an explanation.

    Args:
        run_dirs: run directories, each with a report.json.
        output: HTML file to write, without anything from a network.
    """
    runs = read_runs(run_dirs)
    header, rows = comparison_rows(runs)
    table = Table(title=f"{len(runs)} runs")
    for number, column in enumerate(header):
        table.add_column(shown(column), justify="left" if number < 3 else "right", no_wrap=number in (0, 2))
    for row in rows:
        table.add_row(*map(shown, row))
    console = Console()
    console.print(table)
    for note in differences(runs):
        console.print(note, style="yellow", markup=False, highlight=False)
    write_text(Path(output), comparison_page(runs))
    console.print(f"Comparison written to {output}", soft_wrap=True, markup=False)


def comparison_rows(runs: Sequence[Run]) -> tuple[list[str], list[list[str]]]:
    """Return the header and the cells of the table: a row for each run and measured state of its model.

    A dense model that several runs have measured in the same way has one row.
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
