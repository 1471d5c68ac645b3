"""Runs over tiny models, for tests of the stages."""

from pathlib import Path
from typing import Any

from tiny_models import random_tokens
from torch import Tensor

from nowag_pl import NoWagPruner
from nowag_pl.compressors import Compressor
from nowag_pl.compressors.budget import Budget
from nowag_pl.models.checkpoint import Checkpoint
from nowag_pl.stages.compression_run import CompressionRun
from nowag_pl.stages.plan import CalibrationMode, CalibrationSettings, CompressionSettings, GuidanceSettings, Plan

WINDOWS = random_tokens(7, seq_len=24)


def plan_of(
    compressor: Compressor | None = None,
    mode: CalibrationMode = "dense",
    batch_size: int = 3,
    seed: int = 0,
    guidance: GuidanceSettings | None = None,
    **more: Any,
) -> Plan:
    """Return a plan that calibrates and compresses; `more` are settings of the compression."""
    calibration = CalibrationSettings(7, seed, mode, batch_size, guidance)
    return Plan(calibration, CompressionSettings(compressor or NoWagPruner(), **more))


def run_of(folder: Path, run_dir: Path, compressor: Compressor | None = None, ranks: Any = None, **plan: Any):
    """Return a run in which nothing is done yet."""
    return CompressionRun(Checkpoint(str(folder)), run_dir, plan_of(compressor, **plan), ranks=ranks)


def calibrated(
    folder: Path, run_dir: Path, mode: CalibrationMode = "dense", windows: Tensor = WINDOWS, **more: Any
) -> CompressionRun:
    """Return a run that is calibrated."""
    run = run_of(folder, run_dir, mode=mode, **more)
    run.calibrate(windows)
    return run


def compress(run: CompressionRun, compressor: Compressor, budget: Budget | None = None) -> CompressionRun:
    """Compress a calibrated run by another method than it was made for."""
    run.plan.compression = CompressionSettings(compressor, budget)
    run.compress()
    return run
