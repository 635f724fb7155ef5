"""Attention in segments on real long text: what the memory is worth, and which of its settings help. A minute of CPU time for each arm and seed.

    python tests/bench/longtext.py --text tinyshakespeare.txt|library --out OUT.jsonl [--arms full local infini 'infini decay=0.9' ...] [--seeds 0 1 2] [--steps 150]
    python tests/bench/longtext.py --out OUT.jsonl --table

The text is one document, its last tenth held out; `library`: the twelve longest files of Python's standard library, one document each; 2,048 pieces; rows of 512 tokens in 8 segments of 64; 3 layers of width 128, Muon, one thread, fp32. The same
rows in the same order for all arms of a seed. An arm is the kind of attention and settings of `model.infini`. Reported: validation loss, the loss in the second
half of the rows, what is lost there without the memory, and the gain of reading a passage twice with 128 tokens between (nats a token; below 0: it helps).
"""
import argparse, json, shutil, statistics, sysconfig, tempfile, time
from pathlib import Path
import torch
from llmlab.config import load_config
from llmlab.recipes import evaluate, pretrain

ARMS = ('full', 'local', 'xl', 'infini', 'infini feature_map=elu1', 'infini decay=0.9', 'infini window=xl', 'infini rule=delta')

def run(arm:str, seed:int, steps:int, text:Path, room:Path)->dict:
    attention, *words = arm.split()
    name = f'{arm.replace(" ", "-")}-{seed}'
    cfg = load_config('infini_cpu', ['data.name=files', f'data.path={text}', 'data.split=tail', 'data.validation_fraction=0.1', f'packing.folder={room}/cache', f'run.folder={room}/runs', f'run.name={name}',
        f'run.seed={seed}', 'run.precision=fp32', 'run.threads=1', f'model.attention={attention}', f'trainer.max_steps={steps}', 'trainer.eval_interval=100000', 'trainer.save_interval=100000', 'trainer.eval_rows=null',
        'trainer.sample_tokens=0', *(f'model.infini.{w}' for w in words)])
    began = time.process_time()
    result = pretrain(cfg, screen='none', say=lambda line: None)
    seconds = time.process_time()-began
    found = evaluate(str(result.folder), metrics=['perplexity', 'longcontext'], asking=dict(tasks=[], samples=32, gaps=[128], passage_tokens=128))
    last, gain = found['longcontext']['places']['position'][-1], found['longcontext']['gain']
    return dict(arm=arm, seed=seed, steps=steps, seconds=seconds, loss=found['val/loss'], late=last['on'], late_off=last.get('off'), gain=gain['on'][0], gain_off=(gain.get('off') or [None])[0])

def library(room:Path, files:int=12)->Path: # a folder
    "The longest files of the standard library that are written by hand and test nothing."
    found = [p for p in Path(sysconfig.get_path('stdlib')).rglob('*.py') if not {'test', 'tests', 'idlelib', 'pydoc_data', 'site-packages', 'dist-packages'} & {*p.parts}]
    (room/'library').mkdir(exist_ok=True)
    for p in sorted(found, key=lambda p: (-p.stat().st_size, str(p)))[:files]: shutil.copy(p, room/'library'/f'{p.parent.name}-{p.stem}.txt')
    return room/'library'

def read(out:Path)->list[dict]: return [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []

def table(found:list[dict])->str: # Markdown
    def cell(runs:list[dict], key:str)->str:
        values = [r[key] for r in runs if r[key] is not None]
        return '' if not values else f'{statistics.mean(values):.3f}' + (f' ± {statistics.stdev(values):.3f}' if len(values) > 1 else '')
    lines = ['| arm | seeds | validation loss | second half of a row | - memory off | passage read twice | - memory off | CPU s |', '|---|---:|---:|---:|---:|---:|---:|---:|']
    for arm in dict.fromkeys([*ARMS, *(r['arm'] for r in found)]):
        if runs := [r for r in found if r['arm'] == arm]:
            lines.append(f'| `{arm}` | {len(runs)} | ' + ' | '.join(cell(runs, k) for k in ('loss', 'late', 'late_off', 'gain', 'gain_off')) + f' | {statistics.mean(r["seconds"] for r in runs):.0f} |')
    return '\n'.join(lines)

if __name__ == '__main__':
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--text'); p.add_argument('--out', type=Path, required=True); p.add_argument('--table', action='store_true')
    p.add_argument('--arms', nargs='+', default=ARMS); p.add_argument('--seeds', nargs='+', type=int, default=(0, 1, 2)); p.add_argument('--steps', type=int, default=150)
    a = p.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as room:
        text = None if a.table else library(Path(room)) if a.text == 'library' else Path(a.text).resolve()
        for seed in () if a.table else a.seeds:
            for arm in a.arms:
                if any((r['arm'], r['seed'], r['steps']) == (arm, seed, a.steps) for r in read(a.out)): continue
                r = run(arm, seed, a.steps, text, Path(room))
                with a.out.open('a') as f: f.write(json.dumps(r)+'\n')
                print({k: round(v, 3) if isinstance(v, float) else v for k, v in r.items()}, flush=True)
    if a.table: print(table(read(a.out)))
