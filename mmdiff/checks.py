"""The values that a config may hold: one table of ranges by key, applied before any work.

A key is known by its last name, "train.learning_rate" by "learning_rate", so a new config that uses the field's names is checked without
a line of its own. What the table does not name must be plain JSON, integers of 64 bits and numbers of float32; there an infinity is
allowed where the config file itself states one (an infinite clip means no clipping).
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any

from mmdiff.errors import UserError

INTEGERS, STEPS = 2**63 - 1, 2**31 - 1  # the step counter is an int32
FLOATS, SMALLEST = 3.4e38, 1.2e-38  # float32: what is smaller than the second counts as 0


@dataclasses.dataclass(frozen=True)
class Range:
    """Numbers from `low` to `high`, both included unless `above` or `below` says not; `also` are allowed as well."""

    low: float
    high: float
    above: bool = False
    below: bool = False
    also: tuple[float, ...] = ()

    def wrong(self, value: float) -> str:
        """What is allowed, "1 or more", if `value` is not; else nothing."""
        low = value <= self.low if self.above else value < self.low
        high = value >= self.high if self.below else value > self.high
        if value in self.also or not (low or high or value != value):
            return ""
        lower = f"above {number(self.low)}" if self.above else f"{number(self.low)} or more"
        upper = f"below {number(self.high)}" if self.below else f"at most {number(self.high)}"
        if self.high <= 1:  # a share
            return f"{lower if self.above else f'at least {number(self.low)}'} and {upper}"
        if isinstance(value, float) and not math.isfinite(value):
            return "a finite number"
        return " or ".join([*map(number, self.also), lower]) if low else upper


@dataclasses.dataclass(frozen=True)
class Choice:
    """One of several words."""

    words: tuple[str, ...]

    def wrong(self, value: str) -> str:
        return "" if value in self.words else f"one of {', '.join(self.words)}"


SHARE, SIZE, COUNT, EVERY = Range(0, 1), Range(1, 65_536), Range(1, 10_000_000), Range(1, STEPS)
NETWORK_CALLS = Range(1, 100_000)
GUIDANCE = Range(-1e4, 1e4)

# The first pattern that fits the end of a key, "learning_rate" or "times.joint", decides; it is for values of its own type.
RANGES: tuple[tuple[str, Range | Choice], ...] = (
    (r"seed", Range(0, 2**64 - 1)),
    # config.train
    (r"(\w+_)?learning_rate", Range(0, 1e3, above=True)),
    (r"clip", Range(0, math.inf, above=True)),
    (r"weight_decay", Range(0, 1e3)),
    (r"data\.max_skipped", Range(0, STEPS)),
    (r"(train\.steps|log_every|checkpoint_every|patience|max_skipped)", EVERY),
    (r"((eval|sample|metrics|ema)_every|warmup_steps)", Range(0, STEPS)),
    (r"ema_widths", Range(0.001, 0.288)),
    (r"evaluation_share", Range(0, 1, above=True)),
    (r"(\w+_)?batch", Range(1, 2**20)),
    (r"microbatches", Range(1, 2**20)),
    (r"ema", Range(0, 1, below=True)),
    (r"keep", Range(1, 1_000_000)),
    (r"prefetch", Range(0, 1024)),
    (r"mesh\.\w+", Range(1, 65_536, also=(-1,))),
    # of losses and times
    (r"times\.\w+", SHARE),
    (r"((\w+_)?dropout|dropout\.\w+|complete|damaged|flips)", SHARE),
    (r"(count|crop|windows)", COUNT),
    (r"guidance\.weight", Range(1, GUIDANCE.high)),  # that a network is told: 1 is none
    (r"((\w+_)?weight|weights\.\w+|kappa|gamma|power|loss\.\w+)", Range(0, 1e6)),
    (r"temperature", Range(0, 1e6, above=True)),
    # of sampling
    (r"guidance", GUIDANCE),
    (r"(steps|sampling_steps|draws)", NETWORK_CALLS),
    (r"top_p", Range(0, 1, above=True)),
    # of networks
    (r"(codes|vocabulary)", Range(2, 2**20)),
    (r"(code_size|query\.size|vector)", Range(1, 16_384)),
    (r"components", Range(0, 16_384)),
    (r"((\w+_)?(width|size|heads|patch|features|hop|stride)|widths)", SIZE),
    (r"((\w+_)?depth|layers)", Range(1, 1024)),
    (r"\w+_blocks", Range(1, 64)),
    (r"mlp_ratio", Range(0, 1024, above=True)),
    (r"shared", Range(0, 1024)),
    (r"classes", Range(0, 2**24)),
    (r"dtype", Choice(("bfloat16", "float16", "float32"))),
    (r"remat", Choice(("auto", "none", "some", "dots", "full", "offload"))),
    (r"scale_rule", Choice(("none", "linear", "sqrt"))),
    # of data and evaluators
    (r"seconds", Range(0, 86_400, above=True)),
    (r"eval\.(in_loop\.)?(candidates|category_classifier_steps)", Range(0, COUNT.high)),  # 0 leaves a metric out
    (r"zeroshot_images", Range(0, COUNT.high)),  # 0 is all
    (r"likelihood\.most", Range(0, COUNT.high)),  # 0 leaves it out
    (r"(eval(\.in_loop)?|patches)\.\w+", COUNT),
)
_COMPILED = tuple((re.compile(rf"(?:.*\.)?(?:{pattern})"), rule) for pattern, rule in RANGES)


def check(values: Mapping[str, Any], own: Mapping[str, Any] | None = None) -> None:
    """Raises UserError at the first value that its key may not have: one sentence with the key and what is allowed.

    Args:
      values: by dotted key.
      own: what the config file itself states; an infinity there is allowed to be one.
    """
    own = values if own is None else own
    for key, value in values.items():
        check_value(key, value, own.get(key))


def check_value(key: str, value: Any, own: Any = None) -> None:
    """`check` of one value; `own` is the config file's."""
    allowed = _wrong(key, value, _infinite(own))
    if allowed:
        raise UserError(f"config.{key} must be {allowed}, not {short(value)}.")


