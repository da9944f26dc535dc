"""What a server tells Prometheus, in a registry of its own."""

from collections.abc import Callable, Iterator

import numpy as np
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import CounterMetricFamily

PREFIX = "moe_jax"
FIRST_TOKEN_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 60)
TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)


class Metrics:
    """Counters and histograms that the engine moves, gauges and expert loads that are read when they are asked for.

    Args:
      queue_length, rows_in_use, expert_load: what to read; `expert_load` gives counts [L, E] since the start.
    """

    def __init__(self, queue_length: Callable[[], int], rows_in_use: Callable[[], int], expert_load: Callable[[], np.ndarray]):
        self.registry = CollectorRegistry()
        own = {"namespace": PREFIX, "registry": self.registry}
        self.generated_tokens = Counter("generated_tokens", "Tokens drawn; its rate is tokens a second.", **own)
        self.prompt_tokens = Counter("prompt_tokens", "Tokens of the prompts taken into rows.", **own)
        self.requests = Counter(
            "requests",
            "Requests by how they ended: stop, length, cancelled, failed; refused (queue full), invalid (4xx).",
            ["outcome"],
            **own,
        )
        self.first_token_seconds = Histogram(
            "first_token_seconds", "From submission to the first token, waiting included.", buckets=FIRST_TOKEN_SECONDS, **own
        )
        self.token_seconds = Histogram(
            "token_seconds", "From one token of a request to the next.", buckets=TOKEN_SECONDS, **own
        )
        Gauge("queue_length", "Requests that wait for a row.", **own).set_function(queue_length)
        Gauge("rows_in_use", "Rows that hold a request.", **own).set_function(rows_in_use)
        self.registry.register(_ExpertLoad(expert_load))


class _ExpertLoad:
    """How often each expert of each MoE layer was chosen."""

    def __init__(self, read: Callable[[], np.ndarray]):
        self._read = read

    def collect(self) -> Iterator[CounterMetricFamily]:
        family = CounterMetricFamily(
            f"{PREFIX}_expert_tokens",
            "Times that an expert was chosen for a token; MoE layers are counted from 0.",
            labels=["moe_layer", "expert"],
        )
        for (layer, expert), count in np.ndenumerate(self._read()):
            family.add_metric([str(layer), str(expert)], int(count))
        yield family
