"""`python main.py compare`: several runs in a table and a page, without mixing different protocols in one column."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from nowag_pl.files import read_sealed_json, write_text
from nowag_pl.reports.build import REPORT_FILE
from nowag_pl.reports.templating import render
from nowag_pl.run.wording import COMPRESSED_PHASES, PHASES, readable, shown

_NEEDED: dict[str, Any] = {
    "model": str,
    "method": str,
    "seq_len": int,
    "bits_per_weight": int | float,
    "sparsity": int | float,
    "perplexity": Mapping,
}
_PERHAPS: dict[str, Any] = {
    "protocol": Mapping,
    "kl_divergence": Mapping,
    "top1_agreement": Mapping,
    "command": str | list | None,
    "bytes": Mapping,
    "seconds": Mapping,
}
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
        """Return a metric, such as "perplexity", by state of the model on this text, if it was measured in this way."""
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
        "top1_agreement": int | float | None,
    }.items():
        for text, figures in report.get(key, {}).items():
            if not isinstance(figures, Mapping) or not all(isinstance(figure, kind) for figure in figures.values()):
                raise ValueError(
                    f"Expected {path} to be a report, but {key} of {text[:40]!r} is no mapping of figures."
                )
    numbers = [*report.get("seconds", {}).values(), report.get("bytes", {}).get("model", 0)]
    if not all(isinstance(number, int | float) for number in numbers):
        raise ValueError(f"Expected {path} to be a report, but its seconds or bytes are no numbers.")
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


@dataclass(frozen=True)
class Row:
    """A measured state of a run's model, or a dense model, which has no run.

    Attributes:
        run: name of the run.
        model: as it was given.
        state: "dense", "one-shot" and so on.
        bits: bits per weight of the linears; None for a dense model, as the next three.
        sparsity: share of removed weights.
        num_bytes: size of the whole model; None if an older report lacks it.
        seconds: time of all stages of the run together; None if an older report lacks it.
        figures: for each protocol, a value for each of :data:`METRICS`; None where it was not measured.
    """

    run: str
    model: str
    state: str
    bits: float | None
    sparsity: float | None
    num_bytes: int | None
    seconds: float | None
    figures: tuple[tuple[float | None, ...], ...]

    def cells(self, number: int) -> tuple[str, ...]:
        """Return what stands in the table of a protocol, in the order of :data:`COLUMNS`; the model where no run is."""
        return (
            self.run or self.model,
            self.state,
            *(_written(value, spec) for value, spec in zip(self.figures[number], METRICS.values(), strict=True)),
            _written(self.bits, "{:.2f}"),
            _written(self.sparsity or None, "{:.0%}"),
            _written(self.num_bytes, readable),
            _written(self.seconds, _duration),
        )


COLUMNS = ("run", "state", "perplexity", "KL", "top-1", "bits", "zeros", "size", "time")
METRICS = {"perplexity": "{:.3f}", "kl_divergence": "{:.4f}", "top1_agreement": "{:.3f}"}
_NUM_WORDS = 2  # columns with words; those of the metrics follow
_LONGEST_LABEL = 8  # letters of a name in a table on the terminal


def _written(value: float | None, spec: str | Callable[[float], str]) -> str:
    if value is None:
        return ""
    return spec.format(value) if isinstance(spec, str) else spec(value)


def _duration(seconds: float) -> str:
    """Return a time in few letters.

    Example:
        >>> _duration(41.2), _duration(312), _duration(882), _duration(7300)
        ('41 s', '5.2 min', '15 min', '2.0 h')
    """
    if seconds < 60:
        return f"{seconds:.0f} s"
    value, unit = (seconds / 60, "min") if seconds < 3600 else (seconds / 3600, "h")
    return f"{value:.{1 if value < 10 else 0}f} {unit}"


def comparison_rows(runs: Sequence[Run]) -> list[Row]:
    """Return a row for each run and measured state of its model.

    A dense model that several runs have measured in the same way has one row.
    """
    columns = protocols(runs)
    rows: list[Row] = []
    for run in runs:
        report, model = run.report, str(run.report["model"])
        size, seconds = report.get("bytes", {}).get("model"), report.get("seconds")
        dense = Row("", model, PHASES["dense"], None, None, None, None, _figures(run, columns, "dense"))
        if dense not in rows:
            rows.append(dense)
        for phase, title in COMPRESSED_PHASES.items():
            figures = _figures(run, columns, phase)
            if any(value is not None for values in figures for value in values):
                total = None if seconds is None else sum(seconds.values())
                bits, sparsity = report["bits_per_weight"], report["sparsity"]
                rows.append(Row(run.name, model, title, bits, sparsity, size, total, figures))
    return rows


def _figures(run: Run, columns: Sequence[Protocol], phase: str) -> tuple[tuple[float | None, ...], ...]:
    return tuple(tuple(run.figures(metric, column).get(phase) for metric in METRICS) for column in columns)


def compare(run_dirs: list[str], output: str = "compare.html") -> None:
    """Compare finished runs: a table for each text on the terminal, and one with figures in one HTML file.

    Perplexities that were measured on different texts or windows are in different tables, with an explanation.

    Args:
        run_dirs: run directories, each with a report.json.
        output: HTML file to write, without anything from a network.
    """
    runs = read_runs(run_dirs)
    console = Console()
    rows, columns, labels = comparison_rows(runs), protocols(runs), _labels(runs)
    for number, name in enumerate(column_names(columns)):
        console.print(_table(rows, number, f"{len(runs)} runs on {name}", labels))
    for name, label in labels.items():
        if label != name:
            console.print(shown(f"{label}: {name}"), soft_wrap=True, highlight=False)
    for note in differences(runs):
        console.print(note, style="yellow", markup=False, highlight=False)
    write_text(Path(output), comparison_page(runs))
    console.print(f"Comparison written to {output}", soft_wrap=True, markup=False)


def _labels(runs: Sequence[Run]) -> dict[str, str]:
    """Return what stands in a table of 80 columns for each run or model: its name, or a number if the name is long."""
    names = {run.name: f"run {number}" for number, run in enumerate(runs, 1)}
    models = list(dict.fromkeys(str(run.report["model"]) for run in runs))
    names |= {model: f"model {number}" for number, model in enumerate(models, 1)}
    return {name: name if len(name) <= _LONGEST_LABEL else number for name, number in names.items()}


def _table(rows: Sequence[Row], number: int, title: str, labels: Mapping[str, str]) -> Table:
    """Lay out the figures of one protocol for a terminal of 80 columns."""
    table = Table(title=shown(title), box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0), title_justify="left")
    for place, column in enumerate(COLUMNS):
        justify: Literal["left", "right"] = "left" if place < _NUM_WORDS else "right"
        table.add_column(column, justify=justify, no_wrap=place > 0, overflow="fold")
    for cells in _cells(rows, number):
        table.add_row(*map(shown, (labels[cells[0]], *cells[1:])))
    return table


def _cells(rows: Sequence[Row], number: int) -> list[tuple[str, ...]]:
    """Return the rows of the table of one protocol; what was not measured by it, and what is there, is left out."""
    # A dense model has a row for each way in which runs have measured it on all texts.
    found = dict.fromkeys(row.cells(number) for row in rows)
    return [cells for cells in found if any(cells[_NUM_WORDS : _NUM_WORDS + len(METRICS)])]


def comparison_page(runs: Sequence[Run]) -> str:
    """Return the page that compares runs."""
    from nowag_pl.reports.figures.canvas import to_svg  # matplotlib takes a second
    from nowag_pl.reports.figures.curves import scatter_figure

    rows, texts = comparison_rows(runs), []
    for number, (protocol, name) in enumerate(zip(protocols(runs), column_names(protocols(runs)), strict=True)):
        points, title = _points(runs, protocol), f"Perplexity on {name}"
        figure = to_svg(scatter_figure(title, points, "bits per weight", "perplexity", _dense(runs, protocol)))
        texts.append({"name": name, "rows": _cells(rows, number), "best": _best(rows, number), "figure": figure})
    return render(
        "comparison.html",
        title=f"Comparison of {len(runs)} runs",
        header=COLUMNS,
        num_words=_NUM_WORDS,
        texts=texts,
        models=list(dict.fromkeys(row.model for row in rows)),
        notes=differences(runs),
        runs=[{"name": run.name, "method": run.report["method"], "command": run.report.get("command")} for run in runs],
    )


def _best(rows: Sequence[Row], number: int) -> tuple[str, ...]:
    """Return the best figures of compressed models under one protocol, as they are written, in the order of columns."""
    best = []
    for place, (spec, choose) in enumerate(zip(METRICS.values(), (min, min, max), strict=True)):
        values = [row.figures[number][place] for row in rows if row.run]
        found = [value for value in values if value is not None]
        best.append(_written(choose(found), spec) if len(found) > 1 else "-")
    return (*best, *["-"] * (len(COLUMNS) - _NUM_WORDS - len(best)))


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
