"""Infini-attention, forward and backward: all segments at once beside the loop over segments, and beside full attention; then single tokens.

    python tests/bench/infini.py [--shapes 16x32 32x32 64x64] [--segments 64] [--heads 4] [--kv-heads 4] [--rounds 7] [--tokens 0] [--keep-memory] [--json FILE]

A shape is tokens in a segment x channels of a head. One row, fp32, one thread, the contestants in turns; milliseconds of the processor, medians. The loop is
`sequential`, which knows documents and makes a mask for each segment. `plain loop` is the same rules without any of that, as fast as a loop over segments can
be written: at short segments it waits for its many small steps, at 64 tokens and 64 channels the arithmetic itself takes the time and there is nothing left
to gain on a CPU. `--keep-memory` tells the C library not to give memory back between steps: the parallel form asks for it in large pieces, and fetching those
from the system again takes up to half of its time. `--tokens 10000` streams so many tokens one by one: milliseconds of a token for each tenth of them, bytes of the state.
"""
import argparse, json, statistics, time
from pathlib import Path
import torch, torch.nn.functional as F
from llmlab.models.attention import attend
from llmlab.models.infini import Memory, MemorySettings, elu1, local_attention, sequential, state_bytes
from parts import turns
from train_step import keep_memory


def loop(q, k, v, g, N, rule): # no documents, no settings; elu1, un-rotated, as many key heads as query heads
    g, M, z, out = g.view(1, -1, 1, 1), None, None, []
    for q, k, v in zip(*(x.split(N, 2) for x in (q, k, v))):
        local = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        pq, pk = elu1(q), elu1(k)
        read = lambda p: (p@M)/(p@z.unsqueeze(-1)).clamp_min(1e-6)
        out.append(local if M is None else torch.lerp(local, read(pq), g))
        if rule == 'delta' and M is not None: v = v - read(pk)
        M, z = (pk.mT@v, pk.sum(2)) if M is None else (M+pk.mT@v, z+pk.sum(2))
    return torch.cat(out, 2)


def training(a, N:int, D:int)->dict:
    T, H, Hk = a.segments*N, a.heads, a.kv_heads
    q, k, v = (torch.randn(1, T, h, D).transpose(1, 2).requires_grad_() for h in (H, Hk, Hk)) # as they come from their product
    up, run = torch.randn(1, T, H, D).transpose(1, 2), {}
    def add(name, f): run[name] = lambda: torch.autograd.grad(f(), (q, k, v), up)
    for rule in ('linear', 'delta'):
        s = MemorySettings(N, rule)
        m = Memory(H, Hk, D, s)
        add(f'{rule}, parallel', lambda m=m: m(q, k, v, q, k, backend='blocks'))
        add(f'{rule}, sequential', lambda m=m, s=s: sequential(q, k, v, q, k, m.g, s))
        if H == Hk: add(f'{rule}, plain loop', lambda m=m, rule=rule: loop(q, k, v, m.g, N, rule))
        torch.testing.assert_close(m(q, k, v, q, k, backend='blocks'), sequential(q, k, v, q, k, m.g, s), rtol=0, atol=1e-3)
    add('local alone', lambda: local_attention(q, k, v, segment_len=N, backend='blocks'))
    add('full, sdpa', lambda: attend(q, k, v, backend='sdpa'))
    return turns(run, a.rounds)


def tokens(a, N:int, D:int)->dict:
    s = MemorySettings(N)
    m, state, times = Memory(a.heads, a.kv_heads, D, s), {}, []
    with torch.inference_mode():
        for _ in range(a.tokens):
            q, k, v = (torch.randn(1, h, 1, D) for h in (a.heads, a.kv_heads, a.kv_heads))
            start = time.process_time()
            m.stream(q, k, v, lambda x, places: x, state, 1)
            times.append((time.process_time()-start)*1e3)
    tenth = a.tokens//10
    return {'ms of a token, by tenths': [round(statistics.median(times[i*tenth:(i+1)*tenth]), 3) for i in range(10)],
            'bytes of the state': sum(x.nbytes for x in state.values()), 'by formula': state_bytes(s, a.kv_heads, D)}


if __name__ == '__main__':
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--shapes', nargs='+', default=['16x32', '32x32', '64x64'], help='tokens in a segment x channels of a head')
    for name, default in dict(segments=64, heads=4, kv_heads=4, rounds=7, tokens=0).items(): p.add_argument('--'+name.replace('_', '-'), type=int, default=default)
    p.add_argument('--keep-memory', action='store_true', help='glibc keeps its memory')
    p.add_argument('--json', type=Path, help='write the numbers here too')
    a = p.parse_args()
    if a.keep_memory: keep_memory()
    torch.set_num_threads(1); torch.manual_seed(0)
    shapes, out = [tuple(map(int, shape.split('x'))) for shape in a.shapes], []
    for N, D in shapes:
        taken = training(a, N, D)
        print(f'{a.segments} segments of {N} tokens, {a.heads} heads on {a.kv_heads}, {D} channels\n\n| | ms | times the parallel form |\n|---|---:|---:|')
        for name, t in taken.items():
            own = taken.get(name.split(',')[0]+', parallel')
            print(f'| {name} | {t:.1f} | {f"{t/own:.1f}" if own else ""} |')
        streamed = tokens(a, N, D) if a.tokens else None
        if streamed: print('', *(f'{k}: {v}' for k, v in streamed.items()), sep='\n')
        print(flush=True)
        out.append({'segments': a.segments, 'segment_len': N, 'heads': a.heads, 'kv_heads': a.kv_heads, 'head_size': D, 'ms': taken, 'streamed': streamed})
    if a.json: a.json.write_text(json.dumps(out, indent=1))
