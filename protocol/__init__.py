"""The language that workers and servers speak: wire format, messages, compressors, residuals.

Imports nothing else of Carryover.
"""

from protocol.compressors import Compressor, Norms, decode
from protocol.errors import CarryoverError, DecodeError, NotFiniteError, SettingsError
from protocol.layout import Layout, layout_of
from protocol.spec import compressor

__all__ = [
    "CarryoverError",
    "Compressor",
    "DecodeError",
    "Layout",
    "Norms",
    "NotFiniteError",
    "SettingsError",
    "compressor",
    "decode",
    "layout_of",
]
