"What breaks a cache at night: kills, full disks, flipped bits, two builders at once."
import errno, json, os, random, signal, subprocess, sys, time
from pathlib import Path
import numpy as np, pytest
from hypothesis import given, settings, strategies as st
from llmlab import config, files
from llmlab.data.corpora import Document, open_corpus
from llmlab.data.tokenizer import build_tokenizer
from llmlab.files import CacheError, hash_bytes, read_json, sweep, write_json
from llmlab.packing.cache import METADATA, build_cache, build_caches, bytes_per_token, cache_folder, chunk_name, deal, list_caches, open_cache, repair_caches, tokenize
from llmlab.packing.chunks import DamagedChunk, digest, read_chunk, squeeze, unsqueeze
from llmlab.packing.packer import pack

class Texts:
    "A corpus of given texts; every `every`-th is held out."
    def __init__(self, texts, every=5, name='texts'):
        self.texts, self.every, self.name, self.licence = list(texts), every, name, 'CC0-1.0'
        self.size_bytes = sum(len(t.encode()) for t in texts)
        self.fingerprint = hash_bytes(str(every), *texts)
    def all(self, start=0, stop=None):
        for i in range(start, len(self.texts)): yield Document(self.texts[i], self.name, i), 'validation' if i % self.every == 1 else 'train'
    def iterate(self, split): return (d for d, side in self.all() if side == split)

class Bytes:
    "A tokenizer with a vocabulary of any size."
    kind, engine, bos_id, eos_id, pad_id = 'byte', 'numpy', 257, 258, 256
    def __init__(self, vocab_size=262): self.vocab_size, self.fingerprint = vocab_size, f'byte-{vocab_size}'
    def encode_batch(self, texts): return [np.frombuffer(t.encode(), np.uint8).astype(np.uint16) for t in texts]
    def save(self, folder): write_json(Path(folder)/'tokenizer.json', {'kind': 'byte', 'vocab_size': self.vocab_size})

def some_texts(n=120, seed=0):
    r = random.Random(seed)
    return [' '.join(r.choice(['cat', 'dog', 'owl', 'sat', 'äpfel', 'and', 'ran']) for _ in range(int(r.lognormvariate(3, 1))+1)) for _ in range(n)]

def packing(folder, **more): return config.Packing(**dict(seq_len=32, chunk_rows=20, folder=str(folder)) | more)

def content(cache):
    "Everything on disk that must be the same again: all files, without the times."
    out = {p.name: p.read_bytes() for p in cache.path.iterdir() if p.name != METADATA and not p.name.startswith('.')} # (what a killed process left is swept by the next build)
    meta = read_json(cache.path/METADATA)
    for k in ('creation_time', 'last_updated', 'processing_time_hours', 'checksum'): meta.pop(k)
    return out | {METADATA: json.dumps(meta)}

@pytest.fixture(scope='module')
def reference(tmp_path_factory):
    return content(build_cache(Texts(some_texts()), Bytes(), packing(tmp_path_factory.mktemp('reference'))))

# --- what is in it

@settings(max_examples=25, deadline=None)
@given(texts=st.lists(st.text(st.characters(codec='utf-8'), max_size=80), min_size=1, max_size=40), seq_len=st.integers(2, 40), chunk_rows=st.integers(1, 12),
    strategy=st.sampled_from(['best_fit', 'concat']), codec=st.sampled_from(['lz4', 'none']))
def test_every_token_once(tmp_path_factory, texts, seq_len, chunk_rows, strategy, codec):
    corpus, tokenizer = Texts(texts), Bytes()
    cache = build_cache(corpus, tokenizer, packing(tmp_path_factory.mktemp('c'), seq_len=seq_len, chunk_rows=chunk_rows, strategy=strategy, codec=codec))
    docs = list(corpus.iterate('train'))
    assert cache.num_documents == len(docs) and cache.text_bytes == sum(len(d.text.encode()) for d in docs)
    assert cache.num_targets == sum(len(d.text.encode())+1 for d in docs)
    found = {}
    for i, c in enumerate(cache.chunks):
        p = cache.chunk(i)
        for r in range(p.num_rows):
            at = 0
            for s in range(*p.row_spans[r:r+2]):
                into = found.setdefault((i, int(p.document[s])), {})
                for j in range(p.length[s]):
                    token = int(p.tokens[r, at+j])
                    assert into.setdefault(int(p.start[s])+j, token) == token
                at += p.length[s]
    got = [[v[k] for k in range(len(v))] for _, v in sorted(found.items())]
    assert got == [[257, *d.text.encode(), 258] for d in docs]

