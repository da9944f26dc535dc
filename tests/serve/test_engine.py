"""The engine over a generator that checks its use: every request gets its own answer, whatever happens to the others."""

import concurrent.futures
import contextlib
import threading

import numpy as np
import pytest
from fake_generator import FakeGenerator, letters, log_prob
from serving import SECONDS, until

from moe_jax.models.sampling import Sampling
from moe_jax.serve.engine import Engine, EngineError, QueueFullError, Request, Token
from moe_jax.serve.streams import Stream
from moe_jax.serve.warm_up import warm_up
from moe_jax.validation import RefusalError

STOP = ord("q")
GREEDY = Sampling(temperature=0.0)


@contextlib.contextmanager
def running(queue_size=64, **fake):
    generator = FakeGenerator(**fake)
    engine = Engine(generator, queue_size)
    yield engine, generator
    generator.go(10_000)
    engine.drain(SECONDS)


def request(prompt, max_tokens, sampling=GREEDY, stop=()):
    return Request(np.array(prompt, np.int32), max_tokens, sampling, frozenset(stop))


def answer(stream):
    """(tokens, end) of a stream of one request."""
    *tokens, (_, end) = stream
    return [event.token for _, event in tokens], end


def metric(engine, name, **labels):
    return engine.metrics.registry.get_sample_value(f"moe_jax_{name}", labels) or 0.0


def test_none_lost_none_mixed_up():
    """50 requests of mixed lengths from 50 threads over 4 rows; the first stop token ends an answer."""
    rng = np.random.default_rng(0)
    requests = [
        request(
            rng.integers(0, 256, rng.integers(1, 12)), int(rng.integers(1, 40)), Sampling(seed=i, temperature=i % 2), [STOP]
        )
        for i in range(50)
    ]
    with running(rows=4, max_length=64) as (engine, generator):
        with concurrent.futures.ThreadPoolExecutor(50) as pool:
            answers = list(pool.map(lambda request: answer(Stream(engine, [request])), requests))
        for asked, (tokens, end) in zip(requests, answers, strict=True):
            full = generator.expected(asked.prompt_T, asked.max_tokens, asked.sampling)
            stopped = STOP in full
            assert tokens == (full[: full.index(STOP)] if stopped else full)
            assert end == ("stop" if stopped else "length", len(tokens) + stopped, "")
        reasons = [end.reason for _, end in answers]
        assert {"stop", "length"} == set(reasons)
        for reason in ("stop", "length"):
            assert metric(engine, "requests_total", outcome=reason) == reasons.count(reason)
        drawn = sum(end.num_tokens for _, end in answers)
        assert metric(engine, "generated_tokens_total") == drawn
        assert metric(engine, "prompt_tokens_total") == sum(len(asked.prompt_T) for asked in requests)
        assert metric(engine, "first_token_seconds_count") == 50
        assert metric(engine, "token_seconds_count") == drawn - 50
        assert metric(engine, "rows_in_use") == metric(engine, "queue_length") == 0
        loads = [metric(engine, "expert_tokens_total", moe_layer="1", expert=str(e)) for e in range(4)]
        assert loads == generator.expert_load[1].tolist()
        assert sum(loads) == drawn
        assert not generator.live


def test_those_that_wait_enter_together():
    with running(rows=3, held=True) as (engine, generator):
        first = Stream(engine, [request([0], 2)])
        until(lambda: generator.live)
        rest = Stream(engine, [request([i], 3) for i in range(1, 6)])
        generator.go()
        until(lambda: len(generator.admitted) == 2)
        assert generator.admitted[1] == {row: [row + 1] for row in range(3)}  # the first has left its row, in order of arrival
        generator.go(100)
        assert answer(first)[0] == generator.expected([0], 2, GREEDY)
        got = {i: [] for i in range(5)}
        for index, event in rest:
            if isinstance(event, Token):
                assert event.log_prob == log_prob(event.token)
                got[index].append(event.token)
        assert got == {i: generator.expected([i + 1], 3, GREEDY) for i in range(5)}
        assert generator.steps < 2 * 5  # several rows a step


def test_cancelled_with_a_row_frees_it_at_the_next_step():
    with running(rows=1, held=True) as (engine, generator):
        gone = Stream(engine, [request([1], 40)])
        until(lambda: generator.live)
        waiting = Stream(engine, [request([2], 3)])
        gone.cancel(reason="stop")
        gone.cancel()  # comes too late to say why
        generator.go()  # the step under way
        until(lambda: len(generator.admitted) == 2)
        assert generator.steps == 1
        generator.go(100)
        assert answer(gone)[1][:2] == ("stop", 2)
        assert answer(waiting)[0] == generator.expected([2], 3, GREEDY)
        gone.cancel()
        assert metric(engine, "requests_total", outcome="stop") == 1
        assert metric(engine, "requests_total", outcome="cancelled") == 0


