"""Every rule a configuration must keep, each refusal one sentence: the field, its value, the reason, the fix.

Nothing here imports the rest of the package: the rules read a `Config` by attribute, before any array exists.
"""

import difflib


class RefusalError(ValueError):
    """What was asked for cannot be had; the message is one sentence, and a program says it in place of a traceback."""


class CheckpointError(RefusalError):
    """A checkpoint, ours or another's, that is not there, does not fit, cannot be read or would be written over.

    The message names the folder, file, field or tensor, what is wrong, and the fix.
    """


class ConfigError(RefusalError):
    """A configuration that cannot be run; the message names the field, its value and the fix."""


MESH_AXES = ("data", "expert_outer", "fsdp", "expert", "tensor")

CHOICES = {
    "model.activation": ("swiglu", "geglu", "swiglu_clamped", "gelu", "relu"),
    "model.norm": ("rms", "layer", "layer_no_bias"),
    "model.dtype": ("float32", "bfloat16"),
    "model.remat": ("none", "dots", "full"),
    "model.attention.qk_norm": ("none", "head", "full"),
    "model.attention.rope.scaling": ("none", "linear", "wavelength", "yarn"),
    "model.attention.implementation": ("auto", "xla", "cudnn"),
    "model.moe.balance_loss_scope": ("global", "microbatch", "sequence"),
    "model.moe.balance_loss_accumulation": ("exact", "running"),
    "model.moe.dispatch": ("dropless", "capacity", "einsum"),
    "model.moe.capacity_priority": ("position", "probability"),
    "model.moe.exchange": ("auto", "all_to_all", "all_gather", "ragged"),
    "model.moe.exchange_overflow": ("drop", "exact"),
    "model.moe.dispatch_wire": ("compute", "bfloat16", "float8_e4m3fn", "int8"),
    "model.moe.combine_wire": ("compute", "bfloat16", "float32"),
    "model.moe.grouped_matmul": ("auto", "cpu", "gpu", "tpu", "reference"),
    "mesh.xla_flags": ("recommended", "none"),
    "data.corpus": ("builtin", "prose", "files"),
    "data.bad_records": ("stop", "skip"),
    "data.tokenizer": ("bytes", "bpe", "gpt2"),
    "optimizer.schedule": ("cosine", "wsd", "constant"),
    "train.resume": ("auto", "never", "must"),
}


def _fields(group, names):
    return [f"{group}.{name}" for name in names.split()]


POSITIVE = (
    *_fields("model", "d_model num_layers d_ff norm_eps init_std activation_limit embedding_scale residual_scale logit_scale"),
    *_fields("model.attention", "num_heads num_kv_heads head_dim"),
    *_fields("model.attention.rope", "theta factor low_frequency_factor high_frequency_factor beta_fast beta_slow"),
    *_fields("model.moe", "every capacity_factor exchange_chunks"),
    *_fields("data", "seq_len batch_size bpe_vocab_size"),
    *_fields("optimizer", "learning_rate eps"),
    *_fields("train", "steps accumulation log_every eval_every eval_rows checkpoint_every keep_checkpoints"),
)

NOT_NEGATIVE = (
    *_fields("model", "vocab_size scan_unroll logit_z_loss_weight logit_softcap mtp_layers mtp_loss_weight"),
    *_fields(
        "model.attention", "window full_every kv_rank q_rank rope_head_dim v_head_dim latent_norm_eps scale qkv_clip softcap"
    ),
    *_fields("model.attention.rope", "dim original_length amplitude"),
    *_fields(
        "model.moe", "num_experts num_shared_experts shared_d_ff first_dense balance_loss_weight z_loss_weight exchange_factor"
    ),
    *_fields("mesh", "emulate"),
    *_fields("data", "max_megabytes prefetch"),
    *_fields("optimizer", "warmup_steps weight_decay clip_norm"),
    *_fields("train", "sample_tokens seed"),
)

FRACTIONS = ("data.val_fraction", "optimizer.decay_fraction", "optimizer.b1", "optimizer.b2")


