"""Where figures come from: the command, the versions, the machine."""

import platform
import shlex
import sys
from importlib.metadata import PackageNotFoundError, version

import torch

_PACKAGES = ("nowag_pl", "torch", "lightning", "transformers", "datasets", "safetensors")


def command() -> str:
    """Return the command line of this process, ready for a shell."""
    return shlex.join(["python", *sys.argv])


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that make figures."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # run from a folder, not installed
            continue
    return found


def device_name(device: torch.device) -> str:
    """Return what computes, in words."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
