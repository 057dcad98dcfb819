# SPDX-License-Identifier: Apache-2.0
"""Read a Dockerfile as far as our rules and `tests/ship/moved.py` need it: instructions by stage."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass, field
from typing import Final, Self

_FROM: Final = re.compile(r"(\S+)(?: AS (\S+))?$")


@dataclass(slots=True)
class Stage:
    """What one `FROM` begins."""

    base: str
    instructions: list[tuple[str, str]] = field(default_factory=list)

    def all(self, word: str) -> list[str]:
        """The arguments of each instruction of that word."""
        return [rest for found, rest in self.instructions if found == word]


@dataclass(frozen=True, slots=True, kw_only=True)
class Copy:
    """One COPY: from the context, or from the stage that is named."""

    stage: str | None
    sources: tuple[str, ...]
    target: str

    @classmethod
    def parse(cls, rest: str) -> Self:
        """Of its arguments; an option other than --from is refused, not forgotten."""
        words = shlex.split(rest)
        stage = words.pop(0).removeprefix("--from=") if words[0].startswith("--from=") else None
        assert not words[0].startswith("--"), rest
        *sources, target = words
        assert sources, rest
        return cls(stage=stage, sources=tuple(sources), target=target)


def read(text: str) -> tuple[dict[str, str], dict[str, Stage]]:
    """Arguments before the first stage, and the stages by their names; lines are joined as a builder joins them."""
    logical = "\n".join(line for line in text.splitlines() if not line.lstrip().startswith("#")).replace("\\\n", "")
    arguments: dict[str, str] = {}
    stages: dict[str, Stage] = {}
    current: Stage | None = None
    for line in filter(None, (line.strip() for line in logical.splitlines())):
        word, _, rest = line.partition(" ")
        if word == "FROM":
            matched = _FROM.match(rest)
            assert matched is not None, line
            current = Stage(matched[1])
            stages[matched[2] or str(len(stages))] = current
        elif current is None:
            assert word == "ARG", line
            name, _, value = rest.partition("=")
            arguments[name] = value
        else:
            current.instructions.append((word, rest.strip()))
    return arguments, stages
