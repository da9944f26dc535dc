#!/usr/bin/env bash
# Runs the tests in .venv (made or reused), on eight emulated devices:
#
#     bash launch/test.sh [fast] [pytest arguments]   everything but the slow tier: minutes
#     bash launch/test.sh slow [pytest arguments]     the slow tier: Hugging Face's models as oracles (needs torch), programs compiled
#                                                     for TPUs that are not there (needs libtpu)
#     bash launch/test.sh all [pytest arguments]      both
set -euo pipefail
# shellcheck source=launch/venv.sh
source "$(dirname "${BASH_SOURCE[0]}")/venv.sh"

tier=fast
case "${1:-}" in
  fast | slow | all)
    tier="$1"
    shift
    ;;
esac

case "$tier" in
  fast) extras=dev select=(-m "not slow") ;;
  slow) extras=dev,hf,tpu select=(-m slow) ;;
  all) extras=dev,hf,tpu select=() ;;
esac

ensure_venv "$extras"
cd "$root"
say "testing ($tier): python -m pytest -n auto ${select[*]+${select[*]}} $*"
exec "$python" -m pytest -n auto ${select[@]+"${select[@]}"} "$@"
