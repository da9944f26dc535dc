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
def test_written_for_transformers_and_read_again(tokenizer, tmp_path):
    """As a checkpoint's tokenizer it gives the same ids and bytes, with one special token, which no text encodes to."""
    tokenizers.save_pretrained(tokenizer, tmp_path)
    again = tokenizers.load_pretrained(tmp_path)
    assert (again.vocab_size, again.eot) == (tokenizer.vocab_size, tokenizer.eot)
    for text in [*TEXTS, tokenizers.EOT]:
        np.testing.assert_array_equal(again.encode(text), tokenizer.encode(text))
    np.testing.assert_array_equal(again.token_bytes(), tokenizer.token_bytes())
    assert json.loads((tmp_path / "tokenizer_config.json").read_text())["eos_token"] == tokenizers.EOT
    before = (tmp_path / "tokenizer.json").read_bytes()
    tokenizers.save_pretrained(again, tmp_path)
    assert (tmp_path / "tokenizer.json").read_bytes() == before


@pytest.mark.slow
@KINDS
def test_transformers_reads_the_tokenizer(tokenizer, tmp_path):
    import transformers

    tokenizers.save_pretrained(tokenizer, tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert theirs.eos_token_id == tokenizer.eot
    for text in TEXTS:
        assert theirs(text)["input_ids"] == tokenizer.encode(text).tolist()
        assert theirs.decode(tokenizer.encode(text)) == text
    assert theirs(f"{tokenizers.EOT}the ")["input_ids"] == [tokenizer.eot, *tokenizer.encode("the ")]


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


def _folder(folder, *, eos, where="config.json", tokenizer=None):
    """A folder with a tokenizer.json and a file that says which token ends a text."""
    folder.mkdir(exist_ok=True)
    (tokenizer or BPE._tokenizer).save(str(folder / "tokenizer.json"))
    (folder / where).write_text(json.dumps(eos))
    return folder


def test_the_tokenizer_of_a_checkpoint_is_the_one_it_holds(tmp_path):
    """Its ids are those of the library; a special token's name in a text is text."""
    tokenizer = tokenizers.load_pretrained(_folder(tmp_path / "a", eos={"eos_token_id": [299, 3]}))
    assert (tokenizer.kind, tokenizer.vocab_size, tokenizer.eot) == ("hf", 300, 299)
    for text in TEXTS:
        np.testing.assert_array_equal(tokenizer.encode(text), BPE.encode(text))
        assert tokenizer.decode([tokenizer.eot, *tokenizer.encode(text)]) == text
        assert tokenizer.token_bytes()[tokenizer.encode(text)].sum() == len(text.encode())
    tokenizer.save(tmp_path / "run")
    loaded = tokenizers.load(tmp_path / "run")
    assert (loaded.fingerprint, loaded.eot) == (tokenizer.fingerprint, 299)
    special = tokenizers.tokenizers.Tokenizer.from_str(BPE._tokenizer.to_str())
    special.add_special_tokens(["<|im_end|>"])
    eos = {"eos_token": {"content": "<|im_end|>"}}
    chat = tokenizers.load_pretrained(_folder(tmp_path / "b", eos=eos, where="tokenizer_config.json", tokenizer=special))
    assert (chat.vocab_size, chat.eot, chat.token_bytes()[300]) == (301, 300, 0)
    assert chat.decode(chat.encode("a<|im_end|>")) == "a<|im_end|>"
    assert 300 not in chat.encode("a<|im_end|>")


def test_a_tokenizer_of_pieces_with_spaces_and_bytes(tmp_path):
    library = tokenizers.tokenizers
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"<0x{byte:02X}>": 3 + byte for byte in range(256)}
    vocab |= {piece: 259 + i for i, piece in enumerate(["a", "b", "\u2581", "\u2581a"])}
    made = library.Tokenizer(library.models.BPE(vocab, [("\u2581", "a")], unk_token="<unk>", byte_fallback=True))
    made.normalizer = library.normalizers.Replace(" ", "\u2581")
    made.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer = tokenizers.load_pretrained(
        _folder(tmp_path, eos={"eos_token_id": 2}, where="generation_config.json", tokenizer=made)
    )
    ids = tokenizer.encode("ab a é")
    assert ids.tolist() == [259, 260, 262, 261, 3 + 0xC3, 3 + 0xA9]
    assert tokenizer.decode(ids) == "ab a é"
    assert tokenizer.token_bytes()[ids].sum() == len("ab a é".encode())


def test_refusals_of_a_checkpoints_tokenizer(tmp_path):
    with pytest.raises(DataError, match=r"has no tokenizer\.json; download it too"):
        tokenizers.load_pretrained(tmp_path)
    with pytest.raises(DataError, match=r"does not say which token ends a text: none of config\.json"):
        tokenizers.load_pretrained(_folder(tmp_path, eos={}))
    with pytest.raises(DataError, match="is 300, and its ids are 0 to 299"):
        tokenizers.load_pretrained(_folder(tmp_path, eos={"eos_token_id": 300}))
    with pytest.raises(DataError, match=r"eos_token = '</s>' is no token of tokenizer\.json"):
        tokenizers.load_pretrained(_folder(tmp_path, eos={"eos_token": "</s>"}))
    (tmp_path / "config.json").write_text('{"eos_token_id": 1}')
    (tmp_path / "tokenizer.json").write_text('{"model": {}}')
    with pytest.raises(DataError, match="is not a tokenizer that can be read"):
        tokenizers.load_pretrained(tmp_path)
    words = tokenizers.tokenizers.Tokenizer(tokenizers.tokenizers.models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    with pytest.raises(DataError, match="is neither byte-level nor of SentencePiece's form"):
        tokenizers.load_pretrained(_folder(tmp_path, eos={"eos_token_id": 1}, tokenizer=words))
