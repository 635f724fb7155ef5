"Checkpoints: damaged in every way, killed while writing, on a full disk; nothing complete is lost and no code is run."
import io, os, pickle, resource, shutil, signal, subprocess, sys, time, zipfile
from functools import partial
from pathlib import Path
import pytest, torch
from hypothesis import HealthCheck, given, settings, strategies as st
from safetensors.torch import load_file
from torch import nn
from torch.testing import assert_close
from llmlab.files import CheckpointError, hash_file, hash_json, read_json, write_json
from llmlab.models.lora import frozen_weights, weights_hash
from llmlab.trainer.checkpoint import (KEYS, TrainState, best, capture, check_files, checkpoint_name, checkpointer, find_checkpoint, is_complete, latest,
                                       list_checkpoints, load_checkpoint, load_weights, prune, restore, rewind, save_checkpoint)

root = Path(__file__).resolve().parent.parent


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(5, 3), nn.Linear(3, 5, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer('empty', torch.zeros(0))
        self.register_buffer('narrow', torch.ones(3, dtype=torch.bfloat16))
        self.register_buffer('turned', torch.arange(6.).view(2, 3).T)


def objects():
    network = Tied()
    return dict(network=network, optimizer=torch.optim.AdamW(network.parameters()), generators={'objective': torch.Generator().manual_seed(1)})


def write(folder, step, val_loss=None, **things):
    state = TrainState(global_step=step)
    if val_loss is not None: state.validated(val_loss)
    return save_checkpoint(folder/checkpoint_name(step), capture(state, **(things or objects()), train_config={'run': {'seed': 1}}))


@pytest.fixture(scope='module')
def good(tmp_path_factory):
    folder = tmp_path_factory.mktemp('good')
    for step in (100, 200): write(folder, step)
    return folder


def test_it_has_the_documented_keys(tmp_path):
    loaded = load_checkpoint(write(tmp_path, 7, 2.5))
    for key in (*KEYS, 'format_version'): assert key in loaded, key
    assert loaded['global_step'] == 7 and loaded['best_val_loss'] == 2.5 and loaded['architecture'] == 'ar' and loaded['config_hash']
    light = load_checkpoint(tmp_path/checkpoint_name(7), training=False)
    assert 'optimizer_state_dict' not in light and set(light['model_state_dict']) == set(loaded['model_state_dict'])


def test_everything_comes_back(tmp_path):
    old, new = objects(), objects()
    old['network'].head(old['network'].embed.weight).sum().backward(); old['optimizer'].step()
    torch.rand(3, generator=old['generators']['objective'])
    path = write(tmp_path, 3, **old)
    assert set(load_file(path/'model.safetensors')) == {'embed.weight', 'empty', 'narrow', 'turned'} # the tied name is written once
    torch_state = torch.get_rng_state()
    torch.rand(7)
    restore(load_checkpoint(path), **new)
    assert_close(torch.get_rng_state(), torch_state)
    for (k, a), (_, b) in zip(old['network'].state_dict().items(), new['network'].state_dict().items()): assert_close(a, b, rtol=0, atol=0, msg=k)
    assert new['network'].head.weight is new['network'].embed.weight
    assert_close(old['optimizer'].state_dict()['state'], new['optimizer'].state_dict()['state'], rtol=0, atol=0)
    assert_close(*(torch.rand(3, generator=o['generators']['objective']) for o in (old, new)), rtol=0, atol=0)


@given(data=st.data())
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_flipped_bit_and_any_cut_is_found(good, tmp_path, data):
    folder = tmp_path/'copy'
    shutil.rmtree(folder, ignore_errors=True); shutil.copytree(good, folder)
    victim = data.draw(st.sampled_from(sorted(p.name for p in (folder/checkpoint_name(200)).iterdir())))
    path = folder/checkpoint_name(200)/victim
    content = bytearray(path.read_bytes())
    at = data.draw(st.integers(0, len(content)-1))
    if data.draw(st.booleans()): del content[at:]
    else: content[at] ^= 1 << data.draw(st.integers(0, 7))
    path.write_bytes(content)
    if victim == 'complete.json' and is_complete(path.parent): return # a flip outside what its seal covers: white space, its format number
    with pytest.raises(CheckpointError) as e: load_checkpoint(path.parent)
    assert victim in str(e.value) and f'{checkpoint_name(100)}: use that' in str(e.value)


def test_a_missing_file_and_no_older_checkpoint(tmp_path):
    path = write(tmp_path, 5)
    (path/'training.pt').unlink()
    assert not is_complete(path) and latest(tmp_path, say=lambda s: None) is None
    with pytest.raises(CheckpointError, match=r'training.pt is missing. There is no complete one before it'): load_checkpoint(path)
    with pytest.raises(CheckpointError, match='no complete checkpoint'): find_checkpoint(tmp_path, say=lambda s: None)
    with pytest.raises(CheckpointError, match='does not exist'): find_checkpoint(tmp_path/'nowhere')


def test_latest_says_what_it_passes_over(good, tmp_path):
    folder, said = tmp_path/'c', []
    shutil.copytree(good, folder)
    (folder/checkpoint_name(200)/'complete.json').unlink()
    assert latest(folder, said.append).name == checkpoint_name(100)
    assert said == [f'{checkpoint_name(200)} is incomplete and passed over.']


def seal_again(path):
    files = {p.name: {'size': p.stat().st_size, 'xxh3_128': hash_file(p)} for p in path.iterdir() if p.name != 'complete.json'}
    write_json(path/'complete.json', {'files': files, 'seal': hash_json(files)})


class Evil:
    def __init__(self, mark): self.mark = mark
    def __reduce__(self): return os.system, (f'touch {self.mark}',)


@pytest.mark.parametrize('form', ['pickle', 'zip'])
def test_no_code_is_run(tmp_path, form):
    path, mark = write(tmp_path, 9), tmp_path/'was-here'
    if form == 'pickle': (path/'training.pt').write_bytes(pickle.dumps(Evil(mark), protocol=2))
    else:
        with zipfile.ZipFile(path/'training.pt') as z: records = {n: z.read(n) for n in z.namelist()}
        with zipfile.ZipFile(path/'training.pt', 'w') as z:
            for n, content in records.items(): z.writestr(n, pickle.dumps(Evil(mark), protocol=2) if n.endswith('data.pkl') else content)
    seal_again(path)
    assert not check_files(path) # its hashes are right, so only the reader stands between us and the code
    with pytest.raises(CheckpointError, match='could run code'): load_checkpoint(path)
    assert not mark.exists()


def test_a_newer_format_is_refused(tmp_path):
    path = write(tmp_path, 9)
    write_json(path/'meta.json', read_json(path/'meta.json') | {'format_version': 99})
    seal_again(path)
    with pytest.raises(CheckpointError, match='newer llmlab'): load_checkpoint(path)


def test_prune_keeps_the_last_and_the_best(tmp_path):
    for step, loss in ((1, 3.), (2, 1.), (3, 2.), (4, None), (5, 2.)): write(tmp_path, step, loss)
    write(tmp_path, 6)
    (tmp_path/checkpoint_name(6)/'complete.json').unlink() # incomplete: not counted, not touched
    assert prune(tmp_path, 2) == [checkpoint_name(1), checkpoint_name(3)]
    assert [p.name for p in list_checkpoints(tmp_path)] == [checkpoint_name(s) for s in (2, 4, 5, 6)]
    assert best(tmp_path).name == checkpoint_name(2)
    assert find_checkpoint(tmp_path, 'best').name == checkpoint_name(2)
    assert rewind(tmp_path, 4) == [checkpoint_name(s) for s in (5, 6)]
    assert latest(tmp_path).name == checkpoint_name(4) and (tmp_path/f'old-{checkpoint_name(5)}').is_dir()


big = '''
import sys, torch
from pathlib import Path
from llmlab.trainer.checkpoint import TrainState, capture, checkpoint_name, save_checkpoint
network = torch.nn.Linear(600, 1000)
optimizer = torch.optim.AdamW(network.parameters())
network(torch.ones(1, 600)).sum().backward(); optimizer.step()
step = 0
while step < int(sys.argv[2]):
    step += 1
    save_checkpoint(Path(sys.argv[1])/checkpoint_name(step), capture(TrainState(step), network=network, optimizer=optimizer))
    print(step, flush=True)
'''


@pytest.mark.parametrize('limit, what', [(1_000_000, 'model'), (4_000_000, 'training')])
def test_a_full_disk(good, tmp_path, limit, what):
    "A limit on the size of a file stands for the full disk: the write fails in the middle of one file or the other (2.4 MB of weights, 4.8 MB of moments)."
    folder = tmp_path/'c'
    shutil.copytree(good, folder)
    code = big.replace('save_checkpoint(Path', 'import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n    import llmlab.files as f\n    save_checkpoint(Path')
    done = subprocess.run([sys.executable, '-c', code, str(folder), '1'], capture_output=True, text=True, env=os.environ | {'PYTHONPATH': str(root)},
                          preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)))
    assert done.returncode and 'CheckpointError: cannot write' in done.stderr and 'What was complete before is untouched' in done.stderr, done.stderr
    assert sorted(p.name for p in folder.iterdir()) == [checkpoint_name(s) for s in (100, 200)] # and nothing half-written
    assert not check_files(folder/checkpoint_name(200))


