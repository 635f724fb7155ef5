"What breaks a cache at night: kills, full disks, flipped bits, two builders at once."
import errno, json, os, random, signal, threading, time
from pathlib import Path
import numpy as np, pytest
from hypothesis import given, settings, strategies as st
from llmlab import config, files
from llmlab.data.corpora import Document, open_corpus
from llmlab.data.tokenizer import build_tokenizer
from llmlab.files import CacheError, hash_bytes, read_json, sweep, write_json
from llmlab.packing.cache import (ARRAYS, METADATA, DamagedChunk, build_cache, bytes_per_token, cache_folder, chunk_name, deal, digest, list_caches,
    open_cache, read_chunk, squeeze, tokenize, unsqueeze)
from llmlab.packing.packer import pack

class Texts:
    "A corpus of given texts; every `every`-th is held out."
    def __init__(self, texts, every=5, name='texts'):
        self.texts, self.every, self.name, self.licence = list(texts), every, name, 'CC0-1.0'
        self.size_bytes = sum(len(t.encode()) for t in texts)
        self.fingerprint = hash_bytes(str(every), *texts)
    def iterate(self, split, start=0):
        for i in range(start, len(self.texts)):
            if (i % self.every == 1) == (split == 'validation'): yield Document(self.texts[i], self.name, i)

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
    out = {p.name: p.read_bytes() for p in cache.path.iterdir() if p.name not in (METADATA, '.lock')}
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
    docs = [Document('x'*n, 'x', i) for i, n in enumerate(sizes)]
    chunks = list(deal(docs, chunk_bytes))
    assert [d for c in chunks for d in c] == docs
    for c in chunks[:-1]: assert sum(len(d.text) for d in c) >= chunk_bytes > sum(len(d.text) for d in c[:-1])
    for k, c in enumerate(chunks): assert list(deal(docs[c[0].index:], chunk_bytes)) == chunks[k:]

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
    assert not partial.complete and 0 < len(partial.chunks) and not [p for p in partial.verify() if 'not recorded' not in p.what]
    times = {c['file']: (folder/c['file']).stat().st_mtime_ns for c in partial.chunks}
    cache = build(tmp_path)
    assert content(cache) == reference
    assert all((folder/f).stat().st_mtime_ns == t for f, t in times.items()) # nothing was made twice

def test_error_in_the_corpus_keeps_what_is_complete(tmp_path, reference):
    corpus = Texts(some_texts())
    whole = corpus.iterate
    def breaks(split, start=0):
        for d in whole(split, start):
            if d.index > 90: raise files.DataError('line 91: not UTF-8')
            yield d
    corpus.iterate = breaks
    with pytest.raises(files.DataError, match='line 91'): build_cache(corpus, Bytes(), packing(tmp_path))
    assert content(build(tmp_path)) == reference

def test_two_builders_at_once(tmp_path, reference):
    told = []
    def slow(done):
        if done['status'] == 'building': time.sleep(.05)
    pid = os.fork()
    if not pid:
        try: build_cache(Texts(some_texts()), Bytes(), packing(tmp_path), progress=slow)
        except BaseException: os._exit(1)
        os._exit(0)
    while not list(tmp_path.rglob('packed_chunk_*')): time.sleep(.005)
    cache = build_cache(Texts(some_texts()), Bytes(), packing(tmp_path), progress=told.append)
    assert os.waitpid(pid, 0)[1] == 0
    assert told[0] == {'status': 'waiting'} and content(cache) == reference

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
        with pytest.raises(DamagedChunk, match='packed_chunk_000000.pt has .* bytes .* Delete that file') as e: look()
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
