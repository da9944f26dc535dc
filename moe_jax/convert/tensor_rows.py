"""The tensors of the families, as rows of tables that `families` puts together.

The names are those of the published files, which transformers 5 writes, too; of the experts also those that it has in memory.
"""

from moe_jax.convert.family import Row

WHOLE_MODEL = (
    Row("model.embed_tokens.weight", "V,D", "embed.table_VD"),
    Row("model.norm.weight", "D", "final_norm.scale_D"),
    Row("lm_head.weight", "V,D", "head.w_DV"),
)
NORMS = (
    Row("input_layernorm.weight", "D", "attention_norm.scale_D"),
    Row("post_attention_layernorm.weight", "D", "ffn_norm.scale_D"),
)
OUT = Row("self_attn.o_proj.weight", "D,HN", "attention.wo_HND")
GROUPED_ATTENTION = (
    *WHOLE_MODEL,
    *NORMS,
    OUT,
    Row("self_attn.q_proj.weight", "HN,D", "attention.wq_DHN"),
    Row("self_attn.k_proj.weight", "GN,D", "attention.wk_DGN"),
    Row("self_attn.v_proj.weight", "GN,D", "attention.wv_DGN"),
    Row("self_attn.q_proj.bias", "HN", "attention.bq_HN"),
    Row("self_attn.k_proj.bias", "GN", "attention.bk_GN"),
    Row("self_attn.v_proj.bias", "GN", "attention.bv_GN"),
    Row("self_attn.o_proj.bias", "D", "attention.bo_D"),
    Row("self_attn.q_norm.weight", "N", "attention.q_norm.scale_N"),
    Row("self_attn.k_norm.weight", "N", "attention.k_norm.scale_N"),
    Row("self_attn.q_norm.weight", "HN", "attention.q_norm.scale_HN"),
    Row("self_attn.k_norm.weight", "GN", "attention.k_norm.scale_GN"),
    Row("self_attn.sinks", "H", "attention.sink_H"),
)
LATENT_ATTENTION = (
    *WHOLE_MODEL,
    *NORMS,
    OUT,
    Row("self_attn.q_proj.weight", "HN,D", "attention.wq_DHN"),
    Row("self_attn.q_a_proj.weight", "R,D", "attention.wq_down_DR"),
    Row("self_attn.q_a_layernorm.weight", "R", "attention.q_latent_norm.scale_R"),
    Row("self_attn.q_b_proj.weight", "HN,R", "attention.wq_up_RHN"),
    Row("self_attn.kv_a_proj_with_mqa.weight", "R|N,D", "attention.wkv_down_DR", "attention.wk_rope_DN"),
    Row("self_attn.kv_a_layernorm.weight", "R", "attention.kv_latent_norm.scale_R"),
    Row("self_attn.kv_b_proj.weight", "HN|N,R", "attention.wk_up_RHN", "attention.wv_up_RHN"),
)
DENSE_MLP = (
    Row("mlp.gate_proj.weight", "F,D", "mlp.w_gate_DF"),
    Row("mlp.up_proj.weight", "F,D", "mlp.w_up_DF"),
    Row("mlp.down_proj.weight", "D,F", "mlp.w_down_FD"),
)
GATE, UP, DOWN, ROUTER = (
    f"moe.{name}" for name in ("experts.w_gate_EDF", "experts.w_up_EDF", "experts.w_down_EFD", "w_router_DE")
)
EXPERTS = (
    Row("mlp.gate.weight", "E,D", ROUTER),
    Row("mlp.experts.{e}.gate_proj.weight", "F,D", GATE),
    Row("mlp.experts.{e}.up_proj.weight", "F,D", UP),
    Row("mlp.experts.{e}.down_proj.weight", "D,F", DOWN),
    Row("mlp.experts.gate_up_proj", "E,F|F,D", GATE, UP),  # in memory
    Row("mlp.experts.down_proj", "E,D,F", DOWN),
)
BALANCING_BIAS = Row("mlp.gate.e_score_correction_bias", "E", "moe.bias_E")
AHEAD = (  # in the layer that predicts one token further, beside those of every layer
    Row("enorm.weight", "D", "mtp.embed_norm.scale_D"),
    Row("hnorm.weight", "D", "mtp.hidden_norm.scale_D"),
    Row("eh_proj.weight", "D,X|X", "mtp.w_embed_DD:XD", "mtp.w_hidden_DD:XD"),
    Row("shared_head.norm.weight", "D", "mtp.final_norm.scale_D"),
)


