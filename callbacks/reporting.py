"""When the dense model is recorded, and when the report is written and shown."""

import logging
import time
from typing import Any, cast

from lightning.pytorch import Callback, LightningModule, Trainer
from rich.console import Console
from rich.table import Table

from nowag_pl.files import write_json
from nowag_pl.lit.datamodule import TokenDataModule
from nowag_pl.lit.module import LitCausalLM
from nowag_pl.lit.trainer import is_compressing
from nowag_pl.pipeline.report import REPORT_FILE, build_report

_log = logging.getLogger("nowag_pl")


class ModelReport(Callback):
    """Compare with the dense model, show a table, write <run_dir>/report.json.

    Args:
        batch_size: windows of the evaluation texts that pass a block of the dense model together.
    """

    def __init__(self, batch_size: int = 8) -> None:
        if batch_size < 1:
            raise ValueError(f"Expected report.batch_size of at least 1, but got {batch_size}.")
        self.batch_size = batch_size
        self._metrics: dict[str, dict[str, dict[str, float]]] = {}
        self._evaluation_seconds = 0.0
        self._started = 0.0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Record the dense model's predictions, once, if this run compresses."""
        module = cast(LitCausalLM, pl_module)
        if module.reference is None and module.is_compressed_here and is_compressing(trainer, stage):
            started = time.perf_counter()
            data = cast(TokenDataModule, trainer.datamodule)  # type: ignore[attr-defined]
            module.reference = module.run.reference(data.eval_windows, self.batch_size)
            self._evaluation_seconds += time.perf_counter() - started

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        self._started = time.perf_counter()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep the figures of this phase; after the last one, write and show them."""
        module, data = cast(LitCausalLM, pl_module), cast(TokenDataModule, trainer.datamodule)  # type: ignore[attr-defined]
        self._evaluation_seconds += time.perf_counter() - self._started
        phase = getattr(trainer, "phase", "one_shot")
        self._keep(phase, module, data)
        if not trainer.is_global_zero:
            return
        compressed = module.is_compressed_here
        _show(_perplexity_table(self._metrics, data, compressed))
        if compressed and getattr(trainer, "is_last_validation", False):
            report = build_report(module.run, data.seq_len, self._metrics, {"evaluation": self._evaluation_seconds})
            path = module.run.store.folder / REPORT_FILE
            write_json(path, report)
            _show(_summary_table(report))
            _log.info("Report written to %s", path)

    def _keep(self, phase: str, module: LitCausalLM, data: TokenDataModule) -> None:
        figures: dict[str, dict[str, float]] = {}
        for name in data.eval_names:
            for key, value in module.eval_metrics[name].items():
                figures.setdefault(key, {})[name] = value
        if "dense_perplexity" in figures:
            self._metrics["dense"] = {"perplexity": figures.pop("dense_perplexity")}
        self._metrics[phase] = figures


def _perplexity_table(metrics: dict[str, Any], data: TokenDataModule, compressed: bool) -> Table:
    """Lay out the figures of all phases so far, with the protocol in the title."""
    table = Table(
        title="Perplexity: documents joined by a blank line, tokenised once, whole windows of "
        f"{data.seq_len} tokens, {data.seq_len - 1} predictions each"
    )
    titles = {"one_shot": "one-shot" if compressed else "perplexity", "finetuned": "finetuned"}
    phases = [phase for phase in ("dense", "one_shot", "finetuned") if phase in metrics]
    table.add_column("text")
    for title in ("windows", "predictions", *(titles.get(phase, phase) for phase in phases)):
        table.add_column(title, justify="right")
    divergent = [phase for phase in phases if "kl_divergence" in metrics[phase]]
    for phase in divergent:
        table.add_column(f"KL {titles[phase]} (nats)", justify="right")
        table.add_column("top-1", justify="right")
    for name, windows in data.eval_windows.items():
        cells = [name, str(len(windows)), str(len(windows) * (data.seq_len - 1))]
        cells += [f"{metrics[phase]['perplexity'][name]:.3f}" for phase in phases]
        for phase in divergent:
            cells.append(f"{metrics[phase]['kl_divergence'][name]:.4f}")
            cells.append(f"{metrics[phase]['top1_agreement'][name]:.3f}")
        table.add_row(*cells)
    return table


def _summary_table(report: dict[str, Any]) -> Table:
    """Lay out the rest of the report."""
    table = Table(title=f"{report['model']}: {report['method']}", show_header=False)
    parameters, compressed = report["num_parameters"], report["num_compressed_parameters"]
    calibration, seconds = report["calibration"], report["seconds"]
    losses = [row["loss"] for row in report["linears"]]
    rows = {
        "parameters compressed": f"{compressed:,} of {parameters:,} ({compressed / parameters:.1%})",
        "bits per weight": f"{report['bits_per_weight']:.3f} (they take {report['bytes_on_disk'] / 2**20:.2f} MiB)",
        "sparsity": f"{report['sparsity']:.1%}",
        "normalised loss": f"{sum(losses) / len(losses):.4f} (from {min(losses):.4f} to {max(losses):.4f})",
        "calibration": f"{calibration['num_sequences']} sequences, {calibration['num_tokens']:,} tokens",
        "seconds": ", ".join(f"{name} {value:.1f}" for name, value in seconds.items()),
        "peak memory": f"{report['peak_memory_bytes'] / 2**20:.0f} MiB",
    }
    for name, value in rows.items():
        table.add_row(name, value)
    return table


def _show(table: Table) -> None:
    Console().print(table)
