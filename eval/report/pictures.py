"""One function per picture: takes rows, returns a figure or None when there is nothing to show."""

import io
import math

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import matplotlib.ticker

from .rows import error_rows, kl_rows, method_of, places, table, task_rows, texts

MARKERS = "osD^v<>Pp*XhH8d"
ORDER = ["sample", "fit", "topk", "oracle_topp", "oracle_topk", "cluster_topk", "position_topk", "quest", "snapkv", "pyramidkv",
         "adasnapkv", "magicpig", "retroinfer", "vattention", "recent_only"]


def png(figure):
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110, bbox_inches="tight", metadata={"Software": None})
    plt.close(figure)
    return buffer.getvalue()


def panels(count, width=5.2, height=4.2, columns=3):
    """A figure and `count` axes, rows of at most `columns`."""
    across = min(count, columns)
    down = -(-count // across)
    figure, axes = plt.subplots(down, across, figsize=(width * across, height * down), squeeze=False, layout="constrained")
    axes = list(axes.flat)
    for axis in axes[count:]:
        axis.remove()
    return figure, axes[:count]


def rank(name):
    base = name.split(",")[0]
    return ORDER.index(base) if base in ORDER else len(ORDER)


def methods(rows):
    found = dict.fromkeys(method_of(row["setting"]) for row in rows)
    return sorted(found, key=lambda name: (rank(name), name))


def style(name):
    number = rank(name)
    ours = name in ("sample", "fit", "topk")
    return {"color": plt.get_cmap("tab20")(number % 20), "marker": MARKERS[number % len(MARKERS)], "markersize": 4,
            "linewidth": 2.2 if name == "sample" else 1.2,
            "linestyle": "--" if name.startswith("oracle") else ":" if "," in name else "-", "zorder": 3 if ours else 2}


def draw_frontier(axis, rows, key, title, ylabel):
    for name in methods(rows):
        points = sorted((row["read_fraction"], row[key]) for row in rows if method_of(row["setting"]) == name)
        points = [(x, y) for x, y in points if y > 0]
        if points:
            axis.plot(*zip(*points), label=name, **style(name))
    axis.set(xscale="log", yscale="log", title=title, xlabel="read fraction (K, V and index)", ylabel=ylabel)
    axis.set_xticks([0.02, 0.05, 0.1, 0.2, 0.5, 1], ["0.02", "0.05", "0.1", "0.2", "0.5", "1"])
    axis.xaxis.set_minor_formatter(matplotlib.ticker.NullFormatter())
    axis.grid(True, which="both", alpha=0.2)


def frontier(rows):
    """Error on traces and KL end to end against what is read, one panel a text and depth."""
    errors, kls = error_rows(rows), kl_rows(rows)
    spots = [(errors, place, "mean_error", "mean error of attention") for place in places(errors)]
    spots += [(kls, place, "mean_kl", "mean KL, end to end") for place in places(kls)]
    if not spots:
        return None
    figure, axes = panels(len(spots))
    for axis, (source, place, key, label) in zip(axes, spots):
        draw_frontier(axis, [row for row in source if row["place"] == place], key, place, label)
    lines = {label: line for axis in axes for line, label in zip(*axis.get_legend_handles_labels())}
    figure.legend(lines.values(), lines.keys(), loc="outside right upper", fontsize=8)
    return figure


def by_layer(rows):
    """Mean error by layer, of each method at the setting nearest to a tenth of the bytes."""
    measured = [row for row in error_rows(rows) if row.get("error_by_layer")]
    if not measured:
        return None
    figure, axes = panels(len(texts(measured)))
    for axis, text in zip(axes, texts(measured)):
        own = [row for row in measured if row["text"] == text]
        for name in methods(own):
            row = min((r for r in own if method_of(r["setting"]) == name), key=lambda r: abs(math.log(r["read_fraction"] / 0.1)))
            errors = [error or math.nan for error in row["error_by_layer"]]  # null, in old rows 0: not measured
            axis.plot(errors, label=f"{row['setting']} ({row['read_fraction']:.3f})", **style(name))
        axis.set(yscale="log", title=text, xlabel="layer", ylabel="mean error of attention")
        axis.grid(True, alpha=0.2)
        axis.legend(fontsize=6, bbox_to_anchor=(0.5, -0.2), loc="upper center", ncols=2)
    return figure


def table1(rows):
    rows = table(rows, "table1")
    if not rows:
        return None
    figure, axes = panels(len(texts(rows)))
    for axis, text in zip(axes, texts(rows)):
        own = [row for row in rows if row["text"] == text]
        mass = [row["target_mass"] for row in own]
        for key in ("oracle", "clusters", "fit"):
            line, = axis.plot(mass, [row[key] for row in own], marker="o", label=f"{key}, {own[0]['model']}")
            known = [row for row in own if "paper" in row]
            axis.plot([row["target_mass"] for row in known], [row["paper"][key] for row in known], marker="x", linestyle=":",
                      color=line.get_color(), label=f"{key}, paper ({known[0]['paper']['model']})")
        axis.set(yscale="log", title=text, xlabel="target mass P", ylabel="rows per head")
        axis.legend(fontsize=7)
        axis.grid(True, alpha=0.2)
    return figure


def value_norms(rows):
    rows = table(rows, "value_norms")
    if not rows:
        return None
    figure, axes = panels(len(texts(rows)))
    for axis, text in zip(axes, texts(rows)):
        own = [row for row in rows if row["text"] == text]
        layers = [row["layer"] for row in own]
        for number, (q, _) in enumerate(own[0]["quantiles"]):
            axis.plot(layers, [row["quantiles"][number][1] for row in own], label=f"{100 * q:g}%")
        axis.set(yscale="log", title=text, xlabel="layer", ylabel="|v| over its median")
        axis.legend(fontsize=7)
        axis.grid(True, alpha=0.2)
    return figure


def sparsity(rows):
    heads, queries = table(rows, "sparsity_head"), table(rows, "sparsity_query")
    if not heads:
        return None
    names = texts(heads)
    figure, axes = panels(len(names) + 1)
    for axis, text in zip(axes, names):
        own = [row for row in heads if row["text"] == text]
        layers = sorted({row["layer"] for row in own})
        grid = [[row["tokens"] for row in own if row["layer"] == layer] for layer in layers]
        picture = axis.imshow(grid, aspect="auto", norm=matplotlib.colors.LogNorm(vmin=1), cmap="viridis")
        axis.set(title=f"{text}: rows of the oracle at 0.9", xlabel="query head", ylabel="layer")
        figure.colorbar(picture, ax=axis)
    for text in names:
        own = sorted((row["position"], row["tokens"]) for row in queries if row["text"] == text)
        axes[-1].plot(*zip(*own), marker="o", label=text)
    axes[-1].set(title="by query", xlabel="position", ylabel="rows of the oracle at 0.9, mean over heads")
    axes[-1].legend()
    return figure


def distance(rows):
    rows = table(rows, "distance")
    if not rows:
        return None
    figure, axes = panels(len(texts(rows)))
    for axis, text in zip(axes, texts(rows)):
        for order in ("oracle", "clusters", "quest"):
            own = [row for row in rows if row["text"] == text and row["order"] == order]
            axis.plot([row["mass"] for row in own], [row["error"] for row in own], marker="o", label=order)
        axis.set(title=text, xlabel="mass achieved P", ylabel="distance to full attention, relative")
        axis.legend()
        axis.grid(True, alpha=0.2)
    return figure


def clusters(rows):
    rows = table(rows, "clusters")
    if not rows:
        return None
    figure, axes = panels(3)
    for text in texts(rows):
        own = [row for row in rows if row["text"] == text]
        sizes = sorted((row["cluster_tokens"], row["wcss_share"], row["tokens"]) for row in own if row["iterations"] == 10)
        axes[0].plot([1 / s for s, _, _ in sizes], [share for _, share, _ in sizes], marker="o", label=text)
        axes[1].plot([s for s, _, _ in sizes], [tokens for _, _, tokens in sizes], marker="o", label=text)
        rounds = sorted((row["iterations"], row["tokens"]) for row in own if row["cluster_tokens"] == 32)
        axes[2].plot(*zip(*rounds), marker="o", label=text)
    axes[0].set(xscale="log", title="WCSS", xlabel="clusters per row", ylabel="share of the keys' variance left")
    axes[1].set(xscale="log", title="cluster size", xlabel="rows per cluster", ylabel="rows in cluster order at 0.9")
    axes[2].set(title="iterations, 32 rows per cluster", xlabel="k-means iterations", ylabel="rows in cluster order at 0.9")
    for axis in axes:
        axis.grid(True, alpha=0.2)
        axis.legend(fontsize=8)
    return figure


def kl_against_distance(rows):
    rows = [row for row in kl_rows(rows) if row.get("attention_error")]
    if not rows:
        return None
    figure, (axis,) = panels(1, 6.5)
    for name in methods(rows):
        points = sorted((row["attention_error"], row["mean_kl"]) for row in rows if method_of(row["setting"]) == name)
        axis.plot(*zip(*points), label=name, **(style(name) | {"linestyle": ""}))
    axis.set(xscale="log", yscale="log", xlabel="mean error of attention, end to end", ylabel="mean KL against exact attention")
    axis.legend(fontsize=8, bbox_to_anchor=(1.02, 1), loc="upper left")
    axis.grid(True, which="both", alpha=0.2)
    return figure


def score_against_kl(rows):
    """One point a task and mode: what it scores less than exact attention, and its KL at the answer's tokens. A task of
    one haystack has no interval and no point; how many these are stands above."""
    all_rows = [row for row in task_rows(rows) if row.get("kl")]
    kinds = [(key, label) for key, label in (("score_minus", "score"), ("logprob_minus", "log-probability of the answer"))
             if any(key + "_95" in row for row in all_rows)]
    if not kinds:
        return None
    figure, axes = panels(len(kinds))
    for axis, (key, label) in zip(axes, kinds):
        rows = [row for row in all_rows if key + "_95" in row]
        if len(rows) < len(all_rows):
            axis.set_title(f"{len(all_rows) - len(rows)} of {len(all_rows)} without an interval left out", fontsize=8)
        for number, mode in enumerate(dict.fromkeys(row["mode"] for row in all_rows)):
            own = [row for row in rows if row["mode"] == mode]
            if not own:
                continue
            middle = [row[key] for row in own]
            reach = [[row[key] - row[key + "_95"][0] for row in own], [row[key + "_95"][1] - row[key] for row in own]]
            axis.errorbar([row["kl"] for row in own], middle, yerr=reach, label=mode, linestyle="", capsize=2, elinewidth=0.8,
                          color=plt.get_cmap("tab10")(number % 10), marker=MARKERS[number % len(MARKERS)], markersize=4)
        axis.axhline(0, color="gray", linewidth=0.8)
        axis.set(xscale="log", xlabel="mean KL at the answer's tokens; a point a task, 95% intervals", ylabel=f"{label}, minus exact")
        axis.grid(True, which="both", alpha=0.2)
    axes[0].legend(fontsize=8)
    return figure


PICTURES = [
    ("frontier", "The frontier: error and KL against what is read", frontier),
    ("error_by_layer", "Error by layer, each method near a tenth of the bytes", by_layer),
    ("table1", "Rows needed for a target mass (Table 1)", table1),
    ("value_norms", "Norms of values", value_norms),
    ("kl_against_distance", "KL against attention distance", kl_against_distance),
    ("score_against_kl", "Task score against KL", score_against_kl),
    ("sparsity", "Sparsity by layer, head and query", sparsity),
    ("distance", "Distance to full attention against the mass reached: Quest's budgets, clusters, oracle", distance),
    ("clusters", "Clusters: WCSS, size, iterations", clusters),
]
