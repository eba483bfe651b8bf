"""Settings of the server, of its metrics endpoint and of what it stores."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, Self

import torch
from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt, model_validator

from protocol.errors import SettingsError
from protocol.layout import Layout
from protocol.residual import Memory
from protocol.settings import Strict
from ps.optimizer import ServerOptimizer, Sum, TorchOptimizer, build


class OptimizerSettings(BaseModel):
    """The server's optimizer: ``sum``, or a class path such as ``torch.optim.SGD`` and its options."""

    model_config = ConfigDict(extra="allow", frozen=True)

    kind: str = "sum"

    @property
    def options(self) -> dict[str, Any]:
        """What is passed to the class beside the parameters."""
        return dict(self.model_extra or {})

    def of(self, layout: Layout) -> ServerOptimizer:
        """The optimizer for a model.

        Raises:
            SettingsError: it cannot step on the model's parameters, as Muon cannot on a bias.
        """
        if self.kind == "sum":
            return Sum()
        names = [place.entry.name for place in layout.tensors if place.entry.role == "parameter"]
        return TorchOptimizer(layout, self.kind, [{"params": names}], **self.options)

    @model_validator(mode="after")
    def _works_for_some_model(self) -> Self:
        if self.kind != "sum":
            try:
                build(self.kind, [{"params": [torch.nn.Parameter(torch.zeros(1))]}], self.options)
            except SettingsError as error:
                with suppress(SettingsError):  # some are for matrices alone
                    build(self.kind, [{"params": [torch.nn.Parameter(torch.zeros(1, 1))]}], self.options)
                    return self
                raise error
        return self


class Staleness(Strict):
    """The weight of an update that was computed s versions ago (Xie, Koyejo, Gupta, FedAsync, 2019, section 5.2)."""

    kind: Literal["constant", "polynomial", "hinge"] = "constant"
    a: float = Field(default=0.5, gt=0.0)  # polynomial: (s + 1)^-a; hinge: 1 / (a (s - b) + 1) where s > b
    b: NonNegativeInt = 4  # hinge: versions without a reduction

    def weight(self, staleness: int) -> float:
        """The factor, in (0, 1], for an update that is ``staleness`` versions behind."""
        if self.kind == "polynomial":
            return float((staleness + 1) ** -self.a)
        if self.kind == "hinge" and staleness > self.b:
            return 1.0 / (self.a * (staleness - self.b) + 1.0)
        return 1.0


class ServerSettings(Strict):
    """How rounds are closed and what is done with their sum."""

    mode: Literal["sync", "async"] = "sync"
    quorum: float = Field(default=1.0, ge=1.0, le=1.0)  # share of the workers that closes a round
    buffer: PositiveInt | None = None  # pushes a fold, asynchronous mode only; null: a quarter of the workers
    staleness: Staleness = Staleness()  # weights of late updates, asynchronous mode only
    max_staleness: PositiveInt | None = None  # versions that an update may be behind; others wait; null: any
    shards: Literal[1] = 1
    residual: Memory = "float32"  # how the server's residual is kept in memory
    optimizer: OptimizerSettings = OptimizerSettings()


class RelaySettings(Strict):
    """A second tier: relays near groups of workers fold their updates and compress the sum once more."""

    count: NonNegativeInt = 0  # groups, of workers with neighbouring ids; 0: workers send to the server itself
    uplink: str = "topk:0.01+int4"  # compressor, relay -> server; ``uplink`` is then worker -> relay
    residual: Memory = "float32"  # how each relay's residual is kept in memory


class MetricsSettings(Strict):
    """The Prometheus endpoint and how often vital signs are measured."""

    host: str = "127.0.0.1"
    port: NonNegativeInt | None = Field(default=9464, le=65535)  # 0: any free port; null: no endpoint
    sketch_every: PositiveInt = 10  # rounds between checks of the ledgers and replicas


class StorageSettings(Strict):
    """Where run directories go."""

    dir: Path = Path("runs")
