#!/usr/bin/env bash
# Train on TPUs of a cloud, or other machines: `./launch_tpu.sh --help`. The same as
# `gamayun launch`, but it needs nothing installed: only Python 3.11 or newer, and gcloud.
set -euo pipefail

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
export PYTHONPATH="$ROOT${PYTHONPATH:+:$PYTHONPATH}"
for python in python3 "$ROOT/.venv/bin/python" python3.{14,13,12,11}; do
  if "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2> /dev/null; then
    exec "$python" -m gamayun_jax.launch ${1:+"$1" --checkout "$ROOT"} "${@:2}"
  fi
done
echo "launch: no Python 3.11 or newer is on the PATH: install one" >&2
exit 2
