"""Every shipped method on a small real model, beside the figures of the original implementations.

python -m benchmarks.prose_llama [--shared ../shared] [--seeds 0 1 2]

Needs a folder with models/prose-llama, data/prose-calibration.txt and data/prose-eval.txt; says so and stops where
it is absent. Protocol: 128 calibration sequences of 256 tokens, perplexity on all whole windows of 256 tokens, KL
divergence and top-1 agreement on the first 48.
"""

import argparse
import copy
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from nowag_pl.compressors import Compressor, MagnitudePruner, NoWagPruner, NoWagQuantizer, WandaPruner
from nowag_pl.data.tokens import random_windows, tokenize, whole_windows
from nowag_pl.functional.predictions.divergence import kl_divergence, negative_log_likelihood
from nowag_pl.models.checkpoint import Checkpoint
from nowag_pl.models.selection import find_linears
from nowag_pl.models.streaming import StreamedModel
from nowag_pl.run.ranks import Ranks
from nowag_pl.stages.compression import measure
from nowag_pl.stages.hidden import HiddenStates
from nowag_pl.stages.moments import Observed

SEQ_LEN, NUM_SEQUENCES, KL_WINDOWS, BATCH = 256, 128, 48, 8
METHODS: dict[str, Compressor] = {
    "NoWag-P 50 %": NoWagPruner(sparsity=0.5),
    "NoWag-P 4:8": NoWagPruner(pattern=(4, 8)),
    "NoWag-P 2:4": NoWagPruner(pattern=(2, 4)),
    "NoWag-VQ d = 4, k = 256": NoWagQuantizer(subvector_dim=4, codebook_size=256),
    "Wanda 50 %": WandaPruner(sparsity=0.5),
    "Wanda 2:4": WandaPruner(pattern=(2, 4)),
    "magnitude 50 %": MagnitudePruner(sparsity=0.5),
    "magnitude 2:4": MagnitudePruner(pattern=(2, 4)),
}
# Perplexity, KL, top-1, CPU seconds: original NoWag and Wanda code with the same protocol, on a CPU.
ORIGINAL: dict[str, tuple[float | None, float, float, float]] = {
    "NoWag-P 50 %": (83.332, 0.0547, 0.816, 1.0),
    "NoWag-P 4:8": (86.802, 0.0929, 0.756, 0.7),
    "NoWag-P 2:4": (91.140, 0.1438, 0.702, 0.8),
    "NoWag-VQ d = 4, k = 256": (82.655, 0.0547, 0.816, 125),
    "Wanda 50 %": (None, 0.0624, 0.803, 0.9),
    "Wanda 2:4": (None, 0.1470, 0.705, 0.8),
    "magnitude 50 %": (None, 0.0787, 0.779, 1.1),
    "magnitude 2:4": (None, 0.1506, 0.692, 0.9),
}


def second_moments(checkpoint: Checkpoint, windows: Tensor) -> list[dict[str, Tensor]]:
    """Return the second moments of the dense model, a dictionary per block."""
    model = StreamedModel(checkpoint)
    states = HiddenStates(model, windows, BATCH)
    moments = []
    for index in range(len(model)):
        block = model.load_block(index)
        with (observed := Observed(model, block, index, full=False)):
            states.run(block, index)
        moments.append(observed.compute(Ranks())[0])
    return moments


@torch.no_grad()
def compressed_copy(model: Any, compressor: Compressor, moments: list[dict[str, Tensor]]) -> tuple[Any, float, float]:
    """Return a copy of a model with every linear replaced by its reconstruction, the mean loss and CPU seconds."""
    result, losses, seconds = copy.deepcopy(model), [], 0.0
    for index, block in enumerate(model.model.layers):
        for name, linear in find_linears(block).items():
            started = time.process_time()
            compressed: Any = compressor.compress(linear, moments[index][name])
            seconds += time.process_time() - started
            losses.append(measure(linear, compressed, moments[index][name])["loss"])
            dense = nn.Linear(linear.in_features, linear.out_features, bias=False)
            dense.weight.copy_(compressed.weight)
            result.model.layers[index].set_submodule(name, dense)
    return result, sum(losses) / len(losses), seconds


@torch.no_grad()
def evaluate(model: Any, windows: Tensor, reference: list[Tensor]) -> tuple[float, float, float]:
    """Return perplexity on all windows, KL divergence and top-1 agreement on those with reference logits."""
    nll = divergence = agreements = compared = 0.0
    for number, tokens in enumerate(windows.split(BATCH)):
        logits = model(input_ids=tokens).logits[:, :-1].flatten(0, 1)
        nll += float(negative_log_likelihood(logits, tokens[:, 1:].flatten()))
        if number < len(reference):
            total, equal = kl_divergence(reference[number], logits)
            divergence, agreements, compared = (
                divergence + float(total),
                agreements + int(equal),
                compared + len(logits),
            )
    predictions = windows.shape[0] * (windows.shape[1] - 1)
    return float(torch.tensor(nll / predictions).exp()), divergence / compared, agreements / compared


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=Path, default=Path("../shared"))
    parser.add_argument(
        "--seeds", type=int, nargs="+", default=[0], help="calibration and k-means seeds; means are shown"
    )
    args = parser.parse_args()
    console = Console(width=140)
    folder = args.shared / "models" / "prose-llama"
    if not folder.is_dir():
        console.print(f"Skipped: there is no {folder}.")
        return
    checkpoint = Checkpoint(str(folder))
    model = checkpoint.load()

    def tokens(name: str) -> Tensor:
        return tokenize([(args.shared / "data" / name).read_text(encoding="utf-8")], checkpoint.tokenizer)

    eval_windows = whole_windows(tokens("prose-eval.txt"), SEQ_LEN).long()
    with torch.no_grad():
        reference = [
            model(input_ids=batch).logits[:, :-1].flatten(0, 1) for batch in eval_windows[:KL_WINDOWS].split(BATCH)
        ]
    calibration = tokens("prose-calibration.txt")
    moments = {
        seed: second_moments(checkpoint, random_windows(calibration, SEQ_LEN, NUM_SEQUENCES, seed))
        for seed in args.seeds
    }
    table = Table(title=f"prose-llama, mean of {len(args.seeds)} seed(s); in brackets the original implementation")
    for column in ("method", "perplexity", "KL (nats)", "top-1", "loss", "CPU seconds"):
        table.add_column(column, justify="left" if column == "method" else "right")
    table.add_row("dense", f"{evaluate(model, eval_windows, reference)[0]:.3f} (78.274)", "0", "1", "0", "")
    for name, compressor in METHODS.items():
        rows = []
        for seed in args.seeds:
            seeded = NoWagQuantizer(4, 256, seed=seed) if isinstance(compressor, NoWagQuantizer) else compressor
            result, loss, seconds = compressed_copy(model, seeded, moments[seed])
            rows.append((*evaluate(result, eval_windows, reference), loss, seconds))
        perplexity, divergence, agreement, loss, seconds = torch.tensor(rows).mean(dim=0).tolist()
        original = ORIGINAL[name]
        table.add_row(
            name,
            f"{perplexity:.3f} ({original[0] if original[0] else '-'})",
            f"{divergence:.4f} ({original[1]})",
            f"{agreement:.3f} ({original[2]})",
            f"{loss:.4f}",
            f"{seconds:.1f} ({original[3]})",
        )
    console.print(table)


if __name__ == "__main__":
    main()
