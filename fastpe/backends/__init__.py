"""Which backends there are, which can run here, and which one `auto` takes.

Each is a module with the same functions: `causal_dot` and `sine_features`, each with a `_backward`
unless the backend is plain PyTorch (`IN_PYTORCH`); `unavailable`, `unsupported` and `describe`.
`step` is optional (Triton and the reference have none), `philox_normal` too (the CUDA library).
"""

from __future__ import annotations

import functools
import importlib
import sys
import warnings
from types import ModuleType

import torch

from .._torch import constant_in_graphs
from .native import forks as forks  # before a process can fork

_MODULES = {"cpu": "native", "triton": "triton", "cuda": "native.cuda", "reference": "reference"}
# autograd differentiates these, any number of times, and they take padding as a mask
IN_PYTORCH = frozenset({"reference"})
# what "auto" tries, by type of device
_AUTO = {"cpu": ("cpu",), "cuda": ("triton", "cuda")}
NAMES = ("auto", *_MODULES)


@functools.cache
def load(name: str) -> ModuleType:
    """Return the module of a backend."""
    return importlib.import_module(f"{__name__}.{_MODULES[name]}")


# by name and device; a check that an error cut short leaves no entry
_reasons: dict[tuple[str, torch.device], str | None] = {}
_warned: set[str] = set()
# modules between the user's line and a warning
_INSIDE = "fastpe.", "torch.nn.modules."


def unavailable(name: str, device: torch.device | None = None) -> str | None:
    """Return why a backend cannot run here, or None if it can.

    Args:
        name: Name of the backend.
        device: Device of the tensors; default the current GPU, or the CPU without one.
    Raises:
        RuntimeError: the check cannot run now, because memory is short or a CUDA graph is being
            recorded. The next call checks again.
    """
    if device is None:
        device = current_device()
    key = name, device
    if key not in _reasons:
        try:
            _reasons[key] = load(name).unavailable(device)
        except ImportError as error:
            _reasons[key] = str(error)
    return _reasons[key]


def current_device() -> torch.device:
    """Return the current GPU, or the CPU where there is none."""
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def describe(name: str) -> str:
    """Return in a few words how an available backend runs here."""
    return load(name).describe()


def available_backends() -> dict[str, str | None]:
    """Return every backend with None if it can run here, else the reason why not."""
    return {name: _known(name) for name in NAMES if name != "auto"}


def _known(name: str) -> str | None:
    try:
        return unavailable(name)
    except RuntimeError as error:
        return f"not known now: {error}"


def check_name(name: str) -> None:
    """Raise ValueError unless there is a backend of this name."""
    if name not in NAMES:
        raise ValueError(f"backend must be one of {', '.join(map(repr, NAMES))}, got {name!r}")


@constant_in_graphs
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
        device: Device of the tensors.
        dtype: Dtype of the tensors.
        widths: D, R and E.
        one_token: Whether the call is for one token after a state.
    """
    if name == "auto":
        names = _AUTO.get(device.type, ())
        # the last one takes one launch for a token
        return _choose(names[::-1] if one_token else names, device, dtype, widths)
    check_name(name)
    reason = unavailable(name, device)
    if reason is not None:
        raise RuntimeError(f"backend {name!r} is not available: {reason}")
    reason = load(name).unsupported(device, dtype, widths)
    if reason is not None:
        raise ValueError(f"backend {name!r} {reason}")
    return name


def _choose(
    names: tuple[str, ...], device: torch.device, dtype: torch.dtype, widths: tuple[int, int, int]
) -> str:
    reasons, missed = [], None
    for name in names:
        lacking = unavailable(name, device)
        reason = lacking or load(name).unsupported(device, dtype, widths)
        if reason is None:
            if missed is not None:
                _warn(f"fastpe uses backend {name!r} on {device}: {missed}")
            return name
        reasons.append(f"{name} {reason}")
        # the one that is usually taken; sizes that it does not take are each call's own
        if lacking is not None and name == _AUTO[device.type][0]:
            missed = f"{name!r} is not available there, {lacking}"
    why = "; ".join(reasons) or f"this version has no kernels for {device.type} devices"
    _warn(f"fastpe uses its PyTorch reference on {device.type}, which is slower: {why}")
    return "reference"


def _warn(message: str) -> None:
    """Warn once in a process, at the line that called fastpe."""
    if message in _warned:
        return
    _warned.add(message)
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith(_INSIDE):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, RuntimeWarning, stacklevel=level)
