"""Files under attack: refused in a sentence with the place, or left out and counted; nothing is lost in silence."""

import gzip
import json
import os

import numpy as np
import pytest

from moe_jax.config import DataConfig
from moe_jax.data import corpus, files
from moe_jax.data.bad_records import BadRecords
from moe_jax.data.corpus import load_corpus
from moe_jax.data.documents import DataError

GOOD = [{"text": f"document {i}: " + "words and words " * 20} for i in range(12)]


def write_lines(path, *bad):
    """Twelve good lines, and after the third the bad ones."""
    lines = [json.dumps(record).encode() for record in GOOD]
    path.write_bytes(b"\n".join([*lines[:3], *bad, *lines[3:]]) + b"\n")
    return path


def config(tmp_path, *patterns, **kwargs):
    paths = tuple(str(tmp_path / pattern) for pattern in patterns)
    return DataConfig(corpus="files", paths=paths, cache_dir=str(tmp_path / "cache"), **kwargs)


BAD_LINES = {
    "not JSON": b'{"text": "cut in the midd',
    "not UTF-8": b'{"text": "\xff"}',
    'no "text" string': b'{"txt": "x"}',
    '"domain" no string': b'{"text": "x", "domain": 3}',
    "half of a surrogate pair": b'{"text": "\\ud800"}',
}


@pytest.mark.parametrize("line", [b"[" * 100_000, b'{"text": ' + b"1" * 5000 + b"}", b"\xef\xbb\xbf{}", b"\x00"], ids=len)
def test_lines_that_break_a_json_parser_are_refused_with_their_place(tmp_path, line):
    path = write_lines(tmp_path / "web.jsonl", line)
    with pytest.raises(DataError, match=r"web\.jsonl:4 is not JSON \("):
        files.source((str(path),)).read()


def test_bad_lines_are_left_out_and_counted_by_kind(tmp_path):
    write_lines(tmp_path / "web.jsonl", *BAD_LINES.values(), BAD_LINES["not JSON"])
    bad = BadRecords("skip")
    documents = files.source((str(tmp_path / "web.jsonl"),), bad).read()
    assert [d.text for d in documents] == [record["text"] for record in GOOD]
    assert {kind: count for kind, (count, _) in bad.left_out.items()} == dict.fromkeys(BAD_LINES, 1) | {"not JSON": 2}
    assert f"2 x not JSON (the first: {tmp_path}/web.jsonl:4)" in bad.describe()
    assert f"1 x not UTF-8 ({tmp_path}/web.jsonl:5)" in bad.describe()


def test_a_second_start_tells_what_the_first_one_left_out(tmp_path, monkeypatch):
    write_lines(tmp_path / "web.jsonl", BAD_LINES["not UTF-8"])
    skipping = config(tmp_path, "web.jsonl", bad_records="skip")
    first = load_corpus(skipping)
    monkeypatch.setattr(corpus, "_split", lambda *_: pytest.fail("the documents were read again"))
    second = load_corpus(skipping)
    assert first.left_out == second.left_out == f"left out: 1 x not UTF-8 ({tmp_path}/web.jsonl:4)"
    assert first.fingerprint == second.fingerprint


def test_the_policy_is_part_of_the_cache_s_key_and_not_of_the_corpus(tmp_path):
    path = write_lines(tmp_path / "web.jsonl", BAD_LINES["not JSON"])
    skipped = load_corpus(config(tmp_path, "web.jsonl", bad_records="skip"))
    with pytest.raises(DataError, match=r"web\.jsonl:4 is not JSON"):
        load_corpus(config(tmp_path, "web.jsonl"))
    write_lines(path)
    clean = load_corpus(config(tmp_path, "web.jsonl"))
    assert clean.left_out == ""
    assert clean.fingerprint == skipped.fingerprint


def test_a_damaged_archive_gives_what_comes_before_the_damage(tmp_path):
    """Three streams in one archive, as several writers append them; the last is cut."""
    streams = [gzip.compress(json.dumps(record).encode() + b"\n", mtime=0) for record in GOOD[:3]]
    (tmp_path / "web.jsonl.gz").write_bytes(b"".join(streams)[:-9])
    with pytest.raises(DataError, match=r"web\.jsonl\.gz cannot be read: .*; repair the file"):
        files.source((str(tmp_path / "web.jsonl.gz"),)).read()
    bad = BadRecords("skip")
    assert len(files.source((str(tmp_path / "web.jsonl.gz"),), bad).read()) in (2, 3)
    assert list(bad.left_out) == ["unreadable file"]


def test_empty_files_are_told(tmp_path):
    write_lines(tmp_path / "web.jsonl")
    for name in ("a.txt", "b.jsonl", "c.jsonl"):
        (tmp_path / name).write_bytes(b"\n" if name == "c.jsonl" else b"")
    loaded = load_corpus(config(tmp_path, "*.*"))
    assert loaded.left_out == f"left out: 3 x empty file (the first: {tmp_path}/a.txt)"
    with pytest.raises(DataError, match=r"0 documents to train on .*; left out: 1 x empty file \(.*a\.txt\)\."):
        load_corpus(config(tmp_path, "a.txt"))


