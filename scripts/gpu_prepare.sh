#!/usr/bin/env bash
# Prepare a run on a rented card (sm_90) on a machine without one:
#   scripts/gpu_prepare.sh [PYTHON]
# It writes to build/gpu: triton-cache.tar.xz with every kernel of the GPU tests and bars.py,
# libfastpe_cuda.so, and ninja, which builds missing libraries there. Triton's cache holds absolute
# paths: unpack it at /, which fills /tmp/fastpe-triton-cache, and set TRITON_CACHE_DIR to that.
# PYTHON must have the card's versions: Python 3.12, torch 2.11 and Triton 3.6, pytest, hypothesis.
# Without PYTHON the first call makes an environment in build/gpu/python (5 GB).
set -euo pipefail
cd "$(dirname "$0")/.."
arch=90 cache=/tmp/fastpe-triton-cache out=$PWD/build/gpu
mkdir -p "$out"

python=${1:-$out/python/bin/python}
if [ $# -eq 0 ] && [ ! -x "$python" ]; then
  PYENV_VERSION=${PYENV_VERSION:-$(ls ~/.pyenv/versions 2>/dev/null | grep '^3\.12' | tail -1)}
  export PYENV_VERSION
  python3.12 -m venv "$out/python.part"
  "$out/python.part/bin/pip" install --quiet 'torch==2.11.*' numpy pytest hypothesis
  mv "$out/python.part" "$out/python"
fi
"$python" -c 'import sys, torch, triton; print("Python", sys.version.split()[0], "torch",
  torch.__version__, "Triton", triton.__version__)'
export PYTHONPATH=$PWD

kernels=(--arch $arch --tests --bars --keep $cache)
rm -rf $cache
status=0
"$python" scripts/aot_check.py "${kernels[@]}" >"$out/kernels.txt" || status=$?
grep FAILED "$out/kernels.txt" || tail -1 "$out/kernels.txt"
[ $status -eq 0 ]
# Triton reads only these files of an entry
find $cache -type f ! -name '*.json' ! -name '*.cubin' -delete
"$python" scripts/gpu_cache.py stamp $cache
tar -C / -c "${cache#/}" | xz -6 -T0 >"$out/triton-cache.tar.xz"

# check as on the card: unpacked, in a process that has compiled nothing
rm -rf $cache
tar -C / -xJf "$out/triton-cache.tar.xz"
"$python" scripts/aot_check.py "${kernels[@]}" --hits | tail -3

"$python" -m pip install --quiet --upgrade --target "$out/ninja" ninja
export PYTHONPATH=$PWD:$out/ninja PATH=$PATH:$out/ninja/bin
"$python" - "$out" $arch <<'PY'
import sys
from pathlib import Path

import setup

out = Path(sys.argv[1])
setup.compile_cuda(out / "libfastpe_cuda.so", out / "objects", architectures=(sys.argv[2],))
PY
# a digest of the library's sources, which scripts/gpu_check.sh compares
cat csrc/*.h csrc/*/* setup.py | sha256sum | cut -c1-16 >"$out/sources"
ls -l "$out/triton-cache.tar.xz" "$out/libfastpe_cuda.so"
echo "$(find $cache -name '*.cubin' | wc -l) kernels in $SECONDS s"
