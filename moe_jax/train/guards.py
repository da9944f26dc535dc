"""Guards over the figures of every step: plain Python on a step's metrics, with nothing to compile.

A guard finds something, or not, in each step; what it finds is one episode until it has found nothing for `guards.window` steps, and
an episode is one event. docs/guards.md has the guards, their figures and their defaults.
"""

import math
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from moe_jax.config import Config, ModelConfig
from moe_jax.guards_config import GuardsConfig
from moe_jax.routing import make_router
from moe_jax.routing.metrics import noise_floor

FIGURES = (
    "train/loss",
    "train/gradient_norm",
    "router/load",
    "router/entropy",
    "router/bias",
    "router/dropped_fraction",
    "router/gradient_ratio",
)
_LEAST_LOAD = 10  # assignments an expert has on average in a window before loads say something about it
_LEAST_DEVIATION = 0.02  # of the median: below it a loss that hardly moves would make a spike of nothing
_MAD_TO_DEVIATION = 1.4826  # of a normal distribution


@dataclass(frozen=True)
class Finding:
    """What a guard found in a step.

    Attributes:
      guard: its name.
      value, threshold: the figure, and what it was held against.
      what, remedy: the two parts of a sentence: what is the matter, and what to do.
    """

    guard: str
    value: float
    threshold: float
    what: str
    remedy: str


@dataclass(frozen=True)
class Event:
    """A finding of a step that is to be spoken of, and whether to "warn" or to "stop"."""

    step: int
    action: str
    finding: Finding

    def sentence(self, state_of_run: str = "") -> str:
        """The one sentence; `state_of_run` stands between what is the matter and what to do."""
        return f"step {self.step}: {'; '.join(filter(None, (self.finding.what, state_of_run, self.finding.remedy)))}."


class Guards:
    """What a run's steps are looked at with, one step after the other."""

    def __init__(self, config: Config):
        guards = config.guards
        self._warmup, self._patience = guards.warmup_steps, guards.window
        self._non_finite = NonFinite(guards) if guards.non_finite != "off" else None
        rules = [("loss_spike", loss_spike(guards)), ("gradient_norm", gradient_norm(guards))]
        if config.model.num_moe_layers:
            rules += [
                ("router_collapse", Collapse(guards, config.model)),
                ("bias_saturation", Windowed(guards, config.model, _bias_range)),
                ("drop_rate", Windowed(guards, config.model, _drops)),
                ("gradient_ratio", Windowed(guards, config.model, _ratio)),
            ]
        self._rules = [(getattr(guards, name), rule) for name, rule in rules if getattr(guards, name) != "off"]
        self._quiet: dict[str, int] = {}  # by guard that spoke: steps since it last found something

    def look(self, step: int, metrics: Mapping[str, np.ndarray]) -> list[Event]:
        """The events of a step, given those of `FIGURES` that it has; steps come in order, each once."""
        if not is_finite(metrics):
            return self._non_finite.look(step, metrics) if self._non_finite else []
        if self._non_finite:
            self._non_finite.end()
        self._quiet = {guard: steps + 1 for guard, steps in self._quiet.items() if steps < self._patience}
        found = [(action, finding) for action, rule in self._rules for finding in rule.look(metrics)]
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

    def __init__(self, guards: GuardsConfig):
        self._stops, self._allowed, self._skipped = guards.non_finite == "stop", guards.skip_steps, 0

    def end(self) -> None:
        """A step was finite."""
        self._skipped = 0

    def look(self, step: int, metrics: Mapping[str, np.ndarray]) -> list[Event]:
        """The first step of a row warns, that after the last allowed one stops."""
        self._skipped += 1
        stops = self._stops and self._skipped > self._allowed
        if self._skipped > 1 and not stops:
            return []
        figures = f"loss = {metrics['train/loss']}, gradient norm = {metrics['train/gradient_norm']}"
        if stops:
            row = f", in {self._skipped} steps in a row" if self._skipped > 1 else ""
        else:
            row = "; the step is skipped" + (f", and so are up to {self._allowed - 1} more in a row" if self._stops else "")
        remedy = "lower optimizer.learning_rate or optimizer.clip_norm, or set model.dtype=float32"
        finding = Finding("non_finite", float(self._skipped), float(self._allowed), figures + row, remedy)
        return [Event(step, "stop" if stops else "warn", finding)]


class Jump:
    """A scalar of a step against those of the steps before it."""

    def __init__(self, guard: str, metric: str, window: int, limit, remedy: str):
        """`limit` is what the scalar may reach, of an array of the window's."""
        self._guard, self._metric, self._limit, self._remedy = guard, metric, limit, remedy
        self._before: deque[float] = deque(maxlen=window)

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


class Windowed:
    """A figure of each MoE layer [L]: the worst layer's median over the window against a limit."""

    def __init__(self, guards: GuardsConfig, model: ModelConfig, rule):
        """`rule` is `(guards, metrics) -> (figure [L] or None, finding)`, `finding` a function of (value, layer, steps)."""
        self._guards, self._model, self._rule = guards, model, rule
        self._seen: deque[np.ndarray] = deque(maxlen=guards.window)

    def look(self, metrics: Mapping[str, np.ndarray]) -> Iterator[Finding]:
        """Nothing until the window is full, or where the model has no such figure."""
        figure_L, limit, describe = self._rule(self._guards, metrics)
        if figure_L is None:
            return
        self._seen.append(figure_L)
        if len(self._seen) < self._seen.maxlen:
            return
        median_L = np.median(np.stack(self._seen), axis=0)
        worst = int(np.argmax(median_L))
        if median_L[worst] > limit:
            yield describe(float(median_L[worst]), layer_name(self._model, worst), len(self._seen))


