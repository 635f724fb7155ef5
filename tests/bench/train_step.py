"""A whole training step (forward, backward, clip, fused AdamW) beside transformers' Llama of the same shape and weights, in one process, in turns.

    python tests/bench/train_step.py [--compiled] [--threads 1] [--rounds 9] [--keep-memory]

`llmlab_bench train` is the short form. This one also shows what each part brings: attention by SDPA as Llama has it, and the norm on queries and keys
that Llama does not have. Same batch, same targets, same optimizer, bf16 autocast over fp32 weights, the loss in fp32, Llama with SDPA. Two clocks:
seconds of the wall, and seconds of the processor; on a machine that others use too, take one thread and the processor's. --keep-memory tells the C
library not to give memory back between steps (glibc's mallopt): it changes Llama's time more than ours, since ours asks for less.
"""
import argparse, ctypes, statistics, time
import torch
from llmlab.eval.speed import Size, about_machine, bench_machine, llama_loss, loss_gap, random_batch, training_step
from llmlab.models.ar import AR
from llmlab.models.transformer import Shape, build, count_parameters, flops_per_token
from llmlab.models.zoo import to_llama
from llmlab.trainer.machine import matmul_peak


def keep_memory():
    "Let glibc serve large blocks from its heap, and keep the heap."
    libc, max_mmaps, trim_at = ctypes.CDLL(None), -4, -1
    assert libc.mallopt(max_mmaps, 0) and libc.mallopt(trim_at, 2**31-1)


def main(compiled:bool, threads:int|None, rounds:int, size:Size):
    machine, batch = bench_machine(threads=threads), random_batch(size)
    ours = build(size.shape(), seed=0)
    llama = to_llama(ours)
    gap = loss_gap(ours, llama, batch, machine)
    ours_with = lambda backend='auto', **k: build(Shape.from_dict(size.shape().to_dict() | k), backend, seed=0)
    step = lambda network, loss: training_step(network, torch.compile(loss) if compiled else loss, batch, machine)
    steps = {"transformers' Llama": step(llama, llama_loss), 'llmlab': step(ours, AR().loss), 'llmlab, sdpa': step(ours_with('sdpa'), AR().loss),
             'llmlab, QK-norm': step(ours_with(qk_norm=True), AR().loss)}
    taken = {name: [] for name in steps}
    for r in range(rounds+2): # two rounds to compile and to warm up
        for name, make in (steps if r % 2 else dict(reversed(steps.items()))).items():
            wall, processor = time.perf_counter(), time.process_time()
            make()
            if r > 1: taken[name].append((time.perf_counter()-wall, time.process_time()-processor))
    tokens, base = batch.tokens.numel(), taken["transformers' Llama"]
    peak, work = matmul_peak(machine.device, machine.dtype), flops_per_token(size.shape(), size.seq_len)
    print(f'{size}; {count_parameters(size.shape())/1e6:.1f}M parameters; {about_machine(machine)}; {"compiled" if compiled else "eager"}; Llama: {llama.config._attn_implementation}')
    print(f'peak {peak/1e9:.0f} GFLOP/s; losses before the first step differ by {gap:.0e} nats; {rounds} rounds in turns, medians (lowest to highest)\n')
    print('| step | tokens/s | of peak | x Llama, wall | x Llama, processor |\n|---|---:|---:|---:|---:|')
    for name, times in taken.items():
        ratios = [[b[i]/t[i] for t, b in zip(times, base)] for i in (0, 1)]
        rate = tokens/statistics.median(t[0] for t in times)
        print(f'| {name} | {rate:,.0f} | {rate*work/peak:.0%} | ' + ' | '.join(f'{statistics.median(x):.2f} ({min(x):.2f} to {max(x):.2f})' for x in ratios) + ' |')


if __name__ == '__main__':
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--compiled', action='store_true', help='all of them through torch.compile')
    p.add_argument('--threads', type=int, help='default: as many as torch takes')
    p.add_argument('--rounds', type=int, default=9)
    p.add_argument('--keep-memory', action='store_true', help='glibc keeps its memory')
    for name, value in vars(Size()).items(): p.add_argument(f'--{name.replace("_", "-")}', type=int, default=value)
    a = vars(p.parse_args())
    if a.pop('keep_memory'): keep_memory()
    main(a.pop('compiled'), a.pop('threads'), a.pop('rounds'), Size(**a))
