"""What scripts/launches.py records is what Triton compiles for a launch on a card."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
if not importlib.util.find_spec("triton"):
    pytest.skip("Triton is not installed", allow_module_level=True)

CODE = """
import pickle
import launches, torch
from fastpe.backends.triton import common, noise

# every launch is rebuilt as what Triton was about to compile
seen = []
note = launches.Recorder.compile
def compile(self, source, target, options):
    launch = pickle.loads(pickle.dumps(note(self, source, target, options)))
    seen.append(launch.source().hash() == source.hash())
    return launch
launches.Recorder.compile = compile
for dtype in (torch.bfloat16, torch.float32):
    found = {a: launches.traces(a, [dtype], [(256, 256)], ["rope"]) for a in ("89", "90")}
    names = {x.kernel.name for x in found["90"]}
    assert names == {"normal_kernel", "forward_kernel", "state_kernel", "prefix_kernel",
                     "grad_q_kernel", "grad_kv_kernel"}, names
    # a card with less shared memory is given other kernels where it needs them, and only there
    assert (found["89"] == found["90"]) == (dtype == torch.bfloat16)
assert all(seen) and len(seen) > 10
# an argument that is not aligned, and one that is 1, are other code
kernel = common.Kernel(noise.normal_kernel, {"BLOCK": 64, "num_warps": 4, "num_stages": 1})
out, key = torch.empty(4096, device="meta"), torch.empty(1, dtype=torch.int64, device="meta")
with launches.recording("90") as recorder:
    for x, r in ((out, 64), (out[1:], 64), (out, 1), (out[4:], 64)):
        kernel((1, 1, 1), (x, key, key), (0, 0, 20, r))
assert len(recorder.found) == 3, recorder.found
# nothing is left in the place of a launch
assert common.Kernel.__call__.__name__ == "__call__" and common.card.__name__ == "card"
"""


def test_recorded_launches_are_tritons_own():
    """The same entry of its cache, whatever the alignment; by card; nothing is left behind."""
    environment = {k: x for k, x in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT / "scripts"), str(ROOT)])
    subprocess.run([sys.executable, "-c", CODE], check=True, cwd=ROOT, env=environment)