def _shared(name: str) -> tuple[Row, ...]:
    return (
        Row(f"mlp.{name}.gate_proj.weight", "F,D", "moe.shared.w_gate_DF"),
        Row(f"mlp.{name}.up_proj.weight", "F,D", "moe.shared.w_up_DF"),
        Row(f"mlp.{name}.down_proj.weight", "D,F", "moe.shared.w_down_FD"),
    )


GRANITE_MOE = (
    *GROUPED_ATTENTION,
    Row("block_sparse_moe.router.layer.weight", "E,D", ROUTER),
    Row("block_sparse_moe.input_linear.weight", "E,F|F,D", GATE, UP),
    Row("block_sparse_moe.output_linear.weight", "E,D,F", DOWN),
    Row("shared_mlp.input_linear.weight", "F|F,D", "moe.shared.w_gate_DF", "moe.shared.w_up_DF"),
    Row("shared_mlp.output_linear.weight", "D,F", "moe.shared.w_down_FD"),
    Row("block_sparse_moe.router.weight", "E,D", ROUTER),  # in memory
    Row("block_sparse_moe.experts.gate_up_proj", "E,F|F,D", GATE, UP),
    Row("block_sparse_moe.experts.down_proj", "E,D,F", DOWN),
)
LLAMA = (*GROUPED_ATTENTION, *DENSE_MLP)
MIXTRAL = (
    *GROUPED_ATTENTION,
    Row("block_sparse_moe.gate.weight", "E,D", ROUTER),
    Row("block_sparse_moe.experts.{e}.w1.weight", "F,D", GATE),
    Row("block_sparse_moe.experts.{e}.w3.weight", "F,D", UP),
    Row("block_sparse_moe.experts.{e}.w2.weight", "D,F", DOWN),
    *EXPERTS,
)
QWEN2_MOE = (
    *GROUPED_ATTENTION,
    *DENSE_MLP,
    *EXPERTS,
    *_shared("shared_expert"),
    Row("mlp.shared_expert_gate.weight", "1,D", "moe.w_shared_gate_D"),
)
QWEN3_MOE = (*GROUPED_ATTENTION, *DENSE_MLP, *EXPERTS)
OLMOE = (*GROUPED_ATTENTION, *EXPERTS)
DEEPSEEK_V2 = (*LATENT_ATTENTION, *DENSE_MLP, *EXPERTS, *_shared("shared_experts"))
DEEPSEEK_V3 = (*DEEPSEEK_V2, BALANCING_BIAS, *AHEAD)
GLM4_MOE = (*GROUPED_ATTENTION, *DENSE_MLP, *EXPERTS, *_shared("shared_experts"), BALANCING_BIAS, *AHEAD)
GPT_OSS = (
    *GROUPED_ATTENTION,
    Row("mlp.router.weight", "E,D", ROUTER),
    Row("mlp.router.bias", "E", "moe.b_router_E"),
    Row("mlp.experts.gate_up_proj", "E,D,F/F", GATE, UP),
    Row("mlp.experts.gate_up_proj_bias", "E,F/F", "moe.experts.b_gate_EF", "moe.experts.b_up_EF"),
    Row("mlp.experts.down_proj", "E,F,D", DOWN),
    Row("mlp.experts.down_proj_bias", "E,D", "moe.experts.b_down_ED"),
)
