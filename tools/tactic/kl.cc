#include "kl.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <string>

#include "host.h"

namespace tactic::tool {

Normalizer normalize(const float* logits, int32_t vocab_size) {
  const float* top = std::max_element(logits, logits + vocab_size);
  double sum = 0;
  for (int32_t i = 0; i < vocab_size; ++i) sum += std::exp(static_cast<double>(logits[i]) - static_cast<double>(*top));
  return {static_cast<llama_token>(top - logits), static_cast<double>(*top) + std::log(sum)};
}

TokenComparison compare_logits(const float* exact, const float* other, int32_t vocab_size, llama_token next) {
  const Normalizer p = normalize(exact, vocab_size);
  const Normalizer q = normalize(other, vocab_size);
  double kl = 0;
  for (int32_t i = 0; i < vocab_size; ++i) {
    const double log_p = static_cast<double>(exact[i]) - p.lse;
    const double log_q = static_cast<double>(other[i]) - q.lse;
    if (log_p > -700) kl += std::exp(log_p) * (log_p - log_q);  // a masked token has minus infinity
  }
  return {.kl = std::max(kl, 0.0),  // equal distributions give a rounding error of either sign
          .exact_nll = p.lse - static_cast<double>(exact[next]),
          .nll = q.lse - static_cast<double>(other[next]),
          .exact_top = p.top,
          .top = q.top};
}

LogitStore::LogitStore(int64_t rows, int32_t vocab_size)
    : vocab_size_(vocab_size),
      size_bytes_(static_cast<size_t>(rows) * static_cast<size_t>(vocab_size) * sizeof(float)) {
  std::error_code none;
  const std::filesystem::path folder = std::filesystem::temp_directory_path(none);
  if (none) throw CommandError("no folder for temporary files (TMPDIR): " + none.message());
  std::string path = (folder / "tactic-logits-XXXXXX").string();
  const int file = mkstemp(path.data());
  if (file < 0) throw CommandError("cannot make a temporary file " + path + ": " + std::strerror(errno));
  unlink(path.c_str());
  // Blocks are taken now: running out of space later would end the process by a signal.
  const int error = posix_fallocate(file, 0, static_cast<off_t>(size_bytes_));
  void* data = error == 0 ? mmap(nullptr, size_bytes_, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0) : MAP_FAILED;
  const int reason = error != 0 ? error : errno;
  close(file);
  if (data == MAP_FAILED) {
    throw CommandError("cannot keep " + std::to_string(size_bytes_ >> 20) + " MiB of exact logits in " + path + ": " +
                       std::strerror(reason));
  }
  data_ = static_cast<float*>(data);
}

LogitStore::~LogitStore() { munmap(data_, size_bytes_); }

void LogitStore::set(int64_t i, const float* logits) {
  std::memcpy(row(i), logits, static_cast<size_t>(vocab_size_) * sizeof(float));
}

}  // namespace tactic::tool
