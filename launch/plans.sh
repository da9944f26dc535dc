#!/usr/bin/env bash
# Writes the plans of docs/plans anew, each with the command that made it:
#
#     bash launch/plans.sh [NAME]...     all of them, or those whose file has NAME in its name
#
# At depth jaxpr, so that nothing is compiled: a minute or two each. docs/plans/memory.md has what the compilers say of some of them.
set -euo pipefail
# shellcheck source=launch/venv.sh
source "$(dirname "${BASH_SOURCE[0]}")/venv.sh"

ensure_venv ""
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
  # shellcheck disable=SC2016 # Markdown's own backticks
  {
    printf '# %s\n\n```bash\npython -m launch.plan' "$name"
    printf ' %s' "$@"
    printf '\n```\n\n```text\n%s\n```\n' "$output"
  } >"$file.new"
  mv "$file.new" "$file"
}

only=("$@")
published=configs/published
again=model.moe.remat_exchange=True # the exchange is repeated in the backward pass, and what arrived is not kept
plan mixtral_8x7b-v5p-4x4x4 --config=$published/mixtral_8x7b.py:v5p-64 --topology=v5p:4x4x4
plan deepseek_v3-v5p-8x8x8 --topology=v5p:8x8x8 \
  --config=$published/deepseek_v3.py:v5p-64,mesh.fsdp=16,mesh.expert=32,data.batch_size=2048,train.accumulation=4,$again
plan deepseek_v3-h100-32x8 --topology=h100:32x8 \
  --config=$published/deepseek_v3.py:h100-64,mesh.fsdp=32,mesh.expert=8,data.batch_size=256,$again
plan deepseek_v3-h100-32x8-short --topology=h100:32x8 \
  --config=$published/deepseek_v3.py:h100-64,mesh.fsdp=32,mesh.expert=8,data.batch_size=256,data.seq_len=2048,$again
plan qwen3_30b_a3b-v6e-4x4 --topology=v6e:4x4 \
  --config=$published/qwen3_30b_a3b.py:v5p-64,mesh.fsdp=2,mesh.expert=8,data.batch_size=16,$again
plan qwen3_30b_a3b-v6e-8x8 --topology=v6e:8x8 \
  --config=$published/qwen3_30b_a3b.py:v5p-64,data.batch_size=64,$again
plan gpt_oss_120b-h100-8 --topology=h100:8 \
  --config=$published/gpt_oss_120b.py:h100-64,mesh.fsdp=1,mesh.expert=8,data.batch_size=8,$again
plan gpt_oss_120b-h100-8x8 --topology=h100:8x8 --config=$published/gpt_oss_120b.py:h100-64,data.batch_size=64,$again

say "docs/plans/published.md"
JAX_PLATFORMS=cpu "$python" - >docs/plans/published.md.new <<'PY'
import runpy

from moe_jax.config import from_dict
from moe_jax.plan import published, traffic


def read(config):
    file, _, argument = config.partition(":")
    return from_dict(runpy.run_path(file)["get_config"](argument))


print(published.section(read, traffic.collectives).rstrip())
PY
mv docs/plans/published.md.new docs/plans/published.md
