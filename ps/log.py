"""The log of broadcasts: the model at version t is the model at s < t and the entries between."""

from __future__ import annotations

from collections import OrderedDict

import numpy as np
import numpy.typing as npt

U8 = npt.NDArray[np.uint8]


class Log:
    """The newest entries, as the frames that were broadcast.

    Args:
        window: how many entries are kept; a replica further behind needs a snapshot.
    """

    def __init__(self, window: int = 64) -> None:
        self.window = window
        self._frames: OrderedDict[int, U8] = OrderedDict()

    def append(self, version: int, frame: U8) -> None:
        """Add the frame of entry ``version``, which must follow the last one."""
        if self._frames and version != next(reversed(self._frames)) + 1:
            raise ValueError(f"entry {version} does not follow entry {next(reversed(self._frames))}")
        self._frames[version] = frame
        while len(self._frames) > self.window:
            self._frames.popitem(last=False)

    def since(self, version: int) -> list[U8] | None:
        """The frames of the entries after ``version`` in order, or None if some are gone."""
        newest = next(reversed(self._frames), version)
        wanted = range(version + 1, newest + 1)
        if any(v not in self._frames for v in wanted):
            return None
        return [self._frames[v] for v in wanted]
