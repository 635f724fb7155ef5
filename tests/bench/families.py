"""Three families on one corpus: trains and scores every model behind the tables of the page `Measured`.

    python tests/bench/families.py --text tinyshakespeare.txt --out OUT --part 0 --of 2     (and --part 1 beside it)
    python tests/bench/families.py --out OUT --table

Every job writes OUT/<job>.json when it is done and is skipped when that is there. Equal network, optimizer, data order and
training FLOPs: what a family spends on forming beliefs is taken from its steps. One thread each.
"""
import argparse, json, statistics, time
from pathlib import Path
import torch
from llmlab.config import load_config
from llmlab.eval.evaluate import evaluate, looking
from llmlab.eval.generation import real_windows, sweep
from llmlab.recipes import open_trained, prepare, pretrain
from llmlab.packing.loader import in_order

SEEDS, STEPS, MORE, ROWS = (1, 2, 3), 1200, 480, 64
P, K = .5, 8 # share of the batches with a belief; candidates

def cost(depth:float=1.5, extra:float=0., consistency:float=0.)->float:
    "Training work of a step, as a multiple of masked diffusion's: forward is 1/3; `extra`: of a forward pass, to read a belief in by slots."
    return 1 + P*(depth/3*(1+extra) + consistency + extra)

ON = ['model.architecture=sdd', f'model.sdd.feedback_prob={P}', 'model.sdd.feedback_warmup_steps=200', 'model.sdd.belief_lr=1']
SLOW = ['model.sdd.belief_lr=0.1'] # and the share of batches with a belief rises over the whole run
BASE = { # name -> settings, cost
    'ar': (['model.architecture=ar'], 1.), 'diffusion': (['model.architecture=diffusion'], 1.), 'sdd': (ON, cost()),
    'sdd slow ramp': ([*ON, *SLOW, f'model.sdd.feedback_warmup_steps={STEPS}'], cost(.75)),
    'swap': (['model.architecture=sdd', 'model.sdd.process=swap', 'model.sdd.k=4'], 1.)}
CONT = { # started from the diffusion model of the same seed
    'no belief': (['model.architecture=diffusion'], 1.), 'rollout': (ON, cost()),
    'slow ramp': ([*ON, *SLOW, f'model.sdd.feedback_warmup_steps={MORE}'], cost(.75)),
    'consistency': ([*ON, 'model.sdd.consistency=0.5'], cost(consistency=1.)), 'belief dropout': ([*ON, 'model.sdd.belief_dropout=0.3'], cost()),
    'slots': ([*ON, 'model.sdd.readin=slots'], cost(extra=.48))}


def settings(out:Path, text:str, job:str, seed:int, overrides:list[str], steps:int)->object:
    return load_config('families', [f'data.path={text}', f'packing.folder={out/"cache"}', f'run.folder={out/"runs"}', f'run.name={job}', f'run.seed={seed}',
        f'trainer.max_steps={steps}', 'trainer.eval_interval=100000', f'trainer.save_interval={steps}', 'trainer.sample_tokens=0', *overrides])


def scores(model, machine, rows, draws:int, deep:bool)->dict:
    "Bounds, exact likelihoods and accuracy of a model."
    network, objective = model.network, model.objective
    m = evaluate(network, objective, rows(None), draws=draws, machine=machine)
    found = {k: m.get(f'val/{k}') for k in ('loss', 'loss_se', 'loss_mc_se', 'accuracy')}
    def mean(f)->float:
        with looking(network), machine.autocast(): nats, n = zip(*((f(b).sum().item(), b.num_targets) for b in rows(ROWS)))
        return sum(nats)/sum(n)
    found['loss of the first rows'] = mean(lambda batch: objective.nll(network, batch, draws=8).nats)
    if not hasattr(objective, 'path_nll'): return found # ar and swap
    beliefs = ('none', 'alt', 'carry') if objective.name == 'sdd' else (None,)
    for b in beliefs:
        k, tag = ({'belief': b} if b else {}), f' {b}' if b else ''
        found[f'path 16{tag}'] = mean(lambda batch: objective.path_nll(network, batch, 16, **k))
        if deep:
            found[f'path 64{tag}'] = mean(lambda batch: objective.path_nll(network, batch, 64, **k))
            for order in ('prob', 'left') if b in (None, 'none') else ('prob',): found[f'exact 64 {order}{tag}'] = mean(lambda batch: objective.exact_nll(network, batch, None, order, **k))
            found[f'exact 16 prob{tag}'] = mean(lambda batch: objective.exact_nll(network, batch, 16, 'prob', **k))
    if objective.name == 'sdd': found['refined'] = mean(lambda batch: objective.nll(network, batch, draws=2, refine=1).nats)-mean(lambda batch: objective.nll(network, batch, draws=2).nats)
    return found


