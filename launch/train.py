"""Trains a model: `python -m launch.train --config=configs/quickstart.py [--config.group.field=value ...]`.

Running the same command again continues from the last checkpoint. configs/base.py says what each field does.
"""

import dataclasses
import pathlib

from absl import flags
from ml_collections import config_flags

from launch import cli, process_flags
from moe_jax.train import loop

CONFIG = cli.define_config("configs/base.py", "Config file, e.g. configs/quickstart.py; then --config.group.field=value.")
PROCESSES = process_flags.define()


def main():
    config = cli.read_config(CONFIG)
    cli.keep_programs()
    if not config.workdir:
        name = pathlib.Path(config_flags.get_config_filename(flags.FLAGS["config"])).name.split(".py")[0]
        config = dataclasses.replace(config, workdir=f"runs/{name}")
    with process_flags.joined(PROCESSES):
        loop.train(config)


if __name__ == "__main__":
    cli.run(main)
