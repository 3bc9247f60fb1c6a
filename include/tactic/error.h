// The one exception the library throws for a caller's mistake: it names the value and the limit.
#pragma once

#include <stdexcept>
#include <string>

namespace tactic {

class Error : public std::runtime_error {
 public:
  explicit Error(const std::string& what) : std::runtime_error(what) {}
};

}  // namespace tactic
