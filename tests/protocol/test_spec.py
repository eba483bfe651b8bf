"""Specifications: what parses, what is refused and with which sentence."""

import copy
import pickle

import pytest
import torch

from protocol import SettingsError, compressor, errors, layout_of
from protocol.compressors import Dense, TopK
from protocol.spec import compressors_for

VALUES = ("f64", "f32", "bf16", "int8", "int4", "sign")


@pytest.mark.parametrize("spec", ["none", "f64", "f32", "bf16", "sign"])
def test_a_dense_specification_parses(spec):
    assert compressor(spec) == Dense(spec)
    assert compressor(spec).spec == spec


@pytest.mark.parametrize("values", VALUES)
@pytest.mark.parametrize("ratio", ["0.01", "1e-05", "0.123456789012345678", "5e-324", "0.9999999999999999", "1"])
def test_a_selection_with_a_value_code_parses(ratio, values):
    c = compressor(f"topk:{ratio}+{values}")
    assert c == TopK(float(ratio), values)
    assert compressor(c.spec) == c


def test_the_specification_of_a_compressor_is_its_shortest_form():
    assert compressor("topk:0.01+int4").spec == "topk:0.01+int4"
    assert compressor("topk:0.010").spec == "topk:0.01"
    assert compressor("topk:0.01+none").spec == "topk:0.01"
    assert compressor("topk:1.0").spec == "topk:1"
    assert compressor("topk:.5+f32").spec == "topk:0.5+f32"


def test_a_specification_needs_no_quoting_in_a_shell():
    safe = set("abcdefghijklmnopqrstuvwxyz0123456789:+.-=,")
    for spec in ("topk:1e-300+int4", "topk:0.01+bf16", "none"):
        assert set(compressor(spec).spec) <= safe


ABOVE_0 = "a number above 0 and at most 1"
AFTER_TOPK = "valid is one of none, f64, f32, bf16, int8, int4, sign"
FIRST = "valid are topk:RATIO, none, f64, f32, bf16, sign"
FORM = "valid is name:argument,key=value"

BAD = [
    ("", "''", FIRST),
    ("+int4", "''", FIRST),
    ("topq:0.01", "'topq'", FIRST),
    ("TopK:0.01", "'TopK'", FIRST),
    (" none", "' none'", FIRST),
    ("f16", "'f16'", FIRST),
    ("topq:0.01+int4", "'topq'", FIRST),
    ("topk:0.01+int5", "'int5'", AFTER_TOPK),
    ("topk:0.01+", "''", AFTER_TOPK),
    ("topk:0.01+int4+int8", "'int4+int8'", AFTER_TOPK),
    ("topk:0.01+topk:0.5", "'topk'", AFTER_TOPK),
    ("topk:0.01+int4+entropy", "'int4+entropy'", AFTER_TOPK),
    ("topk", "no ratio", ABOVE_0),
    ("topk+int4", "no ratio", ABOVE_0),
    ("topk:0", "'0'", ABOVE_0),
    ("topk:-0.1", "'-0.1'", ABOVE_0),
    ("topk:1.5", "'1.5'", ABOVE_0),
    ("topk:1.0000000000000002", "'1.0000000000000002'", ABOVE_0),
    ("topk:nan", "'nan'", ABOVE_0),
    ("topk:inf", "'inf'", ABOVE_0),
    ("topk:1e-400", "'1e-400'", ABOVE_0),
    ("topk:1e+0", "'1e'", ABOVE_0),
    ("topk:few", "'few'", ABOVE_0),
    ("topk:1%+int4", "'1%'", ABOVE_0),
    ("int4", "'int4'", "topk:0.01+int4"),
    ("int8+topk:0.01", "'int8+topk:0.01'", "topk:0.01+int8"),
    ("f32+int4", "'f32'", "must come last"),
    ("sign+topk:0.01", "'sign'", "must come last"),
    ("sign:3", "'3'", "takes no argument"),
    ("f32:0.5", "'0.5'", "takes no argument"),
    ("topk:0.01+int4:7", "'7'", "takes no argument"),
    ("topk:0.01,block=4096", "'block'", "takes none"),
    ("topk:0.01+int4:levels=3", "'levels'", "takes none"),
    ("none:block=1", "'block'", "takes none"),
    ("topk:", "'topk:'", FORM),
    ("topk:0.01,", "'topk:0.01,'", FORM),
    ("topk:0.01,0.02", "'topk:0.01,0.02'", FORM),
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
