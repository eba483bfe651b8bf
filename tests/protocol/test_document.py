"""docs/protocol.md says what the code does: its tables and its example are compared with it."""

import dataclasses
import re
from pathlib import Path

from protocol import messages
from protocol.coding import indices
from protocol.halves import Activations, Gradients
from protocol.messages import Average, Entry, Farewell, Join, Leave, Mean, Pull, Push, Refusal, Welcome
from protocol.segment import ALL, KEYED, NOTHING, PRODUCT
from protocol.values import BY_ID

DOCUMENT = Path(__file__).parents[2] / "docs" / "protocol.md"
EXAMPLE = Path(__file__).parent / "golden" / "example_of_knots.frame"


def test_the_frame_that_the_document_explains_is_the_golden_one():
    """The hexadecimal digits in the first column of the table, one row after the other."""
    text = DOCUMENT.read_text(encoding="utf-8")
    section = text[text.index("## A frame, byte by byte") :]
    rows = re.findall(r"^\| *\d+ *\| `((?:[0-9a-f]{2} ?)+)` \|", section, re.MULTILINE)
    assert bytes.fromhex("".join(rows)) == EXAMPLE.read_bytes()
    starts = [int(start) for start in re.findall(r"^\| *(\d+) *\| `[0-9a-f]{2}", section, re.MULTILINE)]
    sizes = [len(bytes.fromhex(row)) for row in rows]
    assert starts == [sum(sizes[:i]) for i in range(len(sizes))]


def test_the_document_lists_every_message_with_its_kind_and_its_keys():
    text = DOCUMENT.read_text(encoding="utf-8")
    found = {}
    for part in re.split(r"^(?=\*\*\d+ \w+\*\*: )", text, flags=re.MULTILINE)[1:]:
        kind, name = re.match(r"\*\*(\d+) (\w+)\*\*", part).groups()
        part = part[: part.index("\n## ")] if "\n## " in part else part
        rows = re.findall(r"^\| (\d+) \| (\w+) \|", part, re.MULTILINE)
        found[name] = int(kind), {field: int(key) for key, field in rows}
    expected = {}
    between = (Activations, Gradients)
    for message in (Join, Welcome, Push, Entry, Average, Mean, Refusal, Leave, Farewell, Pull, *between):
        fields = {f.name: f.metadata["key"] for f in dataclasses.fields(message) if "key" in f.metadata}
        expected[message.__name__] = message.KIND, fields
    assert found == expected


def section(begin, end):
    text = DOCUMENT.read_text(encoding="utf-8")
    return text[text.index(begin) : text.index(end)]


def test_the_document_lists_every_reason():
    found = re.findall(r"^\| `(\w+)` \|", section("## Refusals", "## Statistics"), re.MULTILINE)
    assert tuple(found) == messages.REASONS


def test_the_document_lists_every_value_code_retired_ones_included():
    found = re.findall(r"^\| (\d+) \| `(\w+)` \|", section("### Value codes", "### Digits"), re.MULTILINE)
    assert {int(number): name for number, name in found} == {number: code.name for number, code in BY_ID.items()}


def test_the_document_lists_every_index_code():
    found = re.findall(r"^\| (\d) \| (\w+) \|", section("### Index codes", "### Value codes"), re.MULTILINE)
    named = {int(number): name for number, name in found}
    assert named == {ALL: "every", NOTHING: "none", **indices.NAMES, KEYED: "keyed", PRODUCT: "product"}
