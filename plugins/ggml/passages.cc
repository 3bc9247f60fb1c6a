#include "passages.h"

#include <algorithm>
#include <bit>

namespace tactic::plugin {

namespace {

uint64_t word(const std::vector<uint64_t>& bits, size_t w) { return w < bits.size() ? bits[w] : 0; }

// Cells that are shown now and were not before: many of them are a prompt, or of another sequence.
int64_t others(const std::vector<uint64_t>& now, const std::vector<uint64_t>& before) {
  int64_t count = 0;
  for (size_t w = 0; w < now.size(); ++w) count += std::popcount(now[w] & ~word(before, w));
  return count;
}

}  // namespace

void Passages::note_write(int64_t begin, int64_t end) {
  for (Passage& passage : passages_) {
    for (int64_t cell = begin; cell < end && !passage.overwritten; ++cell)
      passage.overwritten = (word(passage.visible, static_cast<size_t>(cell / 64)) >> (cell % 64) & 1) != 0;
  }
}

int64_t Passages::position_of(const std::vector<uint64_t>& visible, int64_t num_visible, int64_t row) const {
  const Passage& passage = current();
  if (passage.position == passage.num_visible || others(passage.visible, visible) > row) return num_visible;
  return passage.position + others(visible, passage.visible);
}

bool Passages::go_on(const std::vector<uint64_t>& visible, int64_t num_visible, int32_t newest, bool prompt,
                     std::vector<WordBits>& taken_back) {
  taken_back.clear();
  passages_.erase(std::remove_if(passages_.begin() + 1, passages_.end(),
                                 [](const Passage& p) { return p.overwritten || p.steps == 0; }),
                  passages_.end());
  size_t found = passages_.size(), rewound = passages_.size();
  int64_t fewest = kMaxStep + 1;
  for (size_t i = 0; i < passages_.size(); ++i) {
    const Passage& passage = passages_[i];
    const int64_t count = others(visible, passage.visible);
    const bool again = count == 0 && num_visible == passage.num_visible && newest == passage.newest;
    if (count == 0 && (num_visible < passage.num_visible || again)) {
      rewound = std::min(rewound, i);
    } else if (count < fewest && num_visible >= passage.num_visible && (!passage.overwritten || !prompt)) {
      fewest = count;
      found = i;
    }
  }
  const bool begins = found == passages_.size() || rewound == 0;
  if (begins) {
    if (rewound < passages_.size()) {
      const std::vector<uint64_t> before = std::move(passages_[rewound].visible);
      passages_[rewound] = {};
      for (size_t w = 0; w < before.size(); ++w) {
        uint64_t gone = before[w] & ~word(visible, w);
        for (const Passage& passage : passages_) gone &= ~word(passage.visible, w);
        if (gone != 0) taken_back.emplace_back(w, gone);
      }
      found = rewound;
    } else {
      if (passages_.size() == kMost) passages_.pop_back();
      passages_.emplace_back();
      found = passages_.size() - 1;
    }
  }
  std::rotate(passages_.begin(), passages_.begin() + static_cast<std::ptrdiff_t>(found),
              passages_.begin() + static_cast<std::ptrdiff_t>(found) + 1);
  Passage& passage = passages_.front();
  passage.position = begins ? num_visible : passage.position + std::max<int64_t>(fewest, 1);
  passage.visible = visible;
  passage.num_visible = num_visible;
  passage.newest = newest;
  passage.overwritten = false;
  ++passage.steps;
  return begins;
}

float first_steps_factor(uint64_t n) {
  const auto steps = static_cast<float>(std::max<uint64_t>(n, 1));
  return 1 + 3 / (steps * steps);
}

}  // namespace tactic::plugin
