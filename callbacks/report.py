"""When the dense model is recorded, and when the report is written and shown."""

import logging
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from nowag_pl.files import read_sealed_json, set_aside, write_sealed_json, write_text
from nowag_pl.lit.datamodule import TokenDataModule
from nowag_pl.lit.module import LitCausalLM
from nowag_pl.lit.phases import is_compressing, validated_phase
from nowag_pl.lit.stage import Stage, data_of, module_of
from nowag_pl.models.adapters import adapters_removed
from nowag_pl.reports.averages import mean_over_weights
from nowag_pl.reports.build import (
    PAGE_FILE,
    POLICY_FILE,
    POLICY_PAGE_FILE,
    REPORT_FILE,
    build_report,
    with_earlier,
)
from nowag_pl.run.wording import BEGINNINGS, PHASES, readable, shown
from nowag_pl.stages.damage import measure_damage
from nowag_pl.stages.plan import DEFAULT_BATCH, PROMPTS, Plan, PromptSettings, ReportSettings
from nowag_pl.stages.samples import fits_whole, written_by

_log = logging.getLogger("nowag_pl")


class ModelReport(Stage):
    """Compare with the dense model, show a table, write <run_dir>/report.json and report.html.

    Where nothing is compressed, a training from rewards is reported in <run_dir>/policy.json and policy.html.

    Args:
        batch_size: windows of the evaluation texts that pass through a block of the dense model together. null: 8, or
            as many as fit by the preflight's estimate.
        html: also write report.html, one file with tables and figures.
        prompts: texts that the dense and the compressed model continue, side by side; a user's turn where the model has
            a chat template. They are left out where the model does not fit in memory. []: none.
        max_new_tokens: tokens of the longest continuation.
        damage_windows: evaluation windows on which the error of each block's output and the divergence after each block
            are measured, for which every block is read twice. 0: not measured.
    """

    def __init__(
        self,
        batch_size: int | None = None,
        html: bool = True,
        prompts: Sequence[str] = PROMPTS,
        max_new_tokens: int = 48,
        damage_windows: int = 2,
    ) -> None:
        samples = PromptSettings(tuple(prompts), max_new_tokens)
        self.settings = ReportSettings(DEFAULT_BATCH if batch_size is None else batch_size, samples, damage_windows)
        self._is_free = batch_size is None
        self.html = html
        self._metrics: dict[str, dict[str, dict[str, float]]] = {}
        self._evaluation_seconds = 0.0
        self._training_seconds = 0.0
        self._validation_started = 0.0
        self._training_started = 0.0
        self._written: dict[str, list[str]] = {}  # continuations by phase
        self._tables: list[Table] = []
        self._path: Path | None = None
        self._memory = ExitStack()

    def announce(self, plan: Plan) -> None:
        """Enter the comparison with the dense model."""
        plan.report = self.settings
        if self._is_free:
            plan.free_batches.add("report")

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Record the dense model's predictions, once, if this run compresses."""
        module = module_of(pl_module)
        if module.reference is None and module.is_compressed_here and is_compressing(trainer, stage):
            started = time.perf_counter()
            data = data_of(trainer)
            with module.run.measuring("evaluation"):
                settings = module.plan.report or self.settings
                module.reference = module.run.reference(data.eval_windows, settings.batch_size)
            self._evaluation_seconds += time.perf_counter() - started

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        self._validation_started = time.perf_counter()
        module = module_of(pl_module)
        if module.is_compressed_here and validated_phase(trainer) is not None:
            self._memory.enter_context(module.run.measuring("evaluation"))

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep the figures of this phase and write the report of all so far."""
        module, data = module_of(pl_module), data_of(trainer)
        phase = validated_phase(trainer)
        if phase is None:
            return
        self._evaluation_seconds += time.perf_counter() - self._validation_started
        self._memory.close()
        self._keep(phase, module, data)
        if phase != "one_shot" and module.compressed is not None:
            with nullcontext() if module.model is None else adapters_removed(module.model):
                module.compressed.check_fixed(module.model)
        if not trainer.is_global_zero:
            return
        self._tables = [_perplexity_table(self._metrics, data, module.is_compressed_here)]
        if module.is_compressed_here:
            self._measure_damage(phase, module, data)
            seconds = {"finetuning": self._training_seconds, "evaluation": self._evaluation_seconds}
            path = module.run.store.folder / REPORT_FILE
            report = build_report(module.run, data.eval_windows, self._metrics, seconds)
            report["samples"] = self._samples(phase, module)
            report["policy"] = module.objective.report()
            report = with_earlier(report, _earlier(path), module.run.later_phases())
            write_sealed_json(path, report)
            if self.html:
                from nowag_pl.reports.page import report_page  # which imports matplotlib

                write_text(path.with_name(PAGE_FILE), report_page(report))
            self._tables.append(_summary_table(report))
            if report["samples"]:
                self._tables.append(_samples_table(report["samples"]))
            self._path = path
        elif phase == "finetuned" and (policy := module.objective.report()) is not None and module.run_dir is not None:
            self._path = self._write_policy(Path(module.run_dir) / POLICY_FILE, policy, module.checkpoint.path)

    def _write_policy(self, path: Path, policy: dict[str, Any], model: str) -> Path:
        """Write what training from rewards was like, where there is no other report."""
        write_sealed_json(path, {"model": model, **policy})
        if self.html:
            from nowag_pl.reports.policy import policy_page  # which imports matplotlib

            write_text(path.with_name(POLICY_PAGE_FILE), policy_page(policy, model))
        return path

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        self._training_started = time.perf_counter()
        module = module_of(pl_module)
        if module.is_compressed_here:
            self._memory.enter_context(module.run.measuring("finetuning"))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop the clock."""
        self._training_seconds, self._training_started = self._seconds_of_training(), 0.0
        self._memory.close()

    def _seconds_of_training(self) -> float:
        running = time.perf_counter() - self._training_started if self._training_started else 0.0
        return self._training_seconds + running

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint keeps: the time of the training so far."""
        return {"training_seconds": self._seconds_of_training()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the time that earlier processes have trained."""
        self._training_seconds = float(state_dict["training_seconds"])

    def show(self) -> None:
        """Print the tables of the last validation; to be called after the last progress bar."""
        console = Console()
        for table in self._tables:
            console.print(table)
        if self._path is not None:
            beside = f" and {self._path.with_suffix('.html').name}" if self.html else ""
            console.print(f"Report written to {self._path}{beside}", soft_wrap=True, markup=False)

    def _measure_damage(self, phase: str, module: LitCausalLM, data: TokenDataModule) -> None:
        """Measure the damage after each block, where blocks are read from the run directory."""
        num_windows = self.settings.damage_windows
        if num_windows and phase != "finetuned":
            started, compressed = time.perf_counter(), module.compressed
            assert compressed is not None
            windows = next(iter(data.eval_windows.values()))[:num_windows]
            module.run.damage[phase] = measure_damage(module.run.model, compressed.load_block, windows)
            self._evaluation_seconds += time.perf_counter() - started

    def _samples(self, phase: str, module: LitCausalLM) -> list[dict[str, str]]:
        """Return each prompt and its continuations, by the dense model and by the compressed one in each phase."""
        run, settings = module.run, self.settings.samples
        # The parts of a sharded model are with other processes.
        if not settings.prompts or module.is_sharded or not fits_whole(run):
            return []
        if not self._written:
            self._written["dense"] = written_by(run, None, settings)
        model = module.model
        if model is None:
            assert module.compressed is not None
            model = module.compressed.assemble()
        # With adapters a model has no weights of its own that could be unpacked.
        if module.adapters is None or phase != "finetuned":
            self._written[phase] = written_by(run, model, settings)
        columns = {"prompt": list(settings.prompts), **self._written}
        return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]

    def _keep(self, phase: str, module: LitCausalLM, data: TokenDataModule) -> None:
        figures: dict[str, dict[str, float]] = {}
        for name in data.eval_names:
            for key, value in module.eval_metrics[name].items():
                figures.setdefault(key, {})[name] = value
        if "dense_perplexity" in figures:
            self._metrics["dense"] = {"perplexity": figures.pop("dense_perplexity")}
        self._metrics[phase] = figures


