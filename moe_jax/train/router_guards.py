"""Guards of the routers: figures of each MoE layer over a window of steps, the worst layer's against a limit."""

from collections import deque
from collections.abc import Iterator, Mapping

import numpy as np

from moe_jax.config import ModelConfig
from moe_jax.guards_config import GuardsConfig
from moe_jax.routing import make_router
from moe_jax.routing.metrics import noise_floor
from moe_jax.train.events import Finding

_LEAST_LOAD = 10  # assignments an expert has on average in a window before loads say something about it


class Windowed:
    """A figure of each MoE layer [L]: the worst layer's median over the window against a limit."""

    def __init__(self, guards: GuardsConfig, model: ModelConfig, rule):
        """`rule` is `(guards, metrics) -> (figure [L] or None, finding)`, `finding` a function of (value, layer, steps)."""
        self._guards, self._model, self._rule = guards, model, rule
        self._seen: deque[np.ndarray] = deque(maxlen=guards.window)

    def state(self) -> list:
        """Its window, as JSON has it."""
        return unwound(self._seen)

    def resume(self, state: list) -> None:
        """Goes on with a window that `state` gave."""
        self._seen.extend(map(np.array, state))

    def look(self, metrics: Mapping[str, np.ndarray]) -> Iterator[Finding]:
        """Nothing until the window is full, or where the model has no such figure."""
        figure_L, limit, describe = self._rule(self._guards, metrics)
        if (seen := _last(self._seen, figure_L)) is None:
            return
        median_L = np.median(seen, axis=0)
        worst = int(np.argmax(median_L))
        if median_L[worst] > limit:
            yield describe(float(median_L[worst]), layer_name(self._model, worst), len(self._seen))


def _last(window, array):
    """Arrays of the window with this one, stacked; None until it is full, and of a figure that is None."""
    if array is None:
        return None
    window.append(np.asarray(array, np.int64 if np.issubdtype(array.dtype, np.integer) else np.float64))
    return np.stack(window) if len(window) == window.maxlen else None


def unwound(window: deque[np.ndarray]) -> list:
    """A window's arrays as lists: JSON brings 64-bit numbers back to the bit."""
    return [array.tolist() for array in window]


def bias_range(guards: GuardsConfig, metrics: Mapping[str, np.ndarray]):
    """The range of the balancing bias, a rule of `Windowed`."""
    bias_LE, limit = metrics.get("router/bias"), guards.bias_range

    def describe(value, layer, steps):
        what = (
            f"the balancing bias of {layer} spans {value:.3g} over the last {steps} steps, more than {limit:g}, and overrules"
            " scores that lie between 0 and 1"
        )
        remedy = "lower the router's bias_speed, or balance with model.moe.balance_loss_weight"
        return Finding("bias_saturation", value, limit, what, remedy)

    return None if bias_LE is None else np.ptp(bias_LE, axis=-1), limit, describe


def drop_rate(guards: GuardsConfig, metrics: Mapping[str, np.ndarray]):
    """The share of assignments that were dropped, a rule of `Windowed`."""
    limit = guards.dropped_fraction

    def describe(value, layer, steps):
        what = f"{layer} dropped {value:.1%} of its assignments over the last {steps} steps, more than {limit:.1%}"
        remedy = "raise model.moe.capacity_factor or model.moe.exchange_factor, or balance the experts better"
        return Finding("drop_rate", value, limit, what, remedy)

    return metrics.get("router/dropped_fraction"), limit, describe


def gradient_ratio(guards: GuardsConfig, metrics: Mapping[str, np.ndarray]):
    """Auxiliary losses against the language model at the router, a rule of `Windowed`."""
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

    def state(self) -> dict[str, list]:
        """Its windows, as JSON has them."""
        return {"loads": unwound(self._loads), "entropies": unwound(self._entropies)}

    def resume(self, state: dict[str, list]) -> None:
        """Goes on with windows that `state` gave."""
        self._loads.extend(map(np.array, state["loads"]))
        self._entropies.extend(map(np.array, state["entropies"]))

    def look(self, metrics: Mapping[str, np.ndarray]) -> Iterator[Finding]:
        """Nothing until the window is full, and nothing of loads of which a few tokens could be the reason."""
        if self._model.moe.num_experts == 1:
            return
        if (loads := _last(self._loads, metrics.get("router/load"))) is not None:
            load_LE = np.sum(loads, axis=0, dtype=np.int64)
            if load_LE.mean(axis=-1).min() >= _LEAST_LOAD:
                yield from self._dead(load_LE)
                yield from self._unbalanced(load_LE)
        if self._learns and (entropies := _last(self._entropies, metrics.get("router/entropy"))) is not None:
            yield from self._certain(np.median(entropies, axis=0))

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
        return f"the last {self._guards.window} steps"

    def _remedy(self):
        return "balance harder, by model.moe.balance_loss_weight or the router's bias_speed, or lower optimizer.learning_rate"


def layer_name(model: ModelConfig, index: int) -> str:
    """The MoE layer that stands at `index` in metrics, by its number in the model (from 0)."""
    numbers = [layer for layer in range(model.num_layers) if model.is_moe_layer(layer)]
    return f"layer {numbers[index]}" if index < len(numbers) else "the layer of model.mtp_layers"
