"""Where the tokens of runs went, as a picture: `python -m launch.plot_load --runs=runs/quickstart --out=load.png`.

Each expert's load over the steps and the experts without a token, runs side by side; --names labels them.
"""

from absl import flags

from launch import cli
from moe_jax.analysis.load_plot import read_loads, save_load_plot, short_names
from moe_jax.config import ConfigError

RUNS = flags.DEFINE_list("runs", None, "Run folders of launch.train.", required=True)
NAMES = flags.DEFINE_list("names", [], "What to call them; by default their folders, without the parts that all share.")
OUT = flags.DEFINE_string("out", "load.png", "The picture.")


def main():
    names = NAMES.value or short_names(RUNS.value)
    if len(set(names)) != len(RUNS.value):
        raise ConfigError(f"--names = {','.join(names)} must be {len(RUNS.value)} different names, one a run.")
    save_load_plot({name: read_loads(run) for name, run in zip(names, RUNS.value, strict=True)}, OUT.value)
    print(f"written to {OUT.value}")


if __name__ == "__main__":
    cli.run(main)