def _earlier(path: Path) -> Any:
    """Return the report that is there, or None where there is none; a damaged one is set aside."""
    if not path.is_file():
        return None
    try:
        return read_sealed_json(path, required=False)
    except ValueError:
        _log.warning("%s is damaged: it is kept as %s, and its figures are not taken over.", path, set_aside(path).name)
        return None


def _perplexity_table(metrics: dict[str, Any], data: TokenDataModule, compressed: bool) -> Table:
    """Lay out the figures of all phases so far, with the protocol in the title."""
    table = Table(
        title=f"Perplexity in whole windows of {data.seq_len} tokens, {data.seq_len - 1} predictions each",
        caption=f"documents joined by a blank line, tokenised once, {BEGINNINGS[data.bos]}, tail dropped; KL and top-1 "
        "against the dense model",
    )
    for column in ("text", "windows", "model", "perplexity", "KL (nats)", "top-1"):
        table.add_column(column, justify="left" if column in ("text", "model") else "right", no_wrap=column != "text")
    titles = PHASES if compressed else PHASES | {"one_shot": "as loaded"}
    for name, windows in data.eval_windows.items():
        for phase, title in titles.items():
            if phase in metrics:
                figures = {key: values[name] for key, values in metrics[phase].items()}
                divergence = f"{figures['kl_divergence']:.4f}" if "kl_divergence" in figures else ""
                agreement = f"{figures['top1_agreement']:.3f}" if "top1_agreement" in figures else ""
                table.add_row(
                    shown(name), str(len(windows)), title, f"{figures['perplexity']:.3f}", divergence, agreement
                )
    return table


