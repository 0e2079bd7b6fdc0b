"""A model split over tensor-parallel ranks computes what one process computes: loss and every gradient."""

import traceback

import pytest
import torch
from ranks import run_ranks
from test_every_system import config
from tiny import packed_row

from flame.models.decoder import build_model
from flame.models.initialize import initialize_weights, local_slice
from flame.models.mixers.base import Mixer
from flame.models.registry import systems
from flame.parallel.activation_checkpoint import apply_activation_checkpointing
from flame.parallel.fsdp import ShardingOptions, apply_fsdp
from flame.parallel.mesh import Degrees, build_mesh
from flame.parallel.tensor import apply_tensor_parallel

pytestmark = pytest.mark.distributed
WORDS = 68  # a multiple of two ranks


def built(values, degrees, world_size):
    """A sharded model with initial weights, and its mesh."""
    with torch.device("meta"):
        model = build_model(values)
    mesh = build_mesh(degrees, "cpu", world_size)
    if degrees.tp > 1:
        apply_tensor_parallel(model, mesh.axis("tp"))
    apply_fsdp(model, list(model.blocks), mesh.fsdp, ShardingOptions(param_dtype=torch.float32))
    model.to_empty(device="cpu")
    initialize_weights(model, seed=1)
    return model, mesh


@torch.no_grad()
def stir(model):
    """Weights away from the zeros and ones at which many start, which would hide gradients."""
    for name, parameter in sorted(model.named_parameters()):
        generator = torch.Generator().manual_seed(len(name) * 1000 + sum(map(ord, name)))
        noise = 0.1 * torch.randn(parameter.shape, generator=generator)
        parameter.to_local().add_(local_slice(noise, parameter))


def losses_and_gradients(rank, jobs, degrees, world_size):
    """By name: ([losses], gradients by parameter), or an error."""
    torch.manual_seed(0)
    found = {}
    for name, values in jobs.items():
        try:
            model, mesh = built(values, degrees, world_size)
            stir(model)
            found[name] = run(model, mesh)
        except Exception:
            found[name] = traceback.format_exc()
    return found


def run(model, mesh):
    """Two rows, one with another number of tokens than ranks divide, and a packed one, accumulated."""
    row = packed_row(3)
    pair = [packed_row(1), packed_row(2)]
    batches = [
        (torch.cat([p.input_ids for p in pair]), torch.cat([p.labels for p in pair]), None),
        (row.input_ids[:, :-1], row.labels[:, :-1], row.cu_seqlens.clamp(max=row.input_ids.shape[1] - 1)),
    ]
    losses = []
    for ids, labels, cu_seqlens in batches:
        loss = model(ids, labels=labels, cu_seqlens=cu_seqlens).loss_sum
        loss.backward()
        losses.append(loss.item())
    # All data-parallel ranks read the same rows here, and gradients are summed over them.
    parameters = [(name, parameter) for name, parameter in model.named_parameters() if parameter.grad is not None]
    gradients = {name: parameter.grad.full_tensor() / mesh.data_size for name, parameter in parameters}
    with torch.no_grad():
        logits = model(batches[0][0]).logits
    return losses, gradients, logits


def job(model_type, **options):
    return {**config(model_type), "vocab_size": WORDS, **options}


JOBS = {name: job(name) for name in sorted(systems())}
JOBS["rodimus"]["ska_attn"] = {"num_heads": 2}
JOBS["mesa_net"]["max_cg_step_training"] = 8  # more of them amplify rounding
VARIANTS = {  # parts of layers that not every configuration has, and heads that ranks share
    "one_kv_head": job("transformer", num_heads=4, num_kv_heads=1, qkv_bias=True, qk_norm=True, window_size=7),
    "tied_and_padded": job("transformer", tie_word_embeddings=True, pad_token_id=3),
    "sinks": job("transformer", num_heads=4, num_kv_heads=2, attention_sinks=True),
    "path_gated": job("path_attn", num_heads=4, num_kv_heads=1, use_forget_gate=True),
    "path_bare": job("path_attn", use_low_rank_w=False, use_w_shortconv=False),
    "attention_residuals": job("gla", attnres_block_size=2),
    "gla_shared_kv": job("gla", num_heads=4, num_kv_heads=1, use_short_conv=True, use_output_gate=False),
    "linear_attn_normed": job("linear_attn", norm_feature_map=True, norm_q=True, norm_k=True, num_kv_heads=1),
    "retnet_shared_kv": job("retnet", num_heads=4, num_kv_heads=2, use_output_gate=False),
    "gsa_t2r": job("gsa", feature_map="t2r", num_kv_heads=1, use_short_conv=True),
    "abc_convolved": job("abc", use_short_conv=True),
    "fox_normed": job("forgetting_transformer", qk_norm=True, use_output_gate=True, num_heads=4, num_kv_heads=1),
    "hgrn_convolved": job("hgrn", use_short_conv=True, expand_ratio=2),
    "hgrn2_convolved": job("hgrn2", use_short_conv=True),
    "lightnet_convolved": job("lightnet", use_short_conv=True),
    "mamba_biased": job("mamba", use_bias=True),
    "mamba2_groups": job("mamba2", n_groups=2, D_has_hdim=True, use_bias=True, conv_init=0.1),
    "mamba2_plain": job("mamba2", rmsnorm=False, norm_before_gate=True),
    "gdn_value_heads": job("gated_deltanet", num_heads=1, num_v_heads=2),
    "comba_value_heads": job("comba", num_heads=1, num_v_heads=4, use_output_gate=False),
    "deltaproduct_two_steps": job("gated_deltaproduct", num_householder=2, use_forget_gate=True),
    "kda_bounded": job("kda", num_v_heads=4, lower_bound=-5.0),
    "mesa_gated": job("mesa_net", use_output_gate=True, max_cg_step_training=8),
    "mla_direct": job("mla", q_lora_rank=None),
    "nsa_shared_kv": job("nsa", num_kv_heads=1, qkv_bias=True),
    "mom_single": job("mom", single_kv_proj=True, shared_mem=False, use_output_gate=False),
    "rwkv6_hybrid": job("rwkv6", attn={"layers": [1], "num_heads": 2}, num_hidden_layers=3),
    "three_systems": job("gla", num_hidden_layers=3, layer_types=["gla", "rwkv7", "transformer"],
                         layer_options={"rwkv7": {"head_dim": 16}, "transformer": {"num_heads": 2}}),
}  # fmt: skip
ALL = {**JOBS, **VARIANTS}


