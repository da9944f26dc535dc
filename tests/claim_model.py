"""A model in plain Python of who gets a row when buffers are full: the oracle of the dispatch and exchange tests."""

import numpy as np


def deliver(expert_NTK, weight_NTK, *, num_experts, capacity, peer_rows=None, priority="position"):
    """Runs the rule for N peers that share their experts' buffers; expert E is nowhere.

    Args:
      expert_NTK, weight_NTK: the choices of T tokens on each of N peers.
      capacity: rows of an expert's buffer; None for as many as needed.
      peer_rows: rows of a sender's buffer to each peer; None for as many as needed.
      priority: "position" (all first choices, then all second choices; peers and tokens in order) or "probability".

    Returns: delivered_NTK (bool), and the number dropped by senders and at the experts' buffers.
    """
    num_peers, num_tokens, choices = expert_NTK.shape
    experts_a_peer = num_experts // num_peers
    delivered_NTK = np.zeros(expert_NTK.shape, bool)
    claims = []  # in the order in which they claim
    for k in range(choices):
        for n in range(num_peers):
            for t in range(num_tokens):
                if expert_NTK[n, t, k] < num_experts:
                    claims.append((n, t, k))
    if priority == "probability":
        claims.sort(key=lambda claim: -weight_NTK[claim])  # stable: ties stay in the order above
    sent, used = {}, {}
    dropped_sender = dropped_capacity = 0
    for n, t, k in claims:
        expert = expert_NTK[n, t, k]
        route = (n, expert // experts_a_peer)
        if peer_rows is not None and sent.get(route, 0) >= peer_rows:
            dropped_sender += 1
            continue
        sent[route] = sent.get(route, 0) + 1
        if capacity is not None and used.get(expert, 0) >= capacity:
            dropped_capacity += 1
            continue
        used[expert] = used.get(expert, 0) + 1
        delivered_NTK[n, t, k] = True
    return delivered_NTK, dropped_sender, dropped_capacity
