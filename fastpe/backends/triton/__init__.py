"""Backend "triton": kernels for NVIDIA cards; others that Triton supports are untested.

With TRITON_INTERPRET=1 the kernels run on CPU tensors in Triton's interpreter, for tests.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import torch
import triton

from ..._torch import without_modes
from .. import reference
from ..reference.elementwise import elu1
from ..specs import ScanOptions
from .blocks import too_wide
from .causal_dot_launch import causal_dot, causal_dot_backward
from .common import INTERPRETED
from .sine_features_launch import philox_normal, sine_features, sine_features_backward

__all__ = [
    "causal_dot",
    "causal_dot_backward",
    "describe",
    "philox_normal",
    "sine_features",
    "sine_features_backward",
    "unavailable",
    "unsupported",
]

WIDEST = 256


# errors of the check that are no fault of the compiler or the card, by type and by text
_PASSING = torch.OutOfMemoryError, torch.AcceleratorError
_PASSING_TEXTS = ("out of memory", "capturing")


def unavailable(device: torch.device) -> str | None:
    """Return why the kernels cannot run on a GPU, or None; a CPU means the current GPU.

    Raises:
        RuntimeError: the check cannot run now, but may run later.
    """
    if INTERPRETED:
        return None
    if not torch.cuda.is_available():
        return "torch finds no CUDA device"
    if device.type != "cuda":
        device = torch.device("cuda", torch.cuda.current_device())
    with torch.cuda.device(device):
        capturing = torch.cuda.is_current_stream_capturing()
    if capturing:
        raise RuntimeError(
            "fastpe's Triton kernels are checked at their first call on a device, which a CUDA "
            "graph cannot record: call once before capture"
        )

    def check() -> str | None:
        with torch.cuda.device(device):
            return miscompiled(device)

    try:
        # in another thread, out of reach of the caller's inference mode and transforms
        with ThreadPoolExecutor(1) as pool:
            return pool.submit(check).result()
    except Exception as error:  # for instance a missing compiler or a card that is too old
        if isinstance(error, _PASSING) or any(text in str(error) for text in _PASSING_TEXTS):
            raise
        return f"Triton {triton.__version__} cannot compile for this card: {error}"


def miscompiled(device: torch.device) -> str | None:
    """Return how gradients from this Triton on this card are wrong, or None if they are right.

    Some faults of its compiler showed only in wrong gradients (flash-linear-attention issues 640
    and 984).
    """
    with without_modes(), torch.no_grad():
        generator = torch.Generator(device).manual_seed(0)
        q, k, v, do = (
            torch.randn(1, 200, 2, 64, generator=generator, device=device).bfloat16()
            for _ in range(4)
        )
        options = ScanOptions("elu1", "sum", 1e-6, False, False, True, 1.0, 0, "triton")
        inputs = q, k, v, None, None, None, None, None
        o, den, _, _ = causal_dot(*inputs, options)
        needs = [True] * 3 + [False] * 4
        found = causal_dot_backward((do, None, None), inputs, options, o, den, needs)[:3]
        with torch.enable_grad():
            leaves = [x.double().requires_grad_() for x in (q, k, v)]
            psi = [elu1(x) for x in leaves[:2]]
            wanted = reference.chunked(*psi, leaves[2], *psi)[0]
            wanted = torch.autograd.grad(wanted, leaves, do.double())
        for name, actual, expected in zip("qkv", found, wanted, strict=True):
            error = float((actual - expected).abs().max() / expected.abs().max())
            if not error < 0.05:
                return (
                    f"Triton {triton.__version__} miscompiles the gradient of {name} for this card "
                    f"(relative error {error:.2g}); another version may not"
                )
    return None


def describe() -> str:
    """Return Triton's version and the device that the kernels run on."""
    where = "its interpreter" if INTERPRETED else torch.cuda.get_device_name()
    return f"Triton {triton.__version__}, {where}"


def unsupported(
    device: torch.device, dtype: torch.dtype, widths: tuple[int, int, int]
) -> str | None:
    """Return why the kernels cannot take a device, dtype and widths D, R, E, or None."""
    if device.type != ("cpu" if INTERPRETED else "cuda"):
        return f"needs tensors on a CUDA device, got {device}"
    if max(widths) > WIDEST:
        return f"takes D, R and E up to {WIDEST}, got {', '.join(map(str, widths))}"
    return too_wide(widths, dtype, device)