def assert_same(found, expected):
    assert not isinstance(expected, str), expected
    assert not isinstance(found, str), found
    torch.testing.assert_close(found[0], expected[0], rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(found[2], expected[2], rtol=1e-4, atol=1e-4)
    assert found[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        scale = gradient.abs().max().clamp(min=1e-3)
        error = (found[1][name] - gradient).abs().max() / scale
        assert error < 1e-4, f"{name}: {error:.2e} of its largest entry {scale:.2e}"


FEW = ["gla", "mamba2", "tied_and_padded"]  # with data-parallel ranks beside
PICKED = [*JOBS, "tied_and_padded", "one_kv_head", "mamba2_groups", "gdn_value_heads", "deltaproduct_two_steps"]
REST = sorted({*ALL} - {*PICKED})
GRIDS = {"sharded": Degrees(dp_shard=2, tp=2), "replicated": Degrees(dp_replicate=2, tp=2)}


ALONE = Degrees()


class Results:
    """Results by names and layout, computed once."""

    def __init__(self):
        self.known = {}

    def __call__(self, names, degrees=ALONE, world_size=1):
        key = (*names, degrees)
        if key not in self.known:
            jobs = {name: ALL[name] for name in names}
            self.known[key] = run_ranks(losses_and_gradients, world_size, jobs, degrees, world_size)
        return self.known[key]


@pytest.fixture(scope="module")
def results():
    return Results()


def compare(name, names, degrees, world_size, results):
    (expected,) = results(names)
    for found in results(names, degrees, world_size):
        assert_same(found[name], expected[name])


@pytest.mark.parametrize("name", PICKED)
def test_two_ranks_equal_one_process(name, results):
    compare(name, PICKED, Degrees(tp=2), 2, results)


@pytest.mark.slow
@pytest.mark.parametrize("name", REST)
def test_two_ranks_equal_one_process_in_other_configurations(name, results):
    compare(name, REST, Degrees(tp=2), 2, results)


@pytest.mark.parametrize("name", FEW)
def test_with_sharded_parameters_equals_one_process(name, results):
    compare(name, FEW, GRIDS["sharded"], 4, results)


@pytest.mark.slow
@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("name", ALL)
def test_with_data_parallel_ranks_equals_one_process(grid, name, results):
    compare(name, [*ALL], GRIDS[grid], 4, results)


FOUR = {
    name: ALL[name] for name in ("one_kv_head", "fox_normed", "gla_shared_kv", "comba_value_heads", "hgrn", "mamba")
}


@pytest.mark.slow
@pytest.mark.parametrize("name", FOUR)
def test_four_ranks_equal_one_process(name, results):
    compare(name, [*FOUR], Degrees(tp=4), 4, results)


@pytest.mark.slow
@pytest.mark.parametrize(
    "checkpointing", [("none", "op"), ("full", "op"), ("selective", "op")], ids=lambda pair: pair[0]
)
def test_compiled_whole_and_recomputed_equals_eager(checkpointing, results):
    for found in run_ranks(compiled_losses_and_gradients, 2, ALL["gla"], checkpointing):
        assert_same(found, results(["gla"])[0]["gla"])


def compiled_losses_and_gradients(rank, values, checkpointing):
    """Every block one graph, backwards too."""
    with torch.device("meta"):
        model = build_model(values)
    mesh = build_mesh(Degrees(tp=2), "cpu", 2)
    apply_tensor_parallel(model, mesh.axis("tp"))
    blocks = list(model.blocks)
    apply_activation_checkpointing(blocks, *checkpointing)
    for block in blocks:
        block.compile(backend="aot_eager", fullgraph=True)
    apply_fsdp(model, blocks, mesh.fsdp, ShardingOptions(param_dtype=torch.float32))
    model.to_empty(device="cpu")
    initialize_weights(model, seed=1)
    stir(model)
    return run(model, mesh)


def split_share(rank, jobs):
    """By name: the share of a rank's parameters in those of the layers, and whether every mixer has a plan."""
    mesh = build_mesh(Degrees(tp=2), "cpu", 2)
    found = {}
    for name, values in jobs.items():
        with torch.device("meta"):
            model = build_model(values)
        apply_tensor_parallel(model, mesh.axis("tp"))
        parameters = [parameter for parameter in model.blocks.parameters() if parameter.ndim > 1]
        share = sum(p.to_local().numel() for p in parameters) / sum(p.numel() for p in parameters)
        mixers = [module for module in model.modules() if isinstance(module, Mixer)]
        found[name] = share, all(mixer.share is not None for mixer in mixers)
    return found


def test_every_system_is_split_and_most_of_its_weights():
    for name, (share, planned) in run_ranks(split_share, 2, JOBS)[0].items():
        assert planned, f"{name}: a mixer has no tensor_parallel_plan"
        assert share < 0.8, f"{name}: a rank holds {share:.2f} of the layers"
