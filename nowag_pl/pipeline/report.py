"""The report of a run: what was compressed, how far, and what it costs in quality."""

import resource
import sys
from collections.abc import Mapping
from typing import Any

import torch

from nowag_pl.pipeline.run import CompressionRun

REPORT_FILE = "report.json"


def build_report(
    run: CompressionRun,
    seq_len: int,
    metrics: Mapping[str, Mapping[str, Mapping[str, float]]],
    seconds: Mapping[str, float],
) -> dict[str, Any]:
    """Put together what report.json holds.

    Args:
        run: a run whose stages are done.
        seq_len: tokens per evaluation window.
        metrics: phase ("dense", "one_shot", "blockwise", "finetuned") to metric ("perplexity", "kl_divergence") to
            evaluation text to value.
        seconds: time of the stages that leave no artefacts.
    """
    rows = run.statistics()
    num_compressed = sum(row["shape"][0] * row["shape"][1] for row in rows)

    def mean(key: str) -> float:
        """Average over weights."""
        return sum(row[key] * row["shape"][0] * row["shape"][1] for row in rows) / num_compressed

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

    kept = ("name", "shape", "loss", "bits_per_weight", "sparsity")
    return {
        "model": run.checkpoint.path,
        "method": run.method,
        "num_parameters": run.num_parameters,
        "num_compressed_parameters": num_compressed,
        "seq_len": seq_len,
        "calibration": run.calibration,
        "bits_per_weight": mean("bits_per_weight"),
        "sparsity": mean("sparsity"),
        "bytes_on_disk": sum(row["bytes"] for row in rows),
        "perplexity": phases("perplexity", ("dense", "one_shot", *both, "finetuned")),
        "kl_divergence": phases("kl_divergence", ("one_shot", *both, "finetuned")),
        "seconds": {**stage_seconds, **seconds},
        "finetuned_blocks": run.finetuning_statistics() if finetuned else [],
        "peak_memory_bytes": peak_memory_bytes(run.device),
        "linears": [{key: row[key] for key in kept} for row in rows],
    }


def peak_memory_bytes(device: torch.device) -> int:
    """Return the most memory used so far: of the device, or of the process where it computes on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
