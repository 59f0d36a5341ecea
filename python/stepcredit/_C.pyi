# Stub of the C++ extension (csrc/bindings.cpp), checked by stubtest. Arguments are addresses from Tensor.data_ptr().
has_cuda: bool
has_bf16_product: bool
int8_path: int  # 0 plain, 1 AVX2, 2 AVX-512 VNNI
float_path: int  # 0 plain, 1 AVX2 with FMA, 2 AVX-512

def masked_advantages_f32(
    *,
    rewards: int,
    groups: int,
    cu_seqlens: int,
    policy_mask: int,
    step_ids: int,
    step_gains: int,
    weights: int,
    advantages: int,
    query_lengths: int,
    totals: int,
    num_rollouts: int,
    num_rewards: int,
    num_tokens: int,
    num_steps: int,
    alpha: float,
    eps: float,
    ddof: int,
    scale_std: bool,
    singleton_reward: bool,
    dead_zone: float,
    negative_scale: float,
    soft_clip: float,
    nan_is_missing: bool,
    batch_norm: bool,
    threads: int,
    on_cuda: bool,
    stream: int,
) -> None: ...

masked_advantages_f64 = masked_advantages_f32

def information_gain_f32(
    *,
    logprobs: int,
    cu_branches: int,
    cu_variants: int,
    cu_steps: int,
    gain: int,
    real: int,
    baseline: int,
    scored: int,
    scores: int,
    best_variant: int,
    num_branches: int,
    num_variants: int,
    num_steps: int,
    head_tokens: int,
    head_weight: float,
    threads: int,
    on_cuda: bool,
    stream: int,
) -> None: ...

information_gain_f64 = information_gain_f32

def topk_search_cpu(
    *, tile: int, rows: int, num_queries: int, first_id: int, k: int, scores: int, ids: int, threads: int
) -> None: ...
def gather_logprobs_fold_f32(
    *,
    logits: int,
    bias: int,
    active: int,
    rows: int,
    cols: int,
    first_col: int,
    scale: float,
    softcap: float,
    temperature: float,
    targets: int,
    maximum: int,
    sum: int,
    weighted: int,
    picked: int,
    num_targets: int,
    threads: int,
    on_cuda: bool,
    stream: int,
) -> None: ...

gather_logprobs_fold_f64 = gather_logprobs_fold_f32

def gather_logprobs_grad_f32(
    *,
    logits: int,
    bias: int,
    active: int,
    rows: int,
    cols: int,
    first_col: int,
    scale: float,
    softcap: float,
    temperature: float,
    targets: int,
    grad_logprobs: int,
    grad_entropy: int,
    maximum: int,
    log_sum: int,
    entropy: int,
    num_targets: int,
    threads: int,
    on_cuda: bool,
    stream: int,
) -> None: ...

gather_logprobs_grad_f64 = gather_logprobs_grad_f32

def bf16_product_cpu(
    *,
    left: int,
    right: int,
    out: int,
    rows: int,
    cols: int,
    depth: int,
    threads: int,
) -> None: ...
def quantize_cpu(
    *,
    vectors: int,
    centre: int,
    rows: int,
    scale: int,
    error: int,
    norm: int,
    num_passages: int,
    width: int,
    groups: int,
    threads: int,
) -> None: ...
def certified_search_cpu(
    *,
    rows: int,
    scale: int,
    error: int,
    norm: int,
    queries: tuple[int, int, int, int],
    coarse: tuple[int, int, int, int],
    query_norm: int,
    query_mean: int,
    exact_queries: int,
    vectors: int,
    scores: int,
    ids: int,
    rescored: int,
    num_queries: int,
    num_passages: int,
    width: int,
    groups: int,
    k: int,
    exact: bool,
    path: int,
    threads: int,
) -> None: ...
def exact_search_cpu(
    *,
    queries: int,
    vectors: int,
    bfloat16: bool,
    longest: float,
    scores: int,
    ids: int,
    rescored: int,
    num_queries: int,
    num_passages: int,
    width: int,
    k: int,
    path: int,
    threads: int,
) -> None: ...
def exact_scores_cpu(
    *,
    queries: int,
    vectors: int,
    ids: int,
    scores: int,
    num_queries: int,
    count: int,
    width: int,
    threads: int,
) -> None: ...
