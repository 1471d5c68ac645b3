"""The report of a run: the compressed linears, their size, and the cost in quality."""

import json
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from nowag_pl.data.tokens import tokens_digest
from nowag_pl.reports.averages import mean_over_weights, num_weights
from nowag_pl.run import provenance
from nowag_pl.run.memory import peak_memory_bytes
from nowag_pl.stages.compression_run import CompressionRun

REPORT_FILE = "report.json"
PAGE_FILE = "report.html"


def build_report(
    run: CompressionRun,
    windows: Mapping[str, Tensor],
    metrics: Mapping[str, Mapping[str, Mapping[str, float]]],
    seconds: Mapping[str, float],
) -> dict[str, Any]:
    """Put together the content of report.json.

    Args:
        run: a run whose stages are done.
        windows: evaluation text to its windows `[num_windows, seq_len]`.
        metrics: phase ("dense", "one_shot", "blockwise", "finetuned") to metric ("perplexity", "kl_divergence") to
            evaluation text to value.
        seconds: time of the stages that leave no artefacts.
    """
    rows = run.statistics()
    num_compressed = num_weights(rows)
    num_bytes = sum(row["bytes"] for row in rows)
    peaks = run.peak_memory or {"evaluation": peak_memory_bytes(run.device)}
    kept = ("name", "shape", "loss", "bits_per_weight", "sparsity", "setting")
    return {
        "model": run.checkpoint.path,
        "method": run.method,
        "num_parameters": run.num_parameters,
        "num_compressed_parameters": num_compressed,
        "seq_len": next(iter(windows.values())).shape[1],
        "calibration": run.calibration,
        "bits_per_weight": mean_over_weights(rows, "bits_per_weight"),
        "sparsity": mean_over_weights(rows, "sparsity"),
        "budget": run.budget,
        "bytes_on_disk": num_bytes,
        **_quality(metrics),
        "seconds": _seconds(run, seconds),
        "finetuned_blocks": run.finetuning_statistics() if "blockwise" in metrics else [],
        "peak_memory_bytes": max(peaks.values()),
        "peak_memory": peaks,
        "protocol": {
            text: {"num_windows": len(tokens), "sha256": tokens_digest(tokens)} for text, tokens in windows.items()
        },
        "bytes": _bytes(run, num_compressed, num_bytes),
        "settings": json.loads(json.dumps(run.settings)),
        "command": provenance.command(),
        "versions": provenance.versions(),
        "device": provenance.device_name(run.device),
        "linears": [{key: row[key] for key in kept if key in row} for row in rows],
    }


def _quality(metrics: Mapping[str, Mapping[str, Mapping[str, float]]]) -> dict[str, Any]:
    """Return perplexity and divergence by text and state of the model; the last finetuning counts as "finetuned"."""
    figures, names = dict(metrics), ["one_shot", "finetuned"]
    if {"blockwise", "finetuned"} <= metrics.keys():
        names.insert(1, "blockwise")
    elif "blockwise" in metrics:
        figures["finetuned"] = metrics["blockwise"]

    def by_text(metric: str, states: list[str]) -> dict[str, dict[str, float | None]]:
        texts = metrics["one_shot"].get(metric, {})
        return {text: {state: figures.get(state, {}).get(metric, {}).get(text) for state in states} for text in texts}

    return {
        "perplexity": by_text("perplexity", ["dense", *names]),
        "kl_divergence": by_text("kl_divergence", names),
    }


def _bytes(run: CompressionRun, num_compressed: int, num_bytes: int) -> dict[str, int]:
    """Return the sizes of all compressed linears and of the whole model, before and after."""
    itemsize = run.checkpoint.dtype.itemsize
    return {
        "dense_linears": num_compressed * itemsize,
        "linears": num_bytes,
        "dense_model": run.num_parameters * itemsize,
        "model": (run.num_parameters - num_compressed) * itemsize + num_bytes,
    }


def _seconds(run: CompressionRun, seconds: Mapping[str, float]) -> dict[str, float]:
    """Return the time of all stages; finetuning is that of the blocks and that of end-to-end training together."""
    of_artefacts = run.stage_seconds()
    finetuning = of_artefacts["finetuning"] + seconds.get("finetuning", 0.0)
    return {**of_artefacts, **seconds, "finetuning": finetuning}
