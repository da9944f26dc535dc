"""A run folder with checkpoints that no step of training made: what a start looks at before it trains."""

import jax
import numpy as np

from moe_jax.config import to_dict
from moe_jax.data.corpus import load_corpus, save_tokenizer
from moe_jax.data.pipeline import train_iterator
from moe_jax.mesh import make_mesh
from moe_jax.sizes import with_vocabulary
from moe_jax.train import resuming, run
from moe_jax.train.run_info import write_run_info
from moe_jax.train.state import create


def save(config, steps, poison=lambda step, state: state):
    """Checkpoints of the initial state as those of `steps`, changed by `poison(step, state)`, with config.json and tokenizer."""
    corpus = load_corpus(config.data)
    config = with_vocabulary(config, corpus.tokenizer.vocab_size)
    mesh = make_mesh(config)
    write_run_info(config.workdir, to_dict(config))
    save_tokenizer(corpus.tokenizer, config.workdir)
    iterator = train_iterator(corpus.train, config.data, config.train.seed)
    with run.checkpoints(config) as checkpoints, jax.set_mesh(mesh):
        _, _, state = create(config)
        for step in steps:
            extra = {"data": iterator.get_state(), "metrics": {}} | resuming.identity(config, corpus)
            checkpoints.save(step, poison(step, state), extra)


def with_nan(state, place):
    """`state` with one number of one array NaN; `place(tree)` gives the nested dict and the name of the array."""
    poisoned = jax.tree.map(lambda leaf: leaf, state)
    node, name = place(poisoned)
    array = np.array(node[name])
    array.reshape(-1)[-1] = np.nan
    node[name] = jax.device_put(array, node[name].sharding)
    return poisoned
