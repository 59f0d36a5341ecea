"""Every shape that is measured, by op and name. `small` is what `python -m benchmarks.report --quick` runs."""

from benchmarks.measure import DEVICE

SHAPES: dict[str, dict[str, dict[str, int]]] = {
    # Searches a rollout, other passages a step, tokens of passages, rollouts of the group.
    "counterfactual": {
        "small": {"searches": 1, "random": 2, "passage": 30, "rollouts": 3, "layers": 2},
        **{
            f"{s}-searches-{n}-random-{p}-tokens": {
                "searches": s,
                "random": n,
                "passage": p,
                "rollouts": 5,
                "layers": 30,
            }
            for p in (150, 450)
            for s in (1, 3, 5)
            for n in (1, 3, 8)
        },
    },
    "dense_index": {
        "small": {"queries": 16, "passages": 20_000, "width": 64},
        **{f"{q}-queries-1M": {"queries": q, "passages": 1_000_000, "width": 768} for q in (1, 16, 64, 256)},
    },
    "gather_logprobs": {
        "small": {"rows": 256, "width": 64, "vocabulary": 1003},
        # The head of SmolLM2-135M on the policy tokens of a few rollouts.
        "smollm2": {"rows": 512, "width": 576, "vocabulary": 49152},
    },
    "information_gain": {
        "small": {"steps": 8, "variants": 2, "branches": 4, "tokens": 10},
        # 256 questions of five rollouts with three searches, two spellings of the answer, three counterfactuals.
        "training": {"steps": 3840, "variants": 2, "branches": 4, "tokens": 10},
    },
    "masked_advantages": {
        "small": {"rollouts": 10, "group": 5, "tokens": 64, "searches": 2},
        # 256 questions of five rollouts, up to 2,048 tokens with what was retrieved.
        "training": {"rollouts": 1280, "group": 5, "tokens": 2048, "searches": 3},
    },
    # Tokens of a prompt, searches a rollout, tokens of passages, questions, rollouts of each; layers, width and
    # vocabulary of the policy.
    "methods": {
        "small": {
            "prompt": 40,
            "searches": 2,
            "passage": 30,
            "groups": 2,
            "rollouts": 3,
            "layers": 2,
            "width": 72,
            "vocabulary": 2048,
        },
        "smollm2-3-searches-150-tokens": {
            "prompt": 200,
            "searches": 3,
            "passage": 150,
            "groups": 1,
            "rollouts": 5,
            "layers": 30,
            "width": 576,
            "vocabulary": 49152,
        },
    },
    # Clients that each run so many groups of rollouts, one after another; a group searches together, three times.
    "server": {
        "small": {"clients": 8, "groups": 2, "passages": 4096, "width": 64, "k": 3},
        "64_clients": {"clients": 64, "groups": 2, "passages": 50_000, "width": 384, "k": 3},
    },
    "topk_search": {
        "small": {"queries": 16, "passages": 4096, "width": 64, "k": 10},
        # An agent that searches alone, and a batch of them, over sentence embeddings.
        "one_query": {"queries": 1, "passages": 100_000, "width": 384, "k": 3},
        "batch": {"queries": 256, "passages": 100_000, "width": 384, "k": 3},
        # The most likely tokens of a teacher: hidden rows against the head of SmolLM2-135M.
        "teacher": {"queries": 512, "passages": 49152, "width": 576, "k": 32},
    },
    "tree_attention": {
        "small": {
            "trees": 1,
            "prompt": 30,
            "rollouts": 2,
            "rollout": 40,
            "searches": 2,
            "counterfactuals": 2,
            "leaf": 12,
            "probe": 4,
            "heads": 4,
            "kv_heads": 2,
            "width": 16,
        },
        # A layer of SmolLM2-135M over the quickstart's questions: short trunks, leaves of a few dozen tokens.
        "short_leaves": {
            "trees": 2,
            "prompt": 110,
            "rollouts": 4,
            "rollout": 150,
            "searches": 2,
            "counterfactuals": 3,
            "leaf": 45,
            "probe": 11,
            "heads": 9,
            "kv_heads": 3,
            "width": 64,
        },
        # The same layer over one rollout of three searches with three passages each.
        "long_leaves": {
            "trees": 1,
            "prompt": 150,
            "rollouts": 1,
            "rollout": 1350,
            "searches": 3,
            "counterfactuals": 3,
            "leaf": 470,
            "probe": 15,
            "heads": 9,
            "kv_heads": 3,
            "width": 64,
        },
    },
}

#: Sizes that only a GPU is asked for.
GPU_SHAPES: dict[str, dict[str, dict[str, int]]] = {
    # The heads of Qwen2.5-3B and 7B on the policy tokens of a batch.
    "gather_logprobs": {
        "qwen2.5-3b": {"rows": 8192, "width": 2048, "vocabulary": 151_936},
        "qwen2.5-7b": {"rows": 8192, "width": 3584, "vocabulary": 152_064},
    },
    "masked_advantages": {"long": {"rollouts": 1024, "group": 8, "tokens": 2048, "searches": 3}},
    "topk_search": {
        "wikipedia": {"queries": 64, "passages": 4_000_000, "width": 768, "k": 3},
        # The most likely tokens of a Qwen2.5-3B.
        "qwen2.5-3b": {"queries": 4096, "passages": 151_936, "width": 2048, "k": 64},
    },
    # A layer of Qwen2.5-3B over five rollouts of three searches.
    "tree_attention": {
        "qwen2.5-3b": {
            "trees": 1,
            "prompt": 150,
            "rollouts": 5,
            "rollout": 1350,
            "searches": 3,
            "counterfactuals": 3,
            "leaf": 470,
            "probe": 15,
            "heads": 16,
            "kv_heads": 2,
            "width": 128,
        },
    },
}

if DEVICE == "cuda":
    for op, more in GPU_SHAPES.items():
        SHAPES[op] |= more
