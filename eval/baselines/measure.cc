#include "baselines/measure.h"

#include <algorithm>
#include <cmath>

#include "baselines/common.h"

namespace tactic::eval {

namespace {

std::vector<float> prompt_queries(const TraceLayer& layer) {
  const auto size = static_cast<int64_t>(layer.info->num_q_heads) * layer.info->head_dim;
  std::vector<float> all;
  for (int64_t i = 0; i < layer.trace->num_queries(); ++i) {
    const bool last = layer.trace->positions[static_cast<size_t>(i)] < layer.trace->prompt_len;
    if (layer.trace->kinds[static_cast<size_t>(i)] == QueryKind::kPrompt && last)
      all.insert(all.end(), layer.query(i), layer.query(i) + size);
  }
  return all;
}

void add_case(const TraceLayer& layer, int32_t number, const DenseQuery& answer, const Step& step, const Choice& choice,
              const std::vector<float>& out, SettingCases& cases) {
  const double heads = layer.info->num_kv_heads,
               row_bytes = static_cast<double>(step.rows().k_bytes() + step.rows().v_bytes());
  const auto sampled = static_cast<double>(choice.sampled()), tokens = static_cast<double>(choice.tokens());
  cases.steps.push_back({.tokens = tokens / heads,
                         .tokens_certain = (tokens - sampled) / heads,
                         .tokens_sampled = sampled / heads,
                         .read_fraction = static_cast<double>(choice.bytes(step.rows())) /
                                          (row_bytes * heads * static_cast<double>(step.kv_len())),
                         .dense = false});
  const auto dim = static_cast<size_t>(layer.info->v_head_dim);
  for (int32_t h = 0; h < layer.info->num_q_heads; ++h) {
    HeadCase one;
    one.layer = number;
    one.head = h;
    one.position = layer.trace->positions[static_cast<size_t>(answer.query)];
    double difference = 0, norm = 0;
    for (size_t d = static_cast<size_t>(h) * dim; d < static_cast<size_t>(h + 1) * dim; ++d) {
      difference += std::pow(static_cast<double>(out[d]) - answer.out[d], 2);
      norm += std::pow(static_cast<double>(answer.out[d]), 2);
    }
    one.error = norm > 0 ? std::sqrt(difference / norm) : difference > 0 ? HUGE_VAL : 0;
    const HeadSelection& rows = choice.selection.heads[static_cast<size_t>(h / layer.group_size())];
    const std::vector<float>& log_weights =
        choice.head_log_weights.empty() ? rows.log_weights : choice.head_log_weights[static_cast<size_t>(h)];
    for (size_t i = 0; i < rows.tokens.size(); ++i) {
      if (log_weights[i] == 0) one.achieved_mass += answer.head_weights(h)[static_cast<size_t>(rows.tokens[i])];
    }
    one.estimated_mass = one.achieved_mass;
    cases.heads.push_back(one);
  }
}

}  // namespace

std::vector<SettingCases> measure_baselines(const TraceLayer& layer, int32_t layer_number,
                                            std::span<const DenseQuery> answers, std::span<const BaselineSpec> specs,
                                            uint64_t seed) {
  std::vector<SettingCases> results(specs.size());
  const TraceLayerInfo& info = *layer.info;
  if (specs.empty() || info.window > 0) return results;
  Rows rows;
  rows.extend(layer.kv);
  const std::vector<float> prompt_q = prompt_queries(layer);
  ClusterCache clusterings;
  const std::vector<TraceLayerInfo>& layers = layer.trace->layers;
  const auto answered = [](const TraceLayerInfo& l) { return l.window == 0; };
  const Layer setup = {
      .rows = &rows,
      .kv = layer.kv,
      .prompt_len = layer.trace->prompt_len,
      .num_q_heads = info.num_q_heads,
      .sm_scale = info.sm_scale,
      .prompt_q = prompt_q,
      .layer = static_cast<int32_t>(std::count_if(layers.begin(), layers.begin() + layer_number, answered)),
      .num_layers = static_cast<int32_t>(std::count_if(layers.begin(), layers.end(), answered)),
      .seed = seed,
      .clusterings = &clusterings};
  std::vector<std::unique_ptr<Baseline>> baselines;
  for (const BaselineSpec& spec : specs) baselines.push_back(make_baseline(spec, setup));
  std::vector<float> out(static_cast<size_t>(info.num_q_heads) * static_cast<size_t>(info.v_head_dim));
  for (const DenseQuery& answer : answers) {
    const Step step(rows, layer.query(answer.query), info.head_dim, info.num_q_heads, info.sm_scale, answer.rows.end);
    for (size_t i = 0; i < baselines.size(); ++i) {
      Choice choice;
      baselines[i]->select(step, choice);
      attend(step, choice, out.data());
      add_case(layer, layer_number, answer, step, choice, out, results[i]);
    }
  }
  return results;
}

}  // namespace tactic::eval
