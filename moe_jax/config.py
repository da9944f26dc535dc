"""The configuration of a run as frozen dataclasses.

`configs/base.py` is the place to read what each field means; these classes are what the code below the edge sees. Building a
`Config` validates it (`moe_jax/validation.py`), so an object that exists is a config that makes sense; what depends on the number
of devices is checked by `validation.check_devices`.
"""

import dataclasses
import difflib
import math
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from moe_jax import validation
from moe_jax.guards_config import GuardsConfig
from moe_jax.validation import ConfigError

__all__ = [
    "AttentionConfig",
    "Config",
    "ConfigError",
    "DataConfig",
    "GuardsConfig",
    "MeshConfig",
    "MoEConfig",
    "ModelConfig",
    "OptimizerConfig",
    "ProfileConfig",
    "RopeConfig",
    "RouterConfig",
    "TrainConfig",
    "from_dict",
    "to_dict",
]


@dataclass(frozen=True)
class RouterConfig:
    """Which router, how many experts a token, and the family's own options (validated by `moe_jax.routing`)."""

    name: str = "deepseek"
    top_k: int = 2
    options: Mapping[str, Any] = field(default_factory=dict)
    allow_noncausal: bool = False
    module: str = ""


@dataclass(frozen=True)
class MoEConfig:
    """The experts of a model, their router, losses and transport."""

    num_experts: int = 8
    d_ff: int = 128
    num_shared_experts: int = 1
    shared_d_ff: int = 0
    shared_gate: bool = False
    expert_bias: bool = False
    first_dense: int = 0
    every: int = 1
    router: RouterConfig = RouterConfig()
    balance_loss_weight: float = 0.0
    balance_loss_scope: str = "global"
    balance_loss_accumulation: str = "exact"
    z_loss_weight: float = 0.0
    dispatch: str = "dropless"
    capacity_factor: float = 1.25
    capacity_priority: str = "position"
    exchange: str = "auto"
    exchange_factor: float = 0.0
    exchange_overflow: str = "drop"
    exchange_chunks: int = 1
    send_once: bool = True
    dispatch_wire: str = "compute"
    combine_wire: str = "compute"
    remat_exchange: bool = False
    grouped_matmul: str = "auto"

    @property
    def may_drop(self) -> bool:
        """Whether an assignment can be dropped, be it at its expert or on the way there."""
        return self.dispatch == "capacity" or (self.exchange_factor > 0 and self.exchange_overflow == "drop")


@dataclass(frozen=True)
class RopeConfig:
    """The rotary embedding and how it is stretched to longer contexts."""

    theta: float = 10000.0
    dim: int = 0
    interleaved: bool = False
    scaling: str = "none"
    factor: float = 1.0
    original_length: int = 0
    low_frequency_factor: float = 1.0
    high_frequency_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    amplitude: float = 0.0


@dataclass(frozen=True)
class AttentionConfig:
    """Grouped-query attention, or with `kv_rank` multi-head latent attention."""

    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 32
    kv_rank: int = 0
    q_rank: int = 0
    rope_head_dim: int = 0
    v_head_dim: int = 0
    latent_norm_eps: float = 0.0
    rope: RopeConfig = RopeConfig()
    scale: float = 0.0
    qk_norm: str = "none"
    qkv_clip: float = 0.0
    softcap: float = 0.0
    sinks: bool = False
    window: int = 0
    full_every: int = 0
    qkv_bias: bool = False
    out_bias: bool = False
    implementation: str = "auto"

    def layer_window(self, layer: int) -> int:
        """The window of layer `layer` (from 0); 0 where it sees everything: the last of every `full_every` layers does."""
        return 0 if self.full_every and layer % self.full_every == self.full_every - 1 else self.window


@dataclass(frozen=True)
class ModelConfig:
    """The decoder."""

    vocab_size: int = 0
    d_model: int = 128
    num_layers: int = 4
    d_ff: int = 384
    activation: str = "swiglu"
    activation_limit: float = 7.0
    norm: str = "rms"
    norm_eps: float = 1e-6
    post_norms: bool = False
    head_bias: bool = False
    embedding_scale: float = 1.0
    residual_scale: float = 1.0
    logit_scale: float = 1.0
    logit_softcap: float = 0.0
    mtp_layers: int = 0
    mtp_loss_weight: float = 0.1
    tied_embeddings: bool = False
    init_std: float = 0.02
    dtype: str = "float32"
    remat: str = "full"
    scan_unroll: int = 0
    logit_z_loss_weight: float = 0.0
    attention: AttentionConfig = AttentionConfig()
    moe: MoEConfig = MoEConfig()

    @property
    def num_moe_layers(self) -> int:
        """Number of layers whose FFN is a mixture of experts."""
        return sum(self.is_moe_layer(i) for i in range(self.num_layers))

    def is_moe_layer(self, layer: int) -> bool:
        """True when layer `layer` (from 0) is MoE: after `first_dense` dense layers, the last of every `every` layers."""
        moe = self.moe
        return moe.num_experts > 0 and layer >= moe.first_dense and (layer - moe.first_dense) % moe.every == moe.every - 1


