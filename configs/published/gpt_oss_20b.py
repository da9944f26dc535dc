"""gpt-oss-20b: 20.91 B parameters, 3.61 B active without the embedding (OpenAI, 2508.10925).

Source: the model card and config.json of openai/gpt-oss-20b, as MaxText carries it. Every other layer has a window of 128 tokens, from
the first on; a learned sink a head; biases everywhere; the softmax over the 4 chosen experts. Published weights store experts in 4 bits.
The weight of the balance loss is not published; 0.001 is Qwen3's.
"""

from ml_collections import ConfigDict

from configs.published import presets


def get_config(arg: str = "") -> ConfigDict:
    """gpt-oss-20b; `arg` as in `configs.published.presets`."""
    config = presets.start()
    config.model.update(vocab_size=201_088, d_model=2880, num_layers=24, d_ff=2880, norm_eps=1e-5)
    config.model.update(activation="swiglu_clamped", activation_limit=7.0)
    config.model.attention.update(num_heads=64, num_kv_heads=8, head_dim=64, qkv_bias=True, out_bias=True, sinks=True)
    config.model.attention.update(window=128, full_every=2)
    config.model.attention.rope.update(theta=150_000.0, scaling="yarn", factor=32.0, original_length=4096, truncate=False)
    config.model.moe.update(num_experts=32, d_ff=2880, expert_bias=True, balance_loss_weight=0.001)
    config.model.moe.router.update(name="mixtral", top_k=4)
    config.model.moe.router.mixtral.bias = True
    return presets.finish(config, arg)
