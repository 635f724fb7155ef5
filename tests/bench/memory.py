"""The estimate of memory against the peak of a real run, each in a process of its own.

    python tests/bench/memory.py                 # three presets on this CPU, three steps each: measured and estimated
    python tests/bench/memory.py --preset xl     # one or two steps of 300M weights, with the peak
    python tests/bench/memory.py --cuda          # the same on a GPU: torch's own peak beside the estimate
    python tests/bench/memory.py --states        # a step of AdamW with moments in fp32 (torch's fused) and in bf16: time and bytes, by turns

On a GPU the measured number is what torch reserved, without the context. Shortened in rows (and in text), not in width or depth. The measured number is the largest resident size of the whole process (VmHWM): interpreter, loader,
training, validation, samples, checkpoint, plots. What is made once (vocabulary, cache) is made before, by another process.
"""
import argparse, json, os, subprocess, sys, tempfile, time
from pathlib import Path

TEXT = ['data.name=python', 'data.max_documents=1200', 'data.validation_fraction=0.02', 'tokenizer.train_megabytes=8']
SHORT = ['trainer.epochs=null', 'trainer.max_tokens=null', 'trainer.max_steps=3', 'trainer.eval_rows=64', 'tracking.wandb=off']
RUNS = { # preset -> its rows in a micro-batch, and micro-batches in a step
    'quickstart': ['trainer.batch_size=16'],
    'small': ['trainer.batch_size=8'],
    'medium': ['trainer.batch_size=2', 'trainer.gradient_accumulation_steps=2'],
    'xl': ['trainer.batch_size=1', 'trainer.gradient_accumulation_steps=2', 'trainer.max_steps=2', 'trainer.sample_tokens=0', 'trainer.eval_rows=2'],
}

ESTIMATE = """
import json, sys
import llmlab.recipes as recipes
from llmlab.config import load_config
from llmlab.trainer.memory import estimate, resident
resident()
preset, device, *settings = sys.argv[1:]
cfg = load_config(preset, settings)
data = recipes.prepare(cfg, say=lambda line: None)
e = estimate(cfg, vocab_size=data.tokenizer.vocab_size, device=device, cache_rows=data.train.num_rows)
print(json.dumps(dict(peak=e.peak, parts=e.parts, moment=e.moment, parameters=e.parameters)))
"""
TRAIN = """
import json, resource, sys
import llmlab.recipes as recipes
from llmlab.config import load_config
preset, device, *settings = sys.argv[1:]
found = recipes.pretrain(load_config(preset, settings), screen='none', say=lambda line: None)
import torch
peak = torch.cuda.max_memory_reserved() if device == 'cuda' else 1024*resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(json.dumps(dict(peak=peak, loss=found.metrics.get('train/loss'), seconds=found.state.seconds, tokens=found.state.tokens)))
"""

def ask(code:str, preset:str, device:str, settings:list[str])->dict:
    "The last line that a fresh process prints, as JSON."
    done = subprocess.run([sys.executable, '-c', code, preset, device, *settings], capture_output=True, text=True, env=os.environ | {'OMP_NUM_THREADS': os.environ.get('OMP_NUM_THREADS', '1')})
    if done.returncode: raise SystemExit(f'{preset}: {done.stderr[-2000:]}')
    return json.loads(done.stdout.splitlines()[-1])

def measure(preset:str, folder:Path, device:str, more:list[str])->dict:
    "Both numbers of a preset."
    settings = [*TEXT, *SHORT, *RUNS.get(preset, []), f'packing.folder={folder/"cache"}', f'run.folder={folder/"runs"}', f'run.device={device}', *more]
    ask('import sys, llmlab.recipes as r\nfrom llmlab.config import load_config\nr.prepare(load_config(sys.argv[1], sys.argv[3:]), say=lambda line: None)\nprint("{}")', preset, device, settings)
    start, told = time.monotonic(), ask(ESTIMATE, preset, device, settings)
    seconds = time.monotonic()-start
    return dict(preset=preset, estimate=told, run=ask(TRAIN, preset, device, settings), estimate_seconds=seconds)

def states(device:str, rounds:int=5, numbers:int=2**24)->None:
    "Milliseconds of an optimizer step."
    import statistics, torch
    from llmlab.trainer.optim import NarrowAdamW
    torch.set_num_threads(int(os.environ.get('OMP_NUM_THREADS', 1)))
    make = lambda: [torch.nn.Parameter(torch.randn(numbers//8, device=device)) for _ in range(8)]
    ways, times = {'fp32, fused': lambda p: torch.optim.AdamW(p, 1e-3, fused=True), 'fp32, foreach': lambda p: torch.optim.AdamW(p, 1e-3, foreach=True), 'bf16, random rounding': lambda p: NarrowAdamW(p, 1e-3)}, {}
    made = {name: way(make()) for name, way in ways.items()}
    for name, optimizer in made.items():
        for p in optimizer.param_groups[0]['params']: p.grad = torch.randn_like(p)
    for i in range(rounds+1):
        for name, optimizer in made.items():
            if device == 'cuda': torch.cuda.synchronize()
            start = time.perf_counter()
            optimizer.step()
            if device == 'cuda': torch.cuda.synchronize()
            if i: times.setdefault(name, []).append(1e3*(time.perf_counter()-start))
    for name, optimizer in made.items():
        size = sum(t.numel()*t.element_size() for state in optimizer.state.values() for t in state.values())
        print(f'{name:24} {statistics.median(times[name]):8.1f} ms (least {min(times[name]):.1f}), states {size/1e6:7.1f} MB, for {numbers/1e6:.1f}M numbers', flush=True)

def main()->None:
    parser = argparse.ArgumentParser()
    parser.add_argument('--preset', action='append', help='one of them, as often as wanted; without it quickstart, small and medium')
    parser.add_argument('--cuda', action='store_true', help='on a GPU')
    parser.add_argument('--folder', help='where caches and runs go, and stay')
    parser.add_argument('--json', help='write the numbers to this file too')
    parser.add_argument('--states', action='store_true', help='the speed of an optimizer with moments in bf16')
    parser.add_argument('settings', nargs='*', help='further settings, as trainer.gradient_checkpointing=selective')
    args = parser.parse_args()
    if args.states: return states('cuda' if args.cuda else 'cpu')
    found = []
    with tempfile.TemporaryDirectory() as temporary:
        for preset in args.preset or ('quickstart', 'small', 'medium'):
            r = measure(preset, Path(args.folder or temporary), 'cuda' if args.cuda else 'cpu', args.settings)
            found.append(r)
            e, run = r['estimate'], r['run']
            if args.cuda: e['peak'] -= e['parts'].pop('framework') # torch's counter does not see the context
            print(f'{preset:12} {e["parameters"]/1e6:7.1f}M parameters: estimated {e["peak"]/1e9:.3f} GB, measured {run["peak"]/1e9:.3f} GB, ratio {e["peak"]/run["peak"]:.3f} '
                  f'({run["tokens"]:,} tokens in {run["seconds"]:.0f} s, loss {run["loss"]:.3f}; the estimate took {r["estimate_seconds"]:.0f} s, imports included)', flush=True)
            print('             ' + ', '.join(f'{k} {n/1e6:,.0f}' for k, n in e['parts'].items()) + f' MB ({e["moment"]})', flush=True)
    if args.json: Path(args.json).write_text(json.dumps(found, indent=1))

if __name__ == '__main__': main()
