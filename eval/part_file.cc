#include "part_file.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <filesystem>

#include "tactic/error.h"

namespace tactic::eval {

namespace {

// The name of the last file that is not finished. A signal handler may read no string.
std::atomic<const char*> unfinished{nullptr};

[[noreturn]] void refuse(const std::string& path, const std::string& why) {
  throw Error(path + ": cannot be written: " + why);
}

std::string place_of(const std::string& path) {
  namespace fs = std::filesystem;
  std::error_code error;
  fs::path place = path;
  for (int links = 0; fs::is_symlink(fs::symlink_status(place, error)); ++links) {
    if (links == 40) refuse(path, "it is a circle of links");
    place = place.parent_path() / fs::read_symlink(place, error);
  }
  const fs::file_status status = fs::status(place, error);
  if (fs::exists(status) && !fs::is_regular_file(status)) refuse(path, "it is there and no regular file");
  return place.string();
}

}  // namespace

PartFile::PartFile(const std::string& path) : path_(place_of(path)), part_(path_ + ".part-XXXXXX") {
  unfinished = part_.c_str();
  const int file = mkostemp(part_.data(), O_CLOEXEC);
  if (file < 0) {
    unfinished = nullptr;
    refuse(path_, std::strerror(errno));
  }
  const mode_t mask = umask(0);  // mkostemp lets only the owner read; other files are for those that umask leaves
  umask(mask);
  fchmod(file, 0666 & ~mask);
  file_ = fdopen(file, "wb");
  if (file_ == nullptr) {
    const int reason = errno;
    close(file);
    unlink(part_.c_str());
    unfinished = nullptr;
    refuse(path_, std::strerror(reason));
  }
}

PartFile::~PartFile() {
  if (file_ != nullptr) {
    std::fclose(file_);
    std::remove(part_.c_str());
  }
  const char* name = part_.c_str();
  unfinished.compare_exchange_strong(name, nullptr);
}

void PartFile::fail() const { refuse(path_, std::strerror(errno)); }

void PartFile::finish() {
  const bool flushed = std::fflush(file_) == 0;
  const int reason = errno;
  const bool closed = std::fclose(file_) == 0;
  file_ = nullptr;
  if (flushed && closed && std::rename(part_.c_str(), path_.c_str()) == 0) return;
  if (!flushed) errno = reason;
  const std::string why = std::strerror(errno);
  std::remove(part_.c_str());
  refuse(path_, why);
}

void replace_file(const std::string& path, std::string_view text) {
  PartFile file(path);
  if (std::fwrite(text.data(), 1, text.size(), file.get()) != text.size()) file.fail();
  file.finish();
}

void remove_unfinished_file() {
  if (const char* part = unfinished) unlink(part);
}

}  // namespace tactic::eval
