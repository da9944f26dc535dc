"""What a config is before anything runs: parameters, FLOPs, caches, bytes at rest and on the wire. No array, no device.

Parameters are counted off the model's own arrays, which are shapes only (`jax.eval_shape`), not by the formulas of `moe_jax.sizes`.
"""

import math
import operator
from collections.abc import Mapping, Sequence
from fractions import Fraction

import jax

from moe_jax.config import Config, ConfigError, ModelConfig
from moe_jax.data.tokenizers import Bytes
from moe_jax.dispatch import Group
from moe_jax.exchange.parcels import OneByOne, SendOnce
from moe_jax.exchange.room import copies
from moe_jax.exchange.wire import Wire, row_bytes
from moe_jax.mesh import EXPERT_AXES, abstract_mesh
from moe_jax.models import transformer
from moe_jax.routing import Router, make_router
from moe_jax.sizes import ParameterCount, cache_size, flops_per_token, num_params, with_vocabulary
from moe_jax.train.paths import leaf_names

AT_REST = {"float32": 4, "bfloat16": 2, "int8": 1}  # bytes a parameter
ADAMW = 12  # bytes a parameter in training: itself and two moments, all float32
EXAMPLES = (8, 64)  # devices with experts, where the mesh has none
WITHOUT_MTP = "without the layer that predicts one token more"
PARTS = {
    "embedding": "embedding",
    "head": "head",
    "attention": "attention",
    "dense": "dense FFN and shared experts",
    "router": "routers",
    "experts": "routed experts",
    "norms": "norms",
}


def describe(name: str, config: Config) -> str:
    """The table of `config`, of a few dozen lines.

    Raises:
      ConfigError: a vocabulary that only a file tells, or as `mesh.abstract_mesh`.
    """
    config = with_known_vocabulary(config)
    mesh = abstract_mesh(config, math.prod(size for size in config.mesh.shape if size > 0))  # -1 counts as 1
    params = abstract_params(config, mesh)
    sections = [
        _architecture(name, config),
        table("parameters", _parameter_rows(parts_of(params), num_params(config.model))),
        table("a token", [*_compute_rows(config), *_cache_rows(config)]),
        table("at rest", _memory_rows(params, mesh)),
    ]
    if config.model.num_moe_layers and make_router(config.model.moe.router, config.model.moe.num_experts).causal:
        sections.append(table("all-to-all of a token in one MoE layer, forward, there and back", _wire_rows(config)))
    return "\n\n".join(sections)


def with_known_vocabulary(config: Config) -> Config:
    """The config with the size of its tokenizer; of one that is trained, the most that it can have.

    Raises:
      ConfigError: a tokenizer whose size only a file tells.
    """
    if config.model.vocab_size:
        return config
    sizes = {Bytes.kind: Bytes.vocab_size, "bpe": config.data.bpe_vocab_size}
    if (tokenizer := config.data.tokenizer) not in sizes:
        raise ConfigError(
            f"model.vocab_size = 0 stands for that of data.tokenizer = {tokenizer!r}, which is not read here; give it, e.g."
            " model.vocab_size=50304."
        )
    return with_vocabulary(config, sizes[tokenizer])


def abstract_params(config: Config, mesh: jax.sharding.AbstractMesh) -> dict[str, jax.ShapeDtypeStruct]:
    """The model's parameters on `mesh` by name, as shapes with shardings."""
    with jax.sharding.use_abstract_mesh(mesh):
        _, params, _ = transformer.abstract(config.model)
    return dict(zip(leaf_names(params), jax.tree.leaves(params), strict=True))


def parts_of(params: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, int]:
    """Elements by part: the fields of `sizes.ParameterCount` that are counts of parameters ("mtp" too), from the arrays' names."""
    counts = dict.fromkeys((*PARTS, "mtp"), 0)
    for name, array in params.items():
        counts[_part(name.split("/"))] += array.size
    return counts


def _part(path):
    *modules, array = path
    if any("mtp" in module for module in modules):
        return "mtp"
    if any("norm" in module for module in modules):
        return "norms"
    if array.startswith(("w_router_", "b_router_")):
        return "router"
    by_module = {
        "embed": "embedding",
        "mlp": "dense",
        "shared": "dense",
        "moe": "dense",
    }  # moe itself has the shared experts' gate
    return by_module.get(modules[-1], modules[-1])


def travels(model: ModelConfig, sizes: Mapping[str, int]) -> list[tuple[str, float, float]]:
    """(axis, rows, bytes) that a token sends to other devices, answers coming home included: one forward pass of one MoE layer.

    On average, choices being even: K of all experts, or of the groups that the router keeps a token to. A row is a choice, or with
    `send_once` a token and a device; with it go addresses, and a scale if it is in 8 bits. The room of fixed buffers is not in it.

    Args:
      model: experts, router, width, compute dtype, wire.
      sizes: of the expert axes, the slowest first: with two of them, rows cross the first, then fan out over the second.
    """
    moe, router, wire = model.moe, make_router(model.moe.router, model.moe.num_experts), Wire.of(model.moe, model.dtype)
    found, copies_before = [], 1  # a row that crosses one axis has one on each of its peers to fan out from
    for axis, peers in sizes.items():
        local = moe.num_experts // (copies_before * peers)
        once = moe.send_once and router.top_k > 1 and local > 1
        packing = (SendOnce if once else OneByOne)(local, moe.capacity_priority)
        rows = float(copies_before * (peers - 1) * expected_copies(router, local, once))
        found.append((axis, rows, rows * row_bytes(wire, model.d_model, packing.columns(router.top_k, 0))))
        copies_before *= peers
    return found


