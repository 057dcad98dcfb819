# SPDX-License-Identifier: Apache-2.0
"""Arrows run one way and cores are pure, here; and a tree that breaks this is noticed."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.house import arrows
from tests.house.conftest import Planter

_SOUND = {
    "chassis/__init__.py": "",
    "chassis/contract.py": "NAME = 'x'",
    "chassis/clock.py": "import time",
    "chassis/models.py": "import os",
    "extauth/__main__.py": "from extauth.server import main",
    "extauth/server.py": "from extauth.servicer import Servicer\nfrom extauth.adapters.directory import Directory\nimport chassis.clock",
    "extauth/servicer.py": "import grpc\nfrom extauth.core.decision import decide",
    "extauth/adapters/directory.py": "import psycopg\nfrom extauth.core import decision",
    "extauth/core/decision.py": "from datetime import datetime\nfrom chassis import contract\nfrom extauth.core.cache import Cache",
    "extauth/core/cache.py": "from collections import OrderedDict",
    "metering/collector.py": "import os\nfrom metering.core.fold import fold",
    "metering/core/fold.py": "",
    "control/use.py": "from extauth.core.cache import Cache\nimport chassis.contract",
}


def test_arrows_run_one_way_and_cores_are_pure(repository: Path) -> None:
    """`control -> {extauth, ratelimit, metering} -> chassis`; `__main__ -> server -> servicer -> adapters -> core`."""
    assert [] == arrows.findings(repository)


def test_the_rules_see_every_package(repository: Path) -> None:
    """A rule over no file would hold for ever."""
    seen = arrows._modules(repository)

    assert set(arrows.ALLOWED) == {name.partition(".")[0] for name in seen}
    assert {*arrows.SERVICES} == {name.partition(".")[0] for name in seen if arrows._is_core(name)}


def test_a_sound_tree_gives_no_finding(plant: Planter) -> None:
    """Everything that the design allows."""
    assert [] == arrows.findings(plant(_SOUND))


@pytest.mark.parametrize(
    ("file", "text", "expected"),
    [
        ("chassis/x.py", "import extauth", "chassis/x.py:1: chassis may not import extauth"),
        ("chassis/x.py", "from control import keys", "chassis/x.py:1: chassis may not import control"),
        ("extauth/adapters/x.py", "import ratelimit.core", "extauth/adapters/x.py:1: extauth may not import ratelimit"),
        ("ratelimit/core/x.py", "from metering.core import fold", "ratelimit/core/x.py:1: ratelimit may not import metering"),
        ("metering/server.py", "from control.store import Store", "metering/server.py:1: metering may not import control"),
        ("control/x.py", "from tests.fake_engine import server", "control/x.py:1: control may not import tests"),
        ("control/x.py", "def f():\n    import bench", "control/x.py:2: control may not import bench"),
        ("extauth/server.py", "def f():\n    from metering import core", "extauth/server.py:2: extauth may not import metering"),
        ("extauth/server.py", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import control", "extauth/server.py:3: extauth may not import control"),
        ("chassis/x.py", "import importlib\nimportlib.import_module('metering')", "chassis/x.py:2: chassis may not import metering"),
        ("chassis/x.py", "__import__('metering')", "chassis/x.py:1: chassis may not import metering"),
        ("chassis/x.py", "from importlib import import_module\nimport_module(name)", "chassis/x.py:2: imports a module whose name is only known when it runs"),
    ],
)  # fmt: skip
def test_an_arrow_between_packages_that_leads_the_wrong_way_is_found(
    plant: Planter, file: str, text: str, expected: str
) -> None:
    """With its line, also where the import is hidden in a function, a type check or a call."""
    assert [expected] == arrows.findings(plant(_SOUND | {file: text}))


@pytest.mark.parametrize(
    ("file", "text", "expected"),
    [
        ("extauth/core/cache.py", "from extauth.adapters import directory", "core may not import adapters"),
        ("extauth/core/cache.py", "from ..servicer import Servicer", "core may not import servicer"),
        ("extauth/adapters/directory.py", "from extauth import servicer", "adapters may not import servicer"),
        ("extauth/servicer.py", "import extauth.server", "servicer may not import server"),
        ("extauth/server.py", "from . import __main__", "server may not import __main__"),
        ("metering/server.py", "from metering import collector", "server may not import collector"),
        ("metering/helpers.py", "", "helpers has no place in a service"),
    ],
)
def test_an_arrow_inside_a_service_that_leads_up_is_found(plant: Planter, file: str, text: str, expected: str) -> None:
    """Lower places do not know the higher ones."""
    found = arrows.findings(plant(_SOUND | {file: text}))

    assert any(one.startswith(file) and expected in one for one in found), found


@pytest.mark.parametrize(
    "text",
    [
        "import grpc", "import redis.asyncio", "from psycopg import sql", "from google.protobuf import struct_pb2",
        "from chassis.wire import ext_authz_pb2", "from chassis import wire", "import time", "import os.path",
        "from random import choice", "import secrets", "import uuid", "import logging", "import structlog",
        "def f():\n    import time", "from chassis import clock", "from datetime import datetime\ndatetime.now()",
        "from datetime import date\ndate.today()", "import datetime as dt\ndt.datetime.now(dt.UTC)", "open('x')", "print('x')",
    ],
)  # fmt: skip
def test_a_core_that_is_not_pure_is_found(plant: Planter, text: str) -> None:
    """Transport, stores, clock, environment, randomness, files and logs are for those who call it."""
    found = arrows.findings(plant(_SOUND | {"extauth/core/decision.py": text}))

    assert 1 <= len(found)
    assert all(one.startswith("extauth/core/decision.py:") and "a core " in one for one in found)


def test_a_core_that_is_impure_through_another_module_is_found(plant: Planter) -> None:
    """What it imports of ours must be pure as well; the way is named."""
    tree = plant(_SOUND | {"extauth/core/decision.py": "from chassis.models import Model"})

    assert ["extauth/core/decision.py:1: a core may not import chassis.models -> os"] == arrows.findings(tree)
