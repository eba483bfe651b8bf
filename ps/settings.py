"""Settings of the server, of its metrics endpoint and of what it stores."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, Self

import torch
from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt, model_validator

from protocol.residual import Memory
from ps.optimizer import build


class Strict(BaseModel):
    """Immutable, and unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class OptimizerSettings(BaseModel):
    """The server's optimizer: ``sum``, or a class path such as ``torch.optim.SGD`` and its options."""

    model_config = ConfigDict(extra="allow", frozen=True)

    kind: str = "sum"

    @property
    def options(self) -> dict[str, Any]:
        """What is passed to the class beside the parameters."""
        return dict(self.model_extra or {})

    @model_validator(mode="after")
    def _torch_takes_them(self) -> Self:
        if self.kind != "sum":
            build(self.kind, [{"params": [torch.nn.Parameter(torch.zeros(1))]}], self.options)
        return self


class ServerSettings(Strict):
    """How rounds are closed and what is done with their sum."""

    mode: Literal["sync"] = "sync"
    quorum: float = Field(default=1.0, ge=1.0, le=1.0)  # share of the workers that closes a round
    buffer: None = None  # pushes a fold, asynchronous mode only
    shards: Literal[1] = 1
    residual: Memory = "float32"  # how the server's residual is kept in memory
    optimizer: OptimizerSettings = OptimizerSettings()


class MetricsSettings(Strict):
    """The Prometheus endpoint and how often vital signs are measured."""

    host: str = "127.0.0.1"
    port: NonNegativeInt | None = Field(default=9464, le=65535)  # 0: any free port; null: no endpoint
    sketch_every: PositiveInt = 10  # rounds between checks of the ledgers and replicas


class StorageSettings(Strict):
    """Where run directories go."""

    dir: Path = Path("runs")
