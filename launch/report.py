"""The report of a run, or of several side by side: `python -m launch.report runs/quickstart`.

One page that opens without a network, index.html in --out, and every picture of it as PNG in --out/figures: what was trained, how it
learned, how evenly its experts were used and what they came to know.
"""

from absl import flags

from launch import cli
from moe_jax.analysis.report.write import write_report

OUT = flags.DEFINE_string("out", "", "Folder of the page; by default `report` in the folder of the one run.")


def main(*runs):
    page = write_report(runs, OUT.value)
    print(f"written to {page}")


if __name__ == "__main__":
    cli.run(main, argument="RUN...")
