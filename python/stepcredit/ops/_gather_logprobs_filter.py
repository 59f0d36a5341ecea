"""Which tiles of the logits' gradient the backward of `gather_logprobs` may leave out: the bound of `filter_gradient`.

D [N, V] is the gradient of hidden @ weight.T. Its largest elements are at targets; everywhere else it is about p * g,
which in most tiles is next to nothing. With M the largest |D[i, t]| over the rows i, t the target of the row with the
largest incoming gradient, and u = eps / 2 of the dtype of the gradients, a tile may be left out when none of its
elements is above u * M / V. However many are,

    |change of d_hidden[i, c]| <= sum_j (u * M / V) * |weight[j, c]| = u * M * mean_j |weight[j, c]|
    |change of d_weight[j, c]| <= sum_i (u * M / V) * |hidden[i, c]| = u * M * sum_i |hidden[i, c]| / V

and u * x is at most one unit in the last place of x. So the largest terms that these sums have, M times a weight and M
times a hidden state, are the measure: a gradient that is far smaller than they are can lose more of its own digits, and
the row of d_weight of a token that is likely nowhere can become 0. The gradient of the bias is not touched.
"""

from __future__ import annotations

import torch

Tensor = torch.Tensor


def largest_negligible(
    grad_logprobs: Tensor,
    grad_entropy: Tensor,
    targets: Tensor,
    row_mask: Tensor | None,
    logprobs: Tensor,
    entropy: Tensor,
    maximum: Tensor,
    log_sum: Tensor,
    *,
    vocabulary: int,
    eps: float,
    temperature: float,
    softcap: float | None,
    logit_scale: float,
) -> Tensor:
    """u * M / V, [1], without a synchronisation; a row whose M is not finite does not raise it."""
    if not targets.numel():
        return grad_logprobs.new_zeros(1)
    main = grad_logprobs.abs().argmax(dim=1, keepdim=True)
    token, logp = targets.gather(1, main), logprobs.gather(1, main)[:, 0]
    # As in every implementation: D_t = sum_k g_k [t == t_k] - p_t (sum_k g_k + h (log p_t + H)), times dz/dx.
    p = logp.exp()
    by_entropy = grad_entropy * torch.where(p > 0, logp + entropy, 0.0)
    size = ((grad_logprobs * (targets == token)).sum(1) - p * (grad_logprobs.sum(1) + by_entropy)).abs()
    size = size * (abs(logit_scale) / temperature)
    if softcap is not None:
        bent = (logp + maximum + log_sum) * (temperature / softcap)
        size = size * (1 - bent * bent)
    counts = size.isfinite() if row_mask is None else size.isfinite() & row_mask
    return torch.where(counts, size, 0.0).amax(0, keepdim=True) * (eps / 2 / vocabulary)
