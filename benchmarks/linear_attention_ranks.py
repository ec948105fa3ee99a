"""Context parallelism of the gated delta rule: exchanging heads beside passing states.

    python benchmarks/linear_attention_ranks.py          # a table
    python benchmarks/linear_attention_ranks.py --json   # one JSON object

Convolution and rule, forward and backward, of one document that is dealt out to some processes of
a thread each (gloo, fp32), both ways. ``mb``: what a rank sends to others, counted where it is
sent. ``seconds``: processor time of the busiest rank, without its wait for the others and with
what gloo spends on copies in memory: no network is between the ranks, so that it tells what the
ways compute. ``taken``: which way the layer takes. Before anything is timed, outputs and gradients
of both ways are compared.

Legend: S_local tokens of a rank, G key heads, R value heads of each, K and V sizes of a key and a
value, F channels of a key head's group, J taps.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from megatron.mimo.process.ports import held_port

TAPS = 4


def inputs(tokens: int, asked: argparse.Namespace, rank: int) -> list[Tensor]:
    """What goes into convolution and rule [S_local, 1, G, ...], and the convolution's weight."""
    generator = torch.Generator().manual_seed(rank)
    G, R, D = asked.key_heads, asked.value_heads // asked.key_heads, asked.head_size

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    channels = 2 * D + R * D
    weight = torch.randn(G, channels, TAPS, generator=torch.Generator().manual_seed(9))
    local = tokens // asked.ranks
    found = [drawn(local, 1, G, channels), drawn(local, 1, G, R), drawn(local, 1, G, R), weight]
    return [one.requires_grad_() for one in found]


def heads_of(asked: argparse.Namespace, x_BTGF: Tensor, gates: Tensor, strength: Tensor) -> Any:
    """Queries, keys, values, decays and strengths."""
    D = asked.head_size
    q, k, v = x_BTGF.split([D, D, x_BTGF.size(-1) - 2 * D], dim=-1)
    values = v.unflatten(-1, (-1, D))
    return q, k, values, -gates.transpose(0, 1).sigmoid(), strength.transpose(0, 1).sigmoid()


def by_heads(asked: argparse.Namespace, tokens: int, given: list[Tensor]) -> Tensor:
    """One exchange before the convolution, one behind the rule."""
    from megatron.mimo.layers.gated_delta_net import gated_delta_rule
    from megatron.mimo.layers.gated_delta_net.heads_over_ranks import (
        deal_evenly,
        to_heads,
        to_tokens,
    )
    from megatron.mimo.layers.gated_delta_net.token_functions import causal_convolution

    *streams, weight_GFJ = given
    order = deal_evenly(tokens, asked.ranks, torch.device("cpu"))
    widths = [one.size(-1) for one in streams]
    x, decay, strength = to_heads(torch.cat(streams, dim=-1), order, dist.group.WORLD).split(
        widths, dim=-1
    )
    own = weight_GFJ.chunk(asked.ranks)[dist.get_rank()]
    convolved = causal_convolution(x.transpose(0, 1), own)
    out, _ = gated_delta_rule(*heads_of(asked, convolved, decay, strength))
    out_SBGD = out.transpose(0, 1).flatten(3)
    mixed_SBGD = to_tokens(out_SBGD, order, dist.group.WORLD)
    return mixed_SBGD.transpose(0, 1).unflatten(3, (-1, asked.head_size))


