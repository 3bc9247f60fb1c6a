// What is taken of a graph that is to run on a GPU, when a step goes on from the one before, and how a backend's graphs
// are cut. The GPU here is a device made of the CPU's backend.
#include "gpu_graph.h"

#include <ggml-backend.h>
#include <ggml-cpu.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <stdexcept>
#include <string>

#include "gpu_hook.h"
#include "shared.h"

namespace tactic::plugin {
namespace {

using ::testing::ElementsAre;
using ::testing::IsEmpty;
using ::testing::UnorderedElementsAre;
using Step = GpuPassage::Step;
using Way = GpuAttention::Way;

struct Shape {
  int64_t head_dim = 64, q_heads = 4, kv_heads = 2, cells = 2048, streams = 1, rows = 1;
  ggml_type type = GGML_TYPE_F16;
  bool write_v = true, mask = true;
};

/// A graph of layers that write one row per token and attend, as the host makes them.
class Model {
 public:
  explicit Model(const Shape& shape, int layers = 1) : shape_(shape) {
    graph_ = ggml_new_graph(context_);
    const int64_t tokens = shape.rows * shape.streams;
    cells = ggml_new_tensor_1d(context_, GGML_TYPE_I64, tokens);
    if (shape.mask) mask = ggml_new_tensor_4d(context_, GGML_TYPE_F16, shape.cells, shape.rows, 1, shape.streams);
    for (int layer = 0; layer < layers; ++layer) add_layer(layer);
    buffer_ = ggml_backend_alloc_ctx_tensors_from_buft(context_, ggml_backend_cpu_buffer_type());
    ggml_backend_buffer_clear(buffer_, 0);
  }
  ~Model() {
    ggml_backend_buffer_free(buffer_);
    ggml_free(context_);
  }
  GpuGraph look(const char* options = "") { return look_at(graph_, parse_options(options)); }
  void add(ggml_tensor* node) { ggml_build_forward_expand(graph_, node); }
  ggml_cgraph* graph() { return graph_; }
  ggml_context* context() { return context_; }

  ggml_tensor* cells = nullptr;
  ggml_tensor* mask = nullptr;
  std::vector<ggml_tensor*> k, v, attention, outputs;

 private:
  void add_layer(int layer) {
    const int64_t elements = shape_.head_dim * shape_.kv_heads, tokens = shape_.rows * shape_.streams;
    const auto cache = [&](const char* name) {
      ggml_tensor* tensor = ggml_new_tensor_3d(context_, shape_.type, elements, shape_.cells, shape_.streams);
      ggml_format_name(tensor, "%s_l%d", name, layer);
      return tensor;
    };
    k.push_back(cache("cache_k"));
    v.push_back(cache("cache_v"));
    for (ggml_tensor* tensor : {k.back(), v.back()}) {
      if (tensor == v.back() && !shape_.write_v) continue;
      ggml_tensor* rows = ggml_new_tensor_2d(context_, GGML_TYPE_F32, elements, tokens);
      ggml_tensor* all = ggml_reshape_2d(context_, tensor, elements, shape_.cells * shape_.streams);
      add(ggml_set_rows(context_, all, rows, cells));
    }
    const auto view = [&](ggml_tensor* tensor) {
      return ggml_view_4d(context_, tensor, shape_.head_dim, shape_.cells, shape_.kv_heads, shape_.streams,
                          tensor->nb[1], ggml_row_size(tensor->type, shape_.head_dim), tensor->nb[2], 0);
    };
    ggml_tensor* q = ggml_permute(
        context_,
        ggml_new_tensor_4d(context_, GGML_TYPE_F32, shape_.head_dim, shape_.q_heads, shape_.rows, shape_.streams), 0, 2,
        1, 3);
    attention.push_back(ggml_flash_attn_ext(context_, q, view(k.back()), view(v.back()), mask, 0.125f, 0, 0));
    outputs.push_back(ggml_scale(context_, attention.back(), 2));
    add(outputs.back());
  }

