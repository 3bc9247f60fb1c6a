// Table 1, curves, union, distance and sparsity: sums over cases.
#include <algorithm>
#include <cmath>
#include <numeric>
#include <set>

#include "paper/cases.h"
#include "paper/fit.h"

namespace tactic::eval {

namespace {

constexpr double kMasses[] = {0.5, 0.6, 0.7, 0.8, 0.9, 0.95};

// Table 1 of the paper, Llama-3.1-8B: tokens of oracle, cluster order and Tactic, mass, success.
struct PaperTable1 {
  double mass, oracle, clusters, fit, achieved, success;
};
constexpr PaperTable1 kPaper[] = {{0.5, 71, 166, 185, 0.66, 0.92},
                                  {0.6, 122, 271, 294, 0.72, 0.89},
                                  {0.7, 212, 451, 490, 0.78, 0.86},
                                  {0.8, 394, 802, 890, 0.84, 0.84},
                                  {0.9, 895, 1723, 1975, 0.91, 0.86}};

double mass_of(const std::vector<double>& weights, int64_t count) {
  return std::accumulate(weights.begin(), weights.begin() + count, 0.0);
}

// The rows outside `open`.
std::vector<int32_t> certain_rows(const Step& step, Range open) {
  std::vector<int32_t> rows(static_cast<size_t>(step.kv_len() - open.size()));
  std::iota(rows.begin(), rows.begin() + open.begin, 0);
  std::iota(rows.begin() + open.begin, rows.end(), static_cast<int32_t>(open.end));
  return rows;
}

// |o - o_exact| / |o_exact| of attention over `tokens`.
double error_of(const Step& step, int32_t h, const std::vector<double>& weights, const std::vector<float>& exact,
                const std::vector<int32_t>& tokens) {
  const auto dim = static_cast<size_t>(step.rows().v_head_dim());
  std::vector<double> out(dim);
  double sum = 0, difference = 0, norm = 0;
  for (const int32_t row : tokens) {
    const double weight = weights[static_cast<size_t>(row)];
    const float* value = step.rows().v(h / step.group_size(), row);
    for (size_t d = 0; d < dim; ++d) out[d] += weight * value[d];
    sum += weight;
  }
  for (size_t d = 0; d < dim; ++d) {
    const double o = exact[static_cast<size_t>(h) * dim + d];
    difference += std::pow((sum > 0 ? out[d] / sum : 0) - o, 2);
    norm += o * o;
  }
  return norm > 0 ? std::sqrt(difference / norm) : 0;
}

struct FitMeans {
  Mean tokens, mass, success;
  void add(const FitMeans& other) { tokens.add(other.tokens), mass.add(other.mass), success.add(other.success); }
  void add_case(const CaseWeights& w, Curve curve, double target) {
    const int64_t n = fitted_tokens(w.by_cluster, w.certain, curve, target);
    const double achieved = w.certain + mass_of(w.by_cluster, n);
    tokens.add(static_cast<double>(n)), mass.add(achieved), success.add(achieved >= target - 1e-9 ? 1 : 0);
  }
};

constexpr int kBins = 20;  // of achieved mass, for "distance"

// Sums over the cases of one layer.
struct LayerSums {
  FitMeans fits[std::size(kMasses)], curves[std::size(kCurves)];
  Mean oracle[std::size(kMasses)], ordered[std::size(kMasses)];
  std::vector<std::vector<double>> head_tokens;  // [num_q_heads][queries] of the oracle at 0.9
  Mean own_rows, union_rows, own_error, union_error, loads_per_row;
  Mean distance[3][kBins];  // oracle, Quest, cluster order
};

void add_union(const Step& step, Range open, const std::vector<CaseWeights>& cases, const std::vector<float>& exact,
               LayerSums& sums) {
  const int32_t group = step.group_size();
  const std::vector<int32_t> certain = certain_rows(step, open);
  const auto error = [&](int32_t h, std::vector<int32_t> rows) {
    rows.insert(rows.end(), certain.begin(), certain.end());
    return error_of(step, h, cases[static_cast<size_t>(h)].by_row, exact, rows);
  };
  for (int32_t first = 0; first < step.num_q_heads(); first += group) {
    std::set<int32_t> all;
    double own = 0;
    std::vector<std::vector<int32_t>> sets;
    for (int32_t h = first; h < first + group; ++h) {
      const CaseWeights& w = cases[static_cast<size_t>(h)];
      sets.emplace_back(w.cluster_order.begin(),
                        w.cluster_order.begin() + fitted_tokens(w.by_cluster, w.certain, Curve::kReciprocal, 0.9));
      all.insert(sets.back().begin(), sets.back().end());
      own += static_cast<double>(sets.back().size());
    }
    const std::vector<int32_t> united(all.begin(), all.end());
    for (int32_t h = first; h < first + group; ++h) {
      sums.own_error.add(error(h, sets[static_cast<size_t>(h - first)]));
      sums.union_error.add(error(h, united));
    }
    sums.own_rows.add(own / group);
    sums.union_rows.add(static_cast<double>(united.size()));
    if (!united.empty()) sums.loads_per_row.add(own / static_cast<double>(united.size()));
  }
}

int bin_of(double mass) { return std::clamp(static_cast<int>(mass * kBins), 0, kBins - 1); }

// Rows in Quest's order of pages of 16, of one query head.
std::vector<int32_t> quest_order(const Step& step, Range open, int32_t h) {
  std::vector<float> bounds;
  for (int64_t begin = open.begin; begin < open.end; begin += 16) {
    float bound = 0;
    for (int32_t d = 0; d < step.rows().head_dim(); ++d) {
      float best = -HUGE_VALF;
      for (int64_t row = begin; row < std::min(open.end, begin + 16); ++row)
        best = std::max(best, step.q(h)[d] * step.rows().k(h / step.group_size(), row)[d]);
      bound += best;
    }
    bounds.push_back(bound);
  }
  std::vector<int32_t> order;
  for (const int32_t page : largest(bounds, std::ssize(bounds))) {
    for (int64_t row = open.begin + page * 16; row < std::min(open.end, open.begin + page * 16 + 16); ++row)
      order.push_back(static_cast<int32_t>(row));
  }
  return order;
}

// Each head reads for itself here, so that mass and distance are of one set.
void add_distance(const Step& step, Range open, const std::vector<CaseWeights>& cases, const std::vector<float>& exact,
                  LayerSums& sums) {
  const std::vector<int32_t> certain = certain_rows(step, open);
  for (int32_t h = 0; h < step.num_q_heads(); ++h) {
    const CaseWeights& w = cases[static_cast<size_t>(h)];
    const std::vector<int32_t> quest = quest_order(step, open, h);
    std::vector<int32_t> rank = quest;
    std::sort(rank.begin(), rank.end(), [&](int32_t a, int32_t b) {
      return w.by_row[static_cast<size_t>(a)] > w.by_row[static_cast<size_t>(b)];
    });
    const std::vector<int32_t>* orders[] = {&rank, &quest, &w.cluster_order};
    for (const int64_t budget : {0, 32, 128, 512, 2048}) {
      for (size_t i = 0; i < std::size(orders); ++i) {
        std::vector<int32_t> read = certain;
        read.insert(read.end(), orders[i]->begin(), orders[i]->begin() + std::min(budget, std::ssize(*orders[i])));
        double mass = 0;
        for (const int32_t row : read) mass += w.by_row[static_cast<size_t>(row)];
        sums.distance[i][bin_of(mass)].add(error_of(step, h, w.by_row, exact, read));
      }
    }
  }
}

LayerSums measure(const TraceLayer& traced, const PaperOptions& options, const std::vector<int64_t>& queries) {
  LayerSums sums;
  const int64_t prompt = traced.trace->prompt_len;
  Rows rows;
  rows.extend(traced.kv);
  const Layer layer = layer_of(traced, rows, options.seed);
  std::vector<Clusters> clusters;
  clusters.reserve(static_cast<size_t>(traced.info->num_kv_heads));
  for (int32_t head = 0; head < traced.info->num_kv_heads; ++head)
    clusters.push_back(cluster_keys(layer, head, case_rows(prompt), options.cluster_tokens, options.iterations, 65536));
  sums.head_tokens.resize(static_cast<size_t>(traced.info->num_q_heads));
  std::vector<float> exact(static_cast<size_t>(traced.info->num_q_heads) *
                           static_cast<size_t>(traced.info->v_head_dim));
  for (const int64_t query : queries) {
    const Step step(rows, traced.query(query), traced.info->head_dim, traced.info->num_q_heads, traced.info->sm_scale,
                    traced.visible(query).end);
    attend_dense(step, exact.data());
    std::vector<CaseWeights> cases;
    for (int32_t h = 0; h < step.num_q_heads(); ++h) {
      const CaseWeights& w =
          cases.emplace_back(case_weights(step, h, clusters[static_cast<size_t>(h / step.group_size())]));
      for (size_t m = 0; m < std::size(kMasses); ++m) {
        sums.oracle[m].add(static_cast<double>(tokens_for(w.by_rank, w.certain, kMasses[m])));
        sums.ordered[m].add(static_cast<double>(tokens_for(w.by_cluster, w.certain, kMasses[m])));
        sums.fits[m].add_case(w, Curve::kReciprocal, kMasses[m]);
      }
      for (size_t c = 0; c < std::size(kCurves); ++c) sums.curves[c].add_case(w, kCurves[c], 0.9);
      sums.head_tokens[static_cast<size_t>(h)].push_back(static_cast<double>(tokens_for(w.by_rank, w.certain, 0.9)));
    }
    add_union(step, case_rows(prompt), cases, exact, sums);
    add_distance(step, case_rows(prompt), cases, exact, sums);
  }
  return sums;
}

template <class Field>
Mean total(const std::vector<LayerSums>& layers, Field field) {
  Mean sum;
  for (const LayerSums& layer : layers) sum.add(field(layer));
  return sum;
}

void write_sparsity(const Trace& trace, const std::vector<LayerSums>& layers, const std::vector<int64_t>& queries,
                    std::vector<Json>& out) {
  const std::vector<int32_t> traced = full_layers(trace);
  for (size_t l = 0; l < layers.size(); ++l) {
    for (size_t h = 0; h < layers[l].head_tokens.size(); ++h) {
      const std::vector<double>& tokens = layers[l].head_tokens[h];
      out.push_back(
          {{"table", "sparsity_head"},
           {"layer", trace.info().layers[static_cast<size_t>(traced[l])].layer},
           {"head", h},
           {"tokens", std::accumulate(tokens.begin(), tokens.end(), 0.0) / static_cast<double>(tokens.size())},
           {"median", nearest_rank(tokens, 0.5)}});
    }
  }
  for (size_t q = 0; q < queries.size(); ++q) {
    Mean tokens;
    for (const LayerSums& layer : layers) {
      for (const std::vector<double>& head : layer.head_tokens) tokens.add(head[q]);
    }
    out.push_back({{"table", "sparsity_query"},
                   {"position", trace.info().positions[static_cast<size_t>(queries[q])]},
                   {"tokens", tokens.get()}});
  }
}

}  // namespace

std::vector<Json> paper_cases(const Trace& trace, const PaperOptions& options) {
  const std::vector<int64_t> queries = decode_queries(trace.info(), options);
  const std::vector<int32_t> numbers = full_layers(trace);
  std::vector<TraceLayer> traced;
  traced.reserve(numbers.size());
  for (const int32_t number : numbers) traced.push_back(trace.layer(number));
  std::vector<LayerSums> layers(traced.size());
#pragma omp parallel for schedule(dynamic)
  for (size_t l = 0; l < traced.size(); ++l) layers[l] = measure(traced[l], options, queries);
  std::vector<Json> out;
  for (size_t m = 0; m < std::size(kMasses); ++m) {
    Json row = {{"table", "table1"},
                {"target_mass", kMasses[m]},
                {"rows", trace.info().prompt_len},
                {"oracle", total(layers, [&](const LayerSums& s) { return s.oracle[m]; }).get()},
                {"clusters", total(layers, [&](const LayerSums& s) { return s.ordered[m]; }).get()},
                {"fit", total(layers, [&](const LayerSums& s) { return s.fits[m].tokens; }).get()},
                {"achieved_mass", total(layers, [&](const LayerSums& s) { return s.fits[m].mass; }).get()},
                {"success", total(layers, [&](const LayerSums& s) { return s.fits[m].success; }).get()}};
    for (const PaperTable1& p : kPaper) {
      if (p.mass != kMasses[m]) continue;
      row["paper"] = {{"model", "Llama-3.1-8B"},     {"oracle", p.oracle},  {"clusters", p.clusters}, {"fit", p.fit},
                      {"achieved_mass", p.achieved}, {"success", p.success}};
    }
    out.push_back(row);
  }
  for (size_t c = 0; c < std::size(kCurves); ++c) {
    out.push_back({{"table", "curves"},
                   {"curve", curve_name(kCurves[c])},
                   {"target_mass", 0.9},
                   {"tokens", total(layers, [&](const LayerSums& s) { return s.curves[c].tokens; }).get()},
                   {"achieved_mass", total(layers, [&](const LayerSums& s) { return s.curves[c].mass; }).get()},
                   {"success", total(layers, [&](const LayerSums& s) { return s.curves[c].success; }).get()}});
  }
  out.push_back({{"table", "union"},
                 {"target_mass", 0.9},
                 {"rows_own", total(layers, [](const LayerSums& s) { return s.own_rows; }).get()},
                 {"rows_union", total(layers, [](const LayerSums& s) { return s.union_rows; }).get()},
                 {"error_own", total(layers, [](const LayerSums& s) { return s.own_error; }).get()},
                 {"error_union", total(layers, [](const LayerSums& s) { return s.union_error; }).get()},
                 {"loads_per_row", total(layers, [](const LayerSums& s) { return s.loads_per_row; }).get()},
                 {"paper", {{"model", "Llama-3.1-8B"}, {"loads_per_row_at_most", 1.65}}}});
  constexpr const char* kOrders[] = {"oracle", "quest", "clusters"};
  for (size_t i = 0; i < std::size(kOrders); ++i) {
    for (int bin = 0; bin < kBins; ++bin) {
      const Mean mean = total(layers, [&](const LayerSums& s) { return s.distance[i][bin]; });
      if (mean.count > 0)
        out.push_back({{"table", "distance"},
                       {"order", kOrders[i]},
                       {"mass", (bin + 0.5) / kBins},
                       {"error", mean.get()},
                       {"cases", mean.count}});
    }
  }
  write_sparsity(trace, layers, queries, out);
  return out;
}

}  // namespace tactic::eval
