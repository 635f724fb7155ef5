"""The cross-segment needle: can a network answer what it read many segments ago? Trains a small one for each arm, a minute of CPU time or less each.

    python tests/bench/needle.py --out OUT.jsonl [--arms full local 'infini rule=delta' ...] [--seeds 0 1 2] [--steps 1200] [--quick]
    python tests/bench/needle.py --out OUT.jsonl --table

Rows of 96 tokens, segments of 16: filler, KEY and two digits somewhere, at the end ASK and the digits again, which alone count for the loss. 2 layers of
width 48, 3 heads, AdamW 0.003, gates 0.02; fp32, one thread. An arm is the kind of attention and settings of `model.infini`, e.g. 'infini feature_map=elu1
gate_init=-4 gate_lr=3e-4'; other settings go by their full name, 'full model.qk_norm=false'. Asked at 1, 4 and 16 times the length learned, at five depths
(1: within the last segment), with the memory off at the first. A line of OUT for each arm and seed; what it has already is skipped. One digit in ten is chance.
--quick learns the same in a fifth of the time: Muon instead of AdamW, a convolution over 3 tokens before attention, 16 rows a step instead of 32, 250 steps.
"""
import argparse, json, statistics, time
from pathlib import Path
import torch
from llmlab.config import Config, load_config
from llmlab.eval.longcontext import CrossSegment, as_batch, ask
from llmlab.models.zoo import build_model
from llmlab.trainer.loop import fit
from llmlab.trainer.optim import build_optimizer, rate_at

T, N, TASK = 96, 16, CrossSegment(digits=2, filler=27)
DEPTHS = (0., .25, .5, .75, 1.)
BASE = {
    'model': dict(size='tiny', d_model=48, num_layers=2, num_heads=3, num_kv_heads=3, d_ff=144, mlp='gelu', tie_embeddings=False),
    'optim': dict(name='adamw', lr=3e-3, weight_decay=.1, warmup_steps=50, min_lr_ratio=0., schedule='cosine', grad_clip=1.),
    'trainer': dict(batch_size=32), 'packing': dict(seq_len=T), 'run': dict(device='cpu', precision='fp32')}
ARMS = ('full', 'local', 'infini', 'infini feature_map=elu1', 'infini rule=delta', 'infini rule=delta feature_map=elu1', 'infini window=xl', 'infini decay=0.9',
        'infini bptt_segments=1', 'xl', 'infini feature_map=softmax', 'infini feature_map=hedgehog', 'infini gate_init=-4 gate_lr=3e-4', 'infini gate_init=-4', 'infini gate=hard_sigmoid')
QUICK = 'optim.name=muon optim.lr=0.02 optim.warmup_steps=10 model.token_mix=conv3 trainer.batch_size=16'


def settings(arm:str, seed:int, steps:int)->Config:
    "What an arm's words mean."
    attention, *words = arm.split()
    own = [w if '.' in w.split('=')[0] else f'model.infini.{w}' for w in words]
    return load_config(BASE, [f'model.attention={attention}', f'model.infini.segment_len={N}', 'model.infini.gate_lr=0.02', f'run.seed={seed}', f'trainer.max_steps={steps}', *own])


def train(arm:str, seed:int=0, steps:int=1200)->tuple[torch.nn.Module, float]: # the network, CPU seconds
    "Learn to answer."
    began, cfg = time.process_time(), settings(arm, seed, steps)
    network, objective = build_model(cfg, TASK.vocab_size)
    batches = (as_batch(TASK.questions(cfg.trainer.batch_size, T, seed=seed*10**6+i, split='train')) for i in range(steps))
    fit(network, objective, batches, build_optimizer(network, cfg.optim), total_steps=steps, rate=lambda step: rate_at(step, steps, cfg.optim), clip=cfg.optim.grad_clip, log_every=steps)
    return network, time.process_time()-began


