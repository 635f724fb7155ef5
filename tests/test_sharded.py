"Sharded checkpoints: two and four processes write and read them, are killed, run into a full disk; what comes back has the same bits, for any number of ranks."
import errno, faulthandler, json, os, shutil, signal, subprocess, sys, threading, traceback
from dataclasses import replace
from functools import partial
from pathlib import Path
import pytest, torch
from safetensors.torch import load_file
from torch import nn
from torch.testing import assert_close
import llmlab.trainer.sharded as sharded
from llmlab.config import Optim
from llmlab.files import CheckpointError, LlmlabError, read_json
from llmlab.trainer import checkpoint as ck
from llmlab.trainer.checkpoint import TrainState, averaged_weights, capture, checkpoint_name, checkpointer, consolidate, is_complete, latest, load_checkpoint, prune, restore, save_checkpoint
from llmlab.trainer.optim import Ema, build_optimizer
from llmlab.trainer.parallel import Team, own_share
from llmlab.trainer.sharded import own_part

root = Path(__file__).resolve().parent.parent
bits = dict(rtol=0, atol=0)


class Tiny(nn.Module):
    "Sizes that nothing divides: of four ranks some have no part of `one` and `five`. Two names for one weight, buffers of other kinds."
    def __init__(self):
        super().__init__()
        self.embed, self.five, self.one, self.head = nn.Embedding(7, 6), nn.Linear(6, 5), nn.Linear(4, 1), nn.Linear(6, 7, bias=False)
        self.head.weight = self.embed.weight
        self.blocks = nn.ModuleList(nn.Linear(6, 5, bias=False) for _ in range(2))
        self.register_buffer('mask', torch.tensor([True, False, True]))
        self.register_buffer('narrow', torch.ones(3, dtype=torch.bfloat16))
        self.register_buffer('empty', torch.zeros(0))


narrow = Optim(name='muon', state_dtype='bf16', fused=False) # two parts, momentum and moments in bf16
plain = Optim(fused=False)


def things(seed=0, mesh=None, rank=0, steps=0, optim=narrow):
    "Network, optimizer, average and generators after a few steps whose gradients are drawn from `seed`."
    torch.manual_seed(seed)
    network = Tiny()
    if mesh is not None:
        from torch.distributed.fsdp import fully_shard
        fully_shard(network, mesh=mesh)
    out = dict(network=network, optimizer=build_optimizer(network, optim), ema=Ema(network, .9), generators={'all': torch.Generator().manual_seed(5), 'own': torch.Generator().manual_seed(rank)})
    draw = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        for p in network.parameters(): p.grad = own_share(torch.randn(p.shape, generator=draw), p)
        out['optimizer'].step(); out['ema'].update()
        torch.rand(2, generator=out['generators']['all']); torch.rand(2, generator=out['generators']['own'])
    torch.manual_seed(rank)
    return out


def tensors(out:dict)->dict[str, torch.Tensor]:
    "All that must come back, whole, by name. Every rank must ask."
    full = lambda t: t.full_tensor() if hasattr(t, 'full_tensor') else t
    flat = {f'model/{k}': t for k, t in out['network'].state_dict().items()} | {f'ema/{k}': t for k, t in out['ema'].shadow.items()}
    names = {p: k for k, p in out['network'].named_parameters()}
    flat |= {f'moments/{names[p]}/{k}': v for part in out['optimizer'].parts for p, slots in part.state.items() for k, v in slots.items()}
    return {k: full(t.detach()).clone() for k, t in flat.items()}


def of_file(loaded:dict)->dict[str, torch.Tensor]:
    "The same, of a loaded checkpoint."
    flat = {f'model/{k}': t for k, t in loaded['model_state_dict'].items()} | {f'ema/{k}': t for k, t in loaded['ema_state_dict']['weights'].items()}
    for part in loaded['optimizer_state_dict']['parts']:
        names = {i: n for g in part['param_groups'] for i, n in zip(g['params'], g['param_names'])}
        flat |= {f'moments/{names[i]}/{k}': v for i, slots in part['state'].items() for k, v in slots.items()}
    return flat


def gather(out:dict, state:TrainState)->dict: return capture(state, **out, train_config={'run': {'seed': 3}}, loader=None)
def draws(out:dict)->list: return [torch.rand(1).item(), *(torch.rand(1, generator=g).item() for g in out['generators'].values())]


