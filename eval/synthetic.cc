#include "synthetic.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <numbers>
#include <span>
#include <vector>

#include "core/random.h"
#include "tactic/error.h"
#include "trace.h"

namespace tactic::eval {

namespace {

constexpr int32_t kTopics = 64, kTokens = 4000;
constexpr double kTopicLasts = 48;  // positions, on average
constexpr double kRopeBase = 1e6;

class Normal {
 public:
  explicit Normal(uint64_t seed) : state_(seed) {}
  double uniform() { return tactic::uniform(state_++); }
  float operator()() {  // Box-Muller
    const double u = 1 - uniform(), v = uniform();
    return static_cast<float>(std::sqrt(-2 * std::log(u)) * std::cos(2 * std::numbers::pi * v));
  }

 private:
  uint64_t state_;
};

// Nearest f16, ties to even; the values here are far from its limits.
uint16_t half(float x) {
  const auto bits = std::bit_cast<uint32_t>(x);
  const uint32_t sign = bits >> 16 & 0x8000, size = bits & 0x7FFFFFFF;
  if (size < 0x38800000) {  // below the normal range: a multiple of 2^-24
    return static_cast<uint16_t>(sign | static_cast<uint32_t>(std::lrint(std::ldexp(std::bit_cast<float>(size), 24))));
  }
  return static_cast<uint16_t>(sign | ((size - 0x38000000 + 0xFFF + (size >> 13 & 1)) >> 13));
}

using Vectors = std::vector<std::vector<float>>;

Vectors vectors(int32_t count, const std::vector<float>& spectrum, Normal& random) {
  Vectors out(static_cast<size_t>(count), std::vector<float>(spectrum.size()));
  for (auto& one : out) {
    for (size_t d = 0; d < one.size(); ++d) one[d] = spectrum[d] * random();
  }
  return out;
}

void norm_and_rotate(std::vector<float>& x, double length, int64_t position, const std::vector<double>& frequencies) {
  double sum = 0;
  for (const float v : x) sum += double{v} * v;
  const double scale = length / std::sqrt(sum);
  const size_t half_dim = x.size() / 2;
  for (size_t d = 0; d < half_dim; ++d) {
    const double angle = static_cast<double>(position) * frequencies[d];
    const double a = x[d] * scale, b = x[d + half_dim] * scale;
    x[d] = static_cast<float>(a * std::cos(angle) - b * std::sin(angle));
    x[d + half_dim] = static_cast<float>(a * std::sin(angle) + b * std::cos(angle));
  }
}

void mix(std::vector<float>& x, double share, const std::vector<float>& y) {
  for (size_t d = 0; d < x.size(); ++d) x[d] += static_cast<float>(share) * y[d];
}

struct Text {
  std::vector<int32_t> tokens, topics;  // [kv_len]
};

Text make_text(const SyntheticOptions& o) {
  Normal random(hash64(o.seed));
  Text text;
  int32_t topic = 0;
  for (int64_t p = 0; p < o.kv_len; ++p) {
    if (random.uniform() < 1 / kTopicLasts) topic = static_cast<int32_t>(random.uniform() * kTopics);
    text.topics.push_back(topic);
    text.tokens.push_back(static_cast<int32_t>(std::pow(kTokens, random.uniform())) - 1);  // Zipf
  }
  return text;
}

}  // namespace

SyntheticOptions synthetic_preset(const std::string& name) {
  SyntheticOptions options;
  options.name = name;
  if (name == "normed-128") return options;
  if (name == "flat-128") {
    options.flatness = 2;
    options.seed = 2;
    return options;
  }
  if (name == "normed-256") {
    options.num_q_heads = 4;
    options.num_kv_heads = 1;
    options.head_dim = 256;
    options.seed = 3;
    return options;
  }
  throw Error("synthetic trace '" + name + "' is none of normed-128, flat-128, normed-256");
}

void write_synthetic(const std::string& path, const SyntheticOptions& o) {
  TraceInfo info;
  info.model = "synthetic " + o.name;
  info.text = o.name;
  info.kv_len = o.kv_len;
  info.prompt_len = o.prompt_len;
  for (int64_t p = std::max<int64_t>(0, o.prompt_len - o.prompt_queries); p < o.prompt_len; ++p) {
    info.positions.push_back(p);
    info.kinds.push_back(QueryKind::kPrompt);
  }
  for (int64_t i = 0; i < o.queries; ++i) {
    info.positions.push_back(o.prompt_len + (2 * i + 1) * (o.kv_len - o.prompt_len) / (2 * o.queries));
    info.kinds.push_back(QueryKind::kDecode);
  }
  const auto dim = static_cast<size_t>(o.head_dim);
  const auto scale = static_cast<float>(1 / std::sqrt(static_cast<double>(o.head_dim)));
  for (int32_t l = 0; l < o.num_layers; ++l) {
    info.layers.push_back(
        {l, o.num_q_heads, o.num_kv_heads, o.head_dim, o.head_dim, DType::kF16, DType::kF16, scale, 0});
  }
  const Text text = make_text(o);
  std::vector<float> spectrum(dim);
  for (size_t d = 0; d < dim; ++d)
    spectrum[d] = static_cast<float>(std::pow(static_cast<double>(d % (dim / 2)) + 2, -0.9));  // a pair turns together
  std::vector<double> frequencies(dim / 2);
  for (size_t d = 0; d < frequencies.size(); ++d)
    frequencies[d] = std::pow(kRopeBase, -static_cast<double>(d) / static_cast<double>(frequencies.size()));
  TraceWriter writer(path, info);
  for (int32_t l = 0; l < o.num_layers; ++l) {
    std::vector<std::byte> k, v;
    std::vector<float> q(static_cast<size_t>(info.num_queries() * o.num_q_heads) * dim);
    const auto append = [](std::vector<std::byte>& to, const std::vector<float>& x) {
      for (const float value : x) {
        const uint16_t bits = half(value);
        to.push_back(static_cast<std::byte>(bits & 255));
        to.push_back(static_cast<std::byte>(bits >> 8));
      }
    };
    for (int32_t h = 0; h < o.num_kv_heads; ++h) {
      Normal random(hash64(o.seed * 1000003 + static_cast<uint64_t>(l * 64 + h)));
      const Vectors shared = vectors(2, spectrum, random), topics = vectors(kTopics, spectrum, random),
                    tokens = vectors(kTokens, spectrum, random);
      const Vectors shared_value = vectors(1, std::vector<float>(dim, 0.7f), random),
                    topic_values = vectors(kTopics, std::vector<float>(dim, 0.7f), random);
      const Vectors token_values = vectors(kTokens, std::vector<float>(dim, 0.7f), random);
      const double key_length = std::sqrt(static_cast<double>(dim));
      for (int64_t p = 0; p < o.kv_len; ++p) {
        const auto at = static_cast<size_t>(p);
        std::vector<float> key(dim), value(dim);
        for (size_t d = 0; d < dim; ++d)
          key[d] = 0.15f * random();  // mostly across the directions that queries look along
        for (size_t d = 0; d < dim; ++d) value[d] = (p == 0 ? 0.1f : 0.7f) * random();
        mix(key, 0.8, shared[0]);
        mix(key, p == 0 ? 3.0 : 0.0, shared[1]);  // the sink: what all queries share
        mix(key, 0.8, topics[static_cast<size_t>(text.topics[at])]);
        mix(key, 1.0, tokens[static_cast<size_t>(text.tokens[at])]);
        if (p > 0) {
          mix(value, 0.7, shared_value[0]);  // so that flat heads do not average to nothing
          mix(value, 0.7, topic_values[static_cast<size_t>(text.topics[at])]);
          mix(value, 1.0, token_values[static_cast<size_t>(text.tokens[at])]);
        }
        norm_and_rotate(key, key_length, p, frequencies);
        append(k, key);
        append(v, value);
      }
      const int32_t group = o.num_q_heads / o.num_kv_heads;
      for (int32_t g = 0; g < group; ++g) {
        const double spread = (0.7 * std::pow(4 / 0.7, random.uniform())) / o.flatness, topic = random.uniform(),
                     token = random.uniform() * random.uniform(), sink = random.uniform();
        for (int64_t i = 0; i < info.num_queries(); ++i) {
          const int64_t p = info.positions[static_cast<size_t>(i)];
          std::vector<float> one(dim);
          for (size_t d = 0; d < dim; ++d) one[d] = 0.7f * spectrum[d] * random();
          mix(one, sink, shared[1]);
          mix(one, topic, topics[static_cast<size_t>(text.topics[static_cast<size_t>(p)])]);
          mix(one, token, tokens[static_cast<size_t>(text.tokens[static_cast<size_t>(p)])]);
          norm_and_rotate(one, spread * key_length, p,
                          frequencies);  // with keys of this length scores spread by about `spread`
          std::copy(
              one.begin(), one.end(),
              q.begin() + static_cast<std::ptrdiff_t>((static_cast<size_t>(i * o.num_q_heads + h * group + g)) * dim));
        }
      }
    }
    writer.write_layer(l, k, v, q);
  }
  writer.finish();
}

}  // namespace tactic::eval
