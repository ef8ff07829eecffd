#!/usr/bin/env bash
# Tests and measures on a machine with a GPU, within 330 seconds: bash benchmarks/gpu_check.sh OUTDIR --plan first
set -euo pipefail
[ $# -ge 1 ] && [ "${1#-}" = "$1" ] || { echo "usage: bash benchmarks/gpu_check.sh OUTDIR [options]" >&2; exit 2; }
out=$(realpath -m -- "$1") && shift
cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."
exec "${PYTHON:-python3}" -m benchmarks.gpu.check "$out" "$@"
