"""Sums up result lines: scores with Wilson's intervals, and each mode against the baseline on the same items."""

import json
import math
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
    if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value)):
        raise ValueError(f"{name} ({value!r}) must be a finite number")
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


def compare(pairs, haystacks):
    """Paired difference of two lists of scores over items of `haystacks` (as long), of which those of one haystack vary
    together: interval; and, where every score is 0 or 1, McNemar's p, with the haystacks that favor either side."""
    differences = [a - b for a, b in pairs]
    effect = stats.design_effect(differences, haystacks)
    if all(a in (0, 1) and b in (0, 1) for a, b in pairs):
        only_a, only_b = sum(a > b for a, b in pairs), sum(a < b for a, b in pairs)
        both = sum(a == b == 1 for a, b in pairs)
        table = (both, only_a, only_b, len(pairs) - both - only_a - only_b)
        favored = {}
        for difference, haystack in zip(differences, haystacks):
            favored[haystack] = favored.get(haystack, 0) + difference
        p = stats.mcnemar_exact(sum(f > 0 for f in favored.values()), sum(f < 0 for f in favored.values()))
        interval = stats.paired_rates(*(count / effect for count in table))
        return {"only_mode": only_a, "only_baseline": only_b, "p": p, "interval": interval}
    if len(set(differences)) == 1:
        # Nothing varies, so t would be certain after any number of items; as few as these leave this much room.
        room = stats.paired_rates(0, 0, 0, len(pairs) / effect)
        return {"interval": stats.Interval(max(-1.0, differences[0] + room.low), min(1.0, differences[0] + room.high))}
    return {"interval": stats.t_interval(differences, groups=haystacks)}


def _against(rows):
    """Figures of a mode minus the baseline over the items that both have: rows of (mode, baseline, haystack)."""
    scored = [(a.score, b.score, h) for a, b, h in rows if a.score is not None and b.score is not None]
    scores, score_haystacks = [(a, b) for a, b, _ in scored], [h for _, _, h in scored]
    known = [(a.logprob - b.logprob, h) for a, b, h in rows if a.logprob is not None and b.logprob is not None]
    logprobs, logprob_haystacks = [d for d, _ in known], [h for _, h in known]
    figures = {"pairs": len(scores), "pair_haystacks": len(set(score_haystacks))}
    if scores:
        found = compare(scores, score_haystacks)
        interval = found.pop("interval")
        figures |= {"score_minus": stats.mean([a - b for a, b in scores]), "score_minus_95": [interval.low, interval.high]}
        figures |= found
    if logprobs:
        figures |= {"logprob_pairs": len(logprobs), "logprob_minus": stats.mean(logprobs)}
    if len(set(logprob_haystacks)) > 1:
        interval = stats.t_interval(logprobs, groups=logprob_haystacks)
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
            "| task | mode | n | haystacks | missing | score (95%) | minus baseline (95%) | p | log-probability | minus baseline (95%) | KL | read fraction |",
            "|---|---|---|---|---|---|---|---|---|---|---|---|",
        ]
        for row in self.rows:
            low, high = row["score_95"]
            cells = [
                row["task"], row["mode"], row["n"], row["haystacks"], row["missing"],
                f"{row['score']:.3f} ({low:.3f} to {high:.3f})" if row["n"] else "-",
                interval(row, "score_minus", 3), figure(row, "p", 3), figure(row, "logprob", 3),
                interval(row, "logprob_minus", 4), figure(row, "kl", 5), figure(row, "read_fraction", 3),
            ]
            lines.append("| " + " | ".join(map(str, cells)) + " |")
        return "\n".join(lines + [""] + self.notes if self.notes else lines)


def _worst(rows, mode):
    """One line: the tasks at which the mode loses most, and how many intervals leave out 0."""
    parts = []
    for name, what in (("score_minus", "score"), ("logprob_minus", "log-probability")):
        known = [row for row in rows if row["mode"] == mode and name + "_95" in row]
        if known:
            worst = min(known, key=lambda row: row[name])
            outside = sum(not row[name + "_95"][0] <= 0 <= row[name + "_95"][1] for row in known)
            parts.append(f"worst {what} {worst['task']} {worst[name]:+.3f}, {outside} of {len(known)} intervals without 0")
    return f"{mode}: {'; '.join(parts)}" if parts else None


def summarize(item_paths, result_paths, baseline=None):
    """Every item of the files counts in every mode: answered, or missing. Without a baseline it is `dense`, if there are
    results of it. Raises ValueError for one that no result has."""
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
    if baseline is not None and modes and baseline not in modes:
        raise ValueError(f"no result has the mode of the baseline, '{baseline}'; the modes are {', '.join(modes)}")
    baseline = baseline or "dense"
    modes.sort(key=lambda mode: mode != baseline)
    rows = []
    for task in dict.fromkeys(item.task for item in items.values()):
        ids = [item.id for item in items.values() if item.task == task]
        haystack = {i: items[i].haystack or i for i in ids}
        for mode in modes:
            answered = [i for i in ids if (i, mode) in answers and answers[i, mode].output is not None]
            have = [answers[i, mode] for i in answered]
            scores, haystacks = [a.score for a in have], [haystack[i] for i in answered]
            effect = stats.design_effect(scores, haystacks)
            interval = stats.wilson(sum(scores) / effect, len(scores) / effect)
            row = {"task": task, "mode": mode, "n": len(scores), "haystacks": len(set(haystacks)), "missing": len(ids) - len(scores)}
            row |= {"score": stats.mean(scores) if scores else None, "score_95": [interval.low, interval.high]}
            row |= {"logprob": _mean_of(have, "logprob"), "kl": _mean_of(have, "kl")}
            row |= {"read_fraction": _mean_of(have, "read_fraction")}
            if mode != baseline:
                both = [i for i in ids if (i, mode) in answers and (i, baseline) in answers]
                row |= _against([(answers[i, mode], answers[i, baseline], haystack[i]) for i in both])
            rows.append(row)
    notes = [note for mode in modes if mode != baseline and (note := _worst(rows, mode))]
    notes += [f"{len(problems)} broken line(s) skipped"] if problems else []
    notes += [f"{unknown} result(s) of items that are not in the item files"] if unknown else []
    return Table(rows, notes)
