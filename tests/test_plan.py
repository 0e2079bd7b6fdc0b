"""Plans of jobs, checked against known sizes, against FSDP2 itself and against what the compiler keeps."""

import functools
import json
import math

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from flame import cli
from flame.config import load_job
from flame.errors import ConfigError
from flame.models.context import make_context
from flame.models.decoder import build_model
from flame.parallel.activation_checkpoint import selective_policy
from flame.plan import Links, block_activations, count_parameters, default_world_size, make_plan, shard_numel
from flame.plan.report import render

# Parameters at the reference's defaults.
KNOWN = {
    "retnet": 1351727104,
    "gla": 1365514240,
    "linear_attn": 1389524992,
    "hgrn": 1364396032,
    "hgrn2": 1364396032,
    "rwkv6": 1360224256,
    "lightnet": 1376929792,
    "mamba": 1400276992,
    "mamba2": 1371839488,
    "samba": 1403935488,
    "gsa": 1376929792,
    "abc": 1376892928,
    "mla": 1148829184,
    "transformer": 1364297728,
}

TINY = ["--model.model_type=gla", "--model.hidden_size=64", "--model.num_heads=2", "--model.num_hidden_layers=3"]
TINY += ["--model.vocab_size=100", "--training.seq_len=64"]


def plan_of(*overrides, world=1):
    return make_plan(load_job(None, list(overrides)), world)


@pytest.mark.parametrize("model_type", KNOWN)
def test_parameters_are_those_of_the_reference(model_type):
    with torch.device("meta"):
        model = build_model({"model_type": model_type})
    assert count_parameters(model).total == KNOWN[model_type]


def test_parts_add_up_to_the_total():
    parameters = plan_of(*TINY, "--model.attn.layers=[1]", "--model.attn.num_heads=2").parameters
    blocks = sum(count * size for count, size in parameters.blocks.values())
    assert {kind: count for kind, (count, _) in parameters.blocks.items()} == {
        "GatedLinearAttention": 2,
        "Attention": 1,
    }
    assert parameters.total == parameters.embedding + blocks + parameters.head + 64  # the final norm


def test_a_shared_head_is_counted_once():
    apart, tied = plan_of(*TINY).parameters, plan_of(*TINY, "--model.tie_word_embeddings=true").parameters
    assert tied.head == 0 and apart.total - tied.total == 64 * 100


