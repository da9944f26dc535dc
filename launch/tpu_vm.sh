#!/usr/bin/env bash
# A Cloud TPU slice by a queued resource, and the same command on all its workers:
#
#     bash launch/tpu_vm.sh create                               # asks for the slice and returns; `status` says when it is there
#     bash launch/tpu_vm.sh setup                                # the code and its environment on every worker
#     bash launch/tpu_vm.sh train --config=configs/quickstart.py --config.workdir=/mnt/runs/one --config.mesh.emulate=0 --config.mesh.data=-1
#     bash launch/tpu_vm.sh status
#     bash launch/tpu_vm.sh delete
#
# Needs gcloud, logged in, with a project. The run folder must be on a disk that all workers see (a Filestore; not a bucket, as a
# checkpoint is finished by a rename).
# A train that ends because the slice was preempted is started again by the same command; spot slices must be created again first.
#
# Values to edit, or to give in the environment:
name="${TPU_NAME:-moe-jax}"
zone="${TPU_ZONE:-us-east5-b}"
type="${TPU_TYPE:-v6e-16}"
# The rest. SPOT=0 asks for a slice that is not taken away. DRY_RUN=1 prints the commands in place of running them.
version="${TPU_VERSION:-v2-alpha-tpuv6e}" # of the VM's image: v2-alpha-tpuv5-lite for v5e, v2-alpha-tpuv5 for v5p
repository="${REPOSITORY:-$(git -C "$(dirname "${BASH_SOURCE[0]}")" remote get-url origin 2>/dev/null || echo URL_OF_THIS_REPOSITORY)}"
set -euo pipefail

run() {
  if [ -n "${DRY_RUN:-}" ]; then
    printf '%q ' "$@"
    echo
  else
    "$@"
  fi
}

on_all_workers() { run gcloud compute tpus tpu-vm ssh "$name" --zone="$zone" --worker=all --command="$1"; }

action="${1:-}"
[ "$#" -gt 0 ] && shift
case "$action" in
  create)
    spot=()
    [ "${SPOT:-1}" = 1 ] && spot=(--spot)
    run gcloud compute tpus queued-resources create "$name" --node-id="$name" --zone="$zone" --accelerator-type="$type" \
      --runtime-version="$version" "${spot[@]}"
    ;;
  setup)
    on_all_workers "test -d moe_jax || git clone $(printf '%q' "$repository") moe_jax; cd moe_jax && git pull --ff-only &&
      python3 -m venv .venv && .venv/bin/python -m pip install --quiet --editable '.[tpu]'"
    ;;
  train)
    # JAX asks the slice's metadata which worker this is
    on_all_workers "cd moe_jax && .venv/bin/python -m launch.train --processes=tpu$(printf ' %q' "$@")"
    ;;
  status)
    run gcloud compute tpus queued-resources describe "$name" --zone="$zone" --format='value(state.state)'
    ;;
  delete)
    run gcloud compute tpus queued-resources delete "$name" --zone="$zone" --force --quiet
    ;;
  *)
    echo "error: '$action' is none of create, setup, train, status, delete; the head of this file says what they do." >&2
    exit 2
    ;;
esac
