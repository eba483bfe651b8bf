"""Settings that do not go together are refused in one sentence, and nothing that makes sense is."""

import sys

import pytest
import torch
from torch import nn

from deploy import cli
from deploy.checking import describe
from deploy.display import bytes_text
from deploy.settings import load, resolved, validate
from protocol import SettingsError

GRADIENT = {"send": "gradient"}
ASYNC = {"mode": "async"}
SGD = {"kind": "torch.optim.SGD", "lr": 1.0}


def kind(name, **options):
    return {"feedback": {"kind": name, **options}}


REFUSED = [
    # what is sent
    (kind("ef21"), "feedback.kind ef21 needs send: gradient, since it estimates gradients"),
    (kind("ef21_plus"), "feedback.kind ef21_plus needs send: gradient, since it estimates gradients"),
    (kind("dgc"), "feedback.kind dgc needs send: gradient, since it accumulates velocities of gradients"),
    (GRADIENT, "feedback.kind saef needs send: difference, since it steps ahead by a model difference"),
    (
        GRADIENT | kind("ef") | {"workers": {"local_steps": 2}},
        "workers.local_steps must be 1 with send: gradient; several steps need send: difference",
    ),
    (
        GRADIENT | kind("dgc") | {"workers": {"local_steps": 2}},
        "workers.local_steps must be 1 with send: gradient; several steps need send: difference; feedback.kind dgc has "
        "no other mode",
    ),
    (
        GRADIENT | kind("ef") | {"server": {"optimizer": SGD}},
        "server.optimizer must be sum with send: gradient, where the server runs the user's optimizer",
    ),
    (
        GRADIENT | kind("ef") | {"federated": {"proximal": 0.1}},
        "federated.proximal needs send: difference, since a gradient is taken where the round begins",
    ),
    (
        GRADIENT | kind("ef") | {"federated": {"control_variates": True}},
        "federated.control_variates needs send: difference, since it corrects local steps",
    ),
    # feedback
    *[
        (
            GRADIENT | kind(name) | {"workers": {"residual": memory}},
            f"workers.residual is {memory}, but feedback.kind {name} needs float32 or sparse: worker and server keep "
            "the same estimate bit for bit",
        )
        for name, memory in [("ef21", "bfloat16"), ("ef21_plus", "int8")]
    ],
    *[
        (
            GRADIENT | kind("dgc") | {"uplink": spec},
            f"uplink is {spec}, but feedback.kind dgc needs a selection, as in topk:0.001, to mask",
        )
        for spec in ("none", "sign", "lowrank:2")
    ],
    (
        kind("ef_momentum") | {"server": {"optimizer": {**SGD, "momentum": 0.9}}},
        "server.optimizer has momentum 0.9, but feedback.kind ef_momentum keeps the momentum itself "
        "(feedback.momentum)",
    ),
    # asynchronous rounds
    ({"server": {"buffer": 2}}, "server.buffer needs server.mode: async; a synchronous round waits for every worker"),
    (
        {"server": {"max_staleness": 2}},
        "server.max_staleness needs server.mode: async; a synchronous round waits for every worker",
    ),
    (
        {"server": {"staleness": {"kind": "hinge"}}},
        "server.staleness needs server.mode: async; no update of a synchronous round is late",
    ),
    (
        GRADIENT | kind("ef21") | {"server": {**ASYNC, "staleness": {"kind": "polynomial"}}},
        "server.staleness is polynomial, but feedback.kind ef21 needs constant: what it sends corrects an estimate, "
        "and a part of a correction is wrong",
    ),
    (
        {"server": ASYNC, "budget": {"bytes": 100}},
        "budget needs server.mode: sync, where all updates of a round were compressed by the same ratios",
    ),
    ({"server": {**ASYNC, "buffer": 5}}, "server.buffer is 5; valid is at most workers.count, 4"),
    (
        {"server": ASYNC, "federated": {"participation": 0.5}},
        "federated.participation needs server.mode: sync, where a round knows who takes part",
    ),
    (
        {"server": ASYNC, "federated": {"control_variates": True}},
        "federated.control_variates needs server.mode: sync, where all correct by the same variate",
    ),
    (
        {"server": ASYNC} | kind("saef", average_every=5),
        "feedback.average_every needs server.mode: sync, where all residuals are of one version",
    ),
    # compression
    *[
        (
            {"granularity": "model"} | where,
            f"{key} is lowrank:2, which needs granularity: layer; all parameters as one vector are no matrix",
        )
        for key, where in [
            ("uplink", {"uplink": "lowrank:2"}),
            ("downlink", {"downlink": "lowrank:2"}),
            ("feedback.average", kind("saef", average="lowrank:2")),
        ]
    ],
    (
        {"schedule": {"warmup_steps": 4}},
        "schedule.warmup_steps is 4, but there are no schedule.warmup_rounds to divide",
    ),
    (
        {"schedule": {"warmup_rounds": 4}, "uplink": "sign", "downlink": "int8"},
        "schedule.warmup_rounds needs a compressor that selects by a ratio, as in topk:0.01",
    ),
    (
        {"schedule": {"warmup_rounds": 4}, "uplink": "topk:0.5", "downlink": "topk:0.3"},
        "schedule.warmup_ratio is 0.25; valid is above the ratio that follows, 0.3",
    ),
    (
        {"budget": {"bytes": 100, "smallest": 0.5, "largest": 0.1}},
        "budget.smallest is 0.5; valid is at most budget.largest, 0.1",
    ),
    (
        {"budget": {"bytes": 100}, "uplink": "sign"},
        "budget needs an uplink that selects by a ratio, as in topk:0.01; uplink is sign",
    ),
    # single settings
    (
        kind("ef", strength={"first": 0.5, "last": 1.5}),
        "feedback.strength goes from 0.5 to 1.5; valid are shares from 0 to 1",
    ),
    ({"schedule": {"batch": -2}}, "schedule.batch goes from -2.0 to -2.0; valid are factors above 0"),
    (kind("ef", clip=float("inf")), "feedback.clip is inf; input should be a finite number"),
    (
        {"budget": {"bytes": 9, "biggest": 1}},
        "budget.biggest is not a setting; valid in budget are bytes, smallest, largest",
    ),
]

