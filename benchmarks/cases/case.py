"""A row of a benchmark, and the row made ready for one setup."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor

from fastpe_lab.records import Setup


@dataclass
class Model:
    """A case made ready for one setup.

    Args:
        forward: function of inputs, such as q, k, v [B, T, H, D], that returns o.
        reference: the same function in float64, from its formula.
        parameters: tensors that forward learns besides.
        reference_parameters: their float64 copies, in the same order.
        redraw: function that draws new noise, as training does before each forward.
    """

    forward: Callable[..., Tensor]
    reference: Callable[..., Tensor]
    parameters: list[Tensor] = field(default_factory=list)
    reference_parameters: list[Tensor] = field(default_factory=list)
    redraw: Callable[[], None] = lambda: None


@dataclass(frozen=True)
class Case:
    """A row of a benchmark.

    Args:
        label: name in plots.
        build: function that makes the model for a setup and a variant.
        extra_bytes: function that predicts peak memory from a setup and whether it trains; None
            if the peak is small.
        variants: settings such as chunk sizes; the fastest counts.
        quadratic: whether time grows with the square of the length.
        quadratic_memory: whether memory grows with the square of the length.
        causal: whether no output depends on later tokens.
        slow_start: whether the first call compiles for seconds; --quick leaves such cases out.
        ours: whether the case is fastpe's.
        unavailable: function that says why the case cannot run with a setup, or returns None.
    """

    label: str
    build: Callable[[Setup, int | None], Model]
    extra_bytes: Callable[[Setup, bool], float] | None = None
    variants: tuple[int | None, ...] = (None,)
    quadratic: bool = False
    quadratic_memory: bool = False
    causal: bool = True
    slow_start: bool = False
    ours: bool = False
    unavailable: Callable[[Setup], str | None] = lambda setup: None
