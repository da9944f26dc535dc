#!/usr/bin/env bash
# Runs the tests in .venv (made or reused), on eight emulated devices:
#
#     bash launch/test.sh [fast] [pytest arguments]   everything but the slower tiers: minutes
#     bash launch/test.sh slow [pytest arguments]     the slow tier: Hugging Face's models as oracles (needs torch), programs compiled
#                                                     for TPUs and GPUs that are not there (needs libtpu, JAX's CUDA plugin), every
#                                                     notebook, the report in Chromium (of the system; as root on Debian it is
#                                                     installed)
#     bash launch/test.sh matrix [pytest arguments]   every exchange x mesh x wire x dispatch, every router on every mesh, every published model
#                                                     decoding and over eight devices: the rest of the products whose corners the two
#                                                     tiers above run; published models compiled for 64 chips, minutes each
#                                                     (docs/plans/memory.md)
#     bash launch/test.sh faults [pytest arguments]   what a run survives: fifty kills at random moments, checkpoints from every mesh to
#                                                     every other (docs/reliability.md); prints its figures
#     bash launch/test.sh all [pytest arguments]      all of them
set -euo pipefail
# shellcheck source=launch/venv.sh
source "$(dirname "${BASH_SOURCE[0]}")/venv.sh"

tier=fast
case "${1:-}" in
  fast | slow | matrix | faults | all)
    tier="$1"
    shift
    ;;
esac

case "$tier" in
  fast) extras=dev select=(-m "not slow and not matrix and not faults") ;;
  slow) extras=dev,hf,tpu,corpus select=(-m "slow and not matrix and not faults") ;;
  matrix) extras=dev,hf,tpu select=(-m matrix) ;;
  faults) extras=dev select=(-m faults) ;;
  all) extras=dev,hf,tpu,corpus select=() ;;
esac

ensure_venv "$extras"
if [[ "$tier" == slow || "$tier" == all ]] && ! ensure_browser; then
  say "no Chromium with its chromedriver was found: the report's tests in a browser are left out; install both to run them"
  select=(-m "${select[1]:+${select[1]} and }not browser")
fi
if [[ "$tier" == slow || "$tier" == matrix || "$tier" == all ]]; then
  ensure_gpu_compiler
  export PYTHONPATH="$gpu_compiler${PYTHONPATH:+:$PYTHONPATH}"
fi
cd "$root"
say "testing ($tier): python -m pytest -n auto ${select[*]+${select[*]}} $*"
exec "$python" -m pytest -n auto ${select[@]+"${select[@]}"} "$@"
