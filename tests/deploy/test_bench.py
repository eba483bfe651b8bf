"""``carryover bench``: the commands at tiny sizes, how turns are taken, and the laws that the bytes obey."""

import json
import math
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

from deploy import cli
from deploy.bench import kernels, wire
from deploy.bench.contenders import Given, heavy_tailed, power_sgd
from deploy.bench.frames import log2_selections, measure
from deploy.bench.patterns import patterns
from deploy.bench.quantisers import fits, lloyd_max
from deploy.bench.tables import Goal, console
from deploy.bench.timing import Contender, Durations, copier, take_turns, torch_threads

MODERATE = 1_000_000


@pytest.fixture
def bench(monkeypatch, capsys):
    """Run ``carryover bench`` with arguments; returns exit status, standard output, standard error."""

    def command(*arguments):
        monkeypatch.setattr(sys, "argv", ["carryover", "bench", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        out, err = capsys.readouterr()
        return ended.value.code or 0, out, err

    return command


def assert_readable(out):
    assert "\x1b" not in out
    assert "…" not in out
    assert max(map(len, out.splitlines())) <= 120


def assert_record(record, command):
    assert record["command"] == command
    assert set(record["hardware"]) >= {"cpu", "cores", "memory_bytes"}
    assert set(record["versions"]) == {"python", "numpy", "torch", "numba", "platform"}
    assert record["date"].endswith("+00:00")
    assert record["goals"] == []


def test_kernels_prints_tables_and_writes_every_duration(bench, tmp_path):
    file, threads = tmp_path / "kernels.json", torch.get_num_threads()
    status, out, err = bench("kernels", "--numel", 20_000, "--repeats", 2, "--threads", "1,2", "--json", file)
    assert status == 0, err
    assert_readable(out)
    for part in (
        "topk:0.01+int4",
        "lowrank:4",
        "torch.topk, lean",
        "numpy add",
        "1 core",
        "2 cores",
        "limit: 12 bytes",
    ):
        assert part in out
    assert "goals are stated for 25,000,000 values and 1 %, not for this run" in out
    assert torch.get_num_threads() == threads

    record = json.loads(file.read_text())
    assert_record(record, "bench kernels")
    assert record["options"] == {"numel": 20_000, "ratio": 0.01, "repeats": 2, "threads": [1, 2], "device": "cpu"}
    assert [run["threads"] for run in record["runs"]] == [1, 2]
    for run in record["runs"]:
        groups = run["milliseconds"]
        assert set(groups) == {"copy", "encode", "encode in place", "decode", "decode and add", "others", "sum"}
        assert set(groups["encode"]) == set(groups["decode and add"]) == set(record["body_bytes"])
        taken = {name: times for group in groups.values() for name, times in group.items()}
        assert len(taken.pop("copy")) == 4, "it is timed twice a round"
        assert all(len(times) == 2 and min(times) > 0 for times in taken.values())
        assert run["limit_ms"] == pytest.approx(1.5 * np.median(groups["copy"]["copy"]))


def test_wire_prints_three_tables_and_writes_what_it_counted(bench, tmp_path):
    file = tmp_path / "wire.json"
    status, out, err = bench("wire", "--numel", 20_000, "--json", file)
    assert status == 0, err
    assert_readable(out)
    for part in ("topk:0.0001+sign", "rice", "blocks", "one run, 1 %", "Lloyd-Max", "uniform grid", "product"):
        assert part in out
    record = json.loads(file.read_text())
    assert_record(record, "bench wire")
    assert record["options"] == {"numel": 20_000}
    assert len({size["spec"] for size in record["frames"]}) == len(record["frames"]) == 24
    assert all(size["frame_bytes"] > size["body_bytes"] > 0 for size in record["frames"])
    assert {fit["code"] for fit in record["values"]} == {"int8", "int4", "int2"}
    for pattern in record["indices"]:
        assert pattern["sizes"][pattern["taken"]] == min(pattern["sizes"].values())


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["--device", "cuda"], "torch finds no CUDA device here"),
        (["--device", "tpu"], "valid are cpu and cuda"),
        (["--threads", "1,many"], "--threads is '1,many'"),
        (["--threads", "0"], "--threads is '0'"),
        (["--ratio", "2"], "--ratio is 2"),
        (["--json", "nowhere/at/all.json"], "cannot be written"),
    ],
)
def test_bad_input_is_one_sentence_before_anything_is_measured(bench, monkeypatch, arguments, part):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(kernels, "Given", None)
    status, out, err = bench("kernels", *arguments)
    assert (status, out) == (2, "")
    assert err.startswith("carryover: ")
    assert part in err
    assert err.count("\n") == 1


def test_contenders_take_turns_and_what_is_restored_is_not_timed():
    seen, now = [], [0.0]

    def act(name, seconds):
        seen.append(name)
        now[0] += seconds

    contenders = [
        Contender("a", "one", lambda: act("one", 1), lambda: act("restore", 100)),
        Contender("a", "two", lambda: act("two", 2)),
    ]
    durations = take_turns(contenders, 2, clock=lambda: now[0])
    assert seen == ["restore", "one", "two"] * 3, "a first round is not counted"
    assert durations.milliseconds == {"a": {"one": [1e3, 1e3], "two": [2e3, 2e3]}}
    assert (durations.median("a", "one"), durations.low("a", "two")) == (1e3, 2e3)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_the_copy_copies_everything(threads):
    source, out = torch.randn(1001), torch.zeros(1001)
    copier(out, source, threads)()
    assert torch.equal(out, source)


def test_the_number_of_threads_is_restored_after_an_error():
    before = torch.get_num_threads()

    def fail():
        with torch_threads(before + 1):
            assert torch.get_num_threads() == before + 1
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert torch.get_num_threads() == before


