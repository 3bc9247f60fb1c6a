// The command `tactic`.
#include <fcntl.h>
#include <unistd.h>

#include <CLI/CLI.hpp>
#include <csignal>
#include <cstdio>
#include <exception>
#include <iostream>
#include <new>
#include <string>

#include "part_file.h"
#include "tactic/c_api.h"
#include "verbs.h"

namespace tactic::tool {

void add_host_options(CLI::App& verb, HostOptions& options) {
  verb.add_option("-m,--model", options.model_path, "GGUF file")->required()->type_name("FILE");
  verb.add_option("--plugin", options.plugin_path, "libggml-tactic.so (else TACTIC_PLUGIN, else beside the command)")
      ->type_name("FILE");
  verb.add_option("--yarn", options.yarn, "extend the model's context by this factor with YaRN")
      ->check(CLI::Range(1.0, 64.0))
      ->capture_default_str();
  verb.add_flag("-v,--verbose", options.verbose, "show llama.cpp's log");
}

namespace {

// Half a file is of no use. The signal then does what it does to every program, so that the caller sees it.
void end_by(int signal_number) {
  eval::remove_unfinished_file();
  std::signal(signal_number, SIG_DFL);
  std::raise(signal_number);
}

}  // namespace

void clean_up_when_interrupted() {
  for (const int number : {SIGINT, SIGTERM, SIGHUP}) {
    if (std::signal(number, end_by) == SIG_IGN) std::signal(number, SIG_IGN);  // as nohup wants it
  }
}

}  // namespace tactic::tool

int main(int argc, char** argv) {
  // A stream that the caller closed stays of no use: else a file that is opened would take its place and its output.
  for (int fd = 0; fd >= 0 && fd <= STDERR_FILENO;) fd = open("/dev/null", O_RDONLY | O_CLOEXEC);
  CLI::App app("Adaptive sparse attention for llama.cpp: try it, time it, measure its error, look inside.", "tactic");
  app.footer(
      "Modes: stock (llama.cpp's own attention), dense (exact, f32), sample, fit, topk with options, as in\n"
      "'sample,error=0.03' 'sample,tau=2000' 'fit,mass=0.9' 'topk,budget=1024' 'quality=balanced'.\n"
      "Help for a verb: tactic run --help");
  app.require_subcommand(1);
  app.set_version_flag("--version", std::string("tactic ") + tactic_version());
  tactic::tool::add_run(app);
  tactic::tool::add_bench(app);
  tactic::tool::add_eval(app);
  tactic::tool::add_inspect(app);
  tactic::tool::add_trace(app);
  tactic::tool::clean_up_when_interrupted();
  // CLI11 would say that a subcommand is required.
  const auto require_verb = [&](const CLI::App& above, int at, const char* verbs) {
    if (argc == at) throw tactic::tool::CommandError(std::string("no verb; there are ") + verbs);
    if (argv[at][0] == '-') {
      if (above.get_option_no_throw(argv[at]) != nullptr) return;  // --help
      throw tactic::tool::CommandError(std::string(argv[at]) + " stands where a verb must: " + verbs);
    }
    if (above.get_subcommands([&](const CLI::App* verb) { return verb->check_name(argv[at]); }).empty()) {
      throw tactic::tool::CommandError("no verb '" + std::string(argv[at]) + "'; there are " + verbs);
    }
  };
  try {
    if (argc < 2) throw tactic::tool::CommandError("no verb; tactic --help shows them");
    require_verb(app, 1, "run, bench, eval, inspect and trace");
    if (argv[1] == std::string("eval")) require_verb(*app.get_subcommand("eval"), 2, "kl, paper, tasks and trace");
    app.parse(argc, argv);
  } catch (const CLI::Success& help) {
    app.exit(help);
    std::cout.flush();
  } catch (const CLI::ExtrasError&) {  // its own message has them in reverse
    std::string extras;
    for (const std::string& extra : app.remaining(true)) extras += " " + extra;
    std::fprintf(stderr, "tactic: not expected:%s\n", extras.c_str());
    return 2;
  } catch (const CLI::ParseError& error) {
    std::fprintf(stderr, "tactic: %s\n", error.what());
    return 2;
  } catch (const tactic::tool::CommandError& error) {
    std::fprintf(stderr, "tactic: %s\n", error.what());
    return error.exit_status;
  } catch (const std::bad_alloc&) {
    std::fputs("tactic: out of memory\n", stderr);
    return 1;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "tactic: %s\n", error.what());
    return 1;
  }
  // llama.cpp may complain and go on; its other messages are hidden.
  if (const std::string complaint = tactic::tool::take_host_error(); !complaint.empty()) {
    std::fprintf(stderr, "tactic: llama.cpp says: %s\n", complaint.c_str());
  }
  if (std::fflush(stdout) != 0 || std::ferror(stdout) != 0 || !std::cout) {
    std::fputs("tactic: cannot write the output; is the disk full?\n", stderr);
    return 1;
  }
  return 0;
}
