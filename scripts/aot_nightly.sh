#!/usr/bin/env bash
# Compile all kernels of the GPU tests and benchmarks for every card with both supported versions of
# Triton. Takes about an hour on 16 cores. CI compiles a sample (.ci/run).
set -uo pipefail
cd "$(dirname "$0")/.."
cards=(--arch 80 86 89 90 100 120) failed=0
for command in "" "scripts/with_triton.py 3.6.0"; do
  python $command scripts/aot_check.py "${cards[@]}" || failed=1
  python $command scripts/aot_check.py "${cards[@]}" --tests --bars || failed=1
done
exit $failed
