"""A budget spread over linears: one setting for each, so that losses are small and the cost together is bounded.

This is the multiple-choice knapsack problem. Settings that are not on the lower convex hull of a linear's losses over
its costs are left out; from the cheapest setting of each linear, the step with the largest fall of the loss per unit of
cost is taken, over all linears, as long as it can be paid (Lagrangian relaxation; Shoham and Gersho, "Efficient bit
allocation for an arbitrary set of quantizers", 1988). The rest of the budget then goes to any single change that
helps most. The sum of the losses is above the least possible one by less than the largest step on a hull.
"""

import heapq
from collections.abc import Sequence

# Cost in bits, and loss.
Choice = tuple[int, float]


def convex_hull(choices: Sequence[Choice]) -> list[int]:
    """Return the choices that are best for some price of a unit of cost, the cheapest first.

    Costs rise and losses fall along them, each step with a smaller fall per cost than the one before.

    Args:
        choices: cost (bits) and loss of each.

    Example:
        >>> convex_hull([(4, 0.0), (1, 8.0), (2, 6.0), (3, 1.0), (2, 9.0)])
        [1, 3, 0]
    """
    hull: list[int] = []
    for number in sorted(range(len(choices)), key=lambda number: choices[number]):
        if hull and choices[number][1] >= choices[hull[-1]][1]:
            # Another one is cheaper and no worse.
            continue
        while len(hull) > 1 and _slope(choices, hull[-2], hull[-1]) <= _slope(choices, hull[-2], number):
            hull.pop()
        hull.append(number)
    return hull


def allocate(choices: Sequence[Sequence[Choice]], budget: int) -> list[int]:
    """Choose one setting for each linear.

    Args:
        choices: for each linear, cost (bits) and loss of its settings.
        budget: the most that the chosen ones may cost together.

    Returns:
        For each linear, the number of its setting.

    Raises:
        ValueError: even the cheapest settings cost more than the budget.

    Example:
        >>> allocate([[(1, 5.0), (2, 1.0)], [(1, 5.0), (2, 4.0)]], budget=3)
        [1, 0]
    """
    hulls = [convex_hull(settings) for settings in choices]
    chosen = [hull[0] for hull in hulls]
    left = budget - sum(settings[number][0] for settings, number in zip(choices, chosen, strict=True))
    if left < 0:
        raise ValueError(f"Expected a budget of at least {budget - left}, the least cost, but got {budget}.")
    steps = [(-_slope(choices[linear], *hull[:2]), linear, 1) for linear, hull in enumerate(hulls) if len(hull) > 1]
    heapq.heapify(steps)
    while steps:
        _, linear, step = heapq.heappop(steps)
        hull = hulls[linear]
        cost = choices[linear][hull[step]][0] - choices[linear][hull[step - 1]][0]
        if cost > left:
            # Later steps of other linears may still be paid.
            continue
        left -= cost
        chosen[linear] = hull[step]
        if step + 1 < len(hull):
            heapq.heappush(steps, (-_slope(choices[linear], *hull[step : step + 2]), linear, step + 1))
    while (change := _best_change(choices, chosen, left)) is not None:
        linear, number = change
        left -= choices[linear][number][0] - choices[linear][chosen[linear]][0]
        chosen[linear] = number
    return chosen


def _slope(choices: Sequence[Choice], first: int, second: int) -> float:
    """Return the fall of the loss per cost from one choice to a more expensive one."""
    return (choices[first][1] - choices[second][1]) / (choices[second][0] - choices[first][0])


def _best_change(choices: Sequence[Sequence[Choice]], chosen: Sequence[int], left: int) -> tuple[int, int] | None:
    """Return linear and setting of the change that lowers the loss most and can be paid."""
    best: tuple[int, int] | None = None
    most = 0.0
    for linear, (settings, current) in enumerate(zip(choices, chosen, strict=True)):
        cost, loss = settings[current]
        for number, (new_cost, new_loss) in enumerate(settings):
            if new_cost - cost <= left and loss - new_loss > most:
                best, most = (linear, number), loss - new_loss
    return best
