"A file of tokens is a cache like any other: every target once, every flipped bit found, no byte more in memory than a chunk takes."
import errno, json, pickle, tempfile, tracemalloc
from pathlib import Path
import numpy as np, pytest, torch
from hypothesis import assume, given, settings, strategies as st
from llmlab import config
from llmlab.data.corpora import open_corpus
from llmlab.data.tokenizer import train_tokenizer
from llmlab.files import CacheError, DataError, read_json, write_json
from llmlab.packing.bins import BINS, DamagedBins, bins_tokenizer, export_bins, find_bins, open_bins, read_layout, unpack
from llmlab.packing.cache import Cache, build_cache, build_caches
from llmlab.packing.loader import Loader, check_same, in_order
from llmlab.packing.packer import STRATEGIES, pack

tokenizer = train_tokenizer([], config.Tokenizer(kind='byte'))
EOS = tokenizer.eos_id

class Small:
    "A tokenizer of any size, without text."
    kind, engine, bos_id = 'byte', 'none', 1
    def __init__(self, vocab_size, eos_id=2, bos_id=1, pad_id=0): self.vocab_size, self.eos_id, self.bos_id, self.pad_id, self.fingerprint = vocab_size, eos_id, bos_id, pad_id, f'small-{vocab_size}-{bos_id}-{eos_id}'
    def save(self, folder): return write_json(Path(folder)/'tokenizer.json', {'vocab_size': self.vocab_size})

def put(folder, tokens, stored='<u2', name='train.bin', **about):
    "A folder with a file of tokens, and a config.json where there is something to say."
    folder.mkdir(exist_ok=True)
    np.asarray(tokens).astype(stored).tofile(folder/name)
    if about: write_json(folder/'config.json', about)
    return folder

def some_tokens(n, seed=0, every=11):
    ids = np.random.default_rng(seed).integers(0, 200, n)
    ids[np.random.default_rng(seed+1).random(n) < 1/every] = EOS
    return ids

def same_rows(a, b):
    for name in ('tokens', 'row_spans', 'length', 'document', 'start'): np.testing.assert_array_equal(getattr(a, name), getattr(b, name), name)

documents = st.lists(st.lists(st.integers(10, 99), max_size=30).map(lambda d: [1, *d, 2]), min_size=1, max_size=20)

# the rows

@settings(max_examples=150, deadline=None)
@given(documents, st.integers(1, 12), st.sampled_from(['uint16', 'uint32', 'int32', 'int64']))
def test_the_rows_are_those_of_concat(docs, seq_len, dtype):
    with tempfile.TemporaryDirectory() as d:
        bins = open_bins(put(Path(d), np.concatenate(docs), f'<{np.dtype(dtype).str[1:]}', dtype=dtype), 'train', seq_len, Small(100), chunk_rows=10_000)
        assert bins.num_documents == len(docs)
        same_rows(bins.chunk(0), pack([np.array(x, np.uint16) for x in docs], seq_len+1, 'concat'))

@settings(max_examples=150, deadline=None)
@given(documents, st.integers(1, 9), st.integers(1, 7), st.booleans())
def test_every_target_once_whatever_the_chunks(docs, seq_len, chunk_rows, ends):
    stream = np.concatenate(docs)[:None if ends else -1]
    assume(len(stream) > 1)
    with tempfile.TemporaryDirectory() as d:
        bins = open_bins(put(Path(d), stream), 'train', seq_len, Small(100), chunk_rows=chunk_rows)
        batches = list(in_order(bins, 3))
        there = torch.cat([b.document.reshape(-1) for b in batches]) >= 0                         # an input that is there
        follows = torch.cat([b.weights.reshape(-1) for b in batches]) > 0
        inputs, targets = (torch.cat([getattr(b, k).reshape(-1) for b in batches]) for k in ('tokens', 'targets'))
        np.testing.assert_array_equal(inputs[there][:len(stream)-1], stream[:-1])                 # (the stream's last token may stand where an input is)
        np.testing.assert_array_equal(targets[follows], stream[1:][stream[:-1] != 2])
        assert int(follows.sum()) == bins.num_targets == len(stream)-len(docs)
        packed = [bins.chunk(i) for i in range(len(bins.chunks))]
        assert [sum(getattr(p, k) for p in packed) for k in ('num_tokens', 'num_targets', 'num_rows')] == [bins.num_tokens, bins.num_targets, bins.num_rows]
        assert [len(p.length) for p in packed] == [c['spans'] for c in bins.chunks]

