# SPDX-License-Identifier: Apache-2.0
"""
What a model's own tokenizer makes of prompts, before any has been settled.

No prompt is tokenized here: a tokenizer takes about a millisecond a kilobyte, and prompts do not come to this
service. It is asked once for texts like theirs, and the fewest bytes that it needs for a token stand for the model
until its engine has counted enough prompts (`ratelimit.core.estimate`). Read from the path alone, never fetched.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

import structlog

from chassis.errors import Invalid
from chassis.models import ModelCatalogue
from chassis.watching import file_version
from ratelimit.core.estimate import Estimates

log = structlog.get_logger()

#: Bytes. The largest vocabularies in use have 20 MB; what is beyond this is not a tokenizer.json.
FILE_BYTES_MAX: Final = 64 << 20
_LOOK_EVERY_SECONDS: Final = 2.0

#: What callers send: prose in several scripts, code, JSON. Each is judged alone; the worst counts.
SAMPLES: Final = (
    (
        "The committee published its findings on Tuesday, after eleven months of interviews with residents, engineers and "
        "the people who had maintained the bridge since 1968. Nobody had expected the report to be short, and it was not."
    ),
    (
        "def moving_average(values: list[float], width: int) -> list[float]:\n    if not 0 < width <= len(values):\n"
        '        raise ValueError(f"width {width} does not fit")\n    return [sum(values[i : i + width]) / width for i in '
        "range(len(values) - width + 1)]\n"
    ),
    (
        '{"order": 48213, "customer": {"id": "c-9f31", "country": "PT"}, "items": [{"sku": "A-1200", "quantity": 3, '
        '"price": 19.95}, {"sku": "B-77", "quantity": 1, "price": 240.0}], "paid": true, "note": null}'
    ),
    "Die Überprüfung der Brücke dauerte länger als erwartet, weil die ursprünglichen Zeichnungen nicht auffindbar waren.",
    "Комиссия опубликовала свои выводы во вторник, после одиннадцати месяцев бесед с жителями и инженерами.",
    "委员会在星期二公布了调查结果，此前用了十一个月的时间采访居民、工程师以及自一九六八年以来一直维护这座桥的人员。",
    "委員会は火曜日に調査結果を公表した。住民や技術者への聞き取りには十一か月かかった。",
    "نشرت اللجنة نتائجها يوم الثلاثاء بعد أحد عشر شهرا من المقابلات مع السكان والمهندسين.",
    "समिति ने ग्यारह महीने तक निवासियों और अभियंताओं से बात करने के बाद मंगलवार को अपने निष्कर्ष प्रकाशित किए।",
)


def bytes_per_token(path: Path) -> float:
    """The fewest bytes a token of any of `SAMPLES` has; raises `Invalid` for what is no tokenizer."""
    # Here, because the library takes 20 MB that no installation without a tokenizer needs.
    from tokenizers import Tokenizer  # noqa: PLC0415

    try:
        is_too_long = path.stat().st_size > FILE_BYTES_MAX
    except OSError as exc:
        raise Invalid(f"{path} cannot be read: {exc.strerror}.") from exc
    if is_too_long:
        raise Invalid(f"{path} has more than {FILE_BYTES_MAX >> 20} MiB.")
    try:
        tokenizer = Tokenizer.from_file(str(path))
        counts = [len(tokenizer.encode(sample).ids) for sample in SAMPLES]
    except Exception as exc:
        # The library raises plain Exception for whatever is wrong with a file.
        raise Invalid(f"{path} is no tokenizer.json.") from exc
    return min(len(sample.encode()) / max(count, 1) for sample, count in zip(SAMPLES, counts, strict=True))


class Calibration:
    """Keeps the estimates calibrated by the tokenizers that the models document names."""

    def __init__(self, catalogue: Callable[[], ModelCatalogue], estimates: Estimates) -> None:
        self._catalogue = catalogue
        self._estimates = estimates
        self._seen: dict[tuple[Path, object], float | None] = {}

    def look(self) -> None:
        """Read what is new or was replaced; a bad file is logged once and leaves its model uncalibrated."""
        wanted = {
            model.name: (model.tokenizer, file_version(model.tokenizer))
            for model in self._catalogue().models
            if model.tokenizer is not None
        }
        self._seen = {key: self._seen[key] if key in self._seen else self._read(key[0]) for key in set(wanted.values())}
        self._estimates.calibrate({name: ratio for name, key in wanted.items() if (ratio := self._seen[key]) is not None})

    def _read(self, path: Path) -> float | None:
        try:
            ratio = bytes_per_token(path)
        except Invalid as exc:
            log.error("tokenizer_refused", reason=exc.message)
            return None
        log.info("tokenizer_read", path=str(path), bytes_per_token=round(ratio, 2))
        return ratio


def calibrate_for_ever(calibration: Calibration) -> None:
    """Look every two seconds: one stat() a tokenizer."""
    while True:
        calibration.look()
        time.sleep(_LOOK_EVERY_SECONDS)


def start(catalogue: Callable[[], ModelCatalogue], estimates: Estimates) -> None:
    """Calibrate from a thread of its own."""
    calibration = Calibration(catalogue, estimates)
    threading.Thread(target=calibrate_for_ever, args=(calibration,), name="tokenizers", daemon=True).start()
