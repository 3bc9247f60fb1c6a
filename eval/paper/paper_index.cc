// Norms of values, and what the clustering's size and iterations do; all parts together.
#include <cmath>

#include "paper/cases.h"

namespace tactic::eval {

std::vector<Json> paper_value_norms(const Trace& trace) {
  constexpr double kQuantiles[] = {0, 0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99, 1};
  std::vector<Json> out(static_cast<size_t>(trace.num_layers()));
  std::vector<TraceLayer> traced;
  traced.reserve(out.size());
  for (int32_t l = 0; l < trace.num_layers(); ++l) traced.push_back(trace.layer(l));
#pragma omp parallel for schedule(dynamic)
  for (size_t l = 0; l < out.size(); ++l) {
    Rows rows;
    rows.extend(traced[l].kv);
    std::vector<double> norms;
    for (int32_t head = 0; head < rows.num_kv_heads(); ++head) {
      std::vector<double> own;
      for (int64_t row = 0; row < trace.info().prompt_len; ++row)
        own.push_back(std::sqrt(dot(rows.v(head, row), rows.v(head, row), rows.v_head_dim())));
      const double median = nearest_rank(own, 0.5);
      for (const double norm : own) norms.push_back(norm / median);
    }
    out[l] = {{"table", "value_norms"}, {"layer", traced[l].info->layer}};
    for (const double q : kQuantiles) out[l]["quantiles"].push_back({q, nearest_rank(norms, q)});
  }
  return out;
}

std::vector<Json> paper_clusters(const Trace& trace, const PaperOptions& options) {
  const std::vector<int64_t> queries = decode_queries(trace.info(), options);
  const std::vector<int32_t> all = full_layers(trace);
  std::vector<TraceLayer> traced;
  const auto take = std::min<size_t>(all.size(), static_cast<size_t>(options.ablation_layers));
  for (size_t i = 0; i < take; ++i) traced.push_back(trace.layer(all[(2 * i + 1) * all.size() / (2 * take)]));
  const int64_t prompt = trace.info().prompt_len;
  struct Setting {
    int32_t cluster_tokens, iterations;
  };
  std::vector<Setting> settings;
  for (const int32_t size : {8, 16, 32, 64, 128, 256}) settings.push_back({size, options.iterations});
  for (const int32_t iterations : {1, 2, 4, 20}) settings.push_back({options.cluster_tokens, iterations});
  std::vector<std::vector<Mean>> tokens(traced.size(), std::vector<Mean>(settings.size())), shares = tokens;
#pragma omp parallel for schedule(dynamic)
  for (size_t l = 0; l < traced.size(); ++l) {
    Rows rows;
    rows.extend(traced[l].kv);
    const Layer layer = layer_of(traced[l], rows, options.seed);
    std::vector<Step> steps;
    steps.reserve(queries.size());
    for (const int64_t query : queries)
      steps.emplace_back(rows, traced[l].query(query), rows.head_dim(), layer.num_q_heads, layer.sm_scale,
                         traced[l].visible(query).end);
    const auto squares = [&](const Clusters& clusters, int32_t head) {
      double sum = 0;
      for (int64_t c = 0; c < clusters.size(); ++c) {
        for (const int32_t row : clusters.members[static_cast<size_t>(c)]) {
          for (int32_t d = 0; d < rows.head_dim(); ++d)
            sum += std::pow(rows.k(head, row)[d] - clusters.centroids[static_cast<size_t>(c * rows.head_dim() + d)], 2);
        }
      }
      return sum;
    };
    for (int32_t head = 0; head < rows.num_kv_heads(); ++head) {
      const double whole = squares(cluster_positions(layer, head, case_rows(prompt), prompt), head);
      for (size_t s = 0; s < settings.size(); ++s) {
        const Clusters clusters =
            cluster_keys(layer, head, case_rows(prompt), settings[s].cluster_tokens, settings[s].iterations, 65536);
        shares[l][s].add(squares(clusters, head) / whole);
        for (const Step& step : steps) {
          for (int32_t g = 0; g < step.group_size(); ++g) {
            const CaseWeights w = case_weights(step, head * step.group_size() + g, clusters);
            tokens[l][s].add(static_cast<double>(tokens_for(w.by_cluster, w.certain, 0.9)));
          }
        }
      }
    }
  }
  std::vector<Json> out;
  for (size_t s = 0; s < settings.size(); ++s) {
    Mean token, share;
    for (size_t l = 0; l < traced.size(); ++l) token.add(tokens[l][s]), share.add(shares[l][s]);
    out.push_back({{"table", "clusters"},
                   {"cluster_tokens", settings[s].cluster_tokens},
                   {"iterations", settings[s].iterations},
                   {"layers", traced.size()},
                   {"wcss_share", share.get()},
                   {"tokens", token.get()},
                   {"target_mass", 0.9}});
  }
  return out;
}

std::vector<Json> paper_rows(const Trace& trace, const PaperOptions& options) {
  std::vector<Json> out;
  for (const std::vector<Json>& part :
       {paper_cases(trace, options), paper_value_norms(trace), paper_clusters(trace, options)})
    out.insert(out.end(), part.begin(), part.end());
  for (Json& row : out) {
    row["model"] = trace.info().model;
    row["text"] = trace.info().text;
  }
  return out;
}

}  // namespace tactic::eval
