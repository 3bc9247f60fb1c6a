"""Generated text: keys, sentences, words. Everything comes from the random generator given."""

import itertools
import re

ADJECTIVES = """amber brisk calm dusty eager faint gentle hollow icy jolly keen lucid mellow narrow ochre plain quiet rapid
sandy tidy upper vivid windy young bitter clever dim fresh grand humble loyal modern noble proud rustic silver ample blunt crisp
distant early famous golden heavy idle joint kind large mild neat open pale ready sharp tall useful vague warm""".split()
NOUNS = """anchor beacon cabin delta ember falcon garden harbor island jacket kettle ladder meadow needle orchard pillar quarry
river saddle temple umbrella valley window yard bridge candle desert engine forest glacier hammer lantern mirror parcel rocket
spoon tower violin wagon barrel cellar drawer farmer guitar hunter insect jewel keeper letter market notebook officer painter
queen ribbon sailor teacher uncle village writer basket castle doctor elbow flower""".split()
VERBS = """watches repairs carries forgets describes follows borrows paints counts visits collects measures finds admires
remembers sells draws hides cleans moves""".split()
PLACES = """behind the mill|near the old well|on the northern road|under the wooden stairs|at the edge of town|before the rain
begins|after the market closes|during the long winter|without a word|in the early morning|beside the frozen lake|for a small
reward|every second week|among the tall reeds|against all advice""".replace("\n", " ").split("|")
NOISE = ("The field is wide.", "The clouds are white.", "The stream is cold.", "We walk along.", "Out and home again.")


def sentence(rng):
    a, b = rng.sample(NOUNS, 2)
    text = f"the {rng.choice(ADJECTIVES)} {a} {rng.choice(VERBS)} the {rng.choice(ADJECTIVES)} {b} {rng.choice(PLACES)}."
    return "T" + text[1:]


def keys(rng, count):
    """Distinct keys like `calm-harbor`; of three parts when there are not enough of two."""
    two = len(ADJECTIVES) * len(NOUNS)
    if count <= two:
        return [f"{ADJECTIVES[i // len(NOUNS)]}-{NOUNS[i % len(NOUNS)]}" for i in rng.sample(range(two), count)]
    picked = rng.sample(range(two * len(NOUNS)), count)
    return [f"{ADJECTIVES[i // len(NOUNS) % len(ADJECTIVES)]}-{NOUNS[i % len(NOUNS)]}-{NOUNS[i // two]}" for i in picked]


def plain_words(rng, count):
    """Distinct words, shuffled: those above, then words made of syllables."""
    words = sorted(set(ADJECTIVES + NOUNS + VERBS))
    if count > len(words):
        syllables = ["".join(pair) for pair in itertools.product("bdfgklmnprstv", "aeiou")]
        made = set(words)
        while len(made) < count:
            made.add("".join(rng.choices(syllables, k=3)))
        words = sorted(made)
    return rng.sample(words, count)


def coded_words(rng, count):
    """Distinct words of six random letters."""
    made = {}
    while len(made) < count:
        made["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=6))] = None
    return list(made)


class Haystack:
    """Sentences of a user's text, or generated ones without a text."""

    def __init__(self, text=None):
        self._text, self._sentences = text, None
        if text is not None:
            self._sentences = [" ".join(s.split()) for s in re.split(r"(?<=[.!?])\s+", text) if s.strip()]
            if not self._sentences:
                raise ValueError("the haystack text is empty")

    def sentences(self, rng, count):
        if self._sentences is None:
            return [sentence(rng) for _ in range(count)]
        start = rng.randrange(len(self._sentences))
        return [self._sentences[(start + i) % len(self._sentences)] for i in range(count)]

    def __contains__(self, value):
        return self._text is not None and value in self._text
