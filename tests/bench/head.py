"""The loss at the head, forward and backward: ours in pieces, torch's plain way, and torch's F.linear_cross_entropy. Time and peak memory in one run.

    python tests/bench/head.py [--tokens 4096] [--width 384] [--vocabulary 8192] [--dtype bf16] [--device cpu] [--rounds 5] [--threads 1]

The ways take turns, and the median is told. Memory: on a GPU torch's peak beyond what was there before; on a CPU the growth of the process's peak
(VmHWM, reset before each turn; Linux only). `rounded`: how far the sum is from that in fp64. Ours also gives the accuracy and a loss for each token.
"""
import argparse, json, statistics, sys, time
import torch, torch.nn.functional as F
from llmlab.models.objective import head_loss

def plain(h, w, y): return F.cross_entropy((h@w.to(h.dtype).mT).float(), y, reduction='sum')
def ours(h, w, y): return head_loss(h, w, y, torch.ones(len(h), device=h.device))[0]
def torchs(options): return lambda h, w, y: F.linear_cross_entropy(h, w.to(h.dtype), y, reduction='sum', options=options)

def ways()->dict:
    "What is compared; older versions of torch know less."
    out = {'plain cross_entropy': plain, 'ours, in pieces': ours}
    if hasattr(F, 'linear_cross_entropy') and hasattr(torch.nn, 'LinearCrossEntropyOptions'):
        Options = torch.nn.LinearCrossEntropyOptions
        out |= {'linear_cross_entropy, whole': torchs(None), 'linear_cross_entropy, auto': torchs(Options()), 'linear_cross_entropy, pieces of 512': torchs(Options(batch_chunk_size=512))}
        out |= {'linear_cross_entropy, fp32 sums': torchs(Options(acc_dtype=torch.float32))}
    return out

def peak(device:str)->int: # bytes
    if device == 'cuda': return torch.cuda.max_memory_allocated()
    return 1024*int(next(line for line in open('/proc/self/status') if line.startswith('VmHWM')).split()[1])

def reset(device:str)->int: # bytes now
    if device == 'cuda':
        torch.cuda.synchronize(); torch.cuda.empty_cache(); torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    import ctypes
    ctypes.CDLL(None).malloc_trim(0)
    open('/proc/self/clear_refs', 'w').write('5')
    return peak(device)

def turn(way, h, w, y, device:str)->tuple[float, int, float]: # milliseconds, bytes, loss
    before, start = reset(device), time.perf_counter()
    loss = way(h, w, y)
    (loss/len(y)).backward()
    if device == 'cuda': torch.cuda.synchronize()
    out = 1e3*(time.perf_counter()-start), peak(device)-before, loss.item()
    h.grad = w.grad = None
    return out

def main()->None:
    p = argparse.ArgumentParser()
    for name, default in (('tokens', 4096), ('width', 384), ('vocabulary', 8192), ('rounds', 5), ('threads', 1)): p.add_argument(f'--{name}', type=int, default=default)
    p.add_argument('--dtype', default='bf16', choices=('fp32', 'bf16'))
    p.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    p.add_argument('--json')
    p.add_argument('--ways', help='only those with one of these words in their names, as plain,ours')
    a = p.parse_args()
    torch.set_num_threads(a.threads)
    g = torch.Generator().manual_seed(0)
    h = torch.randn(a.tokens, a.width, generator=g).to(a.device, {'fp32': torch.float32, 'bf16': torch.bfloat16}[a.dtype]).requires_grad_()
    w = (torch.randn(a.vocabulary, a.width, generator=g)*a.width**-.5).to(a.device).requires_grad_()
    y = torch.randint(a.vocabulary, (a.tokens,), generator=g).to(a.device)
    with torch.no_grad(): right = sum(F.cross_entropy(x.double()@w.to(h.dtype).double().mT, t, reduction='sum').item() for x, t in zip(h.split(256), y.split(256)))
    chosen = {name: way for name, way in ways().items() if not a.ways or any(word in name for word in a.ways.split(','))}
    found = {name: [] for name in chosen}
    for i in range(a.rounds+1): # the first one warms up
        for name, way in chosen.items():
            try: found[name].append(turn(way, h, w, y, a.device))
            except (RuntimeError, ValueError, TypeError) as e: found[name].append(None); print(f'{name}: {str(e).splitlines()[0][:120]}', file=sys.stderr)
    print(f'torch {torch.__version__}, {torch.cuda.get_device_name() if a.device == "cuda" else f"CPU, {a.threads} threads"}; {a.tokens:,} tokens, C {a.width}, V {a.vocabulary:,}, {a.dtype}; forward and backward, median of {a.rounds}')
    rows = {name: dict(ms=statistics.median(t for t, _, _ in turns[1:]), mb=max(b for _, b, _ in turns)/1e6, off=turns[-1][2]/right-1) for name, turns in found.items() if None not in turns}
    for name, r in rows.items(): print(f'{name:36} {r["ms"]:9.1f} ms {r["mb"]:9.1f} MB   rounded {r["off"]:+.1e}')
    if a.json: open(a.json, 'w').write(json.dumps(rows, indent=1))

if __name__ == '__main__': main()
