import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_jax.data.documents import DataError, Document, by_domain, cut_lone_texts, unique, within_megabytes
from moe_jax.data.split import split_documents


def _many(domain, count, size=100):
    return [Document(domain, str(i), f"{domain} {i} ".ljust(size, "x")) for i in range(count)]


def test_unique_drops_empty_documents_and_later_copies():
    first, copy, empty, other = (Document("a", str(i), text) for i, text in enumerate(["x", "x", "", "y"]))
    assert unique([first, copy, empty, other]) == [first, other]


def test_tokens_and_text_have_different_digests_and_tokens_do_not_depend_on_their_width():
    narrow, wide = (Document("a", "n", tokens=np.array([65, 66], dtype)) for dtype in ("<u2", "<u4"))
    assert narrow.digest == wide.digest != Document("a", "n", "AB").digest


def test_bound_keeps_each_domain_below_it_whatever_the_order():
    documents = _many("a", 50) + _many("b", 3)
    kept = within_megabytes(documents, 0.001)
    backwards = within_megabytes(documents[::-1], 0.001)
    assert {d.digest for d in kept} == {d.digest for d in backwards}
    assert {domain: len(members) for domain, members in by_domain(kept).items()} == {"a": 10, "b": 3}
    assert kept == [d for d in documents if d in kept]  # in the order given
    assert within_megabytes(documents, 0) is documents


def test_bound_below_every_document_is_refused():
    with pytest.raises(DataError, match=r"data\.max_megabytes = 5e-05 .* domain 'a' .*100 bytes.*0\.000100"):
        within_megabytes(_many("a", 3), 0.00005)


def test_bound_and_split_choose_independently():
    """Were both to rank by the same part of the digest, all bounded documents would fall in validation."""
    bounded = within_megabytes(_many("a", 400), 0.01)
    assert len(bounded) == 100
    _, validation = split_documents(bounded, 0.5)
    assert 25 < len(validation) < 75


@settings(deadline=None, max_examples=30)
@given(st.lists(st.text(alphabet="ab \n", min_size=1, max_size=400), min_size=1, max_size=40).map("\n\n".join))
def test_a_lone_text_is_cut_without_loss(text):
    pieces = cut_lone_texts([Document("a", "book", text)])
    assert "".join(piece.text for piece in pieces) == text
    assert all(piece.domain == "a" and (len(piece.text) >= 1000 or len(pieces) == 1) for piece in pieces)


def test_only_a_lone_text_is_cut():
    paragraph = "word " * 40 + "\n\n"
    lone, *others = Document("a", "a", paragraph * 100), *_many("b", 2, size=5000)
    pieces = cut_lone_texts([lone, *others])
    assert pieces[-2:] == others
    assert len(pieces) > 10
    assert all(piece.text.endswith("\n\n") for piece in pieces[:-2])
    one_line = Document("c", "c", "x" * 10_000)
    assert [piece.text for piece in cut_lone_texts([one_line])] == [one_line.text]
