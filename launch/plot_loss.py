"""Validation losses of runs over the steps: `python -m launch.plot_loss --runs=runs/a,runs/b --names=one,other --out=loss.png`.

A run may be a pattern, `runs/a/seed_*`: its folders are seeds of one curve. `A+B` is a curve that goes on with B where A ended. Prints
a table of the last losses, too, with differences to the last of the curves, paired by seed.
"""

from absl import flags

from launch import cli
from moe_jax.analysis.load_plot import short_names
from moe_jax.analysis.loss_plot import loss_table, read_curve, save_loss_plot
from moe_jax.config import ConfigError

RUNS = flags.DEFINE_list(
    "runs", None, "Curves: run folders or patterns of them, joined by + where one goes on from another.", required=True
)
NAMES = flags.DEFINE_list("names", [], "What to call them; by default their folders, without the parts that all share.")
OUT = flags.DEFINE_string("out", "loss.png", "The picture.")
SKIP = flags.DEFINE_integer("skip", 0, "Steps at the beginning that the picture leaves out.")


def main():
    names = NAMES.value or short_names(RUNS.value)
    if len(set(names)) != len(RUNS.value):
        raise ConfigError(f"--names = {','.join(names)} must be {len(RUNS.value)} different names, one a curve.")
    curves = {name: read_curve(runs) for name, runs in zip(names, RUNS.value, strict=True)}
    save_loss_plot(curves, OUT.value, skip=SKIP.value)
    print(f"{loss_table(curves)}\nwritten to {OUT.value}")


if __name__ == "__main__":
    cli.run(main)
