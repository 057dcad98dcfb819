# SPDX-License-Identifier: Apache-2.0
"""
Do the steps of a Dockerfile's stages below a directory, without Docker and without root.

Each stage has a directory of its own that stands in for `/`. COPY, WORKDIR and ENV are done as a builder does them. RUN
lines are run by `sh -c` as they are written, but for the absolute paths of `PREFIXES`, which are put below that directory;
a line with any other absolute path is refused. The base image is what the caller puts on PATH.

What makes users or gives files to them needs root and is left out, by name, in `Made.left_out`; so is USER.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final

from tests.ship.dockerfile import Copy, Stage

#: What the images have of their own.
PREFIXES: Final = ("build", "opt", "var/lib/peaje")
_OURS: Final = re.compile(rf"(?<![\w./])/(?=(?:{'|'.join(PREFIXES)})\b)")
#: Not a regular expression of awk's, which begins with something else than a name.
_ABSOLUTE: Final = re.compile(r"(?<![\w./])/\w[\w./-]*")
_NEEDS_ROOT: Final = re.compile(r"\b(?:groupadd|useradd|chown)\b")
#: Say something of the image, and change no file in it.
_NO_FILES: Final = {"CMD", "LABEL", "USER"}
#: A hang, not a slow machine.
_STEP_SECONDS: Final = 900


class StepFailed(AssertionError):
    """A step that would have ended the build; says what the step said."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Made:
    """A stage whose steps have been done, or some of them."""

    root: Path
    workdir: str = "/"
    environment: dict[str, str] = field(default_factory=dict)
    left_out: tuple[str, ...] = ()

    def at(self, path: str) -> Path:
        """Where *path* of the image is; relative to its WORKDIR."""
        return self.root / os.path.join(self.workdir, path).lstrip("/")  # noqa: PTH118 - an absolute second part replaces the first

    def moved(self, text: str) -> str:
        """*text* with each absolute path of ours below `root`."""
        return _OURS.sub(f"{self.root}/", text)

    def run(self, *command: str) -> subprocess.CompletedProcess[str]:
        """Run *command* with the ENV of the image and nothing else of whoever runs the tests."""
        return subprocess.run(
            list(command), cwd=self.at("."), env=self.environment, capture_output=True, text=True, timeout=_STEP_SECONDS, check=False
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Builder:
    """Stages, the files that a builder would be sent, a directory to work in, and that of the base image's programs."""

    stages: dict[str, Stage]
    context: Path
    below: Path
    programs: Path
    made: dict[str, Made] = field(default_factory=dict)

    def build(self, name: str) -> Made:
        """Do all steps of the stage and of those that it needs; the first that fails ends it."""
        if name not in self.made:
            stage = self.stages[name]
            made = Made(root=self.below / name)
            if stage.base in self.stages:
                base = self.build(stage.base)
                _copy_tree(base.root, made.root, link=True)
                made = replace(base, root=made.root, environment={k: v.replace(str(base.root), str(made.root)) for k, v in base.environment.items()})
            made.root.mkdir(parents=True, exist_ok=True)
            for word, rest in stage.instructions:
                made = self._step(made, word, rest)
            self.made[name] = made
        return self.made[name]

    def _step(self, made: Made, word: str, rest: str) -> Made:
        match word:
            case "WORKDIR":
                made = replace(made, workdir=rest)
                made.at(".").mkdir(parents=True, exist_ok=True)
            case "ENV":
                named = dict(one.split("=", 1) for one in shlex.split(rest))
                made = replace(made, environment=made.environment | {name: made.moved(value) for name, value in named.items()})
            case "COPY":
                self._copy(made, Copy.parse(rest))
            case "RUN" if _NEEDS_ROOT.search(rest):
                made = replace(made, left_out=(*made.left_out, rest))
            case "RUN":
                self._run(made, rest)
            case _ if word not in _NO_FILES:
                raise StepFailed(f"nothing here knows how to do {word} {rest}")
        return made

    def _copy(self, made: Made, copy: Copy) -> None:
        target = made.at(copy.target)
        for name in copy.sources:
            source = self.build(copy.stage).at(name) if copy.stage else self.context / name
            into = target / source.name if copy.target.endswith("/") and not source.is_dir() else target
            if not source.exists():
                raise StepFailed(f"there is no {name} to copy")
            into.parent.mkdir(parents=True, exist_ok=True)
            if source.is_dir():
                _copy_tree(source, into, link=copy.stage is not None)
            else:
                into.unlink(missing_ok=True)
                shutil.copy2(source, into)

    def _run(self, made: Made, line: str) -> None:
        elsewhere = [path for path in _ABSOLUTE.findall(line) if not _OURS.match(path)]
        if elsewhere:
            raise StepFailed(f"would leave the moved root, by {elsewhere}: {line}")
        # pip's settings are the machine's; an environment that this one runs in is not the base image's.
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL_ENV", "PEAJE_"))}
        done = subprocess.run(
            ["/bin/sh", "-c", made.moved(line)], cwd=made.at("."), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            env=kept | {"PATH": f"{self.programs}:/usr/local/bin:/usr/bin:/bin"} | made.environment, timeout=_STEP_SECONDS, check=False,
        )  # fmt: skip
        if done.returncode != 0:
            raise StepFailed(f"{line} ended with {done.returncode}:\n{done.stdout}")


def sent(repository: Path, into: Path) -> Path:
    """Copy what `.dockerignore` lets a builder see: each `!name`, without what a `**/name` after it names."""
    lines = [line for line in (repository / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")]
    without = shutil.ignore_patterns(*(line.removeprefix("**/") for line in lines if line.startswith("**/")))
    into.mkdir()
    for name in (line[1:] for line in lines if line.startswith("!")):
        if (repository / name).is_dir():
            shutil.copytree(repository / name, into / name, symlinks=True, ignore=without)
        else:
            shutil.copy2(repository / name, into / name)
    return into


def _copy_tree(source: Path, target: Path, *, link: bool) -> None:
    """With *link* both have the same files, as layers do: for stages, whose steps replace files and never write into one."""
    shutil.copytree(source, target, symlinks=True, dirs_exist_ok=True, copy_function=_link if link else shutil.copy2)


def _link(source: str, target: str) -> None:
    Path(target).unlink(missing_ok=True)
    os.link(source, target)
