"""Layouts: what is exchanged, in which order, and how two of them are told apart."""

import dataclasses

import msgpack
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from protocol import DecodeError, Layout, layout_of
from protocol.errors import LayoutError
from protocol.layout import DTYPES, ROLES, Entry


class Net(torch.nn.Module):
    """Tied, frozen and integer tensors, and buffers of both kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(5, 3)
        self.norm = torch.nn.BatchNorm1d(3)
        self.frozen = torch.nn.Linear(3, 2)
        self.out = torch.nn.Linear(3, 5, bias=False)
        self.out.weight = self.embed.weight
        self.frozen.weight.requires_grad_(False)
        self.register_buffer("mask", torch.ones(2, dtype=torch.bool))


def of(module):
    return layout_of(module.named_parameters(), module.named_buffers())


entries = st.builds(
    Entry,
    name=st.text(st.characters(exclude_categories=["Cs"]), max_size=8),
    shape=st.lists(st.integers(0, 2**40), max_size=4).map(tuple),
    dtype=st.sampled_from(sorted(DTYPES)),
    role=st.sampled_from(ROLES),
).filter(lambda entry: entry.role == "static" or DTYPES[entry.dtype].is_floating_point)
layouts = st.lists(entries, max_size=6, unique_by=lambda entry: entry.name).map(lambda drawn: Layout(tuple(drawn)))


# --- what is in it


def test_parameters_and_floating_buffers_are_exchanged_and_the_rest_is_static():
    layout = of(Net())
    assert [(e.name, e.shape, e.dtype, e.role) for e in layout.entries] == [
        ("embed.weight", (5, 3), "float32", "parameter"),
        ("norm.weight", (3,), "float32", "parameter"),
        ("norm.bias", (3,), "float32", "parameter"),
        ("frozen.bias", (2,), "float32", "parameter"),
        ("mask", (2,), "bool", "static"),
        ("norm.running_mean", (3,), "float32", "buffer"),
        ("norm.running_var", (3,), "float32", "buffer"),
        ("norm.num_batches_tracked", (), "int64", "static"),
        ("frozen.weight", (2, 3), "float32", "static"),
    ]
    assert [e.name for e in layout.statics] == ["mask", "norm.num_batches_tracked", "frozen.weight"]


def test_a_tied_tensor_appears_once():
    names = [e.name for e in of(Net()).entries]
    assert "embed.weight" in names
    assert "out.weight" not in names


def test_segments_lie_one_behind_the_other_and_fill_the_flat_vector():
    layout = of(Net())
    at = 0
    for segment in layout.segments:
        assert segment.start == at
        assert segment.numel == segment.stop - segment.start == segment.entry.numel
        at = segment.stop
    assert at == layout.numel == 15 + 3 + 3 + 2 + 3 + 3
    assert layout.trainable == 15 + 3 + 3 + 2
    assert layout.zeros().shape == (layout.numel,)
    assert layout.zeros().dtype == torch.float32


def test_the_working_precision_is_float64_if_a_parameter_is():
    assert of(torch.nn.Linear(2, 2).double()).dtype == torch.float64
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        assert of(torch.nn.Linear(2, 2).to(dtype)).dtype == torch.float32
    mixed = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2).double())
    assert of(mixed).dtype == torch.float64


def test_bytes_are_those_of_the_tensor_itself():
    tensors = [torch.zeros(3, 4, dtype=dtype) for dtype in DTYPES.values()]
    layout = layout_of([("w", torch.nn.Parameter(torch.zeros(1)))], [(f"b{i}", t) for i, t in enumerate(tensors)])
    assert [e.nbytes for e in layout.entries[1:]] == [t.nbytes for t in tensors]


@pytest.mark.parametrize(
    "module",
    [
        torch.nn.ReLU(),
        torch.nn.BatchNorm1d(3, affine=False),
        torch.nn.Linear(2, 2).requires_grad_(False),
        torch.nn.PReLU(0),
    ],
    ids=["none", "buffers only", "frozen", "empty"],
)
def test_a_model_with_nothing_to_train_is_refused(module):
    with pytest.raises(LayoutError, match="no parameters that require grad"):
        of(module)


def test_a_dtype_that_cannot_be_exchanged_is_refused_by_name():
    module = torch.nn.Linear(2, 2)
    module.register_buffer("phase", torch.zeros(2, dtype=torch.complex64))
    with pytest.raises(LayoutError, match=r"'phase' has dtype torch\.complex64; valid are float64, "):
        of(module)
    with pytest.raises(LayoutError, match="'w' has dtype"):
        layout_of([("w", torch.nn.Parameter(torch.zeros(2, dtype=torch.complex128)))])


# --- equal or not


def test_equal_models_have_equal_hashes():
    first, second = of(Net()), of(Net())
    assert first is not second
    assert first == second
    assert first.hash == second.hash
    assert len(first.hash) == 8
    assert first.difference(second) == ""


def test_the_hash_is_the_same_in_every_process():
    assert Layout((Entry("w", (2, 3), "float32", "parameter"),)).hash.hex() == "fce7cad824783b52"


@settings(deadline=None, max_examples=100)
@given(first=layouts, second=layouts)
def test_hashes_are_equal_exactly_if_layouts_are(first, second):
    assert (first.hash == second.hash) == (first == second)
    assert (first.difference(second) == "") == (first == second)


@settings(deadline=None, max_examples=50)
@given(layout=layouts.filter(lambda layout: layout.entries), data=st.data())
def test_a_change_of_any_field_of_any_entry_changes_the_hash(layout, data):
    place = data.draw(st.integers(0, len(layout.entries) - 1))
    field = data.draw(st.sampled_from(["name", "shape", "dtype", "role"]))
    old, other = layout.entries[place], data.draw(entries)
    new = dataclasses.replace(old, **{field: getattr(other, field)})
    changed = Layout((*layout.entries[:place], new, *layout.entries[place + 1 :]))
    assert (changed.hash == layout.hash) == (new == old)


def test_names_and_shapes_cannot_be_moved_between_neighbours_unnoticed():
    def layout(*shapes):
        return Layout(tuple(Entry(f"w{i}", shape, "float32", "parameter") for i, shape in enumerate(shapes)))

    assert layout((2, 3), ()).hash != layout((2,), (3,)).hash
    assert layout((6,)).hash != layout((2, 3)).hash
    assert layout((6,)).hash != layout((6,), ()).hash


def test_the_difference_names_the_first_entry_that_differs():
    run, other = of(Net()), of(Net())
    wider = Entry("norm.bias", (4,), "float32", "parameter")
    other = Layout((*other.entries[:2], wider, Entry("x", (), "int8", "static")))
    assert run.difference(other) == (
        "parameter 'norm.bias' [4] float32 where the run has parameter 'norm.bias' [3] float32"
    )


def test_the_difference_names_an_entry_that_only_one_side_has():
    run = of(Net())
    shorter = Layout(run.entries[:-1])
    assert run.difference(shorter) == "nothing where the run has static 'frozen.weight' [2, 3] float32"
    assert shorter.difference(run) == "static 'frozen.weight' [2, 3] float32 where the run has nothing"


# --- through a message


@settings(deadline=None, max_examples=100)
@given(layout=layouts)
def test_a_description_restores_the_layout_through_msgpack(layout):
    restored = Layout.restore(msgpack.unpackb(msgpack.packb(layout.describe())))
    assert restored == layout
    assert restored.hash == layout.hash


GOOD = ["w", [2, 3], "float32", 0]
MALFORMED = [
    None,
    5,
    "",
    "abcd",
    {},
    b"",
    [None],
    [[]],
    [GOOD[:3]],
    [[*GOOD, 0]],
    [[7, [2], "float32", 0]],
    [[b"w", [2], "float32", 0]],
    [["w", 2, "float32", 0]],
    [["w", None, "float32", 0]],
    [["w", "", "float32", 0]],
    [["w", b"\x01\x02", "float32", 0]],
    [["w", {}, "float32", 0]],
    [["w", [-1], "float32", 0]],
    [["w", [2.0], "float32", 0]],
    [["w", [True], "float32", 0]],
    [["w", [[2]], "float32", 0]],
    [["w", [2], "float31", 0]],
    [["w", [2], ["float32"], 0]],
    [["w", [2], None, 0]],
    [["w", [2], "float32", -1]],
    [["w", [2], "float32", 4]],
    [["w", [2], "float32", "parameter"]],
    [["w", [2], "float32", 0.0]],
    [["w", [2], "float32", False]],
    [["w", [2], "float32", None]],
    [["w", [2], "int64", 0]],
    [["w", [2], "bool", 1]],
    [GOOD, GOOD],
    [GOOD, None],
]


@pytest.mark.parametrize("description", MALFORMED, ids=repr)
def test_a_malformed_description_is_a_decode_error(description):
    with pytest.raises(DecodeError, match="the layout in the message is malformed"):
        Layout.restore(description)


plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3) | st.binary(max_size=3),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=2),
    max_leaves=12,
)
nearly = st.lists(
    st.lists(plain | st.sampled_from([*GOOD, [], 2, "int8"]), min_size=4, max_size=4), min_size=1, max_size=2
)


@settings(deadline=None, max_examples=100)
@given(description=plain | nearly)
@example(description=[GOOD])
def test_any_description_is_a_layout_that_describes_itself_or_a_decode_error(description):
    try:
        layout = Layout.restore(description)
    except DecodeError:
        return
    assert layout.describe() == description
    assert layout.numel >= 0
