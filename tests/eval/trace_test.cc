// Traces: what is written is read back bit for bit, and damage is named.
#include "trace.h"

#include <sys/stat.h>
#include <unistd.h>

#include <cstdio>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <limits>

#include "part_file.h"
#include "support.h"
#include "tactic/error.h"

namespace tactic::test {
namespace {

using namespace tactic::eval;
using ::testing::AllOf;
using ::testing::HasSubstr;

class TraceTest : public ::testing::Test {
 protected:
  void SetUp() override {
    folder = std::filesystem::temp_directory_path() / ("tactic_trace_test_" + std::to_string(getpid()));
    std::filesystem::create_directories(folder);
    path = (folder / "trace").string();
    info.model = "model";
    info.text = "text \xC3\xA9";
    info.kv_len = 40;
    info.prompt_len = 30;
    info.positions = {28, 29, 30, 39};
    info.kinds = {QueryKind::kPrompt, QueryKind::kPrompt, QueryKind::kDecode, QueryKind::kDecode};
    info.layers = {{0, 6, 2, 32, 16, DType::kF16, DType::kF16, 0.25f, 0},
                   {1, 2, 1, 64, 64, DType::kQ8_0, DType::kBF16, 0.125f, 8},
                   {5, 1, 1, 16, 16, DType::kF32, DType::kF32, 1.0f, 0}};
  }
  void TearDown() override { std::filesystem::remove_all(folder); }

  int64_t files() const { return std::distance(std::filesystem::directory_iterator(folder), {}); }

  // Rows of small values: every 16-bit pattern below 0x3C00 is a finite f16 and bf16.
  std::vector<std::byte> rows(DType dtype, int32_t heads, int32_t dim, uint64_t seed) const {
    std::vector<std::byte> bytes(static_cast<size_t>(heads * info.kv_len) * row_bytes(dtype, dim));
    Random random(seed);
    for (size_t i = 0; i + 1 < bytes.size(); i += 2) {
      const auto value = static_cast<uint16_t>(random.below(0x3C00));
      std::memcpy(&bytes[i], &value, 2);
    }
    if (dtype == DType::kQ8_0) return std::vector<std::byte>(bytes.size(), std::byte{0x11});
    return bytes;
  }
  struct Data {
    std::vector<std::byte> k, v;
    std::vector<float> q;
  };
  Data data(size_t i) const {
    const TraceLayerInfo& layer = info.layers[i];
    Data d{rows(layer.k_dtype, layer.num_kv_heads, layer.head_dim, i),
           rows(layer.v_dtype, layer.num_kv_heads, layer.v_head_dim, i + 9),
           {}};
    Random random(i + 77);
    for (int64_t n = info.num_queries() * layer.num_q_heads * layer.head_dim; n > 0; --n)
      d.q.push_back(random.normal());
    return d;
  }
  void write() const {
    TraceWriter writer(path, info);
    for (const size_t i : {size_t{2}, size_t{0}, size_t{1}}) {
      const Data d = data(i);
      writer.write_layer(static_cast<int32_t>(i), d.k, d.v, d.q);
    }
    writer.finish();
  }
  // Overwrites bytes of the file.
  template <class T>
  void patch(uint64_t offset, T value) const {
    std::fstream file(path, std::ios::in | std::ios::out | std::ios::binary);
    file.seekp(static_cast<std::streamoff>(offset));
    file.write(reinterpret_cast<const char*>(&value), sizeof value);
  }
  uint64_t offset_of(int layer, int part) const {  // part 0: K, 1: V, 2: Q
    std::ifstream file(path, std::ios::binary);
    uint64_t offset = 0;
    file.seekg(64 + layer * 64 + 40 + part * 8);
    file.read(reinterpret_cast<char*>(&offset), 8);
    return offset;
  }
  std::string error(int32_t layer = -1) const {
    try {
      const Trace trace(path);
      if (layer >= 0) trace.layer(layer);
    } catch (const Error& e) {
      return e.what();
    }
    return "";
  }

