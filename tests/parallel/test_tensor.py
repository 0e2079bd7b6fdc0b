"""What tensor parallelism refuses before any memory is taken, and that it leaves a model's names and shapes alone."""

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from flame.config import load_job
from flame.errors import ConfigError
from flame.models.decoder import build_model
from flame.parallel.mesh import Degrees, build_mesh
from flame.parallel.parallelize import parallelize
from flame.parallel.tensor import apply_tensor_parallel

SMALL = {"model_type": "gla", "hidden_size": 48, "num_heads": 6, "num_hidden_layers": 1, "intermediate_size": 64}


@pytest.fixture
def mesh():
    dist.init_process_group("fake", store=FakeStore(), rank=1, world_size=4)
    yield build_mesh(Degrees(tp=4), "cpu", 4)
    dist.destroy_process_group()


def on_meta(**options):
    with torch.device("meta"):
        return build_model({**SMALL, "vocab_size": 100, **options})


def test_heads_and_words_that_cannot_be_dealt_are_refused(mesh):
    with pytest.raises(ConfigError, match="does not divide num_heads = 6"):
        apply_tensor_parallel(on_meta(), mesh.axis("tp"))
    with pytest.raises(ConfigError, match="does not divide model.vocab_size = 99"):
        apply_tensor_parallel(on_meta(num_heads=4, vocab_size=99), mesh.axis("tp"))


def test_recording_a_graph_is_refused(mesh):
    job = load_job(None, ["--parallelism.tensor_parallel_degree=4", "--compile.cuda_graph=true"])
    with pytest.raises(ConfigError, match="compile.cuda_graph = false"):
        parallelize(on_meta(num_heads=4), job, mesh, torch.device("cpu"))


def test_names_and_whole_shapes_stay_and_forwards_read_parts(mesh):
    before = {name: parameter.shape for name, parameter in on_meta(num_heads=4).named_parameters()}
    model = on_meta(num_heads=4)
    apply_tensor_parallel(model, mesh.axis("tp"))
    assert {name: parameter.shape for name, parameter in model.named_parameters()} == before
    attn = model.blocks[0].attn
    assert attn.q_proj.weight.shape == (6, 48) and attn.o_proj.weight.shape == (48, 12)
    assert attn.config.num_heads == 4 and attn.share.config.num_heads == 1
