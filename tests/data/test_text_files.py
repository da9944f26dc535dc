import gzip
import json

import numpy as np
import pytest

from moe_jax.data import files
from moe_jax.data.documents import DataError


def _read(*patterns):
    return files.source(tuple(map(str, patterns))).read()


def _token_file(path, tokens, dtype="<u2", **description):
    np.array(tokens, dtype).tofile(path)
    entry = {"dtype": np.dtype(dtype).name, "vocab_size": 100, "eot": 99} | description
    path.with_name(path.name + ".json").write_text(json.dumps(entry))


def test_text_files_take_their_domain_from_the_folder_of_a_glob_or_their_own_name(tmp_path):
    for name in ("french/b.txt", "french/a.txt", "german/c.txt", "alone.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name, encoding="utf-8")
    found = [(d.domain, d.text) for d in _read(tmp_path / "*" / "*.txt", tmp_path / "alone.md", tmp_path / "french" / "a.txt")]
    assert found == [("french", "french/a.txt"), ("french", "french/b.txt"), ("german", "german/c.txt"), ("alone", "alone.md")]


def test_record_separators_divide_a_text(tmp_path):
    (tmp_path / "x.txt").write_text("one\n\x1e\ntwo \x1e inside\n\x1e\nthree\n\x1e\n", encoding="utf-8")
    assert [d.text for d in _read(tmp_path / "x.txt")] == ["one\n", "two \x1e inside\n", "three\n", ""]


@pytest.mark.parametrize("name", ["web.jsonl", "web.jsonl.gz"])
def test_json_lines(tmp_path, name):
    lines = '{"text": "é1"}\n\n{"text": "2", "domain": "math"}\n'.encode()
    (tmp_path / name).write_bytes(gzip.compress(lines) if name.endswith("gz") else lines)
    documents = _read(tmp_path / name)
    assert [(d.domain, d.text) for d in documents] == [("web", "é1"), ("math", "2")]
    assert documents[1].name.endswith(f"{name}:3")


@pytest.mark.parametrize("dtype", ["<u2", "<u4"])
def test_token_files_are_divided_at_eot(tmp_path, dtype):
    _token_file(tmp_path / "web.bin", [99, 5, 6, 99, 99, 7, 99], dtype)
    documents = _read(tmp_path / "*")  # finds the description too, which is not a document
    assert [d.tokens.tolist() for d in documents] == [[5, 6], [7]]
    assert {(d.domain, d.vocabulary) for d in documents} == {(tmp_path.name, (100, 99))}


def test_listing_changes_with_the_files_and_reads_none(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xff")
    before = files.source((str(path),)).listing
    assert before == files.source((str(path),)).listing
    path.write_bytes(b"12")
    assert before != files.source((str(path),)).listing


def _refusal(tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError) as error:
        _read(path)
    assert str(path) in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("a.txt", "aé".encode() + b"\xff", "not UTF-8: byte 0xff at offset 3"),
        ("a.jsonl", b'{"text": "x"}\n{"text"\n', "a.jsonl:2 is not JSON"),
        ("a.jsonl", b'{"text": "x"}\n{"txt": "x"}\n', 'a.jsonl:2 has no "text"'),
        ("a.jsonl", b'["text"]\n', 'a.jsonl:1 has no "text"'),
        ("a.jsonl", b'{"text": "x", "domain": 3}\n', 'a.jsonl:1 has "domain" = 3'),
        ("a.jsonl", b'\n{"text": "\xfe"}\n', "a.jsonl:2 is not UTF-8: byte 0xfe at offset 10"),
        ("a.jsonl", b'{"text": "\\ud800"}\n', "a.jsonl:1 holds half of a surrogate pair"),
        ("a.jsonl.gz", b"not gzip", "cannot be read"),
        ("a.jsonl.gz", gzip.compress(b'{"text": "x"}\n' * 100, mtime=0)[:-12], "cannot be read"),
        ("a.bin", b"1234", "needs a description a.bin.json"),
    ],
)
def test_files_that_cannot_be_used_are_refused_by_name(tmp_path, name, content, sentence):
    assert sentence in _refusal(tmp_path, name, content)


@pytest.mark.parametrize(
    ("description", "content", "sentence"),
    [
        ({}, b"123", "3 bytes, not a positive multiple of 2"),
        ({}, b"", "0 bytes"),
        ({}, b"\x01\x00\x64\x00", "token 100 at index 1"),
        ({"dtype": "int64"}, b"1234", "dtype uint16 or uint32"),
        ({"eot": 100}, b"1234", "eot must be less than vocab_size"),
        ({"vocab_size": 70_000}, b"1234", "at most 65536 for uint16"),
        ({"vocab_size": "many"}, b"1234", "must be like"),
    ],
)
def test_token_files_are_checked(tmp_path, description, content, sentence):
    _token_file(tmp_path / "a.bin", [], **description)
    assert sentence in _refusal(tmp_path, "a.bin", content)


def test_a_pattern_without_files_is_refused(tmp_path):
    (tmp_path / "folder").mkdir()
    for pattern in ("none*.txt", "folder"):
        with pytest.raises(DataError, match=rf"data\.paths entry '.*{pattern[:4]}.*' matches no file"):
            files.source((str(tmp_path / pattern),))
