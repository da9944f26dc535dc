"""Relations in which several fields have a part: heads, positions, windows, which layers have experts, auxiliary losses."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from moe_jax.config import ModelConfig
from moe_jax.convert.fields import Ours, Theirs, get, refuse

SLIDING, FULL = "sliding_attention", "full_attention"


class Heads:
    """Key/value heads (null: as many as queries) and their width (null: d_model over the heads)."""

    def read(self, theirs: Theirs, ours: Ours) -> dict[str, Any]:
        """See `Relation`."""
        heads = ours["attention.num_heads"]
        return {
            "attention.num_kv_heads": theirs.get("num_key_value_heads") or heads,
            "attention.head_dim": theirs.get("head_dim") or ours["d_model"] // heads,
        }

    def write(self, model: ModelConfig) -> dict[str, Any]:
        """See `Relation`."""
        return {"num_key_value_heads": model.attention.num_kv_heads, "head_dim": model.attention.head_dim}


class LatentHeads:
    """Latent attention, where every head makes its own keys; their `head_dim` is the width of what rotates."""

    def read(self, theirs: Theirs, ours: Ours) -> dict[str, Any]:
        """See `Relation`."""
        heads = ours["attention.num_heads"]
        if (given := theirs.get("num_key_value_heads") or heads) != heads:
            raise refuse(
                "num_key_value_heads", given, f"differs from num_attention_heads = {heads}; latent attention has none."
            )
        return {"attention.num_kv_heads": heads}

    def write(self, model: ModelConfig) -> dict[str, Any]:
        """See `Relation`."""
        a = model.attention
        width = a.head_dim + a.rope_head_dim
        return {"num_key_value_heads": a.num_heads, "head_dim": a.rope_head_dim, "qk_head_dim": width}


@dataclass(frozen=True)
class LatentNormEps:
    """The epsilon of the latents' norms, which no field says and the code of the family has; ours is 0 where all norms have it."""

    eps: float

    def read(self, theirs: Theirs, ours: Ours) -> dict[str, Any]:
        """See `Relation`."""
        return {"attention.latent_norm_eps": 0.0 if ours["norm_eps"] == self.eps else self.eps}

    def write(self, model: ModelConfig) -> dict[str, Any]:
        """See `Relation`."""
        return {}


class ExpertGroups:
    """Which groups of experts a token may use, by each group's best expert; "greedy" reads no groups."""

    def read(self, theirs: Theirs, ours: Ours) -> dict[str, Any]:
        """See `Relation`."""
        path, method = "moe.router.deepseek", theirs.get("topk_method", "greedy")
        if method == "greedy":
            return {f"{path}.num_groups": 1, f"{path}.top_groups": 1, f"{path}.group_best": 1}
        if method != "group_limited_greedy":
            raise refuse("topk_method", method, "is not there for this architecture; 'greedy' and 'group_limited_greedy' are.")
        return {f"{path}.num_groups": theirs["n_group"], f"{path}.top_groups": theirs["topk_group"], f"{path}.group_best": 1}

    def write(self, model: ModelConfig) -> dict[str, Any]:
        """See `Relation`."""
        groups = get(model, "moe.router.deepseek.num_groups")
        if groups == 1:
            return {"topk_method": "greedy"}
        top = get(model, "moe.router.deepseek.top_groups")
        return {"topk_method": "group_limited_greedy", "n_group": groups, "topk_group": top}


class AttentionMultiplier:
    """The scale of queries times keys as a number; ours is 0 where it is 1 / sqrt(head_dim)."""

    def read(self, theirs: Theirs, ours: Ours) -> dict[str, Any]:
        """See `Relation`."""
        scale, usual = float(theirs.get("attention_multiplier", 1.0)), ours["attention.head_dim"] ** -0.5
        return {"attention.scale": 0.0 if math.isclose(scale, usual, rel_tol=1e-9) else scale}

    def write(self, model: ModelConfig) -> dict[str, Any]:
        """See `Relation`."""
        return {"attention_multiplier": model.attention.scale or model.attention.head_dim**-0.5}


class LogitsScaling:
    """They divide the logits, we multiply."""

    def read(self, theirs: Theirs, ours: Ours) -> dict[str, Any]:
        """See `Relation`."""
        return {"logit_scale": 1.0 / theirs.get("logits_scaling", 1.0)}

    def write(self, model: ModelConfig) -> dict[str, Any]:
        """See `Relation`."""
        return {"logits_scaling": 1.0 / model.logit_scale}


@dataclass(frozen=True)
class SharedWidth:
    """One shared expert of a width of its own, 0 for none; in the field `theirs`."""

    theirs: str

    def read(self, theirs: Theirs, ours: Ours) -> dict[str, Any]:
        """See `Relation`."""
        width = theirs.get(self.theirs) or 0
        return {"moe.num_shared_experts": int(width > 0), "moe.shared_d_ff": width}

    def write(self, model: ModelConfig) -> dict[str, Any]:
        """See `Relation`."""
        return {self.theirs: model.moe.num_shared_experts * (model.moe.shared_d_ff or model.moe.d_ff)}


