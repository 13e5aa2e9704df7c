"""How many Python frames a call makes between the public function and the library."""

import sys
from pathlib import Path

import pytest
import torch

import fastpe

PACKAGE = str(Path(fastpe.__file__).parent)
# frames, files; before the reference was a backend it was 77 in 14, 180 in 17 and 94
LIMITS = {"rope": (45, 9), "sinespe": (90, 13), "step": (45, 15)}


def _encoding(name):
    return fastpe.SineSPE(64, 8, seed=0) if name == "sinespe" else fastpe.RoPE(64)


@pytest.mark.parametrize("name", LIMITS)
def test_the_way_of_q_is_short(name):
    """In the steady state on the CPU: a call with gradients, or a step of decoding without."""
    if fastpe.available_backends()["cpu"] is not None:
        pytest.skip("the CPU library is not built")
    encoding = _encoding(name)
    q, k, v = (torch.randn(1, 16, 8, 64, requires_grad=name != "step") for _ in range(3))
    _, state = fastpe.causal_linear_attention(
        q, k, v, pos_encoding=encoding, output_final_state=True
    )

    def call():
        if name == "step":
            token = q[:, 0], k[:, 0], v[:, 0]
            return fastpe.causal_linear_attention_step(*token, state, pos_encoding=encoding)
        return fastpe.causal_linear_attention(q, k, v, pos_encoding=encoding)

    files = []

    def note(frame, event, _):
        if event == "call" and frame.f_code.co_filename.startswith(PACKAGE):
            files.append(frame.f_code.co_filename)

    with torch.set_grad_enabled(name != "step"):
        call()
        before = sys.getprofile()
        sys.setprofile(note)
        try:
            call()
        finally:
            sys.setprofile(before)
    assert files, "nothing was called"
    frames, different = LIMITS[name]
    assert len(files) <= frames
    assert len(set(files)) <= different
