"""Rows of tokens for the model: documents laid end to end, in a fixed random order, and cut every S tokens.

The stream is `eot`, a document, `eot`, the next document, and so on. Row i is the S + 1 tokens of the stream from i*S on: the
first S are the inputs, the last S the targets, and the row's last target is the next row's first input. So every token of
the stream but the first is the target of exactly one position.

A target counts (`loss_weights` 1) where it belongs to the same document as its input. `eot` belongs to the document that
follows it: it predicts that document's first token and is never itself a counted target, as nothing in a document tells that
another one follows. Counted targets are thus exactly the documents' own tokens, each once.
"""

import operator

import numpy as np

from moe_jax.data.tokenized import Split

Row = dict[str, np.ndarray]


class PackedRows:
    """A random-access source of rows, a pure function of (split, seq_len, seed, index).

    A row is a dict: int32 [S] `tokens`, `targets`, `segment_ids` (1, 2, ... for each piece of a document in the row, 0 for
    padding), `positions` (from 0 at the start of each piece) and `document_ids` (which of the split's documents, -1 for
    padding), float32 [S] `loss_weights` (0 or 1), int32 [] `row_id` (the index).

    Args:
      split: documents as tokens.
      seq_len: S.
      seed: order of the documents in the stream.
      domain: only that domain's documents (None: all).
      pad_last: keep the last, incomplete row and fill it with padding (validation), instead of dropping it (training).

    Raises:
      DataError: `domain` has no documents.
    """

    def __init__(self, split: Split, seq_len: int, seed: int = 0, *, domain: str | None = None, pad_last: bool = False):
        self.split, self.seq_len = split, seq_len
        documents = split.documents_of(domain)
        # A bit generator's own stream never changes between versions of NumPy; that of Generator.permutation may.
        keys = np.random.Philox(np.random.SeedSequence((seed, 0))).random_raw(len(documents))
        self._order = documents[np.argsort(keys, kind="stable")]
        lengths = split.offsets[self._order + 1] - split.offsets[self._order]
        self._starts = np.concatenate([[0], np.cumsum(lengths)])
        targets = max(int(self._starts[-1]) - 1, 0)
        self._length = -(-targets // seq_len) if pad_last else targets // seq_len

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Row:
        index = operator.index(index)
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        return self._row(index)

    def take(self, indices: np.ndarray) -> Row:
        """Rows stacked on a new first axis. Indices of `len(self)` and more give rows of padding."""
        rows = [self._row(int(index)) for index in indices]
        return {name: np.stack([row[name] for row in rows]) for name in rows[0]}

    def _row(self, index: int) -> Row:
        size, begin = self.seq_len + 1, index * self.seq_len
        stream = np.full(size, self.split.eot, np.int32)
        piece, positions, documents = np.zeros(size, np.int32), np.zeros(size, np.int32), np.full(size, -1, np.int32)
        filled, number = 0, 1
        document = int(np.searchsorted(self._starts, begin, side="right")) - 1
        while filled < size and document < len(self._order):
            skipped = begin + filled - int(self._starts[document])
            length = min(size - filled, int(self._starts[document + 1]) - int(self._starts[document]) - skipped)
            source = int(self.split.offsets[self._order[document]]) + skipped
            here = slice(filled, filled + length)
            stream[here] = self.split.tokens[source : source + length]
            piece[here] = number
            documents[here] = self._order[document]
            positions[here] = np.arange(length)
            filled, number, document = filled + length, number + 1, document + 1
        return {
            "tokens": stream[:-1],
            "targets": stream[1:],
            "segment_ids": piece[:-1],
            "positions": positions[:-1],
            "document_ids": documents[:-1],
            "loss_weights": ((piece[1:] == piece[:-1]) & (piece[1:] > 0)).astype(np.float32),
            "row_id": np.int32(index),
        }
