"""A policy sharded by FSDP2 over two processes: the scores of the whole model, whatever work each rank has."""

from __future__ import annotations

import pytest
import torch
import torch.multiprocessing as mp

from scripted_rollouts import REFINE, random_policy
from stepcredit.batch import RolloutBatch
from stepcredit.branches.packing import TokenTree
from stepcredit.counterfactual import StepGains, score_steps
from stepcredit.scorer import PolicyScorer
from test_models import TOKENIZER, rollouts


def score(policy: PolicyScorer, rank: int, verify: bool) -> StepGains:
    """Rank 0 has three rollouts, each in a bin of its own, rank 1 has one."""
    mine = [rollouts(), rollouts()[2:]][rank]
    return score_steps(RolloutBatch.pack(mine), policy, baseline="empty", max_tokens=1, verify=verify)


def work(rank: int, directory: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"file://{directory}/store", rank=rank, world_size=2)
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    from torch.distributed.tensor import DTensor

    mesh = init_device_mesh("cpu", (2,))
    for tied in (False, True):
        model = random_policy("llama", TOKENIZER, tie_word_embeddings=tied)
        if not tied:
            model.model.embed_tokens.weight.data[-1] = torch.nan
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        policy = PolicyScorer(model, TOKENIZER, REFINE)
        tree = TokenTree("broken on rank 1")
        tree.read(tree.add([5]), 1, [10**6 if rank else 5])
        with pytest.raises(ValueError if rank else RuntimeError, match="vocabulary of" if rank else "another rank"):
            policy.logprobs([tree])
        if not tied:
            trees = [TokenTree("first"), TokenTree("second")]
            for tree, token in zip(trees, [len(TOKENIZER) - 1 if rank else 5, 5], strict=True):
                tree.read(tree.add([token, 5]), 1, [5])
            expected = (FloatingPointError, "first") if rank else (RuntimeError, "another rank")
            with pytest.raises(expected[0], match=expected[1]):
                policy.logprobs(trees, max_tokens=1)
        audited, gains = (score(policy, rank, verify) for verify in (True, False))
        assert all(isinstance(parameter, DTensor) for parameter in model.parameters())  # sharded, as it was found
        assert torch.equal(audited.gain, gains.gain)
        assert audited.difference < 1e-5
        torch.save(gains.gain, f"{directory}/{rank}{tied}")
    model = random_policy("llama", TOKENIZER)
    for module in (*model.model.layers, model):
        fully_shard(module, mesh=mesh, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    policy = PolicyScorer(model, TOKENIZER, REFINE)
    assert score(policy, rank, True).scored.any()  # what goes into a layer is cast, and the audit finds it right
    assert policy.compute_dtype is torch.bfloat16
    torch.distributed.destroy_process_group()


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without torch.distributed")
def test_ranks_run_equally_many_forwards_and_get_the_scores_of_the_whole_model(tmp_path):
    mp.spawn(work, args=(str(tmp_path),), nprocs=2)
    for tied in (False, True):
        whole = PolicyScorer(random_policy("llama", TOKENIZER, tie_word_embeddings=tied), TOKENIZER, REFINE)
        for rank in range(2):
            expected = score(whole, rank, False).gain
            torch.testing.assert_close(torch.load(tmp_path / f"{rank}{tied}"), expected, atol=1e-5, rtol=0)
