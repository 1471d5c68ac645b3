"""Results as JSON, and the tables of the pages made from it.

python -m benchmarks.results            writes the tables into README and docs
python -m benchmarks.results --check    says which page has another table than the results give

A page holds `<!-- table: NAME -->` and `<!-- end of table -->`; what stands between is made by the function NAME of
`TABLES` from benchmarks/results/.
"""

import argparse
import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from nowag_pl.files import read_json, write_text

ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path(__file__).resolve().parent / "results"
PACKAGES = ("torch", "transformers", "lightning", "numpy", "numba")
_MARKED = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end of table -->)", re.DOTALL)


def hardware(threads: int) -> dict[str, Any]:
    """Return what computed: processor, threads, versions and commit."""
    commit = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    done = subprocess.run(commit, cwd=ROOT, capture_output=True, text=True, check=False)
    return {
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "threads": threads,
        "versions": {"python": platform.python_version()} | {name: version(name) for name in PACKAGES},
        "commit": done.stdout.strip() or None,
    }


def cpu_model() -> str:
    """Return the name of the processor."""
    try:
        found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text(encoding="utf-8"))
    except OSError:
        found = None
    return found[1].strip() if found else platform.processor() or platform.machine()


def read_results(name: str, folder: Path = RESULTS) -> dict[str, Any]:
    """Return results by name; empty ones where none were written."""
    path = folder / f"{name}.json"
    return read_json(path) if path.is_file() else {"rows": []}


def keep_rows(path: Path, head: dict[str, Any], rows: Sequence[dict[str, Any]], key: str = "method") -> None:
    """Write results: new rows take the place of old ones of the same name, the others stay.

    Args:
        path: the JSON file.
        head: what holds of all rows.
        rows: new rows.
        key: which value names a row.

    Raises:
        ValueError: the file holds results of another model or protocol.
    """
    old = read_json(path) if path.is_file() else {**head, "rows": []}
    if differing := sorted(name for name in head if old.get(name) != head[name]):
        raise ValueError(f"Expected {path} to hold results of the same {', '.join(differing)}: name another file.")
    merged = {row[key]: row for row in old["rows"]} | {row[key]: row for row in rows}
    write_text(path, json.dumps({**head, "rows": list(merged.values())}, indent=1) + "\n")


def real_model() -> str:
    """Return the table of methods on the real model."""
    results = read_results("real_model")
    header = ("method", "bits per weight", "perplexity", "KL (nats)", "top-1", "CPU seconds", "peak memory")
    rows = [
        (
            row["method"],
            _number(row["bits_per_weight"], 2),
            _number(row["perplexity"], 2),
            _number(row["kl_divergence"], 3),
            _number(row["top1_agreement"], 3),
            _number(row["cpu_seconds"], 0),
            f"{row['peak_memory_bytes'] / 2**30:.1f} GiB" if row["peak_memory_bytes"] else "",
        )
        for row in results["rows"]
    ]
    return markdown(header, rows)


def peers(name: str = "peers") -> str:
    """Return the table of what people would use instead."""
    header = ("method", "bits per weight", "sparsity", "perplexity", "dense", "KL (nats)", "windows")
    rows = [
        (
            row["method"],
            _number(row["bits_per_weight"], 2),
            f"{row['sparsity']:.0%}" if row["sparsity"] else "",
            _number(row["perplexity"], 2),
            _number(row["dense_perplexity"], 2),
            _number(row["kl_divergence"], 3 if row["kl_divergence"] > 0.1 else 4),
            str(row["windows"]),
        )
        for row in read_results(name)["rows"]
    ]
    return markdown(header, rows)


FIRST_SCREEN = (
    ("real_model", "nowag_trellis_2bit_plus"),
    ("peers", "llama.cpp IQ2_XXS, importance matrix"),
    ("peers", "llama.cpp Q2_K, importance matrix"),
    ("real_model", "nowag_trellis_2bit"),
    ("real_model", "nowag_p_50_plus"),
    ("peers", "llm-compressor SparseGPT 50 %"),
    ("real_model", "nowag_p_50"),
)


