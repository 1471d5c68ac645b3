"""The declared base of callbacks that run a stage of a fit, and typed access to the module and data of a Trainer."""

from lightning.pytorch import Callback, LightningModule

from nowag_pl.lit.datamodule import data_of
from nowag_pl.lit.module import LitCausalLM
from nowag_pl.stages.plan import Plan

__all__ = ["Stage", "data_of", "module_of"]


class Stage(Callback):
    """A callback that runs a stage of a fit.

    Lifecycle: `announce` when a fit or a validation begins, before anything is computed; `setup` while it is set up,
    after all processes have started and before anything is wrapped; then Lightning's other hooks.
    """

    def announce(self, plan: Plan) -> None:
        """Enter the settings of this stage in the plan of the run."""


def module_of(pl_module: LightningModule) -> LitCausalLM:
    """Return the module with its own type.

    Raises:
        TypeError: it is another module.
    """
    if not isinstance(pl_module, LitCausalLM):
        raise TypeError(f"Expected a LitCausalLM, but got {type(pl_module).__name__}.")
    return pl_module
