import math
import os

import numpy as np
import pytest

from moe_jax.config import DataConfig
from moe_jax.data import cache, corpus, tokenized, tokenizers
from moe_jax.data.corpus import load_corpus, save_tokenizer
from moe_jax.data.documents import DataError


@pytest.fixture
def texts(tmp_path):
    for domain in ("one", "two"):
        (tmp_path / "text" / domain).mkdir(parents=True)
        for i in range(10):
            (tmp_path / "text" / domain / f"{i}.txt").write_text(f"{domain} says {i}: the thing and the other thing. " * 4)
    return tmp_path


def _config(texts, **kwargs):
    paths = (str(texts / "text" / "*" / "*.txt"),)
    return DataConfig(corpus="files", paths=paths, cache_dir=str(texts / "cache"), val_fraction=0.2, **kwargs)


def _text(split, tokenizer):
    pairs = zip(split.offsets, split.offsets[1:], strict=False)
    return {tokenizer.decode(split.tokens[begin:end]) for begin, end in pairs}


def _files(folder):
    return {path: path.stat().st_mtime_ns for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.parametrize("kind", ["bytes", "bpe"])
def test_both_splits_hold_the_files_text_once(texts, kind):
    loaded = load_corpus(_config(texts, tokenizer=kind, bpe_vocab_size=300))
    sides = [_text(split, loaded.tokenizer) for split in (loaded.train, loaded.validation)]
    assert sides[0] | sides[1] == {path.read_text() for path in (texts / "text").rglob("*.txt")}
    assert not sides[0] & sides[1]
    assert loaded.domains == loaded.train.present == loaded.validation.present == ("one", "two")
    sizes = sum(len(text.encode()) for side in sides for text in side)
    assert sizes == sum(loaded.train.bytes_by_domain + loaded.validation.bytes_by_domain)
    assert all(split.tokens[begin] == loaded.tokenizer.eot for split in (loaded.train,) for begin in split.offsets[:-1])


@pytest.mark.parametrize("kind", ["bytes", "bpe"])
def test_second_load_reads_and_writes_nothing(texts, monkeypatch, kind):
    config = _config(texts, tokenizer=kind, bpe_vocab_size=300)
    first = load_corpus(config)
    before = _files(texts / "cache")
    monkeypatch.setattr(corpus, "_split", lambda *_: pytest.fail("the documents were read again"))
    second = load_corpus(config)
    assert _files(texts / "cache") == before
    assert second.fingerprint == first.fingerprint
    assert isinstance(second.train.tokens, np.memmap)
    np.testing.assert_array_equal(first.train.tokens, second.train.tokens)
    assert second.describe() == first.describe()


def test_changed_text_split_or_tokenizer_is_another_corpus(texts):
    prints = [load_corpus(_config(texts)).fingerprint]
    prints.append(load_corpus(_config(texts, max_megabytes=0.001)).fingerprint)
    prints.append(load_corpus(_config(texts, tokenizer="bpe", bpe_vocab_size=280)).fingerprint)
    prints.append(load_corpus(_config(texts, tokenizer="bpe", bpe_vocab_size=290)).fingerprint)
    (texts / "text" / "one" / "new.txt").write_text("one more document")
    prints.append(load_corpus(_config(texts)).fingerprint)
    assert len(set(prints)) == 5


def test_touched_files_with_the_same_text_are_the_same_corpus(texts):
    before = load_corpus(_config(texts)).fingerprint
    for path in (texts / "text").rglob("*.txt"):
        os.utime(path, ns=(1, 1))
    assert load_corpus(_config(texts)).fingerprint == before


@pytest.mark.parametrize("damage", ["cut", "removed", "garbled"])
def test_a_damaged_cache_is_made_again(texts, damage):
    first = load_corpus(_config(texts))
    expected = np.array(first.train.tokens)
    (file,) = (texts / "cache").glob("tokens-*/train.tokens")
    if damage == "cut":
        file.write_bytes(file.read_bytes()[:-2])
    elif damage == "removed":
        file.unlink()
    else:
        (file.parent / "meta.json").write_text("{")
    np.testing.assert_array_equal(load_corpus(_config(texts)).train.tokens, expected)


def test_an_interrupted_write_leaves_nothing(tmp_path):
    def write(draft):
        (draft / "half").write_text("x")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cache.publish(tmp_path / "folder", write)
    assert list(tmp_path.iterdir()) == []


def test_the_first_of_two_writers_wins(tmp_path):
    def late(draft):
        cache.publish(tmp_path / "folder", lambda other: (other / "x").write_text("first"))
        (draft / "x").write_text("second")

    cache.publish(tmp_path / "folder", late)
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]
    assert (tmp_path / "folder" / "x").read_text() == "first"


def test_cache_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache.folder("") == tmp_path / "moe_jax"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache.folder("") == tmp_path / "home" / ".cache" / "moe_jax"
    assert cache.folder("~/there") == tmp_path / "home" / "there"