def digits(network:torch.nn.Module, length:int=T, samples:int=200, memory:bool=True)->list[float]: # by depth
    "Part of the digits that are right."
    if memory: return ask(network, TASK, [length], DEPTHS, samples).values('on', 'digits')[:, 0].tolist()
    with network.without_memory(): return digits(network, length, samples)


def gates(network:torch.nn.Module)->list[list[float]]: # by layer and head
    "Share of the memory; nothing where there is none."
    return [b.attention.memory.g.tolist() for b in network.blocks] if network.shape.attention == 'infini' else []


def run(arm:str, seed:int, steps:int, quick:bool=False)->dict:
    "Train and ask."
    network, seconds = train(f'{arm} {QUICK}' if quick else arm, seed, steps)
    found = {str(k*T): digits(network, k*T, n) for k, n in ((1, 200), (4, 100), (16, 64))}
    if found_gates := gates(network): found['off'] = digits(network, memory=False)
    return dict(arm=arm, seed=seed, steps=steps, quick=quick, seconds=seconds, gates=found_gates, digits=found)


def read(out:Path)->list[dict]:
    "What is done."
    return [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []


def cell(runs:list[dict], key:str)->str:
    "Mean over seeds at each depth; then the worst and the best seed on earlier segments."
    rows = [r['digits'][key] for r in runs if key in r['digits']]
    if not rows: return ''
    short = lambda x: f'{x:.2f}'.replace('1.00', '1').removeprefix('0')
    earlier = [statistics.mean(row[:-1]) for row in rows]
    return ' '.join(short(statistics.mean(column)) for column in zip(*rows)) + (f' ({short(min(earlier))} to {short(max(earlier))})' if len(rows) > 1 else '')


def table(found:list[dict])->str: # Markdown
    "A line for each arm and number of steps, in the order of ARMS."
    groups = {}
    for r in found: groups.setdefault((r['quick'], r['arm'], r['steps']), []).append(r)
    place = lambda key: (key[0], ARMS.index(key[1]) if key[1] in ARMS else len(ARMS), key)
    lines = ['| arm | steps | seeds | ' + ' | '.join((f'{T} tokens (learned)', f'{4*T}', f'{16*T}', f'{T}, memory off', 'gates', 'CPU s')) + ' |', '|---|---:|---:|---|---|---|---|---|---:|']
    for (quick, arm, steps), runs in sorted(groups.items(), key=lambda item: place(item[0])):
        shares = [g for r in runs for layer in r['gates'] for g in layer]
        span = f'{min(shares):.2f} to {max(shares):.2f}' if shares else ''
        lines.append(f'| `{arm}` | {steps}{" quick" if quick else ""} | {len(runs)} | ' + ' | '.join(cell(runs, k) for k in (str(T), str(4*T), str(16*T), 'off')) + f' | {span} | {statistics.mean(r["seconds"] for r in runs):.0f} |')
    return '\n'.join(lines)


if __name__ == '__main__':
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--out', type=Path, required=True); p.add_argument('--table', action='store_true')
    p.add_argument('--arms', nargs='+', default=ARMS); p.add_argument('--seeds', nargs='+', type=int, default=(0, 1, 2)); p.add_argument('--steps', type=int); p.add_argument('--quick', action='store_true')
    a = p.parse_args()
    steps = a.steps or (250 if a.quick else 1200)
    torch.set_num_threads(1)
    for arm in () if a.table else a.arms:
        for seed in a.seeds:
            if any((r['arm'], r['seed'], r['steps'], r['quick']) == (arm, seed, steps, a.quick) for r in read(a.out)): continue
            r = run(arm, seed, steps, a.quick)
            with a.out.open('a') as f: f.write(json.dumps(r)+'\n')
            print(f'{arm}, seed {seed}, {r["seconds"]:.0f} s:', {k: [round(x, 2) for x in v] for k, v in r['digits'].items()}, flush=True)
    if a.table: print(table(read(a.out)))
