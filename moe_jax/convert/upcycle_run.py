"""A run of a dense model as step 0 of a run with experts."""

import dataclasses
from pathlib import Path

import jax

from moe_jax.config import Config, ConfigError, to_dict
from moe_jax.convert.upcycle import upcycle
from moe_jax.data.corpus import save_tokenizer
from moe_jax.mesh import make_mesh
from moe_jax.train import run
from moe_jax.train.run_info import write_run_info


def upcycle_run(
    dense_workdir: str,
    config: Config,
    out_workdir: str,
    *,
    step: str = "latest",
    method: str = "copy",
    drop_fraction: float = 0.5,
    router_std: float | None = None,
    approximate: bool = False,
) -> Config:
    """Makes the run folder `out_workdir`, which `train.loop.train` with the same config and workdir continues from step 0.

    The optimizer starts anew, and so do the data and the learning rate's schedule.

    Args:
      dense_workdir: run folder of a dense model.
      config: of the new run: its model is the dense one but for `model.moe`, and has its vocabulary where model.vocab_size is 0; its
        seed is that of the routers.
      out_workdir: where no run is yet.
      step: checkpoint of the dense run: "latest", "best" or a number.
      method, drop_fraction, router_std, approximate: as `upcycle`.

    Returns: the config as it is in the new run folder.

    Raises:
      ConfigError, CheckpointError: as `upcycle`, and folders, a tokenizer or a mesh that will not do; nothing has been written then.
    """
    if any((Path(out_workdir) / name).exists() for name in ("config.json", "checkpoints", "tokenizer")):
        raise ConfigError(f"out = {str(out_workdir)!r} holds a run already; choose another folder for the new one.")
    tokenizer = run.read_config(dense_workdir).data.tokenizer
    if config.data.tokenizer != tokenizer:
        raise ConfigError(
            f"data.tokenizer = {config.data.tokenizer!r} while the model in workdir = {str(dense_workdir)!r} knows the ids of"
            f" {tokenizer!r}; set data.tokenizer={tokenizer}."
        )
    dense = run.restore(dense_workdir, step, config.mesh)
    vocab_size = config.model.vocab_size or dense.config.model.vocab_size
    model = dataclasses.replace(config.model, vocab_size=vocab_size)
    config = dataclasses.replace(config, workdir=str(out_workdir), model=model)
    run.check(config)
    trees = upcycle(
        dense.config.model,
        jax.device_get(dense.params),
        model,
        seed=config.train.seed,
        method=method,
        drop_fraction=drop_fraction,
        router_std=router_std,
        approximate=approximate,
    )
    mesh = make_mesh(config)
    with run.checkpoints(config) as saved, jax.set_mesh(mesh):
        like = run.abstract_weights(config, mesh)
        arrays = dict(zip(("params", "router_state"), trees, strict=True))
        weights = jax.tree.map(lambda array, to: jax.device_put(array, to.sharding), arrays, like)
        save_tokenizer(dense.tokenizer, config.workdir)
        saved.save(0, weights, {"data": None, "metrics": {}, "origin": None})
        saved.wait()
    write_run_info(config.workdir, to_dict(config))
    return config
