"""Decode attention on a GPU: dense baselines and selectors, alternating in one process on data that is cold in the caches.

A CUDA graph of several layers, each with K, V and an index of its own (together larger than L2), is replayed; the time of a
step is the graph's over its layers. Prints a table and writes JSON lines.

    python decode_bench.py --library libtactic-cuda-bench.so --out rows.jsonl [--shapes 1x32768,8x131072]
"""
import argparse
import ctypes
import itertools
import json
import math
import statistics
import time

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

Q_HEADS, KV_HEADS, DIM = 32, 8, 128
GROUP = Q_HEADS // KV_HEADS
TOPICS = 64


class Batch(ctypes.Structure):
    _fields_ = [("num_sequences", ctypes.c_int32), ("num_q_heads", ctypes.c_int32), ("num_kv_heads", ctypes.c_int32),
                ("head_dim", ctypes.c_int32), ("bf16", ctypes.c_int32), ("sm_scale", ctypes.c_float),
                ("k", ctypes.c_void_p), ("v", ctypes.c_void_p), ("sequence_stride_bytes", ctypes.c_int64),
                ("head_stride_bytes", ctypes.c_int64), ("token_stride_bytes", ctypes.c_int64), ("kv_lens", ctypes.c_void_p),
                ("q", ctypes.c_void_p), ("out", ctypes.c_void_p), ("layer", ctypes.c_int32), ("learn", ctypes.c_int32)]


class Options(ctypes.Structure):
    _fields_ = [("select", ctypes.c_char_p), ("tau", ctypes.c_float), ("refine", ctypes.c_float), ("target_mass", ctypes.c_float),
                ("budget", ctypes.c_int32), ("check_rows", ctypes.c_int32), ("cluster_tokens", ctypes.c_int32), ("outliers", ctypes.c_float)]


def load(path):
    lib = ctypes.CDLL(path)
    lib.bench_index.restype = lib.bench_decode.restype = ctypes.c_void_p
    lib.bench_index.argtypes = [ctypes.c_int32, ctypes.c_float] + [ctypes.c_int32] * 4
    lib.bench_build.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int32, ctypes.c_int32, ctypes.c_void_p]
    lib.bench_index_bytes.restype = ctypes.c_int64
    lib.bench_index_bytes.argtypes = lib.bench_free_index.argtypes = lib.bench_free_decode.argtypes = [ctypes.c_void_p]
    lib.bench_decode.argtypes = [ctypes.c_void_p] + [ctypes.c_int32] * 5
    lib.bench_run.argtypes = [ctypes.c_void_p] * 5
    return lib


def measured_bandwidth():
    """Bytes per second of reading, from a sum over 8 GiB."""
    x = torch.empty(2 << 30, dtype=torch.float32, device="cuda").normal_()
    times = []
    for _ in range(8):
        a, b = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        a.record()
        x.sum()
        b.record()
        b.synchronize()
        times.append(a.elapsed_time(b) * 1e-3)
    return x.numel() * 4 / statistics.median(times[2:])