@settings(max_examples=100, deadline=None)
@given(sizes=st.lists(st.integers(0, 30), max_size=50), chunk_bytes=st.integers(1, 60))
def test_plan_is_the_same_from_any_chunk_on(sizes, chunk_bytes):
    docs = [(Document('x'*n, 'x', i), 'train') for i, n in enumerate(sizes)]
    chunks = list(deal(docs, chunk_bytes))
    assert [d for c in chunks for d in c.documents] == docs and [c.last for c in chunks] == [False]*(len(chunks)-1)+[True]*bool(chunks)
    assert [c.start for c in chunks[1:]] == [c.stop for c in chunks[:-1]]
    for c in chunks[:-1]: assert sum(len(d.text) for d, _ in c.documents) >= chunk_bytes > sum(len(d.text) for d, _ in c.documents[:-1])
    for k, c in enumerate(chunks): assert list(deal(docs[c.start:], chunk_bytes, c.start)) == chunks[k:]

def test_one_huge_document(tmp_path):
    cache = build_cache(Texts(['so long '*130_000]), Bytes(), packing(tmp_path, seq_len=64, chunk_rows=100))
    assert len(cache.chunks) == 1 and cache.num_targets == 8*130_000+1 and cache.num_rows == -(-cache.num_targets//64)

def test_large_vocabulary_and_codec(tmp_path):
    big = build_cache(Texts(some_texts()), Bytes(70_000), packing(tmp_path))
    assert big.chunk(0).tokens.dtype == np.uint32
    a, b = (build_cache(Texts(some_texts()), Bytes(), packing(tmp_path, codec=c)) for c in ('lz4', 'none'))
    assert a.path != b.path and a.fingerprint == b.fingerprint and a.file_bytes < b.file_bytes

@settings(max_examples=50, deadline=None)
@given(st.integers(0, 3), st.integers(1, 3_000_000), st.sampled_from(['<u2', '<u4', '<i4']), st.sampled_from(['lz4', 'none']))
def test_squeeze_round_trip(seed, n, dtype, codec):
    array = np.random.default_rng(seed).integers(0, 9+seed*1000, n).astype(dtype)
    payload, blocks = squeeze(array, codec)
    np.testing.assert_array_equal(unsqueeze(payload, blocks, dtype, array.shape, codec), array)

def test_real_text_takes_less_than_two_bytes_a_token(tmp_path):
    corpus = open_corpus(config.Data(name='python', max_documents=60))
    for kind, vocab_size in (('byte', 262), ('bpe', 2048)):
        tokenizer = build_tokenizer(config.Tokenizer(kind=kind, vocab_size=vocab_size, train_megabytes=.5), corpus)
        cache = build_cache(corpus, tokenizer, config.Packing(seq_len=256, chunk_rows=1024, folder=str(tmp_path)))
        assert cache.file_bytes < 2*cache.num_tokens and cache.fill > .98, repr(cache)
        assert cache.num_documents == sum(1 for _ in corpus.iterate('train'))

def test_nothing_to_hold_out(tmp_path):
    cache = build_cache(Texts(['a', ]), Bytes(), packing(tmp_path), 'validation')
    assert cache.num_rows == 0 and cache.complete and not cache.verify()
    assert build_cache(Texts(['a']), Bytes(), packing(tmp_path), 'validation').num_rows == 0

# --- interruptions

def in_child(work, die=None):
    "Run `work` in a process of its own; `die(pid)` may kill it. Returns its exit status."
    pid = os.fork()
    if not pid:
        try: work()
        except BaseException: os._exit(1)
        os._exit(0)
    if die: die(pid)
    return os.waitpid(pid, 0)[1]

def dying_at(n):
    "Let this process be killed at its n-th step of writing, before or after the step itself."
    left = [n]
    def dangerous(f):
        def g(*a, **k):
            left[0] -= 1
            if left[0] == 0: os.kill(os.getpid(), signal.SIGKILL)
            out = f(*a, **k)
            left[0] -= 1
            if left[0] == 0: os.kill(os.getpid(), signal.SIGKILL)
            return out
        return g
    files.os = type('os', (), {k: getattr(os, k) for k in dir(os) if not k.startswith('__')})
    files.os.fsync, files.os.replace = map(lambda f: staticmethod(dangerous(f)), (os.fsync, os.replace))

def build(folder, n=None):
    if n: dying_at(n)
    return build_cache(Texts(some_texts()), Bytes(), packing(folder))

@pytest.mark.parametrize('n', [1, 2, 5, 6, 7, 8, 11, 14, 19, 27])
def test_killed_at_a_write_then_completed(tmp_path, reference, n):
    assert in_child(lambda: build(tmp_path, n)) == signal.SIGKILL
    cache = build(tmp_path)
    assert content(cache) == reference and not cache.verify()

def killed_at_random(folder, seed, reference):
    rng, kills = random.Random(seed), 0
    for _ in range(3):
        def die(pid):
            time.sleep(rng.uniform(0, .15))
            os.kill(pid, signal.SIGKILL)
        kills += in_child(lambda: build(folder), die) == signal.SIGKILL
        for m in folder.rglob(METADATA): # what is visible is sound at every moment
            assert not [p for p in open_cache(m.parent).verify() if 'not recorded' not in p.what]
    assert content(build(folder)) == reference
    return kills

def test_killed_at_random_then_completed(tmp_path, reference):
    for seed in range(4): killed_at_random(tmp_path/str(seed), seed, reference)

@pytest.mark.proof
def test_killed_hundreds_of_times(tmp_path, reference):
    kills = seed = 0
    while kills < 200:
        kills += killed_at_random(tmp_path/str(seed), seed, reference)
        seed += 1
    print(f'{kills} kills in {seed} builds')
    for n in range(1, 60):
        status = in_child(lambda: build(tmp_path/f'n{n}', n))
        assert content(build(tmp_path/f'n{n}')) == reference, (n, status)

def test_full_disk_keeps_what_is_complete(tmp_path, monkeypatch, reference):
    room = [3]
    def fsync(fd):
        room[0] -= 1
        if room[0] < 0: raise OSError(errno.ENOSPC, 'No space left on device')
        os_fsync(fd)
    os_fsync = os.fsync
    room[0] = 12
    with monkeypatch.context() as m:
        m.setattr(os, 'fsync', fsync)
        with pytest.raises(CacheError, match='the disk is full'): build(tmp_path)
    folder = next(tmp_path.rglob(METADATA)).parent
    partial = open_cache(folder)
    assert not partial.complete and not [p for p in partial.verify() if 'not recorded' not in p.what]
    times = {p.name: p.stat().st_mtime_ns for p in folder.glob('*.pt')}
    assert times
    cache = build(tmp_path)
    assert content(cache) == reference
    assert all((folder/f).stat().st_mtime_ns == t for f, t in times.items()) # nothing was made twice

def test_error_in_the_corpus_keeps_what_is_complete(tmp_path, reference):
    corpus = Texts(some_texts())
    whole = corpus.all
    def breaks(start=0):
        for d, side in whole(start):
            if d.index > 90: raise files.DataError('line 91: not UTF-8')
            yield d, side
    corpus.all = breaks
    with pytest.raises(files.DataError, match='line 91'): build_cache(corpus, Bytes(), packing(tmp_path))
    assert content(build(tmp_path)) == reference

# --- many builders

def both(folder, **more): return build_caches(Texts(some_texts()), Bytes(), packing(folder), **more)
def everything(folder): return {s: content(open_cache(cache_folder(Texts(some_texts()), Bytes(), packing(folder), s))) for s in ('train', 'validation')}

@pytest.fixture(scope='module')
def both_reference(tmp_path_factory):
    folder = tmp_path_factory.mktemp('both')
    both(folder)
    return everything(folder)

def start(work):
    "`work` in a process of its own."
    pid = os.fork()
    if not pid:
        try: work()
        except BaseException: os._exit(1)
        os._exit(0)
    return pid

def test_two_splits_are_those_built_alone(tmp_path, both_reference):
    for split in ('validation', 'train'): build_cache(Texts(some_texts()), Bytes(), packing(tmp_path), split)
    assert everything(tmp_path) == both_reference
    a, b = (json.loads(both_reference[s][METADATA]) for s in both_reference)
    assert a['plan'] == b['plan'] and a['totals']['documents']+b['totals']['documents'] == 120

def test_three_builders_at_once_divide_the_work(tmp_path, both_reference):
    said = tmp_path/'said'
    def slow(done): # who made how much, as text: one line for each chunk
        if done['status'] == 'building': time.sleep(.02)
    def work():
        made = []
        both(tmp_path, progress=lambda done: (slow(done), made.append(done.get('status')))[0])
        with open(said, 'a') as f: f.write(f'{len([m for m in made if m == "building"])}\n')
    pids = [start(work) for _ in range(3)]
    assert [os.waitpid(p, 0)[1] for p in pids] == [0, 0, 0] and everything(tmp_path) == both_reference
    assert len(said.read_text().split()) == 3

def test_ranges_in_any_order(tmp_path, both_reference):
    num = json.loads(both_reference['train'][METADATA])['total_chunks']
    for k in random.Random(0).sample(range(num), num):
        cache = both(tmp_path, start_chunk=k, end_chunk=k+1)['train']
        assert [c['chunk'] for c in cache.meta['chunks']].count(k) == 1 and not [p for p in cache.verify() if 'later ones were' not in p.what]
    assert both(tmp_path, start_chunk=num, end_chunk=num+9)['train'].complete # nobody had looked whether that was all
    assert everything(tmp_path) == both_reference

def test_a_range_uses_what_others_read(tmp_path, both_reference):
    "Documents before a known border are not read again."
    both(tmp_path, end_chunk=3)
    corpus, asked = Texts(some_texts()), []
    whole = corpus.all
    corpus.all = lambda start=0: (asked.append(start), whole(start))[1]
    build_caches(corpus, Bytes(), packing(tmp_path))
    assert asked == [json.loads(both_reference['train'][METADATA])['plan']['bounds'][3]] and everything(tmp_path) == both_reference

def test_without_locks_nothing_is_lost(tmp_path, monkeypatch, both_reference):
    from llmlab.packing import cache
    def refuse(*a): raise OSError(errno.ENOLCK, 'No locks available')
    monkeypatch.setattr(cache.fcntl, 'lockf', refuse)
    told = []
    pids = [start(lambda: both(tmp_path, progress=told.append)) for _ in range(2)]
    assert [os.waitpid(p, 0)[1] for p in pids] == [0, 0]
    both(tmp_path, progress=told.append) # records that one wrote over the other are found again from the files
    assert everything(tmp_path) == both_reference

def test_force_waits_for_nobody_and_disturbs_nobody(tmp_path):
    def slow(done): time.sleep(.02)
    pid = start(lambda: both(tmp_path, progress=slow))
    while not list(tmp_path.rglob('packed_chunk_*')): time.sleep(.005)
    with pytest.raises(CacheError, match='another process builds'): both(tmp_path, force=True)
    assert os.waitpid(pid, 0)[1] == 0 and both(tmp_path, force=True)['train'].complete

def test_a_text_that_changed_its_length_is_noticed(tmp_path):
    (both(tmp_path)['train'].path/chunk_name(1)).unlink()
    other = Texts([t+' more'*30 for t in some_texts()])
    other.fingerprint = Texts(some_texts()).fingerprint # a corpus that changed without saying so
    with pytest.raises(CacheError, match='did not see the same documents'): build_caches(other, Bytes(), packing(tmp_path))

class Real:
    "A corpus and a tokenizer that other processes can open."
    corpus = staticmethod(lambda: open_corpus(config.Data(name='stories', max_documents=600, validation_fraction=.1)))
    tokenizer = staticmethod(lambda: build_tokenizer(config.Tokenizer(kind='byte'), Real.corpus()))
    packing = staticmethod(lambda folder, workers: config.Packing(seq_len=64, chunk_rows=64, folder=str(folder), workers=workers))
    build = staticmethod(lambda folder, workers, **more: build_caches(Real.corpus(), Real.tokenizer(), Real.packing(folder, workers), **more))

def status(pid): # state, parent
    try: return Path(f'/proc/{pid}/stat').read_text().rpartition(')')[2].split()[:2]
    except OSError: return 'X', '0'
def children(pid): return [int(p.name) for p in Path('/proc').iterdir() if p.name.isdigit() and status(p.name)[1] == str(pid)]
def alive(pid): return status(pid)[0] not in 'XZ'

def test_workers_make_the_same_and_end_with_a_killed_parent(tmp_path):
    want = {s: content(c) for s, c in Real.build(tmp_path/'alone', 0).items()}
    code = f'from llmlab.packing.cache import *; from llmlab import config; from llmlab.data.corpora import open_corpus; from llmlab.data.tokenizer import build_tokenizer\n' \
        f'c = open_corpus(config.Data(name="stories", max_documents=600, validation_fraction=.1)); t = build_tokenizer(config.Tokenizer(kind="byte"), c)\n' \
        f'build_caches(c, t, config.Packing(seq_len=64, chunk_rows=64, folder={str(tmp_path/"many")!r}, workers=2))'
    p = subprocess.Popen([sys.executable, '-c', code])
    while not list((tmp_path/'many').rglob('packed_chunk_*')): time.sleep(.005); assert p.poll() is None
    workers = children(p.pid)
    p.kill(); p.wait()
    assert len(workers) >= 2
    deadline = time.monotonic()+30
    while any(map(alive, workers)):
        assert time.monotonic() < deadline, 'a worker outlives its parent'
        time.sleep(.05)
    assert {s: content(c) for s, c in Real.build(tmp_path/'many', 2).items()} == want

def test_a_worker_that_dies_is_said(tmp_path, monkeypatch):
    from llmlab.packing import cache
    monkeypatch.setattr(cache, '_start_worker', os._exit) # the worker ends before it begins
    with pytest.raises(CacheError, match='a process that tokenises has ended by itself'): Real.build(tmp_path, 2)
    monkeypatch.undo()
    assert Real.build(tmp_path, 0)['train'].complete

def killed_in_two(folder, rng, want):
    "Two builders; one or both are killed at some moment; then one finishes."
    pids = [start(lambda: both(folder)) for _ in range(2)]
    time.sleep(rng.uniform(0, .2))
    for p in rng.sample(pids, rng.choice([1, 1, 2])): os.kill(p, signal.SIGKILL)
    kills = sum(os.waitpid(p, 0)[1] == signal.SIGKILL for p in pids)
    for m in folder.rglob(METADATA): # what is visible is sound at every moment
        assert not [p for p in open_cache(m.parent).verify() if 'not recorded' not in p.what and 'later ones were' not in p.what]
    both(folder)
    assert everything(folder) == want
    return kills

def test_two_builders_killed(tmp_path, both_reference):
    rng = random.Random(5)
    assert sum(killed_in_two(tmp_path/str(i), rng, both_reference) for i in range(6)) > 0

@pytest.mark.proof
def test_two_builders_killed_two_hundred_times(tmp_path, both_reference):
    rng, kills, n = random.Random(6), 0, 0
    while kills < 200:
        kills += killed_in_two(tmp_path/str(n), rng, both_reference)
        n += 1
    print(f'{kills} kills in {n} builds by two processes')

# --- the inverse mode

def spoil(path, rng):
    "One of the things that happen to files."
    whole, how = path.read_bytes(), rng.choice(['gone', 'short', 'bit', 'empty', 'other'])
    if how == 'gone': path.unlink()
    elif how == 'short': path.write_bytes(whole[:rng.randrange(len(whole))])
    elif how == 'empty': path.write_bytes(b'')
    elif how == 'other': path.write_bytes(rng.randbytes(len(whole)))
    else:
        at = rng.randrange(len(whole))
        path.write_bytes(whole[:at]+bytes([whole[at]^(1 << rng.randrange(8))])+whole[at+1:])
    return how

@pytest.mark.parametrize('seed', range(4))
def test_a_tenth_of_the_chunks_is_mended(tmp_path, both_reference, seed):
    rng, caches = random.Random(seed), both(tmp_path)
    chunks = [(s, c.path/r['file']) for s, c in caches.items() for r in c.chunks]
    chosen = rng.sample(chunks, max(3, len(chunks)//10))
    untouched = {p: p.stat().st_mtime_ns for s, p in chunks if (s, p) not in chosen}
    for _, p in chosen: spoil(p, rng)
    for s, p in chosen: assert p.name in {q.file for q in caches[s].verify()}
    mended = repair_caches(Texts(some_texts()), Bytes(), packing(tmp_path))
    assert {(m.split, m.file) for m in mended} == {(s, p.name) for s, p in chosen} and everything(tmp_path) == both_reference
    assert all(p.stat().st_mtime_ns == t for p, t in untouched.items())
    records = {(s, r['file']): r['source'] for s, c in caches.items() for r in c.chunks}
    for m in mended: assert (m.start, m.stop) == tuple(records[m.split, m.file][k] for k in ('start', 'stop')) and 'made again' in str(m)
    assert repair_caches(Texts(some_texts()), Bytes(), packing(tmp_path)) == []

def test_gaps_of_an_unfinished_cache_are_closed_and_no_more(tmp_path, both_reference):
    for k in (4, 1): both(tmp_path, start_chunk=k, end_chunk=k+1)
    mended = repair_caches(Texts(some_texts()), Bytes(), packing(tmp_path))
    assert {(m.split, m.file) for m in mended} == {(s, chunk_name(k)) for s in ('train', 'validation') for k in (0, 2, 3)}
    cache = open_cache(cache_folder(Texts(some_texts()), Bytes(), packing(tmp_path)))
    assert [c['chunk'] for c in cache.chunks] == [0, 1, 2, 3, 4] and not cache.complete
    both(tmp_path)
    assert everything(tmp_path) == both_reference

def test_metadata_and_tokenizer_are_mended_too(tmp_path, both_reference):
    caches, rng = both(tmp_path), random.Random(2)
    meta, tokenizer = caches['train'].path/METADATA, caches['validation'].path/'tokenizer.json'
    meta.write_bytes(meta.read_bytes()[:-200]); tokenizer.write_text('{}')
    with pytest.raises(CacheError, match='--mode inverse'): both(tmp_path)
    with pytest.raises(CacheError, match='--mode inverse'): open_cache(tokenizer.parent)
    spoil(caches['train'].path/chunk_name(2), rng)
    mended = repair_caches(Texts(some_texts()), Bytes(), packing(tmp_path))
    assert [(m.split, m.file) for m in mended] == [('train', METADATA), ('validation', 'tokenizer.json'), ('train', chunk_name(2))]
    (caches['train'].path/f'{METADATA}.damaged').unlink()
    both(tmp_path)
    assert everything(tmp_path) == both_reference

def test_a_chunk_of_changed_text_is_not_mended(tmp_path):
    caches = both(tmp_path)
    other = Texts([t.upper() for t in some_texts()])
    other.fingerprint = Texts(some_texts()).fingerprint
    path = caches['train'].path/chunk_name(1)
    path.write_bytes(path.read_bytes()[:-1]+b'?')
    with pytest.raises(CacheError, match='no longer what they were'): repair_caches(other, Bytes(), packing(tmp_path))

# --- damage

def test_any_flipped_bit_of_a_chunk_is_found(tmp_path):
    cache, rng = build(tmp_path), random.Random(0)
    path = cache.path/chunk_name(1)
    whole, want = path.read_bytes(), digest(cache.chunk(1))
    for at in rng.sample(range(len(whole)), 150):
        path.write_bytes(whole[:at]+bytes([whole[at]^(1 << rng.randrange(8))])+whole[at+1:])
        with pytest.raises(DamagedChunk, match=path.name): cache.chunk(1)
        assert [p.file for p in cache.verify()] == [path.name]
        try: assert digest(read_chunk(path)[0]) == want # without the record the digest inside still guards the rows
        except DamagedChunk: pass

@pytest.mark.parametrize('keep', [0, 1, 100, .5, -1])
def test_truncated_chunk(tmp_path, keep):
    cache = build(tmp_path)
    path = cache.path/chunk_name(0)
    whole = path.read_bytes()
    path.write_bytes(whole[:int(len(whole)*keep) if isinstance(keep, float) else keep])
    for look in (lambda: open_cache(cache.path), lambda: build(tmp_path), lambda: cache.chunk(0)):
        with pytest.raises(DamagedChunk, match='packed_chunk_000000.pt has .* bytes .* --mode inverse') as e: look()
    assert cache.verify(full=False)
    path.unlink()
    assert build(tmp_path).verify() == [] and path.read_bytes() == whole # that chunk alone was made anew

def test_every_kind_of_damage_to_the_metadata_is_refused(tmp_path, reference):
    cache, rng = build(tmp_path), random.Random(1)
    path = cache.path/METADATA
    whole = path.read_bytes()
    damaged = [whole[:n] for n in (0, 1, 50, len(whole)-3)] + [b'[]', b'{}', b'null', b'\xff\xfe']
    damaged += [whole[:at]+bytes([whole[at]^(1 << rng.randrange(7))])+whole[at+1:] for at in rng.sample(range(len(whole)), 150)]
    for d in damaged:
        path.write_bytes(d)
        try: assert open_cache(cache.path).fingerprint == cache.fingerprint # a blank that became another blank
        except CacheError as e: assert str(path) in str(e)
    path.unlink()
    assert content(build(tmp_path)) == reference

def test_missing_chunks_are_made_again_and_must_be_the_same(tmp_path, reference):
    cache = build(tmp_path)
    for k in (0, 2): (cache.path/chunk_name(k)).unlink()
    with pytest.raises(DamagedChunk, match='packed_chunk_000000.pt is missing'): open_cache(cache.path)
    assert content(build(tmp_path)) == reference
    (cache.path/chunk_name(1)).unlink()
    other = Texts([t.upper() for t in some_texts()])
    other.fingerprint = Texts(some_texts()).fingerprint # a corpus that changed without saying so
    with pytest.raises(CacheError, match='no longer what they were'): build_cache(other, Bytes(), packing(tmp_path))
    assert not (cache.path/chunk_name(1)).exists()
    forced = build_cache(other, Bytes(), packing(tmp_path), force=True)
    assert forced.fingerprint != cache.fingerprint and forced.verify() == []

def test_a_sound_chunk_of_another_cache_is_not_taken_over(tmp_path, reference):
    other = build_cache(Texts(some_texts(seed=1)), Bytes(), packing(tmp_path/'other'))
    folder = cache_folder(Texts(some_texts()), Bytes(), packing(tmp_path))
    folder.mkdir(parents=True)
    for k in (0, 1): (folder/chunk_name(k)).write_bytes((other.path/chunk_name(k)).read_bytes())
    assert content(build(tmp_path)) == reference

def test_stray_files_and_tokenizer(tmp_path):
    cache = build(tmp_path)
    (cache.path/chunk_name(999)).write_bytes(b'?')
    (cache.path/'tokenizer.json').write_text('{}')
    assert [p.file for p in cache.verify()] == [chunk_name(999), 'tokenizer.json']

def mutated(whole, rng):
    "One of the things that disks, copies and people do to bytes."
    at, n = rng.randrange(len(whole)), rng.choice([1, 2, 7, 64, 4096])
    return rng.choice([
        lambda: whole[:at]+bytes([whole[at]^(1 << rng.randrange(8))])+whole[at+1:], # a flipped bit
        lambda: whole[:at],                                                         # cut short
        lambda: whole+rng.randbytes(n),                                             # something behind it
        lambda: whole[:at]+whole[at+n:],                                            # a piece missing
        lambda: whole[:at]+rng.randbytes(n)+whole[at:],                             # a piece too many
        lambda: whole[:at]+bytes(n)+whole[at+n:],                                   # zeros, as a hole in a file
        lambda: whole[:at]+whole[:n]+whole[at+n:],                                  # a piece of another place
        lambda: rng.randbytes(len(whole)),
        lambda: whole.replace(str(rng.randrange(10)).encode(), str(rng.randrange(10)).encode(), rng.randrange(3)+1), # another number
    ])()

def try_mutations(folder, count, seed):
    "Spoil one file of a cache at a time; nothing but a `CacheError` or the right rows may come of it. Gives how often which."
    rng, cache = random.Random(seed), both(folder, )['train']
    want, listed = [digest(cache.chunk(i)) for i in range(len(cache.chunks))], list_caches(folder)
    files_ = [*(cache.path/c['file'] for c in cache.chunks), *[cache.path/METADATA]*5, *[folder/'packed_sequences'/'cache_registry.json']*3, cache.path/'tokenizer.json']
    outcomes = {'refused': 0, 'right': 0}
    for _ in range(count):
        path = rng.choice(files_)
        whole = path.read_bytes()
        bad = mutated(whole, rng)
        path.write_bytes(bad)
        try:
            found = open_cache(cache.path)
            assert [digest(found.chunk(i)) for i in range(len(found.chunks))] == want
            problems = found.verify()
            assert problems or bad == whole or path.suffix == '.json' and json.loads(bad) == json.loads(whole), (path, 'not noticed') # (a blank that became another)
            if not path.name.startswith('cache_registry'): assert not problems
            outcomes['right'] += 1
        except CacheError as e:
            assert str(path) in str(e) and len(str(e)) > 40
            outcomes['refused'] += 1
        assert [e for e in list_caches(folder) if 'problem' not in e] == listed or path.name == METADATA
        path.write_bytes(whole)
    assert open_cache(cache.path).verify() == []
    return outcomes

def test_mutated_files(tmp_path): assert try_mutations(tmp_path, 200, 0)['refused'] > 100

@pytest.mark.proof
def test_ten_thousand_mutated_files(tmp_path): print(try_mutations(tmp_path, 10_000, 1))

# --- the right cache

def test_names_and_refusals(tmp_path):
    cache = build(tmp_path)
    assert cache.path.parent == tmp_path/'packed_sequences'/'32' and cache.path.name.startswith('texts-')
    assert Texts([], name='owner/data set').name and cache_folder(Texts([], name='owner/data set'), Bytes(), packing(tmp_path)).name.startswith('owner_data_set-')
    with pytest.raises(CacheError, match='another tokenizer'): open_cache(cache.path, Bytes(300))
    wrong = cache_folder(Texts(some_texts()), Bytes(), packing(tmp_path, chunk_rows=21))
    os.rename(cache.path, wrong)
    with pytest.raises(CacheError, match="its chunk_rows is 20, wanted is 21"): build_cache(Texts(some_texts()), Bytes(), packing(tmp_path, chunk_rows=21))
    assert build_cache(Texts(some_texts()), Bytes(), packing(tmp_path, chunk_rows=21), force=True).meta['params']['chunk_rows'] == 21

def test_several_caches_side_by_side_and_their_registry(tmp_path):
    made = [build_cache(Texts(some_texts()), Bytes(v), packing(tmp_path, seq_len=s), split) for v in (262, 300) for s in (16, 32) for split in ('train', 'validation')]
    assert len({c.path for c in made}) == len(made)
    registry = tmp_path/'packed_sequences'/'cache_registry.json'
    listed = read_json(registry)['available_caches']
    assert sorted(str(c.path.relative_to(registry.parent)) for c in made) == sorted(e['path'] for e in listed)
    assert {(e['path'], e['total_sequences']) for e in listed} == {(str(c.path.relative_to(registry.parent)), c.num_rows) for c in made}
    registry.unlink()
    assert build(tmp_path).complete # nothing depends on it
    (made[0].path/METADATA).write_text('{')
    assert sum('problem' in e for e in list_caches(tmp_path)) == 1

def test_finished_cache_is_opened_without_a_write(tmp_path):
    cache = build(tmp_path)
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob('*')}
    assert build(tmp_path).fingerprint == cache.fingerprint
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob('*')} == before

def test_progress_and_info(tmp_path):
    told = []
    cache = build_cache(Texts(some_texts()), Bytes(), packing(tmp_path), progress=told.append)
    assert [d['status'] for d in told][-1] == 'complete' and told[-1]['documents'] == cache.num_documents and told[-1]['text_bytes'] == cache.text_bytes
    assert all(a['text_bytes'] <= b['text_bytes'] for a, b in zip(told, told[1:]))
    info = cache.info()
    assert json.loads(json.dumps(info)) == info and info['total_sequences'] == cache.num_rows and info['fingerprint'] == cache.fingerprint
    assert [d['source']['stop'] for d in cache.chunks[:-1]] <= [d['source']['start'] for d in cache.chunks[1:]]

def test_tokens_do_not_depend_on_batches():
    docs = [Document(t, 'x', i) for i, t in enumerate(some_texts(30)+[''])]
    want = [a.tolist() for a in tokenize(docs, Bytes())]
    for batch in (1, 10, 500): assert [a.tolist() for a in tokenize(docs, Bytes(), batch=batch)] == want
    assert bytes_per_token([], Bytes()) == 1 and bytes_per_token([Document('', 'x', 0)], Bytes()) == 1
    assert bytes_per_token([Document('ä'*50, 'x', 0)], Bytes()) == round(100/102, 4)