@settings(max_examples=100, deadline=None)
@given(documents, st.integers(1, 9), st.integers(1, 7))
def test_a_span_knows_its_place_in_its_document(docs, seq_len, chunk_rows):
    with tempfile.TemporaryDirectory() as d:
        bins = open_bins(put(Path(d), np.concatenate(docs)), 'train', seq_len, Small(100), chunk_rows=chunk_rows)
        at, places = 0, np.concatenate([np.arange(len(x)) for x in docs])
        for i, c in enumerate(bins.chunks):
            packed = bins.chunk(i)
            for r in range(packed.num_rows):
                row = np.concatenate([np.arange(s, s+n) for s, n in zip(packed.start, packed.length)][packed.row_spans[r]:packed.row_spans[r+1]])
                np.testing.assert_array_equal(row, places[at:at+seq_len+1])
                at += seq_len
            first = docs[c['source']['start']:c['source']['stop']]
            assert len(first) == c['source']['documents']

def test_without_borders_a_file_is_one_document(tmp_path):
    bins = open_bins(put(tmp_path/'a', some_tokens(1000), eos_id=None), 'train', 16, tokenizer, chunk_rows=5)
    assert (bins.num_documents, bins.num_targets) == (1, 999)
    assert all(b.one_document for b in in_order(bins, 4))

def test_it_says_whether_documents_begin_with_bos(tmp_path):
    for ids, bos_id in (([1, 5, 2, 1, 6, 2], 1), ([5, 2, 6, 2], None)): assert open_bins(put(tmp_path/'a', ids), 'train', 4, Small(9)).meta['params']['bos_id'] == bos_id

def test_the_loader_gives_every_target_once_an_epoch_on_any_number_of_ranks(tmp_path):
    stream = some_tokens(3000)
    bins = open_bins(put(tmp_path/'a', stream), 'train', 16, tokenizer, chunk_rows=7)
    rows = lambda loader, n: [r for _ in range(n) for r in next(loader).rows.tolist()]
    alone = rows(Loader(bins, 4, seed=3, workers=0), 48)
    assert sorted(alone[:bins.num_rows]) == list(range(bins.num_rows))
    halves = [rows(Loader(bins, 2, seed=3, rank=k, world=2, workers=1), 48) for k in (0, 1)]
    assert alone == [r for a, b in zip(*(np.reshape(h, (-1, 2)).tolist() for h in halves)) for r in a+b]
    one, many = Loader(bins, bins.num_rows, seed=1, workers=0), Loader(bins, 4, seed=1, workers=2)
    batch = next(one)
    assert sorted(batch.targets[batch.weights > 0].tolist()) == sorted(stream[1:][stream[:-1] != EOS].tolist())
    np.testing.assert_array_equal(torch.cat([next(many).tokens for _ in range(5)]), batch.tokens[:20])
    many.close()

def test_the_dtype_on_disk_is_not_what_the_rows_are(tmp_path):
    opened = [open_bins(put(tmp_path/d, some_tokens(500), f'<{np.dtype(d).str[1:]}', dtype=d), 'train', 16, tokenizer) for d in ('uint16', 'uint32', 'int32', 'int64')]
    assert len({b.fingerprint for b in opened}) == 1
    assert {b.chunk(0).tokens.dtype for b in opened} == {np.dtype('uint16')}
    large = open_bins(put(tmp_path/'large', [70_000, 3, 2, 69_999], '<i4', dtype='int32'), 'train', 16, Small(80_000))
    assert large.chunk(0).tokens.dtype == np.uint32 and large.chunk(0).tokens[0, :4].tolist() == [70_000, 3, 2, 69_999]

