"""Training and validation documents, told apart by content.

A document's side depends on its content and `val_fraction` only: adding, removing or reordering other documents does not move
it (but for the guarantee below), and a copy of a training document cannot be a validation document.
"""

from moe_jax.data.documents import SPLIT, Document, by_domain, unique


def split_documents(documents: list[Document], val_fraction: float) -> tuple[list[Document], list[Document]]:
    """(training, validation) documents, each in the order given; exact duplicates are removed.

    A domain with two documents or more has at least one on each side; a domain with one has it in training.
    """
    documents = unique(documents)
    held_out = set()
    for members in by_domain(documents).values():
        ranked = sorted(members, key=lambda document: document.digest)
        wanted = sum(document.uniform(SPLIT) < val_fraction for document in ranked)
        held_out |= set(ranked[: min(max(wanted, 1), len(ranked) - 1)])
    training = [document for document in documents if document not in held_out]
    return training, [document for document in documents if document in held_out]
