"""Let every LoRA configuration of PEFT find compressed linears: PEFT knows other layers one configuration at a time.

Imported by :mod:`nowag_pl.models.format.registration` when PEFT has defined the configuration.
"""

from functools import wraps

from peft.tuners.lora.config import LoraConfig

_own = LoraConfig.__post_init__


@wraps(_own)
def _finish(config: LoraConfig) -> None:
    """Do what the configuration does after it was made, and name the layer over compressed linears."""
    _own(config)
    # It derives from PEFT's layers, which are defined after the configuration.
    from nowag_pl.models.peft import register

    register(config)


LoraConfig.__post_init__ = _finish  # type: ignore[method-assign]