def _bias_range(guards, metrics):
    bias_LE, limit = metrics.get("router/bias"), guards.bias_range

    def describe(value, layer, steps):
        what = (
            f"the balancing bias of {layer} spans {value:.3g} over the last {steps} steps, more than {limit:g}, and overrules"
            " scores that lie between 0 and 1"
        )
        remedy = "lower the router's bias_speed, or balance with model.moe.balance_loss_weight"
        return Finding("bias_saturation", value, limit, what, remedy)

    return None if bias_LE is None else np.ptp(bias_LE, axis=-1), limit, describe


def _drops(guards, metrics):
    limit = guards.dropped_fraction

    def describe(value, layer, steps):
        what = f"{layer} dropped {value:.1%} of its assignments over the last {steps} steps, more than {limit:.1%}"
        remedy = "raise model.moe.capacity_factor or model.moe.exchange_factor, or balance the experts better"
        return Finding("drop_rate", value, limit, what, remedy)

    return metrics.get("router/dropped_fraction"), limit, describe


def _ratio(guards, metrics):
    limit = guards.gradient_ratio_limit

    def describe(value, layer, steps):
        what = (
            f"auxiliary losses pull {value:.3g} times as hard at the router of {layer} as the language model does, over the last"
            f" {steps} steps, more than {limit:g}"
        )
        remedy = "lower model.moe.balance_loss_weight, model.moe.z_loss_weight or the router's own loss weight"
        return Finding("gradient_ratio", value, limit, what, remedy)

    return metrics.get("router/gradient_ratio"), limit, describe


class Collapse:
    """Dead experts and MaxVio by the loads of the window added up, and the median entropy."""

    def __init__(self, guards: GuardsConfig, model: ModelConfig):
        self._guards, self._model = guards, model
        router = make_router(model.moe.router, model.moe.num_experts)
        self._learns = bool(router.params(model.d_model))  # else no entropy is its to lose
        self._loads: deque[np.ndarray] = deque(maxlen=guards.window)
        self._entropies: deque[np.ndarray] = deque(maxlen=guards.window)

    def look(self, metrics: Mapping[str, np.ndarray]) -> Iterator[Finding]:
        """Nothing until the window is full, and nothing of loads of which a few tokens could be the reason."""
        if self._model.moe.num_experts == 1 or "router/load" not in metrics:
            return
        self._loads.append(np.asarray(metrics["router/load"], np.int64))
        self._entropies.append(metrics["router/entropy"])
        if len(self._loads) < self._loads.maxlen:
            return
        load_LE = np.sum(np.stack(self._loads), axis=0)
        if load_LE.mean(axis=-1).min() >= _LEAST_LOAD:
            yield from self._dead(load_LE)
            yield from self._unbalanced(load_LE)
        if self._learns:
            yield from self._certain(np.median(np.stack(self._entropies), axis=0))

    def _dead(self, load_LE):
        dead_L, experts = np.sum(load_LE == 0, axis=-1), load_LE.shape[-1]
        worst = int(np.argmax(dead_L))
        share, limit = float(dead_L[worst] / experts), self._guards.dead_fraction
        if dead_L[worst] and share >= limit:
            what = f"{dead_L[worst]} of the {experts} experts of {self._layer(worst)} got no token in {self._steps()}"
            yield Finding("dead_experts", share, limit, what, self._remedy())

    def _unbalanced(self, load_LE):
        """No more than all tokens to the same K experts is possible: a MaxVio of E / K - 1, half of which is a collapse, too."""
        experts, mean_L = load_LE.shape[-1], load_LE.mean(axis=-1)
        most = experts / self._model.moe.router.top_k - 1
        if most <= 0:
            return
        violation_L = load_LE.max(axis=-1) / mean_L - 1
        limit_L = min(self._guards.max_violation, most / 2) + noise_floor(experts, mean_L)
        worst = int(np.argmax(violation_L - limit_L))
        value, limit = float(violation_L[worst]), float(limit_L[worst])
        if value > limit:
            what = f"the busiest expert of {self._layer(worst)} got {1 + value:.3g} times the mean load in {self._steps()}"
            yield Finding("max_violation", value, limit, f"{what}, a MaxVio above {limit:.3g}", self._remedy())

    def _certain(self, entropy_L):
        worst, limit = int(np.argmin(entropy_L)), self._guards.min_entropy
        if (value := float(entropy_L[worst])) < limit:
            what = f"the router of {self._layer(worst)} is certain: its entropy is {value:.3g} of ln E in {self._steps()}"
            remedy = (
                "raise model.moe.z_loss_weight or lower optimizer.learning_rate, so that tokens can still change their expert"
            )
            yield Finding("entropy", value, limit, f"{what}, less than {limit:g}", remedy)

    def _layer(self, index):
        return layer_name(self._model, index)

    def _steps(self):
        return f"the last {len(self._loads)} steps"

    def _remedy(self):
        return "balance harder, by model.moe.balance_loss_weight or the router's bias_speed, or lower optimizer.learning_rate"


def layer_name(model: ModelConfig, index: int) -> str:
    """The MoE layer that stands at `index` in metrics, by its number in the model (from 0)."""
    numbers = [layer for layer in range(model.num_layers) if model.is_moe_layer(layer)]
    return f"layer {numbers[index]}" if index < len(numbers) else "the layer of model.mtp_layers"
