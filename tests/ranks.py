"""What several ranks compute, one JSON file each: run by tests/test_parallel.py under torchrun, and by itself as one process."""
import json, sys
from dataclasses import replace
from pathlib import Path
import torch
from torch.distributed.device_mesh import init_device_mesh
from llmlab.config import Parallel, load_config
from llmlab.files import LlmlabError
from llmlab.models.zoo import build_model
from llmlab.packing.loader import Batch
from llmlab.trainer.loop import fit
from llmlab.trainer.machine import Machine
from llmlab.trainer.optim import Ema, build_optimizer
from llmlab.trainer.parallel import arrange, gathered, join, leave, share_of, started_by_torchrun, Team
from llmlab.trainer.tracking import Tracker

STEPS, WORDS, T = 20, 96, 33


class Rows:
    "Rows by their place in the run, as the loader gives them; some targets do not count, more of them in some rows than in others."
    def __init__(self, rank, world, rows): self.rank, self.world, self.rows, self.position = rank, world, rows, 0
    def __iter__(self): return self
    def __next__(self):
        first = self.position+self.rank*self.rows
        self.position += self.rows*self.world
        tokens, weights = [], []
        for place in range(first, first+self.rows):
            g = torch.Generator().manual_seed(place)
            tokens.append((torch.randint(3, 9, (T,), generator=g).cumsum(0) % (WORDS-8)))
            weights.append((torch.rand(T-1, generator=g) > (place % 7)/7).float())
        t = torch.stack(tokens)
        return Batch(t[:, :-1], t[:, 1:], torch.stack(weights), torch.zeros(self.rows, T-1, dtype=torch.int64), one_document=True, place=first)


class Memory:
    "Keeps what is logged."
    def __init__(self): self.lines = []
    def log(self, metrics, step): self.lines.append(metrics)


def learn(case, team):
    "Loss and gradient norm of each step, and the weights at the end."
    cfg = load_config('tiny_test', ['model.d_model=32', 'model.num_layers=2', 'trainer.batch_size=4', 'trainer.gradient_accumulation_steps=2', 'packing.seq_len=32', f'optim.name={case["optim"]}', 'optim.lr=3e-3',
                                    f'model.architecture={case["family"]}', *case.get('more', [])])
    network, objective = build_model(cfg, WORDS, torch.device('cpu'), torch.float32, lambda line: None)
    rows, micro = share_of(cfg.trainer, team.world)
    loss = arrange(network, objective, Machine(), Parallel(strategy=case['strategy']), team, case.get('recompute', 'none'))
    optimizer, memory = build_optimizer(network, cfg.optim, dtype=torch.float32), Memory()
    ema = Ema(network, .9) if case.get('ema') else None
    if case.get('broken_on') == team.rank: # from the third step on, for one rank only
        good = loss
        def loss(network, batch, generator=None):
            found = good(network, batch, generator)
            return found._replace(sum=found.sum*float('inf')) if batch.step == 2 else found
        loss.called = good.called
    fit(network, objective, Rows(team.rank, team.world, rows), optimizer, total_steps=STEPS, accumulation=micro, log_every=1, tracker=Tracker([memory]), team=team, loss=loss, ema=ema, generator=torch.Generator().manual_seed(0))
    weights = {n: gathered(p.detach()) for n, p in network.named_parameters()}
    if ema: weights |= {f'ema.{n}': gathered(t) for n, t in ema.shadow.items()}
    return [[line['train/loss'], line['train/grad_norm']] for line in memory.lines], weights


def main(cases, folder):
    torch.set_num_threads(1)
    team = join(Parallel(strategy='fsdp')) if started_by_torchrun() else Team()
    for name, case in cases.items():
        mesh = init_device_mesh('cpu', (2, team.world//2), mesh_dim_names=('replicate', 'shard')) if case['strategy'] == 'hsdp' else team.mesh
        try: curve, weights = learn(case, replace(team, mesh=mesh))
        except LlmlabError as e:
            (Path(folder)/f'{name}-{team.rank}.txt').write_text(str(e))
            continue
        if team.first:
            torch.save(weights, Path(folder)/f'{name}-{team.world}.pt')
            (Path(folder)/f'{name}-{team.world}.json').write_text(json.dumps(curve))
    leave(team)


if __name__ == '__main__': main(json.loads(sys.argv[1]), sys.argv[2])
