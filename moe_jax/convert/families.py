"""What there is to know of each family of models on Hugging Face: a table of its config's fields and one of its tensors.

Everything that tells families apart stands here as data. Sources: the modeling and configuration files of transformers 5, whose names
are those of the published files; of the experts also the names that transformers has in memory.
"""

from moe_jax.convert import tensor_rows
from moe_jax.convert.family import Family
from moe_jax.convert.fields import Always, Choice, Only, Same, Written
from moe_jax.convert.layer_fields import (
    AlternatingWindows,
    AttentionMultiplier,
    ExpertGroups,
    Heads,
    LatentHeads,
    LatentNormEps,
    LayerAhead,
    LogitsScaling,
    OwnBalanceLoss,
    PooledBalanceLoss,
    SharedExperts,
    SharedWidth,
    SparseSteps,
)
from moe_jax.convert.quantised import Quantisation
from moe_jax.convert.rope_fields import Rope

PLAIN = (
    Quantisation(),
    Same("vocab_size", "vocab_size"),
    Same("hidden_size", "d_model"),
    Same("num_hidden_layers", "num_layers"),
    Same("num_attention_heads", "attention.num_heads"),
    Same("rms_norm_eps", "norm_eps"),
    Same("initializer_range", "init_std", default=0.02),
    Same("tie_word_embeddings", "tied_embeddings", default=False),
    Written("bos_token_id", None),
    Written("eos_token_id", None),
    Written("pad_token_id", None),
    Written("attention_dropout", 0.0),
)
COMMON = (*PLAIN, Choice("hidden_act", "activation", values=(("silu", "swiglu"), ("gelu_pytorch_tanh", "geglu"))))
ALL_BIASES = Same("attention_bias", ("attention.qkv_bias", "attention.out_bias"), default=False)
DENSE = (
    *COMMON,
    Heads(),
    Same("intermediate_size", "d_ff"),
    Always("moe.num_experts", 0),
    Always("moe.num_shared_experts", 0),
)
WINDOW = Same("sliding_window", "attention.window", default=None, null=0)
NO_WINDOW = Only("use_sliding_window", (False, None), "means different layers in different releases of transformers")
EVERY_LAYER = (Always("moe.first_dense", 0), Always("moe.every", 1))
FIRST_DENSE = (
    Same("first_k_dense_replace", "moe.first_dense"),
    Always("moe.every", 1),
    Only("moe_layer_freq", (1,), "mixes dense layers among those with experts, which transformers does not read"),
)
TOP_K = Same("num_experts_per_tok", "moe.router.top_k")
SOFTMAX_TOP_K = (
    TOP_K,
    Always("moe.router.name", "mixtral"),
    Choice(
        "norm_topk_prob",
        "moe.router.mixtral.normalize",
        default=False,
        values=((False, "before"), (True, "after")),
    ),
)
RENORMALISED_TOP_K = (TOP_K, Always("moe.router.name", "mixtral"), Always("moe.router.mixtral.normalize", "after"))
SIGMOID_TOP_K = (
    TOP_K,
    Always("moe.router.name", "deepseek"),
    Only("scoring_func", ("sigmoid",), "is not there for this architecture"),
    Only("topk_method", ("noaux_tc",), "is not there for this architecture"),
    Same("norm_topk_prob", "moe.router.deepseek.normalize", default=True),
    Same("routed_scaling_factor", "moe.router.deepseek.scale"),
    Same("n_group", "moe.router.deepseek.num_groups", default=1, null=1),
    Same("topk_group", "moe.router.deepseek.top_groups", default=1, null=1),
)
LATENT = (
    *COMMON,
    LatentNormEps(1e-6),
    LatentHeads(),
    Same("kv_lora_rank", "attention.kv_rank"),
    Same("q_lora_rank", "attention.q_rank", null=0),
    Same("qk_nope_head_dim", "attention.head_dim"),
    Same("qk_rope_head_dim", "attention.rope_head_dim"),
    Same("v_head_dim", "attention.v_head_dim"),
    Only("attention_bias", (False,), "puts biases into latent attention, which has none here"),
    Same("intermediate_size", "d_ff"),
    Same("moe_intermediate_size", "moe.d_ff"),
    Same("n_routed_experts", "moe.num_experts"),
    SharedExperts(),
    *FIRST_DENSE,
)

