#!/bin/bash
# Everything that needs a GPU, in under 25 minutes; the figures go to benchmarks/results/<gpu>.json.
#   scripts/on_gpu.sh             with the project's environment active, on a machine with one CUDA device
#   scripts/on_gpu.sh --dry_run   the same steps on the CPU, as small as they get, to see that they run; writes nothing
set -euo pipefail
cd "$(dirname "$0")/.."
exec python -m benchmarks.on_gpu "$@"
