// A fixed number of rows over ranked clusters (Tactic, arXiv 2502.12216, section 4.1 and the ablation "Tactic-topK"):
// per query head clusters by falling q.centroid, rows until there are `budget`; the group reads the union.
// cluster_topk: k-means over the whole prompt, as the paper. position_topk: runs of `cluster` neighbors, its ablation.
// Reads all centroids in the key's type, and two bytes for each row listed by a k-means cluster.
#include "baselines/common.h"

namespace tactic::eval {

namespace {

class ClusterTopK : public Baseline {
 public:
  ClusterTopK(const BaselineSpec& spec, const Layer& layer) : spec_(spec), open_(prompt_rows(spec, layer)) {
    for (int32_t head = 0; head < layer.kv.num_kv_heads; ++head) {
      heads_.push_back(by_position() ? cluster_positions(layer, head, open_, spec.count("cluster"))
                                     : cluster_keys(layer, head, open_, spec.count("cluster"),
                                                    static_cast<int32_t>(spec.count("iterations")), 65536));
    }
  }

  void select(const Step& step, Choice& out) override {
    Marks marks(step, open_);
    for (int32_t h = 0; h < step.num_q_heads(); ++h) {
      const Clusters& clusters = heads_[static_cast<size_t>(h / step.group_size())];
      int64_t left = spec_.count("budget");
      for (const int32_t c : largest(clusters.dots(step.q(h)), clusters.size())) {
        for (const int32_t row : clusters.members[static_cast<size_t>(c)]) {
          if (left-- > 0) marks.set(h / step.group_size(), row);
        }
        if (left <= 0) break;
      }
    }
    marks.write(out);
    for (const Clusters& clusters : heads_) out.summary_bytes += clusters.size() * step.rows().k_bytes();
    const int64_t exact = step.rows().num_kv_heads() * (step.kv_len() - open_.size());
    if (!by_position()) out.summary_bytes += 2 * (out.tokens() - exact);
  }

 private:
  bool by_position() const { return spec_.name == "position_topk"; }

  BaselineSpec spec_;
  Range open_;
  std::vector<Clusters> heads_;
};

}  // namespace

std::unique_ptr<Baseline> make_clusters(const BaselineSpec& spec, const Layer& layer) {
  return std::make_unique<ClusterTopK>(spec, layer);
}

}  // namespace tactic::eval
