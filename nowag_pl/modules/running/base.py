"""The form of a compressed linear that runs faster and cannot be trained."""

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from nowag_pl.modules.compressed.base import CompressedLinear


class RunningLinear(CompressedLinear):
    """A compressed linear for inference only, in the form that the hardware multiplies fastest.

    Description, state dict and storage are those of the original linear, so that a model is saved in the same way.
    Loading into it is refused.

    Args:
        linear: the original linear.
    """

    is_stored: ClassVar[bool] = False

    def __init__(self, linear: CompressedLinear) -> None:
        super().__init__(linear.in_features, linear.out_features, linear.bias)
        self.requires_grad_(False).train(linear.training)
        self._bias_dtype = linear._bias_dtype
        self._settings, self._description = linear.settings(), linear.description()
        self._stored_dtypes = linear.stored_dtypes
        self._bits_per_weight, self._sparsity = linear.bits_per_weight, linear.sparsity

    @property
    def bits_per_weight(self) -> float:
        """As stored; in memory it may be more."""
        return self._bits_per_weight

    @property
    def sparsity(self) -> float:
        """That of the linear."""
        return self._sparsity

    @property
    def stored_dtypes(self) -> dict[str, torch.dtype]:
        """Those of the linear."""
        return dict(self._stored_dtypes)

    def settings(self) -> dict[str, Any]:
        """Return those of the linear."""
        return dict(self._settings)

    def description(self) -> dict[str, Any]:
        """Return the description of the linear, the form that is stored."""
        return dict(self._description)

    @abstractmethod
    def stored_state(self) -> dict[str, Tensor]:
        """Return those tensors of the linear's state that this form holds in another way."""

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination.update({f"{prefix}{name}": tensor for name, tensor in self.stored_state().items()})

    def _load_from_state_dict(self, _: Mapping[str, Any], prefix: str, *__: Any) -> None:
        raise RuntimeError(
            f"Expected to load {prefix.rstrip('.')} before accelerate, but it is in its running form already."
        )
