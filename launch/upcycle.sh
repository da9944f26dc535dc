#!/usr/bin/env bash
# Does a dense model's training pay for a mixture of experts? Small runs on one device, for each seed:
#
#     SEEDS="0 1 2" STEPS=1000 bash launch/upcycle.sh [--config.train.log_every=100 ...]
#
#     dense          STEPS steps of the dense model of configs/ablations/small.py, 192 hidden units a layer
#     copy, drop     from there STEPS more with 8 experts of 192 units, 2 a token: copies of the FFN, or half of each drawn anew
#     split          from there STEPS more with 8 experts of 96 units, 2 a token, which cost what the dense FFN does
#     *_full         the same at the dense model's peak learning rate; the former have a third of it
#     scratch        the experts of copy and drop, and scratch_split those of split, from random numbers: 2 STEPS
#
# Ends with the tables and the pictures of docs/upcycling.md. What is finished is not run again.
set -euo pipefail
# shellcheck source=launch/venv.sh
source "$(dirname "${BASH_SOURCE[0]}")/venv.sh"

ensure_venv plots
cd "$root"
steps="${STEPS:-1000}" seeds="${SEEDS:-0}" runs="${RUNS:-runs/upcycle}"
common=(--config=configs/ablations/small.py --config.mesh.data=1 --config.train.eval_every=100)

# train NAME STEPS SEED [flags]
train() {
  local name="$1" count="$2" seed="$3"
  shift 3
  say "$name, seed $seed: $count steps"
  "$python" -m launch.train "${common[@]}" --config.workdir="$runs/$name/seed_$seed" --config.train.steps="$count" --config.train.seed="$seed" "$@"
}

# upcycle NAME METHOD SEED [flags]: step 0 of NAME's run, then the run
upcycle() {
  local name="$1" method="$2" seed="$3" run="$runs/$1/seed_$3"
  shift 3
  if [ ! -e "$run/config.json" ]; then
    "$python" -m launch.convert upcycle --workdir="$runs/dense/seed_$seed" --out="$run" --method="$method" "${common[@]}" \
      --config.train.steps="$steps" --config.train.seed="$seed" "$@"
  fi
  train "$name" "$steps" "$seed" "$@"
}

# plot NAMES... SCRATCH: the named runs after the dense one, against SCRATCH
plot() {
  local after=("${@:1:$#-1}") scratch="${*: -1}" names curves=""
  names="$(IFS=,; printf '%s' "$*")"
  for name in "${after[@]}"; do curves+="$runs/dense/*+$runs/$name/*,"; done
  "$python" -m launch.plot_loss --out="$runs/$scratch.png" --skip=200 --names="$names" --runs="$curves$runs/$scratch/*"
}

for seed in $seeds; do
  train dense "$steps" "$seed" --config.model.moe.num_experts=0 "$@"
  for method in copy drop split; do
    width=192
    [ "$method" = split ] && width=96
    upcycle "$method" "$method" "$seed" --config.model.moe.d_ff="$width" --config.optimizer.learning_rate=1e-3 "$@"
    upcycle "${method}_full" "$method" "$seed" --config.model.moe.d_ff="$width" "$@"
  done
  train scratch "$((2 * steps))" "$seed" --config.model.moe.d_ff=192 "$@"
  train scratch_split "$((2 * steps))" "$seed" --config.model.moe.d_ff=96 "$@"
done
plot copy drop copy_full drop_full scratch
plot split split_full scratch_split
