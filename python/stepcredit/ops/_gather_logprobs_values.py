"""What `gather_logprobs` does about values that are wrong: it refuses them where it may look, and elsewhere counts
targets that are no token, on their device."""

from __future__ import annotations

import torch

from stepcredit.ops import _checks as check

OP = "gather_logprobs"

Tensor = torch.Tensor
_counters: dict[torch.device, Tensor] = {}


def check_values(hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, mask: Tensor | None) -> None:
    bad = ~hidden.isfinite().all(dim=1) if mask is None else ~hidden.isfinite().all(dim=1) & mask
    if bool(bad.any()):
        row = int(bad.nonzero()[0])
        value = float(hidden[row][~hidden[row].isfinite()][0])
        raise ValueError(f"{OP}: hidden must be finite, got {value} in row {row}")
    wrong = out_of_range(targets, weight.shape[0], mask)
    if bool(wrong.any()):
        row, k = (int(i) for i in wrong.nonzero()[0])
        raise ValueError(f"{OP}: targets must lie in [0, {weight.shape[0]}), got {int(targets[row, k])} in row {row}")
    if bias is not None:
        at = (~((bias < torch.inf) | bias.isneginf())).nonzero()
        check.require(len(at) == 0, f"{OP}: bias must be finite or -inf, got {float(bias[at[0]]) if len(at) else 0}")


def out_of_range(targets: Tensor, vocabulary: int, row_mask: Tensor | None) -> Tensor:
    """Bool [N, K]: where a row that counts has a target that is no token."""
    wrong = (targets < 0) | (targets >= vocabulary)
    return wrong if row_mask is None else wrong & row_mask[:, None]


def count(wrong: Tensor) -> None:
    """Adds to the device's count, and does not wait for it."""
    counter = _counters.get(wrong.device)
    if counter is None:
        with torch.inference_mode(False):  # it outlives the mode of the first call
            counter = _counters[wrong.device] = torch.zeros((), dtype=torch.int64, device=wrong.device)
    counter += wrong.sum()


def out_of_range_targets(device: torch.device | str = "cuda") -> int:
    """How many targets of `gather_logprobs` on a GPU were no token since this was last asked.

    Such a target's log-prob is NaN and it has no part in gradients; one on a masked row is not read. Each call counts
    what it is given. Targets on a CPU, and with STEPCREDIT_DEBUG=1 in the environment those on any device, are not
    counted: there they raise a ValueError. Asking waits for the device. Calls on several streams of one device at the
    same time may be counted too low.

    Args:
        device: of the tensors; "cuda" is the current one.

    Returns:
        the count, which starts again from 0.
    """
    counter = _counters.get(torch.empty(0, device=device).device)
    if counter is None:
        return 0
    found = int(counter)
    counter -= found
    return found
