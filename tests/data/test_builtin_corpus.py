import ast

import pytest

from moe_jax.data import builtin
from moe_jax.data.documents import DataError

LONG = "A sentence about what the function does, which is long enough to be prose and not a label."
MODULE = f'''"""Short."""
import os

def f(x):
    """{LONG}

    Él says more.
    """
    if x:
        def g(): "{LONG[::-1]}"
    é = 1; return é

class C:
    """{LONG}

    Él says more.
    """
'''


@pytest.fixture
def library(tmp_path):
    """A small standard library: two modules, a test, a module in Latin-1 and one that is no Python."""
    for name, content in {
        "a.py": MODULE.encode(),
        "pkg/b.py": f'"""{LONG}"""\nx = 1\n'.encode(),
        "test/test_a.py": b"x = 2\n",
        "site-packages/c.py": b"x = 3\n",
        "latin.py": b"# \xe9\n",
        "broken.py": b"def",
        "pydoc_data/topics.py": b"topics = {'while': 'The while statement', 'if': 'The if statement'}\n",
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    return tmp_path


def test_long_docstrings_move_from_code_to_docs(library):
    documents = builtin.source(str(library)).read()
    texts = {(d.domain, d.name): d.text for d in documents}
    code = texts["python", "a.py"]
    assert code == (
        '"""Short."""\nimport os\n\ndef f(x):\n    ...\n    if x:\n        def g(): ...\n    é = 1; return é\n'
        "\nclass C:\n    ...\n"
    )
    ast.parse(code)
    assert texts["docs", "a.py"] == f"{LONG}\n\nÉl says more.\n\n{LONG[::-1]}\n"  # once, though two objects have it
    assert texts["python", "pkg/b.py"] == "...\nx = 1\n"
    assert texts["docs", "topic if"] == "The if statement"
    assert {name for _, name in texts} == {"a.py", "pkg/b.py", "topic if", "topic while"}


def test_a_docstring_of_an_earlier_module_is_not_repeated(library):
    (library / "pkg" / "c.py").write_text(f'"""{LONG}"""\n', encoding="utf-8")
    assert [d.name for d in builtin.source(str(library)).read() if LONG in d.text] == ["a.py", "pkg/b.py"]


def test_works_without_the_language_reference_and_refuses_a_library_without_sources(library, tmp_path):
    (library / "pydoc_data" / "topics.py").unlink()
    assert {d.domain for d in builtin.source(str(library)).read()} == {"python", "docs"}
    with pytest.raises(DataError, match=r"data\.corpus = 'builtin' found no Python sources in .*nowhere"):
        builtin.source(str(tmp_path / "nowhere"))


def test_listing_is_stable_and_sees_a_change(library):
    before = builtin.source(str(library)).listing
    assert before == builtin.source(str(library)).listing
    (library / "a.py").write_text("x = 1\n")
    assert before != builtin.source(str(library)).listing
