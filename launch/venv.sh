# shellcheck shell=bash
# Sourced by the other scripts: `ensure_venv EXTRAS` makes or reuses .venv in the repository root and installs the project there.

root="$(CDPATH="" cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
venv="$root/.venv"
python="$venv/bin/python" # what the scripts run

say() { printf '%s\n' "== $*"; }

fail() {
  printf '%s\n' "error: $*" >&2
  exit 1
}

# Runs, and is 3.11 or newer. A command that exists may still fail: a shim of pyenv, a stub that opens a store.
is_recent() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; }

find_python() {
  local candidate
  for candidate in python3.13 python3.12 python3.11 python3 python; do
    if command -v "$candidate" >/dev/null && is_recent "$candidate"; then
      printf '%s\n' "$candidate"
      return
    fi
  done
  fail "no Python 3.11 or newer was found (tried python3.13, python3.12, python3.11, python3, python); install one and run again."
}

make_venv() {
  local base
  base="$(find_python)"
  "$base" -c 'import ensurepip, venv' >/dev/null 2>&1 ||
    fail "$base has no venv module; install it (on Debian and Ubuntu the package python3-venv) and run again."
  say "making $venv with $base ($("$base" -V))"
  if ! "$base" -m venv "$venv"; then
    rm -rf "$venv"
    fail "$base -m venv failed; its message is above."
  fi
}

# What decides whether the installation is up to date: the packaging, the Python, the extras.
fingerprint() {
  "$python" - "$root" "$1" <<'PY'
import hashlib, pathlib, sys
root, extras = pathlib.Path(sys.argv[1]), sys.argv[2]
files = [(root / name).read_bytes() for name in ("setup.py", "pyproject.toml")]
print(hashlib.sha256(b"\0".join([*files, sys.version.encode(), extras.encode(), str(root).encode()])).hexdigest())
PY
}

# ensure_venv EXTRAS, e.g. "" or "dev" or "dev,hf"; EXTRAS name the stamp, so that several sets can be up to date at once.
ensure_venv() {
  local extras="$1" wanted stamp
  if [ ! -e "$venv" ]; then
    make_venv
  elif ! is_recent "$python" || ! "$python" -m pip --version >/dev/null 2>&1; then
    fail "$venv exists, but its Python does not run, is older than 3.11 or has no pip; remove that folder and run again."
  fi
  stamp="$venv/.moe_jax-installed-${extras:-base}"
  wanted="$(fingerprint "$extras")"
  if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$wanted" ]; then
    say "using $venv (up to date)"
    return
  fi
  case ",$extras," in *,hf,*) install_torch ;; esac
  say "installing moe_jax${extras:+ with the extras $extras} into $venv (once; a few minutes)"
  "$python" -m pip install --quiet --disable-pip-version-check --editable "$root${extras:+[$extras]}" ||
    fail "pip could not install the project; its message is above."
  printf '%s\n' "$wanted" >"$stamp"
}

# JAX's CUDA plugin, which compiles for GPUs that are not there, in a folder of its own for PYTHONPATH: it is of the installed jaxlib's
# version whatever that is, and a program that finds it without cuDNN, and was not told JAX_PLATFORMS=cpu, starts with a traceback.
ensure_gpu_compiler() {
  local version
  version="$("$python" -c 'import jaxlib; print(jaxlib.__version__)')"
  gpu_compiler="$venv/gpu-compiler-$version"
  if [ -d "$gpu_compiler" ]; then
    return
  fi
  say "installing JAX's CUDA plugin $version into $gpu_compiler (once; 1 GB, no GPU needed)"
  rm -rf "$gpu_compiler.part"
  "$python" -m pip install --quiet --disable-pip-version-check --no-deps --target "$gpu_compiler.part" \
    "jax-cuda13-plugin==$version" "jax-cuda13-pjrt==$version" || fail "pip could not install the plugin; its message is above."
  mv "$gpu_compiler.part" "$gpu_compiler"
}

# Chromium and its driver, found or, as root where apt-get is, installed.
ensure_browser() {
  have_browser && return
  if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    say "installing Chromium and its driver (once)"
    { apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium chromium-driver; } >/dev/null 2>&1 || true
  fi
  have_browser
}

have_browser() { command -v chromedriver >/dev/null && { command -v chromium || command -v google-chrome; } >/dev/null; }

# The comparisons with Hugging Face need torch on the CPU only; the default Linux wheels bring gigabytes of CUDA libraries.
install_torch() {
  if "$python" -c 'import torch' >/dev/null 2>&1; then
    return
  fi
  say "installing torch, the CPU build if pip finds it (else the default one, up to 3 GB on Linux)"
  "$python" -m pip install --quiet --disable-pip-version-check 'torch==2.13.0+cpu' 2>/dev/null ||
    say "no CPU build found; taking the default one"
}
