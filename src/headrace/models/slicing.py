"""From token ids of many lengths to the arrays of one forward pass."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from headrace.batching import Indices
from headrace.models.choice import Ids


def padded(tokens: Sequence[Sequence[int]], lengths: Indices, part: Indices) -> tuple[Ids, Ids]:
    """Token ids and mask of the rows `part`, each of shape (rows, longest row); what is masked has the id 0."""
    mask = (np.arange(max(1, int(lengths[part].max()))) < lengths[part, None]).astype(np.int64)
    ids = np.zeros_like(mask)
    ids[mask.astype(bool)] = np.concatenate([tokens[at] for at in part])
    return ids, mask
