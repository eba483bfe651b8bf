"""A training process: the session that user code sees, error feedback, the Ray worker actor; a cut through a model.

Imports ``protocol`` and nothing else of Carryover.
"""

from workers.cut import Cut
from workers.halves import Downstream, Upstream
from workers.session import Session

__all__ = ["Cut", "Downstream", "Session", "Upstream"]
