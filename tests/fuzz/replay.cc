// Runs a fuzz target without a fuzzer: every file of a corpus, then seeded mutations of them for so many seconds.
//   c_api_fuzz [--seconds S] [--seed N] [FILE|FOLDER...]
// The input of a crash is left in crash-<program> in the working directory.
#include <fcntl.h>
#include <signal.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <random>
#include <string>
#include <vector>

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size);

// The sanitizers end with a signal, so that the handler below sees it.
// NOLINTBEGIN(bugprone-reserved-identifier): their names
extern "C" __attribute__((visibility("default"))) const char* __asan_default_options() { return "abort_on_error=1"; }
extern "C" __attribute__((visibility("default"))) const char* __ubsan_default_options() {
  return "abort_on_error=1:print_stacktrace=1";
}
// NOLINTEND(bugprone-reserved-identifier)

namespace {

using Bytes = std::vector<uint8_t>;
constexpr size_t kMaxBytes = 4096;

Bytes current;
std::string crash_path;

void leave_input(int signal_number) {
  const int file = open(crash_path.c_str(), O_WRONLY | O_CREAT | O_TRUNC, 0644);
  if (file >= 0) {
    if (write(file, current.data(), current.size()) < 0) _exit(3);
    close(file);
  }
  signal(signal_number, SIG_DFL);
  raise(signal_number);
}

void run(const Bytes& input) {
  current = input;
  LLVMFuzzerTestOneInput(current.data(), current.size());
}

Bytes read_file(const std::filesystem::path& path) {
  std::ifstream file(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), {}};
}

Bytes mutate(const std::vector<Bytes>& corpus, std::mt19937_64& random) {
  const auto below = [&](size_t n) { return static_cast<size_t>(random() % n); };
  Bytes bytes = corpus[below(corpus.size())];
  if (bytes.empty()) bytes.push_back(0);
  for (size_t rounds = 1 + below(8); rounds > 0; --rounds) {
    const size_t at = below(bytes.size());
    switch (below(6)) {
      case 0: bytes[at] ^= static_cast<uint8_t>(1u << below(8)); break;
      case 1: bytes[at] = static_cast<uint8_t>(random()); break;
      case 2:
        bytes.insert(bytes.begin() + static_cast<std::ptrdiff_t>(at), 1 + below(8), static_cast<uint8_t>(random()));
        break;
      case 3:
        bytes.erase(bytes.begin() + static_cast<std::ptrdiff_t>(at),
                    bytes.begin() + static_cast<std::ptrdiff_t>(std::min(bytes.size(), at + 1 + below(8))));
        break;
      case 4: {  // a number that tends to be a limit
        static constexpr int64_t kLimits[] = {0, -1, 1, INT32_MAX, INT32_MIN, INT64_MAX, INT64_MIN, 65535, 65536, 255};
        const int64_t value = kLimits[below(std::size(kLimits))];
        for (size_t i = 0; i < 8 && at + i < bytes.size(); ++i) bytes[at + i] = static_cast<uint8_t>(value >> (8 * i));
        break;
      }
      default: {  // the end of another input
        const Bytes& other = corpus[below(corpus.size())];
        if (other.empty()) break;
        bytes.resize(at);
        bytes.insert(bytes.end(), other.begin() + static_cast<std::ptrdiff_t>(below(other.size())), other.end());
      }
    }
    if (bytes.empty()) bytes.push_back(0);
  }
  if (bytes.size() > kMaxBytes) bytes.resize(kMaxBytes);
  return bytes;
}

}  // namespace

int main(int argc, char** argv) {
  crash_path = "crash-" + std::filesystem::path(argv[0]).filename().string();
  for (const int number : {SIGABRT, SIGSEGV, SIGFPE, SIGBUS, SIGILL}) {
    struct sigaction old;
    sigaction(number, nullptr, &old);
    if (old.sa_handler == SIG_DFL) signal(number, leave_input);  // AddressSanitizer has its own, and then aborts
  }
  double seconds = 2;
  uint64_t seed = 1;
  std::vector<Bytes> corpus;
  for (int i = 1; i < argc; ++i) {
    const std::string argument = argv[i];
    if (argument == "--seconds" && i + 1 < argc) {
      seconds = std::atof(argv[++i]);
    } else if (argument == "--seed" && i + 1 < argc) {
      seed = std::strtoull(argv[++i], nullptr, 10);
    } else if (std::filesystem::is_directory(argument)) {
      for (const auto& entry : std::filesystem::directory_iterator(argument)) corpus.push_back(read_file(entry.path()));
    } else if (std::filesystem::exists(argument)) {
      corpus.push_back(read_file(argument));
    } else {
      std::fprintf(stderr, "no such file or folder: %s\n", argument.c_str());
      return 2;
    }
  }
  for (const Bytes& input : corpus) run(input);
  std::mt19937_64 random(seed);
  for (int i = 0; i < 4; ++i) {  // something to mutate even without a corpus
    Bytes noise(256);
    for (uint8_t& byte : noise) byte = static_cast<uint8_t>(random());
    corpus.push_back(noise);
  }
  const auto end = std::chrono::steady_clock::now() + std::chrono::duration<double>(seconds);
  int64_t runs = 0;
  for (; std::chrono::steady_clock::now() < end; ++runs) run(mutate(corpus, random));
  std::printf("%zu inputs, %lld mutations of seed %llu\n", corpus.size(), static_cast<long long>(runs),
              static_cast<unsigned long long>(seed));
  return 0;
}
