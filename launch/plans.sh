#!/usr/bin/env bash
# Writes the plans of docs/plans anew, each with the command that made it:
#
#     bash launch/plans.sh [NAME]...     all of them, or those whose file has NAME in its name
#
# The depths tpu and gpu compile for chips that are not here; their compilers are installed (libtpu, and JAX's CUDA plugin).
set -euo pipefail
# shellcheck source=launch/venv.sh
source "$(dirname "${BASH_SOURCE[0]}")/venv.sh"

ensure_venv dev,tpu
ensure_cuda_plugin
cd "$root"
mkdir -p docs/plans

# plan NAME ARGUMENTS...: docs/plans/NAME.md has the command and what it printed
plan() {
  local name="$1" wanted
  shift
  for wanted in "${only[@]+"${only[@]}"}"; do
    [[ "$name" == *"$wanted"* ]] && wanted="" && break
  done
  if [ "${#only[@]}" -gt 0 ] && [ -n "$wanted" ]; then
    return
  fi
  say "docs/plans/$name.md: python -m launch.plan $*"
  local file="docs/plans/$name.md" output
  output="$("$python" -m launch.plan "$@" 2>/dev/null)" || fail "the plan $name ended with an error; run its command to see it."
  {
    printf '# %s\n\n```bash\npython -m launch.plan' "$name"
    printf ' %s' "$@"
    printf '\n```\n\n```text\n%s\n```\n' "$output"
  } >"$file.new"
  mv "$file.new" "$file"
}

only=("$@")
published=configs/published
plan mixtral_8x7b-v5p-4x4x4 --config=$published/mixtral_8x7b.py:v5p-64 --topology=v5p:4x4x4 --depth=tpu
