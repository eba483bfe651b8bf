"""Settings that both sides of a run must agree on, and what all settings have in common."""

from __future__ import annotations

from typing import Any

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    field_validator,
    model_validator,
)


class Strict(BaseModel):
    """Immutable; unknown keys are refused, and so are numbers that are not finite."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Course(Strict):
    """A number as a function of the version: ``first`` until ``begin``, then evenly to ``last`` in ``rounds``.

    A plain number in a settings file is that number at every version.
    """

    first: float = 1.0
    last: float = 1.0
    begin: NonNegativeInt = 0
    rounds: NonNegativeInt = 0  # 0: at once

    @model_validator(mode="before")
    @classmethod
    def _constant(cls, value: Any) -> Any:
        return {"first": value, "last": value} if isinstance(value, int | float) else value

    def at(self, version: int) -> float:
        """The number at a version."""
        done = version - self.begin
        if done < 0:
            return self.first
        return self.last if done >= self.rounds else self.first + (self.last - self.first) * done / self.rounds

    def within(self, low: float, high: float) -> bool:
        """Whether it never leaves ``[low, high]``."""
        return low <= min(self.first, self.last) and max(self.first, self.last) <= high


class Budget(Strict):
    """Bytes that each worker's update may take; the server divides them among the layers."""

    bytes: PositiveInt  # of a push, on average
    smallest: float = Field(default=1e-4, gt=0.0, le=1.0)  # ratio that every layer keeps at least
    largest: float = Field(default=1.0, gt=0.0, le=1.0)  # ratio that no layer exceeds


class Schedule(Strict):
    """How compression sets in: functions of the version alone, so that all sides agree without a word.

    Delayed start, learning-rate coordination, gradual compression and batch-size scaling are the warm-up
    practices of the surveys; an exponential warm-up in steps is that of DGC (Lin et al., ICLR 2018, section 3.3:
    75, 93.75, 98.44, 99.6, 99.9 % sparsity are ``warmup_ratio: 0.25, warmup_steps: 4`` before ``topk:0.001``).
    """

    start_round: NonNegativeInt = 0  # before this round nothing is compressed
    learning_rate: PositiveFloat = 1.0  # factor on every learning rate from that round on
    warmup_rounds: NonNegativeInt = 0  # rounds, from start_round, in which the ratio falls exponentially
    warmup_ratio: float = Field(default=0.25, gt=0.0, le=1.0)  # the ratio at their beginning
    warmup_steps: PositiveInt | None = None  # in so many equal steps; null: a little every round
    batch: Course = Course()  # factor on the batch size

    @field_validator("batch")
    @classmethod
    def _a_factor(cls, value: Course) -> Course:
        if min(value.first, value.last) <= 0.0:
            raise ValueError(f"schedule.batch goes from {value.first} to {value.last}; valid are factors above 0")
        return value

    def compresses(self, version: int) -> bool:
        """Whether the messages of the round at ``version`` are compressed."""
        return version >= self.start_round

    def ratio(self, version: int, final: float) -> float:
        """The ratio of a selection whose ratio is ``final`` once the warm-up is over; never below it."""
        done = version - self.start_round
        if done >= self.warmup_rounds or final >= self.warmup_ratio:
            return final
        share = done / self.warmup_rounds
        if self.warmup_steps is not None:
            share = done * self.warmup_steps // self.warmup_rounds / self.warmup_steps
        return float(self.warmup_ratio * (final / self.warmup_ratio) ** share)

    def learning_rate_factor(self, version: int) -> float:
        """The factor on every learning rate in the round at ``version``."""
        return self.learning_rate if self.compresses(version) else 1.0

    def batch_size(self, version: int, size: int) -> int:
        """The batch size in the round at ``version`` for one of ``size``; at least 1."""
        return max(1, round(size * self.batch.at(version)))
