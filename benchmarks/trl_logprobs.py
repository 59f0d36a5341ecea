"""The log-probs of sampled tokens as TRL computes them, beside `gather_logprobs`: `python -m benchmarks.trl_logprobs`.

Needs `trl`. All ways run in turn, in one process; times are the best of the rounds. Error is against float64 on the
same inputs, over the first rows.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from trl.kernels import ChunkedLogProbFunction
from trl.trainer import utils
from trl.trainer.utils import selective_log_softmax

from benchmarks.measure import DEVICE, peak_bytes, seconds
from benchmarks.shapes import SHAPES
from stepcredit import gather_logprobs

ROUNDS = 7
CHECKED_ROWS = 64

Way = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def selective(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """From the logits of four sequences, over which TRL's function goes one by one."""
    logits = F.linear(hidden, weight)
    return selective_log_softmax(logits.unflatten(0, (4, -1)), targets.unflatten(0, (4, -1))).flatten()


def fused_head(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """What `GRPOTrainer` puts in place of the head."""
    chunk = utils._CHUNKED_LOGPROB_CHUNK_SIZE
    return ChunkedLogProbFunction.apply(hidden, weight, None, targets, 1.0, chunk, None, 1.0, ("log_probs",))[0]


WAYS: dict[str, Way] = {
    "selective_log_softmax": selective,
    "TRL's fused head": fused_head,
    "gather_logprobs": gather_logprobs,
}


def main() -> None:
    size = SHAPES["gather_logprobs"]["smollm2"]
    rows, width, vocabulary = size["rows"], size["width"], size["vocabulary"]
    print(f"{rows} x {width} x {vocabulary} on {DEVICE}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    for dtype in (torch.float32, torch.bfloat16):
        torch.manual_seed(0)
        hidden = torch.randn(rows, width, device=DEVICE).to(dtype).requires_grad_()
        weight = (torch.randn(vocabulary, width, device=DEVICE) / width**0.5).to(dtype).requires_grad_()
        targets = torch.randint(vocabulary, (rows,), device=DEVICE)
        advantages = torch.randn(rows, device=DEVICE)
        some = slice(CHECKED_ROWS)
        gold = F.linear(hidden.detach()[some].double(), weight.detach().double()).log_softmax(-1)
        gold = gold.gather(-1, targets[some, None])[:, 0]

        def run(way: Way, training: bool) -> None:
            hidden.grad = weight.grad = None  # noqa: B023  (called before the next dtype)
            with torch.set_grad_enabled(training):
                logprobs = way(hidden, weight, targets)  # noqa: B023
            if training:
                (logprobs.float() * advantages).sum().backward()  # noqa: B023

        for training in (False, True):
            calls = {name: (lambda way=way, training=training: run(way, training)) for name, way in WAYS.items()}
            best = {name: min(seconds(call) for _ in range(2)) for name, call in calls.items()}
            for _ in range(ROUNDS):
                for name, call in calls.items():
                    best[name] = min(best[name], seconds(call))
            for name, call in calls.items():
                hidden.grad = weight.grad = None  # freed inside, they would be subtracted
                with torch.no_grad():
                    error = float((WAYS[name](hidden, weight, targets)[some].double() - gold).abs().max())
                print(
                    f"| {name} | {str(dtype).removeprefix('torch.')} | {'training' if training else 'forward'} "
                    f"| {best[name]:.3f} | {best[name] / best['gather_logprobs']:.2f}x "
                    f"| {peak_bytes(call) / 1e6:,.0f} | {error:.0e} |"
                )


if __name__ == "__main__":
    main()
