"""The inference benchmark: its rivals, its counts against arithmetic by hand, its sentences and its picture. Nothing is timed."""

import itertools
import json

import jax
import numpy as np
import pytest
from absl import flags
from absl.testing import flagsaver

from launch import bench as program
from moe_jax.analysis import bench_inference as bench
from moe_jax.analysis import bench_inference_comm, bench_inference_peer
from moe_jax.analysis.inference_plot import save_inference_plot
from moe_jax.analysis.inference_reading import reading
from moe_jax.analysis.program_bytes import program_bytes, traffic
from moe_jax.config import Config, MeshConfig
from moe_jax.mesh import make_mesh
from moe_jax.models.generator import Generator
from moe_jax.models.inference_weights import lay_out_for_inference
from moe_jax.models.transformer import build
from moe_jax.sizes import num_params

MOE = bench.Experts(8, 2, 1024)
SMALL = bench.Sizes(
    moes=(MOE,),
    batches=(1, 32),
    prompt=16,
    context=16,
    d_model=64,
    layers=1,
    heads=4,
    kv_heads=2,
    head_dim=16,
    vocabulary=32,
    stream_megabytes=1,
    matmul=32,
    most_steps=1,
)
EXPERT = 4 * 3 * 64 * 1024  # bytes of one expert


@pytest.fixture(scope="module")
def measured():
    return bench.rows(SMALL, repeats=1)


@pytest.mark.parametrize("sizes", [*bench.SIZES.values(), SMALL])
def test_the_dense_rivals_have_the_active_and_the_total_width(sizes):
    for moe in sizes.moes:
        mixture = num_params(sizes.model(moe))
        active, total = (num_params(sizes.model(width)) for width in bench.rivals(moe))
        assert active.total == mixture.active - mixture.router
        assert total.total == mixture.total - mixture.router


@pytest.mark.parametrize("sizes", bench.SIZES.values(), ids=bench.SIZES)
def test_the_sizes_make_valid_configs(sizes):
    """A prompt is a bucket of its own; the text that is decoded has room for the default repeats."""
    Config(model=sizes.model(sizes.moes[0]))
    assert sizes.prompt & (sizes.prompt - 1) == 0
    assert sizes.context > 4 + 9 * sizes.most_steps


@pytest.mark.parametrize(("tokens", "expected"), [(1, 2), (2, 3.5), (3, 8 - 8 * 27 / 64)])
def test_distinct_experts_of_random_choices(tokens, expected):
    assert bench.expected_distinct(MOE, tokens) == pytest.approx(expected)


def test_distinct_experts_are_counted_by_layer_and_step():
    load_SLE = np.array([[[2, 0, 0], [1, 1, 0]], [[1, 1, 1], [0, 2, 1]]])
    assert bench.distinct_experts(load_SLE) == (1 + 2 + 3 + 2) / 4
    assert bench.distinct_experts(np.zeros((4, 0, 0))) == 0


def test_rows_of_small_models(measured):
    by = {(row["model"], row["phase"], row["batch"]): row for row in measured}
    assert list(by) == [
        (model, phase, batch)
        for phase, batch in (("decode", 1), ("decode", 32), ("prefill", 1))
        for model in ("moe", "dense_active", "dense_total")
    ]
    for (model, phase, batch), row in by.items():
        tokens = 16 if phase == "prefill" else batch
        assert row["tokens_per_second"] == pytest.approx(tokens / (1e-3 * row["milliseconds"]))
        assert row["bytes_per_token"] >= 0.99 * row["needed_bytes_per_token"]
        for rival in ("dense_active", "dense_total"):
            ratio = row["milliseconds"] / by[rival, phase, batch]["milliseconds"]
            assert row[f"ratio_to_{rival}"] == pytest.approx(ratio)  # one repeat
        assert (row["distinct_experts"] is None) == (model != "moe")
        assert row["ratio_to_roofline"] > 0
    assert by["moe", "decode", 1]["distinct_experts"] == 2
    assert 7 < by["moe", "decode", 32]["distinct_experts"] <= 8


