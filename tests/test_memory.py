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
    assert growth < 4 * numbers * 1.1 + 16
    # a code is D R numbers, two orders of magnitude more
    assert growth < 4 * D * R / 8
