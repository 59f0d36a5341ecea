"""Every shape that is measured, by op and name."""

SHAPES: dict[str, dict[str, dict[str, int]]] = {
    "gather_logprobs": {
        "small": {"rows": 256, "width": 64, "vocabulary": 1003},
        # The head of SmolLM2-135M on the policy tokens of a few rollouts.
        "smollm2": {"rows": 512, "width": 576, "vocabulary": 49152},
    },
}
