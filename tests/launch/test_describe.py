"""The table of a config: what it says, and that what travels to the experts is what the exchange sends."""

import importlib
import itertools
import subprocess
from dataclasses import replace
from fractions import Fraction

import jax
import numpy as np
import pytest
import tiny
import tiny_run
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from meshes import mesh_of

from configs import base
from moe_jax.analysis.describe import describe, expected_copies, travels
from moe_jax.config import ConfigError, MoEConfig, RouterConfig, from_dict
from moe_jax.layers.moe import MoE
from moe_jax.mesh import BATCH_AXES
from moe_jax.routing import make_router


def published(name, arg=""):
    return from_dict(importlib.import_module(f"configs.published.{name}").get_config(arg))


def lines(config, name="it"):
    return [line.strip() for line in describe(name, config).splitlines()]


def row(config, label):
    """The row that begins with `label`, without it."""
    (found,) = [line[len(label) :].split() for line in lines(config) if line.startswith(label)]
    return found


def test_mixtral_as_a_user_sees_it():
    """Where JAX would find no device: none is asked for."""
    command = tiny_run.command("describe", "--config=configs/published/mixtral_8x7b.py:h100-64")
    command["env"] |= {"JAX_PLATFORMS": "nowhere"}
    done = subprocess.run(**command, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert "WARNING" not in done.stderr
    assert done.stdout.startswith("mixtral_8x7b:h100-64: 32 layers of width 4096, 32 query and 8 key/value heads")
    assert "8 experts in 32 of the layers, 2 a token, router mixtral" in done.stdout
    for figure in (
        "46,702,792,704",
        "12,879,925,248",
        "12,748,853,248",
        "131,072 B",
        "174.0 GiB",
        "87.0 GiB",
        "43.5 GiB",
        "32.0 KiB",
    ):
        assert figure in done.stdout, figure


@pytest.mark.slow
def test_changes_on_the_command_line_and_help():
    done = tiny_run.program(
        "describe", "--config=configs/base.py", "--config.model.vocab_size=384", "--config.model.num_layers=2"
    )
    assert done.stdout.startswith("base: 2 layers of width 128"), done.stderr
    assert "python -m launch.describe" in tiny_run.program("describe", "--help").stdout.splitlines()[0]


def test_no_vocabulary_is_refused_in_one_sentence():
    done = tiny_run.program("describe", "--config=configs/base.py", "--config.data.tokenizer=gpt2")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: model.vocab_size = 0 stands for that of data.tokenizer = 'gpt2'")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(("tokenizer", "size"), [("bytes", 384), ("bpe", 1024)])
def test_the_vocabulary_of_a_tokenizer_that_needs_no_file(tokenizer, size):
    config = from_dict({"data": {"tokenizer": tokenizer, "bpe_vocab_size": 1000}})
    assert f"vocabulary {size:,};" in describe("base", config)


def test_parts_of_deepseek_v3():
    v3 = published("deepseek_v3")
    assert row(v3, "total")[0] == "671,026,404,352"
    assert row(v3, "routed experts") == ["653,908,770,816", "97.4%"]
    assert row(v3, "beside them: balancing bias") == ["14,848"]
    assert row(v3, "beside them: predicts one token more") == ["11,610,067,968"]
    assert row(v3, "key/value cache in bfloat16")[0] == "70,272"
    assert "latent attention of 128 heads" in describe("v3", v3)


def test_a_window_bounds_its_layers_cache():
    oss = published("gpt_oss_120b")
    assert row(oss, "key/value cache in bfloat16")[:2] == ["36,864", "B"]
    assert row(oss, "in layers with a window") == ["36,864", "B", "until", "128", "tokens,", "4.5", "MiB"]


def test_a_tied_table_and_a_dense_model():
    grok, llama = lines(published("grok_1")), lines(published("llama3_8b"), "llama")
    assert not any(line.startswith(("head", "active without")) for line in grok)
    assert llama[0].endswith("; dense")
    assert not any("expert" in line for line in llama if not line.startswith("dense FFN"))
    assert row(published("llama3_8b"), "active, of a token")[0] == "8,030,261,248"


def test_what_each_device_holds():
    """Experts are split over all 64 devices, the rest over fsdp alone, 8 of them; AdamW holds 12 bytes a parameter."""
    own = 45_097_156_608 / 64 + (46_702_792_704 - 45_097_156_608 - 1_048_576 - 266_240) / 8 + 1_048_576 + 266_240
    shown = row(published("mixtral_8x7b", "h100-64"), "with AdamW, on each of 64 devices")
    assert float(shown[0]) == pytest.approx(12 * own / 2**30, abs=0.06)
    assert shown[2:] == ["fsdp", "8", "x", "expert", "8"]


# papers' figures: bytes a token and layer, forward, all choices leaving, in bfloat16
@pytest.mark.parametrize(
    ("name", "kib"),
    [
        ("mixtral_8x7b", 32),
        ("deepseek_v3", 224),
        ("qwen3_235b_a22b", 128),
        ("olmoe_1b_7b", 64),
        ("deepseek_moe_16b", 48),
        ("gpt_oss_120b", 45),
    ],
)
def test_all_choices_on_the_wire(name, kib):
    config = published(name)
    shown = row(config, f"{config.model.moe.router.top_k} rows, bfloat16 out and bfloat16 home")
    assert shown[:2] == [f"{kib:.1f}", "KiB"]


def test_no_way_to_the_experts_where_it_depends_on_the_batch():
    config = from_dict(
        base.get_config("model.vocab_size=384,model.moe.router.name=expert_choice,model.moe.router.allow_noncausal=True")
    )
    assert not any(line.startswith("all-to-all") for line in lines(config))
    assert any(line.startswith("all-to-all") for line in lines(published("mixtral_8x7b")))


def model_of(router, **moe):
    moe = MoEConfig(num_experts=8, d_ff=4, num_shared_experts=0, router=router, **moe)
    return replace(tiny.config().model, d_model=4, moe=moe)


LEVELS = [{"expert": 8}, {"expert": 4}, {"expert": 2}, {"expert_outer": 2, "expert": 2}, {"expert_outer": 2, "expert": 4}]


@pytest.mark.parametrize("sizes", LEVELS, ids=str)
@pytest.mark.parametrize("top_k", [1, 3])
@pytest.mark.parametrize("send_once", [True, False])
def test_rows_by_counting_every_choice(sizes, top_k, send_once):
    """All sets of K of 8 experts, of a token on each device: who hears of it over the first axis, and then over the second."""
    model = model_of(RouterConfig("mixtral", top_k, {"normalize": "before"}), send_once=send_once)
    inner = sizes["expert"]
    local = 8 // (inner * sizes.get("expert_outer", 1))
    once = set if send_once else list
    sent = dict.fromkeys(sizes, 0)
    choices = list(itertools.combinations(range(8), top_k))
    homes = list(itertools.product(range(sizes.get("expert_outer", 1)), range(inner)))
    for chosen in choices:
        places = [divmod(expert // local, inner) for expert in chosen]
        for outer, mine in homes:
            if "expert_outer" in sizes:
                sent["expert_outer"] += sum(there != outer for there in once(group for group, _ in places))
            sent["expert"] += sum(device != mine for _, device in once(places))
    found = {axis: rows for axis, rows, _ in travels(model, sizes)}
    assert found == pytest.approx({axis: rows / len(choices) / len(homes) for axis, rows in sent.items()})


@pytest.mark.parametrize("num_local", [1, 2, 4, 6])
@pytest.mark.parametrize("open_groups", [1, 2, 3])
def test_copies_where_a_token_is_kept_to_some_groups(num_local, open_groups):
    """12 experts in 6 groups: all sets of groups, all pairs of their experts; how often one is among the first `num_local`."""
    options = {"num_groups": 6, "top_groups": open_groups}
    router = make_router(RouterConfig("deepseek", 2, options), 12)
    hits = []
    for chosen in itertools.combinations(range(6), open_groups):
        experts = [2 * group + i for group in chosen for i in range(2)]
        hits += [any(expert < num_local for expert in pair) for pair in itertools.combinations(experts, 2)]
    assert expected_copies(router, num_local, send_once=True) == Fraction(sum(hits), len(hits))
    assert expected_copies(router, num_local, send_once=False) == Fraction(2 * num_local, 12)


def test_copies_beside_null_experts():
    """2 choices among 4 experts and 2 that are nowhere: of 15 pairs, 9 have one of the first two experts."""
    router = make_router(RouterConfig("zero_experts", 2, {"num_zero": 2, "num_copy": 0, "num_constant": 0}), 4)
    assert expected_copies(router, 2, send_once=True) == Fraction(9, 15)
    assert expected_copies(router, 2, send_once=False) == Fraction(2 * 2, 6)


@pytest.mark.parametrize(
    ("sizes", "more"),
    [
        ({"expert": 4}, {"dispatch_wire": "int8"}),
        ({"expert": 4}, {"send_once": False, "combine_wire": "bfloat16"}),
        ({"expert_outer": 2, "expert": 2}, {}),
    ],
    ids=str,
)
def test_bytes_are_those_that_the_exchange_counts(sizes, more):
    """2,048 tokens at random through the layer, exactly what there is being sent."""
    model = model_of(RouterConfig("random", 3), exchange="ragged", **more)
    mesh = mesh_of(**sizes)
    x_BSD = np.random.default_rng(0).normal(size=(8, 256, 4)).astype(np.float32)
    with jax.set_mesh(mesh):
        layer = MoE.standalone(4, model.moe, rngs=nnx.Rngs(0))
        _, aux = nnx.jit(lambda layer, x: layer(x))(layer, jax.device_put(x_BSD, NamedSharding(mesh, P(BATCH_AXES))))
    expected = sum(num_bytes for _, _, num_bytes in travels(model, sizes))
    assert float(aux.stats.bytes_sent) / 2048 == pytest.approx(expected, rel=0.02)


def test_the_mesh_must_fit():
    with pytest.raises(ConfigError, match=r"num_experts = 8 is not a multiple of mesh\.expert = 3"):
        describe("it", published("mixtral_8x7b", "mesh.data=1,mesh.expert=3,data.batch_size=3"))