  Shape shape_;
  ggml_context* context_ = ggml_init({ggml_tensor_overhead() * 128 + 2 * ggml_graph_overhead(), nullptr, true});
  ggml_cgraph* graph_ = nullptr;
  ggml_backend_buffer_t buffer_ = nullptr;
};

TEST(GpuGraph, TakesStepsOfOneRowPerStream) {
  for (const int64_t streams : {1, 3}) {
    Model model({.streams = streams}, 2);
    const GpuGraph found = model.look();
    ASSERT_EQ(found.decode.size(), 2u);
    EXPECT_THAT(found.rewritten, IsEmpty());
    for (size_t i = 0; i < 2; ++i) {
      const GpuGraph::Node& node = found.decode[i];
      EXPECT_EQ(ggml_graph_node(model.graph(), node.at), model.attention[i]);
      EXPECT_EQ(node.cells, model.cells);
      EXPECT_EQ(node.cache.k_cache, model.k[i]->data);
      EXPECT_EQ(node.cache.num_streams, streams);
      EXPECT_EQ(node.layer, static_cast<int32_t>(i));
    }
  }
}

TEST(GpuGraph, LeavesWhatTheKernelsDoNotDoAndCountsItsWritesAsRewriting) {
  const std::pair<const char*, Shape> cases[] = {{"a prompt", {.rows = 4}},
                                                 {"a group of 16", {.q_heads = 32}},
                                                 {"a dimension without kernels", {.head_dim = 48}},
                                                 {"f32", {.type = GGML_TYPE_F32}},
                                                 {"no mask", {.mask = false}}};
  for (const auto& [what, shape] : cases) {
    Model model(shape);
    const GpuGraph found = model.look();
    EXPECT_THAT(found.decode, IsEmpty()) << what;
    EXPECT_THAT(found.rewritten, UnorderedElementsAre(model.k[0]->data, model.v[0]->data)) << what;
  }
  Model model({});
  EXPECT_THAT(model.look("select=off").decode, IsEmpty());
  EXPECT_THAT(model.look("min_context=2049").decode, IsEmpty());
  EXPECT_EQ(model.look("min_context=2048").decode.size(), 1u);
}

TEST(GpuGraph, LeavesACacheOfWhichNotBothHalvesAreWrittenHere) {
  Model model({.write_v = false});
  const GpuGraph found = model.look();
  EXPECT_THAT(found.decode, IsEmpty());
  EXPECT_THAT(found.rewritten, ElementsAre(model.k[0]->data));
}

TEST(GpuGraph, LeavesWhatIsOnlyKnownWhileTheGraphIsComputed) {
  Model model({});
  model.mask->op = GGML_OP_CPY;
  EXPECT_THAT(model.look().decode, IsEmpty());
  model.mask->op = GGML_OP_NONE;
  model.cells->op = GGML_OP_ADD;
  EXPECT_THAT(model.look().decode, IsEmpty());
}

TEST(GpuGraph, SeesACacheChangedInPlace) {
  Model model({});
  ggml_tensor* shifted = ggml_scale_inplace(model.context(), model.k[0], 0.5f);
  shifted->data = model.k[0]->data;
  model.add(shifted);
  EXPECT_THAT(model.look().rewritten, ElementsAre(model.k[0]->data));
}

// Steps over the first rows: those are told by how many they are.
Step step(GpuPassage& passage, int32_t kv_len) {
  return passage.step(kv_len, static_cast<uint32_t>(kv_len), static_cast<uint32_t>(kv_len - 1));
}

TEST(GpuPassage, GoesOnRowByRow) {
  GpuPassage passage;
  EXPECT_EQ(step(passage, 5000), Step::kBegins);
  EXPECT_EQ(passage.tau_factor(), 4);
  EXPECT_EQ(step(passage, 5001), Step::kGoesOn);
  EXPECT_EQ(step(passage, 5002), Step::kGoesOn);
  EXPECT_LT(passage.tau_factor(), 1.4f);
}

TEST(GpuPassage, BeginsWhereRowsWereTakenBack) {
  GpuPassage passage;
  step(passage, 5000);
  EXPECT_EQ(step(passage, 5000), Step::kBegins) << "the newest row was written anew";
  EXPECT_EQ(step(passage, 4000), Step::kBegins);
  EXPECT_EQ(step(passage, 4065), Step::kBegins) << "as many rows as a prompt has";
}

TEST(GpuPassage, BeginsWhereOtherRowsAreSeen) {
  GpuPassage passage;
  passage.step(5000, 111, 110);
  EXPECT_EQ(passage.step(5001, 222, 221), Step::kBegins) << "another sequence of the cache, longer by one";
  EXPECT_EQ(passage.step(5002, 223, 222), Step::kGoesOn);
}

TEST(GpuPassage, MayHaveChangedWhereRowsWereWrittenOtherwise) {
  GpuPassage passage;
  step(passage, 5000);
  passage.doubt();
  EXPECT_EQ(step(passage, 5001), Step::kLonger);
  EXPECT_EQ(step(passage, 5002), Step::kGoesOn) << "doubt is of one step";
  EXPECT_EQ(step(passage, 5006), Step::kLonger) << "several rows at once";
}

TEST(GpuPassage, IsRestlessWhereStepsBeginAgainAndAgain) {
  GpuPassage passage;
  for (int i = 0; i < 8; ++i) step(passage, 4096);  // a window
  EXPECT_FALSE(passage.restless());
  step(passage, 4096);
  EXPECT_TRUE(passage.restless());
  passage.doubt();  // such steps are left to the host
  EXPECT_EQ(step(passage, 4097), Step::kLonger);
  EXPECT_FALSE(passage.restless());
}

// The device: computes on the CPU and remembers what it was given.
struct FakeGpu {
  static inline std::vector<std::string> given;  // per call, the operations that are not views
  static inline std::vector<std::pair<const ggml_tensor*, int32_t>> first_nodes;  // and their first parameter
  static inline ggml_backend_t cpu = nullptr;

