"""Exact attention over a sharded sequence, on your own tensors.

torchrun --nproc-per-node 4 examples/attention.py
torchrun --nproc-per-node 4 examples/attention.py --forward ring --backward tokenring --tokens 5000
"""

import argparse

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.functional import scaled_dot_product_attention

from counterpoint import SequenceLayout, Timeline, attention

parser = argparse.ArgumentParser()
parser.add_argument("--tokens", type=int, default=3001)  # any length: shards differ by a token or two
parser.add_argument("--forward", default="tokenring")
parser.add_argument("--backward")
args = parser.parse_args()

dist.init_process_group("gloo")
mesh = init_device_mesh("cpu", (dist.get_world_size(),))
rank = mesh.get_rank()
layout = SequenceLayout("zigzag", args.tokens, dist.get_world_size())

torch.manual_seed(0)  # the same whole tensors everywhere, so that every rank can check itself
whole = [torch.randn(1, heads, args.tokens, 64) for heads in (8, 2, 2)]
weight = torch.randn(1, 8, args.tokens, 64)

# This rank's tokens, as they would come out of its projections.
q, k, v = (layout.shard(x, rank, dim=2).requires_grad_() for x in whole)
timeline = Timeline()
out = attention(
    q, k, v, mesh=mesh, layout=layout, forward=args.forward, backward=args.backward, timeline=timeline
)
(out * layout.shard(weight, rank, dim=2)).sum().backward()

# The same on one process.
Q, K, V = (x.requires_grad_() for x in whole)
(scaled_dot_product_attention(Q, K, V, is_causal=True, enable_gqa=True) * weight).sum().backward()
for name, mine, full in (("dq", q, Q), ("dk", k, K), ("dv", v, V)):
    expected = layout.shard(full.grad, rank, dim=2)
    print(f"rank {rank}: {name} differs by {(mine.grad - expected).norm() / expected.norm():.1e} relative")
print(
    f"rank {rank}: sent {timeline.bytes_sent(rank):,} bytes, {layout.local_tokens(rank)} of {args.tokens} tokens"
)
dist.destroy_process_group()
