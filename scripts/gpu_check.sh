#!/usr/bin/env bash
# Run all checks that need a GPU, offline, with the machine's own python3, in two calls:
#   scripts/gpu_check.sh first           the most important, less than 330 seconds
#   scripts/gpu_check.sh second          the rest, less than 330 seconds, on the same machine
#   scripts/gpu_check.sh [-x N] STEP...  some steps; -x gives each N times its seconds
#   scripts/gpu_check.sh --plan          print the steps and their seconds
#   scripts/gpu_check.sh --dry first second    no GPU: check that every step starts and finds work
# A step that fails or runs out of time does not stop the next; the exit status is then 1.
# Writes the log and records, at most eight files, to $OUT (a new folder if unset) as it goes.
# Uses the compiled kernels and libraries that scripts/gpu_prepare.sh put into build/gpu.
set -uo pipefail
cd "$(dirname "$0")/.."

# call, step, seconds, purpose; a step may also use the seconds that earlier steps left over
plan='
first   machine      12  versions, the card and its clocks, carried files
first   smoke        30  Triton: four encodings, two dtypes, a process each
first   scan         75  the bars of the scan (benchmarks/bars.py)
first   tiles        50  tiles of each kernel, compared, then timed (benchmarks/tiles.py)
first   triton       85  the GPU tests except those of the CUDA library
first   smoke_cuda   12  the CUDA library: four encodings, two dtypes, a process each
first   cuda         48  the GPU tests of the CUDA library
second  again        40  the failures of the first call, with synchronous launches
second  sanitize     55  memcheck and racecheck of six small cases
second  ncu          40  counters of three forward kernels
second  crossover    70  the other bars: softmax at short lengths, SPE, the widest heads
second  large        25  tensors of more than 2^31 numbers, alone on the card
second  host         12  host time of a call
second  decode       32  one token at a time
second  scaling      38  time and memory as sequences grow
'
# field VALUE GIVEN WANTED: column WANTED of rows whose column GIVEN is VALUE
field() { awk -v value="$1" -v given="$2" -v wanted="$3" '$given == value { print $wanted }' <<<"$plan"; }

dry='' factor=1
while :; do
  case ${1:-} in
    --plan) printf '%s' "$plan" && exit ;;
    -h | --help) sed -n '2,/^[^#]/s/^# //p' "$0" && exit ;;
    --dry) dry=yes && shift ;;
    -x) factor=$2 && shift 2 ;;
    *) break ;;
  esac