  static const char* name(ggml_backend_reg_t) { return "FAKE"; }
  static size_t count(ggml_backend_reg_t) { return 1; }
  static ggml_backend_dev_t get(ggml_backend_reg_t reg, size_t) {
    static ggml_backend_device device = [&] {
      ggml_backend_device d{};
      d.iface.get_name = [](ggml_backend_dev_t) { return "FAKE0"; };
      d.iface.get_description = d.iface.get_name;
      d.iface.get_type = [](ggml_backend_dev_t) { return GGML_BACKEND_DEVICE_TYPE_GPU; };
      d.iface.get_memory = [](ggml_backend_dev_t, size_t* free, size_t* total) { *free = *total = 0; };
      d.iface.init_backend = init;
      d.reg = reg;
      return d;
    }();
    return &device;
  }
  static ggml_backend_t init(ggml_backend_dev_t device, const char*) {
    cpu = ggml_backend_init_by_type(GGML_BACKEND_DEVICE_TYPE_CPU, nullptr);
    auto* backend = new ggml_backend{};
    backend->iface.get_name = [](ggml_backend_t) { return "FAKE0"; };
    backend->iface.free = [](ggml_backend_t b) {
      ggml_backend_free(cpu);
      delete b;
    };
    backend->iface.graph_compute = compute;
    backend->device = device;
    return backend;
  }
  static ggml_status compute(ggml_backend_t, ggml_cgraph* graph) {
    first_nodes.emplace_back(ggml_graph_node(graph, 0), ggml_graph_node(graph, 0)->op_params[0]);
    std::string ops;
    for (int i = 0; i < ggml_graph_n_nodes(graph); ++i) {
      const ggml_op op = ggml_graph_node(graph, i)->op;
      ops += op == GGML_OP_SET_ROWS ? "w" : op == GGML_OP_FLASH_ATTN_EXT ? "a" : op == GGML_OP_SCALE ? "s" : "";
    }
    given.push_back(ops);
    return ggml_backend_graph_compute(cpu, graph);
  }
};

/// Fills the outputs that it takes with sevens.
struct Sevens : GpuAttention {
  static inline std::vector<size_t> takes;
  static inline size_t nodes = 0;
  static inline Way next = Way::kCut;
  static inline bool fails = false, ended = false, alive = false, records = true;

  Sevens() { alive = true; }
  ~Sevens() override { alive = false; }
  std::vector<size_t> begin(const GpuGraph& graph, const std::shared_ptr<const PluginOptions>&) override {
    nodes = graph.decode.size();
    ended = false;
    return takes;
  }
  void attend(const GpuGraph::Node& node) override {
    FakeGpu::given.emplace_back("ours");
    if (fails) throw std::runtime_error("no memory");
    auto* out = static_cast<float*>(node.match.out->data);
    std::fill_n(out, ggml_nelements(node.match.out), 7.0f);
  }
  void end() override { ended = true; }
  Way way(const GpuGraph&, const std::vector<size_t>&) override { return next; }
  void record() override { FakeGpu::given.emplace_back("record"); }
  bool recorded(bool whole) override {
    FakeGpu::given.emplace_back(whole ? "recorded" : "not recorded");
    return whole && records;
  }
  void replay() override { FakeGpu::given.emplace_back("replay"); }
  void flush() override {}
  void memory(int64_t& index_bytes, int64_t&) const override { index_bytes += 5; }
};

class Hook : public ::testing::Test {
 protected:
  static void SetUpTestSuite() {
    static ggml_backend_reg reg = {
        GGML_BACKEND_API_VERSION, {FakeGpu::name, FakeGpu::count, FakeGpu::get, nullptr}, nullptr};
    ggml_backend_load_all_from_path(TACTIC_TEST_LLAMA_BIN);
    ggml_backend_register(&reg);
    const MakeGpuAttention make = [](ggml_backend_t) -> std::unique_ptr<GpuAttention> {
      return std::make_unique<Sevens>();
    };
    hook_gpus("FAKE", make);
    hook_gpus("FAKE", make);  // again: no hook around the hook
  }
  void compute(Model& model, std::vector<size_t> takes, bool fails = false, Way way = Way::kCut) {
    Sevens::takes = std::move(takes);
    Sevens::fails = fails;
    Sevens::next = way;
    FakeGpu::given.clear();
    EXPECT_EQ(ggml_backend_graph_compute(backend_, model.graph()), GGML_STATUS_SUCCESS);
  }
  static float output(const Model& model, size_t layer) { return *static_cast<float*>(model.outputs[layer]->data); }
  void TearDown() override { ggml_backend_free(backend_); }

