"A cache grows under a run that is killed: nothing is seen twice, nothing is left out, nothing jumps."
import json, os, random, signal, time
from pathlib import Path
import pytest
from conftest import Running, run_door
from llmlab.config import load_config
from llmlab.files import CacheError, read_json, read_jsonl, write_json
from llmlab.packing.cache import open_cache
from llmlab.packing.loader import Loader
from llmlab.recipes import prepare, pretrain, resume_settings
from llmlab.trainer.checkpoint import find_checkpoint, load_checkpoint
from llmlab.trainer.loop import Limit
from llmlab.trainer.tracking import Stopped

data = ['--config', 'tiny_test', 'data.max_documents=240', 'data.name=stories', 'tokenizer.kind=byte', 'packing.seq_len=64', 'packing.chunk_rows=64', 'data.validation_fraction=0.1']
words = [*data, 'run.name=r', 'packing.partial=true', 'trainer.max_steps=null', 'trainer.epochs=1', 'trainer.batch_size=8', 'trainer.save_interval=4', 'trainer.log_interval=1',
         'trainer.eval_interval=1000', 'trainer.sample_tokens=0', 'model.d_model=16', 'model.num_layers=1', 'model.num_heads=2']

def run(folder:Path, door:str, *more:str, code:int=0)->str:
    done = run_door(f'llmlab_{door}', *more, cwd=folder)
    assert done.returncode == code, done.stdout+done.stderr
    return done.stdout+done.stderr

# Training as the command does it, but for a line on the disk for each batch: step, rows.
noting = '''
import json
from llmlab.trainer import loop
take = loop.take
step = [0]
def noted(batches, num, device='cpu'):
    out = take(batches, num, device)
    print(json.dumps([int(batches.position), [int(r) for b in out for r in b.rows]]), file=open('rows.jsonl', 'a'), flush=True)
    return out
loop.take = noted
'''

def train(folder:Path, *more:str)->Running: return Running('llmlab_train', *more, cwd=folder, first=noting)

def noted(folder:Path)->dict[int, list[int]]: # position after the batch -> its rows; what was done again after a kill counts once, and must be the same
    found = {}
    for line in (folder/'rows.jsonl').read_text().splitlines():
        position, rows = json.loads(line)
        found[position] = rows
    return found

def kill_after(p:Running, folder:Path, step:int)->None:
    log, deadline = folder/'runs'/'r'/'metrics.jsonl', time.monotonic()+120
    while p.poll() is None and not (log.exists() and len(read_jsonl(log)) >= step): assert time.monotonic() < deadline; time.sleep(.01)
    assert p.poll() is None, p.err
    p.send_signal(signal.SIGKILL); p.wait()

def test_train_kill_grow_resume_kill_resume(tmp_path):
    run(tmp_path, 'prepare', *data, '--end-chunk', '3')
    cache = lambda: open_cache(next(p.parent for p in tmp_path.rglob('cache_metadata.json') if not p.parent.name.endswith('validation')))
    first = cache().num_rows
    p = train(tmp_path, *words)
    kill_after(p, tmp_path, 9)
    run(tmp_path, 'prepare', *data, '--end-chunk', '5')
    second = cache().num_rows
    p = train(tmp_path, '--resume')
    kill_after(p, tmp_path, 19)
    p = train(tmp_path, '--resume') # nothing new this time
    p.wait()
    out = p.out+p.err
    assert p.returncode == 0 and 'has grown' not in out and 'only a part of stories' in out, out
    run(tmp_path, 'prepare', *data, '--verify')
    whole = cache()
    p = train(tmp_path, '--resume') # a run that had finished goes on where new rows begin
    p.wait()
    out = p.out+p.err
    assert p.returncode == 0 and f'{second:,} -> {whole.num_rows:,} sequences, {second//8:,} -> {whole.num_rows//8:,} steps' in out and 'only a part' not in out, out
    assert first < second < whole.num_rows and whole.complete
    seen = [r for rows in noted(tmp_path).values() for r in rows]
    assert len(seen) == len(set(seen)) == whole.num_rows//8*8 # every row of the epoch once (but for less than a batch)
    at = sorted(noted(tmp_path))
    assert at == list(range(8, len(seen)+1, 8))
    final = load_checkpoint(find_checkpoint(tmp_path/'runs'/'r'))
    assert [n for _, n in final['loader_state']['history']] == [3, 5, len(whole.chunks)] and len(json.dumps(final['loader_state'])) < 1500
    rates = [r['train/lr'] for r in read_jsonl(tmp_path/'runs'/'r'/'metrics.jsonl') if 'train/lr' in r]
    lengths = final['train_state']['lengths']
    assert len(rates) == whole.num_rows//8 and [n for _, n in lengths] == [first//8, second//8, whole.num_rows//8]
    assert final['train_state']['validation_rows'] < sum(c['rows'] for c in read_json(next(tmp_path.rglob('*-validation/cache_metadata.json')))['chunks']) # what was held out when it began

