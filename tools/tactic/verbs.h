// One function per verb: it adds a subcommand whose callback does the work and throws CommandError.
#pragma once

#include <CLI/CLI.hpp>

#include "host.h"

namespace tactic::tool {

void add_run(CLI::App& app);
void add_bench(CLI::App& app);
void add_eval(CLI::App& app);
void add_eval_paper(CLI::App& eval);  // these below `eval`
void add_eval_tasks(CLI::App& eval);
void add_eval_trace(CLI::App& eval);
void add_inspect(CLI::App& app);
void add_trace(CLI::App& app);

/// -m, --plugin, -v, which every verb has.
void add_host_options(CLI::App& verb, HostOptions& options);

}  // namespace tactic::tool