def by_states(asked: argparse.Namespace, tokens: int, given: list[Tensor]) -> Tensor:
    """The last inputs of the convolution, and what passes on from piece to piece."""
    from megatron.mimo.layers.gated_delta_net.delta_rule import delta_rule_of_pieces
    from megatron.mimo.layers.gated_delta_net.states_over_ranks import (
        Pieces,
        convolve_pieces,
        pass_states,
    )
    from megatron.mimo.layers.gated_delta_net.token_functions import causal_convolution

    x, decay, strength, weight_GFJ = given
    local = tokens // asked.ranks
    pieces = Pieces(borders=(0, local // 2, local), group=dist.group.WORLD)
    convolve = partial(causal_convolution, weight_GFJ=weight_GFJ)
    convolved = convolve_pieces(convolve, x.transpose(0, 1), TAPS, pieces)
    return pass_states(delta_rule_of_pieces, *heads_of(asked, convolved, decay, strength), pieces)


Way = Callable[[argparse.Namespace, int, list[Tensor]], Tensor]
WAYS: dict[str, Way] = {"heads": by_heads, "states": by_states}


def results(way: Way, tokens: int, asked: argparse.Namespace) -> list[Tensor]:
    """Output and gradients; the weight's is this rank's part of a sum."""
    given = inputs(tokens, asked, dist.get_rank())
    out = way(asked, tokens, given)
    out.backward(out.detach().cos())
    gradients = [one.grad for one in given if one.grad is not None]
    dist.all_reduce(gradients[-1])
    return [out.detach(), *gradients]


def compare(tokens: int, asked: argparse.Namespace) -> dict[str, Any]:
    """Of both ways: megabytes sent by a rank, and seconds of the busiest."""
    from megatron.mimo.layers.gated_delta_net.sizes import Sizes
    from megatron.mimo.layers.gated_delta_net.states_over_ranks import states_move_less

    R, D = asked.value_heads // asked.key_heads, asked.head_size
    sizes = Sizes(key_heads=asked.key_heads, values_per_key=R, key=D, value=D, taps=TAPS)
    lengths = [tokens // (2 * asked.ranks)] * 2
    less = states_move_less(lengths, sizes=sizes, dtype=torch.float32)
    report: dict[str, Any] = {"tokens": tokens, "taken": "states" if less else "heads"}
    found = {}
    for name, way in WAYS.items():
        sent = 0
        plain = dist.all_to_all_single

        def counted(received: Tensor, parts: Tensor, **named: Any) -> Any:
            nonlocal sent
            sent += parts.nbytes * (asked.ranks - 1) // asked.ranks
            return plain(received, parts, **named)  # noqa: B023 (called within the turn)

        dist.all_to_all_single = counted
        found[name] = results(way, tokens, asked)
        dist.all_to_all_single = plain
        spent = []
        for _ in range(asked.repeats):
            start = time.process_time()
            results(way, tokens, asked)
            spent.append(time.process_time() - start)
        busiest = torch.tensor(min(spent))
        dist.all_reduce(busiest, op=dist.ReduceOp.MAX)
        report[name] = {"mb": round(sent / 1e6, 4), "seconds": round(busiest.item(), 3)}
    apart = [
        ((one - other).norm() / other.norm()).item()
        for one, other in zip(found["states"], found["heads"], strict=True)
    ]
    report["relative_difference"] = max(apart)
    return report


def work(rank: int, port: int, asked: argparse.Namespace) -> None:
    """One rank: measures, and rank 0 prints."""
    torch.set_num_threads(1)
    address = f"tcp://127.0.0.1:{port}"
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=asked.ranks)
    rows = [compare(tokens, asked) for tokens in asked.lengths]
    if rank == 0 and asked.json:
        print(json.dumps({"ranks": asked.ranks, "lengths": rows}))
    elif rank == 0:
        print("\n".join(map(str, rows)))
    dist.destroy_process_group()


def main() -> None:
    """Start the ranks."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument(
        "--lengths", type=int, nargs="+", default=(256, 512, 1024, 2048, 4096, 8192)
    )
    parser.add_argument("--key-heads", type=int, default=4)
    parser.add_argument("--value-heads", type=int, default=8)
    parser.add_argument("--head-size", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--json", action="store_true", help="one line of JSON")
    asked = parser.parse_args()
    with held_port() as port:
        mp.spawn(work, args=(port, asked), nprocs=asked.ranks)


if __name__ == "__main__":
    main()