@pytest.mark.parametrize(("model", "experts"), [("moe", 2), ("dense_active", 2), ("dense_total", 8)])
def test_bytes_of_a_step_are_those_of_the_weights_that_are_used(measured, model, experts):
    """At batch 1; a dense model's network is as large as so many experts. Beside them: a tenth at most."""
    (row,) = (row for row in measured if (row["model"], row["phase"], row["batch"]) == (model, "decode", 1))
    attention = 4 * (64 * 64 + 2 * 64 * 32 + 64 * 64)
    head, norms, router, cache = 4 * 64 * 32, 4 * 3 * 64, 4 * 64 * 8 * (model == "moe"), 4 * 2 * 2 * 16 * 16
    by_hand = experts * EXPERT + attention + head + norms + router + cache
    assert row["needed_bytes_per_token"] == by_hand
    assert by_hand < row["bytes_per_token"] < 1.1 * by_hand


def test_no_expert_is_copied_at_batch_1():
    """Nothing that the step writes is as large as a weight matrix of an expert, and what it reads of experts are those that are chosen."""
    mesh = make_mesh(Config(model=SMALL.model(MOE), mesh=MeshConfig(data=1)), jax.devices()[:1])
    with jax.set_mesh(mesh):
        weights = build(SMALL.model(MOE), 0)[1:]
    model = lay_out_for_inference(SMALL.model(MOE), *weights, mesh)
    generator = Generator(model, vocab_size=32, rows=1, max_length=16)
    text = bench.step_text(generator)
    assert max(item.written for item in traffic(text, loop_trips=2)) < EXPERT / 3
    one, two = (program_bytes(text, loop_trips=trips) for trips in (1, 2))
    assert EXPERT < two - one < 1.05 * EXPERT  # and its activations


def test_bytes_between_devices():
    """Of 8 experts one a device: of all pairs of them, three in four have none at home or one, and 7 devices have 2 of 8 - that is 1.75."""
    pairs = list(itertools.combinations(range(8), 2))
    away = np.mean([len(set(pair) - {0}) for pair in pairs])
    sizes = SMALL._replace(batches=(1, 8))
    rows = bench_inference_comm.rows(sizes)
    assert {(row["experts"], row["batch"]) for row in rows} == {("8x2", 8)}
    (exchange,) = (row for row in rows if row["collective"] == "all-to-all")
    assert exchange["needed_bytes_per_token"] == 2 * away * 64 * 4
    # room for the worst case: each of the 7 others may get the token and answers it; with a row go words
    assert 2 * 7 * 64 * 4 <= exchange["bytes_per_token"] < 1.1 * 2 * 7 * 64 * 4
    (gather,) = (row for row in rows if row["collective"] == "all-gather")
    assert gather["bytes_per_token"] == 7 * 32 * 4  # every device draws every row


def rows_by_hand(speeds):
    """Rows of 8 experts whose decoding is so many times as fast as the larger dense model's, by batch."""
    made = []
    for (batch, speed), model in itertools.product(speeds.items(), ("moe", "dense_active", "dense_total")):
        time = {"moe": 8 / speed, "dense_active": 2.0, "dense_total": 8.0}[model]
        row = {"experts": "8x2", "model": model, "batch": batch, "phase": "decode", "milliseconds": time}
        row |= {"milliseconds_min": 0.9 * time, "milliseconds_max": 1.1 * time, "distinct_experts": 8 - 6 / batch}
        row |= {
            "bytes_per_token": time,
            "needed_bytes_per_token": 100 / batch,
            "flops_per_token": 10.0,
            "bandwidth": 1.0,
            "peak": 1.0,
        }
        row |= {
            "ratio_to_roofline": 0.5,
            "parameters": 80_000_000,
            "active": 20_000_000,
            "tokens_per_second": 1e3 * batch / time,
        }
        for rival, of_rival in (("dense_active", 2.0), ("dense_total", 8.0)):
            row |= {f"ratio_to_{rival}{end}": time / of_rival for end in ("", "_min", "_max")}
        made.append(row)
    return made


@pytest.mark.parametrize(
    ("speeds", "said"),
    [
        ({1: 4.0, 4: 2.0}, "4.00 at batch 1, 2.00 at batch 4; at least 1.5 times at every batch."),
        ({1: 4.0, 4: 1.2}, "less than 1.5 times at batch 4."),
        ({1: 4.0, 4: 1.2, 16: 0.8, 64: 3.0}, "less than 1.5 times at batches 4, 16, and slower at batch 16."),
    ],
)
def test_the_reading_says_where_the_advantage_ends(speeds, said):
    text = reading(rows_by_hand(speeds))
    assert said in text
    assert "2.0 at batch 1" in text
    assert "1.00 times the dense model of equal active parameters, 0.25 times that of equal total" in text