def write_tokens(path, ids, **description):
    np.array(ids, "<u2").tofile(path)
    entry = {"dtype": "uint16", "vocab_size": 257, "eot": 256} | description
    path.with_name(path.name + ".json").write_text(json.dumps(entry))


def test_a_token_file_cut_at_a_token_is_told_by_its_description(tmp_path):
    write_tokens(tmp_path / "web.bin", [1, 2, 256] * 40, tokens=121)
    with pytest.raises(DataError, match=r"web\.bin has 120 tokens and web\.bin\.json says 121: it was cut short"):
        files.source((str(tmp_path / "web.bin"),)).read()
    write_tokens(tmp_path / "web.bin", [1, 2, 256] * 40, tokens=120)
    assert len(files.source((str(tmp_path / "web.bin"),)).read()) == 40


@pytest.mark.parametrize("description", [{"vocab_size": float("inf")}, {"tokens": []}, {"dtype": []}], ids=str)
def test_descriptions_that_are_no_numbers_are_refused(tmp_path, description):
    write_tokens(tmp_path / "web.bin", [1, 2], **description)
    with pytest.raises(DataError, match=r"web\.bin\.json must be like"):
        files.source((str(tmp_path / "web.bin"),)).read()


def test_a_token_file_that_does_not_fit_is_left_out(tmp_path):
    write_tokens(tmp_path / "cut.bin", [1, 2, 256] * 40)
    (tmp_path / "cut.bin").write_bytes((tmp_path / "cut.bin").read_bytes()[:-1])
    write_tokens(tmp_path / "whole.bin", [*range(200), 256, *range(100)])
    loaded = load_corpus(config(tmp_path, "*.bin", bad_records="skip"))
    assert loaded.train.num_documents + loaded.validation.num_documents == 2
    assert loaded.left_out == f"left out: 1 x unfit tokens ({tmp_path}/cut.bin)"


def test_a_link_to_nothing_is_refused_or_left_out(tmp_path):
    write_lines(tmp_path / "web.jsonl")
    (tmp_path / "gone.jsonl").symlink_to(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"gone\.jsonl is a link to a file that is not there; repair or remove"):
        files.source((str(tmp_path / "*.jsonl"),))
    loaded = load_corpus(config(tmp_path, "*.jsonl", bad_records="skip"))
    assert loaded.left_out == f"left out: 1 x link to nothing ({tmp_path}/gone.jsonl)"


def test_a_folder_that_may_not_be_listed_is_refused_or_left_out(tmp_path, monkeypatch):
    """`glob` passes over it in silence; the superuser may list everything, so that the system is asked through a substitute."""
    for folder in ("open", "closed"):
        (tmp_path / folder).mkdir()
        write_lines(tmp_path / folder / "web.jsonl")
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: access(path, mode) and not str(path).endswith("closed"))
    for pattern in ("*/*.jsonl", "closed/*.jsonl"):
        with pytest.raises(DataError, match=r"closed is a folder that may not be listed; give its read and execute permission"):
            files.source((str(tmp_path / pattern),))
    bad = BadRecords("skip")
    files.source((str(tmp_path / "*" / "*.jsonl"),), bad).read()
    assert bad.left_out == {"unreadable folder": (1, f"{tmp_path}/closed")}


def test_a_file_that_may_not_be_opened_is_refused_by_name(tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    path.write_text("text")

    def refuse(self):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(type(path), "read_bytes", refuse)
    with pytest.raises(DataError, match=r"a\.txt cannot be read: .*Permission denied.*; repair the file"):
        files.source((str(path),)).read()


def test_a_folder_named_like_a_file_is_no_file(tmp_path):
    (tmp_path / "books.txt").mkdir()
    with pytest.raises(DataError, match=r"matches no file but the folder '.*books\.txt'; for the files in it give '.*txt/\*'"):
        files.source((str(tmp_path / "books.txt"),))


@pytest.mark.parametrize("pattern", ["a\0b", "a\0b*", "[", "", "~nobody/x", "x" * 5000])
def test_what_is_no_path_is_refused(pattern):
    with pytest.raises(DataError, match=r"data\.paths entry '"):
        files.source((pattern,))


def test_a_huge_document_becomes_rows_like_any_other(tmp_path):
    """24 megabytes in one line of text; the rows hold every byte once, and only the rows asked for are in memory."""
    from moe_jax.data.packing import PackedRows

    text = "".join(f"{i} bottles of beer on the wall, " for i in range(700_000))
    records = [{"text": text}, {"text": "a short one"}, {"text": "another"}]
    (tmp_path / "web.jsonl").write_text("\n".join(map(json.dumps, records)), encoding="utf-8")
    loaded = load_corpus(config(tmp_path, "web.jsonl"))
    assert sum(loaded.train.bytes_by_domain + loaded.validation.bytes_by_domain) == len(text) + len("a short oneanother")
    (split,) = (split for split in (loaded.train, loaded.validation) if len(split.tokens) > len(text))
    assert isinstance(split.tokens, np.memmap)
    rows = PackedRows(split, 1024)
    middle = rows[len(rows) // 2]["tokens"]
    assert bytes(middle.astype(np.uint8)).decode() in text
