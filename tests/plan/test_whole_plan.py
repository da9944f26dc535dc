"""A plan put together: what is printed and what is written are the same figures, and they add up."""

import dataclasses
import json

import pytest
import tiny
import tiny_run

from moe_jax.analysis.describe import show
from moe_jax.analysis.ledger import total_bytes
from moe_jax.config import ConfigError
from moe_jax.plan import plan, report, targets, topology
from moe_jax.sizes import flops_per_token

V5E = topology.parse("v5e:2x4")


@pytest.fixture(scope="module")
def made():
    return plan.plan(tiny.config("mixtral", "data 2 expert 4", model={"dtype": "bfloat16"}), V5E)


def test_the_table_has_every_part_and_the_sums(made):
    text = report.text(made, "tiny", "jaxpr", largest_batch=4096)
    assert text.startswith("tiny on v5e:2x4: 8 devices of 15.8 GiB, depth jaxpr\n  mesh data 2 x expert 4;")
    for part in (
        "parameters, float32",
        "kept for the backward pass",
        "exchange, forward: all-to-all over expert",
        "experts",
        "router",
    ):
        assert f"\n  {part}" in text, part
    assert any(line.split()[:1] == ["total"] and show(made.memory.total) in line for line in text.splitlines())
    assert "largest batch that fits: 4,096 rows" in text
    assert made.fit.sentence in text
    assert "perfectly balanced" in text
    for sentence in (*targets.UNKNOWN["jaxpr"], *report.UNKNOWN):
        assert sentence in text


def test_json_has_the_same_figures(made):
    figures = json.loads(json.dumps(report.as_json(made, "tiny", "jaxpr")))
    assert figures["memory"]["total"] == made.memory.total
    assert sum(e["bytes"] * e["executions"] for e in figures["collectives"]) == total_bytes(made.collectives)
    assert figures["flops"]["step"] == 3 * flops_per_token(made.config.model, tiny.SEQ_LEN) * tiny.SEQ_LEN * tiny.BATCH
    assert figures["mesh"] == {"data": 2, "expert_outer": 1, "fsdp": 1, "expert": 4, "tensor": 1}
    assert sum(link["seconds"] for link in figures["time"]["network"]) == pytest.approx(sum(made.time.network.values()))
    assert figures["fits"] is True


def test_what_does_not_fit_says_so():
    giant = tiny.config("mixtral", "data 2 expert 4", model={"d_model": 8192, "d_ff": 32768, "num_layers": 40})
    made = plan.plan(giant, V5E)
    assert not made.fits
    assert "does not fit" in report.text(made, "giant", "jaxpr")
    assert "not even one row a device" in report.text(made, "giant", "jaxpr", largest_batch=0)


def test_a_cpu_has_no_memory_of_its_own_and_no_data_sheet():
    made = plan.plan(tiny.config("mixtral", "data 2 expert 4"), topology.parse("cpu:8"))
    assert made.time is None
    assert made.fits
    text = report.text(made, "tiny", "jaxpr")
    assert "time of a step" not in text
    assert "fits" not in text
    assert report.as_json(made, "tiny", "jaxpr")["fits"] is None


@pytest.mark.parametrize(
    ("name", "changes", "sentence"),
    [
        ("v5e:2x4", {}, "compiles, and so fits: 10.0 GiB of 15.8 GiB"),
        ("v5e:2x4", {"fits": False, "refusal": "RESOURCE_EXHAUSTED: no room"}, "does not fit: RESOURCE_EXHAUSTED: no room"),
        ("h100:8", {}, "fits: 19.0 GiB of 74.5 GiB"),
        ("h100:8", {"fits": False, "total": 80 * 2**30}, "does not fit: 80.0 GiB of 74.5 GiB"),
    ],
)
def test_a_compilers_verdict_in_words(made, name, changes, sentence):
    """A TPU's goes by whether the program compiled: the sum of its parts may be more than the chip has."""
    chip, gib = topology.parse(name).chip, 2**30
    figures = {"arguments": 4 * gib, "outputs": 0, "temporaries": 15 * gib, "code": 0, "peak": 10 * gib, "total": 19 * gib}
    figures |= {"fits": True, "refusal": "", "memory": chip.memory, "seconds": 1.0, "unknown": (), "compiled": None}
    verdict = targets.Verdict(depth=chip.platform, **(figures | changes))
    text = report.text(dataclasses.replace(made, verdict=verdict), "tiny", chip.platform)
    assert f"\n  {sentence}\n" in text


@pytest.mark.parametrize(
    ("depth", "where", "sentence"),
    [
        ("tpu", "h100:1x8", "use --depth=jaxpr or --depth=gpu"),
        ("gpu", "v5p:2x2x2", "use --depth=jaxpr or --depth=tpu"),
        ("gpu", "cpu:8", "use --depth=jaxpr."),
        ("hlo", "cpu:8", "choose one of jaxpr, gpu, tpu"),
    ],
)
def test_a_depth_of_another_platform_is_refused(depth, where, sentence):
    with pytest.raises(ConfigError, match=sentence):
        plan.check_depth(depth, topology.parse(where))


@pytest.mark.parametrize("text", ["v5p", "v9:2x2", "v5p:4x4", "h100:2x2x2", "v5e:0x4", "cpu:2x4", "v5p:4x4x"])
def test_a_topology_that_is_none_is_refused(text):
    with pytest.raises(ConfigError, match=f"topology = '{text}'.*write e.g."):
        topology.parse(text)


def test_the_program_plans_writes_and_refuses(tmp_path):
    small = ("--config=configs/base.py:debug", "--config.mesh.data=2", "--config.mesh.expert=4")
    done = tiny_run.program("plan", *small, "--topology=v5e:2x4", f"--json={tmp_path}/plan.json", "--nolargest_batch")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("base:debug on v5e:2x4")
    assert json.loads((tmp_path / "plan.json").read_text())["topology"] == "v5e:2x4"
    done = tiny_run.program("plan", *small, "--topology=v5e:4x4")
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    done = tiny_run.program("plan", "search", *small, "--topology=cpu:8")
    assert done.returncode == 2
    assert done.stderr.startswith("error: topology = 'cpu:8' has no data sheet, and search goes by time")


@pytest.mark.slow
def test_the_program_searches():
    small = ("--config=configs/base.py:debug", "--config.data.batch_size=8", "--config.model.moe.num_experts=2")
    done = tiny_run.program("plan", "search", *small, "--topology=h100:2", "--keep=1")
    assert done.returncode == 0, done.stderr
    assert "1. step " in done.stdout
    flags = done.stdout.splitlines()[-1].split()
    again = tiny_run.program("plan", *small, *flags, "--topology=h100:2", "--nolargest_batch")
    assert again.returncode == 0, again.stderr
