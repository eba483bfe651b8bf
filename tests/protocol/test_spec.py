"""Specifications: what parses, what is refused and with which sentence."""

import copy
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from protocol import SettingsError, compressor, errors, layout_of
from protocol.compressors import Pipeline
from protocol.lowrank import LowRank
from protocol.selections import BlockTopK, Everything, RandK, Threshold, TopK
from protocol.spec import compressors_for

SELECTIONS = {
    "topk:0.01": TopK(0.01),
    "topk:1e-05": TopK(1e-5),
    "topk:1": TopK(1.0),
    "blocktopk:0.01,block=4096": BlockTopK(0.01),
    "blocktopk:0.5,block=1": BlockTopK(0.5, 1),
    "randk:0.25": RandK(0.25),
    "threshold:0.001": Threshold(0.001),
    "threshold:20": Threshold(20.0),
    "threshold:1e300": Threshold(1e300),
}
CASTS = ("f64", "f32", "f16", "bf16")
VALUES = (*CASTS, "int8", "int4", "int2", "sign", "ternary", "natural", "qsgd:4", "qsgd:127,bucket=7")
ENDINGS = {"": False, "+entropy": True}


# --- what is valid


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("values", VALUES)
def test_a_value_code_alone_sends_every_element_by_it(values, ending):
    c = compressor(values + ending)
    assert c == Pipeline(Everything(), c.code, ENDINGS[ending])
    assert c.code.name == values
    assert c.spec == values + ending


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("selection", SELECTIONS)
def test_a_selection_takes_every_value_code(selection, ending):
    for values in VALUES:
        c = compressor(f"{selection}+{values}{ending}")
        assert c == Pipeline(SELECTIONS[selection], compressor(values).code, ENDINGS[ending])
        assert c.spec == f"{selection}+{values}{ending}"
        assert compressor(c.spec) == c


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("selection", SELECTIONS)
def test_a_selection_without_a_value_code_sends_values_as_they_are(selection, ending):
    c = compressor(selection + ending)
    assert c == Pipeline(SELECTIONS[selection], None, ENDINGS[ending])
    assert c == compressor(f"{selection}+none{ending}")
    assert c.spec == selection + ending


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("values", ["", *CASTS])
@pytest.mark.parametrize("rank", [1, 4])
def test_a_matrix_has_a_rank_and_a_format(rank, values, ending):
    spec = f"lowrank:{rank}" + (f"+{values}" if values else "") + ending
    c = compressor(spec, (30, 4, 10))
    assert isinstance(c, LowRank)
    assert (c.rank, c.rows, c.columns, c.entropy) == (rank, 30, 40, ENDINGS[ending])
    assert c.spec == spec
    assert compressor(c.spec, (30, 40)) == c


@pytest.mark.parametrize(
    ("rank", "shape"), [(1, ()), (1, (40,)), (1, (1, 40)), (1, (40, 1)), (2, (3, 5)), (15, (30, 30)), (1, (0, 3))]
)
def test_what_is_no_matrix_or_too_small_is_sent_by_the_format_alone(rank, shape):
    assert compressor(f"lowrank:{rank}", shape) == compressor("none")
    assert compressor(f"lowrank:{rank}+bf16+entropy", shape) == compressor("bf16+entropy")


SHORTEST = {
    "none": "none",
    "entropy": "none+entropy",
    "none+entropy": "none+entropy",
    "topk:0.010": "topk:0.01",
    "topk:0.01+none": "topk:0.01",
    "topk:1.0": "topk:1",
    "topk:.5+f32": "topk:0.5+f32",
    "topk:0.123456789012345678": "topk:0.12345678901234568",
    "topk:5e-324": "topk:5e-324",
    "blocktopk:0.1": "blocktopk:0.1,block=4096",
    "blocktopk:block=7,0.1": "blocktopk:0.1,block=7",
    "threshold:1.50": "threshold:1.5",
    "threshold:100000": "threshold:100000",
    "threshold:1e16": "threshold:1e16",
    "qsgd:4,bucket=512": "qsgd:4",
    "qsgd:bucket=512,04": "qsgd:4",
}


@pytest.mark.parametrize("spec", SHORTEST)
def test_the_specification_of_a_compressor_is_its_shortest_form(spec):
    assert compressor(spec).spec == SHORTEST[spec]
    assert compressor(SHORTEST[spec]) == compressor(spec)