# ---- what the ranks do -------------------------------------------------------------------------

def raised(work)->str|None:
    try: work()
    except LlmlabError as e: return f'{type(e).__name__}: {e}'
    return None


def on_two(folder:Path, team:Team, mesh)->dict:
    "Save in every way; load what one process saved; fail."
    out, said = things(1, mesh, team.rank, steps=3), {}
    torch.save(tensors(out), folder/f'truth-{team.rank}.pt')
    save = checkpointer(folder/'sync', partial(gather, out), files=[folder/'tokenizer.json'], team=team)
    save(TrainState(1))
    said['before'] = draws(out)
    restored = things(2, mesh, 7)
    restore(load_checkpoint(folder/'sync'/checkpoint_name(1), team=team), **restored, team=team)
    said['after'] = draws(restored)
    was, now = tensors(out), tensors(restored)
    said['same'] = was.keys() == now.keys() and all(torch.equal(was[k], now[k]) for k in was)
    beside = checkpointer(folder/'async', partial(gather, restored), background=True, team=team)
    torch.manual_seed(team.rank)
    restored['generators'] = things(0, None, team.rank, steps=3)['generators']
    torch.manual_seed(team.rank)
    beside(TrainState(1))
    with torch.no_grad():
        for t in [*restored['network'].parameters(), *restored['ema'].shadow.values()]: t.to_local().zero_()
        for t in (t for part in restored['optimizer'].parts for slots in part.state.values() for t in slots.values()): own_part(t).zero_()
    beside.wait()
    whole = things(2, mesh, 7, optim=plain)
    restore(load_checkpoint(folder/'single'/checkpoint_name(4), team=team), **whole, team=team)
    said['generators'] = [torch.rand(1, generator=whole['generators']['all']).item(), torch.rand(1).item()]
    torch.save(tensors(whole), folder/f'from-one-{team.rank}.pt')
    copies = things(4, None, team.rank, steps=2)
    for step, background in ((2, True), (3, False)):
        save = checkpointer(folder/'ddp', partial(gather, copies), background=background, team=team)
        save(TrainState(step)); save.wait()
    real = sharded.save_file
    def full(*a, **k): raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    if team.rank == 1: sharded.save_file = full
    bad = checkpointer(folder/'sync', partial(gather, out), background=True, team=team)
    bad(TrainState(2))
    said['background'] = raised(lambda: bad(TrainState(3)))
    said['foreground'] = raised(lambda: checkpointer(folder/'sync', partial(gather, out), team=team)(TrainState(2)))
    sharded.save_file = real
    said['seal'] = None
    if team.first: ck._seal = full
    said['seal'] = raised(lambda: save_checkpoint(folder/'sync'/checkpoint_name(2), gather(out, TrainState(2)), team=team))
    return said


def on_four(folder:Path, team:Team, mesh)->dict:
    "Go on with what two have saved; save as four, in two ways."
    from torch.distributed.device_mesh import init_device_mesh
    truth, said = torch.load(folder/'truth-0.pt'), {}
    for name, mesh in (('fsdp', mesh), ('hsdp', init_device_mesh('cpu', (2, 2), mesh_dim_names=('replicate', 'shard')))):
        out = things(9, mesh, team.rank)
        restore(load_checkpoint(folder/'sync'/checkpoint_name(1), team=team), **out, team=team)
        said[name] = all(torch.equal(t, truth[k]) for k, t in tensors(out).items())
        said[f'{name} draws'] = draws(out)
        save = checkpointer(folder/name, partial(gather, out), background=name == 'hsdp', team=team)
        save(TrainState(5)); save.wait()
    return said


def killed(folder:Path, team:Team, mesh, victim:int)->dict:
    "Save, then one rank dies in the middle of the next."
    out = things(1, mesh, team.rank, steps=1)
    save = checkpointer(folder/f'kill-{victim}', partial(gather, out), background=True, team=team)
    save(TrainState(1)); save.wait()
    real = sharded.save_file
    def die(tensors, path, **k):
        real(tensors, path, **k)
        if 'optimizer' in str(path): os.kill(os.getpid(), signal.SIGKILL)
    if team.rank == victim: sharded.save_file = die
    save(TrainState(2))
    return {'lost': raised(save.wait)}


