"""Every guard provoked, and silent, on metrics made up by NumPy: nothing is compiled."""

import dataclasses
import json
import re

import numpy as np
import pytest
import tiny

from moe_jax.config import Config, ConfigError, GuardsConfig
from moe_jax.guards_config import ACTIONS
from moe_jax.train.guards import FIGURES, Guards

WINDOW, WARMUP, FAULT = 20, 30, 100  # steps; from step FAULT on a test's fault is there
LAYERS, EXPERTS, TOP_K = 2, 8, 3  # of tiny.config("deepseek"): a dense layer, then these
GUARDS = ("non_finite", "loss_spike", "gradient_norm", "router_collapse", "bias_saturation", "drop_rate", "gradient_ratio")


def config(router="deepseek", moe=None, model=None, steps=10**6, **guards) -> Config:
    """`moe` has fields to change of the tiny model's experts; its router's with router_."""
    made = tiny.config(router, model=model)
    of_router = {name.removeprefix("router_"): value for name, value in (moe or {}).items() if name.startswith("router_")}
    fields = {name: value for name, value in (moe or {}).items() if not name.startswith("router_")}
    experts = dataclasses.replace(made.model.moe, **fields, router=dataclasses.replace(made.model.moe.router, **of_router))
    model = dataclasses.replace(made.model, moe=experts)
    train = dataclasses.replace(made.train, steps=steps)
    return dataclasses.replace(
        made, model=model, train=train, guards=GuardsConfig(**dict(window=WINDOW, warmup_steps=WARMUP) | guards)
    )


def healthy(steps, tokens=64, seed=0):
    """(step, metrics) of a run that learns: falling, noisy losses, and loads of so few tokens that a step's MaxVio is large."""
    rng = np.random.default_rng(seed)
    for step in range(1, steps + 1):
        norm = np.float32(np.exp(rng.normal(0, 0.3)))
        yield (
            step,
            {
                "train/loss": np.float32(1.5 + 4 * np.exp(-step / 60) + rng.normal(0, 0.1)),
                "train/gradient_norm": norm,
                "router/load": rng.multinomial(tokens * TOP_K, np.ones(EXPERTS) / EXPERTS, LAYERS).astype(np.int32),
                "router/entropy": rng.uniform(0.3, 0.9, LAYERS).astype(np.float32),
                "router/bias": rng.uniform(-0.3, 0.3, (LAYERS, EXPERTS)).astype(np.float32),
                "router/dropped_fraction": rng.uniform(0, 0.2, LAYERS).astype(np.float32),
                "router/gradient_ratio": rng.lognormal(0, 0.5, LAYERS).astype(np.float32),
            },
        )


def one_layer(name, value):
    """The figure of the second MoE layer, which is layer 2 of the model, is `value`."""

    def change(metrics):
        array = metrics[name].copy()
        array[1] = value
        return {name: array}

    return change


def dead_pair(metrics):
    load_LE = metrics["router/load"].copy()
    load_LE[1, :2] = 0
    return {"router/load": load_LE}


# By the name in events: what is changed from step FAULT on, steps until the guard may know, what its sentence says.
FAULTS = {
    "non_finite": (lambda m: {"train/loss": np.float32("nan")}, 0, r"loss = nan, gradient norm = .*; the step is skipped"),
    "loss_spike": (
        lambda m: {"train/loss": m["train/loss"] + 3},
        0,
        r"the loss is \d\.\d+, above \d\.\d+, and the median of the 20",
    ),
    "gradient_norm": (
        lambda m: {"train/gradient_norm": np.float32(40)},
        0,
        r"the gradient norm is 40, above \d.*20 steps before is",
    ),
    "dead_experts": (dead_pair, WINDOW, r"2 of the 8 experts of layer 2 got no token in the last 20 steps; balance harder"),
    "max_violation": (
        one_layer("router/load", np.array([150, 6, 6, 6, 6, 6, 6, 6], np.int32)),
        WINDOW,
        r"the busiest expert of layer 2 got \d\.\d+ times the mean load in the last 20 steps, a MaxVio above 0\.9",
    ),
    "entropy": (one_layer("router/entropy", 0.01), WINDOW, r"the router of layer 2 is certain: its entropy is 0\.01 of ln E"),
    "bias_saturation": (
        one_layer("router/bias", np.linspace(-1, 1, EXPERTS)),
        WINDOW,
        r"the balancing bias of layer 2 spans 2 over the last 20 steps, more than 1\.5",
    ),
    "drop_rate": (
        one_layer("router/dropped_fraction", 0.4),
        WINDOW,
        r"layer 2 dropped 40\.0% of its assignments .* than 30\.0%",
    ),
    "gradient_ratio": (one_layer("router/gradient_ratio", 25.0), WINDOW, r"pull [\d.]+ times as hard at the router of layer 2"),
}
FIELD = {name: name for name in GUARDS} | dict.fromkeys(("dead_experts", "max_violation", "entropy"), "router_collapse")


