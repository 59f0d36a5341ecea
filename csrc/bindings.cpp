// The only file that includes pybind11. Pointers arrive as integers from `Tensor.data_ptr()`; the Python wrappers in
// ops/ have checked shapes, dtypes, devices and contiguity before they call.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>

#include "cpu/ops.h"
#include "cuda/ops.h"

namespace py = pybind11;
using py::arg;
using stepcredit::Scale;
using stepcredit::Singleton;
using Pointer = std::uintptr_t;

namespace {

template <typename T>
T* at(Pointer p) {
  return reinterpret_cast<T*>(p);
}

// Calls `launch`, which starts a CUDA kernel. The bindings, and so the stub, exist in every build; dispatch never gets
// here in one without CUDA, in which nothing defines the kernels.
template <typename Launch>
void with_cuda([[maybe_unused]] Launch launch) {
#ifdef STEPCREDIT_WITH_CUDA
  launch();
#else
  throw std::runtime_error("stepcredit._C was built without CUDA");
#endif
}

template <typename Float>
void masked_advantages(Pointer rewards, Pointer groups, Pointer cu_seqlens, Pointer policy_mask, Pointer step_ids,
                       Pointer step_gains, Pointer weights, Pointer advantages, Pointer query_lengths, Pointer totals,
                       int64_t num_rollouts, int64_t num_rewards, int64_t num_tokens, int64_t num_steps, double alpha,
                       double eps, int64_t ddof, bool scale_std, bool singleton_reward, double dead_zone,
                       double negative_scale, double soft_clip, bool nan_is_missing, bool batch_norm, int threads,
                       bool on_cuda, Pointer stream) {
  const stepcredit::MaskedAdvantagesParams<Float> params{at<const Float>(rewards),
                                                         at<const int64_t>(groups),
                                                         at<const int64_t>(cu_seqlens),
                                                         at<const uint8_t>(policy_mask),
                                                         at<const int64_t>(step_ids),
                                                         at<const Float>(step_gains),
                                                         at<const Float>(weights),
                                                         at<Float>(advantages),
                                                         num_rollouts,
                                                         num_rewards,
                                                         num_tokens,
                                                         num_steps,
                                                         alpha,
                                                         eps,
                                                         ddof,
                                                         scale_std ? Scale::kStd : Scale::kNone,
                                                         singleton_reward ? Singleton::kReward : Singleton::kZero,
                                                         dead_zone,
                                                         negative_scale,
                                                         soft_clip,
                                                         nan_is_missing,
                                                         batch_norm,
                                                         threads};
  if (on_cuda) {
    with_cuda([&] {
      stepcredit::masked_advantages_cuda(params, at<int>(query_lengths), at<double>(totals), at<void>(stream));
    });
  } else {
    stepcredit::masked_advantages_cpu(params);
  }
}

template <typename Float>
void information_gain(Pointer logprobs, Pointer cu_branches, Pointer cu_variants, Pointer cu_steps, Pointer gain,
                      Pointer real, Pointer baseline, Pointer scored, Pointer scores, Pointer best_variant,
                      int64_t num_branches, int64_t num_variants, int64_t num_steps, int64_t head_tokens,
                      double head_weight, int threads, bool on_cuda, Pointer stream) {
  const stepcredit::InformationGainParams<Float> params{at<const Float>(logprobs),
                                                        at<const int64_t>(cu_branches),
                                                        at<const int64_t>(cu_variants),
                                                        at<const int64_t>(cu_steps),
                                                        at<Float>(gain),
                                                        at<Float>(real),
                                                        at<Float>(baseline),
                                                        at<uint8_t>(scored),
                                                        at<Float>(scores),
                                                        at<int64_t>(best_variant),
                                                        num_branches,
                                                        num_variants,
                                                        num_steps,
                                                        head_tokens,
                                                        head_weight,
                                                        threads};
  if (on_cuda) {
    with_cuda([&] { stepcredit::information_gain_cuda(params, at<void>(stream)); });
  } else {
    stepcredit::information_gain_cpu(params);
  }
}

void topk_search(Pointer tile, int64_t rows, int64_t num_queries, int64_t first_id, int64_t k, Pointer scores,
                 Pointer ids, int threads) {
  stepcredit::topk_search_cpu(stepcredit::TopkSearchParams{at<const float>(tile), rows, num_queries, first_id, k,
                                                           at<float>(scores), at<int64_t>(ids), threads});
}

void quantize(Pointer vectors, Pointer centre, Pointer rows, Pointer scale, Pointer error, Pointer norm,
              int64_t num_passages, int64_t width, int64_t groups, int threads) {
  stepcredit::quantize_cpu({at<const float>(vectors), at<const float>(centre), at<uint8_t>(rows), at<float>(scale),
                            at<float>(error), at<float>(norm), num_passages, width, groups, threads});
}

// Pointers to rows, scale, error and offset of queries.
using QueryPointers = std::array<Pointer, 4>;

stepcredit::Int8Queries int8_queries(const QueryPointers& q) {
  return {at<const int8_t>(q[0]), at<const float>(q[1]), at<const float>(q[2]), at<const int32_t>(q[3])};
}

void certified_search(Pointer rows, Pointer scale, Pointer error, Pointer norm, const QueryPointers& queries,
                      const QueryPointers& coarse, Pointer query_norm, Pointer query_mean, Pointer exact_queries,
                      Pointer vectors, Pointer scores, Pointer ids, Pointer rescored, int64_t num_queries,
                      int64_t num_passages, int64_t width, int64_t groups, int64_t k, bool exact, int path,
                      int threads) {
  stepcredit::certified_search_cpu({at<const uint8_t>(rows),
                                    at<const float>(scale),
                                    at<const float>(error),
                                    at<const float>(norm),
                                    int8_queries(queries),
                                    int8_queries(coarse),
                                    at<const float>(query_norm),
                                    at<const float>(query_mean),
                                    at<const float>(exact_queries),
                                    at<const float>(vectors),
                                    at<float>(scores),
                                    at<int64_t>(ids),
                                    at<int64_t>(rescored),
                                    num_queries,
                                    num_passages,
                                    width,
                                    groups,
                                    k,
                                    exact,
                                    static_cast<stepcredit::Int8Path>(path),
                                    threads});
}

void exact_search(Pointer queries, Pointer vectors, bool bfloat16, double longest, Pointer scores, Pointer ids,
                  Pointer rescored, int64_t num_queries, int64_t num_passages, int64_t width, int64_t k, int path,
                  int threads) {
  stepcredit::exact_search_cpu({at<const float>(queries), at<const void>(vectors), bfloat16, longest, at<float>(scores),
                                at<int64_t>(ids), at<int64_t>(rescored), num_queries, num_passages, width, k,
                                static_cast<stepcredit::FloatPath>(path), threads});
}

void exact_scores(Pointer queries, Pointer vectors, Pointer ids, Pointer scores, int64_t num_queries, int64_t count,
                  int64_t width, int threads) {
  stepcredit::exact_scores_cpu({at<const float>(queries), at<const float>(vectors), at<const int64_t>(ids),
                                at<float>(scores), num_queries, count, width, threads});
}

void bf16_product(Pointer left, Pointer right, Pointer out, int64_t rows, int64_t cols, int64_t depth, int threads) {
  stepcredit::bf16_product_cpu(stepcredit::Bf16ProductParams{at<const uint16_t>(left), at<const uint16_t>(right),
                                                             at<float>(out), rows, cols, depth, threads});
}

template <typename Float>
void gather_logprobs_fold(Pointer logits, Pointer bias, Pointer active, int64_t rows, int64_t cols, int64_t first_col,
                          double scale, double softcap, double temperature, Pointer targets, Pointer maximum,
                          Pointer sum, Pointer weighted, Pointer picked, int64_t num_targets, int threads, bool on_cuda,
                          Pointer stream) {
  const stepcredit::GatherLogprobsFoldParams<Float> params{
      {at<Float>(logits), at<const Float>(bias), at<const uint8_t>(active), rows, cols, first_col, scale, softcap,
       temperature},
      at<const int64_t>(targets),
      at<double>(maximum),
      at<double>(sum),
      at<double>(weighted),
      at<double>(picked),
      num_targets,
      threads};
  if (on_cuda) {
    with_cuda([&] { stepcredit::gather_logprobs_fold_cuda(params, at<void>(stream)); });
  } else {
    stepcredit::gather_logprobs_fold_cpu(params);
  }
}

template <typename Float>
void gather_logprobs_grad(Pointer logits, Pointer bias, Pointer active, int64_t rows, int64_t cols, int64_t first_col,
                          double scale, double softcap, double temperature, Pointer targets, Pointer grad_logprobs,
                          Pointer grad_entropy, Pointer maximum, Pointer log_sum, Pointer entropy, int64_t num_targets,
                          int threads, bool on_cuda, Pointer stream) {
  const stepcredit::GatherLogprobsGradParams<Float> params{
      {at<Float>(logits), at<const Float>(bias), at<const uint8_t>(active), rows, cols, first_col, scale, softcap,
       temperature},
      at<const int64_t>(targets),
      at<const Float>(grad_logprobs),
      at<const Float>(grad_entropy),
      at<const Float>(maximum),
      at<const Float>(log_sum),
      at<const Float>(entropy),
      num_targets,
      threads};
  if (on_cuda) {
    with_cuda([&] { stepcredit::gather_logprobs_grad_cuda(params, at<void>(stream)); });
  } else {
    stepcredit::gather_logprobs_grad_cpu(params);
  }
}

template <typename Float>
void bind_float(py::module_& m, const char* suffix) {
  const auto name = [&](const char* stem) { return std::string(stem) + suffix; };
  const py::call_guard<py::gil_scoped_release> release;
  m.def(name("masked_advantages").c_str(), &masked_advantages<Float>, release, py::kw_only(), arg("rewards"),
        arg("groups"), arg("cu_seqlens"), arg("policy_mask"), arg("step_ids"), arg("step_gains"), arg("weights"),
        arg("advantages"), arg("query_lengths"), arg("totals"), arg("num_rollouts"), arg("num_rewards"),
        arg("num_tokens"), arg("num_steps"), arg("alpha"), arg("eps"), arg("ddof"), arg("scale_std"),
        arg("singleton_reward"), arg("dead_zone"), arg("negative_scale"), arg("soft_clip"), arg("nan_is_missing"),
        arg("batch_norm"), arg("threads"), arg("on_cuda"), arg("stream"));
  m.def(name("information_gain").c_str(), &information_gain<Float>, release, py::kw_only(), arg("logprobs"),
        arg("cu_branches"), arg("cu_variants"), arg("cu_steps"), arg("gain"), arg("real"), arg("baseline"),
        arg("scored"), arg("scores"), arg("best_variant"), arg("num_branches"), arg("num_variants"), arg("num_steps"),
        arg("head_tokens"), arg("head_weight"), arg("threads"), arg("on_cuda"), arg("stream"));
  m.def(name("gather_logprobs_fold").c_str(), &gather_logprobs_fold<Float>, release, py::kw_only(), arg("logits"),
        arg("bias"), arg("active"), arg("rows"), arg("cols"), arg("first_col"), arg("scale"), arg("softcap"),
        arg("temperature"), arg("targets"), arg("maximum"), arg("sum"), arg("weighted"), arg("picked"),
        arg("num_targets"), arg("threads"), arg("on_cuda"), arg("stream"));
  m.def(name("gather_logprobs_grad").c_str(), &gather_logprobs_grad<Float>, release, py::kw_only(), arg("logits"),
        arg("bias"), arg("active"), arg("rows"), arg("cols"), arg("first_col"), arg("scale"), arg("softcap"),
        arg("temperature"), arg("targets"), arg("grad_logprobs"), arg("grad_entropy"), arg("maximum"), arg("log_sum"),
        arg("entropy"), arg("num_targets"), arg("threads"), arg("on_cuda"), arg("stream"));
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "StepCredit kernels without torch: raw pointers in, raw pointers out.";
#ifdef STEPCREDIT_WITH_CUDA
  m.attr("has_cuda") = true;
#else
  m.attr("has_cuda") = false;
#endif
  m.attr("has_bf16_product") = stepcredit::bf16_product_available();
  m.def("bf16_product_cpu", &bf16_product, py::call_guard<py::gil_scoped_release>(), py::kw_only(), arg("left"),
        arg("right"), arg("out"), arg("rows"), arg("cols"), arg("depth"), arg("threads"));
  bind_float<float>(m, "_f32");
  bind_float<double>(m, "_f64");
  m.def("topk_search_cpu", &topk_search, py::call_guard<py::gil_scoped_release>(), py::kw_only(), arg("tile"),
        arg("rows"), arg("num_queries"), arg("first_id"), arg("k"), arg("scores"), arg("ids"), arg("threads"));
  m.attr("int8_path") = static_cast<int>(stepcredit::int8_path());
  m.def("quantize_cpu", &quantize, py::call_guard<py::gil_scoped_release>(), py::kw_only(), arg("vectors"),
        arg("centre"), arg("rows"), arg("scale"), arg("error"), arg("norm"), arg("num_passages"), arg("width"),
        arg("groups"), arg("threads"));
  m.def("certified_search_cpu", &certified_search, py::call_guard<py::gil_scoped_release>(), py::kw_only(), arg("rows"),
        arg("scale"), arg("error"), arg("norm"), arg("queries"), arg("coarse"), arg("query_norm"), arg("query_mean"),
        arg("exact_queries"), arg("vectors"), arg("scores"), arg("ids"), arg("rescored"), arg("num_queries"),
        arg("num_passages"), arg("width"), arg("groups"), arg("k"), arg("exact"), arg("path"), arg("threads"));
  m.attr("float_path") = static_cast<int>(stepcredit::float_path());
  m.def("exact_search_cpu", &exact_search, py::call_guard<py::gil_scoped_release>(), py::kw_only(), arg("queries"),
        arg("vectors"), arg("bfloat16"), arg("longest"), arg("scores"), arg("ids"), arg("rescored"), arg("num_queries"),
        arg("num_passages"), arg("width"), arg("k"), arg("path"), arg("threads"));
  m.def("exact_scores_cpu", &exact_scores, py::call_guard<py::gil_scoped_release>(), py::kw_only(), arg("queries"),
        arg("vectors"), arg("ids"), arg("scores"), arg("num_queries"), arg("count"), arg("width"), arg("threads"));
}
