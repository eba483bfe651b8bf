"""Which members take part in a round: a pure function that every side computes for itself."""

from __future__ import annotations

import hashlib
from collections.abc import Collection


def participants(members: Collection[int], share: float, seed: int, version: int) -> tuple[int, ...]:
    """The members that take part in the round at ``version``, in ascending order.

    A uniform sample without replacement of ``max(1, round(share * n))``: client sampling as in FedAvg (McMahan et
    al., "Communication-Efficient Learning of Deep Networks from Decentralized Data", AISTATS 2017, Algorithm 1).
    Every member has its own number in every round, so that who joins or leaves changes little for the others.

    Args:
        members: ids of the workers that are present.
        share: of them, in (0, 1].
        seed: of the run.
    """
    count = max(1, round(share * len(members)))
    if count >= len(members):
        return tuple(sorted(members))
    return tuple(sorted(sorted(members, key=lambda worker: _number(seed, version, worker))[:count]))


def _number(*parts: int) -> bytes:
    return hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