def first_screen() -> str:
    """Return a few rows on the real model, beside what people would use instead."""
    results = {name: {row["method"]: row for row in read_results(name)["rows"]} for name in ("real_model", "peers")}
    rows = []
    for source, method in FIRST_SCREEN:
        if (row := results[source].get(method)) is None:
            continue
        size = f"{row['sparsity']:.0%} removed" if row["sparsity"] else f"{_number(row['bits_per_weight'], 2)} bits"
        part = "" if row["windows"] == 70 else f" (first {row['windows']} windows)"
        name = f"`configs/method/{method}.yaml`" if source == "real_model" else method + part
        rows.append((name, size, _number(row["perplexity"], 1), _number(row["kl_divergence"], 3)))
    return markdown(("method", "weights of the linears", "perplexity", "KL (nats)"), rows)


def scale() -> str:
    """Return what whole runs take, by model and number of GPUs; see benchmarks/scale.py."""
    rows = read_results("scale")["rows"]
    lines = []
    for model, gpus in dict.fromkeys((row["model"], row["gpus"]) for row in rows):
        own = [row for row in rows if (row["model"], row["gpus"]) == (model, gpus)]
        before = [row for row in own if row["stage"] != "training"]
        (training,) = (row for row in own if row["stage"] == "training")
        line = [model, str(gpus)]
        line += [f"{max(row[key] for row in before) / 2**30:,.0f}" for key in ("device", "host")]
        line += [f"{training[key] / 2**30:,.0f}" for key in ("device", "host")]
        line += [f"{sum(row['disk'] for row in own) / 2**30:,.0f}", f"{sum(row['network'] for row in own) / 1e12:,.1f}"]
        hours = (sum(row["seconds"] for row in each) / 3600 for each in (before, [training]))
        lines.append([*line, *(f"{each:,.1f}" for each in hours)])
    header = ("model", "GPUs", "device, GiB", "host of a machine", "device, training", "host, training")
    return markdown((*header, "disk", "network, TB a device", "hours", "hours, training"), lines)


def sharded_memory() -> str:
    """Return what making shards takes; see benchmarks/sharded_memory.py."""
    lines = []
    for row in read_results("sharded_memory")["rows"]:
        sizes = [f"{row[key] / 2**20:,.0f}" for key in ("held", "peak", "expected")]
        lines.append(["dense" if row["model"] == "dense" else "2:4", str(row["processes"]), *sizes])
    return markdown(("model", "processes", "held, MiB a process", "highest", "expected at most"), lines)


TABLES: dict[str, Callable[[], str]] = {
    "first_screen": first_screen,
    "real_model": real_model,
    "scale": scale,
    "sharded_memory": sharded_memory,
    "peers": peers,
    "peers_prose_llama": lambda: peers("peers_prose_llama"),
}


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table in Markdown, numbers to the right."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _number(value: float | None, digits: int) -> str:
    """Return a number, or nothing where there is none."""
    return "" if value is None else f"{value:,.{digits}f}"


def rendered(page: str) -> str:
    """Return a page with the tables that the results give.

    Raises:
        ValueError: it asks for a table that is not known.
    """

    def table(found: re.Match[str]) -> str:
        if found[2] not in TABLES:
            raise ValueError(f"Expected a table of {sorted(TABLES)}, but got {found[2]!r}.")
        return f"{found[1]}{TABLES[found[2]]()}{found[3]}"

    return _MARKED.sub(table, page)


def pages() -> list[Path]:
    """Return the pages that may hold tables."""
    return [ROOT / "README.md", ROOT / "benchmarks" / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; fail where a table is another")
    args = parser.parse_args()
    stale = []
    for page in pages():
        before = page.read_text(encoding="utf-8")
        after = rendered(before)
        if after != before:
            stale.append(page.relative_to(ROOT).as_posix())
            if not args.check:
                write_text(page, after)
    print("\n".join(stale) or "All tables are those of the results.")
    sys.exit(bool(stale) and args.check)


if __name__ == "__main__":
    main()
