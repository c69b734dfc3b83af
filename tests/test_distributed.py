"""What ranks send each other; alone, they change nothing."""

from __future__ import annotations

import json

import ranks
import torch

from capsae import distributed


def test_alone_everything_is_the_identity():
    distributed.start()
    assert not distributed.joined() and (distributed.rank(), distributed.world_size()) == (0, 1)
    distributed.barrier()
    tensor = torch.arange(3)
    assert distributed.all_reduce(tensor) is tensor and tensor.tolist() == [0, 1, 2]
    assert distributed.broadcast("a") == "a" and distributed.all_gather("a") == ["a"]
    assert distributed.share_of(5) == slice(0, 5)


def test_shares_are_in_order_and_cover_all():
    for n in (0, 1, 7, 10):
        rows = [r for index in range(3) for r in range(n)[distributed.share_of(n, index, 3)]]
        assert rows == list(range(n))
    assert {len(range(10)[distributed.share_of(10, index, 3)]) for index in range(3)} == {3, 4}


def test_three_ranks_reduce_gather_and_broadcast():
    code = """if True:
        import json, torch
        from capsae import distributed as d
        d.start(); d.start(); d.barrier()
        own = torch.tensor([d.rank(), 10.0])
        sums = [d.all_reduce(own.clone(), op).tolist() for op in ("sum", "min", "max")]
        print(json.dumps([d.rank(), d.world_size(), sums, d.all_gather(d.rank()), d.broadcast(f"of {d.rank()}")]))
    """
    for rank, line in enumerate(ranks.run(code, ranks=3)):
        assert json.loads(line) == [rank, 3, [[3.0, 30.0], [0.0, 10.0], [2.0, 10.0]], [0, 1, 2], "of 0"]


def test_alone_within_a_group():
    code = """if True:
        import json, torch
        from capsae import distributed as d
        d.start()
        if d.rank() == 0:
            with d.alone():
                d.barrier(); d.start()
                inside = [d.rank(), d.world_size(), d.local_world_size(), d.broadcast("own"), d.joined()]
        else:
            inside = None
        print(json.dumps([inside, d.world_size(), d.local_world_size(), d.meeting_place(), d.broadcast(inside)]))
    """
    inside = [0, 1, 1, "own", False]
    assert [json.loads(line) for line in ranks.run(code)] == [[each, 2, 2, "cpu", inside] for each in (inside, None)]
