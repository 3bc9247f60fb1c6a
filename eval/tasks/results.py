"""Sums up result lines: scores with Wilson's intervals, and each mode against the baseline on the same items."""

import json
from dataclasses import dataclass

from . import stats
from .items import read_items, read_lines
from .scores import score


@dataclass
class Answer:
    """One item in one mode. No output: there is no valid answer."""

    output: str | None
    logprob: float | None = None
    kl: float | None = None
    read_fraction: float | None = None
    score: float | None = None


def _number(record, name):
    value = record.get(name)
    if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float))):
        raise ValueError(f"{name} ({value!r}) must be a number")
    return value


def parse_answer(record):
    key = (record["id"], record["mode"])
    if not all(isinstance(part, str) for part in key):
        raise ValueError("id and mode must be strings")
    output = None if "error" in record else record["output"]
    if "error" not in record and not isinstance(output, str):
        raise ValueError("output must be a string")
    names = ("answer_logprob", "kl", "read_fraction")
    return key, Answer(output, *(_number(record, name) for name in names))


def compare(pairs):
    """Paired difference of two lists of scores: interval, McNemar's p where every score is 0 or 1."""
    if all(a in (0, 1) and b in (0, 1) for a, b in pairs):
        only_a, only_b = sum(a > b for a, b in pairs), sum(a < b for a, b in pairs)
        both = sum(a == b == 1 for a, b in pairs)
        interval = stats.paired_rates(both, only_a, only_b, len(pairs) - both - only_a - only_b)
        return {"only_mode": only_a, "only_baseline": only_b, "p": stats.mcnemar_exact(only_a, only_b), "interval": interval}
    differences = [a - b for a, b in pairs]
    if len(set(differences)) == 1:
        # Nothing varies, so t would be certain after any number of items; as few as these leave this much room.
        room = stats.paired_rates(0, 0, 0, len(pairs))
        return {"interval": stats.Interval(max(-1.0, differences[0] + room.low), min(1.0, differences[0] + room.high))}
    return {"interval": stats.t_interval(differences)}


def _against(rows):
    """Figures of a mode minus the baseline over the items that both have."""
    scores = [(a.score, b.score) for a, b in rows if a.score is not None and b.score is not None]
    logprobs = [a.logprob - b.logprob for a, b in rows if a.logprob is not None and b.logprob is not None]
    figures = {"pairs": len(scores)}
    if scores:
        found = compare(scores)
        interval = found.pop("interval")
        figures |= {"score_minus": stats.mean([a - b for a, b in scores]), "score_minus_95": [interval.low, interval.high]}
        figures |= found
    if logprobs:
        figures |= {"logprob_pairs": len(logprobs), "logprob_minus": stats.mean(logprobs)}
    if len(logprobs) > 1:
        interval = stats.t_interval(logprobs)
        figures |= {"logprob_minus_95": [interval.low, interval.high]}
    return figures


def _mean_of(answers, name):
    values = [value for a in answers if (value := getattr(a, name)) is not None]
    return stats.mean(values) if values else None


@dataclass
class Table:
    rows: list
    notes: list

    def json(self):
        return "\n".join(json.dumps(row) for row in self.rows)

    def markdown(self):
        """One line per task and mode."""

        def interval(row, name, digits):
            if name + "_95" not in row:
                return "-"
            low, high = row[name + "_95"]
            return f"{row[name]:+.{digits}f} ({low:+.{digits}f} to {high:+.{digits}f}){'' if low <= 0 <= high else ' *'}"

        def figure(row, name, digits):
            return "-" if row.get(name) is None else f"{row[name]:.{digits}f}"

        lines = [
            "| task | mode | n | missing | score (95%) | minus baseline (95%) | p | log-probability | minus baseline (95%) | KL | read fraction |",
            "|---|---|---|---|---|---|---|---|---|---|---|",
        ]
        for row in self.rows:
            low, high = row["score_95"]
            cells = [
                row["task"], row["mode"], row["n"], row["missing"],
                f"{row['score']:.3f} ({low:.3f} to {high:.3f})" if row["n"] else "-",
                interval(row, "score_minus", 3), figure(row, "p", 3), figure(row, "logprob", 3),
                interval(row, "logprob_minus", 4), figure(row, "kl", 5), figure(row, "read_fraction", 3),
            ]
            lines.append("| " + " | ".join(map(str, cells)) + " |")
        return "\n".join(lines + [""] + self.notes if self.notes else lines)


def summarize(item_paths, result_paths, baseline):
    """Every item of the files counts in every mode: answered, or missing."""
    problems, items = [], {}
    for path in item_paths:
        for item in read_items(path, problems):
            if items.setdefault(item.id, item) != item:
                raise ValueError(f"two different items have the id {item.id}")
    answers, unknown = {}, 0
    for path in result_paths:
        for key, answer in read_lines(path, parse_answer, problems):
            if key[0] not in items:
                unknown += 1
            elif answer.output is not None or key not in answers:  # a later answer heals an error, never the reverse
                answers[key] = answer
    for (item_id, _), answer in answers.items():
        answer.score = None if answer.output is None else score(answer.output, items[item_id])

    modes = list(dict.fromkeys(mode for _, mode in answers))
    modes.sort(key=lambda mode: mode != baseline)
    rows = []
    for task in dict.fromkeys(item.task for item in items.values()):
        ids = [item.id for item in items.values() if item.task == task]
        for mode in modes:
            have = [answers[i, mode] for i in ids if (i, mode) in answers and answers[i, mode].output is not None]
            scores = [a.score for a in have]
            interval = stats.wilson(sum(scores), len(scores))
            row = {"task": task, "mode": mode, "n": len(scores), "missing": len(ids) - len(scores)}
            row |= {"score": stats.mean(scores) if scores else None, "score_95": [interval.low, interval.high]}
            row |= {"logprob": _mean_of(have, "logprob"), "kl": _mean_of(have, "kl")}
            row |= {"read_fraction": _mean_of(have, "read_fraction")}
            if mode != baseline:
                both = [i for i in ids if (i, mode) in answers and (i, baseline) in answers]
                row |= _against([(answers[i, mode], answers[i, baseline]) for i in both])
            rows.append(row)
    notes = [f"{len(problems)} broken line(s) skipped"] if problems else []
    notes += [f"{unknown} result(s) of items that are not in the item files"] if unknown else []
    return Table(rows, notes)