def test_the_stand_in_for_power_sgd_finds_a_matrix_of_that_rank():
    given = Given(10_000, 0.01, "cpu")
    left, right = heavy_tailed(400, 1).view(100, 4), heavy_tailed(400, 2).view(4, 100)
    given.vector.copy_((left @ right).view(-1))
    given.residual.zero_()
    power_sgd(given)()
    assert given.out.norm() < 1e-4 * given.vector.norm()


def test_goals_of_kernels_are_judged_by_medians():
    milliseconds = {
        "copy": {"copy": [7.0, 8.0, 100.0]},
        "encode": {"topk:0.01+int4": [1.0, 24.0, 25.0]},
        "others": {"torch.topk": [600.0, 500.0, 700.0]},
        "sum": {"frame: check, decode, add": [4.0], "8 frames: check, decode, add": [31.0]},
    }
    found = kernels._goals(kernels.Run("cpu", 1, 25_000_000, Durations(milliseconds)), "topk:0.01+int4")
    assert [(goal.figure, goal.reached) for goal in found] == [(2.0, True), (25.0, True), (4.0, True), (31.0, False)]
    for device, threads, count in (("cpu", 2, 1), ("cuda", 1, 3), ("cpu", 3, 0)):
        run = kernels.Run(device, threads, 25_000_000, Durations(milliseconds))
        assert len(kernels._goals(run, "topk:0.01+int4")) == count


def test_goals_are_for_the_sizes_that_they_are_stated_for():
    stated = kernels.Options.parse(25_000_000, 0.01, 7, "1,2", "cpu")
    assert stated.stated
    assert stated.threads == (1, 2)
    assert not replace(stated, numel=1000).stated
    assert not replace(stated, device="cuda").stated
    assert replace(stated, device="cuda", numel=100_000_000).stated
    assert not replace(stated, ratio=0.1).stated


def test_a_goal_says_whether_it_is_reached():
    assert Goal("speed", 24.9, 25.0, "x", at_least=True).line() == "MISSED   speed: 24.9x (at least 25x)"
    assert Goal("size", 1.02, 1.02, "").line() == "reached  size: 1.02 (at most 1.02)"


def test_what_is_stated_of_bytes_holds_at_a_moderate_size():
    vector = heavy_tailed(MODERATE, 0)
    sizes = {spec: measure(vector, spec) for spec in ("topk:0.01+int4", "topk:0.01+sign", "topk:0.001+sign", "sign")}
    missed = [goal.what for goal in wire.goals(sizes) if not goal.reached]
    # of 1,000 values of 12 bits, the frame alone is 3 %
    assert [what.split()[2] for what in missed] == ["topk:0.001+sign"]
    assert 8 * sizes["topk:0.001+sign"].body_bytes < 1.02 * 1000 * (1 + sizes["topk:0.001+sign"].selection_bits)


def test_dense_codes_take_their_bits_and_few_bytes_more():
    vector = heavy_tailed(MODERATE, 0)
    for spec, bits in (("none", 32), ("f16", 16), ("int8", 8), ("int4", 4), ("sign", 1), ("ternary", 1.6)):
        size = measure(vector, spec)
        assert (size.sent, size.index_code, size.selection_bits) == (MODERATE, "all", 0.0)
        assert bits <= size.bits_an_element < bits + 0.001
    keyed = measure(vector, "randk:0.01+int4")
    assert (keyed.index_code, keyed.index_bits) == ("keyed", 64 / 10_000)
    assert measure(vector, "ternary+entropy").to_ideal < 1.02


def test_the_choice_of_k_of_n_is_counted_exactly():
    assert log2_selections(1000, 10) == pytest.approx(math.log2(math.comb(1000, 10)))
    assert log2_selections(1000, 1000) == 0.0


def test_clusters_take_fewer_bits_than_a_random_choice():
    found = {pattern.name: pattern for pattern in patterns(heavy_tailed(100_000, 0))}
    assert found["uniform, 1 %"].taken == "rice"
    for name in ("1 % of rows of 64, whole", "one run, 1 %"):
        assert found[name].taken == "blocks"
        assert 8 * found[name].sizes["blocks"] < 2 * found[name].count


def test_lloyd_max_is_that_of_the_normal_distribution():
    """Max 1960, table 1: four levels 0.1175, sixteen 0.009497; by symmetry, half of them are magnitudes."""
    magnitudes = torch.randn(MODERATE, generator=torch.Generator().manual_seed(0), dtype=torch.float64).abs().numpy()
    for levels, error in ((2, 0.1175), (8, 0.009497)):
        assert lloyd_max(magnitudes, levels, np.ones(1)) == pytest.approx(error, rel=0.01)


def test_no_code_is_better_than_lloyd_max_and_a_uniform_grid_is_worse():
    for fit in fits(heavy_tailed(100_000, 0)):
        # 128 magnitudes for 1,000 values are nearly one for each, which no rule of a few knots can follow
        assert 1 - 1e-9 <= fit.ours < (2 if fit.code == "int8" else 1.02)
        assert fit.uniform > fit.ours


def test_the_table_of_sizes_fits_into_the_page_at_the_sizes_of_the_goals(capsys):
    size = measure(heavy_tailed(1000, 0), "topk:0.01+int4+entropy")
    wide = replace(
        size, sent=25_000_000, frame_bytes=100_000_054, ratio=20_032.1, bits_an_element=0.00158, index_code="product"
    )
    wire._show_sizes(console(), 25_000_000, [wide, size], [size])
    assert_readable(capsys.readouterr().out)
