from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from tafkir.data.packing import pack_documents


def test_documents_stand_one_after_the_other_shortest_first() -> None:
    batch = pack_documents([([5, 6, 7], None), ([8, 9], [False, True]), ([1, 2, 3, 4], [False, False, True, True])])
    assert batch.input_ids_N.tolist() == [8, 9, 5, 6, 7, 1, 2, 3, 4]
    assert batch.positions_N.tolist() == [0, 1, 0, 1, 2, 0, 1, 2, 3]
    assert batch.cu_seqlens == (0, 2, 5, 9)
    assert batch.labels_N.tolist() == [9, -100, 6, 7, -100, -100, 3, 4, -100]
    assert batch.order == (1, 0, 2) and batch.num_targets == 5
    assert batch.input_ids_N.dtype == batch.positions_N.dtype == batch.labels_N.dtype == torch.int64


@given(st.lists(st.lists(st.tuples(st.integers(0, 99), st.booleans()), min_size=1, max_size=9), min_size=1, max_size=9))
def test_every_label_is_the_next_token_of_its_own_document(rows: list[list[tuple[int, bool]]]) -> None:
    documents = [([id for id, _ in row], [wanted for _, wanted in row]) for row in rows]
    batch = pack_documents(documents)
    assert sorted(batch.order) == list(range(len(rows)))
    for place, index in enumerate(batch.order):
        start, end = batch.cu_seqlens[place], batch.cu_seqlens[place + 1]
        ids, mask = documents[index]
        assert batch.input_ids_N[start:end].tolist() == ids
        expected = [ids[i + 1] if mask[i + 1] else -100 for i in range(len(ids) - 1)] + [-100]
        assert batch.labels_N[start:end].tolist() == expected
    lengths = [b - a for a, b in zip(batch.cu_seqlens, batch.cu_seqlens[1:], strict=False)]
    assert lengths == sorted(lengths)
