"""Scores after the benchmarks' definitions. Every score lies in [0, 1]; the metric's name stands in the item."""

import re
import string
from collections import Counter


def contains_all(output, item):
    """RULER, all tasks but QA: the share of the answers that occur in the output, whatever the case."""
    text = output.lower()
    return sum(answer.lower() in text for answer in item.answers) / len(item.answers)


def contains_any(output, item):
    """RULER's QA: whether one of the answers occurs in the output, whatever the case."""
    text = output.lower()
    return float(any(answer.lower() in text for answer in item.answers))


def babilong_labels(target):
    """One, or several with commas; a way of two steps ("s,w") is one."""
    return target.split(",") if len(target) > 3 else [target]


def babilong(output, item):
    """BABILong: of the labels that are not in the question, those in the first sentence are the target's, whatever the
    case."""
    first = output.lower().split(".")[0]
    question = item.prompt.rsplit("Question:", 1)[-1].lower()
    said = {label for label in map(str.lower, item.labels) if label in first and label not in question}
    return float(said == set(babilong_labels(item.answers[0].lower())))


def last_number(output, item):
    """LongEval lines: the last whole number of the output is the expected one."""
    numbers = re.findall("[0-9]+", output)
    # As text: int() refuses thousands of digits.
    return float(bool(numbers) and numbers[-1].lstrip("0") == item.answers[0].lstrip("0"))


def _plain_tokens(text):
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", text).split()


def token_f1(output, item):
    """LongBench's QA: F1 of the words, without case, punctuation and articles; the best of the answers."""

    def f1(answer):
        said, right = _plain_tokens(output), _plain_tokens(answer)
        common = sum((Counter(said) & Counter(right)).values())
        return 2 * common / (len(said) + len(right)) if common else 0.0

    return max(map(f1, item.answers))


SCORES = {"all": contains_all, "any": contains_any, "babilong": babilong, "last_number": last_number, "f1": token_f1}


def score(output, item):
    return SCORES[item.metric](output, item)
