"""Context parallelism: ranks share the rows of a batch, each with an equal part of every row's tokens.

Nothing is laid over the model. Batches are cut (`Batch.part`), the context of a forward carries this rank's
`SequenceShard`, and every op that mixes tokens exchanges what it needs (`flame.kernels.sequence`). This file says where that
is impossible.
"""

from __future__ import annotations

from flame.config.sections import JobConfig
from flame.errors import ConfigError
from flame.models.decoder import CausalLM
from flame.models.mixers.base import Mixer
from flame.models.modules import ShortConvolution

DEGREE = "parallelism.context_parallel_degree"


def check_context_parallel(model: CausalLM, job: JobConfig, ranks: int) -> None:
    """Refuse what cannot work, while the model still has no memory.

    Raises:
        ConfigError: a mixer without context parallelism, too few tokens a rank, or a part of training that excludes it.
    """
    if ranks == 1:
        return
    seq_len = job.training.seq_len
    if seq_len % ranks:
        raise ConfigError(f"{DEGREE} = {ranks} does not divide training.seq_len = {seq_len}. Change one of them.")
    if job.compile.cuda_graph:
        raise ConfigError(f"{DEGREE} = {ranks} needs compile.cuda_graph = false: exchanges are not recorded.")
    for name, module in model.named_modules():
        if isinstance(module, Mixer) and not module.context_parallel:
            raise ConfigError(
                f"{DEGREE} = {ranks}: {type(module).__name__} (layer {name}) needs whole sequences. Set it to 1, take "
                f"another kind of layer, or have the mixer pass ctx.shard to its ops and say context_parallel = True."
            )
        if isinstance(module, ShortConvolution) and module.weight.shape[-1] - 1 > seq_len // ranks:
            raise ConfigError(
                f"{DEGREE} = {ranks} leaves {seq_len // ranks} tokens of training.seq_len = {seq_len} a rank, fewer than "
                f"the convolution {name} looks back ({module.weight.shape[-1] - 1}). Use fewer ranks."
            )
