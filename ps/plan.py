"""What the server needs to know of a run before anyone joins."""

from __future__ import annotations

from dataclasses import dataclass, field

from protocol.errors import Refused
from protocol.layout import Layout
from protocol.messages import Join
from protocol.sampling import participants
from protocol.settings import Budget, Schedule
from ps.optimizer import ServerOptimizer, TorchOptimizer
from ps.settings import ServerSettings


@dataclass(frozen=True)
class Plan:
    """What the server needs to know of a run.

    Attributes:
        workers: ids of the workers that must join before the first round.
        send: ``difference`` or ``gradient``.
        sketch_every: rounds between checks of the server's ledger.
        feedback: the workers' kind of error feedback.
        schedule: how compression sets in.
        participation: share of the members that takes part in a round.
    """

    rounds: int
    workers: tuple[int, ...]
    send: str
    downlink: str
    overrides: dict[str, str]
    seed: int
    sketch_every: int
    server: ServerSettings
    uplink: str = "none"
    feedback: str = "ef"
    schedule: Schedule = Schedule()
    participation: float = 1.0
    budget: Budget | None = None
    relays: dict[int, tuple[int, ...]] = field(default_factory=dict)  # id of each relay -> its group

    @property
    def buffer(self) -> int:
        """Pushes a fold in asynchronous mode."""
        return self.server.buffer or max(1, len(self.workers) // 4)

    @property
    def pushes(self) -> int:
        """How many there are in a round while nobody joins or leaves."""
        if self.server.mode == "async":
            return self.buffer
        return len(participants(self.workers, self.participation, self.seed, 0))


def optimizer_for(plan: Plan, layout: Layout, first: Join) -> ServerOptimizer:
    """The server's optimizer: of the settings, or with ``send: gradient`` the one that the founder named.

    Raises:
        Refused: the founder named none.
        SettingsError: the optimizer does not fit the model.
    """
    if plan.send == "gradient":
        if first.optimizer is None:
            raise Refused("frame", f"worker {first.worker} has not said which optimizer the server shall run")
        return TorchOptimizer(layout, first.optimizer["kind"], first.optimizer["groups"])
    return plan.server.optimizer.of(layout)
