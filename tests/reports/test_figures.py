from itertools import combinations

import matplotlib
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.backends.backend_agg import FigureCanvasAgg

from nowag_pl.reports.figures.canvas import new_figure, to_pixels, to_svg
from nowag_pl.reports.figures.curves import codeword_figure, line_figure, pareto_front, scatter_figure
from nowag_pl.reports.figures.matrices import Panel, color_limits, heat_map_figure, panel_figure


def drawings():
    points = torch.randn(50, 2, generator=torch.Generator().manual_seed(0))
    return {
        "panels": panel_figure("title", [[Panel("one", torch.eye(5)), None], [Panel("two", torch.eye(3) > 0)]]),
        "heat map": heat_map_figure([("loss", [[0.1, 0.2], [0.3, None]], ".2f")], ["q_proj", "k_proj"]),
        "codewords": codeword_figure("title", points, points[:4], torch.tensor([5, 0, 2, 1])),
        "lines": line_figure("title", {"a": [1.0, 2.0], "b": [3.0]}, "block", "loss", ordered=True),
        "scatter": scatter_figure("title", [("run", "one-shot", 2.0, 9.0)], "bits", "perplexity", {"dense": 7.0}),
    }


@pytest.mark.parametrize("name", ["panels", "heat map", "codewords", "lines", "scatter"])
def test_every_figure_has_pixels_and_a_vector_form_and_changes_nothing_global(name):
    before = dict(matplotlib.rcParams)
    figure = drawings()[name]
    pixels = to_pixels(figure)
    assert pixels.dtype == np.uint8
    assert pixels.shape[2] == 3
    assert 0 < (pixels < 250).mean() < 1
    svg = to_svg(figure)
    assert svg.startswith("<svg")
    assert svg == to_svg(drawings()[name])
    assert dict(matplotlib.rcParams) == before


def test_size_is_in_inches_of_eighty_pixels():
    assert to_pixels(new_figure(2.0, 1.0)).shape == (80, 160, 3)


def test_mask_is_dark_where_weights_are_kept_and_rows_run_downwards():
    keep = torch.tensor([[True, False], [False, False]])
    pixels = to_pixels(panel_figure("", [[Panel("", keep)]])).mean(axis=2)
    edge = 28  # with the name of the rows
    pixels = pixels[:-edge, edge:]
    dark = np.argwhere(pixels < 10)
    top, left = dark.min(axis=0)
    bottom, right = dark.max(axis=0) + 1
    assert bottom - top == right - left == 80
    assert (pixels[top:bottom, left:right] == 0).all()
    assert (pixels[bottom:, left:] > 250).all()  # the lower half, with nothing kept
    assert (pixels[top:bottom, right:] > 250).all()


def test_larger_values_are_lighter():
    pixels = to_pixels(panel_figure("", [[Panel("", torch.tensor([[0.0, 1.0]]))]])).astype(int).sum(axis=2)
    panel = pixels[120, 28 : 28 + 160]
    assert panel[10] < panel[150]


def test_extreme_values_do_not_set_the_colours():
    values = torch.linspace(0, 1, 10_000).view(100, 100).clone()
    values[3, 4] = 1e6
    low, high = color_limits(values)
    assert 0 <= low < 0.01
    assert 0.99 < high <= 1.01


def test_values_stand_in_the_cells_of_small_maps_only():
    few, many = ([[0.123] * columns] * 2 for columns in (3, 40))
    assert to_svg(heat_map_figure([("loss", few, ".3f")], ["a", "b"])).count(">0.123<") == 6
    assert ">0.123<" not in to_svg(heat_map_figure([("loss", many, ".3f")], ["a", "b"]))


def test_lines_and_texts_of_a_page_take_its_colour():
    svg = to_svg(drawings()["lines"])
    assert "#000000" not in svg
    assert "currentColor" in svg
    assert "fill: #ffffff" not in svg  # no ground
    assert "fill: #ffffff" in to_svg(drawings()["lines"], on_white=True)


def test_many_ordered_lines_have_a_scale_in_place_of_a_legend():
    lines = {f"block {number}": [1.0, 0.5] for number in range(80)}
    assert ">block 79<" not in to_svg(line_figure("", lines, "epoch", "error", ordered=True))


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=12))
def test_front_is_what_no_other_point_beats(points):
    def beaten(x, y):
        return any(a <= x and b <= y and (a, b) != (x, y) for a, b in points)

    assert pareto_front(points) == sorted({point for point in points if not beaten(*point)})


def test_names_stay_inside_of_the_figure_and_apart():
    names = [f"{'a long name of a run, ' * 3}{number}" for number in range(6)]
    points = [(name, "one-shot", 2.0 + 0.1 * number, 9.0) for number, name in enumerate(names)]
    figure = scatter_figure("", points, "bits", "perplexity", {"dense": 7.0})
    renderer = FigureCanvasAgg(figure).get_renderer()
    boxes = [text.get_window_extent(renderer) for text in figure.axes[0].texts]
    assert len(boxes) == 6
    assert all(box.x0 >= 0 and box.x1 <= figure.bbox.width for box in boxes)
    assert not any(one.overlaps(other) for one, other in combinations(boxes, 2))


def test_legend_says_how_many_codewords_are_used():
    svg = to_svg(drawings()["codewords"])
    assert "3 of 4 codewords in use" in svg
    assert "50 subvectors" in svg
