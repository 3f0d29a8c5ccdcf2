"""What the choices of one request share: their turns, and whether the answer has begun.

    waits for its turn --> with the workers --> ended: the next one's turn

A worker refuses what its queue does not hold, and choices of one request must not have each other
refused: that request could never succeed. So only as many are with the workers at once as these
take while nobody else asks; the others follow as those end.

The first choice that fails ends the whole request. So from the first token of any choice on, one
without tokens waits for a worker as long as those with tokens do.
"""

import asyncio


class SharedAnswer:
    """One for each request, on the event loop."""

    def __init__(self) -> None:
        self.has_begun = False  # a choice has tokens
        self._turns: asyncio.Semaphore | None = None

    def turn(self, max_at_once: int) -> asyncio.Semaphore:
        """Return what a choice holds until it ends; how many may is settled by the first one."""
        if self._turns is None:
            self._turns = asyncio.Semaphore(max_at_once)
        return self._turns
