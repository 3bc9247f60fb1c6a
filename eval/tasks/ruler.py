"""Own generators after the definitions of RULER's 13 tasks (Hsieh et al. 2024, arXiv 2404.06654).

A generator is `build(size, rng, context)`: the fields of an item whose prompt grows with `size` units of filler. What the
answer depends on is drawn before the filler. Every prompt length is that of prompt and prefix in tokens."""

import random
import uuid
from functools import partial

from .items import Item
from .tokens import estimate, largest_size
from .words import NOISE, Haystack, coded_words, keys, plain_words


def _number(rng):
    return str(rng.randrange(1_000_000, 10_000_000))


def _uuid(rng):
    return str(uuid.UUID(int=rng.getrandbits(128), version=4))


def _name(rng):
    return "".join(rng.choices("ABCDEFGHIJKLMNOPQRSTUVWXYZ", k=5))


def _distinct(make, rng, count, haystack=()):
    """`count` different values of one length that the user's text does not have."""
    values = {}
    while len(values) < count:
        value = make(rng)
        if value not in haystack:
            values[value] = None
    return list(values)


def _scatter(rng, needles, filler):
    """Needles between sentences of filler at random places; returns the text and the order of the needles in it."""
    places = sorted(rng.randrange(len(filler) + 1) for _ in needles)
    order = rng.sample(range(len(needles)), len(needles))
    parts, done = [], 0
    for place, needle in zip(places, order):
        parts += filler[done:place] + [needles[needle]]
        done = place
    return " ".join(parts + filler[done:]), order


def _listing(words):
    return words[0] if len(words) == 1 else ", ".join(words[:-1]) + " and " + words[-1]


