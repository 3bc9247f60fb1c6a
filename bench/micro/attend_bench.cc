// attend: rows of a random selection, K then V, against a plain random gather of rows of the same size by the same
// number of threads, which asks for them in L1 or in L2. GB/s counts the bytes of the rows; `share` is attend's over
// the faster gather's, measured in turns in one run.
#include <benchmark/benchmark.h>

#include <algorithm>
#include <chrono>

#include "cpu/parallel.h"
#include "cpu/prefetch.h"
#include "cpu/steps.h"
#include "support.h"

namespace tactic::bench {
namespace {

double seconds() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

// The most the memory gives for rows at random places: every line is fetched ahead and added up.
template <class Fetch, int64_t kAhead>
uint64_t gather(const RowsView& rows, int32_t head, size_t bytes, const int32_t* tokens, int64_t num) {
  uint64_t sum = 0;
  for (int64_t t = 0; t < num; ++t) {
    const std::byte* ahead = rows.row(head, tokens[std::min(t + kAhead, num - 1)]);
    for (size_t i = 0; i < bytes; i += 64) Fetch::line(ahead + i);
    const std::byte* row = rows.row(head, tokens[t]);
    for (size_t i = 0; i < bytes; i += 64) sum += static_cast<uint64_t>(row[i]);
  }
  return sum;
}

enum class Reader { kGatherToL1, kGatherToL2, kAttend };

void attend(benchmark::State& state) {
  const auto threads = static_cast<int32_t>(state.range(0));
  const auto dim = static_cast<int32_t>(state.range(1));
  const auto group = static_cast<int32_t>(state.range(2));
  const int64_t num_tokens = state.range(3);
  const int32_t heads = 3, layers = static_cast<int32_t>(30 * 64 / dim);
  const Cache cache(layers, heads, dim, 8192);
  const std::vector<float> q = random_queries(group, dim, 3);
  std::mt19937 random(5);
  std::vector<int32_t> tokens(static_cast<size_t>(num_tokens));
  std::vector<double> shares, rates, to_l1, to_l2;
  std::vector<std::vector<float>> scores(static_cast<size_t>(threads)), out(static_cast<size_t>(threads));
  for (auto& s : scores) s.resize(static_cast<size_t>(group * num_tokens));
  for (auto& o : out) o.resize(static_cast<size_t>(group * dim));
  const size_t bytes = static_cast<size_t>(dim) * 2;
  const auto step = [&](Reader reader) {
    double time = 0;
    for (int32_t layer = 0; layer < layers; ++layer) {
      const KvView kv = cache.view(static_cast<size_t>(layer));
      for (int32_t head = 0; head < heads; ++head) {
        for (int32_t& token : tokens) token = static_cast<int32_t>(random() % 8192);
        const double begin = seconds();
        cpu::parallel_ranges(threads, num_tokens, 16, [&](int64_t from, int64_t to) {
          const int64_t num = to - from;
          if (reader != Reader::kAttend) {
            const auto read = reader == Reader::kGatherToL1 ? gather<cpu::FetchToL1, 24> : gather<cpu::FetchToL2, 48>;
            benchmark::DoNotOptimize(read(kv.k, head, bytes, tokens.data() + from, num) +
                                     read(kv.v, head, bytes, tokens.data() + from, num));
            return;
          }
          auto& s = scores[static_cast<size_t>(omp_get_thread_num())];
          cpu::attend_scores(kv.k, head, tokens.data() + from, num, q.data(), dim, group, s.data(), num_tokens, &kv.v,
                             dim);
          cpu::attend_values(kv.v, head, tokens.data() + from, num, s.data(), num_tokens, dim, group,
                             out[static_cast<size_t>(omp_get_thread_num())].data());
        });
        time += seconds() - begin;
      }
    }
    return time;
  };
  const double gigabytes =
      static_cast<double>(layers) * heads * static_cast<double>(num_tokens) * static_cast<double>(bytes) * 2 / 1e9;
  for (auto _ : state) {
    const double l1 = step(Reader::kGatherToL1), l2 = step(Reader::kGatherToL2), ours = step(Reader::kAttend);
    state.SetIterationTime(ours);
    shares.push_back(std::min(l1, l2) / ours);
    rates.push_back(gigabytes / ours);
    to_l1.push_back(gigabytes / l1);
    to_l2.push_back(gigabytes / l2);
  }
  const auto median = [](std::vector<double>& x) {
    std::nth_element(x.begin(), x.begin() + static_cast<std::ptrdiff_t>(x.size() / 2), x.end());
    return x[x.size() / 2];
  };
  state.counters["GB/s"] = median(rates);
  state.counters["gather_L1"] = median(to_l1);
  state.counters["gather_L2"] = median(to_l2);
  state.counters["share"] = median(shares);
}

BENCHMARK(attend)
    ->ArgNames({"threads", "head_dim", "group", "tokens"})
    ->ArgsProduct({{1, 2}, {64, 128, 256}, {3, 4, 8}, {700}})
    ->UseManualTime()
    ->Iterations(20);

}  // namespace
}  // namespace tactic::bench
