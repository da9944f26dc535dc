#!/usr/bin/env bash
# Trains a small mixture-of-experts language model on eight emulated devices, from nothing:
#
#     bash launch/quickstart.sh [--config.train.steps=100 ...]
#
# Makes or reuses .venv in the repository root, then runs `python -m launch.train --config=configs/quickstart.py` there, with what
# follows on the command line. Paths are relative to the repository root, wherever it is called from.
set -euo pipefail
# shellcheck source=launch/venv.sh
source "$(dirname "${BASH_SOURCE[0]}")/venv.sh"

ensure_venv plots
cd "$root"
say "training: python -m launch.train --config=configs/quickstart.py $*"
exec "$python" -m launch.train --config=configs/quickstart.py "$@"
