// One decode step on the CPU: all queries and heads of a layer, phase by phase, each phase shared evenly among threads.
#include <omp.h>

#include <algorithm>
#include <atomic>
#include <bit>
#include <cmath>

#include "core/backend.h"
#include "cpu/merge.h"
#include "cpu/parallel.h"
#include "cpu/steps.h"
#include "cpu/task.h"

namespace tactic {
namespace cpu {
namespace {

constexpr int64_t kDenseChunk = 512;  // rows whose scores are kept at a time

// What one thread has of one task's output.
struct Partial {
  std::vector<SoftmaxState> state;  // [group_size]; of a sparse task the maximum alone, which all threads share
  std::vector<float> values;        // [group_size, v_head_dim] sum of weights times values
  std::vector<WeightSums> sums;     // [group_size] of selected rows
  bool used = false;
};

void list_rows(const RowFilter& filter, bool unindexed_only, std::vector<int32_t>& rows) {
  rows.clear();
  for (int64_t w = 0; w * 64 < filter.kv_len; ++w) {
    uint64_t word = filter.visible_word(w);
    if (unindexed_only) word &= ~filter.indexed->word(w);
    for (; word != 0; word &= word - 1) rows.push_back(static_cast<int32_t>(w * 64 + std::countr_zero(word)));
  }
}

class CpuRun : public BackendRun {
 public:
  void run(std::span<const DecodeQuery> queries, const DecodeOptions& options, int32_t num_threads,
           StepStats* stats) override {
    begin(queries, options);
    step(options, num_threads);
    if (redo_dense()) step(options, num_threads);
    finish_queries(queries, options, stats);
  }

 private:
  struct QueryState {
    std::vector<int32_t> rows;  // recent rows when sparse, all visible ones when dense
    RowFilter filter;
    int64_t num_visible = 0;
    DenseReason dense = DenseReason::kNone;
  };

  void begin(std::span<const DecodeQuery> queries, const DecodeOptions& options) {
    queries_.resize(queries.size());
    size_t num_tasks = 0;
    for (const DecodeQuery& query : queries) num_tasks += static_cast<size_t>(query.kv.num_kv_heads);
    tasks_.resize(num_tasks);
    kept_.clear();  // of a step that failed
    size_t t = 0;
    for (size_t i = 0; i < queries.size(); ++i) {
      const DecodeQuery& query = queries[i];
      QueryState& state = queries_[i];
      state.filter = {query.visible, query.kv.kv_len,
                      query.index != nullptr ? &query.index->state().indexed : &no_rows_};
      state.num_visible = state.filter.count_visible(0, query.kv.kv_len);
      const int64_t indexed = state.filter.count_indexed(0, query.kv.kv_len);
      state.dense = options.select == Select::kDense ? DenseReason::kAsked
                    : query.bias != nullptr          ? DenseReason::kMask
                    : indexed < kMinIndexedRows      ? DenseReason::kNoIndex
                                                     : DenseReason::kNone;
      list_rows(state.filter, state.dense == DenseReason::kNone, state.rows);
      if (query.bias != nullptr) std::erase_if(state.rows, [&](int32_t row) { return query.bias[row] == -HUGE_VALF; });
      for (int32_t head = 0; head < query.kv.num_kv_heads; ++head, ++t) {
        Task& task = tasks_[t];
        task.query = &query;
        task.query_number = static_cast<int32_t>(i);
        task.head = head;
        task.filter = state.filter;
        task.sparse = state.dense == DenseReason::kNone;
        task.again = false;
      }
    }
    // Tasks that share an index learn one after the other.
    learn_apart_ = true;
    for (size_t i = 1; i < queries.size(); ++i) {
      for (size_t j = 0; j < i; ++j) learn_apart_ = learn_apart_ && queries[i].index != queries[j].index;
    }
  }

  void step(const DecodeOptions& options, int32_t num_threads) {
    const int32_t threads = thread_count(num_threads);
    if (partials_.size() < static_cast<size_t>(threads) * tasks_.size())
      partials_.resize(static_cast<size_t>(threads) * tasks_.size());
    for (Partial& partial : partials_) partial.used = false;
    TeamError error;
    if (threads == 1) {
      phases(options, 0, 1, error);
    } else {
#pragma omp parallel num_threads(threads)
      phases(options, omp_get_thread_num(), omp_get_num_threads(), error);
    }
    error.rethrow();
  }

