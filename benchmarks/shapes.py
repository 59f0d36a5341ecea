"""Every shape that is measured, by op and name. `small` is what `python -m benchmarks.report --quick` runs."""

SHAPES: dict[str, dict[str, dict[str, int]]] = {
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
    "topk_search": {
        "small": {"queries": 16, "passages": 4096, "width": 64, "k": 10},
        # An agent that searches alone, and a batch of them, over sentence embeddings.
        "one_query": {"queries": 1, "passages": 100_000, "width": 384, "k": 3},
        "batch": {"queries": 256, "passages": 100_000, "width": 384, "k": 3},
        # The most likely tokens of a teacher: hidden rows against the head of SmolLM2-135M.
        "teacher": {"queries": 512, "passages": 49152, "width": 576, "k": 32},
    },
}
