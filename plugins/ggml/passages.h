// Decode steps that go on from one another are a passage. Sequences of one cache that are decoded in turns have one
// each.
#pragma once

#include <cstddef>
#include <cstdint>
#include <utility>
#include <vector>

namespace tactic::plugin {

using WordBits = std::pair<size_t, uint64_t>;  // which 64 cells, and bits of some of them

struct Passage {
  std::vector<uint64_t> visible;    // cells of the last step's first row
  int64_t num_visible = 0;          // of those
  int64_t position = 0;             // of that row: goes on growing where a full window shows no more cells
  int32_t newest = -1;              // the last step's last written cell
  uint64_t steps = 0;               // since it began
  uint64_t steps_since_prompt = 0;  // since more rows were written than a decode step has
  bool overwritten = false;         // a visible cell was written since the last step
};

/// DecodeQuery::tau_factor of the n-th step since a prompt, from 1 on. The first tokens of an answer decide how it goes
/// on, and nothing is known yet of how the heads read: four times tau at the first step, 1.2 times at the fourth
/// (docs/method.md, first steps).
float first_steps_factor(uint64_t n);

/// Those of one stream.
class Passages {
 public:
  static constexpr int64_t kMaxStep = 64;  // rows of a decode step at most
  static constexpr size_t kMost = 4;

  /// The one under way.
  Passage& current() { return passages_.front(); }
  const Passage& current() const { return passages_.front(); }

  /// The position of a row of the step under way that shows these cells, `row` rows after the first: of the first
  /// row's sequence if it lacks no more of that one's cells than a window leaves behind; of others it is the number of
  /// their cells.
  int64_t position_of(const std::vector<uint64_t>& visible, int64_t num_visible, int64_t row) const;

  /// Cells [begin, end) were written.
  void note_write(int64_t begin, int64_t end);

  /// A step shows these cells; `newest`: the last written one; `prompt`: more rows than a decode step has were written
  /// since the step before. Makes the passage current that it goes on from: which lacks the fewest of these cells, at
  /// most kMaxStep, and shows no more in all; was not overwritten, but the one under way by a decode step (in a window,
  /// cells come round); and of which the newest cell was not taken back and came again. Where there is none a passage
  /// begins, in the place of one from which rows were taken back (it shows all of these cells) or of the oldest.
  /// Returns whether one begins. `taken_back`: words of those rows' bits, but for rows that another passage shows.
  bool go_on(const std::vector<uint64_t>& visible, int64_t num_visible, int32_t newest, bool prompt,
             std::vector<WordBits>& taken_back);

 private:
  std::vector<Passage> passages_ = std::vector<Passage>(1);  // the latest first
};

}  // namespace tactic::plugin
