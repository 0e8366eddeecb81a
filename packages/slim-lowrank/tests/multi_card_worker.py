"""One of two processes: builds the structure only and takes rank 0's weights from a file."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from lowrank_models import ResNet50, SampleNet

from slim_lowrank import Decompose, safe_torch_load, safe_torch_save

MODELS = {
    "sample": (SampleNet, lambda seed: torch.randint(0, 16, (4, 7, 7), generator=seed)),
    "resnet50": (ResNet50, lambda seed: torch.randn(2, 3, 64, 64, generator=seed)),
}


def main(folder: Path, rank: int, name: str) -> None:
    """Follow the two-step flow: decompose on one card, load on all."""
    store = f"file://{folder / 'rendezvous'}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    torch.manual_seed(0)
    make, make_input = MODELS[name]
    net = make().eval()
    torch.manual_seed(100 + rank)  # the structure alone is initialised differently on each card
    config, weights = str(folder / "ranks.json"), folder / "state.pt"
    if rank == 0:
        whole = Decompose(net, config).from_ratio(0.5, divisor=16).decompose_network()
        safe_torch_save(whole.state_dict(), weights)
    dist.barrier()
    card = Decompose(net, config).from_file().decompose_network(do_decompose_weight=False)
    card.load_state_dict(safe_torch_load(weights, map_location="cpu"))
    x = make_input(torch.Generator().manual_seed(7))
    y = card(x).detach()
    both = [torch.empty_like(y) for _ in range(2)]
    dist.all_gather(both, y)
    assert torch.equal(both[0], both[1])
    if rank == 0:
        assert torch.equal(y, whole(x))
    parallel = torch.nn.parallel.DistributedDataParallel(card)
    parallel(x).sum().backward()
    assert all(parameter.grad is not None for parameter in card.parameters())
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
    # DistributedDataParallel holds on to the process group, so that gloo's threads outlive it: one
    # that lets go of a tensor while the interpreter is being torn down aborts the process.
    os._exit(0)
