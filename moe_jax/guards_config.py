"""The configuration of a run's guards; docs/guards.md says what each watches and why the defaults are what they are."""

import difflib
from dataclasses import dataclass, fields

from moe_jax.validation import ConfigError

ACTIONS = ("off", "warn", "stop")


@dataclass(frozen=True)
class GuardsConfig:
    """For each guard what it does when it speaks, and beside it the figures at which it does.

    Raises:
      ConfigError: an action that is none of `ACTIONS`, a negative number, or a fraction above 1.
    """

    window: int = 50
    warmup_steps: int = 200
    non_finite: str = "stop"
    skip_steps: int = 3
    loss_spike: str = "warn"
    loss_spike_deviations: float = 8.0
    gradient_norm: str = "warn"
    gradient_norm_factor: float = 10.0
    router_collapse: str = "warn"
    dead_fraction: float = 0.125
    max_violation: float = 3.0
    min_entropy: float = 0.02
    bias_saturation: str = "warn"
    bias_range: float = 1.5
    drop_rate: str = "warn"
    dropped_fraction: float = 0.3
    gradient_ratio: str = "warn"
    gradient_ratio_limit: float = 10.0
    stall: str = "warn"
    stall_seconds: float = 600.0
    disk: str = "stop"
    disk_factor: float = 1.1

    def __post_init__(self):
        for name, value in ((field.name, getattr(self, field.name)) for field in fields(self)):
            if isinstance(value, str):
                _check_action(name, value)
            elif not value >= 0 or (name in ("window", "stall_seconds") and not value > 0):
                least = "greater than 0" if name in ("window", "stall_seconds") else "0 or more"
                raise ConfigError(f"guards.{name} = {value} must be {least}.")
        for name in ("dead_fraction", "min_entropy", "dropped_fraction"):
            if (value := getattr(self, name)) > 1:
                raise ConfigError(f"guards.{name} = {value} must be between 0 and 1: it is a share of a whole.")


def _check_action(name, value):
    if value not in ACTIONS:
        near = difflib.get_close_matches(value, ACTIONS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"choose one of {', '.join(ACTIONS)}."
        raise ConfigError(f"guards.{name} = {value!r} is unknown; {hint}")