def test_cancelled_while_it_waits_leaves_at_once():
    with running(rows=1, queue_size=1, held=True) as (engine, generator):
        Stream(engine, [request([1], 2)])
        until(lambda: generator.live)
        waiting = Stream(engine, [request([2], 2)])
        with pytest.raises(QueueFullError):
            Stream(engine, [request([3], 2)])
        waiting.cancel()
        assert answer(waiting) == ([], ("cancelled", 0, ""))
        third = Stream(engine, [request([3], 2)])
        generator.go(100)
        assert answer(third)[0] == generator.expected([3], 2, GREEDY)
        assert [list(call.values()) for call in generator.admitted] == [[[1]], [[3]]]


def test_a_full_queue_takes_all_of_a_group_or_none():
    with running(rows=2, queue_size=1, held=True) as (engine, generator):
        with pytest.raises(QueueFullError, match=r"0 answers are under way, 4 more are asked for, and this server takes 3"):
            engine.submit([request([i], 2) for i in range(4)], lambda index, event: None)
        assert metric(engine, "queue_length") == 0
        assert metric(engine, "requests_total", outcome="refused") == 4
        group = Stream(engine, [request([i], 2) for i in range(3)])
        generator.go(100)
        assert len(list(group)) == 3 * 3


def test_what_no_row_can_hold_is_refused_alone():
    with running(max_length=8) as (engine, _), pytest.raises(RefusalError, match="shorten"):
        engine.submit([request([1], 2), request([1] * 7, 2)], lambda index, event: None)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_failing_generator_fails_what_it_has_and_says_so():
    with running(rows=2, fail_at=3) as (engine, _):
        with_row = [Stream(engine, [request([i], 30)]) for i in range(5)]
        for stream in with_row:
            _, end = answer(stream)
            assert end.reason == "failed"
            assert "FloatingPointError" in end.message
        until(lambda: engine.status == "failed")
        assert "restart" in engine.message
        with pytest.raises(EngineError, match="FloatingPointError"):
            Stream(engine, [request([9], 2)])
        assert metric(engine, "requests_total", outcome="failed") == 5
        assert engine.expert_load().shape == (2, 4)  # as last read; nobody waits for a thread that is gone


def test_logits_that_are_no_numbers_fail_one_request():
    with running(rows=2) as (engine, generator):
        admit = generator.admit
        generator.admit = lambda prompts, samplings: {
            row: (token, float("nan") if prompts[row][0] == 7 else log_prob)
            for row, (token, log_prob) in admit(prompts, samplings).items()
        }
        bad, good = Stream(engine, [request([7], 3)]), Stream(engine, [request([8], 3)])
        assert "not finite" in answer(bad)[1].message
        assert answer(good)[0] == generator.expected([8], 3, GREEDY)
        assert engine.status == "ready"


def test_a_drain_finishes_what_there_is_and_takes_no_more():
    with running(rows=1, held=True) as (engine, generator):
        streams = [Stream(engine, [request([i], 3)]) for i in range(3)]
        drain = threading.Thread(target=engine.drain, args=(SECONDS,))
        drain.start()
        until(lambda: engine.status == "draining")
        with pytest.raises(EngineError, match="shutting down"):
            Stream(engine, [request([9], 3)])
        generator.go(100)
        assert [answer(stream)[0] for stream in streams] == [generator.expected([i], 3, GREEDY) for i in range(3)]
        drain.join(SECONDS)
        assert engine.status == "stopped"


def test_a_drain_ends_what_does_not_finish_in_time():
    with running(rows=1, held=True) as (engine, generator):
        streams = [Stream(engine, [request([i], 30)]) for i in range(3)]
        until(lambda: generator.live)
        drain = threading.Thread(target=engine.drain, args=(0.0,))
        drain.start()
        until(lambda: engine.status == "draining")
        generator.go()
        for stream in streams:
            assert answer(stream)[1].message.startswith("the server is shutting down")
        drain.join(SECONDS)
        assert engine.status == "stopped"


def test_a_drain_does_not_wait_for_a_step_that_hangs(monkeypatch):
    monkeypatch.setattr("moe_jax.serve.engine.GRACE_SECONDS", 0.01)
    with running(rows=1, held=True) as (engine, generator):
        stream = Stream(engine, [request([1], 30)])
        until(lambda: generator.live)
        engine.drain(0.0)
        assert answer(stream)[1].reason == "cancelled"


def test_sampled_answers_are_of_their_seed():
    with running() as (engine, generator):
        samplings = [Sampling(seed=1), Sampling(seed=2), GREEDY]
        answers = [answer(Stream(engine, [request([5], 9, sampling)]))[0] for sampling in samplings]
        assert answers == [letters([5], sampling, generator.max_length, 257)[:9] for sampling in samplings]
        assert answers[0] != answers[1] != answers[2]


@pytest.mark.parametrize("max_length", [3, 16, 21])
def test_warming_up_runs_every_bucket_and_leaves_nothing(max_length):
    generator = FakeGenerator(rows=3, max_length=max_length)
    warm_up(generator)
    assert not generator.live
    assert not generator.expert_load.any()
    assert generator.steps
    seen = {(len(call), len(call[0])) for call in generator.admitted}
    lengths = {2**i for i in range(10) if 2**i < max_length} | {max_length - 1}
    assert seen == {(rows, length) for rows in (1, 2, 3) for length in lengths}
