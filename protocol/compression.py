"""Which compressors a sender uses in which round."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any, cast

from protocol.compressors import Compressor, Pipeline
from protocol.layout import Layout
from protocol.selections import Everything
from protocol.settings import Schedule
from protocol.spec import compressor, compressors_for


class Compression:
    """The compressors of one direction as a function of the version and of the ratios that the server announced.

    Args:
        layout: of the model.
        spec: of all segments that no override names.
        overrides: glob on names -> specification.
        schedule: delays and warms up; the final ratios are those of the specifications.

    Raises:
        SettingsError: a specification is not valid, or a glob matches nothing.
    """

    def __init__(self, layout: Layout, spec: str, overrides: Mapping[str, str], schedule: Schedule) -> None:
        self.final = compressors_for(layout, spec, overrides)
        self._schedule = schedule
        dense = compressor("none")
        roles = [place.entry.role for place in layout.segments]
        self._plain = tuple(one if role == "buffer" else dense for role, one in zip(roles, self.final, strict=True))
        self._scaled = lru_cache(maxsize=1)(self._with_ratios)

    def at(self, version: int, ratios: Sequence[float] = ()) -> tuple[Compressor, ...]:
        """One compressor a segment for the round at ``version``.

        Args:
            ratios: announced by the server, one a segment (0 where it says nothing); empty before it has.
        """
        if not self._schedule.compresses(version):
            return self._plain
        wanted: list[float | None] = []
        for number, one in enumerate(self.final):
            final = ratio_of(one)
            if final is None:
                wanted.append(None)
                continue
            announced = ratios[number] if ratios else 0.0
            wanted.append(self._schedule.ratio(version, announced or final))
        return self._scaled(tuple(wanted))

    def _with_ratios(self, ratios: tuple[float | None, ...]) -> tuple[Compressor, ...]:
        return tuple(
            one if ratio is None else with_ratio(one, ratio) for one, ratio in zip(self.final, ratios, strict=True)
        )


def ratio_of(one: Compressor) -> float | None:
    """The share of the elements that a compressor selects, if that is what its specification says."""
    return getattr(one.selection, "ratio", None) if isinstance(one, Pipeline) else None


def count_of(one: Compressor, numel: int) -> int:
    """How many of ``numel`` elements a compressor sends at most."""
    return one.selection.count(numel) if isinstance(one, Pipeline) else numel


def selects(one: Compressor) -> bool:
    """Whether a compressor sends some of the elements and not the others."""
    return isinstance(one, Pipeline) and not isinstance(one.selection, Everything)


def sends_all(one: Compressor, numel: int) -> bool:
    """Whether a compressor's ratio leaves none of ``numel`` elements out."""
    return ratio_of(one) is not None and count_of(one, numel) == numel


def with_ratio(one: Compressor, ratio: float) -> Compressor:
    """The same compressor with another ratio.

    Raises:
        ValueError: it does not select by a ratio.
    """
    if ratio_of(one) is None:
        raise ValueError(f"{one.spec!r} does not select by a ratio")
    pipeline = cast(Pipeline, one)
    return replace(pipeline, selection=replace(cast(Any, pipeline.selection), ratio=ratio))