def rank(role, folder:Path, number:int, world:int, *more):
    "One process of a job."
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    dist.init_process_group('gloo', store=dist.FileStore(str(folder/f'{role.__name__}-{more}.store'), world), rank=number, world_size=world)
    team = Team(number, world, number, world, dist.new_group(backend='gloo'))
    team = replace(team, members=team.gather((os.uname().nodename, os.getpid())))
    said = role(folder, team, init_device_mesh('cpu', (world,), mesh_dim_names=('shard',)), *more)
    (folder/f'{role.__name__}-{more[0] if more else ""}-{number}.json').write_text(json.dumps(said))


def fork(role, folder:Path, world:int, *more):
    "Run a job; the processes share what is imported already. Those that are not to die must end well."
    pids = []
    for number in range(world):
        if pid := os.fork(): pids.append(pid); continue
        faulthandler.dump_traceback_later(100, exit=True) # one that hangs says where
        code = 1
        try: rank(role, folder, number, world, *more); code = 0
        except BaseException: traceback.print_exc()
        finally: sys.stderr.flush(); os._exit(code)
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
    assert codes == [-9 if more and n == more[0] else 0 for n in range(world)], (role.__name__, more, codes)


if __name__ == '__main__':
    import torch.distributed.checkpoint.hf_storage, torch.distributed.fsdp, torch.distributed.tensor
    folder = Path(sys.argv[1])
    fork(on_two, folder, 2)
    fork(on_four, folder, 4)
    for victim in (0, 1): fork(killed, folder, 2, victim)
    sys.exit()


# ---- what comes of it --------------------------------------------------------------------------

@pytest.fixture(scope='module')
def done(tmp_path_factory):
    "A folder in which all of the above has happened."
    folder = tmp_path_factory.mktemp('ranks')
    (folder/'tokenizer.json').write_text('{}')
    save_checkpoint(folder/'single'/checkpoint_name(4), gather(things(6, steps=2, optim=plain), TrainState(4)))
    with open(folder/'errors.txt', 'w') as errors:
        code = subprocess.run([sys.executable, __file__, str(folder)], env=os.environ | {'PYTHONPATH': f'{root}:{root/"tests"}', 'OMP_NUM_THREADS': '1'}, stdout=errors, stderr=errors).returncode
    assert code == 0, (folder/'errors.txt').read_text()[-4000:]
    return folder


def said(folder:Path, role:str, number:int)->dict: return json.loads((folder/f'{role}-{number}.json').read_text())


def equal(a:dict, b:dict):
    assert a.keys() == b.keys()
    for k in a:
        assert a[k].dtype == b[k].dtype, k
        assert_close(a[k], b[k], **bits, msg=k)


def test_two_save_and_one_loads(done):
    path, truth = done/'sync'/checkpoint_name(1), torch.load(done/'truth-0.pt')
    assert {str(p.relative_to(path)) for p in path.rglob('*') if p.is_file()} == {
        'complete.json', 'meta.json', 'tokenizer.json', 'training.pt', *(f'{sort}/shard-0000{n}-of-00002.safetensors' for sort in ('ema', 'model', 'optimizer') for n in (1, 2))}
    assert read_json(path/'meta.json')['format_version'] == read_json(path/'complete.json')['format_version'] == 2 # an older llmlab refuses it by this
    loaded = load_checkpoint(path)
    equal(of_file(loaded), truth)
    alone = things(8)
    assert restore(loaded, **alone) == TrainState(1)
    equal(tensors(alone), truth)
    assert alone['network'].head.weight is alone['network'].embed.weight
    light = load_checkpoint(path, training=False)
    assert 'optimizer_state_dict' not in light and set(averaged_weights(light)) == set(light['model_state_dict'])


def test_nothing_in_it_is_a_pickle_of_an_index(done):
    assert not [p for p in done.rglob('*') if p.name.endswith('.metadata') or p.suffix == '.distcp']


def test_two_go_on_where_they_were(done):
    for number in (0, 1):
        told = said(done, 'on_two-', number)
        assert told['same'] and told['before'] == told['after']
    assert said(done, 'on_two-', 0)['before'] != said(done, 'on_two-', 1)['before'] # each has its own


def test_one_saves_and_two_load(done):
    truth = of_file(load_checkpoint(done/'single'/checkpoint_name(4)))
    for number in (0, 1): equal(torch.load(done/f'from-one-{number}.pt'), truth)
    first, second = (said(done, 'on_two-', n)['generators'] for n in (0, 1))
    assert first[0] == second[0] and first[1] != second[1] # what all draw alike goes on, the rest is each rank's own
    again = things(6, steps=2)['generators']['all']
    assert first[0] == torch.rand(1, generator=again).item()


