"""Compressor specifications: stages joined by ``+``, each ``name``, ``name:argument,key=value``.

``topk:0.01+int4`` selects one element in a hundred and sends each as a sign and three bits. Nothing
in a specification needs quoting in a shell.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import lru_cache
from typing import Any

from protocol.compressors import Compressor, Pipeline
from protocol.errors import SettingsError
from protocol.layout import Layout
from protocol.lowrank import LowRank
from protocol.selections import BlockTopK, Everything, RandK, Selection, Threshold, TopK
from protocol.values import BY_NAME, Cast, Dither, ValueCode
from protocol.values.dither import MAX_LEVELS

SELECTIONS = ("topk", "blocktopk", "randk", "threshold")
CASTS = ("none", "f64", "f32", "f16", "bf16")
VALUES = (*CASTS, "int8", "int4", "int2", "sign", "ternary", "natural", "qsgd")
ORDER = "[SELECTION or lowrank]+[VALUES]+[entropy]"
BUFFERS = "bf16"  # a model's buffers (batch-norm statistics) are few and must not lag behind
QSGD_BUCKET = 512  # as in the experiments of the paper


@dataclass(frozen=True)
class _Stage:
    name: str
    argument: str | None
    options: dict[str, str]
    spec: str  # of the whole compressor, for messages

    def number(self, what: str, parse: Callable[[str], Any], valid: Callable[[Any], bool], says: str) -> Any:
        """The argument as a number."""
        return self._parsed(self.argument, what, parse, valid, says)

    def option(self, key: str, default: int, says: str) -> int:
        """An option that is a positive integer."""
        text = self.options.pop(key, None)
        return default if text is None else int(self._parsed(text, key, int, lambda n: n >= 1, says))

    def _parsed(
        self, text: str | None, what: str, parse: Callable[[str], Any], valid: Callable[[Any], bool], says: str
    ) -> Any:
        try:
            value = parse(text or "")
        except ValueError:
            value = None
        if value is None or not valid(value):
            got = f"no {what}" if text is None else f"{what} {text!r}"
            raise SettingsError(f"stage {self.name!r} in compressor {self.spec!r} has {got}; valid is {says}")
        return value

    def plain(self) -> None:
        """Refuse an argument."""
        if self.argument is not None:
            raise SettingsError(
                f"stage {self.name!r} in compressor {self.spec!r} takes no argument, but has {self.argument!r}"
            )


def _stage(text: str, spec: str) -> _Stage:
    name, colon, rest = text.partition(":")
    arguments = rest.split(",") if colon else []
    pairs = [a.partition("=")[::2] for a in arguments if "=" in a]
    plain = [a for a in arguments if "=" not in a]
    if len(plain) > 1 or (colon and not all(arguments)) or len(dict(pairs)) < len(pairs):
        raise SettingsError(f"stage {text!r} in compressor {spec!r} is malformed; valid is name:argument,key=value")
    return _Stage(name, plain[0] if plain else None, dict(pairs), spec)


def _selection(stage: _Stage) -> Selection:
    if stage.name == "threshold":
        above = stage.number("threshold", float, lambda t: 0 < t < math.inf, "a number above 0")
        return Threshold(above)
    ratio = stage.number("ratio", float, lambda r: 0 < r <= 1, "a number above 0 and at most 1")
    if stage.name == "blocktopk":
        return BlockTopK(ratio, stage.option("block", 4096, "a number of elements, at least 1"))
    return TopK(ratio) if stage.name == "topk" else RandK(ratio)


def _values(stage: _Stage) -> ValueCode | None:
    if stage.name == "qsgd":
        levels = stage.number("levels", int, lambda n: 1 <= n <= MAX_LEVELS, f"a number from 1 to {MAX_LEVELS}")
        bucket = stage.option("bucket", QSGD_BUCKET, "a number of values, at least 1")
        name = f"qsgd:{levels}" + (f",bucket={bucket}" if bucket != QSGD_BUCKET else "")
        return Dither(name, levels, bucket)
    stage.plain()
    return None if stage.name == "none" else BY_NAME[stage.name]


@lru_cache(maxsize=1024)
def compressor(spec: str, shape: tuple[int, ...] = ()) -> Compressor:
    """The compressor that a specification names.

    Args:
        spec: see ``docs/compressors.md``.
        shape: of the tensor whose elements are compressed; ``lowrank`` needs two dimensions or more, of
            which the first is the rows, and sends others by the value code alone.

    Raises:
        SettingsError: a stage is unknown, out of order or out of range; the message names it.
    """
    stages = [_stage(text, spec) for text in spec.split("+")]
    rest = list(stages)
    first = rest.pop(0) if rest[0].name in (*SELECTIONS, "lowrank") else None
    valued = rest.pop(0) if rest and rest[0].name in VALUES else None
    coded = rest.pop(0) if rest and rest[0].name == "entropy" else None
    if rest:
        raise SettingsError(_out_of_place(rest[0], spec))
    code = _values(valued) if valued else None
    if coded:
        coded.plain()
    selection = _selection(first) if first and first.name in SELECTIONS else Everything()
    rank = None
    if first and first.name == "lowrank":
        rank = first.number("rank", int, lambda r: r >= 1, "a number of columns, at least 1")
    for stage in stages:
        for key in stage.options:  # those that are valid have been taken out
            raise SettingsError(_no_option(stage, key))
    if rank is None:
        return Pipeline(selection, code, coded is not None)
    if code is not None and not isinstance(code, Cast):
        raise SettingsError(f"compressor {spec!r} has {code.name!r} after lowrank; valid are {', '.join(CASTS)}")
    rows, columns = (shape[0], math.prod(shape[1:])) if len(shape) > 1 else (1, math.prod(shape))
    if len(shape) < 2 or rank * (rows + columns) >= rows * columns:
        return Pipeline(Everything(), code, coded is not None)
    return LowRank(rank, rows, columns, code, coded is not None)


def _no_option(stage: _Stage, key: str) -> str:
    takes = {"blocktopk": "it takes block", "qsgd": "it takes bucket"}.get(stage.name, "it takes none")
    return f"stage {stage.name!r} in compressor {stage.spec!r} has no option {key!r}; {takes}"


def _out_of_place(stage: _Stage, spec: str) -> str:
    known = (*SELECTIONS, "lowrank", *VALUES, "entropy")
    if stage.name in known:
        return f"compressor {spec!r} has {stage.name!r} out of place; the order is {ORDER}, each at most once"
    return (
        f"compressor {spec!r} has unknown stage {stage.name!r}; valid selections are {', '.join(SELECTIONS)}, lowrank; "
        f"values {', '.join(VALUES)}; last entropy"
    )


def compressors_for(layout: Layout, spec: str, overrides: Mapping[str, str]) -> tuple[Compressor, ...]:
    """One compressor a segment: the first override whose glob matches the name, else ``spec``.

    Buffers that no override names are sent in ``BUFFERS``.

    Raises:
        SettingsError: a specification is not valid, or a glob matches nothing in the model.
    """
    names = [segment.entry.name for segment in layout.segments]
    for glob in overrides:
        if not any(fnmatchcase(name, glob) for name in names):
            raise SettingsError(f"overrides has {glob!r}, which matches no tensor; the model has {', '.join(names)}")
    chosen = []
    for segment in layout.segments:
        default = BUFFERS if segment.entry.role == "buffer" else spec
        found = (text for glob, text in overrides.items() if fnmatchcase(segment.entry.name, glob))
        chosen.append(compressor(next(found, default), tuple(segment.entry.shape)))
    return tuple(chosen)