  // fn(task, begin, end) for this thread's share of what `size` says of each task, counted in grains.
  template <class Size, class Fn>
  void share(int32_t thread, int32_t threads, int64_t grain, Size size, Fn fn) {
    int64_t total = 0;
    for (Task& task : tasks_) total += (size(task) + grain - 1) / grain;
    const int64_t first = total * thread / threads, last = total * (thread + 1) / threads;
    int64_t at = 0;
    for (Task& task : tasks_) {
      const int64_t count = size(task), pieces = (count + grain - 1) / grain;
      const int64_t from = std::max(first, at), to = std::min(last, at + pieces);
      if (from < to) fn(task, (from - at) * grain, std::min(count, (to - at) * grain));
      at += pieces;
    }
  }

  void phases(const DecodeOptions& options, int32_t thread, int32_t threads, TeamError& error) {
    const auto for_tasks = [&](auto fn) {  // whole ones: of sparse ones those of which share() gives this thread most
      const size_t n = tasks_.size(), parts = static_cast<size_t>(threads), part = static_cast<size_t>(thread);
      for (size_t t = n * part / parts; t < n * (part + 1) / parts; ++t) fn(t);
    };
    const auto wait = [&] {  // a caller alone waits for no one: the team around it, if there is one, is another's
      if (threads > 1) {
#pragma omp barrier
      }
    };
    bool any_sparse = false;
    for (const Task& task : tasks_) any_sparse = any_sparse || task.sparse;
    error.guard([&] {
      for_tasks([&](size_t t) { begin_task(tasks_[t], queries_[static_cast<size_t>(tasks_[t].query_number)].rows); });
    });
    wait();
    if (any_sparse) {
      error.guard([&] { score_phase(thread, threads); });
      wait();
      error.guard([&] {
        for_tasks([&](size_t t) {
          if (tasks_[t].sparse) select_rows(tasks_[t], options);
        });
      });
      wait();
    }
    error.guard([&] { read_phase(options, thread, threads); });
    wait();
    error.guard([&] {
      for_tasks([&](size_t t) {
        Task& task = tasks_[t];
        if (task.sparse && !task.not_finite) {
          settle_task(t, options, threads);
          task.late_changed = options.check_rows && !rows_unchanged(task, task.refined, 0, task.refined.size());
        }
        if (task.sparse && (task.not_finite || task.late_changed)) return;  // done anew
        if (task.sparse) read_settled(task, partial_of(task, thread));
        merge_task(t, threads);
        if (task.sparse && learn_apart_ && !query_changed(task)) {
          forget_expected(task, options);
          learn(task, options);
        }
      });
    });
  }

  bool query_changed(const Task& task) const {
    return std::any_of(tasks_.begin(), tasks_.end(),
                       [&](const Task& other) { return other.query == task.query && other.changed; });
  }

  static void score_rows(Task& task, RowList& list, int64_t begin, int64_t end) {
    attend_scores(task.query->kv.k, task.head, list.tokens.data() + begin, end - begin, task.q.data(), task.head_dim(),
                  task.group_size, list.scores.data() + begin, list.stride, &task.query->kv.v, task.v_head_dim());
  }

  void score_phase(int32_t thread, int32_t threads) {
    share(
        thread, threads, kCentroidBlock,
        [](const Task& task) { return task.sparse ? int64_t{task.clusters.num_clusters} : 0; },
        [&](Task& task, int64_t begin, int64_t end) {
          score(task.query->index->state(), task.head, task.filter, task.q.data(), task.group_size,
                static_cast<int32_t>(begin), static_cast<int32_t>(end), task.clusters);
        });
    share(
        thread, threads, 16, [](const Task& task) { return task.sparse ? task.exact.size() : 0; },
        [&](Task& task, int64_t begin, int64_t end) { score_rows(task, task.exact, begin, end); });
  }

  Partial& partial_of(const Task& task, int32_t thread) {
    Partial& partial =
        partials_[static_cast<size_t>(thread) * tasks_.size() + static_cast<size_t>(&task - tasks_.data())];
    if (!partial.used) {
      partial.used = true;
      partial.state.assign(static_cast<size_t>(task.group_size), {});
      partial.sums.assign(static_cast<size_t>(task.group_size), {});
      partial.values.assign(static_cast<size_t>(task.group_size) * static_cast<size_t>(task.v_head_dim()), 0.0f);
    }
    return partial;
  }

  // Every row that is known by now: selected ones are scored and weighed, and all values added up.
  void read_phase(const DecodeOptions& options, int32_t thread, int32_t threads) {
    share(
        thread, threads, 16, [](const Task& task) { return task.sparse || task.head != 0 ? 0 : task.exact.size(); },
        [&](Task& task, int64_t begin, int64_t end) { dense_rows(&task, begin, end, thread); });
    const auto read = [](const Task& task) { return task.sparse && !task.not_finite; };
    share(
        thread, threads, 16, [&](const Task& task) { return read(task) ? task.exact.size() : 0; },
        [&](Task& task, int64_t begin, int64_t end) {
          value_rows(task, task.exact, begin, end, partial_of(task, thread));
        });
    share(  // certain ones apart, which take less time: most were read in the last step too
        thread, threads, 16, [&](const Task& task) { return read(task) ? task.selection.num_certain : 0; },
        [&](Task& task, int64_t begin, int64_t end) { selected_rows(task, options, begin, end, thread); });
    share(
        thread, threads, 16,
        [&](const Task& task) { return read(task) ? task.selected.size() - task.selection.num_certain : 0; },
        [&](Task& task, int64_t begin, int64_t end) {
          const int64_t first = task.selection.num_certain;
          selected_rows(task, options, first + begin, first + end, thread);
        });
  }