def test_two_save_and_four_load(done):
    told = [said(done, 'on_four-', n) for n in range(4)]
    assert all(t['fsdp'] and t['hsdp'] for t in told)
    assert [t['fsdp draws'] for t in told] == [t['hsdp draws'] for t in told] # the same resume, the same numbers
    assert len({t['fsdp draws'][0] for t in told}) == len({t['fsdp draws'][2] for t in told}) == 4 and len({t['fsdp draws'][1] for t in told}) == 1
    truth = torch.load(done/'truth-0.pt')
    for name in ('fsdp', 'hsdp'): equal(of_file(load_checkpoint(done/name/checkpoint_name(5))), truth)
    size = lambda name: sum(p.stat().st_size for p in (done/name/checkpoint_name(5)/'model').iterdir())
    assert size('hsdp') < 1.3*size('fsdp') # of two copies one is written


def test_four_save_and_one_goes_on_with_other_generators(done):
    drawn = []
    for seed in (8, 9):
        out = things(seed)
        restore(load_checkpoint(done/'hsdp'/checkpoint_name(5)), **out)
        drawn.append(draws(out))
    assert drawn[0] == drawn[1] # however the process began


def test_in_the_background_it_is_the_same(done):
    a, b = (load_checkpoint(done/name/checkpoint_name(1)) for name in ('sync', 'async'))
    equal(of_file(a), of_file(b)) # though all was set to zero right after the call
    assert torch.equal(a['generator_states']['ranks'][1]['named']['own'], b['generator_states']['ranks'][1]['named']['own'])
    for key in ('global_step', 'train_state', 'train_config', 'config_hash', 'architecture'): assert a[key] == b[key]


def test_copies_of_a_model_are_written_once(done):
    path = done/'ddp'/checkpoint_name(3)
    assert (path/'model.safetensors').is_file() and read_json(path/'meta.json')['format_version'] == 1
    a, b = load_checkpoint(path), load_checkpoint(done/'ddp'/checkpoint_name(2))
    equal(of_file(a), tensors(things(4, steps=2)))
    equal(of_file(a), of_file(b))
    assert len(a['generator_states']['ranks']) == 2


def test_one_file_of_it(done, tmp_path):
    for name, step in (('sync', 1), ('hsdp', 5)):
        loaded = load_checkpoint(done/name/checkpoint_name(step), training=False)
        file = load_file(consolidate(done/name/checkpoint_name(step), tmp_path/'model.safetensors'))
        assert loaded['model_state_dict'].keys() - file.keys() == {'head.weight'} # the other name of one weight
        equal(file, {k: loaded['model_state_dict'][k] for k in file})
    equal(load_file(consolidate(done/name/checkpoint_name(step), tmp_path/'a.safetensors', averaged=True)), {k: t for k, t in averaged_weights(loaded).items() if k != 'head.weight'})
    assert sorted(p.name for p in tmp_path.iterdir()) == ['a.safetensors', 'model.safetensors']


@pytest.mark.parametrize('sort', ['model', 'ema', 'optimizer'])
def test_a_damaged_or_missing_shard_is_named(done, tmp_path, sort):
    shutil.copytree(done/'sync', tmp_path/'c')
    shard = tmp_path/'c'/checkpoint_name(1)/sort/'shard-00002-of-00002.safetensors'
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    assert is_complete(shard.parent.parent) # a quick look does not see it
    with pytest.raises(CheckpointError, match=f'{sort}/shard-00002-of-00002.safetensors is damaged'): load_checkpoint(shard.parent.parent)
    if sort == 'optimizer': load_checkpoint(shard.parent.parent, training=False) # does not read it
    else:
        with pytest.raises(CheckpointError, match='is damaged'): load_checkpoint(shard.parent.parent, training=False)
    content[-1] ^= 1
    shard.write_bytes(content)
    stray = shard.with_name('shard-00003-of-00003.safetensors')
    shutil.copy(shard, stray)
    with pytest.raises(CheckpointError, match=f'{sort}/shard-00003-of-00003.safetensors is no part of it'): load_checkpoint(shard.parent.parent)
    stray.unlink()
    load_checkpoint(shard.parent.parent)
    shard.unlink()
    assert not is_complete(shard.parent.parent) and latest(tmp_path/'c', say=lambda s: None) is None
    with pytest.raises(CheckpointError, match=f'{sort}/shard-00002-of-00002.safetensors is missing'): load_checkpoint(shard.parent.parent)


