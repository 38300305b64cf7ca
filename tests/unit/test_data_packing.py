"""Packing and document boundaries against examples written out by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from epctl.runtime.data_batch import Batch, PackedData
from epctl.runtime.data_packing import (
    IGNORED,
    PackedRows,
    RowOrder,
    chopped_spans,
    stream_spans,
    whole_spans,
)


class Listed:
    """Documents given as lists; negative numbers are ids that are not trained on."""

    def __init__(self, *documents: list[int]) -> None:
        self.documents = [np.array(d) for d in documents]
        self.lengths = np.array([len(d) for d in documents], dtype=np.int64)

    def tokens(self, document: int, start: int, stop: int) -> tuple[Any, Any]:
        piece = self.documents[document][start:stop]
        return abs(piece), piece > 0


def rows_of(documents: Listed, spans: list[Any], length: int) -> PackedRows:
    return PackedRows(documents, spans, length, pad_id=0)


def test_stream_is_cut_every_length_and_positions_restart_at_documents_and_rows() -> None:
    documents = Listed([11, 12, 13], [21, 22], [31, 32, 33, 34], [41])
    rows = rows_of(documents, stream_spans(documents.lengths, 4), 4)
    assert [row.ids_S.tolist() for row in rows] == [[11, 12, 13, 21], [22, 31, 32, 33]]
    assert [row.positions_S.tolist() for row in rows] == [[0, 1, 2, 0], [0, 0, 1, 2]]
    assert [row.labels_S.tolist() for row in rows] == [
        [IGNORED, 12, 13, IGNORED],
        [IGNORED, IGNORED, 32, 33],
    ]


def test_whole_documents_share_a_row_as_long_as_they_fit_and_padding_is_apart() -> None:
    documents = Listed([11, 12], [21, 22, 23], [31, 32, 33, 34, 35, 36, 37])
    rows = rows_of(documents, whole_spans(documents.lengths, 6, packing=True), 6)
    assert [row.ids_S.tolist() for row in rows] == [
        [11, 12, 21, 22, 23, 0],
        [31, 32, 33, 34, 35, 36],
    ]
    assert rows[0].positions_S.tolist() == [0, 1, 0, 1, 2, 0]
    assert rows[0].labels_S.tolist() == [IGNORED, 12, IGNORED, 22, 23, IGNORED]


def test_without_packing_each_document_has_its_own_rows() -> None:
    documents = Listed([11, 12], [21, 22, 23, 24, 25])
    whole = rows_of(documents, whole_spans(documents.lengths, 4, packing=False), 4)
    assert [row.ids_S.tolist() for row in whole] == [[11, 12, 0, 0], [21, 22, 23, 24]]
    chopped = rows_of(documents, chopped_spans(documents.lengths, 4), 4)
    assert [row.ids_S.tolist() for row in chopped] == [
        [11, 12, 0, 0],
        [21, 22, 23, 24],
        [25, 0, 0, 0],
    ]


def test_what_is_not_trained_on_is_no_label() -> None:
    documents = Listed([-11, -12, 13, 14, -15])
    row = rows_of(documents, whole_spans(documents.lengths, 6, packing=True), 6)[0]
    assert row.ids_S.tolist() == [11, 12, 13, 14, 15, 0]
    assert row.labels_S.tolist() == [IGNORED, IGNORED, 13, 14, IGNORED, IGNORED]


lengths_lists = st.lists(st.integers(0, 30), min_size=1, max_size=20)


@given(lengths_lists, st.integers(1, 12))
def test_stream_uses_each_token_once_in_order(lengths: list[int], length: int) -> None:
    spans = [s for row in stream_spans(np.array(lengths), length) for s in row]
    tokens = [(s.document, n) for s in spans for n in range(s.start, s.stop)]
    everything = [(d, n) for d, size in enumerate(lengths) for n in range(size)]
    kept = len(everything) // length * length or len(everything)
    assert tokens == everything[:kept]


@given(lengths_lists, st.integers(1, 12), st.booleans())
def test_whole_rows_never_overflow_and_lose_only_the_ends_of_long_documents(
    lengths: list[int], length: int, packing: bool
) -> None:
    rows = whole_spans(np.array(lengths), length, packing=packing)
    assert all(sum(span.num_tokens for span in row) <= length for row in rows)
    spans = [span for row in rows for span in row]
    assert [(s.document, s.start, s.stop) for s in spans] == [
        (d, 0, min(size, length)) for d, size in enumerate(lengths)
    ]


def test_order_is_a_permutation_a_pass_new_each_pass_and_needs_no_history() -> None:
    order = RowOrder(7, seed=1, shuffle=True)
    first = [order.row_at(p) for p in range(7)]
    second = [order.row_at(p) for p in range(7, 14)]
    assert sorted(first) == sorted(second) == list(range(7))
    assert first != second
    fresh = RowOrder(7, seed=1, shuffle=True)
    assert [fresh.row_at(p) for p in (13, 2, 9)] == [second[6], first[2], second[2]]
    other = [RowOrder(7, seed=2, shuffle=True).row_at(p) for p in range(7)]
    assert other != first
    plain = RowOrder(3, seed=1, shuffle=False)
    assert [plain.row_at(p) for p in range(5)] == [0, 1, 2, 0, 1]


def test_windows_keep_their_order_whatever_follows_them() -> None:
    short, long = (RowOrder(n, seed=1, shuffle=True, window=4) for n in (8, 14))
    first = [short.row_at(p) for p in range(8)]
    assert [long.row_at(p) for p in range(8)] == first
    assert sorted(first[:4]) == [0, 1, 2, 3]
    drawn = [long.row_at(p) for p in range(28)]
    assert sorted(drawn[:14]) == sorted(drawn[14:]) == list(range(14))
    assert drawn[:14] != drawn[14:]
    assert [long.row_at(p) for p in (27, 3, 20)] == [drawn[p] for p in (27, 3, 20)]


def packed_batch() -> tuple[Batch, list[list[int]]]:
    documents = [[5, 6, 7], [8, 9], [10, 11, 12, 13]]
    listed = Listed(*documents)
    rows = rows_of(listed, whole_spans(listed.lengths, 10, packing=True), 10)
    data = PackedData(rows, rows, seed=0, shuffle=False)
    return data.train_batch(0, 1), documents


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_packed_row_gives_each_document_the_logits_it_has_alone(attention: str) -> None:
    from transformers import DeepseekV3ForCausalLM

    torch.manual_seed(0)
    model = DeepseekV3ForCausalLM(tiny_model_config())
    model.set_attn_implementation(attention)
    model.eval()
    batch, documents = packed_batch()
    with torch.no_grad():
        packed = model(**batch.model_inputs()).logits[0]
        place = 0
        for document in documents:
            alone = model(input_ids=torch.tensor([document])).logits[0]
            here = packed[place : place + len(document)]
            # Other matrix shapes round differently; a leak over a boundary is 1e-3 and more.
            torch.testing.assert_close(here, alone, rtol=1e-5, atol=1e-5)
            place += len(document)
        without = model(input_ids=batch.ids_BS, use_cache=False).logits[0]
    assert (without[3:9] - packed[3:9]).abs().max() > 1e-3, "boundaries make no difference here"


def test_loss_of_a_packed_row_is_the_mean_over_its_documents_targets() -> None:
    from transformers import DeepseekV3ForCausalLM

    torch.manual_seed(0)
    model = DeepseekV3ForCausalLM(tiny_model_config()).eval()
    batch, documents = packed_batch()
    assert batch.num_targets == sum(len(d) - 1 for d in documents)
    with torch.no_grad():
        packed = model(**batch.model_inputs()).loss
        alone = 0.0
        for document in documents:
            ids = torch.tensor([document])
            alone += float(model(input_ids=ids, labels=ids).loss) * (len(document) - 1)
    assert float(packed) == pytest.approx(alone / batch.num_targets, abs=1e-6)


def tiny_model_config() -> Any:
    from transformers import DeepseekV3Config

    return DeepseekV3Config(
        vocab_size=32, hidden_size=32, intermediate_size=32, moe_intermediate_size=16,
        num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2, n_routed_experts=4,
        num_experts_per_tok=2, n_shared_experts=1, first_k_dense_replace=1, n_group=1,
        topk_group=1, q_lora_rank=None, kv_lora_rank=16, qk_nope_head_dim=16,
        qk_rope_head_dim=8, v_head_dim=16, pad_token_id=None, initializer_range=0.2,
    )  # fmt: skip
