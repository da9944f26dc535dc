"""Every router of the table once more, in NumPy and float64, one token at a time."""

import numpy as np

# name -> (family, top_k, options): the conformance tests run over all of them, with 8 experts.
CASES = {
    "switch": ("switch", 1, {"jitter": 0.0}),
    "switch_jitter": ("switch", 1, {}),
    "mixtral": ("mixtral", 2, {}),
    "mixtral_before": ("mixtral", 3, {"normalize": "before", "jitter": 0.1}),
    "mixtral_before_top1": ("mixtral", 1, {"normalize": "before"}),
    "deepseek": ("deepseek", 2, {}),
    "deepseek_groups": ("deepseek", 3, {"num_groups": 4, "top_groups": 2, "scale": 2.5}),
    "deepseek_groups_by_best": ("deepseek", 3, {"num_groups": 4, "top_groups": 2, "group_best": 1}),
    "deepseek_groups_of_one": ("deepseek", 2, {"num_groups": 8, "top_groups": 3}),
    "deepseek_softmax": ("deepseek", 2, {"score": "softmax", "normalize": False}),
    "deepseek_top1": ("deepseek", 1, {"normalize": False}),
}


def softmax(values):
    powers = np.exp(values - values.max())
    return powers / powers.sum()


def best(scores, k):
    """Indices of the k highest, best first, the lowest index first among equals."""
    return sorted(range(len(scores)), key=lambda i: (-scores[i], i))[:k]


def route(case, x_TD, w_DE, bias_E):
    """(expert_TK, weight_TK, probs_TE, logits_TE) of a case, without noise and without padding."""
    family, top_k, options = CASES[case]
    logits_TE = np.asarray(x_TD, np.float64) @ np.asarray(w_DE, np.float64)
    rows = [_route_token(family, top_k, options, logits, np.asarray(bias_E, np.float64)) for logits in logits_TE]
    expert_TK, weight_TK, probs_TE = (np.array(column) for column in zip(*rows, strict=True))
    return expert_TK, weight_TK, probs_TE, logits_TE


def _route_token(family, top_k, options, logits, bias):
    probs = softmax(logits)
    if family == "deepseek":
        return _deepseek(top_k, options, logits, bias)
    experts = best(logits, top_k)
    weights = probs[experts]
    if family == "mixtral" and options.get("normalize", "after") == "after":
        weights = weights / weights.sum()
    return experts, weights, probs


def _deepseek(top_k, options, logits, bias):
    affinity = softmax(logits) if options.get("score") == "softmax" else 1 / (1 + np.exp(-logits))
    biased = affinity + bias
    num_groups, top_groups = options.get("num_groups", 1), options.get("top_groups", 1)
    groups = np.array_split(np.arange(len(logits)), num_groups)
    group_scores = [sum(sorted(biased[group])[-options.get("group_best", 2) :]) for group in groups]
    allowed = np.concatenate([groups[g] for g in best(group_scores, top_groups)])
    experts = sorted(allowed, key=lambda e: (-biased[e], e))[:top_k]
    weights = affinity[experts]
    if options.get("normalize", True):
        weights = weights / weights.sum()
    return experts, options.get("scale", 1.0) * weights, affinity / affinity.sum()
