"""What a unit of a rank's line holds beside what it keeps, while it runs: values and gradients in passing, and what is computed again.

A walk over the unit's calls, as autograd goes. Forward, at call k, there are what k makes and reads, what a later call still reads of
what was made before, and what calls up to k keep. Backward, at call k, what calls after k kept has been let go; there are the gradients
of what k made and of what it read, and gradients of values made before k that calls after k have given already (a residual's). Before
the backward of a unit with runs, they run forward again, the gradient of the unit's result waiting. A call whose backward is no kernel
hands its gradient on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from passes.layout_recompute import Kept, LineCall, bits_of


@dataclass(frozen=True)
class CallGradients:
    """Of one call: the bytes of its own parameters' gradients, of gradients inside the op, and whether it hands its gradient on."""

    weight_bytes: float = 0.0
    inner_bytes: float = 0.0
    hands_on: bool = False


@dataclass(frozen=True)
class Working:
    """The most bytes beside all that the unit keeps; negative where it has let go of more than it holds.

    `adding_bytes`: while gradients of parameters are made that are then added to those there are. `making_bytes`: while there were none
    of this unit's, those made so far counted in. Both count the forward in.
    """

    adding_bytes: float
    making_bytes: float


def working_of(
    calls: Sequence[LineCall], kept: Kept, num_bytes: Sequence[float], gradients: Sequence[CallGradients], carries: int
) -> Working:
    """Of a unit's calls. `carries`: the storages that have gradients."""

    def size(mask: int) -> float:
        return sum(num_bytes[k] for k in bits_of(mask))

    count = len(calls)
    until, before = [0] * count, [0] * count  # kept or kept again by calls up to k; made by calls before k or given
    after = [0] * count  # used by calls after k
    saved = made = 0
    given = 0
    for call in calls:
        given |= call.used & ~made
        made |= call.made
    made = given
    for k, call in enumerate(calls):
        saved |= call.saved
        until[k], before[k] = saved, made
        made |= call.made
    used = 0
    for k in range(count - 1, -1, -1):
        after[k] = used
        used |= calls[k].used
    result = next((call.made & carries for call in reversed(calls) if call.made & carries), 0)
    replayed = frozenset(kept.replayed)
    adding = making = 0.0
    made_bytes = 0.0
    for k in range(count - 1, -1, -1):
        call, own = calls[k], gradients[k]
        waiting = before[k] & after[k]
        there = call.made | call.used | waiting
        gone = size(kept.kept & saved & ~until[k])
        forward = size(there & ~kept.kept) - gone
        again = size(kept.again & until[k])
        replay = again + size(there & ~kept.kept & ~kept.again) + size(result) if k in replayed else 0.0
        passing = size(call.made & carries) if own.hands_on else size((call.made | call.used) & carries)
        backward = again - gone + passing + size(waiting & carries) + own.inner_bytes
        made_bytes += own.weight_bytes
        adding = max(adding, forward, replay, backward + own.weight_bytes)
        making = max(making, forward, replay, backward + made_bytes)
    return Working(adding, making)
