"""Every field of a run, with its unit or consequence. Other configs start from here and change a few lines.

    python -m launch.train --config=configs/base.py --config.model.moe.router.name=switch --config.model.moe.router.top_k=1

`--config=configs/base.py:debug` shrinks the model and the run to seconds. Any field can be set as `--config.group.field=value`, or
after the file's name as `--config=configs/base.py:debug,train.steps=50`.
"""

import ast

from ml_collections import ConfigDict

from moe_jax import routing
from moe_jax.config import ConfigError


def get_config(arg: str = "") -> ConfigDict:
    """The base config; `arg` is a comma-separated list of "debug" and name=value."""
    config = ConfigDict()
    config.workdir = ""  # run folder: checkpoints, metrics, config; "" = runs/<config name>
    config.init_from = ""  # hf:FOLDER: start from these Hugging Face weights; fields at their default are the model's there
    config.model = _model()
    config.model.attention = _attention()
    config.model.attention.rope = _rope()
    config.model.moe = _moe()
    config.model.moe.router = _router()
    config.mesh = _mesh()
    config.data = _data()
    config.optimizer = _optimizer()
    config.train = _train()
    config.guards = _guards()
    config.profile = _profile()
    return override(config, arg)


def _model():
    """The architecture but for its attention and its experts."""
    model = ConfigDict()
    model.vocab_size = 0  # tokens; 0 = the tokenizer's, rounded up to a multiple of 128
    model.d_model = 128  # D, width of the residual stream
    model.num_layers = 4  # L, dense and MoE layers together
    model.d_ff = 384  # F of dense layers
    model.activation = "swiglu"  # swiglu | geglu | swiglu_clamped (gpt-oss) (three matrices) | gelu | relu (two); experts too
    model.activation_limit = 7.0  # for swiglu_clamped: largest gate, and largest size of what it multiplies
    model.norm = "rms"  # rms (RMSNorm) | layer (LayerNorm with bias) | layer_no_bias
    model.norm_eps = 1e-6  # of every norm
    model.post_norms = False  # True: also a norm on what attention and FFN add to the residual stream
    model.head_bias = False  # a bias on the logits
    model.embedding_scale = 1.0  # multiplies the embeddings
    model.residual_scale = 1.0  # multiplies what attention and FFN add to the residual stream
    model.logit_scale = 1.0  # multiplies the logits
    model.logit_softcap = 0.0  # c: logits become c tanh(logits / c); 0 = off
    model.mtp_layers = 0  # 1: a layer more that predicts the token after the next in training, as in DeepSeek-V3; 0 = off
    model.mtp_loss_weight = 0.1  # of that prediction's loss
    model.tied_embeddings = False  # True: the head is the embedding table
    model.init_std = 0.02  # of every weight; projections into the residual stream get init_std / sqrt(2 L)
    model.dtype = "float32"  # compute dtype, float32 | bfloat16; parameters, router and losses stay float32
    model.remat = "full"  # none | dots (keep matmul results) | full (keep layer inputs): memory against recomputation
    model.scan_unroll = 0  # layers a turn of the loop over layers; 0 = all on a CPU, which copies the loop's weights, else 1
    model.logit_z_loss_weight = 0.0  # weight of mean(logsumexp(logits)^2), PaLM's 1e-4; 0 = off
    return model


def _attention():
    """Attention, the same in every layer."""
    attention = ConfigDict()
    attention.num_heads = 4  # H, query heads; a multiple of mesh.tensor
    attention.num_kv_heads = 2  # G, key/value heads; divides num_heads
    attention.head_dim = 32  # N, width of a head, even; with kv_rank, of its part without positions
    attention.kv_rank = 0  # width of the latent that keys and values are made of (multi-head latent attention); 0 = no latent
    attention.q_rank = 0  # with kv_rank: width of the queries' latent; 0 = queries straight from the stream
    attention.rope_head_dim = 0  # with kv_rank: widths added to a head for positions, keys' shared by all heads; even
    attention.v_head_dim = 0  # with kv_rank: width of a head's values; 0 = head_dim
    attention.latent_norm_eps = 0.0  # with kv_rank: epsilon of the latents' norms; 0 = model.norm_eps
    attention.scale = 0.0  # multiplies queries times keys; 0 = 1 / sqrt(width of a query)
    attention.qk_norm = "none"  # none | head (RMSNorm on queries and keys, per head) | full (over all heads together)
    attention.qkv_clip = 0.0  # queries, keys, values are cut to this size (DBRX); 0 = off
    attention.softcap = 0.0  # c: scores become c tanh(scores / c) before the softmax; 0 = off
    attention.sinks = False  # True: a learned logit a head that takes part in the softmax and adds nothing (gpt-oss)
    attention.window = 0  # tokens a token sees, itself included; 0 = all
    attention.full_every = 0  # n: the last of every n layers sees all in spite of window; 0 = none does
    attention.qkv_bias = False  # biases on the q, k, v projections
    attention.out_bias = False  # bias on the output projection
    attention.implementation = "auto"  # auto | xla | cudnn; auto takes cuDNN on GPU in bfloat16
    return attention


