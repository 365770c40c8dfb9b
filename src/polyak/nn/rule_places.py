"""Which rule where, as text: `residual_momentum@attention+gradient_descent@mlp`.

    RULE[OPTION=VALUE,...]@PLACE + RULE[...]@PLACE + RULE

A place is `attention` or `mlp`, layers counted from 1 (`3`, `1-6`), or both (`1-6.attention`); one
part may have none and takes the rest. A name alone, as most models have it, is one part. Imports
neither torch nor rules: this is also how a folder's files are asked whose code they name.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from polyak.errors import ConfigError
from polyak.settings import parse_free

SUBSTEPS: dict[str, tuple[str, ...]] = {
    "lie_trotter": ("attention", "mlp"),
    "simultaneous": ("layer",),
}
"""Names of a layer's substeps, in order, by splitting."""

_NAME = r"[\w-]+|[^\[\]+@\s][^\[\]]*?:[^\W\d]\w*"  # registered; file.py:Class or module:Class
_PART = re.compile(
    rf"\s*+(?P<rule>{_NAME})\s*+(?:\[(?P<brackets>[^\[\]]*)\])?\s*+(?:@(?P<place>[\w.\s-]*))?"
    r"(?:\+|$)"
)
_PLACE = re.compile(r"(?:([0-9]{1,6})(?:-([0-9]{1,6}))?)?(?:(?:^|(?<=[0-9])\.)([^\W\d]\w*))?")


@dataclass(frozen=True)
class Part:
    """One rule of a model, and where it steps.

    Attributes:
        rule: a name of any form.
        brackets: what stands in the brackets behind it.
        place: what stands behind `@`; None for the part that takes the rest.
    """

    rule: str
    brackets: str = ""
    place: str | None = None

    def assignments(
        self, option: str = "rule", text: str | None = None, given: Iterable[str] = ()
    ) -> Iterator[tuple[str, str]]:
        """What the brackets set: (key, value as text).

        Args:
            option: what the text was given as, for error messages.
            text: the whole text, for the same; None: this part's.
            given: keys that other brackets have set.

        Raises:
            ConfigError: an assignment has no `=`, or a key is set twice.
        """
        text, seen = text or str(self), set(given)
        for assignment in filter(None, (part.strip() for part in self.brackets.split(","))):
            key, equals, value = (part.strip() for part in assignment.partition("="))
            if not equals:
                raise ConfigError(
                    f"{option}: {assignment!r} in {text!r} has no '='; write key=value"
                )
            if key in seen:
                raise ConfigError(f"{option}: {key!r} is set twice in {text!r}; remove one")
            seen.add(key)
            yield key, value

    @property
    def options(self) -> dict[str, Any]:
        """The rule's options, where the brackets hold nothing else."""
        return {
            key.removeprefix("rule_options."): parse_free(value)
            for key, value in self.assignments()
        }

    @property
    def layers(self) -> tuple[int, int] | None:
        """First and last layer of the place, from 1; None for all.

        Raises:
            ConfigError: the place is not of that form.
        """
        first, last, _ = self._place()
        return None if first is None else (int(first), int(last or first))

    @property
    def substep(self) -> str | None:
        """The substep that the place names; None for every one."""
        return self._place()[2]

    def _place(self) -> tuple[str | None, str | None, str | None]:
        match = _PLACE.fullmatch(self.place or "")
        if match is None or (self.place is not None and not self.place):
            raise ConfigError(
                f"rule: place {self.place!r} of {self} is none; use attention, mlp, layers such as "
                "3 or 1-6, or both, as in 1-6.attention"
            )
        return match[1], match[2], match[3]

    def named(self, rule: str) -> Part:
        """The same part of another rule."""
        return replace(self, rule=rule)

    def __str__(self) -> str:
        inside = ",".join(part.strip() for part in self.brackets.split(",") if part.strip())
        place = "" if self.place is None else f"@{self.place}"
        return f"{self.rule}[{inside}]{place}" if inside else f"{self.rule}{place}"


def parts_of(text: str) -> tuple[Part, ...]:
    """The parts of a model's rule; what is not of several parts or places is one name."""
    parts, at = [], 0
    while match := _PART.match(text, at):
        place = match["place"]
        place = None if place is None else "".join(place.split())
        parts.append(Part(match["rule"], (match["brackets"] or "").strip(), place))
        at = match.end()
        if at == len(text) and not text.endswith("+"):
            break
    whole = bool(parts) and at == len(text) and not text.endswith("+")
    placed = any(part.place is not None for part in parts)
    # a folder may have a "+" in its name
    several = placed or (len(parts) > 1 and ":" not in text)
    return tuple(parts) if whole and several else (Part(text),)


def is_composite(text: str) -> bool:
    """Whether a model's rule is more than a name."""
    parts = parts_of(text)
    return len(parts) > 1 or parts[0].place is not None


def text_of(parts: Iterable[Part]) -> str:
    """Back from `parts_of`."""
    return "+".join(map(str, parts))


def names_in(text: str) -> tuple[str, ...]:
    """The names in a model's rule, each once."""
    return tuple(dict.fromkeys(part.rule for part in parts_of(text)))


def renamed(text: str, rename: Callable[[str], str]) -> str:
    """A model's rule with every name as `rename` gives it."""
    return text_of(part.named(rename(part.rule)) for part in parts_of(text))


def short(text: str) -> str:
    """A model's rule with its files and modules left out: what tables show."""
    return renamed(text, lambda name: name.rpartition(":")[2])


def brackets_of(options: Mapping[str, Any]) -> str:
    """Options as they stand in brackets, so that reading gives them back."""

    def word(value: Any) -> str:
        if isinstance(value, list | tuple):
            return "+".join(map(word, value)) if len(value) else "none"
        return str(value).lower() if isinstance(value, bool) else str(value)

    return ",".join(f"{name}={word(value)}" for name, value in options.items())
