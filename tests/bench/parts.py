"""The two parts of a training step that we do not leave to torch on a CPU, beside torch's own, in turns, on one thread.

    python tests/bench/parts.py [--rounds 9] [--keep-memory]

Attention: forward and backward, 6 heads of 64 channels, causal. Head: cross-entropy of 4,096 tokens, width 384, vocabulary 8,192, bf16, forward and
backward; `F.linear_cross_entropy` in pieces of 512. Milliseconds of the processor, medians.
"""
import argparse, statistics, time
import torch, torch.nn.functional as F
from llmlab.models.attention import attend
from llmlab.models.objective import head_loss
from train_step import keep_memory


def turns(contestants:dict, rounds:int)->dict:
    taken = {name: [] for name in contestants}
    for r in range(rounds+1):
        for name, work in contestants.items():
            start = time.process_time()
            work()
            if r: taken[name].append((time.process_time()-start)*1e3)
    return {name: statistics.median(t) for name, t in taken.items()}


def attention(B:int, T:int, dtype:torch.dtype, rounds:int)->dict:
    q, k, v = (torch.randn(B, T, 6, 64, dtype=dtype).transpose(1, 2).requires_grad_() for _ in range(3))
    up = torch.randn(B, 6, T, 64, dtype=dtype)
    return turns({b: lambda b=b: torch.autograd.grad(attend(q, k, v, backend=b), (q, k, v), up) for b in ('sdpa', 'blocks')}, rounds)


def head(rounds:int)->tuple[dict, dict]: # milliseconds, sums of the losses
    h, w = torch.randn(4096, 384).bfloat16().requires_grad_(), (torch.randn(8192, 384)*.05).requires_grad_()
    y, ones = torch.randint(8192, (4096,)), torch.ones(4096)
    ways = {'F.cross_entropy': lambda: F.cross_entropy((h@w.bfloat16().mT).float(), y, reduction='sum'), 'head_loss': lambda: head_loss(h, w, y, ones)[0]}
    if hasattr(torch.nn, 'LinearCrossEntropyOptions'): # torch 2.13
        ways['F.linear_cross_entropy'] = lambda: F.linear_cross_entropy(h, w.bfloat16(), y, reduction='sum', options=torch.nn.LinearCrossEntropyOptions(batch_chunk_size=512))
    taken = turns({name: lambda f=f: torch.autograd.grad(f(), (h, w)) for name, f in ways.items()}, rounds)
    exact = F.cross_entropy(h.double()@w.double().mT, y, reduction='sum').item()
    return taken, {name: f().item() for name, f in ways.items()} | {'in fp64': exact}


if __name__ == '__main__':
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--rounds', type=int, default=9)
    p.add_argument('--keep-memory', action='store_true', help='glibc keeps its memory')
    a = p.parse_args()
    if a.keep_memory: keep_memory()
    torch.set_num_threads(1); torch.manual_seed(0)
    print('| attention | sdpa | blocks |\n|---|---:|---:|')
    for B, T, dtype in ((16, 256, torch.bfloat16), (64, 64, torch.bfloat16), (4, 1024, torch.bfloat16), (16, 256, torch.float32)):
        print(f'| {B} x {T}, {str(dtype)[6:]} | ' + ' | '.join(f'{t:.0f}' for t in attention(B, T, dtype, a.rounds).values()) + ' |')
    taken, sums = head(a.rounds)
    print('\n| head | ms | sum of the losses |\n|---|---:|---:|')
    for name, total in sums.items(): print(f'| {name} | {f"{taken[name]:.0f}" if name in taken else ""} | {total:,.0f} |')