def _summary_table(report: dict[str, Any]) -> Table:
    """Lay out the rest of the report."""
    table = Table(title=shown(f"{report['model']}: {report['method']}"), show_header=False)
    parameters, compressed = report["num_parameters"], report["num_compressed_parameters"]
    calibration, seconds = report["calibration"], report["seconds"]
    losses = [row["loss"] for row in report["linears"]]
    mean_loss = mean_over_weights(report["linears"], "loss")
    rows = {
        "parameters compressed": f"{compressed:,} of {parameters:,} ({compressed / parameters:.1%})",
        "bits per weight": f"{report['bits_per_weight']:.3f} (they take {readable(report['bytes_on_disk'])})",
        "sparsity": f"{report['sparsity']:.1%}",
        "normalised loss": f"{mean_loss:.4f} (from {min(losses):.4f} to {max(losses):.4f})",
        "calibration": f"{calibration['num_sequences']} sequences, {calibration['num_tokens']:,} tokens",
        "seconds": ", ".join(f"{name} {value:.1f}" for name, value in seconds.items() if value),
        "peak memory": readable(report["peak_memory_bytes"]),
    }
    if (experts := report["experts"]) is not None:
        counts = [count for row in experts["tokens"] for count in row["tokens"]]
        rows["experts"] = (
            f"{min(counts, default=0):,} to {max(counts, default=0):,} calibration tokens each, "
            f"{len(experts['unseen'])} without any; {len(experts['dense'])} routers and gates stay dense"
        )
    if (budget := report["budget"]) is not None:
        rows["budget"] = (
            f"{budget['taken']} taken: KL on calibration text {budget['spread']['divergence']:.4f} with bits spread "
            f"over linears, {budget['uniform']['divergence']:.4f} with {budget['settings'][0]} everywhere"
        )
    for name, value in rows.items():
        table.add_row(name, shown(value))
    return table


def _samples_table(samples: Sequence[Mapping[str, str]]) -> Table:
    """Lay out each prompt and its continuations, one below the other, without their line breaks."""
    table = Table(title="Greedy continuations")
    for column in ("prompt", "model", "text"):
        table.add_column(column)
    for sample in samples:
        for number, phase in enumerate(phase for phase in PHASES if phase in sample):
            text = " ".join(sample[phase].split())
            table.add_row("" if number else escape(sample["prompt"]), PHASES[phase], escape(text))
        table.add_section()
    return table
