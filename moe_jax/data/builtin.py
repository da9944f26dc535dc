"""The corpus that is always there: the Python standard library, as two domains (licence PSF-2.0).

- `python`: the library's sources without its tests. Docstrings of more than 80 characters are replaced by `...`.
- `docs`: English technical prose: those docstrings, one document a module, and the language reference that `help()` shows
  (`pydoc_data/topics.py`), one document a topic.

No text stands in both domains, so a validation document of one is not training text of the other. Sizes with CPython 3.11:
about 10 MB of code and 2 MB of prose. A slim installation may have fewer modules and works the same.
"""

import ast
import os
import sys
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

from moe_jax.data.documents import DataError, Document, Source

SKIPPED = {"__pycache__", "dist-packages", "idle_test", "lib2to3", "pydoc_data", "site-packages", "test", "tests"}
MIN_DOCSTRING = 80  # characters; shorter docstrings stay in the code


def source(stdlib: str = "") -> Source:
    """The standard library at `stdlib` (default: the running Python's).

    Raises:
      DataError: there are no Python sources there (a Python that ships only compiled or zipped modules).
    """
    root = Path(stdlib or sysconfig.get_path("stdlib"))
    paths = list(_modules(root))
    if not paths:
        raise DataError(
            f"data.corpus = 'builtin' found no Python sources in {root}; use a Python that ships its library as .py files, or"
            " data.corpus='files' with data.paths."
        )
    topics = root / "pydoc_data" / "topics.py"
    listing = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in [*paths, topics] if path.exists()]
    version = (*sys.version_info[:3],)  # ast decides what is a docstring

    def read() -> list[Document]:
        documents, seen = [], set()
        for path in paths:
            documents += _module_documents(path, str(path.relative_to(root)), seen)
        return documents + _topic_documents(topics)

    return Source("builtin", (version, *listing), read)


def _modules(root: Path) -> Iterator[Path]:
    for folder, folders, files in os.walk(root):
        folders[:] = sorted(name for name in folders if name not in SKIPPED)
        yield from (Path(folder, name) for name in sorted(files) if name.endswith(".py") and Path(folder, name).is_file())


def _module_documents(path: Path, name: str, seen: set[str]) -> list[Document]:
    """The module's code, and its long docstrings but those in `seen`, which grows by them."""
    raw = path.read_bytes()
    try:
        raw.decode()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # old escapes in old modules
            tree = ast.parse(raw)
    except (UnicodeDecodeError, SyntaxError, ValueError):
        return []  # the library has a few modules in other encodings
    code, docstrings = _without_docstrings(raw, tree)
    documents = [Document("python", name, code)]
    if fresh := [text for text in docstrings if text not in seen]:
        documents.append(Document("docs", name, "\n\n".join(fresh) + "\n"))
    seen.update(fresh)
    return documents


def _without_docstrings(raw: bytes, tree: ast.Module) -> tuple[str, list[str]]:
    """The code with `...` for its long docstrings, and those docstrings, each once and in order."""
    line_starts = [0]
    for line in raw.splitlines(keepends=True):  # lines as ast counts them: bytes.splitlines splits at \n, \r and \r\n
        line_starts.append(line_starts[-1] + len(line))
    cuts, found = [], {}
    for node in _definitions(tree):
        text = ast.get_docstring(node)
        if text is None or len(text) <= MIN_DOCSTRING or not _is_utf8(text):
            continue
        literal = node.body[0].value
        begin = line_starts[literal.lineno - 1] + literal.col_offset
        end = line_starts[literal.end_lineno - 1] + literal.end_col_offset
        cuts.append((begin, end))
        found[text] = min(begin, found.get(text, begin))
    for begin, end in sorted(cuts, reverse=True):
        raw = raw[:begin] + b"..." + raw[end:]
    return raw.decode(), sorted(found, key=found.__getitem__)


def _definitions(tree: ast.Module) -> Iterator[ast.AST]:
    """The module and every class and function in it, found through statements alone (ast.walk takes four times as long)."""
    stack: list[ast.AST] = [tree]
    while stack:
        node = stack.pop()
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield node
        for field in ("body", "orelse", "finalbody", "handlers", "cases"):
            stack += getattr(node, field, [])


def _is_utf8(text: str) -> bool:
    return not any("\ud800" <= character <= "\udfff" for character in text)


def _topic_documents(path: Path) -> list[Document]:
    """The entries of the dictionary that `pydoc_data/topics.py` assigns, or none where there is no such file."""
    if not path.exists():
        return []
    for node in ast.parse(path.read_bytes()).body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict):
            return [Document("docs", f"topic {name}", text) for name, text in sorted(ast.literal_eval(node.value).items())]
    return []