def _rope():
    """The rotary embedding of queries and keys."""
    rope = ConfigDict()
    rope.theta = 10000.0  # base of the wavelengths
    rope.dim = 0  # first widths of a head that rotate (partial rotary), even; 0 = all
    rope.interleaved = False  # True: neighbours rotate together (2i, 2i + 1), not (i, i + half)
    rope.scaling = "none"  # none | linear | wavelength (Llama 3.1) | yarn: how it is stretched for longer contexts
    rope.factor = 1.0  # of the stretch; contexts are this much longer
    rope.original_length = 0  # tokens of the context before the stretch; wavelength and yarn
    rope.low_frequency_factor = 1.0  # wavelength: waves longer than original_length / this are stretched in full
    rope.high_frequency_factor = 4.0  # wavelength: waves shorter than original_length / this are left alone
    rope.beta_fast = 32.0  # yarn: pairs that turn this often in original_length are left alone
    rope.beta_slow = 1.0  # yarn: pairs that turn less often than this are stretched in full
    rope.truncate = True  # yarn: the borders of the two are rounded to whole pairs
    rope.amplitude = 0.0  # yarn: multiplies sine and cosine; 0 = 0.1 ln(factor) + 1
    return rope


def _moe():
    """The MoE layers but for their router."""
    moe = ConfigDict()
    moe.num_experts = 8  # E, routed experts per MoE layer; 0 = a dense model
    moe.d_ff = 128  # F of one expert
    moe.num_shared_experts = 1  # experts every token uses
    moe.shared_d_ff = 0  # F of one shared expert; 0 = d_ff
    moe.shared_gate = False  # True: the shared experts' answer times a learned sigmoid of the token (Qwen2-MoE)
    moe.expert_bias = False  # biases in the experts' projections (gpt-oss)
    moe.first_dense = 0  # that many first layers are dense
    moe.every = 1  # after those, the last of every this many layers is MoE
    moe.balance_loss_weight = 0.0  # weight of the load-balance loss, which is 1 at perfect balance; summed over layers
    moe.balance_loss_scope = "global"  # where load fractions are counted: global | microbatch | sequence
    moe.balance_loss_accumulation = "exact"  # under accumulation: exact (one more forward pass) | running (approximate)
    moe.z_loss_weight = 0.0  # weight of mean(logsumexp(router logits)^2), ST-MoE's 1e-3; summed over layers
    moe.dispatch = "dropless"  # dropless (grouped matmul) | capacity (fixed buffers, drops counted) | einsum (the oracle; slow)
    moe.capacity_factor = 1.25  # for capacity dispatch: C = ceil(factor * T * K / E); includes K
    moe.capacity_priority = "position"  # who keeps a full buffer's rows: position (first choices first) | probability
    moe.exchange = "auto"  # over the expert axes: all_to_all | ragged | all_gather; auto = all_to_all, nothing on one device
    moe.exchange_factor = 0.0  # room for rows that travel and arrive, times the balanced number; 0 = worst case, exact
    moe.exchange_overflow = "drop"  # when the factor is too small: drop (counted) | exact (gather everything in that step)
    moe.exchange_chunks = 1  # parts of a device's tokens, so that one part's exchange overlaps another's experts
    moe.send_once = True  # a token goes once to a device that holds several of its experts, and comes back as one sum
    moe.dispatch_wire = "compute"  # dtype of tokens on the wire: compute | bfloat16 | float8_e4m3fn | int8 (scaled by row)
    moe.combine_wire = "compute"  # dtype of answers and gradients on the wire: compute | bfloat16 | float32
    moe.remat_exchange = False  # True: under remat the backward repeats the exchange in place of keeping what arrived
    moe.grouped_matmul = "auto"  # backend of the dropless dispatch: auto (by platform) | cpu | gpu | tpu | reference
    return moe


