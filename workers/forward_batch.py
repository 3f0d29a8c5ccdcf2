"""What one forward pass reads, besides weights and cache."""

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from antiphon.kernels.attention_batch import AttentionBatch


@dataclass(frozen=True, slots=True)
class ForwardBatch:
    """A packed step.

    Attributes:
        input_ids: ``[1, T]`` int64, packed.
        position_ids: ``[1, T]`` int64.
        logit_rows: ``[num_samples]`` int64, the packed tokens whose logits are wanted.
        attention: Where each request's tokens are.
    """

    input_ids: Tensor
    position_ids: Tensor
    logit_rows: Tensor
    attention: AttentionBatch

    def copy_(self, other: "ForwardBatch") -> None:
        """Overwrite this batch's tensors with those of another of the same sizes.

        Block tables may be narrower in ``other``: what lies beyond a context is never read.
        """
        tables = other.attention.block_tables
        self.attention.block_tables[:, : tables.shape[1]].copy_(tables)
        for mine, theirs in zip(self._tensors(), other._tensors(), strict=True):
            mine.copy_(theirs)

    def _tensors(self) -> Iterator[Tensor]:
        yield from (self.input_ids, self.position_ids, self.logit_rows)
        yield self.attention.slot_mapping
        if self.attention.plan is not None:
            yield from self.attention.plan.tensors()
