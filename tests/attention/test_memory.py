"""T15: memory grows with the tensors that come and go, B T H (D + R + E); codes are never built."""

import subprocess
import sys

import pytest

SCRIPT = """
import sys
import torch
from fastpe import ConvSPE, FStripe, RoPE, SineSPE, causal_linear_attention

name, backward, lengths = sys.argv[1], sys.argv[2] == "backward", map(int, sys.argv[3:])
H, D, R, E = 4, 64, 48, 32
encoding = {
    "rope": lambda: RoPE(D),
    "sinespe": lambda: SineSPE(D, H, num_sines=10, num_realizations=R),
    "convspe": lambda: ConvSPE(D, H, kernel_size=16, num_realizations=R),
    "fstripe": lambda: FStripe(D, H, num_sines=R // 2),
}[name]()


def status(key):
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key + ":"))


def run(q, k, v, g):
    o = causal_linear_attention(q, k, v, pos_encoding=encoding, backend="cpu")
    if backward:
        o.backward(g)


torch.set_num_threads(2)
for length in (64, *lengths):
    tensors = [torch.randn(1, length, H, n) for n in (D, D, E, E)]
    for x in tensors[:3]:
        x.requires_grad_(backward)
    with open("/proc/self/clear_refs", "w") as clear:
        clear.write("5")
    before = status("VmRSS")
    run(*tensors)
    print(length, status("VmHWM") - before)
    del tensors
"""

H, D, R, E = 4, 64, 48, 32
SHORT, LONG = 2048, 8192


def _growth(name, direction):
    """Return the bytes of peak memory for each further token and head."""
    run = [sys.executable, "-c", SCRIPT, name, direction, str(SHORT), str(LONG)]
    out = subprocess.run(run, capture_output=True, text=True, check=True, timeout=300).stdout
    peak = dict(map(int, line.split()) for line in out.splitlines())
    return (peak[LONG] - peak[SHORT]) / (LONG - SHORT) / H


# float32 numbers of each token and head that are alive at the peak, the inputs not counted: output,
# sum of weights and state-size rests; features of q and k; backward their gradients, those of the
# inputs, and the saved output
@pytest.mark.parametrize(
    ("name", "direction", "numbers"),
    [
        ("rope", "forward", E + 1),
        ("sinespe", "forward", 2 * R + E + 1),
        ("convspe", "forward", 2 * R + E + 1),
        ("fstripe", "forward", 2 * R + E + 1),
        ("rope", "backward", 2 * E + 1 + 2 * D + E),
        ("sinespe", "backward", 4 * R + 2 * E + 1 + 2 * D + E),
        ("fstripe", "backward", 4 * R + 2 * E + 1 + 2 * D + E),
    ],
)
def test_peak_memory(native_kernels, name, direction, numbers):
    if not sys.platform.startswith("linux"):
        pytest.skip("reads /proc: peak memory was not checked")
    growth = _growth(name, direction)
    # of the tiles of noise, as large at both lengths, the allocator may hold one more
    tile = 4 * H * D * R * (64 + 128 - 1) if name == "convspe" else 0
    assert growth < 4 * numbers * 1.1 + 16 + tile / (LONG - SHORT) / H
    # a code is D R numbers, two orders of magnitude more
    assert growth < 4 * D * R / 8


MILLION = """
import math
import sys
import torch
from fastpe import RoPE, SineSPE, causal_linear_attention

T, H, D, R, PIECE = 10**6, 1, 16, 8, 20_000
encoding = {
    "none": lambda: None,
    "rope": lambda: RoPE(D, apply="before"),
    "sinespe": lambda: SineSPE(D, H, num_sines=2, num_realizations=R, seed=1),
}[sys.argv[1]]()


def status(key):
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key + ":"))


def attend(backend, q, k, v, state=None):
    return causal_linear_attention(
        *(q, k, v), pos_encoding=encoding, initial_state=state, output_final_state=True,
        backend=backend,
    )


torch.set_num_threads(2)
torch.manual_seed(0)
q, k, v = (torch.randn(1, T, H, D) for _ in range(3))
with torch.no_grad():
    attend("cpu", *(x[:, :64] for x in (q, k, v)))
    with open("/proc/self/clear_refs", "w") as clear:
        clear.write("5")
    before = status("VmRSS")
    o, end = attend("cpu", q, k, v)
    print("extra", status("VmHWM") - before)
    if encoding is not None:
        encoding.double()
    exact = sizes = None
    for first in range(0, T, PIECE):
        part = [x[:, first : first + PIECE].double() for x in (q, k, v)]
        last, exact = attend("cpu", *part, exact)
        absolute, sizes = attend("cpu", *part[:2], part[2].abs(), sizes)
# what it is off by, in roundings of sums of the terms' sizes that grow as sqrt(T)
unit = math.sqrt(T) * torch.finfo(torch.float32).eps / 2
for name, x, y, size in (
    ("o", o[:, -100:], last[:, -100:], absolute[:, -100:]),
    ("s", end.s, exact.s, sizes.s),
    ("z", end.z, exact.z, sizes.z),
):
    print(name, ((x - y).abs() / size).max().item() / unit)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "numbers", "rest"), [("none", 16, 0), ("rope", 16, 8), ("sinespe", 16 + 2 * 8, 24)]
)
def test_a_million_tokens(native_kernels, name, numbers, rest):
    """Output and features are all the memory there is; the last tokens are those of float64.

    And, for all heads together, 8 bytes a token of its position, with sines 16 of which are equal.

    The bound is that of ten thousand steps: 4 sqrt(T) roundings, for a quotient twice that.
    """
    if not sys.platform.startswith("linux"):
        pytest.skip("reads /proc: peak memory was not checked")
    run = [sys.executable, "-c", MILLION, name]
    out = subprocess.run(run, capture_output=True, text=True, check=True, timeout=300).stdout
    found = {key: float(x) for key, x in (line.split() for line in out.splitlines())}
    # and tiles of a few hundred KB a thread
    assert found["extra"] < (4 * numbers + rest) * 10**6 + (4 << 20)
    assert found["s"] < 4
    assert found["z"] < 4
    assert found["o"] < 8
