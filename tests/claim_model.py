"""A model in plain Python of who gets a row when buffers are full: the oracle of the dispatch and exchange tests."""

import math
from typing import NamedTuple

import numpy as np


class Level(NamedTuple):
    """One crossing between `size` peers.

    Attributes:
      size: peers; those of the first level are the coarsest parts of the devices.
      once: whether a token bound for several experts of a peer is one row; else every assignment is.
      peer_rows: rows of a sender's buffer to each peer; None for as many as needed.
      receive_rows: rows of a receiver's buffer for all peers together; None for as many as needed.
    """

    size: int
    once: bool = False
    peer_rows: int | None = None
    receive_rows: int | None = None


class Outcome(NamedTuple):
    """What became of the assignments of N devices.

    Attributes:
      delivered_NTK: bool.
      sender_N: assignments with no row in a sender's buffer.
      refused_N: assignments refused by a receiver, at their sender.
      receiver_N: assignments that a receiver had no room for, there.
      capacity_N: assignments that found their expert's buffer full, at the expert.
      rows_LN: rows sent to others by each device at each level.
    """

    delivered_NTK: np.ndarray
    sender_N: np.ndarray
    refused_N: np.ndarray
    receiver_N: np.ndarray
    capacity_N: np.ndarray
    rows_LN: np.ndarray


class _Claim(NamedTuple):
    """An assignment as it lies on a device: its column in the device's list and where it comes from."""

    column: int
    device: int
    token: int
    choice: int


def deliver(expert_NTK, weight_NTK, *, num_experts, levels=(), capacity=None, compute_rows=None, priority="position"):
    """Runs the rules for N peers whose T tokens make K choices each; expert E is nowhere.

    Whoever claims first, by `priority`: "position" is all first choices, then all second choices, ..., devices and tokens in order;
    "probability" the largest weight, ties as by position. A row of several assignments claims with its first one, or with its
    largest weight. That order is known everywhere when experts have buffers. When they have none a receiver knows no more than what
    travels: its own list, column after column, and weights if tokens are sent once. A full receiver has accepted its own rows first,
    then the next device's, and so on around the ring.

    Args:
      levels: crossings; none when every expert sees everything.
      capacity: rows of an expert's buffer; None for no such buffers.
      compute_rows: assignments that a device computes after the last level, the first of its list; None for all.
    """
    rules = _Rules(expert_NTK, weight_NTK, num_experts, capacity is not None, priority)
    counts = {name: np.zeros(len(expert_NTK), int) for name in ("sender", "refused", "receiver", "capacity")}
    held, rows_LN, num_local, weights_known = rules.start(), [], num_experts, True
    for i, level in enumerate(levels):
        num_local //= level.size
        stride = math.prod(inner.size for inner in levels[i + 1 :])
        offered = _offers(rules, held, level, num_local, weights_known, counts)
        held, sent_N = _acceptances(offered, level, stride, counts)
        weights_known = weights_known and level.once
        rows_LN.append(sent_N)
    delivered_NTK = _computed(rules, held, capacity, compute_rows, weights_known, counts)
    counts_N = {f"{name}_N": count_N for name, count_N in counts.items()}
    return Outcome(delivered_NTK, **counts_N, rows_LN=np.array(rows_LN, int).reshape(len(levels), len(expert_NTK)))


class _Rules(NamedTuple):
    """What decides who claims first."""

    expert_NTK: np.ndarray
    weight_NTK: np.ndarray
    num_experts: int
    has_capacity: bool
    priority: str

    def start(self):
        """The rows [N][T] of the devices before anything has travelled, each a list of claims."""
        claims = np.ndenumerate(self.expert_NTK)
        held = [[[] for _ in experts_TK] for experts_TK in self.expert_NTK]
        for (device, token, choice), expert in claims:
            if expert < self.num_experts:
                held[device][token].append(_Claim(choice, device, token, choice))
        return held

    def key(self, claims, row, weights_known):
        """The order in which these claims, together one row, come up."""
        first = claims[0]
        weight = max(self.weight_NTK[claim[1:]] for claim in claims) if weights_known or self.has_capacity else 1.0
        place = (first.choice, first.device, first.token) if self.has_capacity else (first.column, row)
        return (-weight if self.priority == "probability" else 0, *place)


def _offers(rules, held, level, num_local, weights_known, counts):
    """What fits the senders' buffers, by (device, peer): parcels in order."""
    offered = {}
    for device, rows in enumerate(held):
        for peer in range(level.size):
            parcels = []
            for row, claims in enumerate(rows):
                bound = [c for c in claims if rules.expert_NTK[c[1:]] // num_local % level.size == peer]
                together = [bound] if level.once and bound else [[c] for c in bound]
                parcels += [(rules.key(claims, row, weights_known), claims) for claims in together]
            parcels = [claims for _, claims in sorted(parcels)]
            fitting = len(parcels) if level.peer_rows is None else level.peer_rows
            counts["sender"][device] += sum(map(len, parcels[fitting:]))
            offered[device, peer] = parcels[:fitting]
    return offered


def _acceptances(offered, level, stride, counts):
    """What fits the receivers' buffers: the rows that devices then hold, and how many each sent to others."""
    num_devices = len(offered) // level.size
    sent_N, arrived = np.zeros(num_devices, int), []
    for device in range(num_devices):
        me = device // stride % level.size
        room, accepted = math.inf if level.receive_rows is None else level.receive_rows, {}
        for turn in range(level.size):
            peer = (me + turn) % level.size
            sender = device + (peer - me) * stride
            parcels = offered[sender, me]
            fitting = int(min(room, len(parcels)))
            room -= fitting
            refused = sum(map(len, parcels[fitting:]))
            counts["refused"][sender] += refused
            counts["receiver"][device] += refused
            accepted[peer] = parcels[:fitting]
            sent_N[sender] += fitting if sender != device else 0
        rows = [claims for peer in range(level.size) for claims in accepted[peer]]
        arrived.append(rows if level.once else [[claim._replace(column=0)] for [claim] in rows])
    return arrived, sent_N


def _computed(rules, held, capacity, compute_rows, weights_known, counts):
    """bool [N, T, K]: what finds room with its expert, or on its device."""
    delivered_NTK = np.zeros(rules.expert_NTK.shape, bool)
    queue = [(c.column, device, row, c) for device, rows in enumerate(held) for row, claims in enumerate(rows) for c in claims]
    queue.sort(key=None if capacity is None else lambda entry: rules.key([entry[3]], entry[2], weights_known))
    limit, used = compute_rows if capacity is None else capacity, {}
    for _, device, _, claim in queue:
        expert = rules.expert_NTK[claim[1:]]
        buffer = device if capacity is None else expert
        used[buffer] = used.get(buffer, 0) + 1
        if limit is None or used[buffer] <= limit:
            delivered_NTK[claim[1:]] = True
        else:
            owner = expert * len(rules.expert_NTK) // rules.num_experts
            counts["receiver" if capacity is None else "capacity"][owner] += 1
    return delivered_NTK