def niah(size, rng, context, filler, key_kind="word", value_kind="number", num_keys=1, num_values=1, num_queries=1, question=0):
    """Needle in a haystack. `filler`: noise (one passage repeated), text, or needle (needles of other keys). The same
    haystack can be asked several questions: `question` says for which key, in the order in which keys were drawn."""
    num_keys = max(num_keys, num_queries)
    others = size if filler == "needle" else 0
    avoided = context.haystack if filler == "text" else ()
    names = keys(rng, num_keys + others) if key_kind == "word" else _distinct(_uuid, rng, num_keys + others)
    values = _distinct(_number if value_kind == "number" else _uuid, rng, num_keys * num_values + others, avoided)
    noun = "number" if value_kind == "number" else "uuid"
    owners = [names[i // num_values] for i in range(num_keys * num_values)] + names[num_keys:]
    needles = [f"The secret {noun} of {owner} is {value}." for owner, value in zip(owners, values)]
    if filler == "needle":
        sentences = []
    elif filler == "text":
        sentences = context.haystack.sentences(rng, size)
    else:
        sentences = [NOISE[i % len(NOISE)] for i in range(size)]
    text, order = _scatter(rng, needles, sentences)
    asked = names[question : question + num_queries]
    answers = [values[i] for i in order if owners[i] == asked[0]] if num_queries == 1 else values[:num_queries]
    plural = "s" if len(answers) > 1 else ""
    verb = "are" if plural else "is"
    what = f"the secret {noun}{plural} of {_listing(asked)}"
    return {
        "prompt": f"Somewhere in the following text secret {noun}s are hidden. Remember them; you will be asked for them "
        f"afterwards.\n\n{text}\n\nAccording to the text, what {verb} {what}?",
        "prefix": f"According to the text, {what} {verb}",
        "target": " " + ", ".join(answers),
        "answers": answers,
    }


def _chain(rng, size, names, value):
    steps = [f"VAR {names[0]} = {value}."] + [f"VAR {b} = VAR {a}." for a, b in zip(names, names[1:])]
    filler = [NOISE[i % len(NOISE)] for i in range(size)]
    for place, step in reversed(list(zip(sorted(rng.randrange(size + 1) for _ in steps), steps))):
        filler.insert(place, step)  # from behind, so that a chain is read in its order
    return " ".join(filler)


def variable_tracking(size, rng, context):
    """One chain of five variables: all that hold the first one's value. An example comes first."""
    task = (
        "Follow the assignments of variables that are hidden in the text.\n\n{}\n\n"
        "Which variables hold the value {}? There are five."
    )
    begin = "The five variables that hold the value {} are"
    names = _distinct(_name, rng, 10)
    value, small_value = _distinct(lambda r: str(r.randrange(10_000, 100_000)), rng, 2)
    small = _chain(rng, 5, names[5:], small_value)
    text = _chain(rng, size, names[:5], value)
    example = f"{task.format(small, small_value)} {begin.format(small_value)} {', '.join(names[5:])}."
    return {
        "prompt": f"{example}\n\n{task.format(text, value)}",
        "prefix": begin.format(value),
        "target": " " + ", ".join(names[:5]),
        "answers": names[:5],
    }


def _numbered(rng, common, uncommon, often, seldom):
    words = common * often + uncommon * seldom
    rng.shuffle(words)
    return " ".join(f"{i}. {word}" for i, word in enumerate(words, 1))


def common_words(size, rng, context):
    """A numbered list with ten words 30 times each and `size` words three times each. An example comes first."""
    task = (
        "Here is a numbered list of words, in which some occur more often than others. Remember the ten that are most "
        "frequent.\n{}\nWhich ten words are the most frequent in the list?"
    )
    begin = "The ten most frequent words are:"
    words = plain_words(rng, 30 + size)
    common, small, uncommon = words[:10], words[10:30], words[30:]
    example = f"{task.format(_numbered(rng, small[:10], small[10:], 3, 1))} {begin} {', '.join(small[:10])}."
    return {
        "prompt": f"{example}\n\n{task.format(_numbered(rng, common, uncommon, 30, 3))}",
        "prefix": begin,
        "target": " " + ", ".join(common),
        "answers": common,
    }


def frequent_words(size, rng, context, alpha=2.0):
    """Coded words whose frequency falls with the power `alpha` of their rank; the most frequent one is written as dots and
    does not count. The three next are asked for. `size`: words of the text beyond the least."""
    total = size + 60
    vocabulary = coded_words(rng, max(8, total // 10))
    zeta = sum(k**-alpha for k in range(1, len(vocabulary) + 1))
    words = []
    for rank, word in enumerate(vocabulary, 1):
        words += [word if rank > 1 else "..."] * int(total * rank**-alpha / zeta)
    rng.shuffle(words)
    return {
        "prompt": "Read the following coded text and note how often each coded word occurs. Dots do not count.\n"
        f"{' '.join(words)}\nWhich three coded words occur most often?",
        "prefix": "The three coded words that occur most often are",
        "target": " " + ", ".join(vocabulary[1:4]),
        "answers": vocabulary[1:4],
    }


def question_answering(size, rng, context, source, number=0):
    """Question `number` of a user's file with its own passages among `size` other ones (`source`: squad or hotpotqa)."""
    data = context.questions.get(source)
    if data is None:
        raise ValueError(f"this task needs a file of the form of {source}: --{source} FILE")
    question = data.questions[number]
    others = [i for i in range(len(data.passages)) if i not in question.passages]
    chosen = list(question.passages) + rng.sample(others, min(size, len(others)))
    rng.shuffle(chosen)
    text = "\n\n".join(f"Document {n}:\n{data.passages[i]}" for n, i in enumerate(chosen, 1))
    return {
        "prompt": "Answer the question from the documents below. Give the answer alone, without other words.\n\n"
        f"{text}\n\nAnswer the question from the documents above. Give the answer alone, without other words.\n\nQuestion: {question.question}",
        "prefix": "Answer:",
        "target": " " + question.answers[0],
        "answers": question.answers,
    }


# name: generator, longest answer in tokens, metric
TASKS = {
    "niah_single_1": (partial(niah, filler="noise"), 128, "all"),
    "niah_single_2": (partial(niah, filler="text"), 128, "all"),
    "niah_single_3": (partial(niah, filler="text", value_kind="uuid"), 128, "all"),
    "niah_multikey_1": (partial(niah, filler="text", num_keys=4), 128, "all"),
    "niah_multikey_2": (partial(niah, filler="needle"), 128, "all"),
    "niah_multikey_3": (partial(niah, filler="needle", key_kind="uuid", value_kind="uuid"), 128, "all"),
    "niah_multivalue": (partial(niah, filler="text", num_values=4), 128, "all"),
    "niah_multiquery": (partial(niah, filler="text", num_queries=4), 128, "all"),
    "vt": (variable_tracking, 30, "all"),
    "cwe": (common_words, 120, "all"),
    "fwe": (frequent_words, 50, "all"),
    "qa_1": (partial(question_answering, source="squad"), 32, "any"),
    "qa_2": (partial(question_answering, source="hotpotqa"), 32, "any"),
}


class Context:
    """What the generators take from outside: haystack text and questions by form of their file."""

    def __init__(self, haystack=None, questions=None, count=estimate):
        self.haystack = haystack or Haystack()
        self.questions = questions or {}
        self.count = count


def questions_of(task):
    """How many questions one haystack of the task can be asked; None: as many as it has needles."""
    options = getattr(TASKS[task][0], "keywords", {})
    if options.get("filler") == "needle":
        return None
    return options.get("num_keys", 1)


def make_items(task, index, length, seed, context, questions=1):
    """Haystack `index` of a task, asked `questions` questions (fewer where it has fewer keys): that many items of at most
    `length` tokens of prompt and prefix, the longest without room for one more unit of filler. Same arguments, same items.
    """
    build, max_tokens, metric = TASKS[task]
    most = questions_of(task)
    questions = questions if most is None else min(questions, most)

    def fields(size, question):
        # Before it is asked, a haystack of needles must have as many as there are questions.
        extra = {"question": question} if question else {}
        if asked is not None:
            extra["number"] = asked
        return build(size + (questions - 1 if most is None else 0), random.Random(f"{task}/{length}/{seed}/{index}"), context, **extra)

    def tokens(made):
        return context.count(made["prompt"] + "\n" + made["prefix"])

    def longest(size):
        return max(tokens(fields(size, question)) for question in range(questions))

    largest, asked = 1 << 24, None
    if task.startswith("qa_"):
        source = "squad" if task == "qa_1" else "hotpotqa"
        data = context.questions.get(source)
        largest = len(data.passages) if data else 0
        if data:  # each question once before one is asked again
            order = random.Random(f"{task}/{seed}").sample(range(len(data.questions)), len(data.questions))
            asked = order[index % len(order)]
    try:
        size = largest_size(longest, length, largest)
    except ValueError as error:
        raise ValueError(f"{task}: {error}") from None
    if size == largest:
        raise ValueError(f"{task}: all {largest} passages make fewer than the {length} tokens wanted")
    items = []
    for question in range(questions):
        made = fields(size, question)
        haystack = f"{task}-{length}-{seed}-{index}"
        name = haystack + (f"-{question}" if question else "")
        items.append(Item(id=name, task=task, metric=metric, max_tokens=max_tokens, prompt_tokens=tokens(made), haystack=haystack, **made))
    return items
