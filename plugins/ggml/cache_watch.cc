#include "cache_watch.h"

#include <algorithm>
#include <bit>
#include <cstdio>
#include <utility>

namespace tactic::plugin {

namespace {

constexpr int64_t kMaxWithoutOwner = 1024;

bool share_memory(const CacheLayer& a, const CacheLayer& b) {
  const auto overlap = [&](const void* x, int64_t x_stream_bytes, const void* y, int64_t y_stream_bytes) {
    const auto x_begin = reinterpret_cast<uintptr_t>(x), y_begin = reinterpret_cast<uintptr_t>(y);
    return x_begin < y_begin + static_cast<size_t>(y_stream_bytes) * b.streams.size() &&
           y_begin < x_begin + static_cast<size_t>(x_stream_bytes) * a.streams.size();
  };
  return overlap(a.k_cache, a.k_stream_bytes, b.k_cache, b.k_stream_bytes) ||
         overlap(a.k_cache, a.k_stream_bytes, b.v_cache, b.v_stream_bytes) ||
         overlap(a.v_cache, a.v_stream_bytes, b.k_cache, b.k_stream_bytes) ||
         overlap(a.v_cache, a.v_stream_bytes, b.v_cache, b.v_stream_bytes);
}

// fn(begin, length) for each run of set bits.
template <class Fn>
void for_runs(uint64_t bits, Fn fn) {
  while (bits != 0) {
    const int begin = std::countr_zero(bits);
    const int length = std::countr_one(bits >> begin);
    fn(begin, length);
    bits &= length == 64 ? 0 : ~(((uint64_t{1} << length) - 1) << begin);
  }
}

// fn(begin, count) for each run of rows; `words` ascend.
template <class Fn>
void for_rows(const std::vector<WordBits>& words, Fn fn) {
  int64_t begin = 0, end = 0;
  for (const auto& [word, bits] : words) {
    const auto first = static_cast<int64_t>(word) * 64;
    for_runs(bits, [&](int at, int length) {
      const int64_t row = first + at;
      if (row != end) {
        if (end > begin) fn(begin, end - begin);
        begin = row;
      }
      end = row + length;
    });
  }
  if (end > begin) fn(begin, end - begin);
}

}  // namespace

std::shared_ptr<CacheLayer> CacheWatch::layer_of(const AttentionMatch& match, const IndexOptions& options) {
  const std::optional<CacheGeometry> fresh = cache_geometry(match);
  if (!fresh) return nullptr;
  const std::lock_guard lock(mutex_);
  const auto at = layers_.find(fresh->k_cache);
  if (at != layers_.end() && *at->second == *fresh &&
      at->second->streams.front()->index.options() == resolved(options, fresh->view.head_dim, fresh->view.v_head_dim)) {
    at->second->last_used = ++clock_;
    return at->second;
  }
  auto made = std::make_shared<CacheLayer>();
  static_cast<CacheGeometry&>(*made) = *fresh;
  for (int64_t s = 0; s < made->num_streams; ++s) {
    made->streams.push_back(std::make_unique<StreamIndex>(
        options, KvShape{made->view.num_kv_heads, made->view.head_dim, made->view.v_head_dim}));
  }
  // Memory is in one cache only: what else lay there is gone, and must be neither read nor told of writes.
  std::erase_if(layers_, [&](const auto& entry) { return share_memory(*entry.second, *made); });
  made->layer = layer_number(match.k->view_src, layers_.size());
  made->last_used = ++clock_;
  layers_[made->k_cache] = made;
  drop_oldest();
  return made;
}

void CacheWatch::note_empty(const AttentionMatch& match) {
  const std::lock_guard lock(mutex_);
  const auto at = layers_.find(match.k->view_src->data);
  if (at == layers_.end()) return;
  CacheLayer& layer = *at->second;
  const size_t first = layer.first_stream(match);
  const size_t end = std::min(layer.streams.size(), first + static_cast<size_t>(match.streams()));
  for (size_t s = first; s < end; ++s) layer.streams[s]->index.clear();
}

void CacheWatch::set_owner(CacheLayer& layer, const void* owner) {
  const std::lock_guard lock(mutex_);
  layer.owner = owner;
}

void CacheWatch::forget(const void* owner) {
  const std::lock_guard lock(mutex_);
  std::erase_if(layers_, [&](const auto& entry) { return entry.second->owner == owner; });
}

// Of the layers that no backend has computed with, which therefore go with none.
void CacheWatch::drop_oldest() {
  int64_t without_owner = 0;
  auto oldest = layers_.end();
  for (auto at = layers_.begin(); at != layers_.end(); ++at) {
    if (at->second->owner != nullptr) continue;
    ++without_owner;
    if (oldest == layers_.end() || at->second->last_used < oldest->second->last_used) oldest = at;
  }
  if (without_owner > kMaxWithoutOwner) layers_.erase(oldest);
}

std::shared_ptr<CacheLayer> CacheWatch::note_write(const ggml_tensor* node, const PluginOptions& options) {
  if (options.faults.ignore_writes) return nullptr;
  const ggml_tensor* cache = node->view_src != nullptr ? node->view_src : node;
  std::shared_ptr<CacheLayer> layer;
  {
    const std::lock_guard lock(mutex_);
    for (auto& [key, candidate] : layers_) {
      if (candidate->k_cache == cache->data || candidate->v_cache == cache->data) layer = candidate;
    }
  }
  if (layer == nullptr) return nullptr;
  const bool values = cache->data == layer->v_cache;
  const auto row_bytes = static_cast<int64_t>(cache->nb[1]);
  const RowsView& rows = values ? layer->view.v : layer->view.k;
  if (cache->ne[1] != layer->cells || row_bytes != rows.token_stride_bytes) return nullptr;  // another cache's by now
  const ggml_tensor* cells = node->src[1];
  for (size_t s = 0; values && s < layer->streams.size(); ++s) layer->streams[s]->written.clear();
  if (cells->ne[1] > 1 || cells->ne[2] > 1 || node->data != cache->data) {  // numbers of rows of a part of the cache
    compare_again();
    return nullptr;
  }
  int64_t run_begin = -1, run_end = -1;  // cells mostly come in order
  const auto flush = [&] {
    if (run_begin < 0) return;
    const int64_t stream = run_begin / layer->cells, first = run_begin % layer->cells;
    if (stream < static_cast<int64_t>(layer->streams.size())) {
      StreamIndex& entry = *layer->streams[static_cast<size_t>(stream)];
      const int64_t end = std::min(first + run_end - run_begin, layer->cells);
      entry.index.write(first, end - first);
      entry.earlier_places.forget(first, end - first);
      entry.passages.note_write(first, end);
      for (int64_t row = first; values && row < end; ++row) entry.written.push_back(static_cast<int32_t>(row));
      entry.written_since_step += values ? end - first : 0;
      entry.known.resize(std::max(entry.known.size(), static_cast<size_t>(end + 63) / 64));
      for (int64_t row = first; row < end; ++row)
        entry.known[static_cast<size_t>(row / 64)] |= uint64_t{1} << (row % 64);
    }
  };
  for (int64_t i = 0; i < cells->ne[0]; ++i) {
    const int64_t cell = cell_number(cells, i);
    if (cell == run_end && cell % layer->cells != 0) {
      ++run_end;
      continue;
    }
    flush();
    run_begin = cell;
    run_end = cell + 1;
  }
  flush();
  return cache->data == layer->v_cache ? layer : nullptr;
}

void CacheWatch::compare_again() {
  const std::lock_guard lock(mutex_);
  ++generation_;
}

namespace {

// Indexed cells that the last step did not show: while they were hidden their memory may have been used. They are
// compared, and if any has changed, all of them count as rewritten, for one row in 256 slips through a check.
bool returned_changed(StreamIndex& entry, const KvView& kv, const std::vector<uint64_t>& visible, bool first) {
  if (first) {
    entry.known_before.swap(entry.known);
    entry.known.clear();
  }
  entry.known.resize(std::max(entry.known.size(), visible.size()));
  std::vector<WordBits> returned;
  for (size_t w = 0; w < visible.size(); ++w) {
    const uint64_t before = w < entry.known_before.size() ? entry.known_before[w] : 0;
    const uint64_t unknown = visible[w] & ~before & ~entry.known[w];
    if (unknown != 0 && (unknown & entry.index.indexed_word(static_cast<int64_t>(w))) != 0)
      returned.emplace_back(w, unknown);
    entry.known[w] |= visible[w];
  }
  int64_t changed = 0;
  for_rows(returned, [&](int64_t begin, int64_t count) { changed += entry.index.verify(kv, begin, count); });
  if (changed > 0) for_rows(returned, [&](int64_t begin, int64_t count) { entry.index.write(begin, count); });
  return changed > 0;
}

}  // namespace

bool StreamIndex::begin_step(const std::vector<uint64_t>& visible, int64_t num_visible, int64_t max_rows) {
  if (written_since_step == 0 && passages.current().steps > 0 && visible == passages.current().visible) return false;
  const int64_t rows = std::exchange(written_since_step, 0);
  std::vector<WordBits> taken_back;
  const bool begins = passages.go_on(visible, num_visible, written.empty() ? -1 : written.back(),
                                     rows > Passages::kMaxStep, taken_back);
  if (begins) index.forget_learned();
  if (begins || rows > max_rows) passages.current().steps_since_prompt = 0;
  ++passages.current().steps_since_prompt;
  for_rows(taken_back, [&](int64_t first, int64_t count) { index.remove(first, count); });
  return true;
}

float StreamIndex::tau_factor() const { return first_steps_factor(passages.current().steps_since_prompt); }

void CacheWatch::before_step(CacheLayer& layer, size_t stream, const std::vector<uint64_t>& visible, bool first,
                             const Faults& faults) {
  StreamIndex& entry = *layer.streams[stream];
  const bool changed = !faults.skip_verify && returned_changed(entry, layer.stream_view(stream), visible, first);
  const bool had_rows = entry.index.rows_written() > 0;
  bool unseen = false;
  for (size_t w = 0; w < visible.size(); ++w) {
    for_runs(visible[w] & ~entry.index.written_word(static_cast<int64_t>(w)), [&](int begin, int length) {
      entry.index.write(static_cast<int64_t>(w) * 64 + begin, length);
      unseen = true;
    });
  }
  uint64_t generation;
  {
    const std::lock_guard lock(mutex_);
    const bool written_unseen = unseen && had_rows;
    // What came back has been compared, and what the step before showed too, unless that is still due.
    const bool compared = changed && !written_unseen && entry.verified == generation_;
    if (written_unseen || changed) ++generation_;  // what else was?
    generation = generation_;
    if (compared) entry.verified = generation;
  }
  if (first && (entry.passages.current().steps == 1 || changed || entry.verified != generation))
    entry.earlier_places.forget_all();
  if (entry.verified != generation) {
    if (had_rows && !faults.skip_verify) entry.index.verify(layer.stream_view(stream));
    entry.verified = generation;
  }
}

void CacheWatch::memory(int64_t& index_bytes, int64_t& kv_bytes) {
  index_bytes = kv_bytes = 0;
  const std::lock_guard lock(mutex_);
  for (const auto& [key, layer] : layers_) {
    for (const auto& stream : layer->streams) {
      index_bytes += static_cast<int64_t>(stream->index.memory_bytes());
      kv_bytes += stream->index.rows_written() * layer->row_bytes();
    }
  }
}

void CacheWatch::clear() {
  const std::lock_guard lock(mutex_);
  layers_.clear();
  ++generation_;
}

}  // namespace tactic::plugin
