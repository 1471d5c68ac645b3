"""Draw the pictures of the documentation: python -m scripts.make_pictures RUN_DIR, a finished run of `main.py fit`.

docs/pictures/report.png is a photograph of that run's report.html in a browser.
"""

import argparse
import json
from pathlib import Path

import torch
from matplotlib.figure import Figure
from PIL import Image

from nowag_pl.compressors import NoWagPruner
from nowag_pl.functional.trellis.paths import open_path
from nowag_pl.models.checkpoint import EMBEDDED, Checkpoint
from nowag_pl.models.selection import find_linears
from nowag_pl.models.streaming import StreamedModel
from nowag_pl.reports.figures.canvas import new_figure, plain_axes, to_pixels, to_svg
from nowag_pl.reports.figures.curves import line_figure
from nowag_pl.reports.figures.linears import linear_drawing
from nowag_pl.reports.views import Limits, inspect_linear
from nowag_pl.run.layout import MOMENTS
from nowag_pl.run.ranks import Ranks
from nowag_pl.run.store import ArtefactStore

PICTURES = Path(__file__).parents[1] / "docs" / "pictures"
_BLOCK, _LINEAR = 1, "self_attn.q_proj"
_STEPS, _STATE_BITS = 10, 4


def method_picture(run_dir: Path) -> Figure:
    """Draw a linear of the embedded model before and after normalisation, and what half of the weights leave."""
    model = StreamedModel(Checkpoint(EMBEDDED))
    moments, _ = ArtefactStore(run_dir, Ranks.current()).read(MOMENTS, _BLOCK)
    linear = find_linears(model.load_block(_BLOCK))[_LINEAR]
    compressed = NoWagPruner(sparsity=0.5).compress(linear, moments[_LINEAR])
    return linear_drawing(inspect_linear(_BLOCK, _LINEAR, linear, compressed, moments[_LINEAR], Limits()))


def damage_picture(run_dir: Path) -> Figure:
    """Draw the divergence after each block of the run."""
    report = json.loads((run_dir / "report.json").read_text(encoding="utf-8"))
    damage = report["damage"]["one_shot"]
    return line_figure("Divergence after each block", {"KL": damage["divergence"]}, "block", "KL to dense (nats)")


def trellis_picture() -> Figure:
    """Draw all ways through a trellis of one bit a weight, and the one that is nearest to given weights."""
    generator = torch.Generator().manual_seed(3)
    values = torch.randn(2**_STATE_BITS, generator=generator)
    targets = torch.randn(1, _STEPS, generator=generator)
    path = open_path(targets, values, 1)[0].tolist()
    figure = new_figure(7.2, 3.8)
    axes = plain_axes(figure, "1 bit a weight: each state leads to two", "weight", "value of the state")
    for step in range(_STEPS - 1):
        for state in range(2**_STATE_BITS):
            for bit in (0, 1):
                following = (2 * state + bit) % 2**_STATE_BITS
                axes.plot((step, step + 1), values[[state, following]], color="gray", alpha=0.3, linewidth=0.7)
    axes.plot(
        range(_STEPS), values[path], color="#2f6fb2", linewidth=2, marker="o", label="cheapest path, stored as bits"
    )
    axes.plot(range(_STEPS), targets[0], color="#c0392b", ls="", marker="x", markersize=8, mew=2, label="weights")
    figure.subplots_adjust(bottom=0.22)
    figure.legend(fontsize=8, loc="lower center", ncols=2, frameon=False)
    return figure


def main() -> None:
    """Write all pictures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run_dir", type=Path)
    run_dir = parser.parse_args().run_dir
    PICTURES.mkdir(exist_ok=True)
    Image.fromarray(to_pixels(method_picture(run_dir))).quantize(128).save(PICTURES / "method.png", optimize=True)
    for name, figure in {"damage": damage_picture(run_dir), "trellis": trellis_picture()}.items():
        (PICTURES / f"{name}.svg").write_text(to_svg(figure, on_white=True), encoding="utf-8")


if __name__ == "__main__":
    main()