  ggml_backend_t backend_ = ggml_backend_dev_init(ggml_backend_dev_by_name("FAKE0"), nullptr);
};

TEST_F(Hook, CutsTheGraphAtWhatIsTaken) {
  Model model({}, 3);
  compute(model, {0, 2});
  EXPECT_THAT(FakeGpu::given, ElementsAre("ww", "ours", "swwasww", "ours", "s"));
  EXPECT_TRUE(Sevens::ended);
  EXPECT_EQ(output(model, 0), 14);
  EXPECT_EQ(output(model, 1), 0);
  EXPECT_EQ(output(model, 2), 14);
}

TEST_F(Hook, LeavesAGraphWholeOfWhichNothingIsTaken) {
  Model model({}, 2);
  compute(model, {});
  EXPECT_THAT(FakeGpu::given, ElementsAre("wwaswwas"));
  EXPECT_FALSE(Sevens::ended);
}

TEST_F(Hook, HasTheBackendComputeWhatFails) {
  Model model({}, 2);
  compute(model, {0, 1}, true);
  EXPECT_THAT(FakeGpu::given, ElementsAre("ww", "ours", "asww", "ours", "as"));
  EXPECT_EQ(output(model, 0), 0);
}

TEST_F(Hook, LooksAtAGraphAgainUnlessItIsTheSame) {
  Model one({}, 1), two({}, 2);
  one.graph()->uid = 1000001;
  two.graph()->uid = 1000002;
  for (int i = 0; i < 2; ++i) {
    compute(one, {});
    EXPECT_EQ(Sevens::nodes, 1u);
  }
  compute(two, {});
  EXPECT_EQ(Sevens::nodes, 2u);
  shared().set_options(parse_options("select=off"));
  compute(two, {});
  EXPECT_EQ(Sevens::nodes, 0u) << "under other options";
  shared().set_options({});
  one.graph()->uid = two.graph()->uid = 0;
  compute(two, {});
  compute(one, {});
  EXPECT_EQ(Sevens::nodes, 1u) << "a number that says nothing";
}

TEST_F(Hook, RecordsAGraphWholeAndReplaysIt) {
  Model model({}, 2);
  compute(model, {0, 1}, false, Way::kRecord);
  EXPECT_THAT(FakeGpu::given, ElementsAre("record", "ww", "ours", "sww", "ours", "s", "recorded", "replay"));
  EXPECT_TRUE(Sevens::ended);
  compute(model, {0, 1}, false, Way::kReplay);
  EXPECT_THAT(FakeGpu::given, ElementsAre("replay"));
}

TEST_F(Hook, RecordedPartsAreNewToTheBackendEachTime) {
  Model model({}, 2);
  std::set<std::pair<const ggml_tensor*, int32_t>> first_nodes;
  for (int i = 0; i < 2; ++i) {
    FakeGpu::first_nodes.clear();
    compute(model, {0, 1}, false, Way::kRecord);
    for (const auto& node : FakeGpu::first_nodes) first_nodes.insert(node);
  }
  EXPECT_EQ(first_nodes.size(), 6u);
}

TEST_F(Hook, CutsWhatCannotBeRecorded) {
  Model model({}, 1);
  compute(model, {0}, true, Way::kRecord);
  EXPECT_THAT(FakeGpu::given, ElementsAre("record", "ww", "ours", "not recorded", "ww", "ours", "as"));
  Sevens::records = false;
  compute(model, {0}, false, Way::kRecord);
  Sevens::records = true;
  EXPECT_THAT(FakeGpu::given, ElementsAre("record", "ww", "ours", "s", "recorded", "ww", "ours", "s"));
}

TEST_F(Hook, GoesWithTheBackend) {
  int64_t index = 0, kv = 0;
  gpu_memory(index, kv);
  EXPECT_EQ(index, 5);
  ggml_backend_free(backend_);
  EXPECT_FALSE(Sevens::alive);
  gpu_memory(index, kv);
  EXPECT_EQ(index, 5) << "no backend is left to ask";
  backend_ = ggml_backend_dev_init(ggml_backend_dev_by_name("FAKE0"), nullptr);
}

}  // namespace
}  // namespace tactic::plugin