  void selected_rows(Task& task, const DecodeOptions& options, int64_t begin, int64_t end, int32_t thread) {
    Partial& partial = partial_of(task, thread);
    score_rows(task, task.selected, begin, end);
    weigh_rows(task, begin, end, partial.sums.data());
    const bool refines = options.select == Select::kSample && draws_too_heavy(task, partial.sums.data());
    for (int64_t at = begin; at < end;) {  // rows too heavy to be a sample wait until their clusters are read
      const int64_t heavy = refines ? next_heavy(task, at, end) : end;
      value_rows(task, task.selected, at, heavy, partial);
      at = heavy + 1;
    }
    if (options.check_rows && !rows_unchanged(task, task.selected, begin, end)) mark_changed(task);
  }

  // Rows added by refinement, and what it changed in the weights of others.
  static void read_settled(Task& task, Partial& partial) {
    value_rows(task, task.refined, 0, task.refined.size(), partial);
    value_rows(task, task.corrected, 0, task.corrected.size(), partial);
  }

  static void value_rows(Task& task, RowList& list, int64_t begin, int64_t end, Partial& partial) {
    if (begin == end) return;
    for (size_t g = 0; g < partial.state.size(); ++g) partial.state[g].max = task.exact_state[g].max;
    attend_values(task.query->kv.v, task.head, list.tokens.data() + begin, end - begin, list.weights.data() + begin,
                  list.stride, task.v_head_dim(), task.group_size, partial.values.data());
  }

  // Exact attention over the same listed rows in all of a query's heads, whose tasks follow one another. Two threads
  // that read a head each, through the same tokens at the same time, were hardly faster than one: most likely each took
  // lines that the other's core had just fetched along with its own.
  void dense_rows(Task* heads, int64_t begin, int64_t end, int32_t thread) {
    for (int64_t at = begin; at < end; at += kDenseChunk) {
      for (int32_t head = 0; head < heads->query->kv.num_kv_heads; ++head)
        dense_chunk(heads[head], at, std::min(kDenseChunk, end - at), partial_of(heads[head], thread));
    }
  }

  // With a running maximum.
  static void dense_chunk(Task& task, int64_t begin, int64_t count, Partial& partial) {
    const DecodeQuery& query = *task.query;
    const auto dv = static_cast<size_t>(task.v_head_dim());
    thread_local std::vector<float> kept_scores;
    kept_scores.resize(static_cast<size_t>(task.group_size) * kDenseChunk);
    float* const scores = kept_scores.data();
    const int32_t* tokens = task.exact.tokens.data() + begin;
    attend_scores(query.kv.k, task.head, tokens, count, task.q.data(), task.head_dim(), task.group_size, scores,
                  kDenseChunk);
    for (int32_t g = 0; g < task.group_size; ++g) {
      float* row = scores + g * kDenseChunk;
      if (query.bias != nullptr) {
        for (int64_t i = 0; i < count; ++i) row[i] += query.bias[tokens[i]];
      }
      SoftmaxState& state = partial.state[static_cast<size_t>(g)];
      const float max = max_score(row, count);
      if (std::isnan(max) || max == HUGE_VALF || std::isnan(state.max)) {  // as the formula has it: NaN for this head
        state = {std::nanf(""), std::nanf("")};
        std::fill_n(row, count, std::nanf(""));
        continue;
      }
      if (max > state.max) {
        const float scale = state.max == -HUGE_VALF ? 0.0f : std::exp(state.max - max);
        state.sum *= scale;
        float* values = partial.values.data() + static_cast<size_t>(g) * dv;
        for (size_t d = 0; d < dv; ++d) values[d] *= scale;
        state.max = max;
      }
      if (state.max == -HUGE_VALF) {
        std::fill_n(row, count, 0.0f);
      } else {
        state.sum += exp_weights(row, count, state.max, row);
      }
    }
    attend_values(query.kv.v, task.head, tokens, count, scores, kDenseChunk, task.v_head_dim(), task.group_size,
                  partial.values.data());
  }