@settings(deadline=None, max_examples=300)
@given(
    number=st.floats(0, exclude_min=True, allow_infinity=False), name=st.sampled_from(["topk", "randk", "threshold"])
)
def test_every_number_comes_back_and_needs_no_quoting_in_a_shell(number, name):
    if number > 1 and name != "threshold":
        number = 1 / number
    selection = {"topk": TopK, "randk": RandK, "threshold": Threshold}[name](number)
    written = Pipeline(selection).spec
    assert compressor(written) == Pipeline(selection)
    assert set(written) <= set("abcdefghijklmnopqrstuvwxyz0123456789:.-=,")


# --- what is not

ABOVE_0 = "a number above 0 and at most 1"
SELECTED = "valid selections are topk, blocktopk, randk, threshold, lowrank"
VALUED = "values none, f64, f32, f16, bf16, int8, int4, int2, sign, ternary, natural, qsgd; last entropy"
ORDER = "the order is [SELECTION or lowrank]+[VALUES]+[entropy], each at most once"
FORM = "valid is name:argument,key=value"
CASTED = "valid are none, f64, f32, f16, bf16"

BAD = [
    ("", "''", SELECTED),
    ("+int4", "''", VALUED),
    ("topq:0.01", "'topq'", SELECTED),
    ("TopK:0.01", "'TopK'", SELECTED),
    (" none", "' none'", VALUED),
    ("topq:0.01+int4", "'topq'", SELECTED),
    ("topk:0.01+int5", "'int5'", VALUED),
    ("topk:0.01+", "''", VALUED),
    ("topk:0.01+int4+huffman", "'huffman'", VALUED),
    ("topk:0.01+int4+int8", "'int8'", ORDER),
    ("topk:0.01+topk:0.5", "'topk'", ORDER),
    ("topk:0.5+lowrank:2", "'lowrank'", ORDER),
    ("int8+topk:0.01", "'topk'", ORDER),
    ("f32+int4", "'int4'", ORDER),
    ("entropy+int4", "'int4'", ORDER),
    ("int4+entropy+entropy", "'entropy'", ORDER),
    *((f"{name}", "no ratio", ABOVE_0) for name in ("topk", "blocktopk", "randk")),
    *((f"{name}:{ratio}", f"{name!r}", ABOVE_0) for name in ("topk", "randk") for ratio in ("0", "1.5", "nan")),
    ("topk+int4", "no ratio", ABOVE_0),
    ("topk:-0.1", "'-0.1'", ABOVE_0),
    ("topk:1.0000000000000002", "'1.0000000000000002'", ABOVE_0),
    ("topk:inf", "'inf'", ABOVE_0),
    ("topk:1e-400", "'1e-400'", ABOVE_0),
    ("topk:few", "'few'", ABOVE_0),
    ("topk:1%+int4", "'1%'", ABOVE_0),
    ("blocktopk:block=7", "no ratio", ABOVE_0),
    ("blocktopk:0.1,block=0", "block '0'", "a number of elements, at least 1"),
    ("blocktopk:0.1,block=1.5", "block '1.5'", "a number of elements, at least 1"),
    ("blocktopk:0.1,block=many", "block 'many'", "a number of elements, at least 1"),
    ("threshold", "no threshold", "a number above 0"),
    ("threshold:0", "threshold '0'", "a number above 0"),
    ("threshold:-1", "threshold '-1'", "a number above 0"),
    ("threshold:inf", "threshold 'inf'", "a number above 0"),
    ("threshold:nan", "threshold 'nan'", "a number above 0"),
    ("lowrank", "no rank", "a number of columns, at least 1"),
    ("lowrank:0", "rank '0'", "a number of columns, at least 1"),
    ("lowrank:1.5", "rank '1.5'", "a number of columns, at least 1"),
    *((f"lowrank:2+{values}", f"{values!r} after lowrank", CASTED) for values in ("int8", "sign", "natural", "qsgd:4")),
    ("qsgd", "no levels", "a number from 1 to 127"),
    ("qsgd:0", "levels '0'", "a number from 1 to 127"),
    ("qsgd:128", "levels '128'", "a number from 1 to 127"),
    ("qsgd:4.5", "levels '4.5'", "a number from 1 to 127"),
    ("qsgd:4,bucket=0", "bucket '0'", "a number of values, at least 1"),
    ("sign:3", "'3'", "takes no argument"),
    ("f32:0.5", "'0.5'", "takes no argument"),
    ("topk:0.01+int4:7", "'7'", "takes no argument"),
    ("topk:0.01+entropy:2", "'2'", "takes no argument"),
    ("topk:0.01,block=4096", "'block'", "it takes none"),
    ("randk:0.01,seed=3", "'seed'", "it takes none"),
    ("threshold:1,block=2", "'block'", "it takes none"),
    ("lowrank:2,block=2", "'block'", "it takes none"),
    ("blocktopk:0.1,size=3", "'size'", "it takes block"),
    ("qsgd:4,block=3", "'block'", "it takes bucket"),
    ("topk:0.01+int4:levels=3", "'levels'", "it takes none"),
    ("none:block=1", "'block'", "it takes none"),
    ("int4+entropy:block=1", "'block'", "it takes none"),
    ("topk:", "'topk:'", FORM),
    ("topk:0.01,", "'topk:0.01,'", FORM),
    ("topk:0.01,0.02", "'topk:0.01,0.02'", FORM),
    ("blocktopk:0.1,block=2,block=3", "'blocktopk:0.1,block=2,block=3'", FORM),
    ("none:", "'none:'", FORM),
]