def run(settings, steps, change=lambda metrics: {}, faulty=lambda step: step >= FAULT, drop=()):
    """Events of `steps` steps, those that are `faulty` changed."""
    guards, events = Guards(settings), []
    for step, metrics in healthy(steps):
        metrics = metrics | (change(metrics) if faulty(step) else {})
        events += guards.look(step, {name: value for name, value in metrics.items() if name not in drop})
    return events


def test_a_healthy_run_is_silent():
    assert run(config(), 400) == []
    assert set(next(healthy(1))[1]) == set(FIGURES)


def test_loads_of_few_tokens_are_no_collapse():
    """An expert has 3 assignments in a window on average, and MaxVio of it is above the limit by chance."""
    guards, seen = Guards(config(warmup_steps=0)), []
    for step, metrics in healthy(200, tokens=1):
        metrics["router/load"][:, 1:] *= step % 7 == 0
        seen.append(metrics["router/load"])
        assert guards.look(step, metrics) == []
    assert (np.sum(seen[:WINDOW], axis=0) == 0).any() or np.max(np.sum(seen[:WINDOW], axis=0)) > 2 * np.mean(seen) * WINDOW


@pytest.mark.parametrize("name", FAULTS)
def test_each_guard_is_provoked_and_speaks_once(name):
    change, delay, says = FAULTS[name]
    (event,) = run(config(), FAULT + 3 * WINDOW, change, lambda step: FAULT <= step < FAULT + WINDOW + 3)[:1]
    assert event.finding.guard == name
    assert FAULT <= event.step <= FAULT + delay
    assert event.action == "warn"
    sentence = event.sentence()
    assert re.search(says, sentence), sentence
    assert sentence.startswith(f"step {event.step}: ")
    assert sentence.endswith(".")
    assert ". " not in sentence
    others = run(config(**{FIELD[name]: "off"}), FAULT + 3 * WINDOW, change)
    assert name not in [event.finding.guard for event in others]


@pytest.mark.parametrize("name", [name for name in FAULTS if name != "non_finite"])
def test_each_can_warn_or_stop(name):
    change, _, _ = FAULTS[name]
    for action in ("warn", "stop"):
        events = run(config(**{FIELD[name]: action}), FAULT + 2 * WINDOW, change)
        assert {event.action for event in events if event.finding.guard == name} == {action}
    figure = next(event.finding for event in events if event.finding.guard == name)
    assert figure.value < figure.threshold if name == "entropy" else figure.value >= figure.threshold


def test_an_episode_is_one_event_however_long_it_is_and_flickers():
    change, _, _ = FAULTS["drop_rate"]
    assert len(run(config(), FAULT + 10 * WINDOW, change)) == 1
    assert len(run(config(), FAULT + 10 * WINDOW, change, lambda step: step >= FAULT and step % 12 < 8)) == 1


