"""The documents keep up with the code: specifications parse, stages and wire ids are all described."""

import re
from pathlib import Path

import pytest

from protocol import compressor
from protocol.coding import indices
from protocol.segment import ALL, KEYED, NOTHING, PRODUCT
from protocol.spec import SELECTIONS, VALUES
from protocol.values import BY_ID

DOCS = Path(__file__).parents[1] / "docs"
COMPRESSORS = (DOCS / "compressors.md").read_text(encoding="utf-8")
PROTOCOL = (DOCS / "protocol.md").read_text(encoding="utf-8")


def tables(text):
    """Each as a list of rows of cells, the header first."""
    found = re.findall(r"(?:^\|.*\|\n)+", text, re.MULTILINE)
    return [[[cell.strip() for cell in row[1:-1].split("|")] for row in table.splitlines()] for table in found]


def first_column(text, title):
    """Below the header, of every table whose first column has this title."""
    return [row[0] for table in tables(text) if table[0][0] == title for row in table[2:]]


def section(text, title):
    return re.search(rf"^### {title}\n(.*?)^##", text, re.MULTILINE | re.DOTALL).group(1)


SPECIFIED = [spec for cell in first_column(COMPRESSORS, "Specification") for spec in re.findall(r"`([^`]+)`", cell)]
STAGES = (*SELECTIONS, "lowrank", *VALUES, "entropy")


@pytest.mark.parametrize("spec", SPECIFIED)
def test_a_specification_in_the_tables_of_the_document_parses(spec):
    assert compressor(spec, (100, 100)).delta(10_000) <= 1


@pytest.mark.parametrize("stage", STAGES)
def test_the_document_has_a_row_for_every_stage_and_says_how_it_is_written(stage):
    described = {re.split("[:+]", spec)[0] for spec in SPECIFIED}
    written = re.findall(r"`(\w+)`", " ".join(first_column(COMPRESSORS, "Name")))
    assert stage in written
    assert stage in described or stage == "entropy"  # which is a chapter of its own
    assert f"`{stage}" in COMPRESSORS


def test_no_row_of_a_table_in_a_document_has_more_or_fewer_cells_than_its_header():
    """A bar inside a cell would move the rest of its row, for whoever reads the page rendered."""
    for text in (COMPRESSORS, PROTOCOL):
        for table in tables(text):
            assert {len(row) for row in table} == {len(table[0])}, table[0]


def test_the_protocol_lists_every_value_code_and_no_other():
    codes = first_column(section(PROTOCOL, "Value codes"), "Code")
    assert [int(code) for code in codes] == sorted(BY_ID)
    assert f"Codes from {max(BY_ID) + 1} on are not in use" in PROTOCOL


def test_the_protocol_lists_every_index_code_and_no_other():
    codes = first_column(section(PROTOCOL, "Index codes"), "Code")
    assert [int(code) for code in codes] == sorted((ALL, NOTHING, KEYED, PRODUCT, *indices.NAMES))


def test_every_link_between_the_documents_leads_to_a_heading():
    for text in (COMPRESSORS, PROTOCOL):
        for name, anchor in re.findall(r"\]\((\w+\.md)?#([\w-]+)\)", text):
            target = (DOCS / name).read_text(encoding="utf-8") if name else text
            headings = re.findall(r"^#+ (.*)$", target, re.MULTILINE)
            assert anchor in {re.sub(r"[^\w -]", "", h).lower().replace(" ", "-") for h in headings}
