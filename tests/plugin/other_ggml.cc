// Stands before ggml's own library (LD_PRELOAD): a ggml whose types have other names.
extern "C" __attribute__((visibility("default"))) const char* ggml_type_name(int) { return "another"; }