def make_layer(batch, rows, deviation, seed):
    """Keys and values in runs around topics; scores of this standard deviation. 0.7 is flat attention, the hard case for reading little:
    sampling reads about tau rows then, whatever the clusters, and fit nearly all."""
    g = torch.Generator(device="cuda").manual_seed(seed)
    topics, meanings = (torch.randn(KV_HEADS, TOPICS, DIM, generator=g, device="cuda") for _ in range(2))
    k = torch.empty(batch, rows, KV_HEADS, DIM, dtype=torch.bfloat16, device="cuda")
    v = torch.empty_like(k)
    for b in range(batch):
        for at in range(0, rows, 32768):
            n = min(32768, rows - at)
            runs = torch.randint(0, TOPICS, (KV_HEADS, (n + 31) // 32), generator=g, device="cuda").repeat_interleave(32, 1)[:, :n]
            noise = torch.randn(KV_HEADS, n, DIM, generator=g, device="cuda")
            pick = runs.unsqueeze(-1).expand(-1, -1, DIM)
            k[b, at:at + n] = (0.7 * (torch.gather(topics, 1, pick) + noise)).transpose(0, 1)
            noise = torch.randn(KV_HEADS, n, DIM, generator=g, device="cuda")
            v[b, at:at + n] = (0.5 + torch.gather(meanings, 1, pick) + noise).transpose(0, 1)
    q = deviation * torch.randn(batch, KV_HEADS, GROUP, DIM, generator=g, device="cuda")
    return k, v, q.reshape(batch, Q_HEADS, DIM).to(torch.bfloat16)


class FlashInfer:
    """FlashInfer's batch decode over pages of 64 rows in order, planned once for all layers. Its kernels are compiled at first use,
    or taken from modules compiled beforehand."""
    PAGE = 64
    scratch = None

    def __init__(self, batch, rows, tensor_cores):
        import flashinfer
        if FlashInfer.scratch is None:
            FlashInfer.scratch = torch.zeros(256 << 20, dtype=torch.uint8, device="cuda")
        pages = rows // self.PAGE
        if pages * self.PAGE != rows:
            raise ValueError(f"{rows} rows are not whole pages of {self.PAGE}")
        ints = {"dtype": torch.int32, "device": "cuda"}
        self.wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
            FlashInfer.scratch, "NHD", use_cuda_graph=True, use_tensor_cores=tensor_cores, backend="fa2" if tensor_cores else "auto",
            paged_kv_indptr_buffer=torch.empty(batch + 1, **ints), paged_kv_indices_buffer=torch.empty(batch * pages, **ints),
            paged_kv_last_page_len_buffer=torch.empty(batch, **ints))
        self.wrapper.plan(torch.arange(batch + 1, dtype=torch.int32) * pages, torch.arange(batch * pages, **ints),
                          torch.full((batch,), self.PAGE, dtype=torch.int32), Q_HEADS, KV_HEADS, DIM, self.PAGE, pos_encoding_mode="NONE",
                          sm_scale=DIM ** -0.5, q_data_type=torch.bfloat16, kv_data_type=torch.bfloat16)
        torch.cuda.synchronize()

    def run(self, k, v, q, out):
        self.wrapper.run(q, (k.view(-1, self.PAGE, KV_HEADS, DIM), v.view(-1, self.PAGE, KV_HEADS, DIM)), out=out)


def graph_of(step, layers):
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for i in range(layers):
            step(i, stream.cuda_stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for i in range(layers):
            step(i, torch.cuda.current_stream().cuda_stream)
    return graph


def time_all(graphs, layers, repeats):
    """Alternating replays; microseconds per layer, by name: all of them."""
    times = {name: [] for name in graphs}
    for r in range(repeats + 2):
        for name, graph in graphs.items():
            a, b = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            a.record()
            graph.replay()
            b.record()
            b.synchronize()
            if r >= 2:
                times[name].append(a.elapsed_time(b) * 1e3 / layers)
    return times


def trace_errors(path):
    """Errors over all traces of a file, by tau, cluster size and outliers."""
    found = {}
    for line in open(path):
        row = json.loads(line)
        if row.get("trace") != "all traces" or not row["setting"].startswith("sample,"):
            continue
        options = dict(part.split("=") for part in row["setting"].split(",")[1:])
        if set(options) == {"tau", "cluster", "outliers"}:
            found[float(options["tau"]), int(options["cluster"]), float(options["outliers"])] = {
                "trace_error": row["mean_error"], "trace_p99_error": row["p99_error"], "trace_tokens": row["tokens_per_kv_head"]}
    return found


def run_shape(lib, batch, indexed, settings, args, bandwidth, emit):
    rows = indexed + args.recent   # the newest rows are in no cluster
    kv_bytes = batch * rows * KV_HEADS * DIM * 4
    layers = max(2, min(32, int(args.memory_gib * 2**30 / (kv_bytes * 1.15))))
    data = [make_layer(batch, rows, args.deviation, 100 + i) for i in range(layers)]
    outs = [torch.zeros_like(q) for _, _, q in data]
    lens = torch.full((batch,), rows, dtype=torch.int32, device="cuda")

    def batch_at(i):
        k, v, q = data[i]
        return Batch(batch, Q_HEADS, KV_HEADS, DIM, 1, DIM ** -0.5, k.data_ptr(), v.data_ptr(), rows * KV_HEADS * DIM * 2, DIM * 2,
                     KV_HEADS * DIM * 2, lens.data_ptr(), q.data_ptr(), outs[i].data_ptr(), i, 0)

    graphs, facts = {}, {}

    def sdpa(backend):
        def step(i, stream):
            k, v, q = data[i]
            with sdpa_kernel(backend):
                outs[i] = F.scaled_dot_product_attention(q.unsqueeze(2), k.transpose(1, 2), v.transpose(1, 2), enable_gqa=True).squeeze(2)
        return step

    reference = []
    for i in range(min(layers, 4)):
        k, v, q = data[i]
        qf = q[0].view(KV_HEADS, GROUP, DIM).float()
        s = torch.einsum("hgd,nhd->hgn", qf, k[0].float()) * DIM ** -0.5
        reference.append(torch.einsum("hgn,nhd->hgd", s.softmax(-1), v[0].float()).reshape(Q_HEADS, DIM))
        del s

    def error():
        errors = []
        for i, expected in enumerate(reference):
            got = outs[i][0].float()
            errors.append(((got - expected).norm(dim=-1) / expected.norm(dim=-1)).mean().item())
        return statistics.mean(errors)

    for name, backend in (("sdpa_cudnn", SDPBackend.CUDNN_ATTENTION), ("sdpa_flash", SDPBackend.FLASH_ATTENTION)):
        try:
            graphs[name] = graph_of(sdpa(backend), layers)
            facts[name] = {"bytes": kv_bytes}
        except Exception as e:  # a backend that does not take the shape
            print(f"{name}: {str(e).splitlines()[0]}", flush=True)

    kept = []   # what graphs read and write
    for tensor_cores in (False, True) if args.flashinfer else ():
        name = "flashinfer" + (" tensor cores" if tensor_cores else "")
        try:
            baseline = FlashInfer(batch, rows, tensor_cores)
            outs = [torch.zeros_like(q) for _, _, q in data]
            kept.append((baseline, outs))
            graphs[name] = graph_of(lambda i, s: baseline.run(*data[i], outs[i]), layers)
            graphs[name].replay()
            torch.cuda.synchronize()
            facts[name] = {"bytes": kv_bytes, "error": error()}
        except Exception as e:  # not installed, no compiler, or a shape that it does not take
            print(f"{name}: {str(e).splitlines()[0]}", flush=True)

    def decode_of(select, tau=0.0, refine=0.01, target_mass=0.0, budget=1024, checks=False, cluster_tokens=16, outliers=0.0, **_):
        options = Options(select.encode(), tau, refine, target_mass, budget, int(checks), cluster_tokens, outliers)
        decode = lib.bench_decode(ctypes.byref(options), batch, Q_HEADS, KV_HEADS, DIM, rows)
        if not decode:
            raise RuntimeError(f"no decode for {select}")
        return decode

    dense = decode_of("dense")
    outs = [torch.zeros_like(q) for _, _, q in data]   # those of sdpa belong to its graphs
    batches = [batch_at(i) for i in range(layers)]

    def run(decode, index_of, i, stream, records=None):
        if lib.bench_run(decode, index_of(i), ctypes.byref(batches[i]), stream, records):
            raise RuntimeError("launch failed")

    graphs["dense"] = graph_of(lambda i, s: run(dense, lambda _: None, i, s), layers)
    graphs["dense"].replay()
    torch.cuda.synchronize()
    facts["dense"] = {"bytes": kv_bytes, "error": error()}

    indexes, clustering = {}, {}
    for setting in settings:
        key = (setting["cluster_tokens"], setting["outliers"])
        if key not in indexes:
            indexes[key] = []
            build = []
            for i in range(layers):
                index = lib.bench_index(key[0], key[1], KV_HEADS, DIM, batch, rows)
                torch.cuda.synchronize()
                begin = time.perf_counter()
                for b in range(batch):
                    if lib.bench_build(index, ctypes.byref(batches[i]), b, indexed, torch.cuda.current_stream().cuda_stream):
                        raise RuntimeError("build failed")
                torch.cuda.synchronize()
                build.append(time.perf_counter() - begin)
                indexes[key].append(index)
            print(f"  clustering {batch} x {rows} tokens, size {key[0]}: {statistics.median(build) * 1e3:.2f} ms a layer, "
                  f"index {lib.bench_index_bytes(indexes[key][0]) / kv_bytes:.3%} of KV", flush=True)
            clustering[key] = statistics.median(build)
        own = indexes[key]
        decode = decode_of(**setting)
        records = torch.zeros(batch * KV_HEADS, lib.bench_record_bytes() // 4, dtype=torch.int32, device="cuda")
        tokens, refined, masses, probed = [], [], [], []
        for i in range(layers):
            batches[i].learn = setting["learn"]
        for i in range(min(layers, 4)):
            run(decode, lambda j: own[j], i, torch.cuda.current_stream().cuda_stream, records.data_ptr())
            torch.cuda.synchronize()
            r = records.cpu()
            # Columns of StepRecord: exact, selected and refined rows; refined clusters; probed keys; certain mass.
            tokens.append((r[:, 1] + r[:, 2] + r[:, 5]).float().mean().item())
            refined.append(r[:, 4].float().mean().item())
            probed.append(r[:, 6].float().mean().item())
            masses.append(r[:, 11].view(torch.float32).mean().item())
        name = setting["name"]
        graphs[name] = graph_of(lambda i, s: run(decode, lambda j: own[j], i, s), layers)
        graphs[name].replay()
        torch.cuda.synchronize()
        clusters = indexed / key[0]
        selected = statistics.mean(tokens)
        read = selected * (DIM * 4 + 2) + statistics.mean(probed) * DIM * 2 + clusters * (DIM + 12 + (2 * DIM + 16) / 16)
        facts[name] = {"bytes": int(batch * KV_HEADS * read), "error": error(), "tokens": selected, "probed": statistics.mean(probed),
                       "refined": statistics.mean(refined), "certain_mass": statistics.mean(masses), "clustering_ms": clustering[key] * 1e3,
                       **{field: value for field, value in setting.items() if field not in ("name", "select")}}

    times = time_all(graphs, layers, args.repeats)
    medians = {name: statistics.median(t) for name, t in times.items()}
    best = min((m, n) for n, m in medians.items() if n.startswith(("sdpa", "flashinfer")))
    for name, t in times.items():
        row = {"bench": "decode", "device": torch.cuda.get_device_name(), "commit": args.commit, "batch": batch, "kv_len": rows, "deviation": args.deviation, "layers": layers,
               "select": name, "us": medians[name], "us_min": min(t), "us_max": max(t), "speedup": best[0] / medians[name], "best_dense": best[1],
               "gbps": facts[name]["bytes"] / medians[name] * 1e-3, "bandwidth_share": facts[name]["bytes"] / medians[name] * 1e6 / bandwidth, **facts[name]}
        emit(row)
        print(f"  {name:30s} {medians[name]:8.2f} us  {row['speedup']:6.2f}x  {row['gbps']:6.0f} GB/s ({row['bandwidth_share']:.0%})"
              f"  error {row.get('error', float('nan')):.4f}  tokens {row.get('tokens', rows):.0f}  refined {row.get('refined', 0):.2f}", flush=True)
    del graphs
    for own in indexes.values():
        for index in own:
            lib.bench_free_index(index)
    torch.cuda.empty_cache()


def settings_of(args):
    """One for each selector, cluster size, value of what the selector is asked for, and of --sample-mass, --checks and --learn."""
    on_traces = trace_errors(args.trace_rows) if args.trace_rows else {}
    settings = []
    for select in args.selectors.split(","):
        knob, short, values = {"sample": ("tau", "tau", args.tau), "fit": ("target_mass", "mass", args.target_mass),
                               "topk": ("budget", "budget", args.budget)}[select]
        learns, masses = (args.learn, args.sample_mass) if select == "sample" else ("0", "0")
        for size, value, mass, checks, learn in itertools.product(args.sizes.split(","), values.split(","), masses.split(","), args.checks.split(","), learns.split(",")):
            verified = float(mass) > 0
            setting = {"name": f"{select} {short} {value} size {size}" + f" mass {mass}" * verified + " checks" * (checks == "1") + " learn" * (learn == "1"), "select": select,
                       "checks": checks == "1", "learn": learn == "1", "cluster_tokens": int(size), knob: int(value) if knob == "budget" else float(value),
                       "outliers": args.outliers, "recent": args.recent}
            if select == "sample":
                setting |= {"refine": args.refine, **({"target_mass": float(mass)} if verified else on_traces.get((float(value), int(size), args.outliers), {}))}
            settings.append(setting)
    return settings


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--library", required=True)
    parser.add_argument("--out", required=True)
    parser.add_argument("--shapes", default="1x32768,1x131072,1x524288,8x32768,8x131072")
    parser.add_argument("--sizes", default="16,32,64", help="tokens per cluster")
    parser.add_argument("--recent", type=int, default=64)
    parser.add_argument("--outliers", type=float, default=0.0025, help="share of a segment, as IndexOptions has it")
    parser.add_argument("--selectors", default="sample", help="sample,fit,topk: which are timed besides dense attention")
    parser.add_argument("--tau", default="1000", help="of sample")
    parser.add_argument("--sample-mass", default="0", help="of sample: share of the mass that a step reads on to; 0: none; 0,0.9: both")
    parser.add_argument("--target-mass", default="0.9", help="of fit")
    parser.add_argument("--budget", default="1024", help="of topk, rows per query head")
    parser.add_argument("--deviation", type=float, default=0.7, help="of scores: 0.7 is flat attention")
    parser.add_argument("--refine", type=float, default=0.01)
    parser.add_argument("--checks", default="0", help="1: rows are compared with their check values; 0,1: both")
    parser.add_argument("--learn", default="0", help="1: sampling steps learn, and follow heads that copy; 0,1: both")
    parser.add_argument("--trace-rows", help="rows of tactic eval trace of the same settings, sample,tau=T,cluster=S,outliers=O, on real keys")
    parser.add_argument("--flashinfer", action="store_true", help="FlashInfer's batch decode among the baselines")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--memory-gib", type=float, default=40)
    parser.add_argument("--commit", default="")
    args = parser.parse_args()
    lib = load(args.library)
    bandwidth = measured_bandwidth()
    print(f"{torch.cuda.get_device_name()}, reads {bandwidth * 1e-12:.2f} TB/s, torch {torch.__version__}", flush=True)
    with open(args.out, "a") as out:
        def emit(row):
            out.write(json.dumps(row) + "\n")
            out.flush()
        for shape in args.shapes.split(","):
            batch, rows = map(int, shape.split("x"))
            print(f"batch {batch}, kv_len {rows}", flush=True)
            run_shape(lib, batch, rows, settings_of(args), args, bandwidth, emit)


if __name__ == "__main__":
    main()