def test_the_reading_tells_memory_from_products():
    assert "waits for its weights at batches 1, 4, where" in reading(rows_by_hand({1: 4.0, 4: 2.0, 16: 2.0}))
    assert "waits for its weights at every batch" in reading(rows_by_hand({1: 4.0, 4: 2.0}))
    assert "waits for its products at every batch" in reading(rows_by_hand({16: 2.0}))


@flagsaver.flagsaver
def test_the_program_writes_tables_picture_and_sentences(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    rows = rows_by_hand({1: 4.0, 16: 1.2, 64: 3.0})
    sent = {"experts": "8x2", "batch": 16, "collective": "all-to-all", "axis": "expert", "bytes_per_device": 4}
    sent = [sent | {"bytes_per_token": 2.0, "needed_bytes_per_token": 1.0}]
    monkeypatch.setattr(bench, "rows", lambda repeats: rows)
    monkeypatch.setattr(bench_inference_comm, "rows_elsewhere", lambda: sent)
    monkeypatch.setattr(bench_inference_peer, "rows", lambda repeats: [{"model": "m", "repeats": repeats}])
    flags.FLAGS(["bench", f"--out={tmp_path}", "--repeats=3"])
    program.main("inference")
    report = json.loads((tmp_path / "inference.json").read_text())
    assert (report["rows"], report["communication"]) == (rows, sent)
    assert "over 8 devices, batch 16: the exchange sends" in capsys.readouterr().out
    flags.FLAGS(["bench", f"--out={tmp_path}", "--repeats=3", "--peer=transformers"])
    program.main("inference")
    assert json.loads((tmp_path / "inference_transformers.json").read_text())["rows"] == [{"model": "m", "repeats": 3}]
    assert json.loads((tmp_path / "inference.json").read_text()) == report


def test_the_picture_has_a_line_of_panels_for_each_mixture(tmp_path):
    image = pytest.importorskip("matplotlib.image")
    rows = rows_by_hand({1: 4.0, 16: 1.2, 64: 3.0})
    save_inference_plot(rows, tmp_path / "one.png")
    save_inference_plot(rows + [row | {"experts": "64x8"} for row in rows], tmp_path / "two.png")
    one, two = (image.imread(tmp_path / name) for name in ("one.png", "two.png"))
    assert one.shape[1] == two.shape[1]
    assert two.shape[0] > 1.5 * one.shape[0]
    assert one[..., :3].std() > 0.05


@pytest.mark.slow
@pytest.mark.parametrize("shape", bench_inference_peer.SHAPES, ids=lambda shape: shape.family)
def test_both_sides_write_the_same_text(shape, tmp_path):
    sizes = tuple((name, 32 if name.endswith("intermediate_size") else value) for name, value in shape.sizes)
    shape = shape._replace(sizes=sizes, hidden_size=64, heads=4, layers=2, vocabulary=64, prompt=4, new_tokens=8)
    folder = str(tmp_path)
    bench_inference_peer.write_checkpoint(shape, folder)
    ours = bench_inference_peer.make_call(shape, folder, 3)()
    assert ours.shape == (3, 8)
    for experts in bench_inference_peer.EXPERTS:
        np.testing.assert_array_equal(bench_inference_peer.peer_call(shape, folder, 3, experts)(), ours)


@pytest.mark.slow
def test_rows_beside_the_peer():
    shape = bench_inference_peer.SHAPES[0]
    sizes = tuple((name, 32 if name.endswith("intermediate_size") else value) for name, value in shape.sizes)
    shape = shape._replace(sizes=sizes, hidden_size=64, heads=4, layers=1, vocabulary=64, prompt=4, new_tokens=8)
    (row,) = bench_inference_peer.rows(1, [shape], [2])
    assert (row["model"], row["batch"]) == ("Mixtral 8x2", 2)
    assert row["ratio"] == pytest.approx(row["tokens_per_second"] / row["peer_tokens_per_second"])
    assert row["peer_experts"] in bench_inference_peer.EXPERTS