def test_a_run_keeps_its_tokenizer_when_the_text_changes(texts):
    workdir = str(texts / "run")
    config = _config(texts, tokenizer="bpe", bpe_vocab_size=300)
    first = load_corpus(config, workdir)
    assert not (texts / "run").exists()  # a run that is refused for another reason leaves nothing behind
    save_tokenizer(first.tokenizer, workdir)
    assert tokenizers.load(texts / "run" / "tokenizer").fingerprint == first.tokenizer.fingerprint
    (texts / "text" / "one" / "new.txt").write_text("entirely new words, words, words " * 50)
    assert load_corpus(config, workdir).tokenizer.fingerprint == first.tokenizer.fingerprint
    assert load_corpus(config).tokenizer.fingerprint != first.tokenizer.fingerprint
    with pytest.raises(DataError, match=r"data\.tokenizer = 'bytes', and the run in workdir .* has a 'bpe' tokenizer"):
        load_corpus(_config(texts), workdir)


def test_unigram_entropy_is_that_of_the_validation_text(texts):
    loaded = load_corpus(_config(texts))
    overall, each = loaded.unigram_entropy()
    text = "".join(_text(loaded.validation, loaded.tokenizer))
    share = [text.count(character) / len(text) for character in set(text)]
    assert overall == pytest.approx(-sum(p * math.log(p) for p in share), rel=1e-9)
    assert set(each) == {"one", "two"}
    assert each["one"] != each["two"]


def test_describe_says_what_there_is(texts):
    loaded = load_corpus(_config(texts))
    words = loaded.describe()
    for part in (
        "Corpus files",
        f"{loaded.train.num_documents} training documents",
        "one ",
        "two ",
        "257 ids",
        loaded.fingerprint,
    ):
        assert part in words
    assert "\n" not in words


def test_files_of_tokens_need_the_tokenizer_that_made_them(texts):
    path = texts / "web.bin"
    np.array([1, 2, 3, 256, 4, 5, 6], "<u2").tofile(path)
    sidecar = path.with_name("web.bin.json")
    sidecar.write_text('{"dtype": "uint16", "vocab_size": 257, "eot": 256}')
    config = DataConfig(corpus="files", paths=(str(path),), cache_dir=str(texts / "cache"))
    loaded = load_corpus(config)
    assert sorted([loaded.train.tokens.tolist(), loaded.validation.tokens.tolist()]) == [[256, 1, 2, 3], [256, 4, 5, 6]]
    sidecar.write_text('{"dtype": "uint16", "vocab_size": 50257, "eot": 256}')
    with pytest.raises(DataError, match=r"web\.bin@\d holds tokens of a vocabulary of 50257 .* 'bytes' has 257"):
        load_corpus(config)
    with pytest.raises(DataError, match=r"data\.tokenizer = 'bpe' has no text to learn from"):
        load_corpus(DataConfig(corpus="files", paths=(str(path),), cache_dir=str(texts / "cache"), tokenizer="bpe"))


def test_a_single_small_document_is_refused(texts):
    (texts / "small.txt").write_text("just this")
    config = DataConfig(corpus="files", paths=(str(texts / "small.txt"),), cache_dir=str(texts / "cache"))
    with pytest.raises(DataError, match=r"data\.corpus = 'files' has 1 document to train on and none to validate"):
        load_corpus(config)


def test_one_long_text_is_cut_before_it_is_bounded(texts):
    (texts / "book.txt").write_text("".join(f"paragraph {i}\n\n" for i in range(20_000)))
    config = DataConfig(corpus="files", paths=(str(texts / "book.txt"),), cache_dir=str(texts / "cache"), max_megabytes=0.1)
    loaded = load_corpus(config)
    assert loaded.domains == loaded.validation.present == ("book",)
    assert 0.05e6 < loaded.train.bytes_by_domain[0] + loaded.validation.bytes_by_domain[0] <= 0.1e6


def test_a_cache_that_cannot_be_written_is_refused(texts):
    (texts / "file").write_text("")
    config = DataConfig(corpus="files", paths=(str(texts / "text/*/*.txt"),), cache_dir=str(texts / "file"))
    with pytest.raises(DataError, match=r"cannot be written.*data\.cache_dir"):
        load_corpus(config)


def test_wide_vocabularies_take_four_bytes(texts):
    class Wide(tokenizers.Bytes):
        vocab_size, eot = 2**16 + 1, 2**16

        def token_bytes(self):
            return np.ones(self.vocab_size, np.int32)

    document = corpus.Document("one", "n", "ab")
    split = tokenized.encode([document], ("one",), Wide())
    assert (split.tokens.dtype, split.tokens.tolist()) == (np.uint32, [2**16, 97, 98])
    assert tokenized.encode([document], ("one",), tokenizers.Bytes()).tokens.dtype == np.uint16


def test_builtin_has_code_and_prose(tmp_path):
    loaded = load_corpus(DataConfig(cache_dir=str(tmp_path), max_megabytes=0.2, val_fraction=0.1))
    assert loaded.domains == loaded.train.present == loaded.validation.present == ("docs", "python")
    for i in range(2):
        assert 0.1e6 < loaded.train.bytes_by_domain[i] + loaded.validation.bytes_by_domain[i] <= 0.2e6
