from hypothesis import given, settings
from hypothesis import strategies as st

from moe_jax.data.documents import Document, by_domain
from moe_jax.data.split import split_documents

DOCUMENTS = st.lists(
    st.builds(Document, st.sampled_from("abc"), st.just("n"), st.text("xyz", max_size=4)), min_size=1, max_size=60
)
FRACTIONS = st.sampled_from([0.0, 0.05, 0.5, 0.95])


@settings(deadline=None)
@given(DOCUMENTS, FRACTIONS)
def test_sides_partition_the_distinct_documents_and_every_domain_is_on_both(documents, fraction):
    train, validation = split_documents(documents, fraction)
    texts = [d.text for d in train + validation]
    assert sorted(texts) == sorted({d.text for d in documents} - {""})
    sides = by_domain(train), by_domain(validation)
    for domain, members in by_domain(train + validation).items():
        assert domain in sides[0]
        assert (domain in sides[1]) == (len(members) > 1)


@settings(deadline=None)
@given(DOCUMENTS, FRACTIONS, st.randoms(use_true_random=False))
def test_sides_do_not_depend_on_the_order(documents, fraction, random):
    distinct = list({d.text: d for d in documents}.values())
    shuffled = random.sample(distinct, len(distinct))
    for one, other in zip(split_documents(distinct, fraction), split_documents(shuffled, fraction), strict=True):
        assert {d.text for d in one} == {d.text for d in other}
        assert one == [d for d in distinct if d in one]


def test_fraction_is_kept_and_new_documents_move_no_old_one():
    documents = [Document("a", str(i), f"text {i}") for i in range(2000)]
    _, validation = split_documents(documents, 0.1)
    assert 150 < len(validation) < 250
    _, more = split_documents(documents + [Document("a", "n", f"new {i}") for i in range(500)], 0.1)
    assert set(validation) == set(more) & set(documents)
    _, wider = split_documents(documents, 0.2)
    assert set(validation) < set(wider)
