"""Measure any folder of the same architecture against the dense model: perplexity, divergence, top-1 agreement.

python -m benchmarks.folder_quality FOLDER [--reference smollm2] [--windows N] [--held_out]

The folder may come from any program, as long as transformers opens it; compressed folders of this project too. Both
models run in float32 on the same windows, by the protocol of benchmarks.real_model.
"""

import argparse
import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.protocol import HELD_OUT, ROOT, SEQ_LEN, STANDARD, Texts, texts
from nowag_pl import load_compressed
from nowag_pl.data.protocols import evaluation_windows
from nowag_pl.data.sources import LocalFiles, PythonDocs, TextSource
from nowag_pl.functional.predictions.divergence import kl_divergence, negative_log_likelihood
from nowag_pl.models.checkpoint import Checkpoint

BATCH = 4


def windows_of(checkpoint: Checkpoint, chosen: Texts, seq_len: int, limit: int | None) -> Tensor:
    """Return the windows of a protocol `[num_windows, seq_len]`, tokenised for a model."""
    source: TextSource = PythonDocs("eval") if chosen.evaluation is None else LocalFiles((str(chosen.evaluation),))
    return evaluation_windows(source, checkpoint.tokenizer, seq_len)[:limit].long()


def opened(checkpoint: Checkpoint) -> nn.Module:
    """Return a dense or compressed model in float32."""
    model: nn.Module = load_compressed(checkpoint.folder) if checkpoint.compressed_linears else checkpoint.load()
    return model.float().eval()


@torch.inference_mode()
def compare(model: Any, reference: Any | None, windows: Tensor) -> dict[str, Any]:
    """Return the figures of a model on windows.

    Args:
        model: a causal language model of transformers.
        reference: the dense model; None measures the model's perplexity alone.
        windows: `[num_windows, seq_len]`.
    """
    nll = dense_nll = divergence = 0.0
    agreements, predictions = 0, windows[:, 1:].numel()
    for tokens in windows.split(BATCH):
        targets = tokens[:, 1:].flatten()
        logits = model(input_ids=tokens).logits[:, :-1].flatten(0, 1)
        nll += float(negative_log_likelihood(logits, targets))
        if reference is not None:
            dense = reference(input_ids=tokens).logits[:, :-1].flatten(0, 1)
            dense_nll += float(negative_log_likelihood(dense, targets))
            total, equal = kl_divergence(dense, logits)
            divergence, agreements = divergence + float(total), agreements + int(equal)
    figures: dict[str, Any] = {"windows": len(windows), "perplexity": _perplexity(nll, predictions)}
    if reference is None:
        return figures
    return figures | {
        "dense_perplexity": _perplexity(dense_nll, predictions),
        "kl_divergence": divergence / predictions,
        "top1_agreement": agreements / predictions,
    }


def _perplexity(nll: float, predictions: int) -> float:
    """Return exp of the mean negative log likelihood."""
    return float(torch.tensor(nll / predictions, dtype=torch.float64).exp())


def measure(
    checkpoint: Checkpoint, reference: Checkpoint | None, chosen: Texts, seq_len: int, limit: int | None
) -> dict[str, Any]:
    """Return the figures of a model folder by a protocol; tokens are those of the reference's tokenizer.

    Raises:
        ValueError: the two know another number of tokens.
    """
    if reference is not None and reference.vocab_size != checkpoint.vocab_size:
        raise ValueError(
            f"Expected {checkpoint.folder} to be of the reference's architecture, with {reference.vocab_size} tokens, "
            f"but got {checkpoint.vocab_size}."
        )
    windows = windows_of(reference or checkpoint, chosen, seq_len, limit)
    return compare(opened(checkpoint), None if reference is None else opened(reference), windows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("--reference", default="smollm2")
    parser.add_argument("--windows", type=int, help="evaluate the first windows only")
    parser.add_argument("--held_out", action="store_true", help="text to choose settings by")
    parser.add_argument("--shared", type=Path, default=Path("../shared"))
    args = parser.parse_args()
    folder = os.path.abspath(args.folder) if Path(args.folder).exists() else args.folder
    os.chdir(ROOT)
    chosen = texts(HELD_OUT if args.held_out else STANDARD, args.shared, Path("runs/real_model/texts"))
    print(json.dumps(measure(Checkpoint(folder), Checkpoint(args.reference), chosen, SEQ_LEN, args.windows), indent=1))


if __name__ == "__main__":
    main()
