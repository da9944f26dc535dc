"""Batches of rows: an endless, shuffled, resumable iterator for training and a fixed list for validation.

The global batch depends on the data, the config and the seed, never on the number of processes: each process takes its
contiguous part of every global batch.
"""

import grain
import numpy as np

from moe_jax.config import DataConfig
from moe_jax.data.documents import DataError
from moe_jax.data.packing import PackedRows, Row
from moe_jax.data.tokenized import Split


def train_iterator(
    split: Split, config: DataConfig, seed: int = 0, *, process_index: int = 0, process_count: int = 1
) -> grain.DatasetIterator:
    """Iterates for ever over batches of training rows; the rows are shuffled anew in every pass over the data.

    An element is this process's part of a global batch: arrays as in `PackedRows` with a first axis of
    `config.batch_size / process_count` rows. A batch may straddle two passes, so no row is left out. `get_state()` is a small
    JSON-able dict that counts the batches returned (not those prefetched); `set_state` continues with the very next one.

    Args:
      split: the training split.
      config: `seq_len`, `batch_size` (global) and `prefetch` (batches made ahead by a thread; 0: none) are read.
      seed: of the packing and of the shuffles.
      process_index, process_count: this process and the number of them, of those that read different rows (`mesh.process_part`).

    Raises:
      DataError: the data do not fill one batch, or the batch does not divide over the processes.
    """
    rows = PackedRows(split, config.seq_len, seed)
    part = _part(config.batch_size, process_index, process_count)
    if len(rows) == 0:
        raise DataError(
            f"data.seq_len = {config.seq_len} needs {config.seq_len + 1} tokens for one row and the training data have"
            f" {len(split.tokens)}; lower data.seq_len or add data."
        )
    if len(rows) < config.batch_size:
        raise DataError(
            f"data.batch_size = {config.batch_size} is more than the {len(rows)} rows of data.seq_len = {config.seq_len} that"
            f" the {len(split.tokens)} training tokens fill; lower one of the two or add data."
        )
    shuffle_seed = int(np.random.SeedSequence((seed, 1)).generate_state(1)[0])  # grain adds 1 a pass: keep seeds apart
    indices = (
        grain.MapDataset.range(len(rows)).shuffle(seed=shuffle_seed).repeat().batch(config.batch_size, drop_remainder=True)
    )
    batches = indices.map(lambda indices_B: rows.take(indices_B[part]))
    threads = min(config.prefetch, 1)  # the data are mapped into memory: more threads would only share the interpreter
    return iter(batches.to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=config.prefetch)))


def validation_batches(
    split: Split,
    seq_len: int,
    domain: str | None = None,
    rows: int = 64,
    batch_size: int = 16,
    *,
    process_index: int = 0,
    process_count: int = 1,
) -> list[Row]:
    """At most `rows` rows of the validation data of `domain` (None: all), the same ones in the same order at every call.

    Rows are taken at even distances, so that they come from many documents. All batches have `batch_size / process_count` rows
    here; rows of padding (weights 0) fill the last one.

    Raises:
      DataError: `domain` has no validation documents, or the batch does not divide over the processes.
    """
    source = PackedRows(split, seq_len, domain=domain, pad_last=True)
    part = _part(batch_size, process_index, process_count)
    count = min(rows, len(source))
    chosen = np.arange(count) * len(source) // max(count, 1)
    padding = len(source) + np.arange(-count % batch_size)
    return [source.take(indices_B[part]) for indices_B in np.concatenate([chosen, padding]).reshape(-1, batch_size)]


def _part(batch_size: int, process_index: int, process_count: int) -> slice:
    if batch_size % process_count:
        raise DataError(
            f"data.batch_size = {batch_size} does not divide over {process_count} processes; use a multiple of {process_count}."
        )
    size = batch_size // process_count
    return slice(process_index * size, (process_index + 1) * size)