def _router():
    """Who goes to which expert."""
    router = ConfigDict()
    router.name = "deepseek"  # the family: switch | mixtral | deepseek
    router.top_k = 2  # K, experts per token; 1 for switch
    router.allow_noncausal = False  # True: take a router that looks at later tokens all the same
    router.module = ""  # Python module that registers the family, for one of your own (docs/adding_a_router.md)
    router.update(routing.default_options())  # options of each family, documented in moe_jax/routing/<family>.py
    return router


def _mesh():
    """How the devices are arranged."""
    mesh = ConfigDict()
    mesh.data = -1  # replicas; -1 on one axis = the devices the other axes leave
    mesh.expert_outer = 1  # experts spread over this many groups first, over slow links (hosts)
    mesh.fsdp = 1  # parameters sharded over this many, tokens too
    mesh.expert = 1  # experts spread over this many; a data axis for the rest of the model
    mesh.tensor = 1  # heads and hidden widths split over this many
    mesh.emulate = 0  # N: N emulated devices on the CPU; 0 = the real devices
    mesh.xla_flags = "recommended"  # recommended (of moe_jax/xla_flags.py) | none: the environment's own and no more
    return mesh


def _data():
    """The text and its tokens."""
    data = ConfigDict()
    data.corpus = "builtin"  # builtin (Python's own sources and docs) | prose (extra: corpus) | files
    data.paths = ()  # for files: globs of text, .jsonl, .jsonl.gz or .bin
    data.tokenizer = "bytes"  # bytes | bpe (trained on the corpus) | gpt2 (extra: corpus) | hf:FOLDER (that of a checkpoint)
    data.bpe_vocab_size = 4096  # tokens of a bpe tokenizer
    data.seq_len = 256  # S, tokens in a row
    data.batch_size = 16  # B, rows per optimizer step over all devices and microbatches
    data.val_fraction = 0.05  # of documents, by hash
    data.max_megabytes = 0.0  # per domain; 0 = all
    data.bad_records = "stop"  # lines and files that cannot be used: stop (at the first one) | skip (and count by kind)
    data.cache_dir = ""  # of tokenised corpora; "" = the user's cache folder
    data.prefetch = 2  # batches read ahead
    return data


def _optimizer():
    """AdamW, its schedule and its clipping."""
    optimizer = ConfigDict()
    optimizer.learning_rate = 1e-3  # peak
    optimizer.schedule = "cosine"  # cosine | wsd (warm-up, stable, decay) | constant (after warm-up)
    optimizer.warmup_steps = 50  # linear from 0
    optimizer.decay_fraction = 0.2  # wsd: the last fraction of the steps decays
    optimizer.final_fraction = 0.1  # last learning rate over peak
    optimizer.b1 = 0.9  # Adam's first decay
    optimizer.b2 = 0.95  # Adam's second decay
    optimizer.eps = 1e-8  # Adam's epsilon
    optimizer.weight_decay = 0.1  # decoupled; not on embeddings, norms and biases
    optimizer.clip_norm = 1.0  # global gradient norm; 0 = no clipping
    return optimizer


def _train():
    """The run's length, its records and its checkpoints."""
    train = ConfigDict()
    train.steps = 1000  # optimizer steps
    train.accumulation = 1  # microbatches per step; the result is that of the whole batch
    train.seed = 0  # of parameters, data order and noise
    train.log_every = 10  # steps between metric records
    train.eval_every = 200  # steps between evaluations on every domain; one more at the end
    train.eval_rows = 64  # validation rows per domain
    train.checkpoint_every = 200  # steps between checkpoints; one more at the end
    train.keep_checkpoints = 3  # newest kept, besides the best
    train.resume = "auto"  # auto (continue if the run folder has a checkpoint) | never (refuse such a folder) | must
    train.sample_tokens = 200  # of the text sample at the end; 0 = none
    train.sample_prompt = ""  # text that the sample continues
    train.tensorboard = True  # write TensorBoard files besides metrics.jsonl
    train.record = ""  # file to write every training step's routing to (docs/routing_record.md); "" = none
    train.replay = ""  # such a file, whose choices the training steps make again in place of the router's own; "" = none
    train.replay_weights = False  # True: the recorded weights too, so that the router's own weights get no gradient
    train.observe = True  # the routing observatory (docs/observatory.md): more figures a step, a file of counts an evaluation
    train.report = False  # write the report of the run at its end (launch.report; needs matplotlib, extra `plots`)
    return train