@pytest.mark.parametrize("world, tp", [(3, 1), (8, 1), (512, 1), (6, 2)])
def test_sharded_memory_is_what_fsdp2_allocates(world, tp):
    from flame.parallel.fsdp import ShardingOptions, apply_fsdp
    from flame.parallel.mesh import Degrees, build_mesh
    from flame.parallel.tensor import apply_tensor_parallel

    tensor = f"--parallelism.tensor_parallel_degree={tp}"
    job = load_job(None, [*TINY, "--training.virtual_shards=1536", "--model.vocab_size=68", tensor])
    plan = make_plan(job, world)
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world)
    try:
        with torch.device("meta"):
            model = build_model(plan.model)
        mesh = build_mesh(Degrees(dp_shard=world // tp, tp=tp), "cpu", world)
        if tp > 1:
            apply_tensor_parallel(model, mesh.axis("tp"))
        apply_fsdp(model, list(model.blocks), mesh.fsdp, ShardingOptions())
        padded = sum(math.prod(parameter._local_tensor.shape) for parameter in model.parameters())
    finally:
        dist.destroy_process_group()
    assert plan.memory.weights == plan.memory.gradients == 4 * padded
    assert plan.memory.optimizer == 8 * padded


def test_rows_are_dealt_out_like_chunks():
    for rows, ranks in [(7, 3), (8, 4), (3, 8), (1, 2)]:
        parameter = torch.empty(rows, 5, device="meta")
        assert shard_numel(parameter.shape, ranks) == torch.chunk(parameter, ranks)[0].numel()


def kept_by_compiler(block, x, ctx, carried, contexts):
    """Bytes a token that torch's compiler keeps for the backward of a block on the meta device."""
    kept, weights = {}, {parameter.untyped_storage()._cdata for parameter in block.parameters()}

    def run(x):
        return block(x, ctx.at_layer(None, carried))[0]

    def keep(tensor):
        kept[tensor.untyped_storage()._cdata] = tensor
        return tensor

    call = run if contexts is None else lambda x: checkpoint(run, x, use_reentrant=False, context_fn=contexts)
    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager_decomp_partition")
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = compiled(x.requires_grad_())  # while it lives, so does all that it keeps
    assert output.requires_grad
    return sum(tensor.untyped_storage().nbytes() for key, tensor in kept.items() if key not in weights)


@pytest.mark.parametrize(
    "model_type, options",
    [("gla", {}), ("transformer", {}), ("mamba2", {})]
    + [
        pytest.param(*case, marks=pytest.mark.slow)
        for case in [("gated_deltanet", {}), ("kda", {}), ("retnet", {}), ("rwkv7", {}), ("hgrn2", {})]
    ],
)
def test_activations_are_what_the_compiler_keeps(model_type, options, monkeypatch):
    monkeypatch.setenv("FLAME_BACKEND", "triton")  # on meta tensors kernels are known by their shapes only
    with torch.device("meta"):
        model = build_model({"model_type": model_type, "num_hidden_layers": 2, **options}).to(torch.bfloat16)
        x = torch.empty(64, 2048, model.config.hidden_size, dtype=torch.bfloat16)
        ctx = make_context(2048, x.device)
        with torch.no_grad():
            x, carried = model.blocks[0](x, ctx.at_layer(None, model.decoder.initial_carried()))
            counted = block_activations(model.blocks[1], x, ctx.at_layer(None, carried))
    by_op = functools.partial(create_selective_checkpoint_contexts, selective_policy)
    for ours, contexts in ((counted.kept, None), (counted.kept_by_op, by_op)):
        measured = kept_by_compiler(model.blocks[1], x, ctx, carried, contexts) / (64 * 2048)
        assert ours == pytest.approx(measured, rel=0.1)
    assert counted.stream < counted.kept_by_op < counted.kept


def test_checkpointing_and_shards_lower_memory_in_the_expected_order():
    base = [*TINY, "--model.num_hidden_layers=12", "--training.virtual_shards=64"]
    modes = {
        mode: plan_of(*base, *mode.split()).memory.activations
        for mode in (
            "--activation_checkpoint.mode=full",
            "--activation_checkpoint.mode=selective --activation_checkpoint.selective_ac_option=2",
            "--activation_checkpoint.mode=none",
        )
    }
    full, half, none = modes.values()
    assert full < half < none
    assert plan_of(*base, world=8).memory.weights * 7 < plan_of(*base).memory.weights


def test_accumulating_without_reduction_keeps_whole_gradients():
    twice = [*TINY, "--training.gradient_accumulation_steps=2"]
    lazy, eager = plan_of(*twice), plan_of(*twice, "--parallelism.reduce_each_microbatch")
    assert lazy.memory.accumulated == 4 * lazy.parameters.total
    assert eager.memory.accumulated == 0


def test_muon_keeps_one_moment_for_the_matrices_of_blocks():
    adam, muon = plan_of(*TINY).memory.optimizer, plan_of(*TINY, "--optimizer.name=Muon")
    names = [name for group in muon.groups for name in group.parameters if "layers" in name]
    matrices = sum(
        parameter.numel()
        for group in muon.groups
        if group.name == "matrices"
        for parameter in group.parameters.values()
    )
    assert names and adam - muon.memory.optimizer == 4 * matrices > 0


def test_offloading_moves_sharded_state_to_the_host():
    here, there = plan_of(*TINY).memory, plan_of(*TINY, "--training.enable_cpu_offload").memory
    assert there.offloaded == here.weights + here.gradients + here.optimizer
    assert there.device < here.device - here.weights - here.optimizer + 1


def test_tokens_and_flops_follow_the_layout():
    plan = plan_of(*TINY, "--training.local_batch_size=4", "--training.global_batch_size=32", world=4)
    assert plan.layout.accumulation == 2 and plan.tokens_per_step == 32 * 64
    assert plan.tokens == plan.tokens_per_step * plan.steps
    per_token = 6 * (plan.parameters.total - plan.parameters.embedding)
    assert 0.9 * per_token < plan.flops_per_token < 1.5 * per_token


def test_groups_are_those_of_the_optimizer():
    plan = plan_of(*TINY)
    assert sum(group.numel for group in plan.groups) == plan.parameters.total
    assert {group.name for group in plan.groups} == {"decay", "no_decay"}


def test_seven_billion_on_512_ranks_is_planned_without_memory(capsys):
    overrides = ["--model.model_type=transformer", "--model.hidden_size=4096", "--model.num_hidden_layers=32"]
    job = load_job(None, [*overrides, "--model.vocab_size=32000", "--training.virtual_shards=512"])
    plan = make_plan(job, 512)
    assert plan.parameters.total == 6738415616
    text = render(plan)
    for words in ("6,738,415,616", "512 ranks", "dp_shard=512", "no_decay", "most at a time on the device"):
        assert words in text


def test_ranks_default_to_the_fewest_the_degrees_allow():
    job = load_job(
        None, [*TINY, "--parallelism.tensor_parallel_degree=2", "--parallelism.data_parallel_shard_degree=3"]
    )
    assert default_world_size(job) == 6 and default_world_size(load_job(None, TINY)) == 1


def test_command_prints_text_or_json(tmp_path, capsys):
    path = tmp_path / "job.toml"
    path.write_text('[model]\nmodel_type = "gla"\nhidden_size = 64\nnum_heads = 2\n')
    assert cli.main(["plan", str(path), "--world-size", "2", "--json", "--training.seq_len", "128"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["layout"]["dp_shard"] == 2 and figures["tokens_per_step"] == 2 * 8 * 128
    assert cli.main(["plan", str(path), "--world-size", "3"]) == 2
    assert "virtual_shards" in capsys.readouterr().err


SEVEN = ["--model.model_type=gla", "--model.hidden_size=4096", "--model.num_hidden_layers=32", "--model.num_heads=16"]
SEVEN += ["--model.vocab_size=32000", "--training.virtual_shards=512", "--training.seq_len=8192"]
SEVEN += ["--training.global_batch_size=256", "--parallelism.pipeline_parallel_degree=4"]
SEVEN += ["--parallelism.tensor_parallel_degree=4", "--parallelism.context_parallel_degree=4"]


def test_seven_billion_on_512_ranks_in_three_axes_names_every_rank_and_exchange():
    plan = plan_of(*SEVEN, world=512)
    assert plan.layout.dp_shard == 8 and plan.micro_batches == 32
    assert plan.layers_by_rank == ["0 to 7", "8 to 15", "16 to 23", "24 to 31"]
    assert plan.memory.device == max(plan.memory_by_rank) and sorted(plan.memory_by_rank)[0] > 2**30
    sent = {(entry.axis, entry.what): entry.sent for entry in plan.traffic}
    weights = sent["dp_shard x cp", "gather weights"]
    assert sent["dp_shard x cp", "reduce gradients"] == 2 * weights  # fp32 against bf16, both once a step
    # A block gathers and scatters its tokens twice, forward and backward; so do the embedding or the head, once.
    blocks = 32 * 2 * (8 * 4 + 1) * 2048 * 4096 * 2 * 3 / 4
    assert sent["tp", "gather and scatter tokens"] == pytest.approx(blocks, rel=0.01)
    text = render(plan)
    assert "pipeline rank 3, layers 24 to 31" in text and "activations and their gradients" in text


STATES = (
    ("gla", "--model.use_short_conv=true"),
    ("gated_deltanet", "--model.head_dim=32"),
    ("rwkv7", "--model.head_dim=32"),
)


@pytest.mark.parametrize("model", [*STATES, ("transformer", "--model.num_heads=2")], ids=lambda model: model[0])
def test_only_softmax_exchanges_more_between_context_ranks_for_longer_rows(model):
    name, option = model
    sent = []
    for length in (128, 512):
        keys = [f"--model.model_type={name}", "--model.hidden_size=64", "--model.num_hidden_layers=2", option]
        keys += ["--model.num_heads=2"] if name != "rwkv7" else []
        keys += [f"--training.seq_len={length}", "--parallelism.context_parallel_degree=2", "--model.vocab_size=100"]
        (entry,) = [entry for entry in plan_of(*keys, world=2).traffic if entry.axis == "cp"]
        sent.append(entry.sent)
    assert sent[1] == sent[0] * (4 if name == "transformer" else 1) > 0


def test_a_state_is_exchanged_once_a_layer_and_direction_and_again_when_recomputed():
    keys = [*TINY, "--training.local_batch_size=3", "--parallelism.context_parallel_degree=2"]
    plain, full = (plan_of(*keys, f"--activation_checkpoint.mode={mode}", world=2) for mode in ("none", "full"))
    (once,), (again,) = ([e for e in plan.traffic if e.axis == "cp"] for plan in (plain, full))
    state = 3 * 2 * (16 * 32 + 16) * 4  # rows, heads, (keys x values and a decay of every key), fp32
    assert once.sent == 3 * 2 * state and once.exchanges == 3 * 2
    assert again.sent == 3 * 3 * state and again.exchanges == 3 * 3


def test_a_pipeline_sends_activations_and_gradients_of_every_micro_batch():
    base = [*TINY, "--model.num_hidden_layers=4", "--training.local_batch_size=4"]
    plan = plan_of(*base, "--parallelism.pipeline_parallel_degree=2", world=2)
    (entry,) = [entry for entry in plan.traffic if entry.axis == "pp"]
    assert plan.micro_batches == 4 and entry.exchanges == 4
    assert entry.sent == 4 * 64 * 64 * 2  # of a rank: to the other stage, bf16
    assert sum(plan.memory_by_rank) > 0 and plan.bubble == pytest.approx(1 / 5)


def test_a_stage_holds_as_many_micro_batches_as_its_schedule_keeps_under_way():
    base = [*TINY, "--model.num_hidden_layers=4", "--training.local_batch_size=8", "--training.seq_len=512"]
    base += ["--parallelism.pipeline_parallel_degree=2", "--model.vocab_size=32"]
    held = {}
    for name in ("1F1B", "GPipe"):
        held[name] = plan_of(*base, f"--parallelism.pipeline_parallel_schedule={name}", world=2).memory.activations
    assert held["GPipe"] == pytest.approx(4 * held["1F1B"], rel=0.1)


def test_slower_links_and_smaller_nodes_take_longer():
    job = load_job(None, [*TINY, "--training.virtual_shards=64"])
    near, far = (make_plan(job, 8, Links(node=node)).traffic for node in (8, 4))
    assert [entry.sent for entry in near] == [entry.sent for entry in far]
    assert all(slow.seconds > fast.seconds for slow, fast in zip(far, near))


def test_more_stages_than_layers_are_refused():
    with pytest.raises(ConfigError, match="the model has 3 layers"):
        plan_of(*TINY, "--training.local_batch_size=8", "--parallelism.pipeline_parallel_degree=4", world=4)
