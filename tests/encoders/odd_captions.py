"""Captions such as people write, and worse; and a vocabulary of CLIP's kind, small, made by rule."""

import gzip
import itertools
import random

WORDS = "a the photo of small red dog cats dog's they're we'll it's running naïve café straße ΟΔΥΣΣΕΥΣ 日本 кошка हिन्दी ไทย été".split()
ODD = [
    "",
    "   ",
    "A photo of a DOG.",
    "a\tdog\n and\u00a0a\u2003cat",
    "it's they're we'll I'm you've he'd don't ISN'T",
    "1984 and 3.14 ½ ² Ⅷ ٣",
    "caf\u00e9 cafe\u0301 na\u00efve \u00c5ngstr\u00f6m \u0130stanbul stra\u00dfe e\u0301te\u0301",
    "ΟΔΥΣΣΕΥΣ Σ σς",
    "&lt;b&gt; Tom &amp; Jerry &amp;amp; &quot;x&quot; &#39;s &#x1F600; &nbsp;",
    "x &amp;amp;lt; y",
    "\U0001f600\U0001f468\u200d\U0001f469\u200d\U0001f467 \u2764\ufe0f \U0001f1e9\U0001f1ea",  # emoji, one of them a family
    "<start_of_text> a dog <end_of_text> a cat",
    "!!<end_of_text>",
    "dog<end_of_text>cat<END_OF_TEXT><start_of_text>",
    "a <|endoftext|> b <|startoftext|>",
    "हिन्दी ไทย שלום 한국어",
    "a\u0345b \u1fb3",
    "'\u017f '\u017ft '\u212a",  # a long s, and the sign of Kelvin
    "snake_case __init__ a-b--c ... ?!?!",
    "\u0000\u0007 \u200b \ufeff \u2028 x",
    "dog " * 300,
    "\u201ccurly\u201d it\u2019s",
    "\ufb01ne \ufb02ag \uff26\uff55\uff4c\uff4c width",  # ligatures, full-width letters
    "caf\u00c3\u00a9 \u00e2\u20ac\u0153quoted\u00e2\u20ac\u009d",  # UTF-8 that was taken for Windows-1252
]
SCRIPTS = [
    (32, 126), (160, 591), (0x300, 0x344), (0x370, 0x3FF), (0x400, 0x4FF), (0x5D0, 0x5EA), (0x900, 0x97F), (0xE00, 0xE5B),
    (0x2000, 0x206F), (0x2190, 0x27BF), (0x4E00, 0x4FFF), (0xAC00, 0xACFF), (0xFF01, 0xFF5E), (0x1F300, 0x1F6FF),
]  # fmt: skip
ENTITIES = ["&amp;", "&lt;", "&quot;", "&#39;", "&eacute;", "&amp;amp;", "&", ";", "<end_of_text>", "<start_of_text>"]


def captions(count, seed=0):
    """Texts of words, entities, special tokens and characters of many scripts; one in 50 has 300 words."""
    chance = random.Random(seed)

    def part():
        kind = chance.random()
        if kind < 0.6:
            word = chance.choice(WORDS)
            return chance.choice([word, word.upper(), word.title(), f"{word}'s", f"{word}{chance.choice('.,!?-:)')}", f"#{word}"])
        if kind < 0.7:
            return chance.choice(ENTITIES)
        if kind < 0.75:
            return str(chance.randint(0, 99999))
        return "".join(chr(chance.randint(*chance.choice(SCRIPTS))) for _ in range(chance.randint(1, 6)))

    found = []
    for i in range(count):
        parts = [part() for _ in range(300 if i % 50 == 49 else chance.randint(0, 30))]
        found.append("".join(itertools.chain.from_iterable((each, chance.choice(["", " ", " ", "  "])) for each in parts)))
    return found


def write_vocabulary(path):
    """A file like bpe_simple_vocab_16e6.txt.gz: pairs that build some words from their front, and some from their end."""
    pairs = []
    for word in ["the", "dog", "dogs", "cat", "photo", "running", "été", "'s", "...", "red", "end", "start"]:
        symbols = [_symbol(byte) for byte in word.encode()]
        symbols[-1] += "</w>"
        pairs += [("".join(symbols[:i]), symbols[i]) for i in range(1, len(symbols))]
    pairs += [("o", "g</w>"), ("d", "og</w>"), ("n", "g</w>"), ("i", "ng</w>")]
    text = "\n".join(["#version: 0.2", *(" ".join(pair) for pair in dict.fromkeys(pairs))])
    path.write_bytes(gzip.compress(text.encode(), mtime=0))
    return path


def _symbol(byte):
    themselves = [*range(33, 127), *range(161, 173), *range(174, 256)]
    return chr(byte) if byte in themselves else chr(256 + [other for other in range(256) if other not in themselves].index(byte))