  void merge_task(size_t t, int32_t threads) {
    Task& task = tasks_[t];
    const DecodeQuery& query = *task.query;
    const auto dv = static_cast<size_t>(task.v_head_dim());
    std::vector<float> values(dv);
    for (int32_t g = 0; g < task.group_size; ++g) {
      SoftmaxState state;
      std::fill(values.begin(), values.end(), 0.0f);
      for (int32_t thread = 0; thread < threads; ++thread) {
        const Partial& partial = partials_[static_cast<size_t>(thread) * tasks_.size() + t];
        if (partial.used)
          merge(state, values.data(), partial.state[static_cast<size_t>(g)],
                partial.values.data() + static_cast<size_t>(g) * dv, task.v_head_dim());
      }
      if (task.sparse) state = task.state[static_cast<size_t>(g)];
      const int64_t q_head = int64_t{task.head} * task.group_size + g;
      finish(state, values.data(), task.v_head_dim(), query.out + q_head * query.out_head_stride,
             query.lse != nullptr ? query.lse + q_head : nullptr);
    }
  }

  void settle_task(size_t t, const DecodeOptions& options, int32_t threads) {
    Task& task = tasks_[t];
    std::vector<WeightSums> sums(static_cast<size_t>(task.group_size));
    for (int32_t thread = 0; thread < threads; ++thread) {  // in the order of the rows
      const Partial& partial = partials_[static_cast<size_t>(thread) * tasks_.size() + t];
      for (size_t g = 0; partial.used && g < sums.size(); ++g) sums[g].append(partial.sums[g]);
    }
    settle_weights(task, options, sums.data());
  }

  static void mark_changed(Task& task) { std::atomic_ref<bool>(task.changed).store(true, std::memory_order_relaxed); }

  // Turns the queries that a changed row or a value that is not finite has spoilt into dense ones.
  bool redo_dense() {
    std::vector<DenseReason> reasons(queries_.size(), DenseReason::kNone);
    for (const Task& task : tasks_) {
      DenseReason& reason = reasons[static_cast<size_t>(task.query_number)];
      if (task.not_finite) reason = DenseReason::kNotFinite;
      if (task.changed || task.late_changed) reason = DenseReason::kRowChanged;
    }
    bool any = false;
    for (size_t i = 0; i < queries_.size(); ++i) {
      if (reasons[i] == DenseReason::kNone) continue;
      any = true;
      queries_[i].dense = reasons[i];
      list_rows(queries_[i].filter, false, queries_[i].rows);
    }
    if (!any) return false;
    std::erase_if(tasks_, [&](const Task& task) {
      return reasons[static_cast<size_t>(task.query_number)] == DenseReason::kNone && keep(task);
    });
    for (Task& task : tasks_) task.sparse = false, task.again = true;
    return true;
  }

  void finish_queries(std::span<const DecodeQuery> queries, const DecodeOptions& options, StepStats* stats) {
    for (Task& task : tasks_) kept_.push_back(std::move(task));
    tasks_.clear();
    if (!learn_apart_) {  // queries of one index name rows for each of them
      for (Task& task : kept_) {
        if (task.sparse) forget_expected(task, options);
      }
      for (Task& task : kept_) {
        if (task.sparse) learn(task, options);
      }
    }
    for (const DecodeQuery& query : queries) {
      if (query.selection != nullptr) query.selection->heads.resize(static_cast<size_t>(query.kv.num_kv_heads));
    }
    for (const Task& task : kept_) report(task);
    if (stats != nullptr) {
      for (size_t i = 0; i < queries.size(); ++i) {
        const KvView& kv = queries[i].kv;
        stats[i] = {};
        stats[i].kv_len = queries_[i].num_visible;
        stats[i].num_kv_heads = kv.num_kv_heads;
        stats[i].dense = queries_[i].dense;
        stats[i].kv_bytes_present =
            queries_[i].num_visible * kv.num_kv_heads *
            static_cast<int64_t>(row_bytes(kv.k.dtype, kv.head_dim) + row_bytes(kv.v.dtype, kv.v_head_dim));
      }
      for (const Task& task : kept_) add_stats(task, stats[task.query_number]);
      for (size_t i = 0; i < queries.size(); ++i) stats[i].mass_std_error = std::sqrt(stats[i].mass_std_error);
    }
    tasks_.swap(kept_);
    kept_.clear();
  }

  // Tasks whose result stands while others are computed anew.
  bool keep(const Task& task) {
    kept_.push_back(task);
    return true;
  }

  RowBits no_rows_;
  bool learn_apart_ = true;  // no two queries have the same index
  std::vector<QueryState> queries_;
  std::vector<Task> tasks_, kept_;
  std::vector<Partial> partials_;
};

}  // namespace
}  // namespace cpu

std::unique_ptr<BackendRun> make_cpu_run() { return std::make_unique<cpu::CpuRun>(); }

}  // namespace tactic
