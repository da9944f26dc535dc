"""Guards over the figures of every step: plain Python on a step's metrics, with nothing to compile.

A guard finds something, or not, in each step; what it finds is one episode until it has found nothing for `guards.window` steps, and
an episode is one event. docs/guards.md has the guards, their figures and their defaults.
"""

import math
from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from moe_jax.config import Config
from moe_jax.guards_config import GuardsConfig
from moe_jax.train.events import Event, Finding
from moe_jax.train.router_guards import Collapse, Windowed, bias_range, drop_rate, gradient_ratio

FIGURES = (
    "train/loss",
    "train/gradient_norm",
    "router/load",
    "router/entropy",
    "router/bias",
    "router/dropped_fraction",
    "router/gradient_ratio",
)
_LEAST_DEVIATION = 0.02  # of the median: below it a loss that hardly moves would make a spike of nothing
_MAD_TO_DEVIATION = 1.4826  # of a normal distribution


class Guards:
    """What a run's steps are looked at with, one step after the other."""

    def __init__(self, config: Config):
        guards = config.guards
        self._warmup, self._patience = guards.warmup_steps, guards.window
        self._non_finite = NonFinite(guards, config.train.steps) if guards.non_finite != "off" else None
        rules = [("loss_spike", loss_spike(guards)), ("gradient_norm", gradient_norm(guards))]
        if config.model.num_moe_layers:
            rules += [
                ("router_collapse", Collapse(guards, config.model)),
                ("bias_saturation", Windowed(guards, config.model, bias_range)),
                ("drop_rate", Windowed(guards, config.model, drop_rate)),
                ("gradient_ratio", Windowed(guards, config.model, gradient_ratio)),
            ]
        self._rules = {name: rule for name, rule in rules if getattr(guards, name) != "off"}
        self._actions = {name: getattr(guards, name) for name in self._rules}
        self._quiet: dict[str, int] = {}  # by guard that spoke: steps since it last found something

    @property
    def skipping(self) -> bool:
        """Whether the last step was skipped."""
        return self._non_finite is not None and self._non_finite.skipped > 0

    def state(self) -> dict[str, Any]:
        """All that they remember of earlier steps, as JSON has it: part of a checkpoint, and small beside its arrays of experts."""
        windows = {name: rule.state() for name, rule in self._rules.items()}
        return {"quiet": self._quiet, "skipped": self._non_finite.skipped if self._non_finite else 0, "windows": windows}

    def resume(self, state: dict[str, Any] | None) -> None:
        """Goes on with what `state` gave, None of a checkpoint that has none of it; of a longer window the last steps count."""
        if state is None:
            return
        self._quiet = dict(state["quiet"])
        if self._non_finite:
            self._non_finite.skipped = state["skipped"]
        for name, window in state["windows"].items():
            if name in self._rules:
                self._rules[name].resume(window)

    def look(self, step: int, metrics: Mapping[str, np.ndarray]) -> list[Event]:
        """The events of a step, given those of `FIGURES` that it has; steps come in order, each once."""
        if not is_finite(metrics):
            return self._non_finite.look(step, metrics) if self._non_finite else []
        if self._non_finite:
            self._non_finite.end()
        self._quiet = {guard: steps + 1 for guard, steps in self._quiet.items() if steps < self._patience}
        found = [(self._actions[name], finding) for name, rule in self._rules.items() for finding in rule.look(metrics)]
        if step <= self._warmup:
            return []
        events = [Event(step, action, finding) for action, finding in found if finding.guard not in self._quiet]
        self._quiet |= dict.fromkeys((finding.guard for _, finding in found), 0)
        return events


def is_finite(metrics: Mapping[str, np.ndarray]) -> bool:
    """Whether the step was taken: its loss and gradient norm are finite."""
    return math.isfinite(metrics["train/loss"]) and math.isfinite(metrics["train/gradient_norm"])


class NonFinite:
    """Steps whose loss or gradient norm is not finite, which `train.finite` skips. They count in a row."""

    def __init__(self, guards: GuardsConfig, steps: int):
        """`steps` is the number of the run's last step."""
        self._stops, self._allowed, self._last, self.skipped = guards.non_finite == "stop", guards.skip_steps, steps, 0

    def end(self) -> None:
        """A step was finite."""
        self.skipped = 0

    def look(self, step: int, metrics: Mapping[str, np.ndarray]) -> list[Event]:
        """The first step of a row warns, that after the last allowed one stops; so does the run's last step, whose row has no end."""
        self.skipped += 1
        too_many, last = self._stops and self.skipped > self._allowed, step == self._last
        if self.skipped > 1 and not (too_many or last):
            return []
        figures = f"loss = {metrics['train/loss']}, gradient norm = {metrics['train/gradient_norm']}"
        stops, several = too_many or (last and self._stops), f"{self.skipped} steps" if self.skipped > 1 else "step"
        if too_many:
            row = f", in {several} in a row" if self.skipped > 1 else ""
        elif last:
            row = f", in the run's last {several}"
            row += "" if stops else f"; skipped, so that the run ends with the state of step {step - self.skipped}"
        else:
            row = "; the step is skipped" + (f", and so are up to {self._allowed - 1} more in a row" if self._stops else "")
        remedy = "lower optimizer.learning_rate or optimizer.clip_norm, or set model.dtype=float32"
        finding = Finding("non_finite", float(self.skipped), float(self._allowed), figures + row, remedy)
        return [Event(step, "stop" if stops else "warn", finding)]


class Jump:
    """A scalar of a step against those of the steps before it."""

    def __init__(self, guard: str, metric: str, window: int, limit, remedy: str):
        """`limit` is what the scalar may reach, of an array of the window's."""
        self._guard, self._metric, self._limit, self._remedy = guard, metric, limit, remedy
        self._before: deque[float] = deque(maxlen=window)

    def state(self) -> list[float]:
        """Its window, as JSON has it."""
        return list(self._before)

    def resume(self, state: list[float]) -> None:
        """Goes on with a window that `state` gave."""
        self._before.extend(state)

    def look(self, metrics: Mapping[str, np.ndarray]) -> Iterator[Finding]:
        """Nothing until the window is full."""
        value, before = float(metrics[self._metric]), np.array(self._before)
        full = len(before) == self._before.maxlen
        self._before.append(value)
        if full and value > (limit := float(self._limit(before))):
            name = self._metric.removeprefix("train/").replace("_", " ")
            what = (
                f"the {name} is {value:.4g}, above {limit:.4g}, and the median of the {len(before)} steps before is"
                f" {np.median(before):.4g}"
            )
            yield Finding(self._guard, value, limit, what, self._remedy)


def loss_spike(guards: GuardsConfig) -> Jump:
    """A loss far above those of the window, in robust standard deviations (1.4826 times the median absolute deviation)."""

    def limit(losses):
        median = np.median(losses)
        deviation = max(_MAD_TO_DEVIATION * np.median(np.abs(losses - median)), _LEAST_DEVIATION * abs(median))
        return median + guards.loss_spike_deviations * deviation

    remedy = "look at the data of this step, and lower optimizer.learning_rate or optimizer.clip_norm if it does not come down"
    return Jump("loss_spike", "train/loss", guards.window, limit, remedy)


def gradient_norm(guards: GuardsConfig) -> Jump:
    """A gradient norm many times the window's median."""
    remedy = "lower optimizer.clip_norm or optimizer.learning_rate if it comes again"
    factor = guards.gradient_norm_factor
    return Jump("gradient_norm", "train/gradient_norm", guards.window, lambda norms: factor * np.median(norms), remedy)
