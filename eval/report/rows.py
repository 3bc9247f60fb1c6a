"""Rows of JSON lines, and how methods are named."""

import json
import re

# Fields of which figures are made, where a row has them. A row of task scores has null for what was not measured.
FIGURE = re.compile(r"depth|steps|windows|read_fraction|tokens_per_kv_head|attention_error|(mean|median|p99|max)_(error|kl)")


def _check_figures(row):
    for name, value in row.items():
        if FIGURE.fullmatch(name) and not (value is None and "task" in row) and type(value) not in (int, float):
            raise ValueError(f"{name} ({json.dumps(value)}) must be a number")


def read_rows(paths):
    """All objects of the files, in order. Raises ValueError naming file and line of what is no JSON object."""
    rows = []
    for path in paths:
        with open(path, encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                try:
                    row = json.loads(line)
                    if not isinstance(row, dict):
                        raise ValueError("not an object")
                    _check_figures(row)
                except (ValueError, RecursionError) as error:
                    what = "nested too deeply" if isinstance(error, RecursionError) else error
                    raise ValueError(f"{path}:{number}: {what}") from None
                rows.append(row)
    return rows


KNOBS = {"budget", "error", "mass", "epsilon", "l", "tau"}  # how much is read; other options make another method


def label(rows):
    """Rows of several models: their texts bear the model's name, so that each has a place of its own."""
    models = {row["model"] for row in rows if row.get("model") not in (None, "several")}
    if len(models) < 2:
        return rows

    def named(row):
        keys = [key for key in ("text", "trace") if key in row and row.get("model") in models]
        return row | {key: f"{row[key]}, {row['model']}" for key in keys}

    return [named(row) for row in rows]


def method_of(setting):
    """'quest,budget=512' -> 'quest', 'magicpig,k=8,l=75' -> 'magicpig,k=8'; presets are points of 'sample'."""
    first, *options = setting.split(",")
    name = "sample" if first.startswith("quality=") else first
    knobs = KNOBS - {"mass"} if name == "sample" else KNOBS  # beside an error, a mass that is verified is another method
    return ",".join([name] + [o for o in options if o.split("=")[0] not in knobs])


def table(rows, name):
    return [row for row in rows if row.get("table") == name]


def texts(rows):
    return list(dict.fromkeys(row["text"] for row in rows))


def places(rows):
    """What can be compared with each other: a text, end to end also at one depth."""
    return list(dict.fromkeys(row["place"] for row in rows))


def latest(rows, keys):
    """The last row of each combination of keys."""
    found = {}
    for row in rows:
        found[tuple(row.get(key) for key in keys)] = row
    return list(found.values())


def error_rows(rows):
    """Of `tactic eval trace`, one a text and setting; without those over several texts."""
    found = [row for row in rows if row.get("verb") == "eval trace" and row.get("model") != "several" and row["read_fraction"] > 0]
    return latest([row | {"text": row["trace"], "place": row["trace"]} for row in found], ("model", "text", "setting"))


def kl_rows(rows):
    """Of `tactic eval kl`, one a text, depth and mode; without stock llama.cpp and exact attention."""
    found = [row for row in rows if row.get("verb") == "eval kl" and row.get("taken") and row["read_fraction"] < 1]
    several = len({row.get("cache_type") for row in found}) > 1
    found = [row | {"setting": row["mode"], "place": _place(row, several)} for row in found]
    return latest(found, ("model", "place", "mode"))


def kl_interval(row):
    """Of the mean KL, if the row has at least eight blocks of 16 tokens; older rows have intervals of fewer."""
    blocks = row.get("windows", 1) * -(-row["steps"] // 16) if "steps" in row else 8
    return row.get("mean_kl_95") if blocks >= 8 else None


def _place(row, name_cache_type):
    return f"{row['text']} after {row['depth']}" + (f", {row.get('cache_type')}" if name_cache_type else "") + (
        f", YaRN {row['yarn']:g}" if row.get("yarn", 1) != 1 else ""
    )


def task_rows(rows):
    """Of `eval_tasks.sh summary --json`, the modes that were compared with exact attention."""
    return [row for row in rows if "task" in row and "score_minus" in row]
