"""Several runs beside each other, without putting into one column what was measured in different ways."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nowag_pl.files import read_json
from nowag_pl.reports.build import REPORT_FILE


@dataclass(frozen=True)
class Protocol:
    """What a perplexity was measured on. Only equal ones compare.

    Attributes:
        text: name of the evaluation text.
        seq_len: tokens per window.
        num_windows: windows; None where an older report does not say it.
        sha256: of the tokens of all windows; None where an older report does not say it.
    """

    text: str
    seq_len: int
    num_windows: int | None
    sha256: str | None


@dataclass(frozen=True)
class Run:
    """One report.

    Attributes:
        name: of its folder, with as many parent folders as tell it from the others.
        report: what report.json holds.
    """

    name: str
    report: Mapping[str, Any]

    def protocol(self, text: str) -> Protocol:
        """Return what a perplexity of this run was measured on."""
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
        report = read_json(path)
        missing = {"model", "method", "seq_len", "bits_per_weight", "perplexity"} - set(report)
        if missing:
            raise ValueError(f"Expected {path} to be a report, but it lacks {sorted(missing)}.")
        runs.append(Run(name, report))
    return runs


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
    """Say why perplexities on texts of one name stand in different columns."""
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
    """Return the last parts of the paths, as many as tell them apart."""
    parts = [folder.resolve().parts[1:] or ("/",) for folder in folders]
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(each[-length:]) for each in parts]
        if len(set(names)) == len(set(parts)):
            return names
    return [str(folder) for folder in folders]
