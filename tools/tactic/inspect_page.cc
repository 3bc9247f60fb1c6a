#include "inspect_page.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>

#include "report.h"

namespace tactic::tool {
namespace {

// Colors follow the reader's light or dark setting; a cell's value is its opacity, which reads the same on both.
constexpr const char* kHead = R"(<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1">
<title>%s</title><style>
:root{color-scheme:light dark;--ink:#1c2430;--soft:#66707d;--paper:#fff;--line:#d9dee5;--cell:#0b62c4;--warm:#c8560b}
@media(prefers-color-scheme:dark){
:root{--ink:#e4e8ee;--soft:#98a2af;--paper:#14181e;--line:#323943;--cell:#62b0ff;--warm:#ff9f4d}}
body{font:15px/1.5 system-ui,sans-serif;color:var(--ink);background:var(--paper);
max-width:1080px;margin:2rem auto;padding:0 1rem}
h1{font-size:1.5rem;margin:0 0 .5rem}h2{font-size:1.1rem;margin:2rem 0 .2rem}p{margin:.2rem 0 .6rem;max-width:48rem}
dl{display:grid;grid-template-columns:max-content 1fr;gap:.1rem 1rem}
dt{color:var(--soft)}dd{margin:0;overflow-wrap:anywhere}
svg{display:block;max-width:100%%;height:auto}svg text{font:11px system-ui,sans-serif;fill:var(--soft)}
.c{fill:var(--cell)}.w{fill:var(--warm)}.f{fill:none;stroke:var(--line)}.g{stroke:var(--line)}
.l{fill:none;stroke:var(--cell);stroke-width:1.5}rect.c:hover,circle:hover{stroke:var(--ink);stroke-width:1.5}
table{border-collapse:collapse;font-variant-numeric:tabular-nums}
td,th{padding:.1rem .7rem;text-align:right;border-bottom:1px solid var(--line)}
</style></head><body>
)";

std::string escape_html(const std::string& text) {
  std::string out;
  for (const char c : text) {
    switch (c) {
      case '&': out += "&amp;"; break;
      case '<': out += "&lt;"; break;
      case '>': out += "&gt;"; break;
      case '"': out += "&quot;"; break;
      default: out += c;
    }
  }
  return out;
}

std::string number(double value, int digits) { return std::isfinite(value) ? format("%.*f", digits, value) : "-"; }

std::string svg_begin(double width, double height) {
  return format("<svg viewBox=\"0 0 %.0f %.0f\" width=\"%.0f\" role=\"img\">", width, height, width);
}

std::string svg_text(double x, double y, const char* anchor, const std::string& text) {
  return format("<text x=\"%.1f\" y=\"%.1f\" text-anchor=\"%s\">%s</text>", x, y, anchor, escape_html(text).c_str());
}

std::string name_of(const LayerFigures& layer, size_t head) {
  const std::string stream = layer.stream == 0 ? "" : format(", stream %lld", static_cast<long long>(layer.stream));
  return format("layer %lld%s, KV head %zu", static_cast<long long>(layer.layer), stream.c_str(), head);
}

constexpr double kLeft = 46, kPlotWidth = 1000;

double column_width(const InspectPage& page) {
  return std::clamp(kPlotWidth / static_cast<double>(std::max<size_t>(page.layers.size(), 1)), 4.0, 34.0);
}

// Layer numbers under the columns, as many as have room.
std::string layer_axis(const InspectPage& page, double y) {
  std::string out;
  const double width = column_width(page);
  const auto every = static_cast<size_t>(std::ceil(22.0 / width));
  for (size_t i = 0; i < page.layers.size(); i += every) {
    out += svg_text(kLeft + (static_cast<double>(i) + 0.5) * width, y, "middle", std::to_string(page.layers[i].layer));
  }
  return out + svg_text(kLeft - 6, y, "end", "layer");
}

struct HeatMap {
  const char* title;
  const char* explanation;
  std::function<double(const HeadFigures&)> value;
  int digits;
  bool from_zero;  // else from the least value
};

double value_of(const HeatMap& map, const HeadFigures& head) {
  return head.steps > 0 ? map.value(head) : std::numeric_limits<double>::quiet_NaN();
}

std::string render_heat_map(const InspectPage& page, const HeatMap& map) {
  double low = map.from_zero ? 0.0 : std::numeric_limits<double>::infinity();
  double high = -std::numeric_limits<double>::infinity();
  size_t heads = 0;
  for (const LayerFigures& layer : page.layers) {
    heads = std::max(heads, layer.heads.size());
    for (const HeadFigures& head : layer.heads) {
      const double v = value_of(map, head);
      if (!std::isfinite(v)) continue;
      low = std::min(low, v);
      high = std::max(high, v);
    }
  }
  std::string out = format("<h2>%s</h2><p>%s</p>", map.title, map.explanation);
  if (!(high >= low)) return out + "<p>Not known: no step read less than everything.</p>";
  if (high == 0 && low == 0) return out + "<p>Zero everywhere: the options do not use it.</p>";
  const double width = column_width(page), height = heads > 16 ? 12 : 22;
  const double bottom = 4 + static_cast<double>(heads) * height;
  out += svg_begin(kLeft + kPlotWidth + 20, bottom + 44);
  for (size_t i = 0; i < page.layers.size(); ++i) {
    for (size_t h = 0; h < page.layers[i].heads.size(); ++h) {
      const double v = value_of(map, page.layers[i].heads[h]);
      const double share = !std::isfinite(v) ? 0.0 : high > low ? (v - low) / (high - low) : 0.5;
      out += format(
          "<rect class=\"%s\" x=\"%.1f\" y=\"%.1f\" width=\"%.1f\" height=\"%.1f\" fill-opacity=\"%.3f\"><title>%s: "
          "%s</title></rect>",
          std::isfinite(v) ? "c" : "f", kLeft + static_cast<double>(i) * width, 4 + static_cast<double>(h) * height,
          width - 1, height - 1, 0.06 + 0.94 * share, name_of(page.layers[i], h).c_str(),
          number(v, map.digits).c_str());
    }
  }
  const size_t labelled = heads > 16 ? 4 : 1;  // every so many
  for (size_t h = 0; h < heads; h += labelled) {
    out += svg_text(kLeft - 6, 4 + (static_cast<double>(h) + 0.5) * height + 4, "end", format("head %zu", h));
  }
  out += layer_axis(page, bottom + 13);
  for (int i = 0; i < 20; ++i) {
    out += format("<rect class=\"c\" x=\"%.0f\" y=\"%.0f\" width=\"8\" height=\"9\" fill-opacity=\"%.3f\"/>",
                  kLeft + 60 + 8.0 * i, bottom + 26, 0.06 + 0.94 * i / 19);
  }
  out += svg_text(kLeft + 54, bottom + 34, "end", number(low, map.digits));
  return out + svg_text(kLeft + 226, bottom + 34, "start", number(high, map.digits)) + "</svg>";
}

// Always-read and chosen tokens of each layer, mean over heads.
std::string render_bars(const InspectPage& page) {
  constexpr double kHeight = 150;
  double high = 1;
  const auto means = [](const LayerFigures& layer) {
    double tokens = 0, exact = 0, n = 0;
    for (const HeadFigures& head : layer.heads) {
      if (head.steps > 0) tokens += head.tokens, exact += head.exact_tokens, n += 1;
    }
    return n > 0 ? std::pair(tokens / n, exact / n) : std::pair(0.0, 0.0);
  };
  for (const LayerFigures& layer : page.layers) high = std::max(high, means(layer).first);
  std::string out =
      "<h2>Always read, and chosen</h2><p>Tokens read per KV head and step, mean over the layer's heads. Below, in the "
      "strong color: the first tokens, the newest ones and those expected to weigh much, which are always read. Above: "
      "those that the "
      "index chose.</p>";
  out += svg_begin(kLeft + kPlotWidth + 20, kHeight + 30);
  const double width = column_width(page);
  for (size_t i = 0; i < page.layers.size(); ++i) {
    const auto [tokens, exact] = means(page.layers[i]);
    const double x = kLeft + static_cast<double>(i) * width, bottom = 8 + kHeight;
    const double full = kHeight * tokens / high, always = kHeight * std::min(exact, tokens) / high;
    out += format("<g><title>layer %lld: %.0f always, %.0f chosen</title>",
                  static_cast<long long>(page.layers[i].layer), exact, tokens - exact);
    out += format("<rect class=\"c\" x=\"%.1f\" y=\"%.1f\" width=\"%.1f\" height=\"%.1f\"/>", x, bottom - always,
                  width - 1, always);
    out += format("<rect class=\"c\" fill-opacity=\".35\" x=\"%.1f\" y=\"%.1f\" width=\"%.1f\" height=\"%.1f\"/></g>",
                  x, bottom - full, width - 1, full - always);
  }
  out += svg_text(kLeft - 6, 14, "end", number(high, 0)) + svg_text(kLeft - 6, 8 + kHeight, "end", "0");
  return out + layer_axis(page, kHeight + 21) + "</svg>";
}

// What a head costs against how much of its attention lies on the tokens that are read anyway.
std::string render_scatter(const InspectPage& page) {
  constexpr double kWidth = 420, kHeight = 260;
  double high = 1;
  for (const LayerFigures& layer : page.layers) {
    for (const HeadFigures& head : layer.heads) high = head.steps > 0 ? std::max(high, head.tokens) : high;
  }
  std::string points;
  for (const LayerFigures& layer : page.layers) {
    for (size_t h = 0; h < layer.heads.size(); ++h) {
      const HeadFigures& head = layer.heads[h];
      if (head.steps == 0 || !std::isfinite(head.exact_mass)) continue;
      points += format(
          "<circle class=\"c\" fill-opacity=\".6\" r=\"4\" cx=\"%.1f\" cy=\"%.1f\"><title>%s: %.0f tokens, %.1f%% of "
          "the "
          "attention on those always read</title></circle>",
          kLeft + kWidth * std::clamp(head.exact_mass, 0.0, 1.0), 8 + kHeight - kHeight * head.tokens / high,
          name_of(layer, h).c_str(), head.tokens, 100 * head.exact_mass);
    }
  }
  if (points.empty()) return "";
  std::string out =
      "<h2>What makes a head cheap</h2><p>Each point is a KV head. To the right: the share of its attention on the "
      "tokens "
      "that are always read. Upwards: tokens read. Heads at the right live on sinks and the newest tokens and need "
      "little "
      "else; at the left are those that search the whole context.</p>";
  out += svg_begin(kLeft + kWidth + 60, kHeight + 30);
  out +=
      format("<rect class=\"f\" x=\"%.0f\" y=\"8\" width=\"%.0f\" height=\"%.0f\"/>", kLeft, kWidth, kHeight) + points;
  out += svg_text(kLeft - 6, 14, "end", number(high, 0)) + svg_text(kLeft - 6, 8 + kHeight, "end", "0");
  return out + svg_text(kLeft, kHeight + 24, "start", "0%") + svg_text(kLeft + kWidth, kHeight + 24, "end", "100%") +
         "</svg>";
}

std::string render_steps(const InspectPage& page) {
  constexpr double kHeight = 120;
  double high = 0;
  for (const StepFigures& step : page.steps) high = std::max(high, step.read_fraction);
  if (page.steps.empty() || high <= 0) return "";
  const double width = kPlotWidth / static_cast<double>(page.steps.size());
  std::string line, marks;
  for (size_t i = 0; i < page.steps.size(); ++i) {
    const StepFigures& step = page.steps[i];
    const double x = kLeft + (static_cast<double>(i) + 0.5) * width,
                 y = 8 + kHeight - kHeight * step.read_fraction / high;
    line += format("%s%.1f,%.1f", i == 0 ? "" : " ", x, y);
    marks += format(
        "<circle class=\"%s\" r=\"3.5\" cx=\"%.1f\" cy=\"%.1f\"><title>step %zu, %lld tokens in the cache: read "
        "fraction %.3f, "
        "%.0f tokens per KV head, %.1f%% dense, %.1f ms</title></circle>",
        step.dense_share > 0 ? "w" : "c", x, y, i + 1, static_cast<long long>(step.kv_len), step.read_fraction,
        step.tokens_per_kv_head, 100 * step.dense_share, step.milliseconds);
  }
  std::string out =
      "<h2>Step by step</h2><p>Bytes read (keys, values and index) over bytes present, all layers together. A point in "
      "the other color is a step "
      "in which some heads read everything.</p>";
  out += svg_begin(kLeft + kPlotWidth + 20, kHeight + 20);
  out += format("<line class=\"g\" x1=\"%.0f\" y1=\"%.0f\" x2=\"%.0f\" y2=\"%.0f\"/>", kLeft, 8 + kHeight,
                kLeft + kPlotWidth, 8 + kHeight);
  out += "<polyline class=\"l\" points=\"" + line + "\"/>" + marks;
  return out + svg_text(kLeft - 6, 14, "end", number(high, 2)) + svg_text(kLeft - 6, 8 + kHeight, "end", "0") +
         "</svg>";
}

std::string render_numbers(const InspectPage& page) {
  struct Column {
    const char* name;
    double HeadFigures::*value;
    int digits;
  };
  constexpr Column kColumns[] = {{"clusters", &HeadFigures::clusters, 0},
                                 {"spread", &HeadFigures::mean_spread, 3},
                                 {"beta", &HeadFigures::beta, 3},
                                 {"tau", &HeadFigures::tau, 0},
                                 {"tokens", &HeadFigures::tokens, 1},
                                 {"always read", &HeadFigures::exact_tokens, 1},
                                 {"their mass", &HeadFigures::exact_mass, 4},
                                 {"certain mass", &HeadFigures::estimated_mass, 4},
                                 {"least", &HeadFigures::least_mass, 4}};
  std::string out =
      "<h2>All numbers</h2><details><summary>Show the table</summary><table><tr><th>layer</th><th>KV head</th>";
  for (const Column& column : kColumns) out += format("<th>%s</th>", column.name);
  out += "</tr>\n";
  for (const LayerFigures& layer : page.layers) {
    for (size_t h = 0; h < layer.heads.size(); ++h) {
      const HeadFigures& head = layer.heads[h];
      out += format("<tr><td>%lld</td><td>%zu</td>", static_cast<long long>(layer.layer), h);
      for (const Column& column : kColumns) {
        out += "<td>" + (head.steps > 0 ? number(head.*column.value, column.digits) : "-") + "</td>";
      }
      out += "</tr>\n";
    }
  }
  return out + "</table></details>";
}

}  // namespace

std::string render_page(const InspectPage& page) {
  const HeatMap maps[] = {
      {"Tokens read",
       "Rows of the cache that a head reads per step. Heads that look at a few tokens stay pale; flat heads, which "
       "look "
       "everywhere, are strong.",
       [](const HeadFigures& h) { return h.tokens; }, 0, true},
      {"Attention on the tokens always read",
       "The share of the attention, as the step estimates it, on the first tokens, the newest ones and those expected "
       "to weigh much.",
       [](const HeadFigures& h) { return h.exact_mass; }, 3, true},
      {"Attention read with certainty",
       "The share on all tokens read with certainty, those of chosen clusters included. With sample, sampled tokens "
       "speak "
       "for the rest; with fit and topk the rest is dropped, and a pale cell means an error.",
       [](const HeadFigures& h) { return h.estimated_mass; }, 3, true},
      {"Not read with certainty, at the worst step", "One minus that share, at the step where it was least.",
       [](const HeadFigures& h) { return 1 - h.least_mass; }, 3, true},
      {"Tau",
       "The bound on the expected number of tokens read, which the step chose for this head to meet its error target.",
       [](const HeadFigures& h) { return h.tau; }, 0, true},
      {"Beta", "How much a cluster's spread lifts its estimate, as calibrated for this head from what was read.",
       [](const HeadFigures& h) { return h.beta; }, 2, true},
      {"Spread of the clusters",
       "Mean squared distance of the keys to their centroid, per dimension. Small: the centroid speaks well for its "
       "keys.",
       [](const HeadFigures& h) { return h.mean_spread; }, 3, true},
  };
  std::string out = format(kHead, escape_html(page.title).c_str());
  out += "<h1>" + escape_html(page.title) + "</h1><dl>";
  for (const auto& [name, value] : page.facts) {
    out += "<dt>" + escape_html(name) + "</dt><dd>" + escape_html(value) + "</dd>";
  }
  out +=
      "</dl><p>Each decode step asks an index over the keys which tokens matter, and reads only those. These drawings "
      "show "
      "what every layer and KV head read. Point at a cell for its numbers.</p>";
  out += render_steps(page) + render_heat_map(page, maps[0]) + render_bars(page) + render_heat_map(page, maps[1]);
  out += render_scatter(page);
  for (size_t i = 2; i < std::size(maps); ++i) out += render_heat_map(page, maps[i]);
  return out + render_numbers(page) + "</body></html>\n";
}

}  // namespace tactic::tool
