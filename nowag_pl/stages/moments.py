"""Full second moments of a block's linears; those that are called with the same tensor share one matrix."""

from collections.abc import Callable

from torch import Tensor, nn

from nowag_pl.models.streaming import find_linears
from nowag_pl.modules import SecondMoment
from nowag_pl.run.ranks import Ranks


class _Observer:
    """Gathers the matrix of each input once, for the first linear that is called with it."""

    def __init__(self) -> None:
        self.moments: dict[str, SecondMoment] = {}
        self.leaders: dict[str, str] = {}  # linear: the one that was called with its input first
        self._input: Tensor | None = None
        self._leader = ""

    def observe(self, name: str, activations: Tensor) -> None:
        """Note the input of a linear."""
        if activations is not self._input:
            self._input, self._leader = activations, name
        if self.leaders.setdefault(name, self._leader) != self._leader:
            raise RuntimeError(f"Expected {name} to share its input with {self.leaders[name]} in every call.")
        if self._leader == name:
            if name not in self.moments:
                self.moments[name] = SecondMoment(activations.shape[-1], full=True).to(activations.device)
            self.moments[name].update(activations)


def full_second_moments(block: nn.Module, run: Callable[[], None], ranks: Ranks) -> dict[str, SecondMoment]:
    """Gather the full second moments of the input of every linear of a block, on this rank.

    Args:
        block: the block.
        run: runs it over all hidden states of this rank, possibly none.
        ranks: the processes of the run; they agree on who shares with whom.

    Returns:
        By name, in the block's order. Linears with the same input have the same object.
    """
    linears, observer = find_linears(block), _Observer()
    handles = [
        linear.register_forward_pre_hook(lambda _, args, name=name: observer.observe(name, args[0]))
        for name, linear in linears.items()
    ]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    leaders = {name: leader for shared in ranks.gather(observer.leaders) for name, leader in shared.items()}
    moments = observer.moments
    for name, linear in linears.items():
        if leaders.get(name, name) == name and name not in moments:  # not called on this rank
            moments[name] = SecondMoment(linear.in_features, full=True).to(linear.weight.device)
    return {name: moments[leaders.get(name, name)] for name in linears}