def test_an_episode_after_a_quiet_window_is_another():
    change, _, _ = FAULTS["drop_rate"]
    twice = run(config(), 400, change, lambda step: FAULT <= step < FAULT + 2 * WINDOW or step >= 250)
    assert [event.step for event in twice] == [FAULT + WINDOW // 2, 250 + WINDOW // 2]  # once it is in half of the window


def test_nothing_is_said_in_the_warm_up_but_of_what_is_not_finite():
    for name in FAULTS:
        events = run(config(warmup_steps=200), 200, FAULTS[name][0])
        assert {event.finding.guard for event in events} == ({name} if name == "non_finite" else set())


@pytest.mark.parametrize("name", FAULTS)
def test_an_interruption_at_any_step_changes_no_event(name):
    """What guards remember goes through JSON, as a checkpoint has it."""
    change, _, _ = FAULTS[name]
    faulty = range(FAULT, FAULT + WINDOW + 3)
    steps = [(step, m | (change(m) if step in faulty else {})) for step, m in healthy(FAULT + 2 * WINDOW)]
    guards = Guards(config(non_finite="warn"))
    states = [json.dumps(guards.state())]
    events = []
    for step, metrics in steps:
        events.append(guards.look(step, metrics))
        states.append(json.dumps(guards.state()))
    assert sum(map(len, events)) >= 1
    for start in range(0, len(steps), 23):
        resumed = Guards(config(non_finite="warn"))
        resumed.resume(json.loads(states[start]))
        assert [resumed.look(*step) for step in steps[start:]] == events[start:]


def test_a_checkpoint_of_other_guards_is_gone_on_from():
    change, _, _ = FAULTS["drop_rate"]
    guards = Guards(config(drop_rate="off", window=3 * WINDOW))
    for step, metrics in healthy(FAULT):
        guards.look(step, metrics | change(metrics))
    resumed = Guards(config(loss_spike="off"))
    resumed.resume(json.loads(json.dumps(guards.state())))
    steps = [(step, m | change(m)) for step, m in healthy(FAULT + 2 * WINDOW) if step > FAULT]
    assert [event.step for step, m in steps for event in resumed.look(step, m)] == [FAULT + WINDOW]


def test_the_last_step_of_a_run_ends_a_row():
    def spoken(faulty, **guards):
        return skipped(config(steps=60, **guards), faulty, steps=60)

    assert spoken({59, 60}) == [(59, "warn"), (60, "stop")]
    assert spoken({60}) == [(60, "stop")]
    assert spoken({58, 59, 60}, non_finite="warn") == [(58, "warn"), (60, "warn")]
    assert spoken({60}, non_finite="warn") == [(60, "warn")]
    assert spoken({60}, non_finite="off") == []
    assert spoken({58, 59}) == [(58, "warn")]


def test_a_run_that_goes_on_waits_for_a_window_only():
    """From a checkpoint that has none."""
    change, _, _ = FAULTS["drop_rate"]
    guards = Guards(config())
    guards.resume(None)
    events = [event for step, m in healthy(50) for event in guards.look(5000 + step, m | change(m))]
    assert [event.step for event in events] == [5000 + WINDOW]


@pytest.mark.parametrize("name", FIGURES[2:])
def test_a_guard_without_its_figure_is_silent(name):
    change, _, _ = FAULTS["gradient_norm"]
    assert [event.finding.guard for event in run(config(), FAULT + 1, change, drop=(name,))] == ["gradient_norm"]


def test_a_dense_model_has_the_guards_of_loss_and_gradients():
    settings = config(moe=dict(num_experts=0, first_dense=0))
    for name in ("non_finite", "loss_spike", "gradient_norm"):
        events = run(settings, FAULT + 2, FAULTS[name][0], drop=FIGURES[2:])
        assert [event.finding.guard for event in events] == [name]


def skipped(settings, faulty, steps=12):
    return [(event.step, event.action) for event in run(settings, steps, FAULTS["non_finite"][0], lambda step: step in faulty)]


def test_steps_that_are_not_finite_count_in_a_row():
    assert skipped(config(), {2, 4, 5, 6, 8}) == [(2, "warn"), (4, "warn"), (8, "warn")]
    assert skipped(config(), range(3, 13))[:2] == [(3, "warn"), (6, "stop")]  # default: three are skipped
    assert skipped(config(skip_steps=0), {2})[:1] == [(2, "stop")]
    assert skipped(config(skip_steps=1), {2, 4, 5}) == [(2, "warn"), (4, "warn"), (5, "stop")]
    assert skipped(config(non_finite="warn"), range(3, 13)) == [(3, "warn")]
    assert skipped(config(non_finite="off"), range(3, 13)) == []


def test_the_sentence_of_a_stop_has_the_figures_the_row_and_the_checkpoint():
    events = run(config(), 6, lambda m: {"train/gradient_norm": np.float32("inf")}, lambda step: step >= 3)
    assert re.fullmatch(
        r"step 6: loss = \d\.\d+, gradient norm = inf, in 4 steps in a row; the run is stopped, last good checkpoint: none;"
        r" lower optimizer\.learning_rate or optimizer\.clip_norm, or set model\.dtype=float32\.",
        events[-1].sentence("the run is stopped, last good checkpoint: none"),
    )


def test_a_skipped_step_is_in_no_window():
    """Its figures are of no step that was taken: 200 of them leave a window as it was."""
    change = lambda m: {"train/loss": np.float32("nan"), "router/dropped_fraction": np.ones(LAYERS)}  # noqa: E731
    events = run(config(non_finite="warn"), 400, change, lambda step: FAULT <= step < 300)
    assert [event.finding.guard for event in events] == ["non_finite"]


def test_a_router_that_learns_nothing_has_no_entropy_to_lose():
    change = FAULTS["entropy"][0]
    hashed = config(moe=dict(router_name="hash", router_options={}, balance_loss_weight=0.0, z_loss_weight=0.0))
    assert run(hashed, FAULT + 2 * WINDOW, change) == []


@pytest.mark.parametrize(("experts", "top_k", "limit"), [(8, 2, 1.5), (8, 1, 3.0), (64, 1, 3.0), (16, 4, 1.5)])
def test_max_violation_is_held_against_what_is_possible(experts, top_k, limit):
    settings = config("mixtral", moe=dict(num_experts=experts, router_top_k=top_k, router_options={"normalize": "before"}))

    def violated(most):
        load_E = np.full(experts, 10000)
        load_E[0] = round(10000 * (experts - 1) * (1 + most) / (experts - 1 - most))
        return run(settings, FAULT + WINDOW, lambda _: {"router/load": load_E[None]}, lambda _: True, FIGURES[3:])

    assert violated(limit - 0.1) == []
    (event,) = violated(limit + 0.1)
    assert event.finding.value == pytest.approx(limit + 0.1, abs=1e-3)
    assert event.finding.threshold == pytest.approx(limit, abs=0.03)  # and the noise floor of 50,000 assignments


def test_layers_have_the_model_s_numbers():
    change = lambda m: {"router/dropped_fraction": np.array([0.1, 0.1, 0.5])}  # noqa: E731
    (event,) = run(config(model=dict(mtp_layers=1)), FAULT, change, lambda _: True)
    assert "the layer of model.mtp_layers dropped" in event.sentence()


def test_every_action_of_the_config_is_one_of_three():
    actions = [field.name for field in dataclasses.fields(GuardsConfig) if isinstance(field.default, str)]
    assert sorted(actions) == sorted([*GUARDS, "stall", "disk"])
    for name in actions:
        for action in ACTIONS:
            assert getattr(GuardsConfig(**{name: action}), name) == action


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(disk="wran"), r"guards\.disk = 'wran' is unknown; did you mean 'warn'\?"),
        (dict(stall="never"), r"guards\.stall = 'never' is unknown; choose one of off, warn, stop\."),
        (dict(window=0), r"guards\.window = 0 must be greater than 0\."),
        (dict(stall_seconds=0.0), r"guards\.stall_seconds = 0\.0 must be greater than 0\."),
        (dict(skip_steps=-1), r"guards\.skip_steps = -1 must be 0 or more\."),
        (dict(loss_spike_deviations=float("nan")), r"guards\.loss_spike_deviations = nan must be 0 or more\."),
        (dict(dropped_fraction=30.0), r"guards\.dropped_fraction = 30\.0 must be between 0 and 1: it is a share of a whole\."),
    ],
    ids=str,
)
def test_a_setting_that_makes_no_sense_is_refused(fields, message):
    with pytest.raises(ConfigError, match=message):
        GuardsConfig(**fields)
