"""Bias balancing with counts of the whole batch, and the fault: see unsynchronised.py."""

import unsynchronised  # noqa: F401  (registers it)

from configs import base
from configs.ablations import small


def get_config(arg=""):
    config = small.get_config()
    config.model.moe.update(balance_loss_weight=0.0)
    config.model.moe.router.update(name="deepseek", module="unsynchronised")
    config.model.moe.router.unsynchronised.update(sequences=config.data.batch_size)
    return base.override(config, arg)


def sweep(add):
    """Synchronised first; then 8 replicas of 2 sequences, and 16 of one."""
    router = "model.moe.router"
    add("synchronised", {f"{router}.name": "deepseek"})
    for replicas in (8, 16):
        add(f"alone_{replicas}", {f"{router}.name": "unsynchronised", f"{router}.unsynchronised.replicas": replicas})
