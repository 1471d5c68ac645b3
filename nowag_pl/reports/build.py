"""The report of a run: the compressed linears, their size, and the cost in quality."""

import dataclasses
import json
import math
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from nowag_pl.data.tokens import tokens_digest
from nowag_pl.reports.averages import mean_over_weights, num_weights
from nowag_pl.run import provenance
from nowag_pl.run.memory import peak_memory_bytes
from nowag_pl.run.wording import PHASES
from nowag_pl.stages.compression_run import CompressionRun

REPORT_FILE = "report.json"
PAGE_FILE = "report.html"
QUALITY = ("perplexity", "kl_divergence", "top1_agreement")  # each by text and phase
POLICY_FILE = "policy.json"  # of a training from rewards, where nothing is compressed
POLICY_PAGE_FILE = "policy.html"


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
        metrics: phase ("dense", "one_shot", "blockwise", "finetuned") to metric ("perplexity", "kl_divergence",
            "top1_agreement") to evaluation text to value.
        seconds: time of the stages that leave no artefacts.
    """
    rows, head = run.statistics(), run.head_statistics()
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
        "head": head,
        "experts": run.expert_statistics(),
        "bytes_on_disk": num_bytes,
        **_quality(metrics),
        "seconds": _seconds(run, seconds),
        "finetuned_blocks": run.finetuning_statistics() if "blockwise" in metrics else [],
        "damage": {phase: dataclasses.asdict(damage) for phase, damage in run.damage.items()},
        "peak_memory_bytes": max(peaks.values()),
        "peak_memory": peaks,
        "protocol": {
            text: {"num_windows": len(tokens), "sha256": tokens_digest(tokens), "bos": run.bos}
            for text, tokens in windows.items()
        },
        "bytes": _bytes(run, num_compressed, num_bytes, head),
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
        "top1_agreement": by_text("top1_agreement", names),
    }


def _bytes(run: CompressionRun, num_compressed: int, num_bytes: int, head: Mapping[str, Any] | None) -> dict[str, int]:
    """Return the sizes of all compressed linears and of the whole model, before and after."""
    itemsize = run.checkpoint.dtype.itemsize
    dense_head, compressed_head = (0, 0) if head is None else (math.prod(head["shape"]) * itemsize, head["bytes"])
    dense_model = run.num_parameters * itemsize
    return {
        "dense_linears": num_compressed * itemsize,
        "linears": num_bytes,
        "dense_model": dense_model,
        "model": dense_model - num_compressed * itemsize + num_bytes - dense_head + compressed_head,
    }


def _seconds(run: CompressionRun, seconds: Mapping[str, float]) -> dict[str, float]:
    """Return the time of all stages; finetuning is that of the blocks and that of end-to-end training together."""
    of_artefacts = run.stage_seconds()
    finetuning = of_artefacts["finetuning"] + seconds.get("finetuning", 0.0)
    return {**of_artefacts, **seconds, "finetuning": finetuning}


def with_earlier(report: Mapping[str, Any], earlier: Any, later_phases: Iterable[str]) -> dict[str, Any]:
    """Return a report with what the one before it in the same run directory knows and this one does not.

    Args:
        report: content of report.json, as this process has measured it.
        earlier: content of the file that it replaces; that of another run, or of no report, is left out.
        later_phases: phases after one-shot compression whose artefacts are there.
    """
    merged = dict(report)
    if not isinstance(earlier, dict) or not _is_same_run(report, earlier):
        return merged
    kept = {*later_phases}
    for metric in QUALITY:
        before = earlier.get(metric, {})
        merged[metric] = {
            text: _figures(figures, before.get(text, {}), kept if _same_text(report, earlier, text) else set())
            for text, figures in report[metric].items()
        }
    measured = earlier.get("damage", {})
    merged["damage"] = {phase: measured[phase] for phase in kept if phase in measured} | report["damage"]
    if kept:
        merged["settings"] = {**earlier["settings"], **report["settings"]}
        merged["finetuned_blocks"] = report["finetuned_blocks"] or earlier["finetuned_blocks"]
    if "finetuned" in kept and merged.get("policy") is None:
        merged["policy"] = earlier.get("policy")
    seconds = {name: value for name, value in earlier["seconds"].items() if kept or name != "finetuning"}
    merged["samples"] = _samples(report.get("samples", []), earlier.get("samples", []), kept)
    names = [*report["seconds"], *(name for name in seconds if name not in report["seconds"])]
    merged["seconds"] = {name: max(report["seconds"].get(name, 0.0), seconds.get(name, 0.0)) for name in names}
    return merged


def _is_same_run(report: Mapping[str, Any], earlier: Mapping[str, Any]) -> bool:
    """Tell whether a report was written of the same compressed model, and has all that is taken from it."""
    names = ("perplexity", "kl_divergence", "settings", "seconds", "protocol")
    if not all(isinstance(earlier.get(name), dict) for name in names) or "finetuned_blocks" not in earlier:
        return False
    of_model = [name for name in report["settings"] if name.startswith(("calibration.", "compression."))]
    return all(earlier["settings"].get(name) == report["settings"][name] for name in of_model)


def _same_text(report: Mapping[str, Any], earlier: Mapping[str, Any], text: str) -> bool:
    return earlier["protocol"].get(text) == report["protocol"][text]


def _samples(written: Any, before: Any, kept: set[str]) -> list[dict[str, str]]:
    """Return continuations by phase, those that were not written now as they were before."""
    rows = {row["prompt"]: row for row in before}
    found = [{**{phase: rows.get(row["prompt"], {}).get(phase) for phase in kept}, **row} for row in written]
    return [{phase: text for phase, text in row.items() if text is not None} for row in found]


def _figures(measured: Mapping[str, float | None], before: Mapping[str, Any], kept: set[str]) -> dict[str, Any]:
    """Return figures by phase, in the order of the phases, those that were not measured as they were before."""
    found = dict(measured)
    for phase in kept:
        if found.get(phase) is None and before.get(phase) is not None:
            found[phase] = before[phase]
    return {phase: found[phase] for phase in PHASES if phase in found}
