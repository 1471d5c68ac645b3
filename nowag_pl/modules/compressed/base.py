"""The base of every compressed linear."""

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_FLOATS = ("float64", "float32", "bfloat16", "float16")
# What any linear may have among its settings that is a number of something.
_COUNTS = ("subvector_dim", "codebook_size", "out_block", "in_block", "bits", "state_bits")


class CompressedLinear(nn.Module, ABC):
    """A linear whose weight is kept in a compressed form.

    A subclass registers itself under its class name, by which :meth:`from_description` finds it.

    Args:
        in_features: length of an input.
        out_features: length of an output.
        bias: bias `[out]`, or None.
    """

    _classes: ClassVar[dict[str, type["CompressedLinear"]]] = {}
    is_stored: ClassVar[bool] = True
    """Whether a file may name the class; forms that only run are stored as the linears that they stand for."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        CompressedLinear._classes[cls.__name__] = cls

    def __init__(self, in_features: int, out_features: int, bias: Tensor | None) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone())
        self._bias_dtype = None if bias is None else bias.dtype
        self._unpacked: Tensor | None = None
        # Tensors that the unpacked weight was made from, and how often they had been written to.
        self._watched: tuple[Tensor, ...] = ()
        self._writes = 0

    @property
    @abstractmethod
    def weight(self) -> Tensor:
        """The reconstructed weight `[out, in]`, differentiable in the parameters."""

    @property
    @abstractmethod
    def bits_per_weight(self) -> float:
        """Storage of the weight with everything that is needed to restore it, in bits per weight."""

    @property
    @abstractmethod
    def sparsity(self) -> float:
        """Fraction of weights that are removed."""

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """Return the JSON values from which :meth:`empty` makes a module of the same shape."""

    @classmethod
    @abstractmethod
    def empty(cls, settings: Mapping[str, Any]) -> "CompressedLinear":
        """Return a module with the right shapes and no meaningful values."""

    @classmethod
    def check_settings(cls, settings: Mapping[str, Any]) -> None:
        """Check what a file says of a linear, before :meth:`empty` makes it.

        Args:
            settings: as :meth:`settings` gave them, or damaged.

        Raises:
            ValueError: a size is no count, a type no floating type, or a pattern no pattern.
        """
        counts = {key: settings[key] for key in _COUNTS if key in settings}
        for key, value in ({key: settings.get(key) for key in ("in_features", "out_features")} | counts).items():
            if type(value) is not int or value < 1:
                raise ValueError(f"Expected {key} of at least 1, but got {value!r}.")
        if settings.get("dtype", _FLOATS[0]) not in _FLOATS:
            raise ValueError(f"Expected dtype to be one of {', '.join(_FLOATS)}, but got {settings['dtype']!r}.")
        if settings.get("bias") not in (None, *_FLOATS):
            raise ValueError(f"Expected bias to be null or one of {', '.join(_FLOATS)}, but got {settings['bias']!r}.")

    def check(self) -> None:
        """Check the values of a linear that was loaded; a subclass checks whatever it uses to find others, too.

        Raises:
            ValueError: a value is infinite or not a number.
        """
        for name, parameter in self.named_parameters():
            if not parameter.isfinite().all():
                raise ValueError(f"Expected finite values, but {name} holds others.")

    @property
    def bias_dtype(self) -> str | None:
        """Type of the bias by name, for :meth:`empty_bias`, or None if there is no bias."""
        return None if self._bias_dtype is None else dtype_name(self._bias_dtype)

    @staticmethod
    def empty_bias(settings: Mapping[str, Any]) -> Tensor | None:
        """Return zeros for the bias that settings describe, or None."""
        if settings["bias"] is None:
            return None
        return torch.zeros(settings["out_features"], dtype=getattr(torch, settings["bias"]))

    @property
    def stored_dtypes(self) -> dict[str, torch.dtype]:
        """Type in which each parameter is stored; while it is trained it may be held in a wider one."""
        return {} if self._bias_dtype is None else {"bias": self._bias_dtype}

    def storage(self) -> dict[str, Tensor]:
        """Return the state in the types in which it is stored. Loading it restores this module."""
        stored = self.stored_dtypes
        return {name: tensor.to(stored.get(name, tensor.dtype)) for name, tensor in self.state_dict().items()}

    def fixed(self) -> dict[str, Tensor]:
        """Return the tensors that training must not change: masks, codes."""
        # Buffers; of a sharded model they are parameters, as only these are sharded.
        tensors = (*self.named_buffers(), *self.named_parameters())
        return {name: tensor for name, tensor in tensors if not tensor.is_floating_point()}

    @property
    def storage_bytes(self) -> int:
        """Bytes of :meth:`storage` without the bias, which is not compressed."""
        return sum(tensor.nbytes for name, tensor in self.storage().items() if name != "bias")

    @property
    def held_bytes(self) -> int:
        """Bytes in memory: parameters, buffers and the unpacked weight."""
        unpacked = 0 if self._unpacked is None else self._unpacked.nbytes
        return unpacked + sum(tensor.nbytes for tensor in (*self.parameters(), *self.buffers()))

    @property
    def gradient_bytes(self) -> int:
        """Bytes that a forward pass keeps of the restored weight for the gradients of the parameters.

        They are counted without the activations, for parameters in float32; by default 16 a weight.
        """
        return 16 * self.in_features * self.out_features

    @property
    def restoring_bytes(self) -> int:
        """Bytes for restoring the weight, in addition to the stored tensors and the weight itself.

        By default 8 a weight.
        """
        return 8 * self.in_features * self.out_features

    @property
    def codebook_use(self) -> float | None:
        """Fraction of the codewords that are in use; None if there is no codebook."""
        return None

    def description(self) -> dict[str, Any]:
        """Return class name and settings as JSON values."""
        return {"class": type(self).__name__, **self.settings()}

    @staticmethod
    def from_description(description: Mapping[str, Any]) -> "CompressedLinear":
        """Make an empty module from the result of :meth:`description`.

        Raises:
            ValueError: the class is unknown or one that is never stored, or the settings are damaged.
        """
        settings = dict(description)
        name = settings.pop("class", None)
        stored = {key: each for key, each in CompressedLinear._classes.items() if _is_stored(each)}
        if not isinstance(name, str) or name not in stored:
            raise ValueError(
                f"Expected a compressed linear of class {sorted(stored)}, but got {name!r}. "
                "It was written by another version of nowag_pl."
            )
        try:
            stored[name].check_settings(settings)
            linear = stored[name].empty(settings)
            unknown = sorted(settings.keys() ^ linear.settings().keys())
        except (KeyError, TypeError, RuntimeError, ArithmeticError, AttributeError, ValueError) as error:
            reason = f"{error} is missing" if isinstance(error, KeyError) else str(error).splitlines()[0]
            raise ValueError(f"Expected the settings of a {name}, but they are damaged: {reason}") from error
        if unknown:
            raise ValueError(f"Expected the settings of a {name}, but {unknown[0]!r} is missing or unknown.")
        return linear

    @property
    def is_unpacked(self) -> bool:
        """Whether the reconstructed weight is kept in memory."""
        return self._unpacked is not None

    def unpack(self, dtype: torch.dtype) -> None:
        """Keep the reconstructed weight beside the compressed one, so that it is not reconstructed at every call.

        It is no part of the state. It is made once more where parameters or buffers were written to or loaded, and not
        used where gradients of them are asked for.

        Args:
            dtype: type of the activations that are expected.
        """
        # A tensor of inference mode could not be saved for gradients of the activations.
        with torch.inference_mode(False), torch.no_grad():
            self._unpacked = self.weight.to(dtype)
        self._watch()

    def pack(self) -> None:
        """Give the memory of the reconstructed weight back."""
        self._unpacked = None

    def dense_weight(self, dtype: torch.dtype) -> Tensor:
        """Return the weight `[out, in]` for a product: the one that is kept, or a reconstructed one.

        Args:
            dtype: type of the result.
        """
        kept = self._kept_weight()
        return (self.weight if kept is None else kept).to(dtype)

    def gives_gradients(self, *inputs: Tensor) -> bool:
        """Tell whether a result of these inputs and the parameters is differentiated."""
        return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (*inputs, *self.parameters()))

    def _kept_weight(self) -> Tensor | None:
        """Return the unpacked weight, up to date, or None where there is none or gradients go through it."""
        if self._unpacked is None or (torch.is_grad_enabled() and self.gives_gradients()):
            return None
        if not torch.compiler.is_compiling() and sum([each._version for each in self._watched]) != self._writes:
            self.unpack(self._unpacked.dtype)
        return self._unpacked

    def _watch(self) -> None:
        tensors = (*self.parameters(), *self.buffers())
        self._watched = tuple(tensor for tensor in tensors if not tensor.is_inference())
        self._writes = sum(tensor._version for tensor in self._watched)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "CompressedLinear":
        """Move the kept weight with the parameters."""
        super()._apply(fn, recurse)
        if self._unpacked is not None:
            self._unpacked = fn(self._unpacked)
            self._watch()
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        # Tensors may have been replaced by others.
        self._writes = -1

    def forward(self, activations: Tensor) -> Tensor:
        """Apply the linear: by its unpacked weight, or by what :meth:`from_packed` does.

        Args:
            activations: `[..., in]`.

        Returns:
            `[..., out]`, in the type of the activations.
        """
        weight = self._kept_weight()
        return self.from_packed(activations) if weight is None else self._product(activations, weight)

    def from_packed(self, activations: Tensor) -> Tensor:
        """Apply a linear that is not unpacked; a subclass that need not reconstruct its weight does not.

        Args:
            activations: `[..., in]`.

        Returns:
            `[..., out]`, in the type of the activations.
        """
        return self._product(activations, self.weight)

    def _product(self, activations: Tensor, weight: Tensor) -> Tensor:
        dtype: torch.dtype = activations.dtype
        bias: Tensor | None = self.bias
        # Without a call where types are equal: small linears take no longer than a few of them.
        if weight.dtype != dtype:
            weight = weight.to(dtype)
        if bias is not None and bias.dtype != dtype:
            bias = bias.to(dtype)
        return F.linear(activations, weight, bias)

    def extra_repr(self) -> str:
        """Describe the module in one line."""
        return ", ".join(f"{name}={value}" for name, value in self.settings().items())


def _is_stored(kind: type[CompressedLinear]) -> bool:
    return kind.is_stored and not inspect.isabstract(kind)


def check_pattern(pattern: Any, in_features: int) -> None:
    """Check that a value out of a file is an N:M pattern that fits a row.

    Raises:
        ValueError: it is none, or M does not divide the row.
    """
    is_pair = isinstance(pattern, list | tuple) and len(pattern) == 2 and all(type(each) is int for each in pattern)
    if not is_pair or not 1 <= pattern[0] <= pattern[1] or in_features % pattern[1]:
        raise ValueError(
            f"Expected pattern to be N and M with 1 <= N <= M where M divides {in_features}, but got {pattern!r}."
        )


def dtype_name(dtype: torch.dtype) -> str:
    """Return "float32" for torch.float32."""
    return str(dtype).removeprefix("torch.")


def rounded_to(values: Tensor, stored: torch.dtype, held: torch.dtype, what: str) -> Tensor:
    """Round values to the type in which they are stored, and return them in the type in which they are held.

    Raises:
        ValueError: a value is too large; the message names the values.
    """
    rounded = values.detach().to(stored)
    if not values.is_meta and not rounded.isfinite().all():
        raise ValueError(f"Expected {what} under {torch.finfo(stored).max}, but got up to {values.abs().max():.3g}.")
    return rounded.to(held)
