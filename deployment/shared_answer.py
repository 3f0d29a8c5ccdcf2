"""What the choices of one request share: their turns, whether the answer has begun, a hash.

    waits for its turn --> with the workers --> ended: the next one's turn

A worker refuses what its queue does not hold, and choices of one request must not have each other
refused: that request could never succeed. So only as many are with the workers at once as these
take while nobody else asks; the others follow as those end.

The first choice that fails ends the whole request. So from the first token of any choice on, one
without tokens waits for a worker as long as those with tokens do.
"""

import asyncio

from antiphon.router.prompt import HashedPrompt
from antiphon.router.telemetry_view import ClusterView


class SharedAnswer:
    """One for each request, on the event loop."""

    def __init__(self) -> None:
        self.has_begun = False  # a choice has tokens
        self._turns: asyncio.Semaphore | None = None
        self._prompt: list[int] | None = None
        self._hashed: HashedPrompt | None = None

    def turn(self, max_at_once: int) -> asyncio.Semaphore:
        """Return what a choice holds until it ends; how many may is settled by the first one."""
        if self._turns is None:
            self._turns = asyncio.Semaphore(max_at_once)
        return self._turns

    def hash_prompt(self, prompt_token_ids: list[int], view: ClusterView) -> HashedPrompt:
        """Hash a prompt, unless it was the last one: choices of one prompt have the same list."""
        known = self._hashed if prompt_token_ids is self._prompt else None
        self._prompt = prompt_token_ids
        self._hashed = view.hash_prompt(prompt_token_ids, known)
        return self._hashed
