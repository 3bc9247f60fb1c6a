"""Items and questions from published files that the user supplies."""

import json
from dataclasses import dataclass

from .items import WHOLE_NUMBER, Item, read_lines
from .scores import babilong_labels
from .tokens import estimate, largest_size


@dataclass
class Question:
    question: str
    answers: list
    passages: list  # numbers of its own passages


@dataclass
class Questions:
    passages: list
    questions: list


def _load(path):
    with open(path, encoding="utf-8") as file:
        return json.load(file)


class _Passages:
    """Every different passage once."""

    def __init__(self):
        self.numbers = {}

    def number(self, text):
        return self.numbers.setdefault(text, len(self.numbers))


def _questions(path, passages, questions):
    if not questions:
        raise ValueError(f"{path} has no question with an answer")
    return Questions(list(passages.numbers), questions)


def squad(path):
    """SQuAD's form: data[].paragraphs[] with context and qas[] (question, answers[].text; impossible ones are left out)."""
    passages, questions = _Passages(), []
    for article in _load(path)["data"]:
        for paragraph in article["paragraphs"]:
            own = passages.number(paragraph["context"])
            for qa in paragraph["qas"]:
                answers = list(dict.fromkeys(a["text"] for a in qa.get("answers", [])))
                if answers and not qa.get("is_impossible", False):
                    questions.append(Question(qa["question"], answers, [own]))
    return _questions(path, passages, questions)


def hotpotqa(path):
    """HotpotQA's form: a list with question, answer, context[] = [title, sentences], supporting_facts[] = [title, n]."""
    passages, questions = _Passages(), []
    for entry in _load(path):
        supporting = {title for title, _ in entry["supporting_facts"]}
        numbers = {title: passages.number(f"{title}\n{''.join(text)}") for title, text in entry["context"]}
        own = [n for title, n in numbers.items() if title in supporting]
        questions.append(Question(entry["question"], [entry["answer"]], own))
    return _questions(path, passages, questions)


def babilong(path, name, count=estimate, problems=None):
    """BABILong: input, question, target (scores.babilong_labels). The labels are all targets that the file has."""
    rows = read_lines(path, lambda r: (_text(r, "input"), _text(r, "question"), _text(r, "target")), problems)
    labels = sorted({label for _, _, target in rows for label in babilong_labels(target)})
    prefix = "The answer is"
    items = []
    for i, (context, question, target) in enumerate(rows):
        prompt = (
            "Facts are hidden in the following text. Answer the question that follows it with one word, from these facts "
            f"alone.\n\n{context}\n\nQuestion: {question.strip()}"
        )
        items.append(
            Item(
                id=f"{name}-{i}", task=name, prompt=prompt, prefix=prefix, target=f" {target}", answers=[target], labels=labels,
                metric="babilong", max_tokens=15, prompt_tokens=count(f"{prompt}\n{prefix}"),
            )
        )
    return items


def longeval(path, name, count=estimate, problems=None):
    """LongEval lines: prompt, expected_number, random_idx[0] = the line asked for."""

    def parse(record):
        number, lines = str(record["expected_number"]), record["random_idx"]
        if not WHOLE_NUMBER.fullmatch(number):
            raise ValueError(f"expected_number ({number}) must be a whole number")
        if not (isinstance(lines, list) and lines):
            raise ValueError(f"random_idx ({lines!r}) must be a list of at least one line")
        return _text(record, "prompt"), number, str(lines[0])

    items = []
    for i, (prompt, number, line) in enumerate(read_lines(path, parse, problems)):
        prefix = f"The <REGISTER_CONTENT> in line {line} is <"
        items.append(
            Item(
                id=f"{name}-{i}", task=name, prompt=prompt, prefix=prefix, target=f"{number}>", answers=[number],
                metric="last_number", max_tokens=16, prompt_tokens=count(f"{prompt}\n{prefix}"),
            )
        )
    return items


LONGBENCH = {  # longest answer in tokens
    "narrativeqa": 128,
    "qasper": 128,
    "multifieldqa_en": 64,
    "hotpotqa": 32,
    "2wikimqa": 32,
    "musique": 32,
}


def longbench(path, name, count=estimate, problems=None, length=None):
    """LongBench's six English QA sets: context, input, answers, dataset. A context that makes the prompt longer than
    `length` tokens loses its middle, as in the benchmark."""

    def parse(record):
        dataset = record.get("dataset", name)
        if dataset not in LONGBENCH:
            raise ValueError(f"dataset '{dataset}' is none of {', '.join(LONGBENCH)}")
        answers = record["answers"]
        if not (isinstance(answers, list) and answers and all(isinstance(a, str) for a in answers)):
            raise ValueError("answers must be a list of at least one string")
        return dataset, _text(record, "context"), _text(record, "input"), answers

    items = []
    for i, (dataset, context, question, answers) in enumerate(read_lines(path, parse, problems)):

        def prompt(kept, context=context, question=question):
            half = kept // 2
            text = context if kept >= len(context) else context[: kept - half] + context[len(context) - half :]
            return (
                "Read the text and answer the question as briefly as possible, in one phrase where that is enough. Write "
                f"'unanswerable' if the text does not tell.\n\nText: {text}\n\nQuestion: {question}"
            )

        kept = len(context)
        if length is not None:
            kept = largest_size(lambda n, prompt=prompt: count(f"{prompt(n)}\nAnswer:"), length, len(context))
        items.append(
            Item(
                id=f"{name}-{i}", task=dataset, prompt=prompt(kept), prefix="Answer:", target=f" {answers[0]}", answers=answers,
                metric="f1", max_tokens=LONGBENCH[dataset], prompt_tokens=count(f"{prompt(kept)}\nAnswer:"),
            )
        )
    return items


def _text(record, name):
    value = record[name]
    if not isinstance(value, str) or not value:
        raise ValueError(f"{name} must be a string that is not empty")
    return value


LOADERS = {"babilong": babilong, "longeval": longeval, "longbench": longbench}
QUESTIONS = {"squad": squad, "hotpotqa": hotpotqa}