quiet = dict(say=lambda line: None)
def cfg(*more:str): return load_config('tiny_test', [*data[2:], *more])
def here(folder:Path, **more): return prepare(cfg(f'packing.folder={folder/"cache"}'), **quiet, **more).train

def test_a_cache_that_lost_or_changed_its_rows_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    settings = [*words[2:], 'trainer.eval_interval=1']
    prepare(cfg(), end_chunk=4, **quiet)
    with pytest.raises(Stopped): pretrain(load_config('tiny_test', settings), limit=Limit(steps=2), screen='none', **quiet)
    def resume(*more):
        wanted, folder = resume_settings('r', more)
        return pretrain(wanted, resume=folder, limit=Limit(steps=1), screen='none', **quiet)
    with pytest.raises(CacheError, match='sequence_length is 32, it was 64'): resume('packing.seq_len=32', 'packing.partial=false')
    with pytest.raises(CacheError, match='tokenizer is .*, it was'): resume('tokenizer.kind=char', 'packing.partial=false')
    prepare(cfg('data.seed=1'), end_chunk=5, **quiet)
    with pytest.raises(CacheError, match='content of its first 4 chunks'): resume('data.seed=1')
    prepare(cfg('packing.folder=small'), end_chunk=2, **quiet)
    with pytest.raises(CacheError, match='shrank from .* to .* sequences'): resume('packing.folder=small')
    with pytest.raises(CacheError, match='is no packed cache'): resume('packing.folder=nowhere')
    prepare(cfg('packing.folder=elsewhere'), **quiet)
    with pytest.raises(Stopped): resume('packing.folder=elsewhere') # the same rows at another place, and more of them

