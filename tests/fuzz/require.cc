#include <cstdio>
#include <cstdlib>

#include "input.h"

void tactic::fuzz::require(bool holds, const char* what) {
  if (holds) return;
  std::fprintf(stderr, "does not hold: %s\n", what);
  std::abort();
}
