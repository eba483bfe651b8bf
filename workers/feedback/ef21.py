"""EF21 and EF21+: each worker and the server keep the same estimate of the worker's gradient."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from protocol.carry import OWED, Carry, Kept, Send, square
from protocol.compressors import Norms
from protocol.residual import Operands, Residual
from protocol.sender import Message, Sender
from protocol.spec import compressor
from workers.feedback.method import Method, Round
from workers.settings import Ef21Feedback


class Ef21(Method):
    """``c_k = C(grad_k - g_k)``;  ``g_k' = g_k + decode(c_k)``;  the server steps by ``g = sum_k a_k g_k``.

    Richtarik, Sokolov, Fatkhullin, "EF21: A New, Simpler, Theoretically Better, and Practically Faster Error
    Feedback" (NeurIPS 2021), Algorithm 2. EF21+ (section 4.6) takes, for each segment, whichever of the above
    and ``g_k' = C(grad_k)`` is nearer to ``grad_k``, the latter if they are equally near.

    With ``g_k = 0`` before the first round, that round pushes ``g_k^0 = C(grad_k)`` before the first step, as the
    paper has it; ``initial: full`` pushes ``grad_k`` itself, uncompressed, which its Theorem 3 rewards. With
    ``eta`` below 1, ``grad_k`` is replaced by ``v_k' = (1 - eta) v_k + eta grad_k``, ``v_k^0 = grad_k`` (Fatkhullin,
    Tyurin, Richtarik, "Momentum Provably Improves Error Feedback!", NeurIPS 2023), for stochastic gradients.

    Differences: the layer is the unit of compression unless the run says otherwise, and then of the choice in
    EF21+; buffers of the model go by plain error feedback; the server's optimizer may be any.

    Ledger: given nothing, since a gradient is no debt; the memory holds ``-g_k``, so that sent + memory = 0
    says that worker and server have the same estimate; a replaced estimate is discarded. A refused message,
    and a round without an optimizer step, leave ``g_k`` as it was; the first estimate is that of the first step.
    """

    carries = False

    def __init__(self, sender: Sender, settings: Ef21Feedback, device: torch.device) -> None:
        super().__init__(sender)
        self._settings = settings
        rule: Carry = Nearer() if settings.kind == "ef21_plus" else Estimate()
        trained = [place.entry.role == "parameter" for place in sender.layout.segments]
        self._rules: list[Carry] = [rule if one else OWED for one in trained]
        self._still: list[Carry] = [Estimate() if one else OWED for one in trained]  # no gradient to be nearer to
        self._full = tuple(compressor("none") for _ in sender.layout.segments)
        self._average: Tensor | None = None  # v_k
        self._staged: Tensor | None = None
        self._begun = self._begins = False  # whether the server has a first estimate, and will have

    def stage(self, given: Tensor, at: Round) -> Message:
        """See ``Method``."""
        trained = self.sender.layout.trainable
        given[trained:].mul_(at.weight)
        self._staged, self._begins = self._average, self._begun or not at.skipped
        if at.skipped:
            given[:trained].zero_()
            self.sender.subtract_residual(given[:trained])  # the gradient is what it is estimated to be
        elif self._settings.eta < 1.0:
            gradient, eta = given[:trained], self._settings.eta
            self._staged = gradient.clone() if self._average is None else self._average.lerp(gradient, eta)
            gradient.copy_(self._staged)
        first = not self._begun and self._settings.initial == "full"
        compressors = self._full if first else at.compressors
        return self.sender.stage(given, at.sequence, self._still if at.skipped else self._rules, compressors)

    def commit(self) -> None:
        """See ``Method``."""
        super().commit()
        self._average, self._begun = self._staged, self._begins


@dataclass(frozen=True)
class Estimate:
    """The memory holds ``-g``:  ``c = C(grad - g)``;  ``-g' = -g - decode(c)``."""

    owes = False

    def stage(self, send: Send, memory: Residual, number: int, given: Tensor, norms: Norms) -> Kept:
        """See ``protocol.carry.Carry``."""
        operands = memory.begin(number, given)
        encoded = send(operands, norms)
        left = memory.copy(number)
        encoded.update.subtract_from(left)  # as the server adds, so that both have the same bits
        return Kept(encoded, left, beside=square(left))


@dataclass(frozen=True)
class Nearer:
    """``Estimate``, or ``c = C(grad)`` and ``-g' = -decode(c)`` where that is at least as near to ``grad``."""

    owes = False

    def stage(self, send: Send, memory: Residual, number: int, given: Tensor, norms: Norms) -> Kept:
        """See ``protocol.carry.Carry``."""
        plain, markov = Norms(), Norms()
        direct = send(Operands(given, None, torch.empty_like(given)), plain)
        kept = Estimate().stage(send, memory, number, given, markov)
        chosen = markov
        if plain.left <= markov.left:
            chosen, old = plain, memory.load(number).clone()
            left = torch.zeros_like(given)
            direct.update.subtract_from(left)
            assert kept.left is not None
            kept = Kept(direct, kept.left.copy_(left), discarded=old, replaces=True, beside=square(left))
        norms.before += chosen.before
        norms.sent += chosen.sent
        norms.left += chosen.left
        return kept


def step_size(smoothness: Sequence[float], mean_smoothness: float, delta: float, mu: float | None = None) -> float:
    """The largest step that the EF21 paper's theory allows.

    Args:
        smoothness: ``L_i`` of each worker's function.
        mean_smoothness: ``L`` of their mean.
        delta: the compressor's contraction, the paper's alpha; in (0, 1].
        mu: of the Polyak-Lojasiewicz inequality; then Theorem 3's bound, else Theorem 2's.

    Returns:
        gamma of equation (15), or of (17): ``1 / (L + L~ sqrt(beta / theta))`` with ``theta = 1 - sqrt(1 - delta)``,
        ``beta = (1 - delta) / theta`` and ``L~ = sqrt(mean L_i^2)``.

    Raises:
        ValueError: ``delta`` is not in (0, 1], or there is no ``L_i``.
    """
    if not 0.0 < delta <= 1.0:
        raise ValueError(f"delta is {delta}; valid is a contraction in (0, 1]")
    if not smoothness:
        raise ValueError("smoothness is empty; valid is one constant a worker")
    theta = 1.0 - math.sqrt(1.0 - delta)
    beta = (1.0 - delta) / theta
    spread = math.sqrt(sum(one * one for one in smoothness) / len(smoothness))
    factor = 1.0 if mu is None else 2.0
    bound = 1.0 / (mean_smoothness + spread * math.sqrt(factor * beta / theta))
    return bound if mu is None else min(bound, theta / (2.0 * mu))
