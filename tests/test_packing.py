from __future__ import annotations

import pytest
import torch

from scripted_rollouts import REFINE, random_policy
from stepcredit.branches.packing import TokenTree, pack
from stepcredit.scorer import PolicyScorer
from tokenizers_under_test import BUILT


def stored(tree):
    return [(s.tokens, s.parent, s.at) for s in tree.segments]


def test_trunks_share_the_longest_prefix_wherever_it_lies():
    tree = TokenTree("t")
    assert tree.add_trunk([1, 2, 3, 4]) == 0
    assert tree.add_trunk([1, 2, 5]) == 1
    assert tree.add_trunk([1, 2, 5, 6, 7]) == 2  # goes on where a segment ends
    assert tree.add_trunk([1, 2, 5, 6, 8]) == 3  # leaves in the middle of one
    assert tree.add_trunk([1, 2, 3]) == 0  # is the beginning of one
    assert tree.add_trunk([9]) == 4
    assert stored(tree) == [
        ((1, 2, 3, 4), -1, 0),
        ((5,), 0, 2),
        ((6, 7), 1, 1),
        ((8,), 2, 1),
        ((9,), -1, 0),
    ]
    assert tree.num_tokens == 9
    assert [tree.level(s) for s in range(5)] == [0, 1, 2, 3, 0]


def test_equal_continuations_of_a_shared_place_are_stored_once():
    tree = TokenTree("t")
    a, b = tree.add_trunk([1, 2, 3, 4]), tree.add_trunk([1, 2, 5])
    leaf = tree.add([7, 7], a, 2)
    assert tree.add([7, 7], b, 2) == leaf  # depth 2 lies before the two part
    assert tree.add([7, 7], b, 3) != leaf
    assert tree.add([], b, 2) == a  # nothing to add: the segment that holds the place
    assert tree.add([]) == -1
    with pytest.raises(ValueError, match=r"depth must be in \[0, 3\], got 4"):
        tree.add([1], b, 4)
    with pytest.raises(ValueError, match="no row that predicts it"):
        tree.read(b, 0, [1])


def test_reads_of_shared_tokens_run_the_head_once_and_all_get_their_value():
    """Against separate forwards; the bins hold a row per distinct log-prob."""
    tokenizer = BUILT["byte_bpe"]()
    policy = PolicyScorer(random_policy("llama", tokenizer), tokenizer, REFINE)
    sequences = [[5, 6, 7, 8], [5, 6, 7, 9, 10], [5, 6, 7, 8], [11, 6]]
    tree = TokenTree("t")
    for sequence in sequences:
        tree.read(tree.add_trunk(sequence[:-1]), 1, sequence[1:])
    tree.read(0, 1, [6], temperature=0.5)
    (item,) = pack([tree], 100)
    # after 5: 6, 7; after 7: 8, 9; then 10; after 11: 6; and once more at another temperature
    assert (item.tokens.numel(), len(item.rows), len(item.sources), len(item.places)) == (5, 7, 12, 12)
    got = policy.logprobs([tree]).tolist()
    expected = []
    for sequence, temperature in [*((s, 1.0) for s in sequences), ([5, 6], 0.5)]:
        with torch.no_grad():
            logp = (policy.model(torch.tensor([sequence])).logits[0] / temperature).log_softmax(-1)
        expected += logp[torch.arange(len(sequence) - 1), sequence[1:]].tolist()
    assert got == pytest.approx(expected, abs=1e-5)


def test_bins_are_filled_longest_first_and_trees_without_reads_left_out():
    trees = []
    for n in (3, 7, 5, 2):
        tree = TokenTree(str(n))
        tip = tree.add(range(n))
        if n != 2:
            tree.read(tip, n, [1])
        trees.append(tree)
    bins = pack(trees, 8)
    assert [b.tokens.numel() for b in bins] == [7, 8]
    assert [b.places.tolist() for b in bins] == [[1], [2, 0]]
    assert [b.row_trees.tolist() for b in bins] == [[1], [2, 0]]
    with pytest.raises(ValueError, match="max_tokens must be at least 1, got 0"):
        pack(trees, 0)