class SharedExperts:
    """Shared experts as wide as the others. Null is none; in transformers there is always one, so none is not written."""

    def read(self, theirs: Theirs, ours: Ours) -> dict[str, Any]:
        """See `Relation`."""
        return {"moe.num_shared_experts": theirs.get("n_shared_experts") or 0}

    def write(self, model: ModelConfig) -> dict[str, Any]:
        """See `Relation`."""
        return {"n_shared_experts": model.moe.num_shared_experts or 1}


class AlternatingWindows:
    """`layer_types`: every n-th layer sees everything, the others `sliding_window` tokens. Not there: every second."""

    def read(self, theirs: Theirs, ours: Ours) -> dict[str, Any]:
        """See `Relation`."""
        window, layers = theirs.get("sliding_window") or 0, ours["num_layers"]
        types = theirs.get("layer_types") or [FULL if i % 2 else SLIDING for i in range(layers)]
        if not window or types == [FULL] * layers:
            return {"attention.window": 0, "attention.full_every": 0}
        every = types.index(FULL) + 1 if FULL in types else 0
        if types != [FULL if every and i % every == every - 1 else SLIDING for i in range(layers)]:
            raise refuse(
                "layer_types", types, f"is not every n-th of {layers} layers with full attention; no other order is there."
            )
        return {"attention.window": window, "attention.full_every": every}

    def write(self, model: ModelConfig) -> dict[str, Any]:
        """See `Relation`."""
        windows = [model.attention.layer_window(i) for i in range(model.num_layers)]
        return {
            "sliding_window": model.attention.window or None,
            "layer_types": [SLIDING if window else FULL for window in windows],
        }


def expert_layers(is_moe: Sequence[bool]) -> tuple[int, int] | None:
    """(first_dense, every) of `MoEConfig` for this order of layers, or None where there are none.

    Of several answers that with the smallest `every`.
    """
    layers = [i for i, moe in enumerate(is_moe) if moe]
    for every in range(1, len(is_moe) + 1) if layers else ():
        first = layers[0] - every + 1
        if first < 0 or (len(is_moe) - first) % every:
            continue
        if layers == list(range(layers[0], len(is_moe), every)):
            return first, every
    return None


class SparseSteps:
    """The last of every `decoder_sparse_step` layers has experts unless `mlp_only_layers` names it."""

    def read(self, theirs: Theirs, ours: Ours) -> dict[str, Any]:
        """See `Relation`."""
        step, dense = theirs.get("decoder_sparse_step", 1), theirs.get("mlp_only_layers") or []
        is_moe = [(i + 1) % step == 0 and i not in dense for i in range(ours["num_layers"])]
        if (found := expert_layers(is_moe)) is None:
            why = (
                f"with decoder_sparse_step = {step} and {len(is_moe)} layers is not some first dense layers and then every n-th"
            )
            raise refuse("mlp_only_layers", dense, f"{why} with experts, to the last layer; no other order is there.")
        return {"moe.first_dense": found[0], "moe.every": found[1]}

    def write(self, model: ModelConfig) -> dict[str, Any]:
        """See `Relation`."""
        every, layers = model.moe.every, range(model.num_layers)
        step = every if model.moe.first_dense % every == 0 else 1
        dense = [i for i in layers if (i + 1) % step == 0 and not model.is_moe_layer(i)]
        return {"decoder_sparse_step": step, "mlp_only_layers": dense}


class LayerAhead:
    """The layer that predicts one token further. Whether a file has it is not for config.json to say: it is read when asked for."""

    def read(self, theirs: Theirs, ours: Ours) -> dict[str, Any]:
        """See `Relation`."""
        return {"mtp_layers": 0}

    def write(self, model: ModelConfig) -> dict[str, Any]:
        """See `Relation`."""
        return {"num_nextn_predict_layers": model.mtp_layers}


class PooledBalanceLoss:
    """`router_aux_loss_coef`, whether or not `output_router_logits` puts it to use.

    Their loss is K at perfect balance, of the tokens of all layers pooled; ours is 1, a loss a layer, and the layers' are summed. So
    a coefficient c there is c K / L here with L MoE layers: the same number, and the same gradient, when all layers route alike.
    """

    def read(self, theirs: Theirs, ours: Ours) -> dict[str, Any]:
        """See `Relation`."""
        moe_layers = (ours["num_layers"] - ours["moe.first_dense"]) // ours["moe.every"]
        coefficient = theirs.get("router_aux_loss_coef") or 0.0
        return {"moe.balance_loss_weight": coefficient * ours["moe.router.top_k"] / max(moe_layers, 1)}

    def write(self, model: ModelConfig) -> dict[str, Any]:
        """See `Relation`."""
        return {"router_aux_loss_coef": model.moe.balance_loss_weight * model.num_moe_layers / model.moe.router.top_k}


class OwnBalanceLoss:
    """`aux_loss_alpha` and `seq_aux`: 1 at perfect balance and a loss a layer, as ours; transformers itself leaves it out."""

    def read(self, theirs: Theirs, ours: Ours) -> dict[str, Any]:
        """See `Relation`."""
        scope = "sequence" if theirs.get("seq_aux", True) else "global"
        return {"moe.balance_loss_weight": theirs.get("aux_loss_alpha") or 0.0, "moe.balance_loss_scope": scope}

    def write(self, model: ModelConfig) -> dict[str, Any]:
        """See `Relation`."""
        return {"aux_loss_alpha": model.moe.balance_loss_weight, "seq_aux": model.moe.balance_loss_scope == "sequence"}
