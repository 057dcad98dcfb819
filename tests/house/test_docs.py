# SPDX-License-Identifier: Apache-2.0
"""What people read leads somewhere: links, their anchors, commands, the site's table of contents."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from tests.house.conftest import Planter

_LINK = re.compile(r"(?<!!)\[[^\]]*\]\(([^)\s]+)\)")
_CODE = re.compile(r"^```.*?^```$|`[^`\n]*`", re.MULTILINE | re.DOTALL)
_COMMAND = re.compile(r"\./peaje ((?:[a-z][a-z-]*)(?: [a-z][a-z-]*)*)")
#: What `./peaje` itself does, before the command line.
_OF_THE_SCRIPT = {"test", "environment", "command"}
_README_LINES_MAX = 120


def pages(root: Path) -> list[Path]:
    """Everything that people read."""
    named = [root / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")]
    return [*filter(Path.exists, named), *sorted((root / "docs").rglob("*.md")), *sorted((root / "examples").rglob("*.md"))]


def dead_links(root: Path) -> list[str]:
    """Links to a file that is not there, or to a heading that the file does not have."""
    found = []
    for page in pages(root):
        for link in _LINK.findall(_CODE.sub("", page.read_text())):
            target, _, anchor = link.partition("#")
            if re.match(r"[a-z]+:", target):
                continue
            path = (page.parent / target).resolve() if target else page
            if not path.exists():
                found.append(f"{page.relative_to(root)}: {link}")
            elif anchor and anchor not in set(anchors(path.read_text())):
                found.append(f"{page.relative_to(root)}: {link} has no such heading")
    return found


def anchors(text: str) -> Iterator[str]:
    """
    The anchors of a page's headings, as GitHub makes them.

    >>> list(anchors("## Who may call: identity.yaml"))
    ['who-may-call-identityyaml']
    """
    for heading in re.findall(r"^#+ (.+)$", _CODE.sub(lambda code: code[0].strip("`") if "\n" not in code[0] else "", text), re.MULTILINE):
        yield re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-")


def unknown_commands(root: Path) -> list[str]:
    """`./peaje …` that the command line does not have: by the generated reference, which is current."""
    known = {tuple(line.split()[2:]) for line in (root / "docs/reference/cli.md").read_text().splitlines() if line.startswith("## peaje ")}
    groups = {path[:size] for path in known for size in range(1, len(path) + 1)}
    found = []
    for page in pages(root):
        for said in _COMMAND.findall(page.read_text()):
            words = tuple(said.split())
            if words[0] in _OF_THE_SCRIPT or any(words[:size] in known for size in range(1, 4)) or words in groups:
                continue
            found.append(f"{page.relative_to(root)}: ./peaje {said}")
    return found


def test_every_link_leads_somewhere(repository: Path) -> None:
    """To a file of this repository, at a heading that it has."""
    assert len(pages(repository)) > 30
    assert [] == dead_links(repository)


def test_every_command_in_the_docs_is_one(repository: Path) -> None:
    """A renamed command would leave its old name in a guide."""
    assert [] == unknown_commands(repository)


def test_what_leads_nowhere_is_found(plant: Planter) -> None:
    """A missing file, a missing heading, a command that there is not; code is no link."""
    root = plant(
        {
            "README.md": "[a](docs/a.md) [b](docs/b.md) [c](docs/a.md#two) `[d](docs/d.md)`\n./peaje keys mint and ./peaje keys create x\n",
            "docs/a.md": "# One\n",
            "docs/reference/cli.md": "## peaje keys create\n",
        }
    )

    assert ["README.md: docs/b.md", "README.md: docs/a.md#two has no such heading"] == dead_links(root)
    assert ["README.md: ./peaje keys mint and"] == unknown_commands(root)


def test_the_readme_is_short(repository: Path) -> None:
    """One sitting: what it is, how to try it, where to read on."""
    assert len((repository / "README.md").read_text().splitlines()) <= _README_LINES_MAX


def _listed(node: object) -> Iterator[str]:
    match node:
        case str():
            yield node
        case list():
            for one in node:
                yield from _listed(one)
        case dict():
            for one in node.values():
                yield from _listed(one)


@pytest.mark.parametrize("apart", [("decisions", "reference")])
def test_the_site_shows_every_page(repository: Path, apart: tuple[str, ...]) -> None:
    """In its table of contents; decisions are linked from where they matter, and the reference grows by itself."""
    site = yaml.safe_load((repository / "mkdocs.yml").read_text())
    docs = {path.relative_to(repository / "docs").as_posix() for path in (repository / "docs").rglob("*.md")}

    assert site["strict"] is True
    assert {page for page in docs if page.partition("/")[0] not in apart} <= set(_listed(site["nav"])) <= docs