# what is wrong

@settings(max_examples=200, deadline=None)
@given(st.integers(0, 8*1200-1), st.sampled_from(['<u2', '<i4']))
def test_every_flipped_bit_is_found(bit, dtype):
    with tempfile.TemporaryDirectory() as d:
        folder = put(Path(d), some_tokens(1200*8//np.dtype(dtype).itemsize//8), dtype, dtype='uint16' if dtype == '<u2' else 'int32')
        bins, file = open_bins(folder, 'train', 16, tokenizer, chunk_rows=5), folder/'train.bin'
        content = bytearray(file.read_bytes())
        content[bit//8] ^= 1 << bit%8
        file.write_bytes(content)
        problems = bins.verify()
        assert problems and bins.verify(full=False) == []
        damaged = 0
        for i in range(len(bins.chunks)):
            try: bins.chunk(i)
            except DamagedBins: damaged += 1
        assert damaged == len(problems) and 1 <= damaged <= 2 # 2: the token that two chunks share
        try: assert open_bins(folder, 'train', 16, tokenizer, chunk_rows=5).fingerprint != bins.fingerprint
        except DamagedBins: pass # beyond the vocabulary

def test_a_file_cut_short_or_gone_after_it_was_opened(tmp_path):
    bins = open_bins(put(tmp_path/'a', some_tokens(1000)), 'train', 16, tokenizer, chunk_rows=10)
    content = bins.file.read_bytes()
    for size in (1999, 1998, 1000, 2, 0):
        bins.file.write_bytes(content[:size])
        with pytest.raises(DamagedBins, match='ends after'): bins.chunk(len(bins.chunks)-1)
        assert bins.verify() and bins.verify(full=False)
    bins.file.unlink()
    with pytest.raises(DamagedBins, match='is missing'): bins.chunk(0)
    assert [p.what for p in bins.verify()] == ['is missing']
    bins.file.write_bytes(content+b'more')
    assert bins.verify() == []

@pytest.mark.parametrize('tokens, dtype, message', [
    ([], '<u2', 'holds 0 tokens'), ([5], '<u2', 'holds 1 tokens'), ([1, 2, 300, 4, 400], '<u2', 'the id 300 at token 2'), (range(100, 250), '<i4', 'a 0 behind every number')])
def test_files_that_are_no_tokens(tmp_path, tokens, dtype, message):
    with pytest.raises(CacheError, match=message): open_bins(put(tmp_path/'a', list(tokens), dtype), 'train', 8, tokenizer)

def test_an_id_beyond_the_vocabulary_is_named_with_its_place(tmp_path):
    ids = some_tokens(5000)
    ids[3210], ids[4000] = -1, 262
    with pytest.raises(DamagedBins, match='the id -1 at token 3,210, beyond the vocabulary of 262'): open_bins(put(tmp_path/'a', ids, '<i4', dtype='int32'), 'train', 16, tokenizer, chunk_rows=8)
    ids[3210] = 0
    with pytest.raises(DamagedBins, match='the id 262 at token 4,000'): open_bins(put(tmp_path/'a', ids, '<i4', dtype='int32'), 'train', 16, tokenizer, chunk_rows=8)
    ids[4000] = 150
    with pytest.raises(DamagedBins, match='beyond the vocabulary of 150'): open_bins(put(tmp_path/'a', ids, '<i4', dtype='int32', vocab_size=150, eos_id=3), 'train', 16, tokenizer)

@pytest.mark.parametrize('rest', [1, 2, 3])
def test_a_size_that_is_no_whole_number_of_tokens(tmp_path, rest):
    folder = put(tmp_path/'a', some_tokens(100), '<i4', dtype='int32')
    (folder/'train.bin').write_bytes((folder/'train.bin').read_bytes()+b'\0'*rest)
    with pytest.raises(DamagedBins, match=f'100 tokens of int32 and {rest} bytes more'): open_bins(folder, 'train', 8, tokenizer)
    assert open_bins(folder, 'train', 8, tokenizer, chunk_rows=2, partial=True).num_rows == 12 # its last token is on its way

def test_two_names_for_one_split(tmp_path):
    folder = put(put(tmp_path/'a', some_tokens(100)), some_tokens(100), name='train_tokens.bin')
    with pytest.raises(CacheError, match='which one is the train split'): find_bins(folder, 'train')
    with pytest.raises(CacheError, match='has no val_tokens.bin or val.bin'): open_bins(folder, 'validation', 8, tokenizer)

anything = st.one_of(st.none(), st.booleans(), st.integers(-5, 300), st.text(max_size=6), st.floats(allow_nan=False, allow_infinity=False), st.lists(st.integers(), max_size=2), st.sampled_from(['uint16', 'int32', 'bfloat16']))

@settings(max_examples=200, deadline=None)
@given(st.one_of(anything, st.dictionaries(st.sampled_from(['dtype', 'vocab_size', 'eos_id', 'bos_id', 'format', 'tokens', 'tokenizer', 'corpus']), anything)))
def test_any_config_beside_it_is_used_or_refused(said):
    with tempfile.TemporaryDirectory() as d:
        folder = put(Path(d), some_tokens(200))
        write_json(folder/'config.json', said)
        try: bins = open_bins(folder, 'train', 8, tokenizer, chunk_rows=5)
        except CacheError: return
        assert bins.num_targets == 200-bins.num_documents and bins.verify() == []

@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=400), st.sampled_from(['uint16', 'int32', 'int64']), st.integers(1, 20), st.integers(1, 9))
def test_any_bytes_are_read_or_refused(content, dtype, seq_len, chunk_rows):
    with tempfile.TemporaryDirectory() as d:
        (Path(d)/'val.bin').write_bytes(content)
        write_json(Path(d)/'config.json', dict(dtype=dtype))
        try: bins = open_bins(d, 'validation', seq_len, Small(1<<16), chunk_rows=chunk_rows)
        except CacheError: return
        assert sum(b.num_targets for b in in_order(bins, 4)) == bins.num_targets

# growth

@settings(max_examples=100, deadline=None)
@given(st.integers(1, 250), st.integers(0, 100), st.integers(1, 9), st.integers(2, 7))
def test_a_row_never_moves(n, more, seq_len, chunk_rows):
    stream = some_tokens(350)
    with tempfile.TemporaryDirectory() as d:
        def at(n, **how):
            try: return open_bins(put(Path(d), stream[:n]), 'train', seq_len, tokenizer, chunk_rows=chunk_rows, **how)
            except CacheError: return None
        before = at(n, partial=True)
        if before is None: assert n <= seq_len*chunk_rows; return
        early = [before.chunk(i) for i in range(len(before.chunks))]
        for after in (at(n+more, partial=True), at(n+more)): # still being written, or finished
            check_same(after, before.info())
            assert after.num_rows >= before.num_rows
            for i, packed in enumerate(early): same_rows(packed, after.chunk(i))

def test_training_goes_on_in_a_longer_file_with_every_row_once(tmp_path):
    stream = some_tokens(6000)
    early = open_bins(put(tmp_path/'a', stream[:3000]), 'train', 16, tokenizer, chunk_rows=10, partial=True)
    loader, seen = Loader(early, 4, seed=0, workers=0), []
    for _ in range(20): seen += next(loader).rows.tolist()
    state = json.loads(json.dumps(loader.state_dict()))
    later = open_bins(put(tmp_path/'a', stream), 'train', 16, tokenizer, chunk_rows=10)
    loader = Loader(later, 4, seed=0, workers=0)
    loader.load_state_dict(state)
    while len(seen) < later.num_rows: seen += next(loader).rows.tolist()
    assert sorted(seen[:later.num_rows]) == list(range(later.num_rows)) and later.num_rows == 375

def test_what_is_no_growth_is_refused(tmp_path):
    stream = some_tokens(3000)
    then = open_bins(put(tmp_path/'a', stream), 'train', 16, tokenizer, chunk_rows=10).info() # finished, with a short last chunk
    with pytest.raises(CacheError, match='fingerprint'): check_same(open_bins(put(tmp_path/'a', some_tokens(4000)), 'train', 16, tokenizer, chunk_rows=10), then)
    longer = open_bins(put(tmp_path/'a', np.concatenate([stream, stream])), 'train', 16, tokenizer, chunk_rows=10)
    with pytest.raises(CacheError, match='fingerprint'): check_same(longer, then)
    with pytest.raises(CacheError, match='shrank'): check_same(open_bins(put(tmp_path/'a', stream[:2000]), 'train', 16, tokenizer, chunk_rows=10), then)
    with pytest.raises(CacheError, match='fingerprint'): check_same(open_bins(put(tmp_path/'a', stream, eos_id=7), 'train', 16, tokenizer, chunk_rows=10), then)

def test_memory_does_not_grow_with_the_file(tmp_path):
    (tmp_path/'a').mkdir()
    with open(tmp_path/'a'/'train.bin', 'wb') as f: f.truncate(1 << 29) # a sparse file: 268 million tokens of id 0
    write_json(tmp_path/'a'/'config.json', dict(dtype='uint16'))
    tracemalloc.start()
    bins = open_bins(tmp_path/'a', 'train', 256, tokenizer, chunk_rows=2048)
    bins.chunk(len(bins.chunks)//2)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert bins.num_targets == (1 << 28)-1 and peak < 16e6, peak

# the tokenizer

def test_the_tokenizer_is_the_one_that_is_set_else_the_one_beside(tmp_path):
    from tokenizers import Tokenizer as HF, models
    folder = put(tmp_path/'a', some_tokens(100))
    (folder/'meta.pkl').write_bytes(b'cos\nsystem\n(S\'touch hacked\'\ntR.')
    with pytest.raises(DataError, match='meta.pkl is not read'): bins_tokenizer(folder, config.Tokenizer())
    HF(models.WordLevel({'a': 0, 'b': 1, '<|endoftext|>': 2}, unk_token='a')).save(str(folder/'tokenizer.json'))
    assert bins_tokenizer(folder, config.Tokenizer()).kind == 'hf'
    path = tokenizer.save(tmp_path/'t')
    assert bins_tokenizer(folder, config.Tokenizer(kind='byte', path=str(path))).fingerprint == tokenizer.fingerprint

# export

packing = lambda folder, **more: config.Packing(**dict(seq_len=32, chunk_rows=20, folder=str(folder), workers=0) | more)
stories = open_corpus(config.Data(name='stories', max_documents=60, validation_fraction=.1))

@settings(max_examples=200, deadline=None)
@given(documents, st.integers(2, 12), st.sampled_from(STRATEGIES))
def test_unpack_undoes_packing(docs, row_tokens, strategy):
    packed = pack([np.array(d, np.uint16) for d in docs], row_tokens, strategy)
    np.testing.assert_array_equal(unpack(packed), np.concatenate(docs))

@pytest.mark.parametrize('strategy', STRATEGIES)
def test_a_cache_goes_out_and_comes_back(tmp_path, strategy):
    caches = build_caches(stories, tokenizer, packing(tmp_path, strategy=strategy))
    folder = export_bins(caches, tmp_path/'out', tokenizer)
    for split, cache in caches.items():
        framed = [[tokenizer.bos_id, *t.tolist(), EOS] for t in tokenizer.encode_batch([d.text for d in stories.iterate(split)])]
        assert np.fromfile(folder/BINS[split][0], '<u2').tolist() == [i for d in framed for i in d]
        back = open_bins(folder, split, 32, tokenizer, chunk_rows=20)
        assert (back.num_documents, back.num_targets) == (cache.num_documents, cache.num_targets)
        assert [back.info()[k] for k in ('dataset_name', 'split', 'corpus', 'tokenizer')] == [cache.info()[k] for k in ('dataset_name', 'split', 'corpus', 'tokenizer')]
        def targets(c): return sorted(t for b in in_order(c, 8) for t in b.targets[b.weights > 0].tolist())
        assert targets(back) == targets(cache)

def test_a_cache_of_one_chunk_comes_back_row_for_row(tmp_path):
    cache = build_cache(stories, tokenizer, packing(tmp_path, strategy='concat', chunk_rows=100_000))
    back = open_bins(export_bins({'train': cache}, tmp_path/'out', tokenizer), 'train', 32, tokenizer)
    assert len(cache.chunks) == len(back.chunks) == 1
    same_rows(back.chunk(0), cache.chunk(0))

def test_the_same_tokens_give_the_same_bytes_whatever_the_rows(tmp_path):
    def out(name, **how):
        folder = export_bins(build_caches(stories, tokenizer, packing(tmp_path/name, **how)), tmp_path/name/'out', tokenizer)
        return {p.name: p.read_bytes() for p in folder.iterdir()}
    a, b, c = out('a'), out('b'), out('c', strategy='concat', seq_len=64, codec='none')
    assert a == b and [k for k in a if a[k] != c[k]] == ['config.json'] # it names the caches

class InMemory(Cache):
    "A cache of given documents."
    def __init__(self, chunks, tokenizer, row_tokens=6):
        self.packed = [pack([np.array(d, np.uint16 if tokenizer.vocab_size <= 1<<16 else np.uint32) for d in docs], row_tokens) for docs in chunks]
        records = [dict(chunk=i, rows=p.num_rows, tokens=p.num_tokens, targets=p.num_targets, text_bytes=0, file_bytes=0, digest='', source=dict(documents=len(docs))) for i, (p, docs) in enumerate(zip(self.packed, chunks))]
        super().__init__('memory', dict(dataset_name='memory', dataset_license=None, status='complete', chunks=records, fingerprint=dict(tokenizer=tokenizer.fingerprint, corpus='c'),
            params=dict(seq_len=row_tokens-1, dtype='uint16' if tokenizer.vocab_size <= 1<<16 else 'uint32')))
    def chunk(self, i, into=None): return self.packed[i]

@settings(max_examples=100, deadline=None)
@given(st.lists(st.lists(st.lists(st.integers(10, 99), max_size=12), max_size=6), min_size=1, max_size=4), st.sampled_from([(1, 2), (2, 2)]), st.sampled_from([100, 100_000]), st.integers(1, 6), st.integers(1, 5))
def test_round_trip_of_any_documents(chunks, ends, vocab_size, seq_len, chunk_rows):
    "Also where BOS and EOS are one token, as in GPT-2, and where documents are empty, and in 32 bits."
    small = Small(vocab_size, bos_id=ends[0], eos_id=ends[1])
    chunks = [[[small.bos_id, *d, small.eos_id] for d in c] for c in chunks]
    docs = [d for c in chunks for d in c]
    with tempfile.TemporaryDirectory() as d:
        if not docs:
            with pytest.raises(CacheError, match='no rows'): export_bins({'train': InMemory(chunks, small)}, Path(d)/'out', small)
            return
        folder = export_bins({'train': InMemory(chunks, small), 'validation': None}, Path(d)/'out', small)
        assert sorted(p.name for p in folder.iterdir()) == ['config.json', 'tokenizer.json', 'train_tokens.bin']
        back = open_bins(folder, 'train', seq_len, small, chunk_rows=chunk_rows)
        assert back.num_documents == len(docs)
        got = torch.cat([b.targets[b.weights > 0] for b in in_order(back, 3)]).tolist()
        assert got == [t for x in docs for t in x[1:]]

def test_an_export_is_whole_or_not_there(tmp_path, monkeypatch):
    caches = build_caches(stories, tokenizer, packing(tmp_path))
    first = {p.name: p.read_bytes() for p in export_bins(caches, tmp_path/'out', tokenizer).iterdir()}
    chunk, calls = Cache.chunk, []
    def full(self, i, into=None):
        calls.append(i)
        if len(calls) > 2: raise OSError(errno.ENOSPC, 'no space')
        return chunk(self, i, into)
    monkeypatch.setattr(Cache, 'chunk', full)
    for folder in (tmp_path/'out', tmp_path/'new'):
        calls.clear()
        with pytest.raises(CacheError, match='disk is full'): export_bins(caches, folder, tokenizer)
    assert {p.name: p.read_bytes() for p in (tmp_path/'out').iterdir()} == first
    assert not (tmp_path/'new').exists() and not list(tmp_path.glob('.*tmp'))

def test_an_export_harms_nothing(tmp_path):
    caches = build_caches(stories, tokenizer, packing(tmp_path/'cache'))
    def refused(folder, match, caches=caches, t=tokenizer):
        with pytest.raises(CacheError, match=match): export_bins(caches, folder, t)
    (tmp_path/'mine').mkdir()
    export_bins(caches, tmp_path/'mine', tokenizer) # empty: fine
    (tmp_path/'mine'/'thesis.txt').write_text('years')
    refused(tmp_path/'mine', 'something else')
    assert (tmp_path/'mine'/'thesis.txt').read_text() == 'years'
    refused(put(tmp_path/'older', some_tokens(9), name='train_tokens.bin', dtype='uint16'), 'something else') # not ours
    refused(put(tmp_path/'bare', some_tokens(9), name='train_tokens.bin'), 'config.json does not exist')
    (tmp_path/'file').write_text('')
    refused(tmp_path/'file', 'something else')
    refused(tmp_path/'new', 'another tokenizer', t=Small(262))
    out = export_bins(caches, tmp_path/'out', tokenizer)
    refused(tmp_path/'new', 'tokens already', caches={'train': open_bins(out, 'train', 32, tokenizer)})
    with pytest.raises(CacheError, match='another tokenizer'): open_bins(out, 'train', 32, Small(262))

def test_a_cut_copy_or_an_edited_config_of_ours_is_refused(tmp_path):
    out = export_bins(build_caches(stories, tokenizer, packing(tmp_path)), tmp_path/'out', tokenizer)
    file, about = out/'train_tokens.bin', read_json(out/'config.json')
    file.write_bytes(file.read_bytes()[:-2000])
    with pytest.raises(DamagedBins, match='tokens, where'): open_bins(out, 'train', 32, tokenizer)
    write_json(out/'config.json', about | {'eos_id': 3})
    with pytest.raises(CacheError, match='was changed after it was written'): open_bins(out, 'train', 32, tokenizer)

def test_nanogpt_reads_it(tmp_path):
    folder = export_bins(build_caches(stories, tokenizer, packing(tmp_path)), tmp_path/'out', tokenizer)
    def get_batch(split, block_size=48, batch_size=5): # as in nanoGPT's train.py
        data = np.memmap(folder/f'{split}_tokens.bin', dtype=np.uint16, mode='r')
        ix = torch.randint(len(data)-block_size, (batch_size,))
        x = torch.stack([torch.from_numpy((data[i:i+block_size]).astype(np.int64)) for i in ix])
        y = torch.stack([torch.from_numpy((data[i+1:i+1+block_size]).astype(np.int64)) for i in ix])
        return x, y
    for split, which in (('train', 'train'), ('val', 'validation')):
        x, y = get_batch(split)
        assert x.shape == y.shape == (5, 48) and torch.equal(x[:, 1:], y[:, :-1]) and int(x.max()) < tokenizer.vocab_size
        text = '<|bos|>'.join(['']+[d.text+'<|eos|>' for d in stories.iterate(which)])
        assert all(tokenizer.decode(row, skip_special=False) in text for row in x)
