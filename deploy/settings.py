"""The settings file of a run: read, overridden, validated; errors name the key and what is valid."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, Self, get_args

import yaml
from pydantic import Field, NonNegativeInt, PositiveInt, ValidationError, field_validator, model_validator

from deploy.conflicts import conflicts
from protocol.errors import SettingsError
from protocol.layout import Granularity
from protocol.settings import Budget, Schedule, Strict
from protocol.spec import compressor
from ps.settings import MetricsSettings, RelaySettings, ServerSettings, StorageSettings
from workers.settings import (
    DeepGradientCompression,
    Ef21Feedback,
    ErrorFeedback,
    FederatedSettings,
    FeedbackSettings,
    MomentumFeedback,
    NoFeedback,
    StepAhead,
    WorkersSettings,
)

FEEDBACK = {
    "none": NoFeedback,
    "ef": ErrorFeedback,
    "ef_momentum": MomentumFeedback,
    "saef": StepAhead,
    "ef21": Ef21Feedback,
    "ef21_plus": Ef21Feedback,
    "dgc": DeepGradientCompression,
}


class RunSettings(Strict):
    """One run. Every key has a default except ``train``."""

    name: str = Field(default="run", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")  # of the run directory
    train: str = Field(pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$")  # MODULE:FUNCTION
    arguments: dict[str, Any] = {}  # keyword arguments of the training function, beside the session
    rounds: PositiveInt = 400  # versions of the model
    seed: NonNegativeInt = 0
    backend: Literal["ray", "inline"] = "ray"
    send: Literal["difference", "gradient"] = "difference"
    workers: WorkersSettings = WorkersSettings()
    feedback: FeedbackSettings = StepAhead()
    uplink: str = "topk:0.01+int4"  # compressor, worker -> server
    downlink: str = "topk:0.01+int4"  # compressor, server -> workers
    overrides: dict[str, str] = {}  # glob on parameter names -> compressor; the first match counts
    granularity: Granularity = "layer"  # layer | model: what is compressed as one vector
    schedule: Schedule = Schedule()
    budget: Budget | None = None  # bytes of a push, divided among the layers by their errors; null: fixed ratios
    federated: FederatedSettings = FederatedSettings()
    server: ServerSettings = ServerSettings()
    relays: RelaySettings = RelaySettings()
    metrics: MetricsSettings = MetricsSettings()
    storage: StorageSettings = StorageSettings()

    @field_validator("feedback", mode="before")
    @classmethod
    def _default_kind(cls, value: Any) -> Any:
        return {"kind": "saef", **value} if isinstance(value, dict) else value

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        specs = {
            "uplink": self.uplink,
            "downlink": self.downlink,
            "relays.uplink": self.relays.uplink,
            **{f"overrides.{g}": s for g, s in self.overrides.items()},
        }
        if isinstance(self.feedback, StepAhead):
            specs["feedback.average"] = self.feedback.average
        for key, spec in specs.items():
            try:
                compressor(spec)
            except SettingsError as error:
                raise ValueError(f"{key}: {error}") from None
        if self.server.optimizer.kind == "sum" and self.server.optimizer.options:
            option = next(iter(self.server.optimizer.options))
            raise ValueError(
                f"server.optimizer has {option!r}, but kind sum takes no options; name a torch.optim class"
            )
        for refusal in conflicts(self):
            raise ValueError(refusal)
        return self


class _Loader(yaml.SafeLoader):
    """YAML 1.1 reads 1e-3 as text; people mean the number."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


def load(path: Path, overrides: Iterable[str] = ()) -> RunSettings:
    """The settings in a YAML file, with ``key=value`` overrides (dotted keys, YAML values).

    Raises:
        SettingsError: the file is missing or malformed, or a setting is not valid.
    """
    try:
        values = yaml.load(path.read_text(), _Loader)
    except OSError as error:
        raise SettingsError(f"the settings file {path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise SettingsError(f"the settings file {path} is not UTF-8 text") from None
    except yaml.YAMLError as error:
        raise SettingsError(f"the settings file {path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise SettingsError(f"the settings file {path} holds {type(values).__name__}; valid is a map of settings")
    for override in overrides:
        _override(values, override)
    return validate(values)


def _override(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise SettingsError(f"{override!r} is not an override; valid is key=value, as in rounds=100")
    *parents, last = key.split(".")
    for parent in parents:
        inner = values.setdefault(parent, {})
        if not isinstance(inner, dict):
            raise SettingsError(f"{override!r} sets a key of {parent!r}, which holds {inner!r} and not a map")
        values = inner
    try:
        values[last] = yaml.load(text, _Loader)
    except yaml.YAMLError:
        raise SettingsError(f"the value of {override!r} is not valid YAML") from None


def validate(values: Mapping[str, Any]) -> RunSettings:
    """Settings from a mapping.

    Raises:
        SettingsError: one sentence about the first setting that is not valid.
    """
    try:
        return RunSettings.model_validate(dict(values))
    except ValidationError as error:
        raise SettingsError(_sentence(error)) from None


def _sentence(error: ValidationError) -> str:
    first = error.errors()[0]
    place = [str(part) for part in first["loc"] if part not in FEEDBACK]
    key, value = ".".join(place), first.get("input")
    match first["type"]:
        case "extra_forbidden":
            where = "in " + ".".join(place[:-1]) if place[1:] else "at the top"
            return f"{key} is not a setting; valid {where} are {', '.join(_siblings(first['loc']))}"
        case "missing":
            return f"{key} is missing; every run needs it" + (", as in MODULE:FUNCTION" if key == "train" else "")
        case "value_error":
            text = str(first["ctx"]["error"])
            return f"{key}: {text}" if key and not text.startswith(key) else text
        case "string_pattern_mismatch" if key == "train":
            return f"train is {value!r}; valid is MODULE:FUNCTION"
        case "union_tag_invalid":
            return f"feedback.kind is {first['ctx']['tag']!r}; valid are {first['ctx']['expected_tags']}".replace(
                "'", ""
            )
        case _:
            return f"{key} is {value!r}; {first['msg'][0].lower() + first['msg'][1:]}"


def _siblings(location: tuple[int | str, ...]) -> list[str]:
    """The settings that are valid beside an unknown one."""
    model: Any = RunSettings
    for part in location[:-1]:
        if part != "feedback":
            model = FEEDBACK[str(part)] if part in FEEDBACK else model.model_fields[str(part)].annotation
            model = next((one for one in get_args(model) if one is not type(None)), model)  # X | None
    return list(model.model_fields)


def resolved(settings: RunSettings) -> str:
    """The settings with every default, as YAML."""
    return yaml.safe_dump(settings.model_dump(mode="json"), sort_keys=False)
