#include "trace_error.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <map>

namespace tactic::eval {

namespace {

// Steps of one layer for the settings that share an index.
class LayerRun {
 public:
  LayerRun(const TraceLayer& layer, int32_t number, const IndexOptions& options)
      : layer_(layer),
        number_(number),
        index_(options, {layer.info->num_kv_heads, layer.info->head_dim, layer.info->v_head_dim}) {
    index_.set_num_threads(1);
  }

  // Rows up to the query's own are in the cache.
  void advance(int64_t rows) {
    if (rows <= rows_) return;
    index_.write(rows_, rows - rows_);
    rows_ = rows;
    KvView kv = layer_.kv;
    kv.kv_len = rows;
    index_.maintain(kv);
  }

  StepStats step(Attention& attention, int64_t query, float* out, MassEstimate* masses, Selection* selection) {
    const RowRange rows = layer_.visible(query);
    DecodeQuery q;
    q.q = layer_.query(query);
    q.q_head_stride = layer_.info->head_dim;
    q.num_q_heads = layer_.info->num_q_heads;
    q.sm_scale = layer_.info->sm_scale;
    q.kv = layer_.kv;
    q.kv.kv_len = rows.end;
    q.index = &index_;
    if (rows.begin > 0) {
      visible_.assign(static_cast<size_t>((rows.end + 63) / 64), 0);
      for (int64_t row = rows.begin; row < rows.end; ++row)
        visible_[static_cast<size_t>(row >> 6)] |= uint64_t{1} << (row & 63);
      q.visible = visible_.data();
    }
    q.layer = number_;
    q.position = layer_.trace->positions[static_cast<size_t>(query)] * 8 + (8 - number_ % 8) % 8;  // a step that learns
    q.out = out;
    q.out_head_stride = layer_.info->v_head_dim;
    q.masses = masses;
    q.selection = selection;
    StepStats stats;
    attention.run({&q, 1}, &stats);
    return stats;
  }