def test_the_warm_up_is_of_the_whole_corpus(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    said, settings = [], [*words[2:], 'optim.warmup_ratio=0.5', 'trainer.sample_tokens=0']
    part = prepare(cfg(), end_chunk=3, **quiet).train
    def first(*more): # what the run decided, from its first checkpoint
        with pytest.raises(Stopped) as e: pretrain(load_config('tiny_test', [*settings, *more]), limit=Limit(steps=2), screen='none', say=said.append)
        return load_checkpoint(e.value.checkpoint)['train_state'], read_jsonl(e.value.checkpoint.parent.parent/'metrics.jsonl')[0]['train/lr']
    state, lr = first('packing.full_corpus_rows=8000')
    assert state['full_steps'] == 1000 and state['lengths'] == [[0, part.num_rows//8]] and lr == pytest.approx(1/501*load_config('tiny_test').optim.lr)
    assert any('warm-up has 500 steps' in s for s in said) and any(f'{part.num_rows:,} sequences of about 8,000' in s for s in said)
    state, _ = first('run.name=estimated') # from the size of the text
    whole = here(tmp_path)
    assert state['full_steps'] == pytest.approx(whole.num_rows/8, rel=.1)

# Two ranks, each a process with a loader; the cache grows between their deaths.
def draw(path:Path, rank:int, folder:Path)->None:
    loader, state = Loader(open_cache(path), 4, seed=5, rank=rank, world=2, window=2, workers=0), folder/'state.json'
    if state.exists(): loader.load_state_dict(read_json(state))
    with open(folder/f'rows{rank}.jsonl', 'a') as f:
        while loader.position+8 <= loader.end_of(1):
            at = loader.position+4*rank
            f.write(json.dumps([at, next(loader).rows.tolist()])+'\n'); f.flush()
            if rank == 0 and loader.position//8 % 3 == 0: checkpoint(loader, folder)
            time.sleep(.002)
    if rank == 0: checkpoint(loader, folder)

def checkpoint(loader:Loader, folder:Path)->None:
    "Written when the other rank has come as far, as after a step of training."
    def last(): return [0, *(json.loads(l)[0] for l in (folder/'rows1.jsonl').read_text().splitlines() if l.endswith(']]'))][-1] if (folder/'rows1.jsonl').exists() else 0
    while last() < loader.position-4: time.sleep(.001)
    write_json(folder/'state.json', loader.state_dict())

def settle(folder:Path)->None:
    "After a kill, a run goes on from its checkpoint: what was drawn after it does not count."
    position = read_json(folder/'state.json')['position'] if (folder/'state.json').exists() else 0
    for r in (0, 1):
        file = folder/f'rows{r}.jsonl'
        lines = [l for l in (file.read_text().splitlines() if file.exists() else []) if l.endswith(']]') and json.loads(l)[0] < position]
        file.write_text(''.join(l+'\n' for l in lines))

def in_two_processes(work, folder:Path, kill:int|None)->int: # how many were killed
    "Both ranks; killed when the first has drawn so many batches, if it gets that far."
    file, pids = folder/'rows0.jsonl', []
    def drawn(): return file.read_bytes().count(b'\n') if file.exists() else 0
    def running(): return any(os.waitid(os.P_PID, p, os.WEXITED|os.WNOHANG|os.WNOWAIT) is None for p in pids)
    before = drawn()
    for r in (0, 1):
        if not (pid := os.fork()):
            try: work(r)
            except BaseException: os._exit(1)
            os._exit(0)
        pids.append(pid)
    if kill is not None:
        while running() and drawn() < before+kill: time.sleep(.001)
        for p in pids: os.kill(p, signal.SIGKILL)
    codes = [os.waitpid(p, 0)[1] for p in pids]
    assert set(codes) <= {0, signal.SIGKILL}
    return codes.count(signal.SIGKILL)

@pytest.mark.parametrize('seed', [0, 1, *(pytest.param(n, marks=pytest.mark.proof) for n in range(2, 40))])
def test_two_ranks_killed_while_the_cache_grows(tmp_path, seed):
    rng, kills = random.Random(seed), 0
    for end in (2, 3, 5, 6, None):
        cache = here(tmp_path, end_chunk=end)
        for kill in (rng.randrange(1, 9), rng.randrange(1, 9), None)[rng.randrange(3):]: # sometimes the epoch is finished before there is more, sometimes not
            if kill is None and end and rng.random() < .5: break
            kills += in_two_processes(lambda r: draw(cache.path, r, tmp_path), tmp_path, kill)
            settle(tmp_path)
    kills += in_two_processes(lambda r: draw(cache.path, r, tmp_path), tmp_path, None)
    settle(tmp_path)
    rows = {at: rows for r in (0, 1) for at, rows in map(json.loads, (tmp_path/f'rows{r}.jsonl').read_text().splitlines())}
    seen = [r for at in sorted(rows) for r in rows[at]]
    assert cache.complete and (kills or seed > 1) and len(seen) == len(set(seen)) == cache.num_rows//8*8

def test_verify_lists_everything_before_anything_stops_it(tmp_path):
    path = here(tmp_path).path
    (path/'packed_chunk_000001.pt').write_bytes(b'short')
    whole = (path/'packed_chunk_000003.pt').read_bytes()
    (path/'packed_chunk_000003.pt').write_bytes(whole[:600]+bytes([whole[600]^1])+whole[601:])
    (path/'packed_chunk_000005.pt').unlink()
    with pytest.raises(CacheError) as e: here(tmp_path, verify='full')
    assert '3 problems' in str(e.value) and 'packed_chunk_000001.pt has 5 bytes' in str(e.value) and 'packed_chunk_000003.pt was changed' in str(e.value) and '--mode inverse' in str(e.value)
    here(tmp_path, mode='inverse', verify='full')
    assert (path/'packed_chunk_000003.pt').read_bytes() == whole and (path/'packed_chunk_000005.pt').exists()
