"""Every error that Carryover raises on purpose.

::

    CarryoverError
    ├── SettingsError (ValueError)       a setting, a specification or an argument is not valid
    ├── LayoutError (ValueError)         the model cannot be laid out, or is not the model the run has
    ├── NotFiniteError (ArithmeticError) an update holds NaN or Inf
    ├── DecodeError (ValueError)         bytes that arrived are not a valid frame or segment
    ├── Refused                          the server refused a message; ``reason`` says which kind
    ├── RunStopped                       the run ended while this worker was waiting
    └── RunFailed                        the run could not do what it was asked

Each message is one sentence that names the offender and what would be valid. All of them survive
pickling, because Ray ships them between processes.
"""

from __future__ import annotations


class CarryoverError(Exception):
    """Base of all errors raised on purpose."""


class SettingsError(CarryoverError, ValueError):
    """A setting, a compressor specification or an argument is not valid."""


class LayoutError(CarryoverError, ValueError):
    """A model that cannot be laid out, or that differs from the model of the run."""


class NotFiniteError(CarryoverError, ArithmeticError):
    """An update holds NaN or Inf; nothing of it was sent or kept."""


class DecodeError(CarryoverError, ValueError):
    """Bytes that are not a valid frame or segment for the layout at hand."""


class Refused(CarryoverError):
    """The server refused a message.

    Args:
        reason: one of ``protocol.messages.REASONS``, the label of ``rejected_messages_total``.
        detail: one sentence for a person.
    """

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = detail

    def __str__(self) -> str:
        return self.detail


class RunStopped(CarryoverError):
    """The run ended while this worker was waiting for an answer."""


class RunFailed(CarryoverError):
    """The run could not do what it was asked.

    Args:
        sentence: what went wrong.
        details: the traceback of the process where it did, if there is one.
        expected: one of our own errors, of which the sentence says all.
    """

    def __init__(self, sentence: str, details: str = "", expected: bool = True) -> None:
        super().__init__(sentence, details, expected)
        self.sentence = sentence
        self.details = details
        self.expected = expected

    def __str__(self) -> str:
        return self.sentence
