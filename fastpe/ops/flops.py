"""The floating-point operations of each operator, for torch.utils.flop_counter.

As in torch, each multiplication of a matrix product counts two, and elementwise work counts
nothing. The count of an operator is the same on every backend:

* `causal_dot`: chunks of `chunk_size` tokens, 64 by default, as in the reference. A chunk takes
  queries x keys and weights x values, both triangles of each, and two products with the state. The
  gradient takes three more scans, two of which share a state.
* `sine_features`: as if no two tokens had one position. With equal positions the CPU does less.
* `conv_features` and `banded`: the loops of conv_features.py and banded.py.

Noise takes no products. torch counts `backend="reference"` itself.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType

import torch
from torch import Tensor

from ..backends.specs import ScanOptions
from .conv_features import TILE

_COUNTER = "torch.utils.flop_counter"
_FORMULAS: dict[str, Callable[..., int]] = {}


def _formula(function: Callable[..., int]) -> Callable[..., int]:
    """Register a function from an operator's arguments and out_val to its FLOPs, by its name."""
    _FORMULAS[function.__name__] = function
    return function


def _readable(x: Tensor) -> bool:
    return type(x) is Tensor and not x.is_meta


class _Scan:
    """Multiplications of one scan: for pairs of tokens in a chunk, for tokens, and for phases."""

    def __init__(self, inputs: Sequence[Tensor | None], options: ScanOptions) -> None:
        q, _, v, _, _, positions, freq, ranges = inputs
        b, t, h, d = q.shape
        lengths = [t] * b
        if ranges is not None and _readable(ranges):
            lengths = ranges.diff(dim=1).flatten().tolist()
        chunk = options.chunk or 64
        pairs = h * sum(n // chunk * chunk**2 + (n % chunk) ** 2 for n in lengths)
        r, e = options.widths(d)[0], v.shape[-1]
        self.within, self.state = pairs * (r + e), h * sum(lengths) * r * e
        # for queries and for keys
        self.phases = 0 if freq is None else 2 * positions.shape[0] * t * freq.numel()


@_formula
def causal_dot(*args: object, out_val: object = None) -> int:
    """Count two products in chunks, two with the state, and phases."""
    scan = _Scan(args[:8], ScanOptions(*args[8:]))
    return 2 * (scan.within + 2 * scan.state + scan.phases)


@_formula
def causal_dot_backward(*args: object, out_val: object = None) -> int:
    """Count the scans of the gradients that are needed."""
    scan, needs = _Scan(args[3:11], ScanOptions(*args[11:20])), args[-1]
    # gradients of phases need those of queries and of keys
    turns = needs[5] or needs[6]
    by_q, by_k, by_v = needs[0] or turns, needs[1] or turns, needs[2]
    total = (by_q + by_k + by_v) * (scan.within + scan.state)
    # two states: of keys and values, and of queries and gradients
    total += (by_q + (by_k or by_v or needs[3] or needs[4])) * scan.state
    return 2 * (total + (1 + needs[5] + needs[6]) * scan.phases)


def _sines(x: Tensor, positions: Tensor, freq: Tensor, gate: object, noise: object) -> tuple:
    """Return the multiplications of phases and of the projection by noise."""
    tokens = x.shape[0] * x.shape[1]
    phases = positions.shape[0] * positions.shape[1] * freq.numel()
    return phases, 0 if noise is None else tokens * noise.numel()


@_formula
def sine_features(x, positions, freq, offset, gain, gate, noise, *options, out_val=None) -> int:
    """Count phases and the projection by noise."""
    return 2 * sum(_sines(x, positions, freq, gate, noise))


@_formula
def sine_features_backward(
    grad_y, x, positions, freq, offset, gain, gate, noise, *options, out_val=None
) -> int:
    """Count the projection's adjoint, phases, and the gradients of phases."""
    phases, projection = _sines(x, positions, freq, gate, noise)
    needs = options[-1]
    return 2 * (projection + (1 + needs[1] + needs[2]) * phases)


def _codes(x: Tensor, positions: Tensor, weight: Tensor, r: int) -> tuple[int, int, int, int]:
    """Return rows of codes, the window of a tile, and multiplications of codes and features."""
    b, t, h, d = x.shape
    rows = positions.shape[0] * t
    parts = -(-rows // TILE)
    if _readable(positions):
        tiles = positions.flatten().div(TILE, rounding_mode="floor")
        parts = sum(-(-n // TILE) for n in tiles.unique(return_counts=True)[1].tolist())
    window = TILE + weight.shape[-1] - 1
    return rows, window, h * parts * d * TILE * window * r, b * t * h * d * r


@_formula
def conv_features(x, positions, weight, constant, seed, step, module, r, out_val=None) -> int:
    """Count codes and their products with tokens."""
    _, _, codes, features = _codes(x, positions, weight, r)
    return 2 * (codes + features)


@_formula
def conv_features_backward(
    grad_y, x, positions, weight, constant, seed, step, module, r, needs, out_val=None
) -> int:
    """Count codes again and their products with gradients."""
    rows, window, codes, features = _codes(x, positions, weight, r)
    total = needs[0] * (codes + features)
    if needs[1] or needs[2]:
        total += features + x.shape[2] * x.shape[3] * rows * r * window
    return 2 * total


@_formula
def banded(q, k, v, kernel, out_val=None) -> int:
    """Count weights and weighted values."""
    return 2 * q.shape[0] * q.shape[1] * kernel[..., 0, :].numel() * (q.shape[-1] + v.shape[-1])


@_formula
def banded_backward(grad_o, q, k, v, kernel, needs, out_val=None) -> int:
    """Count weights again, their gradient, and the gradients of q, k, v and the kernel."""
    once = 2 * q.shape[0] * q.shape[1] * kernel[..., 0, :].numel()
    return once * (4 * q.shape[-1] + 2 * v.shape[-1])


def _register(counter: ModuleType) -> None:
    for name, formula in _FORMULAS.items():
        counter.register_flop_formula(getattr(torch.ops.fastpe, name), get_raw=True)(formula)


class _Watch:
    """An import hook that gives torch's counter the formulas when you import it.

    Importing the counter here would import Triton, which takes longer than all of fastpe.
    """

    def find_spec(self, name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        """Return the counter's spec with `_register` after its execution; None for others."""
        if name != _COUNTER:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        run = spec.loader.exec_module

        def run_and_register(module: ModuleType) -> None:
            run(module)
            _register(module)

        spec.loader.exec_module = run_and_register
        return spec


def watch() -> None:
    """Give torch's counter the formulas, now or when it is imported."""
    if _COUNTER in sys.modules:
        _register(sys.modules[_COUNTER])
    else:
        sys.meta_path.insert(0, _Watch())