def test_a_really_full_disk(tmp_path):
    disk = tmp_path/'disk'
    disk.mkdir()
    if os.geteuid() or subprocess.run(['mount', '-t', 'tmpfs', '-o', 'size=10m', 'tmpfs', str(disk)], capture_output=True).returncode: pytest.skip('may not mount a small disk here')
    try:
        done = subprocess.run([sys.executable, '-c', big, str(disk), '9'], capture_output=True, text=True, env=os.environ | {'PYTHONPATH': str(root)})
        assert done.stdout.split() == ['1'] and 'CheckpointError' in done.stderr and 'the disk is full' in done.stderr, done.stderr
        assert [p.name for p in disk.iterdir()] == [checkpoint_name(1)] and not check_files(disk/checkpoint_name(1))
    finally: subprocess.run(['umount', str(disk)], check=True)


@pytest.mark.parametrize('kills', [3, pytest.param(100, marks=pytest.mark.proof)])
def test_killed_while_saving(tmp_path, kills):
    "Whatever the moment, the last checkpoint that was announced is good and later ones are whole or not there."
    for k in range(kills):
        p = subprocess.Popen([sys.executable, '-c', big, str(tmp_path), '1000'], stdout=subprocess.PIPE, text=True, env=os.environ | {'PYTHONPATH': str(root), 'OMP_NUM_THREADS': '1'})
        for _ in range(2): announced = int(p.stdout.readline())
        time.sleep(.013*(k % 17))
        p.send_signal(signal.SIGKILL)
        rest = p.stdout.read().split()
        p.wait(); p.stdout.close()
        newest = latest(tmp_path, say=pytest.fail)
        assert newest.name >= checkpoint_name(int(rest[-1]) if rest else announced)
        assert not check_files(newest)
        prune(tmp_path, 1)
        assert [x for x in tmp_path.iterdir()] == [newest]
        shutil.rmtree(newest)


