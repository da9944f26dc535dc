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
    num_devices, num_tokens, choices = expert_NTK.shape
    counts = {name: np.zeros(num_devices, int) for name in ("sender", "refused", "receiver", "capacity")}
    held = [[[_Claim(k, n, t, k) for k in range(choices) if expert_NTK[n, t, k] < num_experts] for t in range(num_tokens)]
            for n in range(num_devices)]  # fmt: skip
    rows_LN, weights_known, num_local = [], True, num_experts

    def key(claims, row):
        """The order in which these claims, together one row, come up."""
        first = claims[0]
        weight = max(weight_NTK[claim[1:]] for claim in claims) if weights_known or capacity is not None else 1.0
        place = (first.choice, first.device, first.token) if capacity is not None else (first.column, row)
        return (-weight if priority == "probability" else 0, *place)

    for i, level in enumerate(levels):
        num_local //= level.size
        stride = math.prod(inner.size for inner in levels[i + 1 :])
        offered = {}
        for device in range(num_devices):
            for peer in range(level.size):
                parcels = []
                for row, claims in enumerate(held[device]):
                    bound = [c for c in claims if expert_NTK[c[1:]] // num_local % level.size == peer]
                    parcels += [(key(p, row), p) for p in ([bound] if level.once and bound else [[c] for c in bound])]
                parcels = [claims for _, claims in sorted(parcels)]
                fitting = len(parcels) if level.peer_rows is None else level.peer_rows
                counts["sender"][device] += sum(map(len, parcels[fitting:]))
                offered[device, peer] = parcels[:fitting]
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
        held, weights_known = arrived, weights_known and level.once
        rows_LN.append(sent_N)

    delivered_NTK = np.zeros(expert_NTK.shape, bool)
    used = {}
    queue = [
        (claim.column, device, row, claim) for device, rows in enumerate(held) for row, r in enumerate(rows) for claim in r
    ]
    if capacity is not None:
        queue.sort(key=lambda entry: key([entry[3]], entry[2]))
    else:
        queue.sort()
    for _, device, _, claim in queue:
        buffer = expert_NTK[claim[1:]] if capacity is not None else device
        used[buffer] = used.get(buffer, 0) + 1
        if used[buffer] <= (math.inf if (limit := compute_rows if capacity is None else capacity) is None else limit):
            delivered_NTK[claim[1:]] = True
        else:
            owner = expert_NTK[claim[1:]] * num_devices // num_experts
            counts["receiver" if capacity is None else "capacity"][owner] += 1
    counts_N = {f"{name}_N": count_N for name, count_N in counts.items()}
    return Outcome(delivered_NTK, **counts_N, rows_LN=np.array(rows_LN, int).reshape(len(levels), num_devices))
