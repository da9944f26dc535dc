import itertools
import json

import numpy as np
import pytest

from moe_jax.config import DataConfig
from moe_jax.data import tokenized
from moe_jax.data.documents import DataError, Document
from moe_jax.data.packing import PackedRows
from moe_jax.data.pipeline import train_iterator, validation_batches
from moe_jax.data.tokenizers import Bytes

DOCUMENTS = [Document("ab"[i % 2], str(i), f"{'ab'[i % 2]} document {i} " + "xyz" * i) for i in range(12)]
SPLIT = tokenized.encode(DOCUMENTS, ("a", "b"), Bytes())
CONFIG = DataConfig(seq_len=16, batch_size=4, prefetch=2)
ROWS = PackedRows(SPLIT, 16, seed=0)  # 26 rows: a pass ends within a batch


def _equal(one, other):
    assert one.keys() == other.keys()
    for name in one:
        np.testing.assert_array_equal(one[name], other[name])


def _ids(count, **kwargs):
    return [batch["row_id"].tolist() for batch in itertools.islice(train_iterator(SPLIT, CONFIG, **kwargs), count)]


def test_every_pass_has_every_row_once_in_another_order():
    assert len(ROWS) % CONFIG.batch_size
    ids = np.concatenate(_ids(3 * len(ROWS) // CONFIG.batch_size + 1))
    passes = [ids[i * len(ROWS) : (i + 1) * len(ROWS)].tolist() for i in range(3)]
    assert all(sorted(one) == list(range(len(ROWS))) for one in passes)
    assert passes[0] != passes[1] != passes[2] != passes[0]
    assert passes[0] != sorted(passes[0])


def test_rows_are_those_of_the_packing():
    batch = next(train_iterator(SPLIT, CONFIG))
    _equal(batch, ROWS.take(batch["row_id"]))
    assert batch["tokens"].shape == (4, 16)
    assert batch["row_id"].dtype == np.int32


def test_one_row_can_be_a_batch_and_a_pass():
    one = tokenized.encode([Document("a", "n", "xyz")], ("a",), Bytes())
    config = DataConfig(seq_len=3, batch_size=1)
    batches = list(itertools.islice(train_iterator(one, config), 3))
    assert [batch["targets"].tolist() for batch in batches] == [[list(b"xyz")]] * 3


def test_seeds_give_different_passes_and_not_each_others_later_ones():
    length = len(ROWS)
    first, second = (np.concatenate(_ids(2 * length // 4, seed=seed))[: 2 * length].tolist() for seed in (0, 1))
    assert first[:length] != second[:length]
    assert first[length:] != second[: len(first) - length]


@pytest.mark.parametrize("prefetch", [0, 1, 5])
@pytest.mark.parametrize("taken", [0, 3, 8])
def test_state_continues_exactly(prefetch, taken):
    config = DataConfig(seq_len=16, batch_size=4, prefetch=prefetch)
    iterator = train_iterator(SPLIT, config, seed=3)
    for _ in range(taken):
        next(iterator)
    state = json.loads(json.dumps(iterator.get_state()))
    rest = list(itertools.islice(iterator, 9))
    fresh = train_iterator(SPLIT, config, seed=3)
    next(fresh)  # a used iterator can be set back too
    fresh.set_state(state)
    assert fresh.get_state() == state
    for one, other in zip(rest, itertools.islice(fresh, 9), strict=True):
        _equal(one, other)


def test_processes_share_the_global_batch_in_order():
    whole = list(itertools.islice(train_iterator(SPLIT, CONFIG), 8))
    parts = [list(itertools.islice(train_iterator(SPLIT, CONFIG, process_index=p, process_count=2), 8)) for p in range(2)]
    for batch, *shares in zip(whole, *parts, strict=True):
        _equal(batch, {name: np.concatenate([share[name] for share in shares]) for name in batch})


@pytest.mark.parametrize(("first", "then"), [(1, 2), (1, 4), (2, 1), (2, 4), (4, 1), (4, 2)])
def test_the_position_carries_over_to_another_number_of_processes(first, then):
    """Every process saves the same position, which counts global batches; no row is repeated or left out, over two passes."""

    def start(processes):
        return [train_iterator(SPLIT, CONFIG, process_index=p, process_count=processes) for p in range(processes)]

    def whole(iterators):
        parts = [next(iterator)["row_id"] for iterator in iterators]
        return np.concatenate(parts).tolist()

    count, before = 2 * len(ROWS) // CONFIG.batch_size, 5
    saving, restoring = start(first), start(then)
    rows = [whole(saving) for _ in range(before)]
    (state,) = {json.dumps(iterator.get_state(), sort_keys=True) for iterator in saving}
    for iterator in restoring:
        iterator.set_state(json.loads(state))
    rows += [whole(restoring) for _ in range(count - before)]
    assert rows == _ids(count)
    ids = np.concatenate(rows)
    assert sorted(ids) == sorted(list(range(len(ROWS))) * 2)


def test_validation_has_each_row_once_then_padding():
    batches = validation_batches(SPLIT, 16, "a", rows=1000, batch_size=4)
    source = PackedRows(SPLIT, 16, domain="a", pad_last=True)
    assert len(source) % 4
    ids = np.concatenate([batch["row_id"] for batch in batches])
    assert ids.tolist() == list(range(-(-len(source) // 4) * 4))
    assert {batch["tokens"].shape for batch in batches} == {(4, 16)}
    counted = sum(float(batch["loss_weights"].sum()) for batch in batches)
    assert counted == SPLIT.counts("a").sum()
    assert not batches[-1]["loss_weights"][len(source) % 4 - 4 :].any()


def test_validation_rows_are_spread_fixed_and_shared():
    total = len(PackedRows(SPLIT, 16, pad_last=True))
    batches = validation_batches(SPLIT, 16, rows=6, batch_size=4)
    ids = np.concatenate([batch["row_id"] for batch in batches])
    assert ids[:6].tolist() == [i * total // 6 for i in range(6)]
    assert (ids[6:] >= total).all()
    for one, other in zip(batches, validation_batches(SPLIT, 16, rows=6, batch_size=4), strict=True):
        _equal(one, other)
    shares = [validation_batches(SPLIT, 16, rows=6, batch_size=4, process_index=p, process_count=2) for p in range(2)]
    for batch, *parts in zip(batches, *shares, strict=True):
        _equal(batch, {name: np.concatenate([part[name] for part in parts]) for name in batch})


@pytest.mark.parametrize(
    ("config", "processes", "sentence"),
    [
        ({"seq_len": 10_000}, 1, r"data\.seq_len = 10000 needs 10001 tokens"),
        ({"batch_size": 64}, 1, r"data\.batch_size = 64 is more than the \d+ rows of data\.seq_len = 16"),
        ({}, 3, r"data\.batch_size = 4 does not divide over 3 processes"),
    ],
)
def test_too_little_data_is_refused(config, processes, sentence):
    with pytest.raises(DataError, match=sentence):
        train_iterator(SPLIT, DataConfig(**{"seq_len": 16, "batch_size": 4} | config), process_count=processes)
