from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from stepcredit.batch import RolloutBatch
from stepcredit.train.policy import policy_logprobs, row_limit, training_attention
from stepcredit.train.rows import (
    EAGER_LENGTH,
    MICRO_BATCH_COST,
    Row,
    micro_batches,
    pack_rows,
    row_inputs,
    used_lengths,
)
from tiny_run import played, tiny_parts


class Batch:
    """As much of a batch as rows need."""

    def __init__(self, groups, tokens):
        self.groups = torch.tensor(groups)
        self.rollouts = [type("R", (), {"tokens": list(t)}) for t in tokens]


rollouts = st.lists(st.tuples(st.integers(0, 2), st.lists(st.integers(0, 1), min_size=1, max_size=7)), max_size=8)


@given(rollouts, st.integers(1, 20))
def test_rows_hold_every_rollout_and_every_shared_prefix_once(drawn, limit):
    groups = [g for g, _ in drawn]
    rows = pack_rows(Batch(groups, [t for _, t in drawn]), [len(t) for _, t in drawn], limit)
    assert sorted(b for row in rows for b in row.nodes) == list(range(len(drawn)))
    for row in rows:
        assert len({groups[b] for b in row.nodes}) == 1
        assert len(row.tokens) == len(row.parents)
        assert len(row.nodes) == 1 or len(row.tokens) <= limit
        for b, nodes in row.nodes.items():
            assert [row.tokens[n] for n in nodes] == drawn[b][1]
            assert [row.parents[n] for n in nodes] == [-1, *nodes[:-1]]
        prefixes = {tuple(drawn[b][1][:n]) for b in row.nodes for n in range(1, len(drawn[b][1]) + 1)}
        assert len(row.tokens) == len(prefixes)


@given(rollouts)
def test_a_token_sees_its_ancestors_and_itself_at_the_position_of_its_depth(drawn):
    if not drawn:
        return
    rows = pack_rows(Batch([g for g, _ in drawn], [t for _, t in drawn]), [len(t) for _, t in drawn], 100)
    inputs = row_inputs(rows, torch.float32)
    if "attention_mask" not in inputs:
        assert all(len(row.nodes) == 1 for row in rows)
        return
    assert set(inputs["attention_mask"].unique().tolist()) <= {0.0, torch.finfo(torch.float32).min}
    for number, row in enumerate(rows):
        for nodes in row.nodes.values():
            for depth, node in enumerate(nodes):
                seen = (inputs["attention_mask"][number, 0, node] == 0).nonzero().squeeze(1)
                assert seen.tolist() == sorted(nodes[: depth + 1])
                assert inputs["position_ids"][number, node] == depth
        for node in range(len(row.tokens), inputs["input_ids"].shape[1]):
            assert (inputs["attention_mask"][number, 0, node] == 0).nonzero().squeeze(1).tolist() == [node]


def test_lengths_leave_rollouts_out_and_cut_them():
    rows = pack_rows(Batch([0, 0, 0], [[1, 2, 3], [1, 2, 4], [1, 9, 9]]), [2, 3, 0], 100)
    assert [(row.tokens, row.parents, sorted(row.nodes)) for row in rows] == [([1, 2, 4], [-1, 0, 1], [0, 1])]
    assert pack_rows(Batch([0], [[1]]), [0], 10) == []


def test_micro_batches_hold_every_row_once_within_the_budget():
    rows = [Row(tokens=[0] * n) for n in (5, 300, 120, 118, 60, 7, 2000)]
    batches = micro_batches(rows, 400)
    assert sorted(len(row.tokens) for batch in batches for row in batch) == [5, 7, 60, 118, 120, 300, 2000]
    assert [len(row.tokens) for row in batches[0]] == [2000]  # longer than the budget: alone
    assert all(len(b) * len(b[0].tokens) <= 400 for b in batches[1:])
    assert micro_batches([], 10) == []


@pytest.mark.parametrize(("shorter", "expected"), [(MICRO_BATCH_COST - 1, 1), (MICRO_BATCH_COST + 1, 2)])
def test_a_micro_batch_is_split_when_padding_costs_more(shorter, expected):
    rows = [Row(tokens=[0] * 100), Row(tokens=[0] * (100 - shorter))]
    assert len(micro_batches(rows, 400)) == expected


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_sharing_changes_neither_log_probs_nor_gradients(attention):
    parts = tiny_parts()
    parts.model.set_attn_implementation(attention)
    batch = played(parts, 8, group_size=4)
    used = batch.policy_mask
    lengths = used_lengths(batch, used)
    shared, alone = pack_rows(batch, lengths, 512), pack_rows(batch, lengths, 1)
    assert sum(len(r.tokens) for r in shared) < 0.8 * sum(len(r.tokens) for r in alone) == 0.8 * sum(lengths)
    weight = torch.randn(used.shape)
    gradients = []
    for rows in (shared, alone):
        position, logprobs = policy_logprobs(parts.model, batch, used, rows, 0.7)
        order = position.argsort()
        assert torch.equal(position[order], used.nonzero().squeeze(1))
        (weight[position] * logprobs).sum().backward()
        names = parts.optimizer.masters
        gradients.append((logprobs.detach()[order], [m.grad.clone() for m in names.values()]))
        parts.optimizer.adamw.zero_grad()
    torch.testing.assert_close(gradients[0][0], gradients[1][0], rtol=0, atol=1e-5)
    torch.testing.assert_close(gradients[0][1], gradients[1][1], rtol=1e-3, atol=1e-4)


def test_the_order_of_the_batch_does_not_matter():
    parts = tiny_parts()
    batch = played(parts, 4, group_size=4)
    turned = RolloutBatch.pack(batch.rollouts[::-1])
    rows = [pack_rows(b, used_lengths(b, b.policy_mask), 512) for b in (batch, turned)]
    assert [r.tokens for r in rows[0]] == [r.tokens for r in rows[1]]


def test_attention_is_eager_for_short_rows_only_and_restored():
    parts = tiny_parts()
    parts.model.set_attn_implementation("sdpa")
    for length, expected in ((EAGER_LENGTH, "eager"), (EAGER_LENGTH + 1, "sdpa")):
        with training_attention(parts.model, [Row(tokens=[0] * length)]):
            assert parts.model.config._attn_implementation == expected
        assert parts.model.config._attn_implementation == "sdpa"


def test_a_shared_row_fits_a_sliding_window():
    parts = tiny_parts()
    assert row_limit(parts.model, 100) == 100
    assert row_limit(parts.model, 10**6) == EAGER_LENGTH
    parts.model.config.sliding_window = 60
    assert row_limit(parts.model, 10**6) == 60
