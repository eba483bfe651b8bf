"""Settings of a training process and of its error feedback."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, field_validator

from protocol.residual import Memory
from protocol.settings import Course, Strict


class NoFeedback(Strict):
    """What compression leaves behind is dropped."""

    kind: Literal["none"]


class ErrorFeedback(Strict):
    """What compression leaves behind joins the next update."""

    kind: Literal["ef"]
    strength: Course = Course()  # share of the residual that is fed back; the rest waits
    decay: float = Field(default=1.0, ge=0.0, le=1.0)  # share of the residual that is kept each round; 1: all
    clip: PositiveFloat | None = None  # residuals stay below this times the largest element of the update; null: never
    reset_every: PositiveInt | None = None  # rounds between resets of the residual; null: never
    start_round: NonNegativeInt = 0  # before it there is no error feedback

    @field_validator("strength")
    @classmethod
    def _a_share(cls, value: Course) -> Course:
        if not value.within(0.0, 1.0):
            raise ValueError(f"feedback.strength goes from {value.first} to {value.last}; valid are shares from 0 to 1")
        return value


class MomentumFeedback(Strict):
    """Error feedback of momentum steps."""

    kind: Literal["ef_momentum"]
    momentum: float = Field(default=0.9, ge=0.0, lt=1.0)  # mu
    nesterov: bool = True


class Ef21Feedback(Strict):
    """EF21 and EF21+: compressed corrections of an estimate of the gradient. Needs ``send: gradient``."""

    kind: Literal["ef21", "ef21_plus"]
    initial: Literal["compressed", "full"] = "compressed"  # the first estimate
    eta: float = Field(default=1.0, gt=0.0, le=1.0)  # weight of a new gradient in the average that is sent; 1: alone


class DeepGradientCompression(Strict):
    """DGC: momentum correction, factor masking, local clipping. Needs ``send: gradient``."""

    kind: Literal["dgc"]
    momentum: float = Field(default=0.9, ge=0.0, lt=1.0)  # m; the optimizer itself must have none
    nesterov: bool = False
    clip: PositiveFloat | None = None  # norm of the whole gradient, of which each of K workers may have 1 / sqrt(K)


class StepAhead(Strict):
    """Step-ahead error feedback, with optional error averaging."""

    kind: Literal["saef"] = "saef"
    strength: float = Field(default=1.0, ge=0.0, le=1.0)  # lambda: 0 is plain error feedback
    average_every: PositiveInt | None = None  # rounds between exchanges of residuals; null: never
    average: str = "f32"  # compressor of that exchange


FeedbackSettings = Annotated[
    NoFeedback | ErrorFeedback | MomentumFeedback | StepAhead | Ef21Feedback | DeepGradientCompression,
    Field(discriminator="kind"),
]


class FederatedSettings(Strict):
    """Federated methods; all need ``send: difference``, but for the participation."""

    participation: float = Field(default=1.0, gt=0.0, le=1.0)  # share of the workers that takes part in a round
    proximal: float = Field(default=0.0, ge=0.0)  # mu of FedProx: pulls local steps back to where the round began
    control_variates: bool = False  # SCAFFOLD: correct local steps by control variates


class WorkersSettings(Strict):
    """How many training processes there are and what each does in a round."""

    count: PositiveInt = 4
    cpus: PositiveInt = 1  # logical CPUs, and torch threads, of each
    gpus: NonNegativeInt = Field(default=0, le=1)
    local_steps: PositiveInt = 1  # optimizer steps a round
    accumulate: PositiveInt = 1  # batches an optimizer step
    residual: Memory = "float32"  # how each worker's residual is kept in memory
