#!/usr/bin/env bash
# Everything that needs a GPU, in one call, offline, with the machine's own python3:
#   scripts/gpu_check.sh [-t SECONDS] [STEP ...]
# Steps: build host tests sanitize bars scaling decode; by default all, in this order, for at most
# 540 seconds together. A step that fails or runs out of time does not stop the next; the exit
# status is 1 if any did. Logs and records go to $OUT (a new folder if unset). Compiled kernels are
# kept in .gpu_cache, and go to $OUT too: put triton.txz into .gpu_cache for a machine without them.
set -uo pipefail
cd "$(dirname "$0")/.."

limit=540
if [ "${1:-}" = -t ]; then limit=$2 && shift 2; fi
[ $# -gt 0 ] || set -- build host tests sanitize bars scaling decode
OUT=${OUT:-$(mktemp -d)}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export PATH=$PATH:/usr/local/cuda/bin PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
# plug-ins of the machine may warn, and warnings are errors
export PYTEST_DISABLE_PLUGIN_AUTOLOAD=1
export TRITON_CACHE_DIR=$PWD/.gpu_cache/triton TORCHINDUCTOR_CACHE_DIR=$PWD/.gpu_cache/inductor
mkdir -p "$TRITON_CACHE_DIR" "$OUT"
if [ -f .gpu_cache/triton.txz ] && [ -z "$(ls "$TRITON_CACHE_DIR")" ]; then
  tar -xJf .gpu_cache/triton.txz -C .gpu_cache
fi

python3 - <<'PY' | tee "$work/machine"
import importlib.metadata, os, platform, subprocess
import torch

query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total,compute_cap"]
try:
    found = subprocess.run([*query, "--format=csv,noheader"], capture_output=True, text=True)
    print("card:", found.stdout.strip())
except OSError as error:
    print("card: none,", error)
versions = {name: importlib.metadata.version(name) for name in ("torch", "triton", "numpy")}
print("versions:", versions, "CUDA", torch.version.cuda, "Python", platform.python_version())
print("CUDA in torch:", torch.cuda.is_available(), "|", os.cpu_count(), "CPUs")
PY
nvcc --version 2>/dev/null | tail -2 | head -1
echo "sources: $(cat $(find fastpe csrc -name '*.py' -o -name '*.h' -o -name '*.c*' | sort) setup.py \
  | sha256sum | cut -c1-12)"

arch=$(sed -n 's/^card:.*, \([0-9]*\)\.\([0-9]\)$/\1\2/p' "$work/machine" | head -1)

failed=0
summary=()
if ! grep -q 'CUDA in torch: True' "$work/machine"; then
  summary+=("gpu           -    none: tests that need one are skipped")
  failed=1
fi

# run NAME SECONDS COMMAND...: a step, with a time of its own and no more than what is left
run() {
  local name=$1 most=$2 left=$((limit - SECONDS)) start=$SECONDS status note=ok
  shift 2
  if [ "$left" -lt 5 ]; then
    summary+=("$(printf '%-10s %4s  not run: the time is over' "$name" -)")
    failed=1
    return 1
  fi
  [ "$most" -lt "$left" ] || most=$left
  timeout -k 5 "$most" "$@" >"$work/$name.log" 2>&1
  status=$?
  [ $status -eq 0 ] || note="failed, status $status"
  [ "$name $status" != "bars 3" ] || note="failed: not every bar is met"
  [ $status -ne 124 ] && [ $status -ne 137 ] || note="stopped after $most s"
  [ $status -eq 0 ] || failed=1
  { echo "=== $name: $* ($note)" && cat "$work/$name.log"; } >>"$OUT/gpu_check.log"
  summary+=("$(printf '%-10s %4d s  %s' "$name" $((SECONDS - start)) "$note")")
  echo "$name: $note, $((SECONDS - start)) s"
  return $status
}

test_python="python3 -m pytest -m gpu --tb=short"

build() {
  # by the functions of setup.py: both at once, for the card that is here alone, whatever the
  # version of setuptools; what can be built is tested, and the reason for the rest is in the log
  run build 270 python3 - "${arch:-90}" <<'PY'
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import setup

jobs = {"cpu": (setup.compile_cpu, {})}
if hasattr(setup, "compile_cuda"):
    jobs["cuda"] = setup.compile_cuda, {"architectures": (sys.argv[1],)}
else:
    print("setup.py has no compile_cuda")


def build(name):
    compile_it, options = jobs[name]
    try:
        compile_it(Path(f"fastpe/libfastpe_{name}.so"), Path("build/gpu_check") / name, **options)
    except Exception as error:
        return f"{name}: {error}"
    return None


with ThreadPoolExecutor() as pool:
    errors = [error for error in pool.map(build, jobs) if error]
sys.exit("\n".join(errors) or 0)
PY
  python3 -c 'import fastpe; fastpe.show_config()' 2>&1 | tee -a "$OUT/gpu_check.log"
}

host() {
  run host 60 $test_python -s -k host_time tests/test_gpu_runtime.py
  grep 'host time' "$work/host.log"
}

tests() {
  local workers=
  python3 -c 'import xdist' 2>/dev/null && workers="-p xdist.plugin -n 6"
  run tests 270 $test_python -k "not host_time" $workers -rfE --durations=6 --maxfail=60
  grep -aE '^(FAILED|ERROR)|(passed|failed).* in ' "$work/tests.log" | cut -c1-160 | tail -25
}

sanitize() {
  local tool
  # each allocation is one of the driver's: what is out of bounds is nobody else's
  export PYTORCH_NO_CUDA_MEMORY_CACHING=1
  for tool in memcheck racecheck; do
    run "$tool" 75 compute-sanitizer --tool "$tool" --error-exitcode 9 --print-limit 20 \
      $test_python -k sanitize tests/test_gpu_runtime.py
    grep -aE '=========.*(ERROR SUMMARY|RACECHECK SUMMARY|Invalid|Error:)|passed|failed' \
      "$work/$tool.log" | cut -c1-160 | tail -5
  done
  unset PYTORCH_NO_CUDA_MEMORY_CACHING
}

bars() {
  run bars 170 python3 benchmarks/bars.py --device cuda --out "$OUT"
}

scaling() {
  run scaling 150 python3 benchmarks/seq_scaling.py --device cuda --dtype bfloat16 --batch 4 \
    --heads 16 --min-len 512 --max-len 32768 --quick --max-seconds 2 --out "$OUT"
}

decode() {
  run decode 90 python3 benchmarks/decode.py --device cuda --dtype bfloat16 --seconds 0.3 \
    --levels attention --out "$OUT"
}

for step in "$@"; do
  case $step in
    build | host | tests | sanitize | bars | scaling | decode) $step ;;
    *) echo "no step $step: build host tests sanitize bars scaling decode" >&2 && exit 2 ;;
  esac
done

if [ -n "$(ls "$TRITON_CACHE_DIR")" ] && command -v xz >/dev/null; then
  timeout 60 tar -C .gpu_cache -c triton 2>/dev/null | xz -2 -T0 >"$OUT/triton.txz"
  # what is over 16 MiB does not travel
  [ "$(stat -c %s "$OUT/triton.txz")" -lt 16777216 ] || rm "$OUT/triton.txz"
fi

# the end of the output is what is read: what failed, the bars, the steps
for log in "$work"/*.log; do
  name=$(basename "$log" .log)
  printf '%s\n' "${summary[@]}" | grep -qE "^$name .*(failed|stopped)" || continue
  [ "$name" = bars ] || { echo "--- end of $name" && tail -n 12 "$log" | cut -c1-200; }
done
[ ! -f "$work/bars.log" ] || { echo "--- bars" && grep -aE '^(\||- |copy:|error)' "$work/bars.log"; }
echo "--- steps, $SECONDS s; records in $OUT"
printf '%s\n' "${summary[@]}"
exit $failed