  std::filesystem::path folder;
  std::string path;
  TraceInfo info;
};

TEST_F(TraceTest, ReadsBackWhatWasWritten) {
  write();
  EXPECT_EQ(files(), 1);
  const Trace trace(path);
  EXPECT_EQ(trace.info().model, info.model);
  EXPECT_EQ(trace.info().text, info.text);
  EXPECT_EQ(trace.info().prompt_len, 30);
  EXPECT_EQ(trace.info().positions, info.positions);
  EXPECT_EQ(trace.info().kinds, info.kinds);
  EXPECT_EQ(trace.info().layers, info.layers);
  for (size_t i = 0; i < info.layers.size(); ++i) {
    const TraceLayer layer = trace.layer(static_cast<int32_t>(i));
    const Data d = data(i);
    const TraceLayerInfo& shape = info.layers[i];
    EXPECT_TRUE(std::equal(layer.q.begin(), layer.q.end(), d.q.begin(), d.q.end()));
    const size_t k_row = row_bytes(shape.k_dtype, shape.head_dim), v_row = row_bytes(shape.v_dtype, shape.v_head_dim);
    for (int64_t head = 0; head < shape.num_kv_heads; ++head) {
      for (int64_t row = 0; row < info.kv_len; ++row) {
        const auto at = static_cast<size_t>(head * info.kv_len + row);
        ASSERT_EQ(std::memcmp(layer.kv.k.row(head, row), &d.k[at * k_row], k_row), 0);
        ASSERT_EQ(std::memcmp(layer.kv.v.row(head, row), &d.v[at * v_row], v_row), 0);
      }
    }
    EXPECT_EQ(layer.query(3), layer.q.data() + 3 * shape.num_q_heads * shape.head_dim);
    EXPECT_EQ(layer.kv.kv_len, 40);
  }
}

TEST_F(TraceTest, QueriesAreCausalAndStayInTheWindow) {
  write();
  const Trace trace(path);
  EXPECT_EQ(trace.layer(0).visible(3).begin, 0);
  EXPECT_EQ(trace.layer(0).visible(3).end, 40);
  EXPECT_EQ(trace.layer(0).visible(0).end, 29);
  EXPECT_EQ(trace.layer(1).visible(3).begin, 32);
  EXPECT_EQ(trace.layer(1).visible(3).end, 40);
}

TEST_F(TraceTest, DamagedFilesAreRefused) {
  EXPECT_THAT(error(), AllOf(HasSubstr(path), HasSubstr("cannot be read")));
  write();
  EXPECT_EQ(error(), "");
  const auto whole = std::filesystem::file_size(path);
  std::filesystem::resize_file(path, whole - 64);
  EXPECT_THAT(error(), AllOf(HasSubstr(path), HasSubstr("cut short"), HasSubstr(std::to_string(whole)),
                             HasSubstr(std::to_string(whole - 64))));
  std::filesystem::resize_file(path, 40);
  EXPECT_THAT(error(), HasSubstr("not a trace"));
  std::filesystem::resize_file(path, 0);
  EXPECT_THAT(error(), HasSubstr("empty"));
  write();
  patch(0, 'X');
  EXPECT_THAT(error(), HasSubstr("not a trace"));
  write();
  patch(8, uint32_t{2});
  EXPECT_THAT(error(), AllOf(HasSubstr("version (2)"), HasSubstr("1")));
  write();
  patch(12, uint32_t{0x7FFFFFFF});
  EXPECT_THAT(error(), HasSubstr("num_layers (2147483647)"));
  write();
  patch(48, int64_t{-1});
  EXPECT_THAT(error(), HasSubstr("num_queries (-1)"));
  write();
  patch(32, int64_t{4100});
  EXPECT_THAT(error(), HasSubstr("must be aligned to 64 and end by"));
  write();
  patch(64 + 4, int32_t{7});
  EXPECT_THAT(error(), AllOf(HasSubstr("num_q_heads of layer 0 (7)"), HasSubstr("num_kv_heads (2)")));
  write();
  patch(64 + 20, uint32_t{9});
  EXPECT_THAT(error(), HasSubstr("dtype (9)"));
  write();
  patch(64 + 64 + 48, uint64_t{1} << 60);
  EXPECT_THAT(error(), HasSubstr("V of layer 1"));
}

TEST_F(TraceTest, ValuesThatAreNotFiniteAreNamed) {
  write();
  patch(offset_of(0, 0) + (40 * 32 + 3 * 32 + 5) * 2, uint16_t{0x7E00});  // head 1, row 3, element 5
  EXPECT_EQ(error(), "");                                                 // the other layers can be read
  EXPECT_EQ(error(1), "");
  EXPECT_THAT(error(0), AllOf(HasSubstr(path), HasSubstr("K of layer 0, KV head 1, row 3, element 5")));
  write();
  patch(offset_of(1, 0) + 7 * 68 + 34, uint16_t{0x7C00});  // the scale of a quantized block
  EXPECT_THAT(error(1), HasSubstr("K of layer 1, KV head 0, row 7, element 32"));
  write();
  patch(offset_of(1, 1) + 2 * 64 * 2, uint16_t{0xFF80});
  EXPECT_THAT(error(1), HasSubstr("V of layer 1, KV head 0, row 2, element 0"));
  write();
  patch(offset_of(2, 2) + (1 * 16 + 4) * 4, std::numeric_limits<float>::infinity());
  EXPECT_THAT(error(2), HasSubstr("Q of layer 2, query 1, head 0, element 4"));
}

TEST_F(TraceTest, WriterRefusesWhatCannotBeRead) {
  const auto refused = [&](const TraceInfo& bad) {
    try {
      TraceWriter(path, bad);
    } catch (const Error& e) {
      return std::string(e.what());
    }
    return std::string();
  };
  TraceInfo bad = info;
  bad.positions = {29, 28, 30, 39};
  EXPECT_THAT(refused(bad), HasSubstr("position of query 1 (28)"));
  bad = info;
  bad.kinds[2] = QueryKind::kPrompt;
  EXPECT_THAT(refused(bad), AllOf(HasSubstr("prompt query 2 (30)"), HasSubstr("prompt_len (30)")));
  bad = info;
  bad.layers[1].head_dim = 48;
  EXPECT_THAT(refused(bad), AllOf(HasSubstr("head_dim of layer 1 (48)"), HasSubstr("32")));
  bad = info;
  bad.layers[0].sm_scale = 0;
  EXPECT_THAT(refused(bad), HasSubstr("sm_scale of layer 0"));
  {
    TraceWriter writer(path, info);
    const Data d = data(0);
    writer.write_layer(0, d.k, d.v, d.q);
    EXPECT_THROW(writer.write_layer(1, d.k, d.v, d.q), Error);
    EXPECT_THROW(writer.finish(), Error);
  }
  EXPECT_EQ(files(), 0);
}

TEST_F(TraceTest, TwoWritersOfOnePathDoNotMeet) {
  const mode_t mask = umask(027);
  {
    TraceWriter first(path, info), second(path, info);
    for (const int32_t i : {0, 1, 2}) {
      const Data d = data(static_cast<size_t>(i));
      for (TraceWriter* writer : {&first, &second}) writer->write_layer(i, d.k, d.v, d.q);
    }
    first.finish();
    EXPECT_EQ(Trace(path).num_layers(), 3);
    EXPECT_EQ(files(), 2);
    remove_unfinished_file();  // the second's
    EXPECT_EQ(files(), 1);
    EXPECT_THROW(second.finish(), Error);
  }
  umask(mask);
  EXPECT_EQ(Trace(path).num_layers(), 3);
  EXPECT_EQ(files(), 1);
  EXPECT_EQ(static_cast<int>(std::filesystem::status(path).permissions()), 0640);
}

// Running as root, a rename would put a file in a device's place.
TEST_F(TraceTest, GoesWhereALinkLeadsAndReplacesNoDevice) {
  namespace fs = std::filesystem;
  EXPECT_THROW(TraceWriter("/dev/null", info), Error);
  EXPECT_THROW(TraceWriter(fs::temp_directory_path().string(), info), Error);
  EXPECT_TRUE(fs::is_character_file("/dev/null"));
  const std::string link = path + ".link", file = path;
  fs::create_symlink(fs::path(path).filename(), link);  // relative, and it leads nowhere yet
  path = link;
  write();
  EXPECT_TRUE(fs::is_symlink(link));
  EXPECT_TRUE(fs::is_regular_file(file));
  fs::remove(link);
  fs::create_symlink(link, link);
  EXPECT_THROW(TraceWriter(link, info), Error);
  fs::remove(link);
  path = file;
}

}  // namespace
}  // namespace tactic::test
