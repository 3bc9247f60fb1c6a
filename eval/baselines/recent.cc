// Sinks and the newest rows only (StreamingLLM, arXiv 2309.17453, section 3.2, without its renumbering of positions,
// which a stored cache does not allow): the first `sinks` rows and the last `recent` + `budget`.
#include <algorithm>

#include "baselines/common.h"

namespace tactic::eval {

namespace {

class Recent : public Baseline {
 public:
  explicit Recent(const BaselineSpec& spec) : spec_(spec) {}

  void select(const Step& step, Choice& out) override {
    Range open = open_rows(spec_, step.kv_len());
    open.end = std::max(open.begin, open.end - spec_.count("budget"));
    Marks(step, open).write(out);
  }

 private:
  BaselineSpec spec_;
};

}  // namespace

std::unique_ptr<Baseline> make_recent(const BaselineSpec& spec, const Layer&) { return std::make_unique<Recent>(spec); }

}  // namespace tactic::eval
