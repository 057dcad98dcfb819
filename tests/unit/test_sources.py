# SPDX-License-Identifier: Apache-2.0
"""Which journals a collector is told to read."""

from __future__ import annotations

from pathlib import Path

import pytest

from chassis.errors import Invalid
from metering.adapters.sources import JOURNALS_MAX, find_sources, read_sources

WRONG = {
    "nothing": " , ", "no name": "=/v/a.jsonl", "no path": "a=", "no equals": "/nowhere/at/all", "a name with a slash": "a/b=/v/a",
    "a name twice": "a=/v/a,a=/v/b", "a file twice": "a=/v/a,b=/v/a", "port 0": "a=/v/a@0", "a port too high": "a=/v/a@65536",
    "a long name": f"{'a' * 64}=/v/a",
}


@pytest.mark.parametrize("text", WRONG.values(), ids=WRONG)
def test_what_is_no_list_of_journals_is_refused_in_one_line(text: str) -> None:
    """Before anything is read."""
    with pytest.raises(Invalid) as refused:
        read_sources(text)

    assert 1 == len(str(refused.value).splitlines())


@pytest.mark.parametrize("beyond", [-1, 0, 1])
def test_a_collector_reads_a_bounded_number_of_journals(tmp_path: Path, beyond: int) -> None:
    """Named ones beyond it are refused; of a directory's the first are read."""
    names = [f"envoy-{number:03d}" for number in range(JOURNALS_MAX + beyond)]
    for name in names:
        (tmp_path / name).mkdir()
    (tmp_path / "a-file").touch()

    assert names[:JOURNALS_MAX] == [source.name for source in find_sources(tmp_path)]
    text = ",".join(f"{name}=/v/{name}/journal.jsonl" for name in names)
    if beyond > 0:
        with pytest.raises(Invalid):
            read_sources(text)
    else:
        assert len(names) == len(read_sources(text))