def expected_copies(router: Router, num_local: int, send_once: bool) -> Fraction:
    """`exchange.room.copies` to a device of `num_local` neighbouring experts, for routers that choose among null experts too, or limit a
    token to some groups of experts."""
    E, K = router.num_experts, router.top_k
    drawn_from = round(E * K / router.active_experts)
    groups, open_groups = getattr(router, "num_groups", 1), getattr(router, "top_groups", None)
    size = E // groups
    aligned = size % num_local == 0 or num_local % size == 0
    if not send_once or open_groups in (None, groups) or not aligned:
        return copies(Group(0, K, drawn_from), num_local, send_once)
    held, part = max(1, num_local // size), min(num_local, size)
    ways = [math.comb(held, j) * math.comb(groups - held, open_groups - j) for j in range(min(held, open_groups) + 1)]
    of_open = [copies(Group(0, K, open_groups * size), j * part, True) for j in range(len(ways))]
    return sum(map(operator.mul, ways, of_open)) / math.comb(groups, open_groups)


def _architecture(name, config):
    model, a, moe = config.model, config.model.attention, config.model.moe
    heads = (
        f"latent attention of {a.num_heads} heads" if a.kv_rank else f"{a.num_heads} query and {a.num_kv_heads} key/value heads"
    )
    text = f"{name}: {model.num_layers} layers of width {model.d_model}, {heads}, vocabulary {model.vocab_size:,}"
    if not model.num_moe_layers:
        return f"{text}; dense"
    shared = f" and {moe.num_shared_experts} shared" * bool(moe.num_shared_experts)
    chosen = f"{moe.num_experts} experts in {model.num_moe_layers} of the layers, {moe.router.top_k} a token{shared}"
    return f"{text};\n{chosen}, router {moe.router.name}"


def _parameter_rows(parts, count: ParameterCount):
    total = sum(size for part, size in parts.items() if part != "mtp")
    rows = [(label, f"{parts[part]:,}", f"{parts[part] / total:6.1%}") for part, label in PARTS.items() if parts[part]]
    rows.append(("total", f"{total:,}", "100.0%"))
    idle = count.experts - count.active_experts
    rows.append(("active, of a token", f"{total - idle:,}", f"{(total - idle) / total:6.1%}"))
    if not count.tied:
        rest = total - idle - parts["embedding"]
        rows.append(("active without the input embedding", f"{rest:,}", f"{rest / total:6.1%}"))
    if parts["mtp"]:
        rows.append(("beside them: predicts one token more", f"{parts['mtp']:,}", ""))
    if count.router_state:
        rows.append(("beside them: balancing bias", f"{count.router_state:,}", ""))
    return rows


def _compute_rows(config):
    length = config.data.seq_len
    flops, alone = flops_per_token(config.model, length), flops_per_token(config.model, 1)
    return [
        (f"FLOPs forward, in {length:,} tokens", show(flops, 1000), f"{1 - alone / flops:.1%} of them over the context"),
        ("FLOPs of a training step", show(3 * flops, 1000), WITHOUT_MTP * config.model.mtp_layers),
    ]


def _cache_rows(config):
    dtype, size, length = config.model.dtype, cache_size(config.model), config.data.seq_len
    each = AT_REST[dtype]
    rows = [
        (
            f"key/value cache in {dtype}",
            f"{size.growth * each:,} B",
            f"{show(size.values(length) * each)} after {length:,} tokens",
        )
    ]
    if size.window_growth:
        bound = size.window_growth * size.window * each
        rows.append(
            ("  in layers with a window", f"{size.window_growth * each:,} B", f"until {size.window:,} tokens, {show(bound)}")
        )
    return rows


def _memory_rows(params, mesh):
    total = sum(array.size for array in params.values())
    extra = "with the layer that predicts one token more" * any("mtp" in name for name in params)
    rows = [(f"parameters in {dtype}", show(total * size), extra) for dtype, size in AT_REST.items()]
    rows.append(("with AdamW, all in float32", show(total * ADAMW), ""))
    if mesh.size > 1:
        own = sum(math.prod(array.sharding.shard_shape(array.shape)) for array in params.values())
        over = " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items() if size > 1)
        rows.append((f"with AdamW, on each of {mesh.size} devices", show(own * ADAMW), over))
    return rows


def _wire_rows(config):
    model, moe = config.model, config.model.moe
    wire = Wire.of(moe, model.dtype)
    own = {axis: size for axis in EXPERT_AXES if (size := getattr(config.mesh, axis)) > 1}
    every = [own] if own else [{"expert": n} for n in EXAMPLES if moe.num_experts % n == 0]
    every_choice = moe.router.top_k * row_bytes(wire, model.d_model, 0)
    rows = [
        (f"{moe.router.top_k} rows, {wire.dispatch} out and {wire.combine} home", show(every_choice), "if all of them leave")
    ]
    return rows + [
        (f"over {axis} {sizes[axis]}", show(size), f"{count:.2f} rows")
        for sizes in every
        for axis, count, size in travels(model, sizes)
    ]


def table(title: str, rows: Sequence[tuple[str, str, str]]) -> str:
    """Rows of a name, a figure and a note under a title; a row with a name alone is a sentence."""
    widths = [max((len(row[i]) for row in rows if row[1]), default=0) for i in range(2)]
    return "\n".join([title, *(f"  {a:<{widths[0]}}  {b:>{widths[1]}}  {c}".rstrip() for a, b, c in rows)])


def show(number: float, thousand: int = 1024) -> str:
    """Bytes, or with `thousand` 1000 a plain number, in the largest unit of which there is one."""
    units = ("B", "KiB", "MiB", "GiB", "TiB") if thousand == 1024 else ("", "K", "M", "G", "T")
    power = min(max(math.floor(math.log(max(number, 1), thousand)), 0), len(units) - 1)
    return f"{number / thousand**power:,.1f} {units[power]}".rstrip()
