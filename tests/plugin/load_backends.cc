// llama.cpp's tests of architectures expect backends that are linked in; here they are loadable ones, so load them
// first.
#include <ggml-backend.h>

namespace {
const struct LoadBackends {
  LoadBackends() { ggml_backend_load_all(); }
} load_backends;
}  // namespace
