"""Settings: defaults, overrides, and one clear sentence for everything that is not valid."""

import re

import pytest
import yaml

from deploy.settings import load, resolved, validate
from protocol import SettingsError


def write(path, **values):
    path.write_text(yaml.safe_dump({"train": "module:function", **values}))
    return path


def test_every_setting_but_train_has_a_default():
    settings = validate({"train": "module:function"})
    assert (settings.rounds, settings.seed, settings.backend, settings.send) == (400, 0, "ray", "difference")
    assert settings.feedback.kind == "saef"
    assert settings.uplink == settings.downlink == "topk:0.01+int4"
    assert settings.workers.residual == settings.server.residual == "float32"
    assert (settings.metrics.host, settings.metrics.port) == ("127.0.0.1", 9464)


def test_resolved_settings_load_as_the_same_settings(tmp_path):
    feedback = {"kind": "saef", "average_every": 5}
    settings = validate({"train": "m:f", "feedback": feedback, "overrides": {"*.bias": "f32"}})
    file = tmp_path / "run.yaml"
    file.write_text(resolved(settings))
    assert load(file) == settings


def test_overrides_replace_nested_keys_with_yaml_values(tmp_path):
    file = write(tmp_path / "run.yaml", workers={"count": 2})
    overrides = ["rounds=7", "workers.local_steps=3", "feedback.kind=ef", "uplink=sign", "metrics.port=null"]
    settings = load(file, overrides)
    assert (settings.rounds, settings.workers.count, settings.workers.local_steps) == (7, 2, 3)
    assert (settings.feedback.kind, settings.uplink, settings.metrics.port) == ("ef", "sign", None)


def test_a_number_in_scientific_notation_is_a_number(tmp_path):
    file = write(tmp_path / "run.yaml")
    options = load(file, ["server.optimizer.kind=torch.optim.SGD", "server.optimizer.lr=1e-3"]).server.optimizer.options
    assert options == {"lr": 1e-3}


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("roundz=3", ["roundz is not a setting", "rounds", "uplink"]),
        ("workers.cuont=3", ["workers.cuont", "count", "local_steps"]),
        ("feedback.strenght=1", ["feedback.strenght", "strength", "average_every"]),
        ("feedback={kind: ef, average: f32}", ["feedback.average is not a setting", "are kind"]),
        ("feedback.kind=efx", ["feedback.kind", "efx", "saef"]),
        ("rounds=0", ["rounds", "0", "greater than 0"]),
        ("rounds=many", ["rounds", "many", "integer"]),
        ("workers.count=-1", ["workers.count", "-1"]),
        ("workers.gpus=2", ["workers.gpus", "2"]),
        ("uplink=topk:0", ["uplink", "topk:0", "above 0 and at most 1"]),
        ("uplink=topk:1.5", ["uplink", "1.5", "above 0 and at most 1"]),
        ("downlink=tpok:0.1", ["downlink", "tpok", "topk"]),
        ("uplink=int4+topk:0.1", ["uplink", "topk", "the order is"]),
        ("overrides={w: nope}", ["overrides.w", "nope"]),
        ("feedback.average=nope", ["feedback.average", "nope"]),
        ("train=nofunction", ["train", "nofunction", "MODULE:FUNCTION"]),
        ("backend=spark", ["backend", "spark", "ray"]),
        ("metrics.port=70000", ["metrics.port", "70000"]),
        ("server.mode=quorum", ["server.mode", "quorum", "async", "sync"]),
        ("workers.residual=float16", ["workers.residual", "float16", "float32", "bfloat16", "int8", "sparse"]),
        ("server.residual=none", ["server.residual", "none", "float32", "bfloat16", "int8", "sparse"]),
        ("server.shards=2", ["server.shards", "2"]),
        ("server.optimizer.kind=torch.optim.Nope", ["torch.optim.Nope", "torch.optim.SGD"]),
        ("server.optimizer.lr=1", ["server.optimizer", "lr", "sum"]),
        ("send=gradient", ["saef", "send: difference"]),
        ("name=../up", ["name", "../up"]),
        ("rounds", ["rounds", "key=value"]),
        ("rounds.x=1", ["rounds"]),
    ],
)
def test_a_bad_setting_is_one_sentence_with_the_offender_and_what_is_valid(tmp_path, override, parts):
    file = write(tmp_path / "run.yaml", rounds=5)
    with pytest.raises(SettingsError) as caught:
        load(file, [override])
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message, message


def test_gradients_refuse_local_steps_and_a_second_optimizer():
    base = {"train": "m:f", "send": "gradient", "feedback": {"kind": "ef"}}
    with pytest.raises(SettingsError, match="local_steps must be 1"):
        validate({**base, "workers": {"local_steps": 2}})
    with pytest.raises(SettingsError, match=r"server\.optimizer must be sum"):
        validate({**base, "server": {"optimizer": {"kind": "torch.optim.SGD"}}})


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"server": {"buffer": 2}}, "server.buffer needs server.mode: async"),
        ({"server": {"max_staleness": 2}}, "server.max_staleness needs server.mode: async"),
        ({"server": {"staleness": {"kind": "hinge"}}}, "server.staleness needs server.mode: async"),
        ({"server": {"mode": "async", "buffer": 5}}, "server.buffer is 5; valid is at most workers.count, 4"),
        ({"server": {"mode": "async"}, "federated": {"participation": 0.5}}, "federated.participation needs"),
        ({"server": {"mode": "async"}, "federated": {"control_variates": True}}, "federated.control_variates needs"),
        ({"server": {"mode": "async"}, "feedback": {"average_every": 2}}, "feedback.average_every needs"),
        (
            {
                "server": {"mode": "async", "staleness": {"kind": "polynomial"}},
                "feedback": {"kind": "ef21"},
                "send": "gradient",
            },
            "server.staleness is polynomial, but feedback.kind ef21 needs constant",
        ),
    ],
)
def test_what_an_asynchronous_server_cannot_do_is_refused_and_what_only_it_can(changed, sentence):
    with pytest.raises(SettingsError, match=re.escape(sentence)):
        validate({"train": "m:f", **changed})


@pytest.mark.parametrize(
    ("text", "part"),
    [("rounds: 3", "train is missing"), ("[1, 2]", "list"), ("a: [", "not valid YAML"), ("", "NoneType")],
)
def test_a_bad_file_is_one_sentence(tmp_path, text, part):
    file = tmp_path / "run.yaml"
    file.write_text(text)
    with pytest.raises(SettingsError) as caught:
        load(file)
    assert part in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_not_text_is_named(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_bytes(b"train: \xff\xfe")
    with pytest.raises(SettingsError, match=r"run\.yaml is not UTF-8 text"):
        load(file)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(SettingsError, match=r"nowhere\.yaml cannot be read"):
        load(tmp_path / "nowhere.yaml")