done
steps=()
for name in "${@:-first}"; do
  found=$(field "$name" 1 2)
  [ -n "$found" ] || found=$(field "$name" 2 2)
  if [ -z "$found" ]; then
    echo "no step $name: first, second, or one of" $(awk '{ print $2 }' <<<"$plan") >&2
    exit 2
  fi
  mapfile -t -O ${#steps[@]} steps <<<"$found"
done

OUT=${OUT:-$(mktemp -d)}
log=$OUT/gpu_check.log
mkdir -p "$OUT" && : >>"$log"
export PATH=$PATH:/usr/local/cuda/bin:$PWD/build/gpu/ninja/bin PYTHONUNBUFFERED=1
# scripts/gpu_prepare.sh carries ninja, which builds the libraries
export PYTHONPATH=$PWD:$PWD/build/gpu/ninja${PYTHONPATH:+:$PYTHONPATH}
# the machine's pytest plugins may warn, and warnings are errors
export PYTEST_DISABLE_PLUGIN_AUTOLOAD=1
# Triton keeps absolute paths, so the folder has the same name as in scripts/gpu_prepare.sh
export TRITON_CACHE_DIR=/tmp/fastpe-triton-cache TORCHINDUCTOR_CACHE_DIR=/tmp/fastpe-inductor-cache
# files from the first call for the second
left=/tmp/fastpe-gpu-check
if [ -n "$dry" ]; then
  left=$(mktemp -d)
  trap 'rm -rf "$left"' EXIT
  TRITON_CACHE_DIR=$left/triton TORCHINDUCTOR_CACHE_DIR=$left/inductor
  factor=$((factor * 20))
  one=tests/gpu/test_gpu_runtime.py::test_new_memory_is_nan
  echo "{\"test\": \"$one\", \"outcome\": \"failed\"}" >"$left/tests.jsonl"
elif ! python3 -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
  echo "torch finds no GPU here; --dry runs without one" >&2
  exit 1
fi
mkdir -p "$TRITON_CACHE_DIR" "$left"

have() { python3 -c "import $1" 2>/dev/null; }
kernels() { find "$TRITON_CACHE_DIR" -name '*.cubin' 2>/dev/null | wc -l; }
# the current step's part of the log
said() { tail -c "+$((at + 1))" "$log"; }

# run COMMAND...: run it until the step's deadline
run() {
  local most=$((deadline - SECONDS)) status
  [ "$most" -ge 2 ] || { echo "=== $step, no time for: $*" >>"$log" && return 124; }
  echo "=== $step: $*" >>"$log"
  timeout -k 5 "$most" "$@" >>"$log" 2>&1
  status=$?
  [ $status -eq 0 ] || echo "=== $step: status $status" >>"$log"
  return $status
}

# tests WORKERS ARGUMENT...: run pytest under "${prefix[@]}"; without xdist in one process
prefix=()
tests() {
  local workers=$1 options=(-o addopts= -q --strict-markers -m gpu --tb=short -rfE)
  shift
  if [ "$workers" -gt 0 ] && have xdist; then
    [ -z "$dry" ] || workers=1
    options+=(-p xdist.plugin -n "$workers" --dist load --maxschedchunk 2)
    # each test may crash its worker
    options+=(--max-worker-restart 600)
  fi
  # a test that hangs kills its worker
  have pytest_timeout && options+=(-p pytest_timeout --timeout 60 --timeout-method thread)
  run "${prefix[@]}" python3 -m pytest "${options[@]}" --record "$OUT/tests.jsonl" "$@" || return
  # without a GPU all tests are skipped
  [ -n "$dry" ] || said | grep -q '[0-9] passed' || return 6
}
mapfile -t files < <(grep -rlE --include='test_*.py' 'mark\.gpu|gpu_only' tests | sort)
apart="(host_time or two_to_the_31)"

# benchmark NAME ARGUMENT...: run it; --dry uses small sizes on the CPU
size=(--device cuda --dtype bfloat16 --batch 4 --heads 16)
[ -z "$dry" ] || size=(--device cpu --dtype float32 --batch 1 --heads 1 --threads 1)
benchmark() { run "${prefix[@]}" python3 "benchmarks/$1.py" "${@:2}"; }

build=
libraries() {
  local name sources missing=() carried=()
  sources=$(cat csrc/*.h csrc/*/* setup.py | sha256sum | cut -c1-16)
  mkdir -p build/gpu
  for name in cuda cpu; do
    if [ -f "build/gpu/libfastpe_$name.so" ] && [ "$(cat build/gpu/sources)" = "$sources" ]; then
      cp "build/gpu/libfastpe_$name.so" fastpe/ && carried+=("$name")
    else
      missing+=("$name")
    fi
  done 2>/dev/null
  echo "libraries: carried: ${carried[*]:-none}; being built: ${missing[*]:-none}" | tee -a "$log"
  [ ${#missing[@]} -gt 0 ] || return
  # build while the first steps run
  timeout 270 python3 - "$sources" "${missing[@]}" >>"$log" 2>&1 <<'PY' &
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

import setup


def build(name):
    target = Path(f"build/gpu/libfastpe_{name}.so")
    options = {}
    if name == "cuda":
        options["architectures"] = ("{}{}".format(*torch.cuda.get_device_capability()),)
    try:
        getattr(setup, f"compile_{name}")(target, Path("build/gpu_objects") / name, **options)
    except Exception as error:
        return f"=== build, {name}: {error}"
    # replace the file at once: other processes load it
    part = Path("fastpe") / f"{target.name}.part"
    part.write_bytes(target.read_bytes())
    part.replace(part.with_suffix(""))
    return None


sources, *names = sys.argv[1:]
with ThreadPoolExecutor() as pool:
    errors = list(filter(None, pool.map(build, names)))
if errors:
    sys.exit("\n".join(errors))
Path("build/gpu/sources").write_text(sources + "\n")
print("=== build: done")
PY
  build=$!
}

# built: wait for the libraries
built() {
  while [ -n "$build" ] && kill -0 "$build" 2>/dev/null; do
    [ $SECONDS -lt $((deadline - 2)) ] || { echo "=== $step: no library yet" >>"$log" && return 124; }
    sleep 0.2
  done
  [ -z "$build" ] || { wait "$build" && build=''; } && return
  echo "=== $step: the libraries were not built" >>"$log"
  return 1
}

machine() {
  [ -n "$dry" ] || rm -f "$left/tests.jsonl"
  run python3 - <<'PY'
import hashlib
import importlib.metadata
import importlib.util
import os
import platform
import subprocess
from pathlib import Path

import torch

FIELDS = "name,driver_version,memory.total,compute_cap,clocks.sm,clocks.mem,clocks.max.sm"
FIELDS += ",clocks.max.mem,power.draw,temperature.gpu"
PACKAGES = "torch", "triton", "numpy", "pytest", "pytest-xdist", "pytest-timeout", "transformers"


def version(name):
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "missing"


try:
    query = ["nvidia-smi", f"--query-gpu={FIELDS}", "--format=csv,noheader"]
    card = subprocess.run(query, capture_output=True, text=True).stdout.strip()
except OSError as error:
    card = f"none, {error}"
print(f"card: {card} ({FIELDS})")
print("versions: Python", platform.python_version(), "| CUDA of torch", torch.version.cuda, end=" | ")
print(", ".join(f"{name} {version(name)}" for name in PACKAGES), "|", os.cpu_count(), "CPUs")
for name, why in (("xdist", "tests run in one process"), ("pytest_timeout", "a test may hang")):
    if importlib.util.find_spec(name) is None:
        print(f"no {name}: {why}")
# the cache finds only kernels from the same Triton library
triton = importlib.util.find_spec("triton")
for path in sorted(Path(triton.origin).parent.glob("_C/libtriton*.so")) if triton else ():
    print(f"sha256 of {path.name}: {hashlib.sha256(path.read_bytes()).hexdigest()}")
PY
}

smoke() {
  local arguments=(--device cuda --backends "${1:-triton}")
  [ -z "$dry" ] || arguments=(--device cpu --backends cpu --dtypes float32 --length 20 --jobs 2)
  benchmark smoke "${arguments[@]}" --out "$OUT"
}

smoke_cuda() { built && smoke cuda; }

bars() {
  local arguments=(--seconds 0.2)
  [ -z "$dry" ] || arguments=(--bar-lengths 32 48 --widths 16 16 32 --head-dim 16 --lengths 32
    --seconds 0.01 --gate 32 --copy 0.001)
  benchmark bars "${size[@]}" --parts "$@" "${arguments[@]}" --out "$OUT"
  local status=$?
  # --dry sizes meet no bar
  [ -z "$dry" ] || [ $status -ne 3 ] || status=0
  return $status
}

scan() { bars scan; }

crossover() { bars crossover spe cliff; }

tiles() {
  local arguments=(--seconds $((deadline - SECONDS - 3))) prefix=()
  if [ -n "$dry" ]; then
    prefix=(env TRITON_INTERPRET=1)
    arguments=(--length 16 --head-dims 16 --roles forward --most 1 --jobs 1 --seconds 500)
  fi
  benchmark tiles "${size[@]}" "${arguments[@]}" --out "$OUT"
}

# tests_of WHICH: record failures for step `again` too
tests_of() { tests 12 --record "$left/tests.jsonl" -k "$1 and not $apart" --maxfail 60 "${files[@]}"; }

triton() { tests_of "not cuda"; }

cuda() { built && tests_of cuda; }

again() {
  local failed
  built
  mapfile -t failed < <(python3 - "$left/tests.jsonl" <<'PY'
import json
import pathlib
import sys

path = pathlib.Path(sys.argv[1])
rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
for name in list(dict.fromkeys(row["test"] for row in rows if row["outcome"] == "failed"))[:30]:
    print(name)
PY
  )
  if [ ${#failed[@]} -eq 0 ]; then
    echo "nothing is known to have failed: no failure in the first call, or another machine" >>"$log"
    return
  fi
  CUDA_LAUNCH_BLOCKING=1 tests 4 --maxfail 30 "${failed[@]}"
}

sanitize() {
  local tool job jobs=() status=0 prefix=()
  local six="((none and bfloat16) or (rope and not ropepool and float32) or (sinespe and bfloat16))"
  built
  # both tools at once, since nothing is timed
  for tool in memcheck racecheck; do
    [ -n "$dry" ] || prefix=(compute-sanitizer --tool "$tool" --error-exitcode 9 --print-limit 20)
    # one driver allocation for each tensor, so out-of-bounds accesses hit no other tensor
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 tests 0 -k "sanitize and $six" "${files[@]}" &
    jobs+=($!)
  done
  for job in "${jobs[@]}"; do wait "$job" || status=$?; done
  return $status
}

ncu() {
  local case status=0 length=8192 prefix=(ncu --clock-control none --profile-from-start off)
  prefix+=(-k regex:forward_kernel -c 1 --section SpeedOfLight --section LaunchStats)
  prefix+=(--section Occupancy --section SchedulerStats --section WarpStateStats)
  prefix+=(--section MemoryWorkloadAnalysis)
  local cases=("fastpe --head-dim 64" "fastpe-rope --head-dim 64" "fastpe --head-dim 128")
  [ -z "$dry" ] || prefix=() length=32 cases=("${cases[1]}")
  for case in "${cases[@]}"; do
    # shellcheck disable=SC2086 # words
    benchmark one_call $case --length "$length" "${size[@]}" || status=$?
  done
  ! said | grep -q "No kernels were profiled" || status=1
  return $status
}

large() { built && tests 0 -k two_to_the_31 "${files[@]}"; }

host() { built && tests 0 -s -k host_time "${files[@]}"; }

decode() {
  local arguments=(--contexts 1024 16384 --seconds 0.2) status
  built
  [ -z "$dry" ] || arguments=(--contexts 16 --seconds 0.01 --head-dim 16)
  benchmark decode "${size[@]}" --levels attention "${arguments[@]}" --out "$OUT"
  status=$?
  rm -f "$OUT/decode.png"
  return $status
}

scaling() {
  local arguments=(--min-len 2048 --max-len 32768 --max-seconds 2
    --cases fastpe fastpe-rope fastpe-sinespe fastpe-fstripe-pooled sdpa-cudnn) status
  [ -z "$dry" ] || arguments=(--min-len 32 --max-len 32 --head-dim 16 --cases fastpe)
  benchmark seq_scaling "${size[@]}" --quick "${arguments[@]}" --out "$OUT"
  status=$?
  rm -f "$OUT/seq_scaling.png"
  return $status
}

if [ -z "$dry" ]; then
  if [ -f build/gpu/triton-cache.tar.xz ] && [ "$(kernels)" = 0 ]; then
    tar -C / -xJf build/gpu/triton-cache.tar.xz
  fi
  libraries
fi
carried=$(kernels)
failed=0 deadline=$SECONDS summary=()
for step in "${steps[@]}"; do
  deadline=$((deadline + factor * $(field "$step" 2 3)))
  start=$SECONDS before=$(kernels) at=$(stat -c %s "$log")
  $step
  status=$?
  case $status in
    0) note=ok ;;
    5) note="failed: no test was found" ;;
    6) note="failed: every test was skipped" ;;
    124 | 137) note="stopped: its time was over" ;;
    *) note="failed, status $status" ;;
  esac
  case "$step $status" in "scan 3" | "crossover 3") note="failed: not every bar is met" ;; esac
  [ $status -eq 0 ] || failed=1
  compiled=$(($(kernels) - before))
  [ $compiled -eq 0 ] || note="$note; $compiled Triton kernels were compiled"
  summary+=("$(printf '%-11s %4d s  %s' "$step" $((SECONDS - start)) "$note")")
  echo "--- ${summary[-1]}"
  # print the most telling lines
  said | grep -aE -e '^(\||- |no |copy:|card:|versions:|sha256|FAILED|ERROR|host time|.*error: )' \
    -e 'SUMMARY|cases are right|(passed|failed|skipped).* in |candidates failed' | cut -c1-240 | tail -n 40
  # limit each step's part of the log
  [ "$(stat -c %s "$log")" -le $((at + 1900000)) ] || truncate -s $((at + 1900000)) "$log"
done
[ -z "$build" ] || kill "$build" 2>/dev/null
{
  echo "--- $SECONDS s; records in $OUT"
  echo "Triton kernels: $carried were here, $(($(kernels) - carried)) were compiled"
  [ -n "$dry" ] || python3 scripts/gpu_cache.py report "$TRITON_CACHE_DIR"
  printf '%s\n' "${summary[@]}"
} | tee -a "$log"
exit $failed