def _wrong(key: str, value: Any, infinite: bool) -> str:
    if isinstance(value, (tuple, list)):
        return next((text for item in value if (text := _wrong(key, item, infinite))), "")
    if isinstance(value, Mapping):
        return next((text for name, item in value.items() if (text := _wrong(f"{key}.{name}", item, infinite))), "")
    if value is None or isinstance(value, bool):
        return ""
    if isinstance(value, str):
        if "\0" in value:
            return "text without a NUL character"
        rule = _rule(key, Choice)
        return rule.wrong(value) if rule else ""
    if not isinstance(value, (int, float)):
        return "a number, text, true, false, none or a list of these"
    rule = _rule(key, Range)
    if isinstance(value, float) and math.isinf(value) and infinite and (rule is None or rule.high == math.inf):
        return ""
    if isinstance(value, float) and not math.isfinite(value) and (rule is None or rule.high == math.inf):
        return "a finite number"
    if isinstance(value, float) and 0 < abs(value) < SMALLEST:
        return f"0 or at least {SMALLEST:g} in size, as float32 has it" if rule is None else rule.wrong(0.0)
    rule = rule or (Range(-INTEGERS, INTEGERS) if isinstance(value, int) else Range(-FLOATS, FLOATS))
    return rule.wrong(value)


def _rule(key: str, kind: type) -> Any:
    return next((rule for pattern, rule in _COMPILED if isinstance(rule, kind) and pattern.fullmatch(key)), None)


def _infinite(value: Any) -> bool:
    if isinstance(value, (tuple, list)):
        return any(_infinite(item) for item in value)
    return isinstance(value, float) and math.isinf(value)


def is_whole(value: Any, low: int) -> bool:
    """Whether a value is a whole number of `low` or more: NaN, 2.5 and True are none."""
    return not isinstance(value, bool) and hasattr(type(value), "__index__") and value >= low


def number(value: float) -> str:
    """A bound as a person writes it: 65,536, 0.5, 1e+06."""
    return f"{int(value):,}" if isinstance(value, int) or value.is_integer() and abs(value) < 1e15 else f"{value:g}"


def short(value: Any, most: int = 80) -> str:
    """`repr`, cut in the middle where it is long."""
    try:
        text = repr(value)
    except ValueError:  # an integer of more digits than Python writes
        text = f"{value:#x}"
    return text if len(text) <= most else f"{text[: most // 2]}...{text[-most // 2 :]}"
