"""A run in a few lines of Markdown."""

from collections.abc import Mapping, Sequence
from typing import Any

from nowag_pl.reports.statistics import mean_over_weights, num_weights

_WORST = 5


def summary_markdown(
    title: str, rows: Sequence[Mapping[str, Any]], metrics: Mapping[str, Mapping[str, float]], seq_len: int
) -> str:
    """Say what was compressed, how far, and what it cost.

    Args:
        title: model and method.
        rows: statistics of every linear, as :meth:`CompressionRun.statistics` gives them.
        metrics: evaluation text to metric ("perplexity", "dense_perplexity", "kl_divergence") to value.
        seq_len: tokens per evaluation window.
    """
    bits, sparsity, loss = (mean_over_weights(rows, key) for key in ("bits_per_weight", "sparsity", "loss"))
    lines = [
        f"### {title}",
        "",
        f"{len(rows)} linears with {num_weights(rows):,} weights: **{bits:.3f} bits per weight**, "
        f"sparsity {sparsity:.1%}, mean loss {loss:.4f} (0 is exact, 1 is nothing kept).",
        "",
        f"| text, windows of {seq_len} tokens | dense perplexity | perplexity | KL (nats) |",
        "|---|---|---|---|",
    ]
    for text, values in metrics.items():
        cells = [_number(values, key, spec) for key, spec in _COLUMNS.items()]
        lines.append(f"| {text} | {' | '.join(cells)} |")
    worst = sorted(rows, key=lambda row: -row["loss"])[:_WORST]
    lines += ["", "The linears that lost most:", "", "| linear | shape | loss | bits per weight |", "|---|---|---|---|"]
    for row in worst:
        shape = " x ".join(map(str, row["shape"]))
        lines.append(f"| {row['name']} | {shape} | {row['loss']:.4f} | {row['bits_per_weight']:.3f} |")
    return "\n".join(lines)


_COLUMNS = {"dense_perplexity": ".3f", "perplexity": ".3f", "kl_divergence": ".4f"}


def _number(values: Mapping[str, float], key: str, spec: str) -> str:
    return format(values[key], spec) if key in values else ""
