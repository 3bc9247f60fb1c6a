// tactic eval paper: the tables and figures of the paper, measured on traces, as JSON lines for the report.
#include <cstdio>
#include <filesystem>
#include <memory>

#include "paper/paper.h"
#include "part_file.h"
#include "report.h"
#include "tactic/error.h"
#include "text.h"
#include "verbs.h"

namespace tactic::tool {
namespace {

struct EvalPaperOptions {
  std::vector<std::string> traces;
  std::string directory;
  eval::PaperOptions paper;
};

void print_table1(const std::string& name, const std::vector<Json>& rows) {
  Table table(
      {name, "oracle", "clusters", "fit", "mass", "success", "paper: oracle", "clusters", "fit", "mass", "success"});
  const auto percent = [](const Json& x) { return format("%.1f%%", 100 * x.get<double>()); };
  const auto count = [](const Json& x) { return format("%.0f", x.get<double>()); };
  for (const Json& row : rows) {
    if (row["table"] != "table1") continue;
    std::vector<std::string> cells = {
        "P = " + percent(row["target_mass"]), count(row["oracle"]),   count(row["clusters"]), count(row["fit"]),
        percent(row["achieved_mass"]),        percent(row["success"])};
    if (row.contains("paper")) {
      const Json& p = row["paper"];
      cells.insert(cells.end(), {count(p["oracle"]), count(p["clusters"]), count(p["fit"]), percent(p["achieved_mass"]),
                                 percent(p["success"])});
    } else {
      cells.insert(cells.end(), 5, "-");
    }
    table.add(cells);
  }
  table.print(stdout);
}

void eval_paper(const EvalPaperOptions& options) {
  std::vector<eval::Trace> traces;
  try {
    for (const std::string& path : options.traces) traces.emplace_back(path);
  } catch (const Error& error) {
    throw CommandError(error.what());
  }
  std::error_code failure;
  std::filesystem::create_directories(options.directory, failure);
  const std::string path = options.directory + "/paper.jsonl";
  if (failure) throw CommandError("cannot make " + options.directory + ": " + failure.message());
  check_writable(path, true);  // a run replaces the last one, when it has something better
  std::string lines;
  for (const eval::Trace& trace : traces) {
    std::fprintf(stderr, "%s ...\n", trace.path().c_str());
    std::vector<Json> rows;
    try {
      rows = eval::paper_rows(trace, options.paper);
    } catch (const Error& error) {
      throw CommandError(error.what());
    }
    for (const Json& row : rows) {
      Json line = record_header("eval paper");
      line.update({{"queries", options.paper.queries},
                   {"cluster_tokens", options.paper.cluster_tokens},
                   {"iterations", options.paper.iterations}});
      line.update(row);
      lines += to_line(line);
    }
    std::printf("\nTable 1, %s, %s; paper: Llama-3.1-8B\n", trace.info().model.c_str(), trace.info().text.c_str());
    print_table1(trace.info().text, rows);
  }
  eval::replace_file(path, lines);
  std::printf("\n%s written; scripts/report.sh %s makes the report\n", path.c_str(), options.directory.c_str());
}

}  // namespace

void add_eval_paper(CLI::App& eval) {
  auto options = std::make_shared<EvalPaperOptions>();
  CLI::App* verb = eval.add_subcommand("paper", "The tables and figures of the paper, from traces");
  verb->add_option("--traces", options->traces, "files of tactic trace, separated by commas")
      ->required()
      ->delimiter(',')
      ->type_name("FILES");
  verb->add_option("-o,--output", options->directory, "where paper.jsonl goes")->required()->type_name("DIR");
  verb->add_option("--queries", options->paper.queries, "decode queries per layer, spread over those within")
      ->check(CLI::Range(1, 1 << 20))
      ->capture_default_str();
  verb->add_option("--within", options->paper.within,
                   "decode queries at most so many rows after the prompt, which the clusters cover")
      ->check(CLI::Range(0, 1 << 24))
      ->capture_default_str();
  verb->add_option("--cluster", options->paper.cluster_tokens, "mean cluster size; the paper has 32")
      ->check(CLI::Range(1, 65536))
      ->capture_default_str();
  verb->add_option("--iterations", options->paper.iterations, "of k-means")
      ->check(CLI::Range(1, 100))
      ->capture_default_str();
  verb->add_option("--ablation-layers", options->paper.ablation_layers, "layers on which clusterings are varied")
      ->check(CLI::Range(1, 10000))
      ->capture_default_str();
  verb->add_option("--seed", options->paper.seed, "of the clusterings")->capture_default_str();
  verb->callback([options] { eval_paper(*options); });
}

}  // namespace tactic::tool
