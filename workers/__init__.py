"""A training process: the session that user code sees, error feedback, the Ray worker actor.

Imports ``protocol`` and nothing else of Carryover.
"""

from workers.session import Session

__all__ = ["Session"]