def test_a_full_disk_on_one_rank_is_told_by_all(done):
    for number in (0, 1):
        told = said(done, 'on_two-', number)
        for key in ('background', 'foreground'): assert told[key].startswith('CheckpointError: Rank 1 of 2: cannot write') and 'the disk is full' in told[key], told
        assert told['seal'].startswith('CheckpointError: Rank 0 of 2: cannot write') and 'the disk is full' in told['seal']
    assert [p.name for p in (done/'sync').iterdir()] == [checkpoint_name(1)] # and nothing half-written


@pytest.mark.parametrize('victim', [0, 1])
def test_a_rank_is_killed_while_writing(done, victim):
    folder = done/f'kill-{victim}'
    assert 'died' in (lost := said(done, f'killed-{victim}', 1-victim)['lost']) and 'the last checkpoint is good' in lost, lost
    left = sorted(p.name for p in folder.iterdir())
    assert latest(folder, say=pytest.fail).name == checkpoint_name(1)
    assert len(left) == (2 if victim == 0 else 1), left # the first rank has the folder: it clears it away, if it lives
    load_checkpoint(folder/checkpoint_name(1))
    prune(folder)
    assert [p.name for p in folder.iterdir()] == [checkpoint_name(1)]


# ---- one process -------------------------------------------------------------------------------

def test_in_the_background_one_at_a_time(tmp_path):
    out, gate, began = things(1, steps=1), threading.Event(), []
    save = checkpointer(tmp_path, partial(gather, out), keep_last=1, background=True)
    write = save.write
    def slow(*args): began.append(args[0].name); gate.wait(); return write(*args)
    save.write = slow
    path = save(TrainState(1))
    assert path.name == checkpoint_name(1) and not path.exists()
    threading.Timer(.01, gate.set).start()
    save(TrainState(2)) # waits for the first
    assert path.exists()
    save.wait()
    assert began == [checkpoint_name(1), checkpoint_name(2)] and [p.name for p in tmp_path.iterdir()] == [checkpoint_name(2)]


def test_the_background_tells_its_error_once(tmp_path, monkeypatch):
    out = things(1, steps=1)
    save = checkpointer(tmp_path/'c', partial(gather, out), background=True)
    def full(*a, **k): raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with monkeypatch.context() as m:
        m.setattr(ck, 'save_file', full)
        save(TrainState(1))
        with pytest.raises(CheckpointError, match='the disk is full.*What was complete before is untouched'): save.wait()
    save.wait()
    path = save(TrainState(2)); save.wait()
    assert [p.name for p in (tmp_path/'c').iterdir()] == [path.name]


def test_without_other_ranks_it_is_as_it_was(tmp_path):
    out = things(1, steps=1)
    path = checkpointer(tmp_path, partial(gather, out))(TrainState(1))
    assert sorted(p.name for p in path.iterdir()) == ['complete.json', 'ema.safetensors', 'meta.json', 'model.safetensors', 'training.pt']
    meta, loaded = read_json(path/'meta.json'), load_checkpoint(path)
    assert meta['format_version'] == 1 and 'shards' not in meta and 'ranks' not in loaded['generator_states'] and 'on_disk' not in loaded


@pytest.mark.gpu
def test_a_step_does_not_get_into_a_checkpoint_of_a_gpu(tmp_path):
    network = nn.Linear(2000, 2000, device='cuda')
    optimizer = torch.optim.AdamW(network.named_parameters(), fused=True)
    save = checkpointer(tmp_path, partial(capture, network=network, optimizer=optimizer), background=True)
    for step in (1, 2, 3):
        network(torch.randn(64, 2000, device='cuda')).square().sum().backward(); optimizer.step()
        was = {k: t.detach().cpu() for k, t in network.state_dict().items()}
        path = save(TrainState(step))
        with torch.no_grad(): network.weight.mul_(2)
        save.wait()
        assert_close(load_checkpoint(path)['model_state_dict'], was, **bits)
    assert all(t.is_pinned() for t in save.copies.pinned.values())
