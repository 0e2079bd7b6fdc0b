"""What has been read from each source of data."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist


def source_figures(
    progress: Mapping[str, Mapping[str, float]], device: torch.device, group: dist.ProcessGroup
) -> dict[str, float]:
    """`tokens/NAME`, `epoch/NAME` and `skipped/NAME` of every source, over the whole run; waits for the other ranks.

    Args:
        progress: of this rank's loader (`Loader.progress`): `tokens` and `skipped` documents are sums, `epoch` is a mean.
        group: ranks that read different data.
    """
    keys = [(kind, name) for name, entry in progress.items() for kind in entry]
    values = torch.tensor([progress[name][kind] for kind, name in keys], dtype=torch.float64, device=device)
    dist.all_reduce(values, group=group)
    ranks = dist.get_world_size(group)
    totals = zip(keys, values.tolist())
    return {f"{kind}/{name}": total / ranks if kind == "epoch" else total for (kind, name), total in totals}
