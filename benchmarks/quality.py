"""What each option of the compressors is worth at equal bits, in perplexity and divergence from the dense model.

python -m benchmarks.quality [--seeds 0 1 2] [--models embedded prose] [--only TEXT] [--held_out]

Both models are small Llamas; prose-llama is skipped where the shared folder is absent. 128 calibration sequences of 256
tokens, perplexity on all whole windows of 256 tokens, KL divergence and top-1 agreement on the first 48, nothing is
finetuned. `--held_out` is how the settings were chosen: calibration on the first four fifths of the calibration text,
evaluation on 64 windows of the last fifth, so that neither texts nor seeds are those of the table.
"""

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.prose_llama import BATCH, KL_WINDOWS, NUM_SEQUENCES, SEQ_LEN, compressed_copy, evaluate
from nowag_pl.compressors import Compressor, NoWagPruner, NoWagQuantizer
from nowag_pl.compressors.budget import Budget
from nowag_pl.data.python_docs import python_docs
from nowag_pl.data.tokens import random_windows, tokenize, whole_windows
from nowag_pl.functional.moments import mean_squares
from nowag_pl.models.checkpoint import Checkpoint
from nowag_pl.models.streaming import StreamedModel
from nowag_pl.run.ranks import Ranks
from nowag_pl.stages.calibration import CalibrationMode
from nowag_pl.stages.compression_run import CompressionRun
from nowag_pl.stages.hidden import HiddenStates
from nowag_pl.stages.moments import DenseMoments
from nowag_pl.stages.plan import CalibrationSettings, CompressionSettings, Plan

HELD_OUT_WINDOWS = 64
Moments = list[dict[str, Tensor]]


class Line(NamedTuple):
    """A line of the table: a compressor, the calibration, and whether bits are spread over linears."""

    compressor: Compressor
    mode: CalibrationMode = "dense"
    budget: Budget | None = None


def quantizer(seed: int, **options: Any) -> NoWagQuantizer:
    """Return NoWag-VQ for small matrices with some options."""
    return NoWagQuantizer(subvector_dim=4, codebook_size=256, seed=seed, **options)


def methods(seed: int) -> dict[str, dict[str, Line]]:
    """Return the lines of the table by group; the first of each is the paper's method."""
    fed_back: dict[str, Any] = {"weighting": "output", "damping": 0.03}
    compressors: dict[str, dict[str, Compressor]] = {
        "VQ": {
            "plain": quantizer(seed),
            "restarts=4": quantizer(seed, restarts=4),
            "weighting=output": quantizer(seed, weighting="output"),
            "refit_scales": quantizer(seed, damping=0.03, refit_scales=True),
            "output, refit_scales": quantizer(seed, **fed_back, refit_scales=True),
            "output, feedback, rounds=1": quantizer(seed, **fed_back, update="feedback", rounds=1),
            "output, feedback": quantizer(seed, **fed_back, update="feedback"),
            "output, feedback, refit_scales": quantizer(seed, **fed_back, update="feedback", refit_scales=True),
            "output, alternating": quantizer(seed, **fed_back, update="alternating"),
            "output, alternating, refit_scales": quantizer(seed, **fed_back, update="alternating", refit_scales=True),
        }
    }
    for name, setting in {"P 50 %": {"sparsity": 0.5}, "P 2:4": {"pattern": (2, 4)}}.items():
        compressors[name] = {
            "plain": NoWagPruner(**setting),
            "update=refit": NoWagPruner(**setting, update="refit"),
            "update=alternating": NoWagPruner(**setting, update="alternating"),
        }
    groups = {group: {name: Line(each) for name, each in lines.items()} for group, lines in compressors.items()}
    for group, lines in groups.items():
        *_, best = lines
        for mode, name in (("propagated", best), ("corrected", "plain"), ("corrected", best)):
            lines[f"{name}, {mode}"] = Line(lines[name].compressor, mode)
        if "2:4" not in group:
            lines["plain, budget"] = lines["plain"]._replace(budget=Budget())
            lines[f"{best}, budget"] = lines[best]._replace(budget=Budget())
            lines[f"{best}, corrected, budget"] = Line(lines[best].compressor, "corrected", Budget())
    return groups


def compressed_run(checkpoint: Checkpoint, line: Line, windows: Tensor, seed: int) -> tuple[Any, float, float]:
    """Return a model compressed by the stages of a run, the mean loss and CPU seconds, calibration included."""
    with tempfile.TemporaryDirectory() as folder:
        calibration = CalibrationSettings(len(windows), seed, line.mode, BATCH)
        plan = Plan(calibration, CompressionSettings(line.compressor, line.budget))
        run = CompressionRun(checkpoint, folder, plan)
        started = time.process_time()
        run.calibrate(windows)
        run.compress()
        seconds = time.process_time() - started
        losses = [row["loss"] for row in run.statistics()]
        return run.compressed().assemble(), sum(losses) / len(losses), seconds


