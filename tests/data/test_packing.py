import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_jax.data import tokenized
from moe_jax.data.documents import DataError, Document
from moe_jax.data.packing import PackedRows
from moe_jax.data.tokenizers import Bytes

EOT = Bytes().eot
CORPORA = st.lists(st.text("abc", min_size=1, max_size=12), min_size=1, max_size=8)


def _split(texts, domains=None):
    domains = domains or ["a"] * len(texts)
    documents = [Document(domain, str(i), text) for i, (domain, text) in enumerate(zip(domains, texts, strict=True))]
    return tokenized.encode(documents, tuple(sorted(set(domains))), Bytes())


def _expected(stream, seq_len):
    """The rows, token by token: an oracle that walks the stream and starts a new piece at each eot and each row."""
    rows = []
    for begin in range(0, len(stream) - 1, seq_len):
        row = {name: [] for name in ("tokens", "targets", "segment_ids", "positions", "loss_weights")}
        segment, position = 0, 0
        for at in range(begin, begin + seq_len):
            inside = at < len(stream)
            token = stream[at] if inside else EOT
            target = stream[at + 1] if at + 1 < len(stream) else EOT
            segment, position = (segment + 1, 0) if token == EOT or at == begin else (segment, position + 1)
            row["tokens"].append(token)
            row["targets"].append(target)
            row["segment_ids"].append(segment if inside else 0)
            row["positions"].append(position if inside else 0)
            row["loss_weights"].append(float(target != EOT))
        rows.append(row)
    return rows


def _stream(split, seed):
    """The documents in the order of a packing, read back from rows of one token."""
    rows = PackedRows(split, 1, seed)
    return [int(rows[0]["tokens"][0])] + [int(rows[i]["targets"][0]) for i in range(len(rows))]


@settings(deadline=None, max_examples=60)
@given(CORPORA, st.integers(1, 9), st.integers(0, 3))
def test_rows_are_the_oracles(texts, seq_len, seed):
    split = _split(texts)
    stream = _stream(split, seed)
    assert sorted(bytes(t).decode() for t in _documents(stream)) == sorted(texts)
    expected = _expected(stream, seq_len)
    padded = PackedRows(split, seq_len, seed, pad_last=True)
    assert len(padded) == len(expected)
    for i, row in enumerate(expected):
        actual = padded[i]
        assert {name: actual[name].tolist() for name in row} == row
        assert int(actual["row_id"]) == i
    dropped = PackedRows(split, seq_len, seed)
    assert len(dropped) == (len(stream) - 1) // seq_len
    for i in range(len(dropped)):
        np.testing.assert_array_equal(dropped[i]["tokens"], padded[i]["tokens"])


def _documents(stream):
    ends = [i for i, token in enumerate(stream) if token == EOT] + [len(stream)]
    assert ends[0] == 0
    return [stream[begin + 1 : end] for begin, end in itertools.pairwise(ends)]


@settings(deadline=None, max_examples=60)
@given(CORPORA, st.integers(1, 9))
def test_every_token_of_a_document_is_a_counted_target_once_and_nothing_else_is(texts, seq_len):
    split = _split(texts)
    rows = PackedRows(split, seq_len, pad_last=True)
    counted = np.concatenate([rows[i]["targets"][rows[i]["loss_weights"] == 1] for i in range(len(rows))])
    np.testing.assert_array_equal(np.bincount(counted, minlength=257), split.counts())
    assert sum(map(len, texts)) == len(counted)


def test_arrays_have_the_types_of_the_contract():
    rows = PackedRows(_split(["abcdefgh"]), 4)
    row = rows[0]
    assert {name: (value.dtype, value.shape) for name, value in row.items()} == {
        "tokens": (np.int32, (4,)),
        "targets": (np.int32, (4,)),
        "segment_ids": (np.int32, (4,)),
        "positions": (np.int32, (4,)),
        "document_ids": (np.int32, (4,)),
        "loss_weights": (np.float32, (4,)),
        "row_id": (np.int32, ()),
    }
    with pytest.raises(IndexError):
        rows[len(rows)]


def test_every_piece_tells_its_document():
    split = _split(["abcdefgh", "ij", "klmno"])
    rows = PackedRows(split, 4, pad_last=True)
    for row in map(rows.__getitem__, range(len(rows))):
        for token, document in zip(row["tokens"], row["document_ids"], strict=True):
            assert document < 0 or token in split.tokens[split.offsets[document] : split.offsets[document + 1]]
    told = np.concatenate([rows[i]["document_ids"] for i in range(len(rows))])
    valid = np.concatenate([rows[i]["segment_ids"] for i in range(len(rows))]) > 0
    np.testing.assert_array_equal(told >= 0, valid)
    assert set(told[valid]) == {0, 1, 2}


def test_order_depends_on_the_seed_only_and_is_not_the_given_one():
    split = _split([chr(ord("a") + i) * 3 for i in range(20)])
    given = [list(map(ord, chr(ord("a") + i) * 3)) for i in range(20)]
    first, again, other = (_documents(_stream(split, seed)) for seed in (0, 0, 1))
    assert first == again
    assert first not in (other, given)
    assert other != given


def test_a_domain_has_only_its_documents():
    split = _split(["aaaa", "bb", "aa"], ["x", "y", "x"])
    rows = PackedRows(split, 3, domain="x", pad_last=True)
    tokens = np.concatenate([rows[i]["tokens"] for i in range(len(rows))])
    assert set(tokens.tolist()) == {EOT, ord("a")}
    with pytest.raises(DataError, match="domain 'z' has no documents here; those that have are x, y"):
        PackedRows(split, 3, domain="z")


def test_rows_past_the_end_are_padding():
    rows = PackedRows(_split(["abc"]), 2, pad_last=True)
    batch = rows.take(np.array([0, len(rows), len(rows) + 1]))
    assert batch["tokens"].shape == (3, 2)
    assert batch["row_id"].tolist() == [0, len(rows), len(rows) + 1]
    for name in ("segment_ids", "positions", "loss_weights"):
        assert not batch[name][1:].any()
    assert (batch["tokens"][1:] == EOT).all()
