"""Devices that are not there, for tests: `moe_jax.plan.targets` has them; here a missing package fails the test in a sentence."""

import jax
import pytest

from moe_jax.config import ConfigError
from moe_jax.plan import targets
from moe_jax.plan.topology import described_mesh, parse

__all__ = ["described_mesh", "devices"]


def devices(name: str) -> list[jax.Device]:
    """The devices of a topology such as "v5p:2x2x1" or "h100:8".

    A test that asks for them fails without their compiler (libtpu, the CUDA plugin), which the slow and matrix tiers install. Build a
    mesh of them (`jax.make_mesh(..., devices=devices)`), set it, and `.lower(...).compile()`: nothing can be run.
    """
    try:
        return targets.devices(parse(name))
    except ConfigError as error:
        pytest.fail(f"{error} `bash launch/test.sh slow` installs it.")