@pytest.mark.parametrize(("spec", "offender", "valid"), BAD, ids=[repr(spec) for spec, _, _ in BAD])
def test_a_bad_specification_is_refused_in_one_sentence_that_names_it(spec, offender, valid):
    with pytest.raises(SettingsError) as caught:
        compressor(spec)
    sentence = str(caught.value)
    assert offender in sentence
    assert valid in sentence
    assert "\n" not in sentence
    assert ". " not in sentence
    assert not sentence.endswith(".")
    assert isinstance(caught.value, ValueError)


# --- one compressor a segment


class Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = torch.nn.Linear(3, 2)
        self.norm = torch.nn.BatchNorm1d(2)


def chosen(overrides):
    net = Net()
    layout = layout_of(net.named_parameters(), net.named_buffers())
    found = compressors_for(layout, "topk:0.01+int4", overrides)
    return {s.entry.name: c.spec for s, c in zip(layout.segments, found, strict=True)}


def test_parameters_take_the_specification_of_the_run_and_buffers_their_own():
    assert chosen({}) == {
        "head.weight": "topk:0.01+int4",
        "head.bias": "topk:0.01+int4",
        "norm.weight": "topk:0.01+int4",
        "norm.bias": "topk:0.01+int4",
        "norm.running_mean": "bf16",
        "norm.running_var": "bf16",
    }


def test_the_first_override_that_matches_a_name_counts():
    found = chosen({"*.bias": "f32", "head.*": "sign", "norm.running_*": "none"})
    assert found["head.bias"] == "f32"
    assert found["head.weight"] == "sign"
    assert found["norm.weight"] == "topk:0.01+int4"
    assert found["norm.running_mean"] == "none"


def test_each_matrix_has_its_own_shape_and_what_is_none_its_format():
    net = torch.nn.Sequential(torch.nn.Linear(40, 30), torch.nn.BatchNorm1d(30))
    layout = layout_of(net.named_parameters(), net.named_buffers())
    found = compressors_for(layout, "lowrank:2+f16", {})
    assert [c.spec for c in found] == ["lowrank:2+f16", "f16", "f16", "f16", "bf16", "bf16"]
    assert (found[0].rows, found[0].columns) == (30, 40)


def test_an_override_that_matches_nothing_or_is_not_valid_is_refused():
    with pytest.raises(SettingsError, match=r"'tail\.\*', which matches no tensor; the model has head\.weight"):
        chosen({"tail.*": "f32"})
    with pytest.raises(SettingsError, match="'topq'"):
        chosen({"head.*": "topq:1"})


# --- errors


def classes(root=errors.CarryoverError):
    return [root, *(c for child in root.__subclasses__() for c in classes(child))]


def test_the_tree_in_the_docstring_is_the_tree_of_errors():
    for error in classes():
        if error.__module__ == errors.__name__:
            assert error.__name__ in errors.__doc__


@pytest.mark.parametrize("error", classes(), ids=lambda error: error.__name__)
@pytest.mark.parametrize("again", [lambda e: pickle.loads(pickle.dumps(e)), copy.copy], ids=["pickle", "copy"])
def test_an_error_survives_its_way_between_processes(error, again):
    first = error("stale", "this is too old") if error is errors.Refused else error("'x' is not valid")
    second = again(first)
    assert type(second) is error
    assert str(second) == str(first)
    assert second.args == first.args
    assert vars(second) == vars(first)
