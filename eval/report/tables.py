"""Tables as lists of rows of text, the first the header."""

import math

from .pictures import methods
from .rows import error_rows, kl_interval, kl_rows, method_of, places, table, task_rows


def markdown(cells):
    lines = ["| " + " | ".join(row) + " |" for row in cells]
    return "\n".join([lines[0], "|" + "---|" * len(cells[0])] + lines[1:])


def percent(x):
    return f"{100 * x:.1f}%"


def by_method(rows):
    order = methods(rows)
    return sorted(rows, key=lambda row: (row["text"], row.get("depth", 0), order.index(method_of(row["setting"])), row["read_fraction"]))


def frontier(rows):
    cells = [["text", "method and setting", "rows per KV head", "read fraction", "mean error", "p99", "worst layer, head: mean",
              "worst step: max"]]
    for row in by_method(error_rows(rows)):
        head, step = row["worst_head"], row["max_at"]
        cells.append([row["text"], row["setting"], f"{row['tokens_per_kv_head']:.0f}", f"{row['read_fraction']:.3f}",
                      f"{row['mean_error']:.4f}", f"{row['p99_error']:.3f}", f"{head['layer']}, {head['head']}: {head['mean_error']:.3f}",
                      f"{step['position']}: {row['max_error']:.2f}"])
    return cells


def kl(rows):
    cells = [["text", "depth", "method and setting", "rows per KV head", "read fraction", "mean KL", "95% interval", "p99", "worst step",
              "same top token"]]
    for row in by_method(kl_rows(rows)):
        interval = "{:.4f}-{:.4f}".format(*found) if (found := kl_interval(row)) else "-"
        cells.append([row["text"], str(row["depth"]), row["setting"], f"{row['tokens_per_kv_head']:.0f}", f"{row['read_fraction']:.3f}",
                      f"{row['mean_kl']:.4f}", interval, f"{row['p99_kl']:.3f}", f"{row['max_kl']:.3f}", percent(row["same_top"])])
    return cells


FRACTIONS = (0.1, 0.15, 0.2, 0.3)


def at_fraction(points, fraction):
    """Log-log between the two nearest points (read fraction, y); None outside of them."""
    points = sorted(points)
    for (x0, y0), (x1, y1) in zip(points, points[1:]):
        if x0 <= fraction <= x1 and x0 < x1 and y0 > 0 and y1 > 0:
            share = math.log(fraction / x0) / math.log(x1 / x0)
            return math.exp(math.log(y0) + share * math.log(y1 / y0))
    return None


def equal_read(rows):
    """What each method errs when it reads as much as the others."""
    cells = [["measure", "text", "method"] + [f"reading {percent(f)}" for f in FRACTIONS]]
    for measure, source, key in (("mean error", error_rows(rows), "mean_error"), ("mean KL", kl_rows(rows), "mean_kl")):
        for place in places(source):
            own = [row for row in source if row["place"] == place]
            for name in methods(own):
                points = [(row["read_fraction"], row[key]) for row in own if method_of(row["setting"]) == name]
                found = [at_fraction(points, f) for f in FRACTIONS]
                if any(found):
                    cells.append([measure, place, name] + [f"{y:.4f}" if y else "-" for y in found])
    return cells


def table1(rows):
    cells = [["model", "text", "P", "oracle", "clusters", "fit", "mass", "success", "paper's model", "oracle", "clusters", "fit", "mass",
              "success"]]
    for row in table(rows, "table1"):
        line = [row["model"], row["text"], percent(row["target_mass"]), f"{row['oracle']:.0f}", f"{row['clusters']:.0f}", f"{row['fit']:.0f}",
                percent(row["achieved_mass"]), percent(row["success"])]
        paper = row.get("paper")
        line += [paper["model"], f"{paper['oracle']:.0f}", f"{paper['clusters']:.0f}", f"{paper['fit']:.0f}", percent(paper["achieved_mass"]),
                 percent(paper["success"])] if paper else ["-"] * 6
        cells.append(line)
    return cells


def tasks(rows):
    cells = [["task", "mode", "items", "haystacks", "score", "minus exact (95%)", "log-probability minus exact (95%)", "KL", "read fraction"]]

    def minus(row, name):
        if name not in row:
            return "-"
        if name + "_95" not in row:  # one haystack
            return f"{row[name]:+.3f}"
        low, high = row[name + "_95"]
        return f"{row[name]:+.3f} ({low:+.3f} to {high:+.3f})" + ("" if low <= 0 <= high else " *")

    def figure(row, name, digits):
        return "-" if row.get(name) is None else f"{row[name]:.{digits}f}"

    for row in task_rows(rows):
        cells.append([row["task"], row["mode"], str(row["n"]), str(row["haystacks"]), f"{row['score']:.3f}", minus(row, "score_minus"),
                      minus(row, "logprob_minus"), figure(row, "kl", 4), figure(row, "read_fraction", 3)])
    return cells


def curves(rows):
    cells = [["text", "curve", "P", "rows", "mass", "success"]]
    for row in table(rows, "curves"):
        cells.append([row["text"], row["curve"], percent(row["target_mass"]), f"{row['tokens']:.0f}", percent(row["achieved_mass"]),
                      percent(row["success"])])
    return cells


def clusters(rows):
    cells = [["text", "rows per cluster", "iterations", "WCSS over variance", "rows in cluster order at 0.9"]]
    for row in table(rows, "clusters"):
        cells.append([row["text"], str(row["cluster_tokens"]), str(row["iterations"]), f"{row['wcss_share']:.3f}", f"{row['tokens']:.0f}"])
    return cells


def union(rows):
    cells = [["text", "rows of a head's own set", "rows of the union", "error, own", "error, union", "loads per row without union",
              "paper, at most"]]
    for row in table(rows, "union"):
        paper = row["paper"]
        cells.append([row["text"], f"{row['rows_own']:.0f}", f"{row['rows_union']:.0f}", f"{row['error_own']:.4f}", f"{row['error_union']:.4f}",
                      f"{row['loads_per_row']:.2f}", f"{paper['loads_per_row_at_most']} ({paper['model']})"])
    return cells


TABLES = [
    ("Table 1: rows per query head for a target mass", table1),
    ("The frontier at equal reading", equal_read),
    ("The frontier on traces", frontier),
    ("The frontier end to end", kl),
    ("Tasks", tasks),
    ("Curves fitted to the tail, at P = 0.9", curves),
    ("Cluster size and iterations", clusters),
    ("Union over the group, fit at P = 0.9", union),
]
