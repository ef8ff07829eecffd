#!/usr/bin/env bash
# Builds for the GPU of this machine, tests, checks and measures, within 9 minutes: bash benchmarks/gpu_check.sh OUTDIR
# Options, which come after OUTDIR, are those of benchmarks/gpu_check.py.
set -euo pipefail
[ $# -ge 1 ] && [ "${1#-}" = "$1" ] || { echo "usage: bash benchmarks/gpu_check.sh OUTDIR [options]" >&2; exit 2; }
out=$(realpath -m -- "$1")
shift
cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."
exec "${PYTHON:-$(command -v python || command -v python3)}" -m benchmarks.gpu_check "$out" "$@"
