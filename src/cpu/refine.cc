// refine: clusters that the draw found underestimated are read whole.
#include <algorithm>
#include <cmath>

#include "cpu/steps.h"
#include "cpu/task.h"

namespace tactic::cpu {

namespace {

bool is_heavy(const Task& task, int64_t i) {
  for (int32_t g = 0; g < task.group_size; ++g) {
    if (task.selected.weights[static_cast<size_t>(g * task.selected.stride + i)] > task.heavy[static_cast<size_t>(g)])
      return true;
  }
  return false;
}

// A drawn row becomes a certain one, after its value was added with the weight it had (0 if it was too heavy).
void make_certain(Task& task, size_t at) {
  float& log_weight = task.selection.log_weights[at];
  const float probability = std::exp(-log_weight);
  const bool added = !is_heavy(task, static_cast<int64_t>(at));
  log_weight = 0;
  for (int32_t g = 0; g < task.group_size; ++g) {
    const auto head = static_cast<size_t>(g);
    float& weight = task.selected.weights_of(g)[at];
    const float before = added ? weight : 0.0f;
    task.drawn[head] = std::max(0.0, task.drawn[head] - weight);
    weight *= probability;
    task.certain[head] += weight;
    task.changes.push_back(weight - before);
  }
  task.corrected.tokens.push_back(task.selected.tokens[at]);
  task.certain_since.push_back(static_cast<int64_t>(at));
}

// Room for the scores of rows that were added; the weights of the rows before stay.
void grow_scores(RowList& list, int32_t group_size, int64_t old_size) {
  const int64_t old_stride = list.stride;
  list.reserve_scores(group_size);
  for (int32_t g = group_size - 1; g > 0; --g) {
    std::copy_backward(list.weights.begin() + g * old_stride, list.weights.begin() + g * old_stride + old_size,
                       list.weights.begin() + g * list.stride + old_size);
  }
}

// Clusters of which a sampled row speaks for too large a share in any head: they were underestimated.
std::vector<int32_t> underestimated(const Task& task) {
  const int64_t certain = task.selection.num_certain, draws = task.selected.size() - certain;
  std::vector<int32_t> places(static_cast<size_t>(draws)), found;
  for (int32_t g = 0; g < task.group_size; ++g) {
    const float* weights = task.selected.weights.data() + g * task.selected.stride + certain;
    const int64_t count = heavier(weights, draws, task.heavy[static_cast<size_t>(g)], places.data());
    for (int64_t j = 0; j < count; ++j)
      found.push_back(task.selection.clusters[static_cast<size_t>(certain + places[static_cast<size_t>(j)])]);
  }
  std::sort(found.begin(), found.end());
  found.erase(std::unique(found.begin(), found.end()), found.end());
  return found;
}

}  // namespace

bool draws_too_heavy(const Task& task, const WeightSums* sums) {
  for (size_t g = 0; g < task.heavy.size(); ++g) {
    if (sums[g].largest_drawn > task.heavy[g]) return true;
  }
  return false;
}

int64_t next_heavy(const Task& task, int64_t begin, int64_t end) {
  int64_t i = std::max(begin, task.selection.num_certain);
  while (i < end && !is_heavy(task, i)) ++i;
  return std::min(std::max(i, begin), end);
}

void read_whole(Task& task, const std::vector<int32_t>& numbers) {
  HeadSelection& selection = task.selection;
  const int64_t old_size = task.refined.size();
  auto next = numbers.begin();
  int32_t base = 0;
  auto at = static_cast<size_t>(selection.num_certain);
  for (const Segment& segment : task.query->index->state().segments) {
    const HeadClusters& clusters = segment.heads[static_cast<size_t>(task.head)];
    const uint16_t* members = clusters.members.data();
    for (int32_t c = 0; c < segment.num_clusters && next != numbers.end(); ++c) {
      const int32_t size = clusters.sizes[static_cast<size_t>(c)];
      if (*next == base + c) {
        ++next;
        while (at < selection.tokens.size() && selection.clusters[at] < base + c) ++at;
        for (int32_t m = 0; m < size; ++m) {
          const auto row = static_cast<int32_t>(segment.row_begin + members[m]);
          if (at < selection.tokens.size() && selection.tokens[at] == row) {
            make_certain(task, at++);
          } else if (task.filter.reads_indexed(row) &&
                     !std::binary_search(task.expected.begin(), task.expected.end(), row)) {
            task.refined.tokens.push_back(row);
            task.refined_from.push_back(base + c);
          }
        }
      }
      members += size;
    }
    base += padded_clusters(segment.num_clusters);
  }
  grow_scores(task.refined, task.group_size, old_size);
  const int64_t added = task.refined.size() - old_size;
  attend_scores(task.query->kv.k, task.head, task.refined.tokens.data() + old_size, added, task.q.data(),
                task.head_dim(), task.group_size, task.refined.scores.data() + old_size, task.refined.stride);
  for (int32_t g = 0; g < task.group_size; ++g) {
    task.certain[static_cast<size_t>(g)] +=
        exp_weights(task.refined.scores_of(g) + old_size, added, task.state[static_cast<size_t>(g)].max,
                    task.refined.weights_of(g) + old_size);
    settle_head(task, g);
  }
}

void refine(Task& task) {
  const std::vector<int32_t> found = underestimated(task);
  task.refined_clusters = static_cast<int64_t>(found.size());
  for (const int32_t c : found) task.readings[static_cast<size_t>(c)] = Reading::kRefined;
  read_whole(task, found);
}

}  // namespace tactic::cpu
