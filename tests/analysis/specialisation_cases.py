"""Observations made of made-up choices, token by token, for the tests of what is told from them."""

import numpy as np

from moe_jax.train.observation import About, Observation


def observe(choice_TLM, domain_T, *, experts, document_T=None, token_T=None, seq_len=8, step=0, domains=None):
    """The observation of these choices, with every token in the sample.

    Args:
      choice_TLM: experts; `experts` is nowhere. K is M.
      domain_T: numbers of domains.
      experts: E.
      document_T: numbers; each token a document of its own where left out.
      token_T: ids; all 0 where left out.
    """
    choice_TLM, domain_T = np.asarray(choice_TLM), np.asarray(domain_T)
    (T, L, M), E = choice_TLM.shape, experts
    document_T = np.arange(T) if document_T is None else np.asarray(document_T)
    token_T = np.zeros(T, np.int64) if token_T is None else np.asarray(token_T)
    X = int(domain_T.max()) + 1 if domains is None else domains
    documents, first, document_T = np.unique(document_T, return_index=True, return_inverse=True)
    ids, token_T = np.unique(token_T, return_inverse=True)
    load_XLE, load_NLE = np.zeros((X, L, E), np.int64), np.zeros((len(ids), L, E), np.int64)
    load_ULE, together_LEE = np.zeros((len(documents), L, E), np.int64), np.zeros((L, E, E), np.int64)
    token_A, layer_A, choice_A = np.nonzero(choice_TLM < E)
    expert_A = choice_TLM[token_A, layer_A, choice_A]
    for load, group_T in ((load_XLE, domain_T), (load_NLE, token_T), (load_ULE, document_T)):
        np.add.at(load, (group_T[token_A], layer_A, expert_A), 1)
    for first_TL in np.moveaxis(choice_TLM, 2, 0):
        for second_TL in np.moveaxis(choice_TLM, 2, 0):
            both = np.nonzero((first_TL < E) & (second_TL < E))
            np.add.at(together_LEE, (both[1], first_TL[both], second_TL[both]), 1)
    about = About(step, "runs/made-up", "made-up", tuple(range(L)), E, M, tuple(f"domain{x}" for x in range(X)), "bytes", False)
    none_XL, none_LE, none_PL = np.zeros((X, L)), np.zeros((L, E), np.float32), np.zeros((1, L), np.int64)
    return Observation(
        about,
        np.bincount(domain_T, minlength=X),
        load_XLE,
        none_XL,
        none_XL,
        none_LE,
        together_LEE,
        ids.astype(np.int32),
        np.bincount(token_T),
        load_NLE,
        documents,
        domain_T[first].astype(np.int32),
        np.bincount(document_T),
        load_ULE,
        np.zeros(1, np.int64),
        none_PL,
        none_PL,
        np.zeros((3, L), np.int64),
        *_rows(choice_TLM, domain_T, token_T, seq_len, E),
        none_LE,
        np.zeros((L, E, E), np.float32),
    )


def _rows(choice_TLM, domain_T, token_T, S, E):
    """Rows of S tokens of one domain, padded at the end."""
    domain_R, tokens_RS, valid_RS, choice_RSLM = [], [], [], []
    for x in np.unique(domain_T):
        places = np.flatnonzero(domain_T == x)
        for begin in range(0, len(places), S):
            here = places[begin : begin + S]
            fill = (0, S - len(here))
            domain_R.append(x)
            tokens_RS.append(np.pad(token_T[here], fill))
            valid_RS.append(np.arange(S) < len(here))
            choice_RSLM.append(np.pad(choice_TLM[here], (fill, (0, 0), (0, 0)), constant_values=E))
    return np.array(domain_R, np.int32), np.array(tokens_RS, np.int32), np.array(valid_RS), np.array(choice_RSLM, np.uint16)


def distinct(rng, weight_TE, choices):
    """`choices` different experts of each token, drawn one after another with chances in proportion to the weights left, [T, K]."""
    gumbel_TE = np.log(weight_TE) + rng.gumbel(size=np.shape(weight_TE))
    return np.argsort(-gumbel_TE, axis=1)[:, :choices]
