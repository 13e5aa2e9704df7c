#!/usr/bin/env bash
# Build the C++ with AddressSanitizer and UndefinedBehaviorSanitizer and run its tests.
#   scripts/sanitize.sh [pytest arguments]
# The default tests run every kernel on every code path at odd widths, with all gradients, dtypes
# and layouts.
set -euo pipefail
[ $# -gt 0 ] || set -- tests/ops/test_causal_dot.py tests/ops/test_ranges.py tests/attention/test_attention.py -k \
  "(cpu and not reference and (odd_width or test_shapes or layouts or grouped or empty or split_and \
   or float16 or steps_are or negative or (any_width and 17) or test_ranges_are or that_share)) \
   or (cuda-host and (odd_width or layouts or empty or steps_are or that_share))"
cd "$(dirname "$0")/.."
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT

python - "$dir" <<'PY'
import sys
from pathlib import Path

import setup

flags = ("-O1", "-g", "-fno-omit-frame-pointer", "-fsanitize=address,undefined")
flags += ("-fno-sanitize-recover=all",)
dir = Path(sys.argv[1])
setup.compile_cpu(dir / "libfastpe_cpu.so", dir, flags)
setup.compile_cuda_for_host(dir / "libfastpe_cuda_host.so", dir / "cuda", flags)
PY

# Python is not instrumented: preload the runtime, and ignore Python's own leaks
export ASAN_OPTIONS=detect_leaks=0
LD_PRELOAD="$(c++ -print-file-name=libasan.so) $(c++ -print-file-name=libubsan.so)" \
  python -m pytest --library "$dir/libfastpe_cpu.so" \
    --cuda-host "$dir/libfastpe_cuda_host.so" "$@"