GRANITE = (
    *COMMON,
    Heads(),
    ALL_BIASES,
    Rope(),
    AttentionMultiplier(),
    LogitsScaling(),
    Same("embedding_multiplier", "embedding_scale", default=1.0),
    Same("residual_multiplier", "residual_scale", default=1.0),
    Same("intermediate_size", ("moe.d_ff", "d_ff")),
    Same("num_local_experts", "moe.num_experts"),
    *EVERY_LAYER,
    *RENORMALISED_TOP_K,
    PooledBalanceLoss(),
)
ROPE_TABLE = r".*rotary_emb\.inv_freq"  # older releases saved it
MTP = r"model\.layers\.{num_layers}\..*"  # the layer that predicts one token further, where the model has none

LIST = (
    Family(
        "LlamaForCausalLM",
        "llama",
        (
            *DENSE,
            ALL_BIASES,
            Rope(),
            Only("mlp_bias", (False, None), "puts biases into the dense FFN, which has none here"),
        ),
        tensor_rows.LLAMA,
    ),
    Family(
        "MistralForCausalLM",
        "mistral",
        (*DENSE, Rope(), Same("sliding_window", "attention.window", default=4096, null=0)),
        tensor_rows.LLAMA,
    ),
    Family(
        "MixtralForCausalLM",
        "mixtral",
        (
            *COMMON,
            Heads(),
            WINDOW,
            Rope(theta=1e6),
            Same("intermediate_size", ("moe.d_ff", "d_ff")),
            Same("num_local_experts", "moe.num_experts"),
            Always("moe.num_shared_experts", 0),
            *EVERY_LAYER,
            *RENORMALISED_TOP_K,
            Only("router_jitter_noise", (0.0, None), "disturbs the experts' input, too, where ours is the router's alone"),
            PooledBalanceLoss(),
        ),
        tensor_rows.MIXTRAL,
    ),
    Family(
        "Qwen2MoeForCausalLM",
        "qwen2_moe",
        (
            *COMMON,
            Heads(),
            Same("qkv_bias", "attention.qkv_bias", default=True),
            NO_WINDOW,
            Rope(),
            Same("intermediate_size", "d_ff"),
            Same("moe_intermediate_size", "moe.d_ff"),
            Same("num_experts", "moe.num_experts"),
            SharedWidth("shared_expert_intermediate_size"),
            Always("moe.shared_gate", True),
            SparseSteps(),
            *SOFTMAX_TOP_K,
            PooledBalanceLoss(),
        ),
        tensor_rows.QWEN2_MOE,
    ),
    Family(
        "Qwen3MoeForCausalLM",
        "qwen3_moe",
        (
            *COMMON,
            Heads(),
            ALL_BIASES,
            Always("attention.qk_norm", "head"),
            NO_WINDOW,
            Rope(),
            Same("intermediate_size", "d_ff"),
            Same("moe_intermediate_size", "moe.d_ff"),
            Same("num_experts", "moe.num_experts", also="num_local_experts"),
            Always("moe.num_shared_experts", 0),
            SparseSteps(),
            *SOFTMAX_TOP_K,
            PooledBalanceLoss(),
        ),
        tensor_rows.QWEN3_MOE,
    ),
    Family(
        "OlmoeForCausalLM",
        "olmoe",
        (
            *COMMON,
            Heads(),
            ALL_BIASES,
            Always("attention.qk_norm", "full"),
            Same("clip_qkv", "attention.qkv_clip", default=None, null=0.0),
            Rope(),
            Same("intermediate_size", ("moe.d_ff", "d_ff")),
            Same("num_experts", "moe.num_experts"),
            Always("moe.num_shared_experts", 0),
            *EVERY_LAYER,
            *SOFTMAX_TOP_K,
            PooledBalanceLoss(),
        ),
        tensor_rows.OLMOE,
    ),
    Family(
        "DeepseekV2ForCausalLM",
        "deepseek_v2",
        (
            *LATENT,
            Rope(latent=True),
            Always("attention.rope.interleaved", True),
            TOP_K,
            Always("moe.router.name", "deepseek"),
            Always("moe.router.deepseek.score", "softmax"),
            Always("moe.router.deepseek.bias_update", "none"),
            Always("moe.router.deepseek.normalize", False),
            Only("norm_topk_prob", (False, None), "is done with a scale by transformers and without by the authors' code"),
            Only("scoring_func", ("softmax",), "is not there for this architecture"),
            ExpertGroups(),
            Same("routed_scaling_factor", "moe.router.deepseek.scale"),
            Only("mlp_bias", (False, None), "puts biases into the FFN, which has none here"),
            OwnBalanceLoss(),
        ),
        tensor_rows.DEEPSEEK_V2,
    ),
    Family(
        "DeepseekV3ForCausalLM",
        "deepseek_v3",
        (
            *LATENT,
            Rope(latent=True),
            Same("rope_interleave", "attention.rope.interleaved", default=True),
            *SIGMOID_TOP_K,
            LayerAhead(),
            OwnBalanceLoss(),
        ),
        tensor_rows.DEEPSEEK_V3,
        ignored=(ROPE_TABLE, MTP),
    ),
    Family(
        "Glm4MoeForCausalLM",
        "glm4_moe",
        (
            *COMMON,
            Heads(),
            Same("attention_bias", "attention.qkv_bias", default=False),
            Choice("use_qk_norm", "attention.qk_norm", default=False, values=((False, "none"), (True, "head"))),
            Rope(partial=0.5),
            Same("intermediate_size", "d_ff"),
            Same("moe_intermediate_size", "moe.d_ff"),
            Same("n_routed_experts", "moe.num_experts"),
            SharedExperts(),
            *FIRST_DENSE,
            *SIGMOID_TOP_K,
            LayerAhead(),
            OwnBalanceLoss(),
        ),
        tensor_rows.GLM4_MOE,
        ignored=(ROPE_TABLE, MTP),
    ),
    Family(
        "GptOssForCausalLM",
        "gpt_oss",
        (
            *PLAIN,
            Only("hidden_act", ("silu",), "is not there for this architecture"),
            Always("activation", "swiglu_clamped"),
            Same("swiglu_limit", "activation_limit", default=7.0),
            Only("swiglu_alpha", (1.702,), "is a constant here"),
            Heads(),
            Same("attention_bias", ("attention.qkv_bias", "attention.out_bias"), default=True),
            Always("attention.sinks", True),
            AlternatingWindows(),
            Rope(theta=150000.0),
            Same("intermediate_size", ("moe.d_ff", "d_ff")),
            Same("num_local_experts", "moe.num_experts"),
            Always("moe.num_shared_experts", 0),
            Always("moe.expert_bias", True),
            *EVERY_LAYER,
            *RENORMALISED_TOP_K,
            Always("moe.router.mixtral.bias", True),
            PooledBalanceLoss(),
        ),
        tensor_rows.GPT_OSS,
    ),
    Family("GraniteMoeForCausalLM", "granitemoe", (*GRANITE, Always("moe.num_shared_experts", 0)), tensor_rows.GRANITE_MOE),
    Family(
        "GraniteMoeSharedForCausalLM",
        "granitemoeshared",
        (*GRANITE, SharedWidth("shared_intermediate_size")),
        tensor_rows.GRANITE_MOE,
    ),
)
FAMILIES = {family.architecture: family for family in LIST}
