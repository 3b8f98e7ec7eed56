"""How many tokens to draft: from measured acceptance, draft cost and pass cost, and none where it loses.

With acceptance a for each token and g drafted tokens a pass yields (1 - a^(g+1)) / (1 - a) tokens
(Leviathan et al. 2023, arXiv:2211.17192). Their speedup divides by g c + 1, as if a pass over g + 1
tokens cost what one over a single token does. That holds where weights from memory are the cost; a small
model on a CPU pays for every token. So the time of a pass is measured for each width here:

    speedup(g) = (1 - a^(g+1)) / (1 - a) / (g c + v(g + 1)),   v(w) = time of a pass of w tokens / of one
"""

from __future__ import annotations

from collections import deque

MOST = 15  # drafted tokens in a pass: with the pending one a tile of 16 rows
FIRST_TRY = 4
GAIN = 1.02  # less expected speedup than this is not worth it
MEMORY = 0.93  # weight of older passes in the acceptance, each pass
PRIOR = (3.0, 4.0)  # accepted and tried tokens before anything was seen: hopeful, soon forgotten
PROBES = 2  # passes with a draft before it is judged
PAUSE, LONGEST_PAUSE = 16, 256  # plain passes before it is tried again
PLAIN_EVERY = 64  # passes after which a plain one is timed again
_KEPT = 9  # latest times of each width; their least counts, which other work on the machine disturbs least


def expected_tokens(acceptance: float, drafted: int) -> float:
    """Tokens that a pass yields with `drafted` proposals: (1 - a^(g+1)) / (1 - a)."""
    if acceptance >= 1:
        return drafted + 1.0
    return float((1 - acceptance ** (drafted + 1)) / (1 - acceptance))


def expected_speedup(acceptance: float, drafted: int, draft_cost: float, pass_cost: float = 1.0) -> float:
    """Tokens a second against plain decoding.

    Args:
        acceptance: chance that a drafted token is right, given that those before it were.
        drafted: tokens drafted for each pass (g).
        draft_cost: seconds of a drafted token over seconds of a plain pass (c).
        pass_cost: seconds of a pass over g + 1 tokens over seconds of a plain pass; 1 where memory decides.
    """
    return expected_tokens(acceptance, drafted) / (drafted * draft_cost + pass_cost)


class DraftLength:
    """Chooses the draft length of each pass; what it learnt in one request serves the next.

    Args:
        fixed: always this many (or as many as still fit); None chooses and may stop drafting.
        most: the longest draft.
    """

    def __init__(self, fixed: int | None = None, most: int = MOST) -> None:
        self._fixed, self._most = fixed, most
        self._accepted, self._tried = PRIOR
        self._pass_s: dict[int, deque[float]] = {}  # width -> latest seconds
        self._draft_s: deque[float] = deque(maxlen=_KEPT)  # a token
        self._probes = PROBES
        self._pause, self._next_pause = 0, PAUSE
        self._drafts = self._since_plain = 0

    @property
    def acceptance(self) -> float:
        """The running estimate of a."""
        return self._accepted / self._tried

    @property
    def draft_cost(self) -> float | None:
        """c: seconds of a drafted token over those of a plain pass; None before both were measured."""
        plain = self.pass_s(1)
        return None if plain is None or not self._draft_s else min(self._draft_s) / plain

    def choose(self, room: int) -> int:
        """Tokens to draft now; `room` is how many could still be used."""
        room = max(0, min(room, self._most if self._fixed is None else self._fixed))
        if self._fixed is not None or room == 0:
            return room
        if len(self._pass_s.get(1, ())) < 2 or self._since_plain >= PLAIN_EVERY:
            return 0  # plain passes are what all others are compared with
        if self._pause:
            self._pause -= 1
            return 0
        if self._probes:
            return min(room, FIRST_TRY)
        best = max(range(room + 1), key=lambda drafted: self._speedup(drafted, self.acceptance))
        if self._speedup(best, self.acceptance) >= GAIN:
            self._next_pause = PAUSE
            return best
        if max(self._speedup(drafted, 1.0) for drafted in range(room + 1)) < GAIN:
            self._next_pause = LONGEST_PAUSE  # too dear even if every proposal were right
        self._pause, self._next_pause = self._next_pause, min(2 * self._next_pause, LONGEST_PAUSE)
        self._probes = 1
        return 0

    def saw(self, drafted: int, accepted: int, draft_s: float, pass_s: float) -> None:
        """What a pass over `drafted` + 1 tokens cost and gave."""
        self._pass_s.setdefault(drafted + 1, deque(maxlen=_KEPT)).append(pass_s)
        self._since_plain += 1
        if not drafted:
            self._since_plain = 0
            return
        self._probes = max(0, self._probes - 1)
        self._accepted = MEMORY * self._accepted + accepted
        self._tried = MEMORY * self._tried + min(accepted + 1, drafted)
        self._drafts += 1
        if self._drafts > 1:  # the first draft also reads the prompt
            self._draft_s.append(draft_s / drafted)

    def pass_s(self, width: int) -> float | None:
        """Seconds of a pass over so many tokens: measured, or on the line through measured neighbours."""
        if width in self._pass_s:
            return min(self._pass_s[width])
        known = sorted(self._pass_s)
        if len(known) < 2:
            return min(self._pass_s[known[0]]) if known else None
        above = next((at for at in known if at > width), known[-1])
        low, high = (known[known.index(above) - 1], above) if known.index(above) else (known[0], known[1])
        first, second = min(self._pass_s[low]), min(self._pass_s[high])
        return max(0.0, first + (second - first) * (width - low) / (high - low)) or first

    def _speedup(self, drafted: int, acceptance: float) -> float:
        plain, own = self.pass_s(1), self.pass_s(drafted + 1)
        assert plain is not None
        assert own is not None
        cost = self.draft_cost or 0.0
        return expected_speedup(acceptance, drafted, cost, max(1.0, own / plain) if drafted else 1.0)
