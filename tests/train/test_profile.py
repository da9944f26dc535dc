"""The trace of some steps, the names of phases in the program, the account of memory and time."""

import dataclasses
import gzip
import json
import re

import jax
import jax.numpy as jnp
import pytest
import tiny
import tiny_run
from meshes import mesh_of

from moe_jax.config import Config, ConfigError, ProfileConfig, TrainConfig
from moe_jax.mesh import shard_batch
from moe_jax.models.transformer import abstract
from moe_jax.train import loop, profile, run
from moe_jax.train.clock import Clock
from moe_jax.train.optimizer import make_optimizer
from moe_jax.train.state import TrainState
from moe_jax.train.step import make_train_step


def config_of(steps, workdir=""):
    return Config(workdir=workdir, train=TrainConfig(steps=50), profile=ProfileConfig(steps))


@pytest.mark.parametrize(("text", "window"), [("", None), ("10:13", (10, 13)), ("7", (7, 7)), ("1:50", (1, 50))])
def test_the_window_has_both_its_ends(text, window):
    assert profile.window(config_of(text)) == window


@pytest.mark.parametrize("text", ["ten", "3:", ":3", "-1:3", "1:2:3", "1,2", "1.5", "٣", " 1:2"])
def test_what_is_no_window_is_refused(text):
    with pytest.raises(ConfigError, match=rf"profile\.steps = {re.escape(repr(text))} is no FIRST:LAST; give two steps"):
        run.check(config_of(text))


@pytest.mark.parametrize("text", ["0:3", "4:3", "49:51", "51"])
def test_a_window_outside_the_run_is_refused(text):
    with pytest.raises(ConfigError, match=rf"profile\.steps = '{text}' is not within the run: .* <= train\.steps = 50"):
        run.check(config_of(text))


@pytest.fixture(scope="module", params=[("all_to_all", "dropless"), ("all_gather", "einsum")], ids=" ".join)
def names(request):
    """The names of a train step's operations that profilers show, as the lowered program has them, on 8 devices."""
    exchange, dispatch = request.param
    config = tiny.config("mixtral", "data 2 expert 4", exchange=exchange, dispatch=dispatch)
    mesh = mesh_of(data=2, expert=4)
    with jax.set_mesh(mesh):
        state = run.abstract_state(config, mesh)
        optimizer = make_optimizer(config.optimizer, config.train.steps, state.params)
        step = make_train_step(config, abstract(config.model)[0], optimizer)
        text = step.lower(state, shard_batch(mesh, tiny.batch()), jax.random.key(0)).as_text(debug_info=True)
    return set(re.findall(r'loc\("([^":]*)"\(', text))  # with a colon: of a reduction's arguments


def test_operations_are_under_the_name_of_their_phase(names):
    assert {phase for phase in profile.PHASES if any(f"{phase}/" in name for name in names)} == set(profile.PHASES)
    assert any(name.startswith("experts/") and ("while" in name or "dot_general" in name) for name in names)


def test_no_collective_of_rows_is_without_the_name_of_the_exchange(names):
    """Forward and backward."""
    operations = r"(all_to_all|all_gather|psum_scatter|reduce_scatter)\w*"
    collectives = {name for name in names if re.fullmatch(rf"(.*/)?{operations}", name)}
    assert collectives
    assert {name for name in collectives if "exchange/" not in name} == set()


def test_bytes_are_counted_whole_and_on_a_device():
    mesh = mesh_of(data=2, expert=4)
    with jax.set_mesh(mesh):
        split = jax.device_put(jnp.zeros((8, 128)), jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("expert")))
        whole = jax.device_put(jnp.zeros(256), jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec()))
    state = TrainState(whole, {"w": split, "b": whole}, {}, (split, split))
    line = profile.state_memory(state)
    assert line == "memory  parameters 5.0 KiB (2.0 KiB on a device), optimizer 8.0 KiB (2.0 KiB on a device)"


class Counting:
    """Stands for a jitted step; counts compilations."""

    def __init__(self):
        self.compiled, self.step = 0, jax.jit(lambda state, batch, key: (state + 1, {"loss": state}))

    def lower(self, *arguments):
        self.compiled += 1
        return self.step.lower(*arguments)

    def __call__(self, *arguments):
        return self.step(*arguments)


def test_the_steps_asked_for_are_traced_and_compiled_once(tmp_path, capsys):
    step = Counting()
    with profile.TracedStep(step, config_of("4:5", str(tmp_path)), start=2) as traced:
        state = jnp.zeros(())
        for _ in range(5):  # steps 3 to 7
            state, _ = traced(state, {}, jax.random.key(0))
    assert float(state) == 5
    assert step.compiled == 1
    (trace,) = tmp_path.glob("profile/plugins/profile/*/*.trace.json.gz")
    assert list(tmp_path.glob("profile/plugins/profile/*/*.xplane.pb"))
    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    numbers = {str(event["args"]["step_num"]) for event in events if "step_num" in event.get("args", {})}
    assert numbers == {"4", "5"}
    printed = capsys.readouterr().out
    assert f"traced to step 5: tensorboard --logdir={tmp_path}/profile" in printed
    assert re.search(r"program .* on a device: .* of arguments, .* of results \(.*\), .* in between", printed)


def test_an_error_within_the_window_ends_the_trace(tmp_path):
    def fail():
        with profile.TracedStep(Counting(), config_of("1:9", str(tmp_path)), 0) as traced:
            traced(jnp.zeros(()), {}, jax.random.key(0))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    jax.profiler.start_trace(tmp_path / "another")  # would refuse while one is open
    jax.profiler.stop_trace()


def test_a_window_that_is_over_traces_nothing(tmp_path, capsys):
    with profile.TracedStep(Counting(), config_of("4:5", str(tmp_path)), start=5) as traced:
        traced(jnp.zeros(()), {}, jax.random.key(0))
    assert list(tmp_path.iterdir()) == []
    assert "nothing is traced: step 5 is done, and profile.steps = '4:5'" in capsys.readouterr().out


def test_without_a_window_the_step_is_called_as_it_is():
    step = Counting()
    with profile.TracedStep(step, config_of(""), 0) as traced:
        traced(jnp.zeros(()), {}, jax.random.key(0))
    assert step.compiled == 0


def test_the_clock_s_last_line_has_every_part():
    clock = Clock(tokens_per_step=10, step=0)
    for part in ("data", "compile", "step"):
        with clock.part(part):
            pass
    clock.seconds()  # of a log line: the totals stay
    line = clock.breakdown(1)
    for part in ("data", "compile", "step", "evaluate", "checkpoint"):
        assert re.search(rf"{part} \d+\.\d s \(\d+%\)", line)


@pytest.mark.slow
def test_a_run_leaves_its_trace(tmp_path, capsys):
    """And is the run that it would have been."""
    tiny_run.write_corpus(tmp_path)
    plain = tiny_run.config(tmp_path, "plain")
    loop.train(plain)
    loop.train(dataclasses.replace(plain, workdir=str(tmp_path / "traced"), profile=ProfileConfig("3:4")))
    tiny_run.assert_same_run(tmp_path / "traced", tmp_path / "plain")
    assert len(list((tmp_path / "traced").glob("profile/plugins/profile/*/*.xplane.pb"))) == 1
    printed = capsys.readouterr().out
    assert printed.count("memory  parameters ") == 2
    assert printed.count("program ") == 1
    assert len(re.findall(r"^time    .* s for 8 steps: ", printed, re.MULTILINE)) == 2
