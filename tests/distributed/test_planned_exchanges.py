"""What `flame plan` says that ranks exchange inside layers is what they do exchange."""

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks

from flame.config import load_job, model_values
from flame.data.batch import Batch
from flame.models.registry import resolve_config
from flame.parallel.mesh import build_mesh
from flame.parallel.parallelize import build_sharded_model, degrees_of
from flame.plan import make_plan
from flame.plan.activations import Exchanges

pytestmark = pytest.mark.distributed
COMMON = ["--model.hidden_size=32", "--model.num_hidden_layers=2", "--model.num_heads=2", "--model.vocab_size=64"]
COMMON += ["--training.seq_len=64", "--training.local_batch_size=3", "--compile.enable=false"]
COMMON += ["--training.mixed_precision_param=float32"]
MODELS = {
    "gla": ["--model.use_short_conv=true"],
    "gated_deltanet": ["--model.head_dim=16"],
    "transformer": [],
    "windowed": ["--model.model_type=transformer", "--model.window_size=9"],
}
AXES = {"cp": "context_parallel_degree", "tp": "tensor_parallel_degree"}


def job_of(name, axis):
    model = [f"--model.model_type={name}", *MODELS[name]]
    return load_job(None, [*model, *COMMON, f"--parallelism.{AXES[axis]}=2"])


def exchanged(rank, names, axis):
    """By name: [bytes, collectives] of a forward and backward in the group of an axis."""
    found = {}
    for name in names:
        job = job_of(name, axis)
        mesh = build_mesh(degrees_of(job), "cpu", dist.get_world_size())
        model = build_sharded_model(resolve_config(model_values(job)), job, mesh, torch.device("cpu"))
        tokens = torch.randint(64, (3, 65), generator=torch.Generator().manual_seed(0))
        batch = Batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())
        batch = batch.part(mesh.group("cp")) if axis == "cp" else batch
        group = mesh.group(axis).group_name
        with Exchanges() as exchanges:
            model(batch.input_ids, labels=batch.labels, shard=batch.shard).loss_sum.backward()
        found[name] = [exchanges.sent[group], exchanges.count[group]]
    return found


@pytest.mark.parametrize("axis", AXES)
def test_planned_exchanges_are_those_of_a_step(axis):
    for found in run_ranks(exchanged, 2, list(MODELS), axis):
        for name, figures in found.items():
            (entry,) = [entry for entry in make_plan(job_of(name, axis), 2).traffic if entry.axis == axis]
            if axis == "cp":
                assert figures == [entry.sent, entry.exchanges], name
            else:  # also the gradients of norms and other weights that all ranks hold, which the plan leaves out
                assert entry.sent <= figures[0] < 1.05 * entry.sent and entry.exchanges < figures[1], name
