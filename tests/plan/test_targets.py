"""The compilers of devices that are not there: what their messages mean, what is refused without them, a verdict of each."""

import dataclasses
import importlib.util
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import topology as topologies

from moe_jax.config import Config, ConfigError
from moe_jax.ops.attention import choose_implementation
from moe_jax.plan import program, targets
from moe_jax.plan.memory import DOUBT, fits, memory
from moe_jax.plan.topology import abstract_mesh, described_mesh, parse

OUT = "RESOURCE_EXHAUSTED: Ran out of memory"
SMALL = f"{OUT} on HBM, the total memory required for HLO temporaries (23.30G) exceeds available HBM (15.75G)."
USED = f"{OUT} in memory space hbm. Used 98.10G of 95.74G hbm. Exceeded hbm capacity by 2.36G.\n\nTotal hbm usage >= 98.36G:\n  ..."


@pytest.mark.parametrize(("message", "gib"), [(SMALL, 23.30), (USED, 98.10), ("RESOURCE_EXHAUSTED: no more", 0)])
def test_a_refusal_says_what_is_needed(message, gib):
    refusal = targets.refused_for_memory(message)
    assert refusal == message.splitlines()[0]
    assert targets.needed_bytes(refusal) == round(gib * 2**30)


def test_another_failure_is_no_refusal():
    assert targets.refused_for_memory("INTERNAL: Mosaic failed to compile") == ""


@pytest.mark.parametrize(("name", "package"), [("v5p:2x2x1", "libtpu"), ("h100:8", "jax_cuda13_plugin")])
def test_a_compiler_that_is_not_installed_is_asked_for_in_the_version_of_jax(monkeypatch, name, package):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(ConfigError, match=f"needs {package}: pip install .*=={jax.__version__}"):
        targets.devices(parse(name))


def test_a_cpu_has_no_compiler_to_ask():
    with pytest.raises(ConfigError, match="'cpu:8' has no compiler of its own to ask; use --depth=jaxpr"):
        targets.devices(parse("cpu:8"))


@pytest.mark.parametrize("depth", ["jaxpr", "gpu", "tpu"])
def test_each_depth_says_what_it_cannot_know(depth):
    sentences = targets.UNKNOWN[depth]
    assert len(sentences) >= 2
    assert all(sentence.endswith(".") for sentence in sentences)


@pytest.mark.parametrize(("device_kind", "platform"), [("NVIDIA H100 80GB HBM3", "cuda"), ("TPU v5", "tpu")])
def test_attention_for_a_device_that_is_not_there_is_xlas(device_kind, platform):
    """cuDNN's cannot even be traced without cuDNN; and where a GPU is the default, a TPU's program must not get it."""
    with jax.sharding.use_abstract_mesh(described_mesh(device_kind, platform, data=1)):
        assert choose_implementation("auto", jnp.bfloat16, 64) == "xla"
        with pytest.raises(ConfigError, match="none is here" if platform == "cuda" else "the platform is 'tpu'"):
            choose_implementation("cudnn", jnp.bfloat16, 64)


def test_attention_goes_by_the_mesh_and_not_by_the_default_backend(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    for device_kind, platform, chosen in (("TPU v5", "tpu", "xla"), ("NVIDIA H100 80GB HBM3", "cuda", "cudnn")):
        with jax.sharding.use_abstract_mesh(described_mesh(device_kind, platform, data=1)):
            assert choose_implementation("auto", jnp.bfloat16, 64) == chosen


def small(width: int = 512, layers: int = 2) -> Config:
    """A model of MoE layers alone, wide enough for the chips' tiles to be full."""
    config = tiny.config("mixtral", "fsdp 2 expert 2 tensor 2", remat="full", num_shared_experts=0, first_dense=0, d_ff=width)
    attention = dataclasses.replace(config.model.attention, num_heads=width // 128, num_kv_heads=2, head_dim=128)
    model = dataclasses.replace(
        config.model, d_model=width, num_layers=layers, vocab_size=1024, dtype="bfloat16", attention=attention
    )
    return dataclasses.replace(config, model=model, data=dataclasses.replace(config.data, batch_size=8, seq_len=256))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "depth"), [("h100:8", "gpu"), ("v5e:2x4", "tpu")])
def test_a_small_step_has_a_verdict(name, depth):
    config, topology = small(), parse(name)
    topologies.devices(name)  # fails the test in a sentence where the compiler is missing
    found = targets.verdict(program.trace(config, targets.device_mesh(config, topology)), topology, quick=True)
    estimate = memory(program.trace(config, abstract_mesh(config, topology)), topology)
    assert (found.depth, found.fits, found.refusal) == (depth, True, "")
    assert found.unknown == targets.UNKNOWN[depth]
    at_rest = estimate.parameters + estimate.router_state + estimate.optimizer + estimate.batch
    assert found.arguments == pytest.approx(at_rest, rel=0.01)  # padding on TPUs
    assert found.total == found.arguments + found.outputs + found.temporaries + found.code
    assert found.peak <= found.total
    assert found.outputs < 1e6  # the state takes its own place
    assert estimate.total == pytest.approx(found.peak, rel=2 * DOUBT)  # of a program so small that what is small counts


@pytest.mark.slow
def test_a_gpus_compiler_refuses_nothing_so_that_the_verdict_must():
    topology = parse("h100:8")
    topologies.devices(topology.text)
    little = dataclasses.replace(topology, chip=dataclasses.replace(topology.chip, memory=10**6))
    found = targets.verdict(program.trace(small(layers=1), targets.device_mesh(small(layers=1), little)), little)
    assert found.compiled is not None
    assert not found.fits


@pytest.mark.slow
def test_what_cannot_fit_is_refused_by_the_plan_and_by_the_tpus_compiler():
    config, topology = small(width=16384), parse("v5e:2x4")
    topologies.devices(topology.text)
    estimate = memory(program.trace(config, abstract_mesh(config, topology)), topology)
    assert not fits(estimate, topology.chip).fits
    found = targets.verdict(program.trace(config, targets.device_mesh(config, topology)), topology, quick=True)
    assert not found.fits
    assert found.compiled is None
    assert "RESOURCE_EXHAUSTED" in found.refusal
    assert found.total > topology.chip.memory


@pytest.mark.slow
def test_a_mesh_that_splits_a_physical_axis():
    """`topologies.make_mesh` cannot; 4 x 2 of a 2 x 2 x 2 torus, whose devices are all there once."""
    topologies.devices("v5p:2x2x2")
    config = tiny.config("mixtral", "data 2 expert 4")
    mesh = targets.device_mesh(config, parse("v5p:2x2x2"))
    assert mesh.devices.shape == (2, 1, 1, 4, 1)
    assert len({device.id for device in mesh.devices.flat}) == 8
    assert os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] == "1"  # several tests at once
    assert np.all([device.platform == "tpu" for device in mesh.devices.flat])