SENSIBLE = [
    *[{**GRADIENT, **kind(name)} for name in ("none", "ef", "ef_momentum", "ef21", "ef21_plus", "dgc")],
    *[kind(name) for name in ("none", "ef", "ef_momentum", "saef")],
    GRADIENT | kind("dgc") | {"schedule": {"start_round": 50, "learning_rate": 0.5}},  # momentum SGD first
    GRADIENT | kind("dgc") | {"overrides": {"*.bias": "none"}},  # the small ones whole, as the paper's code does
    GRADIENT | kind("dgc") | {"uplink": "none", "overrides": {"*.weight": "topk:0.01"}},
    GRADIENT | kind("dgc", nesterov=True, clip=1.0) | {"uplink": "threshold:0.1"},
    GRADIENT | kind("dgc") | {"budget": {"bytes": 200}, "workers": {"residual": "int8"}},
    GRADIENT | kind("ef21", initial="full", eta=0.5) | {"budget": {"bytes": 200}},
    GRADIENT | kind("ef21_plus") | {"workers": {"residual": "sparse"}, "federated": {"participation": 0.5}},
    GRADIENT | kind("ef21") | {"schedule": {"warmup_rounds": 10}, "granularity": "model"},
    GRADIENT | kind("ef21") | {"server": ASYNC},
    kind("ef", decay=0.0, clip=1.0, reset_every=10, start_round=5, strength=0.0) | {"uplink": "none"},
    kind("ef", reset_every=10) | {"server": {**ASYNC, "staleness": {"kind": "hinge"}, "max_staleness": 3, "buffer": 4}},
    kind("ef_momentum") | {"server": {"optimizer": SGD}, "workers": {"local_steps": 4}},
    kind("none") | {"budget": {"bytes": 200}, "workers": {"residual": "int8"}},
    kind("ef") | {"schedule": {"warmup_rounds": 5, "warmup_ratio": 0.5}, "uplink": "topk:0.3", "downlink": "sign"},
    kind("ef") | {"schedule": {"warmup_rounds": 5}, "uplink": "topk:0.5", "budget": {"bytes": 200}},
    kind("saef", average_every=4, average="lowrank:2") | {"uplink": "lowrank:2", "downlink": "lowrank:2"},
    kind("saef", average="sign") | {"granularity": "model", "overrides": {"*running*": "f32"}},
    {"schedule": {"learning_rate": 0.5, "batch": {"first": 1, "last": 8, "rounds": 100}}},
    {"federated": {"proximal": 0.1, "control_variates": True, "participation": 0.5}},
    {"budget": {"bytes": 200}, "uplink": "sign", "overrides": {"0.weight": "randk:0.1"}, "granularity": "layer"},
]


