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

    def phases(metric: str, names: tuple[str, ...]) -> dict[str, dict[str, float | None]]:
        texts = metrics["one_shot"].get(metric, {})
        return {text: {name: figures.get(name, {}).get(metric, {}).get(text) for name in names} for text in texts}

    figures = dict(metrics)
    both: tuple[str, ...] = ()
    if "blockwise" in metrics:
        figures.setdefault("finetuned", metrics["blockwise"])
        both = ("blockwise",) if "finetuned" in metrics else ()
    finetuned = "blockwise" in metrics
    stage_seconds = run.stage_seconds()
    seconds = {**seconds, "finetuning": seconds.get("finetuning", 0.0) + stage_seconds.pop("finetuning")}

    num_bytes, itemsize = sum(row["bytes"] for row in rows), run.checkpoint.dtype.itemsize
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
        "perplexity": phases("perplexity", ("dense", "one_shot", *both, "finetuned")),
        "kl_divergence": phases("kl_divergence", ("one_shot", *both, "finetuned")),
        "seconds": {**stage_seconds, **seconds},
        "finetuned_blocks": run.finetuning_statistics() if finetuned else [],
        "peak_memory_bytes": max(peaks.values()),
        "peak_memory": peaks,
        "protocol": {
            text: {"num_windows": len(tokens), "sha256": tokens_digest(tokens)} for text, tokens in windows.items()
        },
        "bytes": {
            "dense_linears": num_compressed * itemsize,
            "linears": num_bytes,
            "dense_model": run.num_parameters * itemsize,
            "model": (run.num_parameters - num_compressed) * itemsize + num_bytes,
        },
        "settings": json.loads(json.dumps(run.settings)),
        "command": provenance.command(),
        "versions": provenance.versions(),
        "device": provenance.device_name(run.device),
        "linears": [{key: row[key] for key in kept if key in row} for row in rows],
    }
