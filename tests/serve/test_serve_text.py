"""Text as its tokens come: put together it is what decoding all at once gives, and no stop string is ever shown."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_jax.data import tokenizers
from moe_jax.serve.text import AnswerText, Detokenizer

TEXTS = ["the theory of the thing, naïve 日本語 🙂🙂 the end\n" * 20]
BPE = tokenizers.train_bpe(TEXTS, 300)
KINDS = pytest.mark.parametrize("tokenizer", [tokenizers.Bytes(), BPE], ids=lambda tokenizer: tokenizer.kind)
BYTES = (
    st.binary(max_size=24)
    | st.text(max_size=12).map(str.encode)
    | st.lists(st.sampled_from([0x80, 0xE6, 0xF0, 0x9F, 65])).map(bytes)
)


def pieces(tokenizer, ids):
    detokenizer = Detokenizer(tokenizer)
    return [*map(detokenizer.push, map(int, ids)), detokenizer.finish()]


@settings(deadline=None)
@given(data=BYTES)
def test_bytes_that_are_text_or_not_come_as_decoded_at_once(data):
    got = pieces(tokenizers.Bytes(), data)
    assert "".join(got) == data.decode(errors="replace")
    if "\ufffd" not in data.decode(errors="replace"):
        assert got[-1] == ""


@KINDS
def test_any_ids_come_as_decoded_at_once(tokenizer):
    rng = np.random.default_rng(0)
    for _ in range(100):
        ids = rng.integers(0, tokenizer.vocab_size, rng.integers(0, 40))  # the end-of-text token too, which is nothing
        assert "".join(pieces(tokenizer, ids)) == tokenizer.decode(ids)


def test_a_character_comes_whole_with_its_last_byte():
    got = pieces(tokenizers.Bytes(), "a日🙂\ufffdb".encode())
    assert got == ["a", "", "", "日", "", "", "", "🙂", "", "", "", "\ufffdb", ""]


def test_a_text_of_errors_alone_is_not_kept():
    detokenizer = Detokenizer(tokenizers.Bytes())
    text = "".join(detokenizer.push(0x80) for _ in range(1000))
    assert text == "\ufffd" * 999
    assert len(detokenizer._tail) == 3
    assert detokenizer.finish() == "\ufffd"


def answer(text, stops, tokenizer=None):
    """(pieces, tokens given, stopped) of an answer of which nothing is read after a stop string."""
    tokenizer = tokenizer or tokenizers.Bytes()
    out, parts = AnswerText(tokenizer, stops), []
    for token in tokenizer.encode(text):
        parts.append(out.push(int(token), -1.0))
        if out.stopped:
            break
    else:
        parts.append(out.finish())
    return [part.text for part in parts], [token for part in parts for token in part.tokens], out.stopped


def test_what_may_be_a_stop_string_waits_until_it_is_known():
    assert answer("xaby", ["abc"])[0] == ["x", "", "", "aby", ""]
    assert answer("xabcy", ["abc"])[0] == ["x", "", "", ""]
    assert answer("ab", ["abc"])[0] == ["", "", "ab"]
    assert answer("aabc", ["abc"])[0] == ["", "a", "", ""]
    assert answer("ab日c", ["b日"]) == (["a", "", "", "", ""], [(97, -1.0, 0)], True)


def test_a_token_comes_with_the_character_that_it_begins():
    parts, tokens, _ = answer("a日b", [])
    assert parts == ["a", "", "", "日", "b", ""]
    assert [token.offset for token in tokens] == [0, 1, 1, 1, 2]
    cut, out = [0x80, 0xE6, 0x97, 0x23, 0x80, 0x80, *"é".encode()], AnswerText(tokenizers.Bytes())
    tokens = [token for byte in cut for token in out.push(byte, -1.0).tokens]
    assert [token.offset for token in tokens] == [0, 1, 1, 2, 3, 4, 5, 5]  # two errors, #, two errors, é
    assert [token.token for token in tokens] == cut
    out = AnswerText(tokenizers.Bytes())
    assert out.push(0xE6, -1.0) == ("", ())
    assert out.finish() == ("\ufffd", ((0xE6, -1.0, 0),))
    assert out.num_tokens == 1


@settings(deadline=None)
@given(text=st.text("abé", max_size=20), stops=st.lists(st.text("abé", min_size=1, max_size=4), max_size=4))
def test_an_answer_ends_before_the_first_stop_string(text, stops):
    """The first to be complete ends it: that is when it is seen."""
    ends = [text.index(stop) + len(stop) for stop in stops if stop in text]
    seen = text[: min(ends)] if ends else text
    expected = seen[: min(seen.index(stop) for stop in stops if stop in seen)] if ends else text
    for tokenizer in (tokenizers.Bytes(), BPE):
        parts, tokens, stopped = answer(text, stops, tokenizer)
        if tokenizer is BPE and ends:  # a token may bring several at once
            assert any(text.startswith("".join(parts) + stop) for stop in stops)
        else:
            assert "".join(parts) == expected
        assert stopped == bool(ends)
        assert all(token.offset < len("".join(parts)) for token in tokens)
        if not stopped:
            assert [token.token for token in tokens] == tokenizer.encode(text).tolist()