def check(config) -> None:
    """Checks everything that does not depend on the number of devices. Raises ConfigError."""
    for path, choices in CHOICES.items():
        value = _get(config, path)
        if value not in choices and not (path == "data.tokenizer" and _folder(value)):
            near = difflib.get_close_matches(str(value), choices, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"choose one of {', '.join(choices)}."
            raise ConfigError(f"{path} = {value!r} is unknown; {hint}")
    for path in POSITIVE:
        if not _get(config, path) > 0:
            raise ConfigError(f"{path} = {_get(config, path)} must be greater than 0.")
    for path in NOT_NEGATIVE:
        if not _get(config, path) >= 0:
            raise ConfigError(f"{path} = {_get(config, path)} must be 0 or more.")
    for path in FRACTIONS:
        if not 0 <= _get(config, path) < 1:
            raise ConfigError(f"{path} = {_get(config, path)} must be at least 0 and less than 1.")
    if config.init_from and not _folder(config.init_from):
        raise ConfigError(
            f"init_from = {config.init_from!r} is not hf:FOLDER; give the folder of a Hugging Face checkpoint, or ''."
        )
    _check_model(config.model)
    _check_moe(config.model)
    _check_mesh(config.mesh)
    _check_training(config)


def _check_model(model):
    attention = model.attention
    if attention.num_heads % attention.num_kv_heads:
        raise ConfigError(
            f"model.attention.num_heads = {attention.num_heads} is not a multiple of model.attention.num_kv_heads ="
            f" {attention.num_kv_heads}; every key/value head serves the same number of query heads."
        )
    latent = {name: getattr(attention, name) for name in ("q_rank", "rope_head_dim", "v_head_dim", "latent_norm_eps")}
    if attention.kv_rank:
        _check_latent(attention)
    elif wrong := next((name for name, value in latent.items() if value), None):
        raise ConfigError(
            f"model.attention.{wrong} = {latent[wrong]} belongs to multi-head latent attention; set model.attention.kv_rank too, or"
            f" model.attention.{wrong}=0."
        )
    _check_rope(attention)
    if attention.full_every and not attention.window:
        raise ConfigError(
            f"model.attention.full_every = {attention.full_every} makes exceptions to model.attention.window, which is 0; set a window"
            " too, or full_every=0."
        )
    if model.mtp_layers > 1:
        raise ConfigError(f"model.mtp_layers = {model.mtp_layers} must be 0 or 1; more than one token ahead is not predicted.")


def _check_latent(attention):
    if attention.rope_head_dim < 2:
        raise ConfigError(
            f"model.attention.rope_head_dim = {attention.rope_head_dim} must be at least 2 with model.attention.kv_rank ="
            f" {attention.kv_rank}: latent attention has its positions there."
        )
    plain = {"qk_norm": "none", "sinks": False, "qkv_clip": 0.0, "qkv_bias": False, "out_bias": False}
    for name, value in plain.items():
        if (given := getattr(attention, name)) != value:
            raise ConfigError(
                f"model.attention.{name} = {given!r} is not there for latent attention (model.attention.kv_rank ="
                f" {attention.kv_rank}); set it to {value!r}."
            )
    if attention.num_kv_heads != attention.num_heads:
        raise ConfigError(
            f"model.attention.num_kv_heads = {attention.num_kv_heads} must be model.attention.num_heads = {attention.num_heads} with"
            " latent attention: every head makes its own keys and values of the latent."
        )


def _check_rope(attention):
    rope = attention.rope
    width, field = attention.rope_head_dim or attention.head_dim, "rope_head_dim" if attention.kv_rank else "head_dim"
    if rope.dim > width:
        raise ConfigError(
            f"model.attention.rope.dim = {rope.dim} is more than model.attention.{field} = {width}; 0 rotates the whole head."
        )
    if (rope.dim or width) % 2:
        name, value = ("rope.dim", rope.dim) if rope.dim else (field, width)
        raise ConfigError(f"model.attention.{name} = {value} is odd; rotary embeddings need an even width.")
    if rope.scaling == "wavelength" and rope.high_frequency_factor <= rope.low_frequency_factor:
        raise ConfigError(
            f"model.attention.rope.high_frequency_factor = {rope.high_frequency_factor} must be more than"
            f" model.attention.rope.low_frequency_factor = {rope.low_frequency_factor}: waves between the two are stretched in part."
        )
    if rope.scaling == "yarn" and (rope.beta_fast < rope.beta_slow or rope.theta == 1):
        raise ConfigError(
            f"model.attention.rope.beta_fast = {rope.beta_fast} must be at least beta_slow = {rope.beta_slow}, and theta ="
            f" {rope.theta} not 1, for yarn to tell fast pairs from slow ones."
        )
    if rope.amplitude and rope.scaling != "yarn":
        raise ConfigError(
            f"model.attention.rope.amplitude = {rope.amplitude} is yarn's while model.attention.rope.scaling = {rope.scaling!r};"
            " set it to 0."
        )
    if rope.scaling in ("wavelength", "yarn") and not rope.original_length:
        raise ConfigError(
            f"model.attention.rope.original_length = 0 while model.attention.rope.scaling = {rope.scaling!r}; give the tokens of the"
            " context before the stretch."
        )


def _check_moe(model):
    moe = model.moe
    if moe.num_experts == 0:
        return
    if moe.d_ff <= 0:
        raise ConfigError(f"model.moe.d_ff = {moe.d_ff} must be greater than 0; it is the hidden width of one expert.")
    for name in ("shared_d_ff", "shared_gate"):
        if (value := getattr(moe, name)) and not moe.num_shared_experts:
            raise ConfigError(
                f"model.moe.{name} = {value} while model.moe.num_shared_experts = 0: there is no shared expert; set it to"
                f" {type(value)()}."
            )
    top_k = moe.router.top_k
    if top_k < 1:
        raise ConfigError(
            f"model.moe.router.top_k = {top_k} must be at least 1; set model.moe.num_experts=0 for a dense model."
        )
    if top_k > moe.num_experts:
        raise ConfigError(
            f"model.moe.router.top_k = {top_k} is more than model.moe.num_experts = {moe.num_experts};"
            f" choose top_k <= {moe.num_experts}."
        )
    if moe.first_dense > model.num_layers or (model.num_layers - moe.first_dense) % moe.every:
        raise ConfigError(
            f"model.num_layers = {model.num_layers} less model.moe.first_dense = {moe.first_dense} must be a multiple of"
            f" model.moe.every = {moe.every}; change one of the three."
        )
    if model.num_moe_layers == 0:
        raise ConfigError(
            f"model.moe.first_dense = {moe.first_dense} leaves none of the {model.num_layers} layers to the"
            f" {moe.num_experts} experts; lower it, or set model.moe.num_experts=0 for a dense model."
        )


def _check_mesh(mesh):
    if sum(size == -1 for size in mesh.shape) > 1:
        raise ConfigError(f"mesh = {_mesh_text(mesh)} has more than one -1; only one axis can be filled.")
    for axis in MESH_AXES:
        if (size := getattr(mesh, axis)) < 1 and size != -1:
            raise ConfigError(f"mesh.{axis} = {size} must be at least 1, or -1 to take the devices that are left.")


def _check_training(config):
    batch, accumulation = config.data.batch_size, config.train.accumulation
    if batch % accumulation:
        raise ConfigError(
            f"data.batch_size = {batch} is not a multiple of train.accumulation = {accumulation};"
            " every microbatch holds the same number of sequences."
        )
    if config.data.corpus == "files" and not config.data.paths:
        raise ConfigError(
            "data.paths is empty while data.corpus = 'files'; give one or more globs of text, JSONL or .bin files."
        )
    if config.data.corpus != "files" and config.data.paths:
        raise ConfigError(
            f"data.paths = {config.data.paths} is given while data.corpus = {config.data.corpus!r}; set data.corpus=files to read"
            " them."
        )
    if config.optimizer.warmup_steps > config.train.steps:
        raise ConfigError(
            f"optimizer.warmup_steps = {config.optimizer.warmup_steps} is more than train.steps = {config.train.steps};"
            " the learning rate would never reach its peak."
        )
    if not 0 <= config.optimizer.final_fraction <= 1:
        raise ConfigError(f"optimizer.final_fraction = {config.optimizer.final_fraction} must be between 0 and 1.")
    _check_routing_records(config)


def _check_routing_records(config):
    train = config.train
    for field in ("record", "replay"):
        if (path := getattr(train, field)) and not config.model.num_moe_layers:
            raise ConfigError(
                f"train.{field} = {path!r} while model.moe.num_experts = 0: a dense model has no routing; set train.{field}=''."
            )
    if train.replay and train.replay == train.record:
        raise ConfigError(
            f"train.replay = {train.replay!r} is the file that train.record writes, too; choose another path for one of the two."
        )
    if train.replay_weights and not train.replay:
        raise ConfigError("train.replay_weights = True while train.replay = ''; give the record to take the weights from.")


def check_devices(config, num_devices: int) -> tuple[int, int, int, int, int]:
    """Fits the config to `num_devices` devices and returns the mesh's shape, in the order of `MESH_AXES`.

    Raises:
      ConfigError: the axes do not multiply to the devices, or batch, experts, heads or widths do not divide over them.
    """
    shape = _fill(config.mesh, num_devices)
    data, expert_outer, fsdp, expert, tensor = shape
    model, moe = config.model, config.model.moe
    shards, per_pass = data * expert_outer * fsdp * expert, config.data.batch_size // config.train.accumulation
    if per_pass % shards:
        raise ConfigError(
            f"data.batch_size = {config.data.batch_size} over train.accumulation = {config.train.accumulation} is {per_pass}"
            f" sequences, not a multiple of the {shards} data shards ({_mesh_text(config.mesh)});"
            f" use a multiple of {shards * config.train.accumulation}."
        )
    divisions = [
        ("model.attention.num_heads", model.attention.num_heads, "tensor", tensor),
        ("model.attention.num_kv_heads", model.attention.num_kv_heads, "tensor", tensor),
        ("model.d_ff", model.d_ff, "tensor", tensor),
        ("model.d_model", model.d_model, "fsdp", fsdp),
        ("model.vocab_size", model.vocab_size, "tensor", tensor),
        ("model.attention.kv_rank", model.attention.kv_rank, "fsdp", fsdp),
        ("model.attention.q_rank", model.attention.q_rank, "fsdp", fsdp),
    ]
    if moe.num_experts:
        expert_axes = "expert" if expert_outer == 1 else "expert_outer x mesh.expert"
        divisions += [
            ("model.moe.num_experts", moe.num_experts, expert_axes, expert_outer * expert),
            ("model.moe.d_ff", moe.d_ff, "tensor", tensor),
            ("model.moe.num_shared_experts x shared_d_ff", moe.num_shared_experts * moe.shared_d_ff, "tensor", tensor),
        ]
    for path, value, axis, size in divisions:
        if value % size:
            raise ConfigError(f"{path} = {value} is not a multiple of mesh.{axis} = {size}; change one of the two.")
    tokens = per_pass // shards * config.data.seq_len
    if moe.num_experts and tokens % moe.exchange_chunks:
        raise ConfigError(
            f"model.moe.exchange_chunks = {moe.exchange_chunks} does not divide the {tokens} tokens of a device"
            f" ({per_pass // shards} rows of {config.data.seq_len}); use a divisor of them."
        )
    return shape


def _fill(mesh, num_devices):
    sizes = list(mesh.shape)
    known = 1
    for size in sizes:
        known *= 1 if size == -1 else size
    if -1 in sizes and num_devices % known == 0:
        sizes[sizes.index(-1)] = num_devices // known
        known = num_devices
    if known != num_devices:
        raise ConfigError(
            f"mesh = {_mesh_text(mesh)} does not fit {num_devices} device{'s' * (num_devices != 1)};"
            " the axes must multiply to the number of devices (-1 fills one axis; mesh.emulate=N makes N CPU devices)."
        )
    return tuple(sizes)


def _mesh_text(mesh):
    sizes = {axis: getattr(mesh, axis) for axis in MESH_AXES}
    return " x ".join(f"{axis} {size}" for axis, size in sizes.items() if axis != "expert_outer" or size != 1)


def _folder(value):
    """FOLDER of "hf:FOLDER"; "" for another value."""
    return value.removeprefix("hf:") if value.startswith("hf:") else ""


def _get(config, path):
    for name in path.split("."):
        config = getattr(config, name)
    return config