def train(session):
    model = nn.Sequential(nn.Linear(20, 10), nn.BatchNorm1d(10), nn.Linear(10, 5))
    session.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))


@pytest.mark.parametrize(("settings", "sentence"), REFUSED, ids=[sentence.split(";")[0] for _, sentence in REFUSED])
def test_what_does_not_go_together_is_refused_in_one_sentence(settings, sentence):
    with pytest.raises(SettingsError) as refused:
        validate({"train": "m:f", **settings})
    assert str(refused.value) == sentence


@pytest.mark.parametrize("settings", SENSIBLE, ids=str)
def test_what_makes_sense_is_taken_and_loads_again(tmp_path, settings):
    taken = validate({"train": "m:f", **settings})
    (file := tmp_path / "run.yaml").write_text(resolved(taken))
    assert load(file) == taken
    assert "bytes a round" in describe(taken, train)


@pytest.mark.parametrize(("settings", "sentence"), REFUSED[:-2:6], ids=str)
def test_check_says_the_sentence_and_ends_with_status_2(project, monkeypatch, capfd, settings, sentence):
    arguments = [f"{key}={value}".replace("'", "") for key, value in settings.items()]
    monkeypatch.setattr(sys, "argv", ["carryover", "check", "run.yaml", "downlink=topk:0.3", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    assert capfd.readouterr().err == f"carryover: {sentence}\n"
    assert not (project / "runs").exists()


def test_a_glob_that_names_no_segment_of_the_model_is_refused_when_the_model_is_known():
    """With ``granularity: model`` there are no layers to name, only buffers."""
    for granularity, names in [("layer", "0.weight, 0.bias"), ("model", "parameters, 1.running_mean")]:
        settings = validate({"train": "m:f", "granularity": granularity, "overrides": {"9.weight": "sign"}})
        with pytest.raises(SettingsError, match=f"'9.weight', which matches no tensor; the model has {names}"):
            describe(settings, train)


# --- memory


def memories(**settings):
    page = describe(validate({"train": "m:f", "workers": {"count": 6}, **settings}), train).splitlines()
    return [line.split("  ")[-1].strip().split(" beside")[0] for line in page if line.startswith("memory")]


@pytest.mark.parametrize(
    ("settings", "own", "kept"),
    [
        (GRADIENT | kind("ef"), 0, 0),
        (GRADIENT | kind("ef_momentum"), 2, 0),
        (GRADIENT | kind("dgc"), 3, 0),
        (GRADIENT | kind("ef21"), 0, 6),  # the server stores every estimate
        (GRADIENT | kind("ef21_plus", eta=0.5), 2, 6),
    ],
)
def test_check_counts_what_a_method_keeps_at_the_worker_and_at_the_server(settings, own, kept):
    parameters, exchanged = 4 * (20 * 10 + 10 + 10 + 10 + 10 * 5 + 5), 4 * (20 * 10 + 10 + 10 + 10 + 10 * 5 + 5 + 20)
    worker = bytes_text(3 * exchanged + 2 * exchanged + (own + 1) * parameters)  # and the gradient that is captured
    assert memories(**settings) == [worker, bytes_text(2 * exchanged + 2 * exchanged + kept * parameters)]
