"""Which backends there are, which can run here, and which one `auto` takes.

"reference" is plain PyTorch and needs no module; the others have the functions of ops.py.
"""

from __future__ import annotations

import functools
import importlib
import logging
import warnings
from types import ModuleType

import torch

from . import forks as forks  # before a process can fork

_MODULES = {"cpu": "native", "triton": "triton", "cuda": "cuda"}
# what "auto" tries, by type of device
_AUTO = {"cpu": ("cpu",), "cuda": ("triton", "cuda")}
NAMES = ("auto", *_MODULES, "reference")

_log = logging.getLogger("fastpe")


@functools.cache
def load(name: str) -> ModuleType:
    """Return the module of a backend."""
    return importlib.import_module(f"{__name__}.{_MODULES[name]}")


_reasons: dict[str, str | None] = {"reference": None}
_warned: set[str] = set()


def unavailable(name: str) -> str | None:
    """Return why a backend cannot run on this machine, or None if it can."""
    if name not in _reasons:
        try:
            _reasons[name] = load(name).unavailable()
        except ImportError as error:
            _reasons[name] = str(error)
    return _reasons[name]


def describe(name: str) -> str:
    """Return in a few words how an available backend runs here."""
    return "plain PyTorch, every device" if name == "reference" else load(name).describe()


def available_backends() -> dict[str, str | None]:
    """Return every backend with None if it can run here, else the reason why not."""
    return {name: unavailable(name) for name in NAMES if name != "auto"}


def check_name(name: str) -> None:
    """Raise ValueError unless there is a backend of this name."""
    if name not in NAMES:
        raise ValueError(f"backend must be one of {', '.join(map(repr, NAMES))}, got {name!r}")


def resolve(
    name: str,
    device: torch.device,
    dtype: torch.dtype,
    widths: tuple[int, int, int],
    one_token: bool = False,
) -> str:
    """Return the backend to run; a named one that cannot raises with the reason.

    Args:
        name: "auto" or a backend.
        device: Of the tensors.
        dtype: Of the tensors.
        widths: D, R and E.
        one_token: whether it is for one token after a state.
    """
    check_name(name)
    if name == "auto":
        names = _AUTO.get(device.type, ())
        # the last one takes one launch for a token
        return _choose(names[::-1] if one_token else names, device, dtype, widths)
    reason = unavailable(name)
    if reason is not None:
        raise RuntimeError(f"backend {name!r} is not available: {reason}")
    reason = None if name == "reference" else load(name).unsupported(device, dtype, widths)
    if reason is not None:
        raise ValueError(f"backend {name!r} {reason}")
    return name


# what torch.compiler.assume_constant_result does, without its import of the compiler
resolve._dynamo_marked_constant = True


def _choose(
    names: tuple[str, ...], device: torch.device, dtype: torch.dtype, widths: tuple[int, int, int]
) -> str:
    reasons = []
    for name in names:
        reason = unavailable(name) or load(name).unsupported(device, dtype, widths)
        if reason is None:
            _log.debug("backend for %s: %s", device, name)
            return name
        reasons.append(f"{name} {reason}")
    why = "; ".join(reasons) or f"this version has no kernels for {device.type} devices"
    if why not in _warned:
        _warned.add(why)
        warnings.warn(
            f"fastpe uses its PyTorch reference on {device.type}, which is slower: {why}",
            RuntimeWarning,
            stacklevel=4,
        )
    return "reference"
