"""Settings of a training process and of its error feedback."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt

from protocol.residual import Memory


class Strict(BaseModel):
    """Immutable, and unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class NoFeedback(Strict):
    """What compression leaves behind is dropped."""

    kind: Literal["none"]


class ErrorFeedback(Strict):
    """What compression leaves behind joins the next update."""

    kind: Literal["ef"]


class StepAhead(Strict):
    """Step-ahead error feedback, with optional error averaging."""

    kind: Literal["saef"] = "saef"
    strength: float = Field(default=1.0, ge=0.0, le=1.0)  # lambda: 0 is plain error feedback
    average_every: PositiveInt | None = None  # rounds between exchanges of residuals; null: never
    average: str = "f32"  # compressor of that exchange


FeedbackSettings = Annotated[NoFeedback | ErrorFeedback | StepAhead, Field(discriminator="kind")]


class WorkersSettings(Strict):
    """How many training processes there are and what each does in a round."""

    count: PositiveInt = 4
    cpus: PositiveInt = 1  # logical CPUs, and torch threads, of each
    gpus: NonNegativeInt = Field(default=0, le=1)
    local_steps: PositiveInt = 1  # optimizer steps a round
    accumulate: PositiveInt = 1  # batches an optimizer step
    residual: Memory = "float32"  # how each worker's residual is kept in memory