def test_the_checkpointer_keeps_files_and_prunes(tmp_path):
    (tmp_path/'tokenizer.json').write_text('{"kind": "byte"}')
    save = checkpointer(tmp_path/'c', partial(capture, **objects(), cache_info={'rows': 5}), keep_last=1, files=[tmp_path/'tokenizer.json'])
    for step in (1, 2): path = save(TrainState(step))
    assert [p.name for p in list_checkpoints(tmp_path/'c')] == [checkpoint_name(2)]
    assert (path/'tokenizer.json').read_text() == '{"kind": "byte"}' and load_checkpoint(path)['cache_info'] == {'rows': 5}


class Adapted(Tied):
    "Not a network of ours: a frozen part in bytes, a buffer, and a trainable weight with two names."
    def __init__(self, path='there', secret=3):
        super().__init__()
        nn.init.ones_(self.embed.weight)
        self.requires_grad_(False)
        self.packed = nn.Parameter(torch.full((4,), secret, dtype=torch.uint8), requires_grad=False)
        self.a = nn.Linear(3, 2, bias=False)
        self.again = nn.Linear(3, 2, bias=False)
        self.again.weight = self.a.weight
        self.adapter = {'kind': 'peft', 'method': 'qlora', 'r': 2, 'alpha': 4., 'dropout': 0., 'targets': 'a', 'modules': ['a'], 'train': [], 'seed': 0,
                        'base': {'path': path, 'hash': weights_hash(frozen_weights(self))}}


def test_any_network_with_adapters_saves_what_learns(tmp_path):
    old, new = Adapted(), Adapted('elsewhere')
    things = lambda network: dict(network=network, optimizer=torch.optim.AdamW([network.a.weight]))
    path = save_checkpoint(tmp_path/'one', capture(TrainState(3), **things(old)))
    assert list(load_file(path/'model.safetensors')) == ['a.weight'] # once; the frozen ones and the buffers lie with the base
    loaded = load_checkpoint(path)
    assert set(loaded['model_state_dict']) == {'a.weight', 'again.weight'} and loaded['adapter'] == old.adapter
    restore(loaded, **things(new))
    assert_close(new.a.weight, old.a.weight, rtol=0, atol=0)
    assert new.again.weight is new.a.weight and not new.embed.weight.requires_grad
    for network, words in ((Adapted(secret=4), 'another base'), (Tied(), 'holds adapters alone')):
        with pytest.raises(CheckpointError, match=words): load_weights(network, loaded)
    with pytest.raises(CheckpointError, match='whole network'): load_weights(Adapted(), load_checkpoint(write(tmp_path, 7)))
