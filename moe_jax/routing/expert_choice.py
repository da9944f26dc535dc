"""Expert choice: every expert takes its best tokens (Zhou et al., 2202.09368, section 3.2). Perfect balance, no loss for it.

Beyond the package's letters: `G` all tokens of the pass, over all devices; `Q` groups of `M` tokens that compete.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from moe_jax.routing.contract import Router, Routing, Tokens
from moe_jax.routing.options import check_choice
from moe_jax.routing.scores import router_logits

GROUPS = ("sequence", "batch", "position")


@dataclass(frozen=True)
class ExpertChoice(Router):
    """Among the n valid tokens of a group each expert takes the C = ceil(k n / E) with the highest affinity; that is the weight too.

    The affinities S are the softmax over experts of x W, and k is what the paper calls the capacity factor. A token is taken by k experts
    on average, by none to all of them; on a tie the earlier token is taken. Who competes is `group`:

      sequence  the tokens of a sequence. Later tokens decide about earlier ones, so a language model's loss would mean nothing.
      batch     all tokens of the pass, as in the paper; the same, and across sequences.
      position  the tokens at one position of all sequences of the pass: no token depends on a later position, but it does on the other
                sequences, and with few of them rounding up costs: below E / k sequences every token meets more than k experts, at one
                sequence all E. Generation differs from training as much as its batch does.

    Under gradient accumulation the pass is a microbatch. A replay must be a choice that this router could have made.
    """

    group: str = "sequence"  # whose tokens compete for an expert: "sequence", "batch" (the paper's) or "position" (causal)

    def __post_init__(self):
        super().__post_init__()
        check_choice("model.moe.router.expert_choice.group", self.group, GROUPS)

    by_token = False

    @property
    def causal(self) -> bool:
        return self.group == "position"

    @property
    def causal_in_training(self) -> bool:
        return self.group == "position"

    def __call__(self, tokens: Tokens, params: dict[str, jax.Array], state: dict[str, jax.Array]) -> Routing:
        """See `Router.__call__`. The list goes by expert, and by token within; what is left of an expert's part goes nowhere."""
        logits_TE = router_logits(tokens, params["w_router_DE"], self.num_experts)
        probs_TE = jax.nn.softmax(logits_TE)
        if tokens.replay_TM is None:
            chosen_TE, most = self._choose(tokens, jax.lax.stop_gradient(probs_TE)), self._most(tokens)
        else:
            chosen_TE, most = (tokens.replay_TM < self.num_experts) & tokens.mask_T[:, None], self._most(tokens)
        token_EC = _first_chosen(chosen_TE, most)
        num_tokens = tokens.mask_T.shape[0]
        is_token_EC = token_EC < num_tokens
        expert_EC = jnp.where(is_token_EC, jnp.arange(self.num_experts, dtype=jnp.int32)[:, None], self.num_experts)
        weight_TE = probs_TE if tokens.replay_weight_TM is None else tokens.replay_weight_TM
        weight_EC = jnp.take_along_axis(weight_TE.T, token_EC, axis=1, mode="clip")
        return Routing(
            token_A=jnp.where(is_token_EC, token_EC, 0).reshape(-1),
            expert_A=expert_EC.reshape(-1),
            weight_A=jnp.where(is_token_EC, weight_EC, 0.0).reshape(-1),
            probs_TE=probs_TE,
            logits_TE=logits_TE,
        )

    def capacity(self, num_tokens):
        """C of a group of `num_tokens` (a number or an array): ceil(k n / E)."""
        return (self.top_k * num_tokens + self.num_experts - 1) // self.num_experts

    def _most(self, tokens):
        """The most tokens of this device that an expert can take: the smallest number known without their values."""
        num_tokens, sequences = tokens.mask_T.shape[0], tokens.num_sequences
        length = num_tokens // sequences
        if self.group == "sequence":
            return sequences * self.capacity(length)
        everybody = jax.eval_shape(tokens.batch.gather, tokens.mask_T).shape[0]
        if self.group == "batch":
            return min(num_tokens, self.capacity(everybody))
        return length * min(sequences, self.capacity(everybody // length))

    def _choose(self, tokens, scores_TE):
        """Bool [T, E]: which experts take which tokens."""
        length = tokens.mask_T.shape[0] // tokens.num_sequences
        by_sequence = (-1, length)
        if self.group == "sequence":
            taken_QME = self._take(scores_TE.reshape(*by_sequence, self.num_experts), tokens.mask_T.reshape(by_sequence))
            return taken_QME.reshape(scores_TE.shape)
        scores_GE, mask_G = tokens.batch.gather(scores_TE), tokens.batch.gather(tokens.mask_T)
        if self.group == "batch":
            return tokens.batch.own(self._take(scores_GE[None], mask_G[None])[0])
        scores_QME = scores_GE.reshape(*by_sequence, self.num_experts).swapaxes(0, 1)
        taken_QME = self._take(scores_QME, mask_G.reshape(by_sequence).T)
        return tokens.batch.own(taken_QME.swapaxes(0, 1).reshape(scores_GE.shape))

    def _take(self, scores_QME, mask_QM):
        """Bool [Q, M, E]: the C tokens of each group with an expert's highest scores, C by the group's valid tokens."""
        groups, members, _ = scores_QME.shape
        scores_QEM = jnp.where(mask_QM[:, None], scores_QME.swapaxes(1, 2), -jnp.inf)
        member_QEC = jax.lax.top_k(scores_QEM, self.capacity(members))[1]
        capacity_Q = self.capacity(mask_QM.sum(1, dtype=jnp.int32))
        within_QEC = jnp.broadcast_to(jnp.arange(member_QEC.shape[2]) < capacity_Q[:, None, None], member_QEC.shape)
        index = jnp.arange(groups)[:, None, None], member_QEC, jnp.arange(self.num_experts)[:, None]
        return jnp.zeros(scores_QME.shape, bool).at[index].set(within_QEC, unique_indices=True)


def _first_chosen(chosen_TE, most):
    """int32 [E, most]: the tokens chosen for each expert in their order; T where there are no more."""
    num_tokens, num_experts = chosen_TE.shape
    place_TE = jnp.where(chosen_TE, jnp.cumsum(chosen_TE, axis=0, dtype=jnp.int32) - 1, most)
    token_T1 = jnp.arange(num_tokens, dtype=jnp.int32)[:, None]
    nobody_EC = jnp.full((num_experts, most), num_tokens, jnp.int32)
    return nobody_EC.at[jnp.arange(num_experts), place_TE].set(token_T1, mode="drop")
