// A file that appears under its name when it is whole. Until then it has a name of its own in the same folder, so that
// two writers of one path do not meet and what was there before stays; what is not finished is removed.
//
//   PartFile file("a.trace");
//   std::fwrite(data, 1, size, file.get());
//   file.finish();
#pragma once

#include <cstdio>
#include <string>
#include <string_view>

namespace tactic::eval {

class PartFile {
 public:
  /// Of a link, the place is where it leads; what is no file (a device, a pipe, a directory) is not replaced. Throws
  /// Error when the file cannot be made.
  explicit PartFile(const std::string& path);
  ~PartFile();
  PartFile(const PartFile&) = delete;
  PartFile& operator=(const PartFile&) = delete;

  std::FILE* get() const { return file_; }
  /// Throws Error saying that the file cannot be written, for the reason in errno.
  [[noreturn]] void fail() const;
  /// Puts the file in its place. Throws Error when not all of it could be written.
  void finish();

 private:
  std::string path_, part_;
  std::FILE* file_ = nullptr;
};

/// All of a file at once.
void replace_file(const std::string& path, std::string_view text);

/// Removes what the last PartFile has written if it is not finished. May be called by a signal handler that ends the
/// process.
void remove_unfinished_file();

}  // namespace tactic::eval