def _guards():
    """What watches the run, and what it does when it speaks: off | warn | stop (docs/guards.md)."""
    guards = ConfigDict()
    guards.window = 50  # steps that a guard of the router looks back on, and that a loss or gradient norm is compared with
    guards.warmup_steps = 200  # first steps of a run, in which only non_finite, stall and disk speak
    guards.non_finite = "stop"  # a loss or gradient norm that is not finite: the step is skipped; off = nothing is skipped
    guards.skip_steps = 3  # steps in a row that are skipped before stop stops; 0 = stop at the first
    guards.loss_spike = "warn"  # a loss above those of the window
    guards.loss_spike_deviations = 8.0  # ... by this many robust standard deviations
    guards.gradient_norm = "warn"  # a gradient norm, before clipping, above those of the window
    guards.gradient_norm_factor = 10.0  # ... this many times their median
    guards.router_collapse = "warn"  # of one layer over the window: dead experts, MaxVio or entropy
    guards.dead_fraction = 0.125  # share of a layer's experts without a token
    guards.max_violation = 3.0  # MaxVio above its noise floor; or half of the most that E and K allow, if that is less
    guards.min_entropy = 0.02  # mean entropy of the router's probabilities over ln E
    guards.bias_saturation = "warn"  # a balancing bias that overrules the scores
    guards.bias_range = 1.5  # largest bias less the smallest; scores are between 0 and 1
    guards.drop_rate = "warn"  # assignments dropped
    guards.dropped_fraction = 0.3  # share of a layer's
    guards.gradient_ratio = "warn"  # auxiliary losses that outweigh the language model at the router
    guards.gradient_ratio_limit = 10.0  # norm of their gradient over that of the rest; needs train.observe
    guards.stall = "warn"  # no step finishes: the stacks of all threads are printed; stop = the process ends with status 76
    guards.stall_seconds = 600.0  # for this long; six times that for the first step, an evaluation and a checkpoint
    guards.disk = "stop"  # too little free space for a checkpoint; warn = that checkpoint is left out
    guards.disk_factor = 1.1  # free bytes wanted, times the state's
    return guards


def _profile():
    """What a run traces of itself (docs/profiling.md)."""
    profile = ConfigDict()
    profile.steps = ""  # FIRST:LAST: steps whose trace goes into the run folder, for TensorBoard, both ends too; "" = none
    return profile


def override(config: ConfigDict, arg: str) -> ConfigDict:
    """Applies "debug" and `group.field=value` items, separated by commas, in order.

    Raises:
      AttributeError: no such field; the message names the nearest.
      ConfigError: an item is neither.
    """
    config.lock()
    for item in filter(None, (part.strip() for part in (arg or "").split(","))):
        name, equals, value = item.partition("=")
        if item == "debug":
            shrink(config)
        elif equals:
            _set(config, name, _parse(value))
        else:
            raise ConfigError(f"config argument {item!r} is neither 'debug' nor group.field=value.")
    return config.unlock()


def _set(config, name, value):
    *groups, field = name.split(".")
    for group in groups:
        config = getattr(config, group)
    setattr(config, field, value)


def _parse(text):
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def shrink(config: ConfigDict) -> ConfigDict:
    """The same run in miniature: seconds on a CPU."""
    config.model.update(d_model=32, num_layers=2, d_ff=64)
    config.model.attention.update(num_heads=2, num_kv_heads=2, head_dim=16)
    config.model.moe.update(d_ff=32)
    config.data.update(seq_len=64, batch_size=8, max_megabytes=0.5)
    config.optimizer.update(warmup_steps=5)
    config.train.update(steps=20, log_every=5, eval_every=10, eval_rows=8, checkpoint_every=10, sample_tokens=40)
    return config