SAMPLERS = { # name -> (options, temperatures)
    'ar': {'left to right': ({}, (.8, .9, 1.))},
    'diffusion': {'random 64': ({}, (.8, .9, 1.)), 'random 16': ({'steps': 16}, (1.,)), 'surest first 64': ({'order': 'prob'}, (1.,)), 'surest first 16': ({'order': 'prob', 'steps': 16}, (1.,)), 'likeliest drawn first 64': ({'order': 'drawn'}, (1.,))},
    'sdd': {'random 64': ({'belief': 'alt'}, (.8, .9, 1.)), 'random 64, none': ({'belief': 'none'}, (1.,)), 'random 64, carry': ({'belief': 'carry'}, (1.,)),
            'random 16': ({'belief': 'alt', 'steps': 16}, (1.,)), 'surest first 16': ({'belief': 'alt', 'order': 'prob', 'steps': 16}, (1.,))},
    'swap': {'original 25': ({'sampler': 'original'}, (1.,)), 'posterior 25': ({'sampler': 'posterior', 'steps': 25, 'temperature': 1.}, (.8, 1.)), 'posterior 64': ({'sampler': 'posterior', 'steps': 64, 'temperature': 1.}, (1.,))}}


def wait_for(path:Path)->None:
    "Until another part has made it."
    while not path.exists(): time.sleep(2)


def samples(out:Path, name:str, model, machine, validation, seed:int, have:dict)->dict:
    "Statistics of 96 rows of 63 tokens for each sampler and temperature; the judge is the AR model of the next seed."
    judge_run = f'ar-{seed%len(SEEDS)+1}'
    wait_for(out/f'{judge_run}.json')
    judge, _ = open_trained(str(out/'runs'/judge_run))
    windows = real_windows((validation.chunk(i) for i in range(len(validation.chunks))), 96, 63, model.tokenizer.eos_id)
    windows = [w for w in windows if len(w) == 64]
    return have | {label: sweep(model.network, model.objective.with_sampler(**options), model.tokenizer, windows, max_new_tokens=63, temperatures=temperatures, judge=judge, seed=seed, machine=machine)
            for label, (options, temperatures) in SAMPLERS[name.split()[0]].items() if label not in have}


def run(out:Path, text:str, job:str, name:str, seed:int, overrides:list[str], steps:int, draws:int, writes:bool)->None:
    target = out/f'{job}.json'
    found = json.loads(target.read_text()) if target.exists() else None
    if found and (not writes or set(SAMPLERS[name.split()[0]]) <= set(found.get('samples', {}))): return
    for o in overrides:
        if o.startswith('model.init='): wait_for(out/f'{Path(o).name}.json')
    cfg = settings(out, text, job, seed, overrides, steps)
    if not (out/'runs'/job/'plots').is_dir(): pretrain(cfg, screen='none', say=lambda line: None)
    model, machine = open_trained(str(out/'runs'/job))
    validation = prepare(cfg, say=lambda line: None).validation
    rows = lambda limit: in_order(validation, 64, limit)
    found = found or {'job': job, 'name': name, 'seed': seed, 'steps': steps, **scores(model, machine, rows, draws, writes)}
    if name == 'ar': target.write_text(json.dumps(found)); # others wait for it as a judge
    if writes: found['samples'] = samples(out, name, model, machine, validation, seed, found.get('samples', {}))
    target.write_text(json.dumps(found, indent=1))
    print(job, {k: round(v, 4) for k, v in found.items() if isinstance(v, float)}, flush=True)


