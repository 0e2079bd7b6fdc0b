import torch
import torch.distributed.checkpoint as dcp

from flame.checkpoint.staging import FromHost, HostCopies


def test_copies_keep_their_values_and_their_memory():
    host, weight = HostCopies(pinned=False), torch.ones(5, 3)
    first = host.take({"w": weight})
    place = first.copies["w"].data_ptr()
    weight.mul_(2)
    assert torch.equal(first.copies["w"], torch.ones(5, 3))
    second = host.take({"w": weight})
    assert torch.equal(second.copies["w"], weight) and second.copies["w"].data_ptr() == place
    assert host.take({"w": torch.ones(2)}).copies["w"].shape == (2,)


def test_what_is_written_is_the_copy_and_not_the_live_tensor(tmp_path):
    weight = torch.arange(6.0)
    staged = HostCopies(pinned=False).take({"w": weight, "count": torch.tensor(3)})
    weight.zero_()
    dcp.save(dict(staged.tensors), checkpoint_id=tmp_path, planner=FromHost(staged), no_dist=True)
    found = {"w": torch.empty(6), "count": torch.tensor(0)}
    dcp.load(found, checkpoint_id=tmp_path, no_dist=True)
    assert torch.equal(found["w"], torch.arange(6.0)) and found["count"] == 3
