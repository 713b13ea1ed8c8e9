#!/usr/bin/env bash
# Compare models (run folders, checkpoints, Hugging Face folders) on all embedded tasks.
#   experiments/compare/run.sh MODEL MODEL... [--languages ru en ...] [--limit N]
set -euo pipefail
exec gamayun compare "$@" --tasks all --out "${OUT:-runs/compare}"