def jobs(out:Path)->list[tuple]:
    "All jobs, those that others wait for first."
    base = [(f'{name.replace(" ", "-")}-{s}', name, s, o, round(STEPS/c), 4, True) for s in SEEDS for name, (o, c) in BASE.items()]
    cont = [(f'{name.replace(" ", "-")}-from-diffusion-{s}', name, s, [*o, f'model.init={out/"runs"/f"diffusion-{s}"}', 'optim.lr=2.5e-3'], round(MORE/c), 2, False)
            for s in SEEDS for name, (o, c) in CONT.items()]
    order = {'ar': 0, 'diffusion': 1, 'sdd': 2, 'swap': 4}
    return sorted(base+cont, key=lambda j: order.get(j[1], 3))


def spread(values:list)->str:
    "Mean and deviation over seeds."
    values = [v for v in values if v is not None]
    return '' if not values else f'{values[0]:.3f}' if len(values) == 1 else f'{statistics.mean(values):.3f} ± {statistics.stdev(values):.3f}'


def print_table(head:list[str], rows:list[list[str]])->None:
    print('', '| ' + ' | '.join(head) + ' |', '|---' + '|---:'*(len(head)-1) + '|', *('| ' + ' | '.join(r) + ' |' for r in rows), sep='\n')


def tables(out:Path)->None:
    "What OUT holds, as the tables of the docs."
    found = {}
    for path in sorted(out.glob('*.json')):
        r = json.loads(path.read_text())
        found.setdefault(r['name'], []).append(r)
    of = lambda name, k: spread([r.get(k) for r in found.get(name, [])])
    print(f'seeds: { {name: len(rs) for name, rs in found.items()} }')
    print_table(['', 'steps', 'loss, all rows', 'exact or bound', 'accuracy'], [[n, str(found[n][0]['steps']), of(n, 'loss'), 'exact' if n == 'ar' else 'bound', of(n, 'accuracy')] for n in BASE if n in found])
    keys = ['loss of the first rows', 'path 64', 'path 16', 'exact 64 left', 'exact 64 prob', 'exact 16 prob']
    lines = [(n, b) for n in BASE if n in found for b in (('none', 'alt', 'carry') if n.startswith('sdd') else ('',))]
    print_table(['first rows', *keys], [[f'{n} {b}'.strip(), *(of(n, k if k[0] == 'l' or not b else f'{k} {b}') if not (k[0] == 'l' and b in ('alt', 'carry')) else '' for k in keys)] for n, b in lines])
    keys = ['judge_nats', 'entropy', 'distinct2', 'rep1', 'rep4', 'self_bleu4', 'nfe']
    lines, real = [], None
    for n in BASE:
        for label in found.get(n, [{}])[0].get('samples', {}):
            for i, point in enumerate(found[n][0]['samples'][label]):
                row = [spread([r['samples'][label][i].get(f'gen/{k}') for r in found[n] if 'samples' in r]) for k in keys]
                if point['temperature'] is None: real = ['real text', '', *row]
                else: lines.append([f'{n}, {label}', f'{point["temperature"]:g}', *row])
    print_table(['', 'temperature', *keys], [real, *lines] if real else lines)
    keys = ['loss', 'path 16', 'path 16 none', 'path 16 alt', 'path 16 carry', 'refined', 'accuracy']
    print_table(['continued', 'steps', *keys], [[n, str(found[n][0]['steps']), *(of(n, k) for k in keys)] for n in CONT if n in found])


if __name__ == '__main__':
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--text'); p.add_argument('--out', type=Path, required=True)
    p.add_argument('--only', default='', help='jobs whose name begins so')
    p.add_argument('--part', type=int, default=0); p.add_argument('--of', type=int, default=1); p.add_argument('--table', action='store_true')
    a = p.parse_args()
    out = a.out.absolute()
    if a.table: tables(out)
    else:
        torch.set_num_threads(1)
        out.mkdir(parents=True, exist_ok=True)
        for job in [j for j in jobs(out) if j[0].startswith(a.only)][a.part::a.of]: run(out, str(Path(a.text).absolute()), *job)