 private:
  const TraceLayer& layer_;
  int32_t number_;
  KvIndex index_;
  int64_t rows_ = 0;
  std::vector<uint64_t> visible_;
};

void add_case(const TraceLayer& layer, int32_t number, const DenseQuery& answer, const StepStats& stats,
              const std::vector<float>& out, const std::vector<MassEstimate>& masses, const Selection& selection,
              SettingCases& cases) {
  const TraceLayerInfo& info = *layer.info;
  const double heads = info.num_kv_heads;
  std::vector<char> read;
  const auto row_size =
      static_cast<double>(row_bytes(info.k_dtype, info.head_dim) + row_bytes(info.v_dtype, info.v_head_dim));
  cases.steps.push_back(
      {static_cast<double>(stats.kv_bytes) / row_size / heads, static_cast<double>(stats.tokens_certain) / heads,
       static_cast<double>(stats.tokens_sampled) / heads, stats.read_fraction(), stats.dense != DenseReason::kNone});
  for (int32_t h = 0; h < info.num_q_heads; ++h) {
    HeadCase one;
    one.layer = number;
    one.head = h;
    one.position = layer.trace->positions[static_cast<size_t>(answer.query)];
    double difference = 0, size = 0;
    for (int32_t d = 0; d < info.v_head_dim; ++d) {
      const double exact = answer.out[static_cast<size_t>(h * info.v_head_dim + d)],
                   got = out[static_cast<size_t>(h * info.v_head_dim + d)];
      difference += (got - exact) * (got - exact);
      size += exact * exact;
    }
    one.error = size > 0 ? std::sqrt(difference / size) : difference > 0 ? HUGE_VAL : 0;
    const HeadSelection& rows = selection.heads[static_cast<size_t>(h / layer.group_size())];
    const auto weights = answer.head_weights(h);
    if (h % layer.group_size() == 0) {
      read.assign(weights.size(), 0);
      for (const int32_t row : rows.tokens) read[static_cast<size_t>(row - answer.rows.begin)] = 1;
    }
    for (size_t i = 0; i < weights.size(); ++i) {
      if (read[i] == 0 && weights[i] > one.missed_weight)
        one.missed_weight = weights[i], one.missed_row = answer.rows.begin + static_cast<int64_t>(i);
    }
    for (int64_t i = 0; i < rows.num_certain; ++i)
      one.achieved_mass += weights[static_cast<size_t>(rows.tokens[static_cast<size_t>(i)] - answer.rows.begin)];
    one.estimated_mass = masses[static_cast<size_t>(h)].mass;
    one.mass_std_error = masses[static_cast<size_t>(h)].std_error;
    one.low = masses[static_cast<size_t>(h)].low;
    one.high = masses[static_cast<size_t>(h)].high;
    cases.heads.push_back(one);
  }
}

}  // namespace

void SettingCases::append(const SettingCases& other) {
  heads.insert(heads.end(), other.heads.begin(), other.heads.end());
  steps.insert(steps.end(), other.steps.begin(), other.steps.end());
}

std::vector<SettingCases> measure_layer(const TraceLayer& layer, int32_t layer_number,
                                        std::span<const DenseQuery> answers, std::span<const Setting> settings) {
  const TraceLayerInfo& info = *layer.info;
  const TraceInfo& trace = *layer.trace;
  std::vector<SettingCases> results(settings.size());
  std::vector<char> done(settings.size());
  std::vector<float> out(static_cast<size_t>(info.num_q_heads) * static_cast<size_t>(info.v_head_dim));
  std::vector<MassEstimate> masses(static_cast<size_t>(info.num_q_heads));
  Selection selection;
  for (size_t first = 0; first < settings.size(); ++first) {
    if (done[first]) continue;
    std::vector<size_t> together;
    for (size_t s = first; s < settings.size(); ++s) {
      // Sampling learns, and what it learns changes the index.
      const bool alone =
          settings[first].decode.select == Select::kSample || settings[s].decode.select == Select::kSample;
      if (s == first || (!alone && !done[s] && settings[s].index == settings[first].index))
        together.push_back(s), done[s] = 1;
    }
    LayerRun run(layer, layer_number, settings[first].index);
    std::vector<Attention> attentions;
    for (const size_t s : together) attentions.emplace_back(settings[s].decode, Backend::kCpu, 1);
    if (settings[first].index.clustering == Clustering::kWhole) {
      run.advance(trace.prompt_len);  // clustered at the first decode step
    } else {
      for (int64_t query = 0;
           query < trace.num_queries() && trace.kinds[static_cast<size_t>(query)] == QueryKind::kPrompt; ++query) {
        run.advance(layer.visible(query).end);
        if (settings[first].decode.select == Select::kSample)
          run.step(attentions[0], query, out.data(), nullptr, nullptr);
      }
    }
    for (const DenseQuery& answer : answers) {
      run.advance(answer.rows.end);
      for (size_t i = 0; i < together.size(); ++i) {
        const StepStats stats = run.step(attentions[i], answer.query, out.data(), masses.data(), &selection);
        add_case(layer, layer_number, answer, stats, out, masses, selection, results[together[i]]);
      }
    }
  }
  return results;
}

ErrorSummary summarize(const SettingCases& cases, double target_mass) {
  ErrorSummary s;
  s.cases = static_cast<int64_t>(cases.heads.size());
  if (s.cases == 0) return s;
  const auto n = static_cast<double>(s.cases), steps = static_cast<double>(cases.steps.size());
  for (const StepCase& step : cases.steps) {
    s.tokens += step.tokens / steps;
    s.tokens_certain += step.tokens_certain / steps;
    s.read_fraction += step.read_fraction / steps;
    s.dense_share += step.dense / steps;
  }
  std::vector<double> errors;
  std::map<std::pair<int32_t, int32_t>, std::pair<double, int64_t>> by_head;
  double covered = 0, squared_error = 0, squared_believed = 0;
  s.max = -1;
  for (const HeadCase& c : cases.heads) {
    errors.push_back(c.error);
    s.mean += c.error / n;
    s.achieved_mass += c.achieved_mass / n;
    s.success += (c.achieved_mass >= target_mass) / n;
    if (c.error > s.max) s.max = c.error, s.max_layer = c.layer, s.max_head = c.head, s.max_position = c.position;
    auto& [sum, count] = by_head[{c.layer, c.head}];
    sum += c.error;
    ++count;
    if (c.mass_std_error <= 0) continue;
    const double off = c.estimated_mass - c.achieved_mass;
    ++s.sampled_cases;
    covered += c.achieved_mass >= c.low - 1e-6 && c.achieved_mass <= c.high + 1e-6;  // weights are of f32
    s.mass_bias += off;
    squared_error += off * off;
    squared_believed += c.mass_std_error * c.mass_std_error;
  }
  if (s.sampled_cases > 0) {
    s.coverage = covered / static_cast<double>(s.sampled_cases);
    s.mass_bias /= static_cast<double>(s.sampled_cases);
    s.std_error_ratio = std::sqrt(squared_error / squared_believed);
  }
  for (const auto& [where, sum] : by_head) {
    const double mean = sum.first / static_cast<double>(sum.second);
    if (mean > s.worst_mean) s.worst_mean = mean, s.worst_layer = where.first, s.worst_head = where.second;
  }
  std::sort(errors.begin(), errors.end());
  const auto quantile = [&](double q) {  // linear between ranks
    const double rank = q * (n - 1);
    const auto below = static_cast<size_t>(rank);
    const size_t above = std::min(below + 1, errors.size() - 1);
    return errors[below] + (rank - static_cast<double>(below)) * (errors[above] - errors[below]);
  };
  s.median = quantile(0.5);
  s.p99 = quantile(0.99);
  return s;
}

double tokens_at_error(std::vector<TokensError> points, double error) {
  std::sort(points.begin(), points.end(), [](const TokensError& a, const TokensError& b) { return a.error < b.error; });
  for (size_t i = 0; i + 1 < points.size(); ++i) {
    const TokensError &a = points[i], &b = points[i + 1];
    if (!(a.error > 0 && a.tokens > 0 && b.tokens > 0) || error < a.error || error > b.error) continue;
    if (b.error == a.error) return a.tokens;
    const double share = std::log(error / a.error) / std::log(b.error / a.error);
    return a.tokens * std::pow(b.tokens / a.tokens, share);
  }
  return std::numeric_limits<double>::quiet_NaN();
}

}  // namespace tactic::eval