def full_second_moments(checkpoint: Checkpoint, windows: Tensor) -> Moments:
    """Return the matrices of x x^T of the dense model, a dictionary per block."""
    model = StreamedModel(checkpoint)
    source = DenseMoments(model, HiddenStates(model, windows, BATCH), Ranks(), full=True)
    blocks = ((index, model.load_block(index)) for index in range(len(model)))
    return [dict(next(source.groups(block, index)).moments) for index, block in blocks]


def tokens_of(name: str, shared: Path, checkpoint: Checkpoint, held_out: bool) -> tuple[Tensor, Tensor]:
    """Return the tokens to calibrate on and the windows to evaluate."""
    if name == "embedded":
        texts = [list(python_docs("train")), list(python_docs("eval"))]
    else:
        texts = [[(shared / "data" / f"prose-{split}.txt").read_text("utf-8")] for split in ("calibration", "eval")]
    calibration = tokenize(texts[0], checkpoint.tokenizer)
    if not held_out:
        return calibration, whole_windows(tokenize(texts[1], checkpoint.tokenizer), SEQ_LEN).long()
    cut = len(calibration) * 4 // 5
    windows = whole_windows(calibration[cut:], SEQ_LEN).long()
    return calibration[:cut], windows[:: len(windows) // HELD_OUT_WINDOWS][:HELD_OUT_WINDOWS]


def measure_model(name: str, args: argparse.Namespace, console: Console) -> None:
    """Print the table of one model."""
    folder = args.shared / "models" / "prose-llama"
    if name == "prose" and not folder.is_dir():
        console.print(f"Skipped: there is no {folder}.")
        return
    checkpoint = Checkpoint("embedded" if name == "embedded" else str(folder))
    model = checkpoint.load()
    calibration, windows = tokens_of(name, args.shared, checkpoint, args.held_out)
    with torch.no_grad():
        reference = [model(input_ids=batch).logits[:, :-1].flatten(0, 1) for batch in windows[:KL_WINDOWS].split(BATCH)]
    rows: dict[tuple[str, str], list[tuple[float, ...]]] = {}
    for seed in args.seeds:
        drawn = random_windows(calibration, SEQ_LEN, NUM_SEQUENCES, seed)
        matrices = full_second_moments(checkpoint, drawn)
        squares = [{key: mean_squares(matrix) for key, matrix in block.items()} for block in matrices]
        for group, lines in methods(seed).items():
            chosen = {line for line in lines if args.only in f"{group}, {line}"}
            for line in [line for line in lines if chosen and (line == "plain" or line in chosen)]:
                compressor, mode, budget = lines[line]
                if mode == "dense" and budget is None:
                    moments = matrices if compressor.full_second_moment else squares
                    result, loss, seconds = compressed_copy(model, compressor, moments)
                else:
                    result, loss, seconds = compressed_run(checkpoint, lines[line], drawn, seed)
                figures = (*evaluate(result, windows, reference), loss, seconds)
                rows.setdefault((group, line), []).append(figures)
                console.print(f"{name}, seed {seed}: {group}, {line}:", *(f"{figure:.4f}" for figure in figures))
    dense = evaluate(model, windows, reference)[0]
    table = Table(title=f"{name}, dense perplexity {dense:.3f}, mean of {len(args.seeds)} seed(s); less than plain by")
    for column in ("method", "perplexity", "increase less by", "KL (nats)", "less by", "top-1", "loss", "CPU seconds"):
        table.add_column(column, justify="left" if column == "method" else "right")
    plain: dict[str, tuple[float, float]] = {}
    for (group, line), figures in rows.items():
        perplexity, divergence, agreement, loss, seconds = torch.tensor(figures).mean(dim=0).tolist()
        increase, of_plain = plain.setdefault(group, (perplexity - dense, divergence))
        table.add_row(
            f"{group}, {line}",
            f"{perplexity:.3f}",
            f"{1 - (perplexity - dense) / increase:.0%}",
            f"{divergence:.4f}",
            f"{1 - divergence / of_plain:.0%}",
            f"{agreement:.3f}",
            f"{loss:.4f}",
            f"{seconds:.1f}",
        )
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=Path, default=Path("../shared"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of calibration and k-means")
    parser.add_argument("--models", nargs="+", default=["embedded", "prose"], choices=["embedded", "prose"])
    parser.add_argument("--only", default="", help="lines that contain this text, and the plain ones of their groups")
    parser.add_argument("--held_out", action="store_true", help="the texts on which settings were chosen")
    args = parser.parse_args()
    for name in args.models:
        measure_model(name, args, Console(width=140))


if __name__ == "__main__":
    main()
