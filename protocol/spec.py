"""Compressor specifications: stages joined by ``+``, each ``name``, ``name:argument,key=value``.

``topk:0.01+int4`` selects one element in a hundred and sends each as a sign and three bits. Nothing
in a specification needs quoting in a shell.
"""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase
from functools import lru_cache

from protocol.compressors import Compressor, Dense, TopK
from protocol.errors import SettingsError
from protocol.layout import Layout

DENSE = ("none", "f64", "f32", "bf16", "sign")
SELECTED = ("none", "f64", "f32", "bf16", "int8", "int4", "sign")
SELECTIONS = ("topk",)
BUFFERS = "bf16"  # a model's buffers (batch-norm statistics) are few and must not lag behind


def _stage(text: str) -> tuple[str, str | None, dict[str, str]]:
    name, colon, rest = text.partition(":")
    arguments = rest.split(",") if colon else []
    options = dict(a.partition("=")[::2] for a in arguments if "=" in a)
    plain = [a for a in arguments if "=" not in a]
    if len(plain) > 1 or (colon and not all(arguments)):
        raise SettingsError(f"stage {text!r} is malformed; valid is name:argument,key=value")
    return name, plain[0] if plain else None, options


def _ratio(spec: str, argument: str | None) -> float:
    try:
        ratio = float(argument or "")
    except ValueError:
        ratio = float("nan")
    if not 0.0 < ratio <= 1.0:
        got = "no ratio" if argument is None else f"ratio {argument!r}"
        raise SettingsError(f"compressor {spec!r} has {got}; valid is a number above 0 and at most 1")
    return ratio


@lru_cache(maxsize=256)
def compressor(spec: str) -> Compressor:
    """The compressor that a specification names.

    Raises:
        SettingsError: a stage is unknown, out of order or out of range; the message names it.
    """
    stages = [_stage(text) for text in spec.split("+")]
    (first, argument, _), rest = stages[0], stages[1:]
    for name, _, given in stages:
        if given:
            key = next(iter(given))
            raise SettingsError(f"stage {name!r} in compressor {spec!r} has no option {key!r}; it takes none")
    for name, extra, _ in rest + ([] if first in SELECTIONS else stages[:1]):
        if extra is not None and name in SELECTED:
            raise SettingsError(f"stage {name!r} in compressor {spec!r} takes no argument, but has {extra!r}")
    if first in SELECTIONS:
        ratio = _ratio(spec, argument)
        values = [name for name, _, _ in rest] or ["none"]
        if len(values) > 1 or values[0] not in SELECTED:
            raise SettingsError(
                f"compressor {spec!r} has {'+'.join(values)!r} after {first!r}; valid is one of {', '.join(SELECTED)}"
            )
        return TopK(ratio, values[0])
    if first in DENSE and not rest:
        return Dense(first)
    if first in DENSE:
        raise SettingsError(f"compressor {spec!r} has a stage after {first!r}, which must come last")
    if first in SELECTED:
        raise SettingsError(f"compressor {spec!r} needs a selection first, as in topk:0.01+{first}")
    raise SettingsError(
        f"compressor {spec!r} begins with unknown stage {first!r}; "
        f"valid are {', '.join(f'{s}:RATIO' for s in SELECTIONS)}, {', '.join(DENSE)}"
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
        chosen.append(compressor(next(found, default)))
    return tuple(chosen)
