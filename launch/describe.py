"""What a config is, before anything runs: `python -m launch.describe --config=configs/published/mixtral_8x7b.py[:h100-64]`.

Parameters by part and active ones, FLOPs, key/value cache, bytes at rest (each device's too, where the config has a mesh of several),
bytes over the wire. Any config will do; with --config.init_from=hf:FOLDER it is that checkpoint's model. Nothing is allocated and no
device is asked for.
"""

import pathlib

from absl import flags
from ml_collections import config_flags

from launch import cli
from moe_jax.analysis.describe import describe

CONFIG = cli.define_config("configs/published/mixtral_8x7b.py", "Config file; then --config.group.field=value.")


def main():
    config = cli.read_config(CONFIG)
    if config.init_from:
        from moe_jax.convert.initial import complete  # a second of imports, which other configs need not wait for

        config = complete(config)
    print(describe(pathlib.Path(config_flags.get_config_filename(flags.FLAGS["config"])).name.replace(".py", ""), config))


if __name__ == "__main__":
    cli.run(main)
