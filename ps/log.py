"""The log of broadcasts: the model at version t is the model at s < t and the entries between."""

from __future__ import annotations

from collections import OrderedDict

import numpy as np
import numpy.typing as npt

U8 = npt.NDArray[np.uint8]


class Log:
    """The newest entries, as the frames that were broadcast.

    Args:
        window: how many entries are kept at most; a replica further behind needs a snapshot.
        limit: bytes that they may take together; beyond those of a snapshot, nobody would want them.
    """

    def __init__(self, window: int = 64, limit: int = 1 << 30) -> None:
        self.window = window
        self.limit = limit
        self._frames: OrderedDict[int, U8] = OrderedDict()
        self._digests: dict[int, int] = {}

    def append(self, version: int, frame: U8) -> None:
        """Add the frame of entry ``version``, which must follow the last one."""
        if self._frames and version != next(reversed(self._frames)) + 1:
            raise ValueError(f"entry {version} does not follow entry {next(reversed(self._frames))}")
        self._frames[version] = frame
        while len(self._frames) > self.window or (len(self._frames) > 1 and self._size() > self.limit):
            self._frames.popitem(last=False)
        oldest = next(iter(self._frames)) - 1
        self._digests = {known: digest for known, digest in self._digests.items() if known >= oldest}

    def note(self, version: int, digest: int) -> None:
        """Keep the digest of the model at a version as long as the entries after it."""
        self._digests[version] = digest

    def digest(self, version: int) -> int | None:
        """Of the model at a version, if it was noted and is still kept."""
        return self._digests.get(version)

    def _size(self) -> int:
        return sum(frame.size for frame in self._frames.values())

    def since(self, version: int) -> list[U8] | None:
        """The frames of the entries after ``version`` in order, or None if some are gone."""
        newest = next(reversed(self._frames), version)
        wanted = range(version + 1, newest + 1)
        if any(v not in self._frames for v in wanted):
            return None
        return [self._frames[v] for v in wanted]