@dataclass(frozen=True)
class MeshConfig:
    """Sizes of the mesh axes, one of which may be -1, and what XLA is asked for on the devices."""

    data: int = -1
    expert_outer: int = 1
    fsdp: int = 1
    expert: int = 1
    tensor: int = 1
    emulate: int = 0
    xla_flags: str = "recommended"

    @property
    def shape(self) -> tuple[int, int, int, int, int]:
        """Sizes in the order of `mesh.AXES`."""
        return (self.data, self.expert_outer, self.fsdp, self.expert, self.tensor)


@dataclass(frozen=True)
class DataConfig:
    """Corpus, tokenizer and the shape of a batch."""

    corpus: str = "builtin"
    paths: tuple[str, ...] = ()
    tokenizer: str = "bytes"
    bpe_vocab_size: int = 4096
    seq_len: int = 256
    batch_size: int = 16
    val_fraction: float = 0.05
    max_megabytes: float = 0.0
    bad_records: str = "stop"
    cache_dir: str = ""
    prefetch: int = 2


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW and its schedule."""

    learning_rate: float = 1e-3
    schedule: str = "cosine"
    warmup_steps: int = 50
    decay_fraction: float = 0.2
    final_fraction: float = 0.1
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip_norm: float = 1.0


@dataclass(frozen=True)
class TrainConfig:
    """Length of the run, and when it evaluates, saves and logs."""

    steps: int = 1000
    accumulation: int = 1
    seed: int = 0
    log_every: int = 10
    eval_every: int = 200
    eval_rows: int = 64
    checkpoint_every: int = 200
    keep_checkpoints: int = 3
    resume: str = "auto"
    sample_tokens: int = 200
    sample_prompt: str = ""
    tensorboard: bool = True
    record: str = ""
    replay: str = ""
    replay_weights: bool = False
    observe: bool = True
    report: bool = False


@dataclass(frozen=True)
class ProfileConfig:
    """What a run traces of itself."""

    steps: str = ""


@dataclass(frozen=True)
class Config:
    """A whole run."""

    workdir: str = ""
    init_from: str = ""
    model: ModelConfig = ModelConfig()
    mesh: MeshConfig = MeshConfig()
    data: DataConfig = DataConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    train: TrainConfig = TrainConfig()
    guards: GuardsConfig = field(default_factory=GuardsConfig)
    profile: ProfileConfig = ProfileConfig()

    def __post_init__(self):
        validation.check(self)


def from_dict(tree: Mapping[str, Any]) -> Config:
    """Builds a validated `Config` from nested mappings (a ConfigDict included).

    Under `model.moe.router` each router family has a mapping of its own options; the one that `name` selects becomes
    `RouterConfig.options`, the others are ignored.

    Raises:
      ConfigError: an unknown key, a value of the wrong type, or a combination that `validation.check` refuses.
    """
    return _build(Config, tree, "")


def to_dict(config: Config) -> dict[str, Any]:
    """The inverse of `from_dict`, in plain JSON types."""
    tree = dataclasses.asdict(config)
    router = tree["model"]["moe"]["router"]
    router[router["name"]] = dict(router.pop("options"))
    tree["data"]["paths"] = list(tree["data"]["paths"])
    return tree


def _build(cls, tree, path):
    if not isinstance(tree, Mapping) and not hasattr(tree, "items"):
        raise ConfigError(f"{path or 'config'} = {tree!r} must be a group of fields, not a single value.")
    values = dict(tree.items())
    if cls is RouterConfig:
        return _build_router(values, path)
    known = typing.get_type_hints(cls)
    _refuse_unknown(values, known, path)
    return cls(**{name: _convert(known[name], value, f"{path}{name}") for name, value in values.items()})


def _build_router(values, path):
    groups = {k: v for k, v in values.items() if hasattr(v, "items")}
    plain = {k: v for k, v in values.items() if k not in groups}
    kinds = {"name": str, "top_k": int, "allow_noncausal": bool, "module": str}
    _refuse_unknown(plain, kinds, path)
    fields = {field: _convert(kinds[field], value, f"{path}{field}") for field, value in plain.items()}
    name = fields.get("name", RouterConfig.name)
    return RouterConfig(**fields, options=dict(groups.get(name, {}).items()))


def _refuse_unknown(values, known, path):
    for name in values:
        if name not in known:
            near = difflib.get_close_matches(name, list(known), n=1)
            hint = f"did you mean {path}{near[0]}?" if near else f"fields there are: {', '.join(known)}."
            raise ConfigError(f"{path}{name} is not a field of the config; {hint}")


def _convert(kind, value, path):
    if dataclasses.is_dataclass(kind):
        return _build(kind, value, path + ".")
    if typing.get_origin(kind) is tuple:
        value = (value,) if isinstance(value, str) else tuple(value)
        return tuple(_convert(str, v, path) for v in value)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise ConfigError(f"{path} = {value!r} is a {type(value).__name__}; give a {kind.__name__}.")
    if kind is str and "\0" in value:
        raise ConfigError(f"{path} = {value!r} has a NUL byte, which no name and no command line has; leave it out.")
    if kind is int and not -(2**31) <= value < 2**31:
        raise ConfigError(f"{path} = {value} does not fit in 32 bits; give a smaller number.")
    if kind is float and not math.isfinite(value):
        raise ConfigError(f"{path} = {value} is not a finite number; give one.")
    return value
