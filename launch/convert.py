"""Checkpoints of Hugging Face to run folders and back; and runs of dense models to runs with experts.

    python -m launch.convert from_hf --hf=DIR --workdir=RUN [--dtype=bfloat16] [--mesh=data=2,expert=4]
    python -m launch.convert to_hf --workdir=RUN --hf=DIR [--step=best] [--original=DIR] [--dtype=bfloat16]
    python -m launch.convert upcycle --workdir=DENSE_RUN --out=RUN --config=CONFIG [--method=copy|drop|split]

Layers pass through one at a time, so the host's memory need not hold the model. A conversion that was interrupted goes on where it
was when the same command is given again. `from_hf` makes step 0 of a run, which launch.evaluate, launch.sample and launch.train take;
to train, give launch.train the same --config.workdir and --config.init_from=hf:DIR.

`upcycle` makes step 0 of a run of a model with experts out of a dense run (moe_jax/convert/upcycle.py says how); launch.train with the same
--config and --config.workdir=RUN takes it from there.
"""

from absl import flags

from launch import cli
from moe_jax.config import Config, ConfigError, MeshConfig
from moe_jax.convert import stream, upcycle_run
from moe_jax.mesh import emulate_devices

HF = flags.DEFINE_string("hf", None, "Hugging Face folder: read by from_hf, made by to_hf.")
WORKDIR = flags.DEFINE_string("workdir", None, "Run folder: made by from_hf, read by to_hf and upcycle.", required=True)
MESH = flags.DEFINE_string(
    "mesh", "", "from_hf: mesh to lay the arrays out for, e.g. data=2,expert=4; they can be read on any."
)
DTYPE = flags.DEFINE_string(
    "dtype", "", "Parameters are stored in float32 | bfloat16; default: float32 in a run, the original's in to_hf."
)
STEP = flags.DEFINE_string("step", "latest", "to_hf, upcycle: latest, best or a step.")
ORIGINAL = flags.DEFINE_string("original", "", "to_hf: Hugging Face folder whose names, dtypes, config and tokenizer to keep.")
ARCHITECTURE = flags.DEFINE_string("architecture", "", "to_hf: e.g. MixtralForCausalLM; default: the first that fits.")
OUT = flags.DEFINE_string("out", None, "Run folder that upcycle makes.")
CONFIG = cli.define_config(
    "configs/base.py", "upcycle: config of the run to make, whose model is the dense one but for its experts."
)
METHOD = flags.DEFINE_string("method", "copy", "upcycle: copy | drop | split.")
DROP_FRACTION = flags.DEFINE_float("drop_fraction", 0.5, "upcycle: with drop, the part of an expert's hidden units drawn anew.")
ROUTER_STD = flags.DEFINE_float(
    "router_std", None, "upcycle: standard deviation of the routers' weights; default: model.init_std."
)
APPROXIMATE = flags.DEFINE_bool("approximate", False, "upcycle: take routers with which the function is kept on average only.")


def from_hf():
    """--hf to --workdir."""
    mesh = cli.parse_mesh(MESH.value) or MeshConfig()
    emulate_devices(mesh.emulate)
    stream.from_hf(_given("hf"), Config(workdir=WORKDIR.value, mesh=mesh), DTYPE.value or "float32")
    print(f"{HF.value} is step 0 of {WORKDIR.value}; sample from it: python -m launch.sample --workdir={WORKDIR.value}")


def to_hf():
    """--workdir to --hf."""
    stream.to_hf(WORKDIR.value, _given("hf"), STEP.value, ORIGINAL.value or None, DTYPE.value, ARCHITECTURE.value)
    print(f"{WORKDIR.value} is in {HF.value}, for AutoModelForCausalLM.from_pretrained of transformers.")


def upcycle():
    """--workdir to --out."""
    how = {"method": METHOD.value, "drop_fraction": DROP_FRACTION.value, "router_std": ROUTER_STD.value}
    config, out = cli.read_config(CONFIG), _given("out")
    upcycle_run.upcycle_run(WORKDIR.value, config, out, step=STEP.value, approximate=APPROXIMATE.value, **how)
    print(
        f"{WORKDIR.value} is step 0 of {out}; train on: python -m launch.train with the same --config and --config.workdir={out}"
    )


VERBS = {"from_hf": from_hf, "to_hf": to_hf, "upcycle": upcycle}


def main(verb: str):
    if verb not in VERBS:
        raise ConfigError(f"{verb!r} is no conversion; these are: {', '.join(VERBS)}.")
    VERBS[verb]()


def _given(name):
    if not (value := flags.FLAGS[name].value):
        raise ConfigError(f"--{name} is missing; give the folder.")
    return value


if __name__ == "__main__":
    cli.run(main, "VERB")
