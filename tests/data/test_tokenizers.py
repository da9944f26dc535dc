import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_jax.data import tokenizers
from moe_jax.data.documents import DataError

TEXTS = ["the theory of the thing, then the other thing\n" * 20, "def f(x):\n    return x  # naïve 日本語 🙂\n" * 20]
BPE = tokenizers.train_bpe(TEXTS, 300)
KINDS = pytest.mark.parametrize("tokenizer", [tokenizers.Bytes(), BPE], ids=lambda tokenizer: tokenizer.kind)
PIECES = st.text(max_size=10) | st.sampled_from([tokenizers.EOT, "the ", "\n  ", "日", "\0"])
TEXT = st.lists(PIECES, max_size=10).map("".join)


@KINDS
@settings(deadline=None)
@given(text=TEXT)
def test_round_trip_is_exact_and_bytes_add_up(tokenizer, text):
    ids = tokenizer.encode(text)
    assert ids.dtype == np.int32
    assert tokenizer.decode(ids) == text
    assert tokenizer.token_bytes()[ids].sum() == len(text.encode())
    assert tokenizer.eot not in ids


@KINDS
def test_special_and_foreign_ids(tokenizer):
    assert tokenizer.eot == tokenizer.vocab_size - 1
    assert tokenizer.token_bytes().shape == (tokenizer.vocab_size,)
    assert tokenizer.token_bytes().dtype == np.int32
    assert tokenizer.token_bytes()[tokenizer.eot] == 0
    assert (np.delete(tokenizer.token_bytes(), tokenizer.eot) > 0).all()
    ids = [tokenizer.eot, *tokenizer.encode("ab"), tokenizer.vocab_size]
    assert tokenizer.decode(ids) == "ab\ufffd"
    assert tokenizer.decode(tokenizers.Bytes().encode("é")[:1]) == "\ufffd" or tokenizer.kind == "bpe"


@KINDS
def test_saved_and_loaded_is_equal(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "t")
    loaded = tokenizers.load(tmp_path / "t")
    assert (loaded.kind, loaded.vocab_size, loaded.fingerprint) == (tokenizer.kind, tokenizer.vocab_size, tokenizer.fingerprint)
    assert all(np.array_equal(loaded.encode(text), tokenizer.encode(text)) for text in TEXTS)


@KINDS
def test_a_batch_is_its_texts(tokenizer):
    for ids, text in zip(tokenizer.encode_batch(TEXTS), TEXTS, strict=True):
        np.testing.assert_array_equal(ids, tokenizer.encode(text))


def test_bytes_are_the_utf8_bytes():
    assert tokenizers.Bytes().encode("é\0").tolist() == [0xC3, 0xA9, 0]


def test_bpe_is_deterministic_compresses_and_depends_on_its_text():
    assert BPE.vocab_size == 300
    assert tokenizers.train_bpe(TEXTS, 300).fingerprint == BPE.fingerprint
    assert tokenizers.train_bpe(TEXTS[:1] * 2, 300).fingerprint != BPE.fingerprint
    assert len(BPE.encode(TEXTS[0])) < len(TEXTS[0]) / 2


def test_bpe_of_little_text_has_fewer_tokens():
    tokenizer = tokenizers.train_bpe(["abab"], 4096)
    assert 257 <= tokenizer.vocab_size < 265
    assert tokenizer.decode(tokenizer.encode("日本")) == "日本"


def test_refusals(tmp_path):
    with pytest.raises(DataError, match=r"data\.bpe_vocab_size = 256 is less than 257"):
        tokenizers.train_bpe(TEXTS, 256)
    with pytest.raises(DataError, match=r"holds no readable tokenizer"):
        tokenizers.load(tmp_path)
    BPE.save(tmp_path)
    saved = json.loads((tmp_path / "tokenizer.json").read_text())
    saved["model"]["vocab"].pop(tokenizers.EOT)
    (tmp_path / "tokenizer.json").write_text(json.dumps(saved))
    with pytest.raises(DataError, match=r"'bpe' vocabulary must number its 299 tokens"):
        tokenizers.load(tmp_path)
