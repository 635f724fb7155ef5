"The order is a pure function of seed and position; nothing of how the work is divided can be seen in it."
import contextlib, gc, json, threading, time
import numpy as np, pytest, torch
import llmlab.packing.loader
from llmlab import config
from llmlab.data.corpora import open_corpus
from llmlab.data.tokenizer import build_tokenizer
from hypothesis import given, settings, strategies as st
from torch.testing import assert_close
from llmlab.files import CacheError, hash_json
from llmlab.packing.cache import DamagedChunk, build_cache, digest
from llmlab.packing.loader import Batch, Loader, Reader, Transport, as_window, assemble, fill, in_order, join_batches
from llmlab.packing.order import Order, permutation
from llmlab.packing.packer import pack

class InMemory:
    "What the loader needs of a cache, with chunks of given numbers of documents."
    def __init__(self, documents_in_chunk, seq_len=7, seed=0, longest=20, strategy='best_fit'):
        rng = np.random.default_rng(seed)
        docs = lambda n: [rng.integers(1, 50, rng.integers(2, longest)).astype(np.uint16) for _ in range(n)]
        self.hold([pack(docs(n), seq_len+1, strategy) for n in documents_in_chunk], seq_len)
    def hold(self, packed, seq_len):
        self.packed, self.seq_len, self.path = packed, seq_len, 'memory'
        self.offsets = np.cumsum([0, *(p.num_rows for p in self.packed)])
        self.num_rows, self.num_targets = int(self.offsets[-1]), sum(p.num_targets for p in self.packed)
        self.meta = dict(split='train', dataset_name='memory', params=dict(chunk_rows=10, dtype='uint16'))
        self.fingerprint, self.decoded = self.fingerprint_of(len(packed)), []
        return self
    def head(self, n): return InMemory.__new__(InMemory).hold(self.packed[:n], self.seq_len) # the cache when it had n chunks
    def fingerprint_of(self, n): return hash_json([digest(p) for p in self.packed[:n]])
    def chunk(self, i, into=None):
        self.decoded.append(i)
        p = self.packed[i]
        if into is not None: into[:] = p.tokens
        return p
    def info(self):
        return dict(sequence_length=self.seq_len, tokenizer='t', total_chunks=len(self.packed), total_sequences=self.num_rows, fingerprint=self.fingerprint, path='memory')

def rows_of(loader, n): return [r for _ in range(n) for r in next(loader).rows.tolist()]
def same(a, b):
    assert (a.num_targets, a.one_document) == (b.num_targets, b.one_document)
    for k in ('tokens', 'targets', 'weights', 'document', 'rows'): assert_close(getattr(a, k), getattr(b, k), rtol=0, atol=0)

chunks = st.lists(st.integers(1, 8), min_size=1, max_size=6)

# --- batches

def plain(packed, row, T):
    "The same batch, one token at a time."
    tokens, targets, weights, document = ([0]*T for _ in range(4))
    owner, number = [-1]*(T+1), 0
    at = 0
    for number, s in enumerate(range(*packed.row_spans[row:row+2])):
        for _ in range(packed.length[s]): owner[at] = number; at += 1
    for t in range(T):
        tokens[t], targets[t] = int(packed.tokens[row, t]), int(packed.tokens[row, t+1])
        document[t] = owner[t]
        weights[t] = float(owner[t] >= 0 and owner[t] == owner[t+1])
    return tokens, targets, weights, document

@settings(max_examples=150, deadline=None)
@given(seed=st.integers(0, 1000), T=st.integers(2, 30), longest=st.sampled_from([3, 10, 80]), strategy=st.sampled_from(['best_fit', 'concat']), dtype=st.sampled_from([np.uint16, np.uint32]))
def test_assembled_as_one_would_by_hand(seed, T, longest, strategy, dtype):
    rng = np.random.default_rng(seed)
    packed = pack([rng.integers(1, 60_000, rng.integers(2, longest)).astype(dtype) for _ in range(12)], T+1, strategy, pad_id=7)
    index = rng.integers(0, packed.num_rows, 5)
    b = assemble(as_window(packed, 100), index)
    want = [plain(packed, r, T) for r in index]
    for k, name in enumerate(('tokens', 'targets', 'weights', 'document')):
        assert_close(getattr(b, name), torch.tensor([w[k] for w in want], dtype=torch.float32 if name == 'weights' else torch.int64), rtol=0, atol=0)
        assert getattr(b, name).is_contiguous()
    assert b.num_targets == int(b.weights.sum()) and b.rows.tolist() == (index+100).tolist()
    assert b.one_document == (int(b.document.max()) == 0 and all(packed.row_spans[r+1]-packed.row_spans[r] == 1 for r in index))

def test_batch_counts_its_own_targets_and_moves():
    t = torch.ones(2, 3, dtype=torch.int64)
    b = Batch(t, t, torch.tensor([[1., 0, 1], [0, 0, 1]]), t*0)
    assert b.num_targets == 3 and b.rows is None
    moved = b.to('meta')
    assert moved.tokens.device.type == moved.weights.device.type == 'meta' and moved.num_targets == 3

def with_extras(n, start=0, **kw):
    t = torch.arange(start, start+3*n).view(n, 3)
    return Batch(t, t+1, torch.ones(n, 3), t*0, extras={'pixel_values': t[:, :1, None]*torch.ones(1, 2, 2), 'flags': t[:, 0] > 3}, **kw)

def test_extras_go_wherever_a_batch_goes():
    b = with_extras(2, rows=torch.tensor([4, 5]), place=7)
    assert len(b.tensors) == 6 and b.to('meta').extras['flags'].is_meta and b.to('meta').place == 7
    assert [t.data_ptr() for t in b.with_tensors(b.tensors).tensors] == [t.data_ptr() for t in b.tensors] and list(b.with_tensors(b.tensors).extras) == ['pixel_values', 'flags']
    with pytest.raises(ValueError): b.with_tensors(b.tensors[:-1])
    whole = join_batches([b, with_extras(3, 6, rows=torch.tensor([1, 2, 3]))])
    assert_close(whole.extras, with_extras(5).extras)
    buffer = fill(None, b, pinned=False)
    assert_close(buffer.extras, b.extras)
    again = fill(buffer, with_extras(2, 50), pinned=False) # of the same shapes: the same memory
    assert [t.data_ptr() for t in again.tensors] == [t.data_ptr() for t in buffer.tensors] and again.extras['pixel_values'][0, 0, 0] == 50
    other = with_extras(2, 50)
    other.extras['pixel_values'] = torch.zeros(2, 5, 2)
    assert fill(buffer, other, pinned=False).extras['pixel_values'].shape == (2, 5, 2)
    assert_close(Transport('cpu').receive(*Transport('cpu').send(b)).extras, b.extras)

class Counting(InMemory):
    "A source that reads itself: a row is made when it is asked for, and brings something of its own."
    def __init__(self, *a, **kw):
        super().__init__(*a, **kw)
        self.readers = []
    def reader(self, order, threads, ahead):
        class Own:
            closed = 0
            def batch(_, start, count, place=None):
                rows = torch.cat([torch.from_numpy(index) for _, index in order.parts(start, count)]) # (one chunk)
                return Batch(rows[:, None], rows[:, None]+1, torch.ones(count, 1), rows[:, None]*0, rows, place=place, extras={'twice': 2.*rows})
            def close(own): own.closed += 1
        self.readers.append((Own(), threads, ahead))
        return self.readers[-1][0]

@pytest.mark.parametrize('workers', [0, 1])
@pytest.mark.parametrize('world', [1, 2])
def test_a_source_that_brings_its_own_reader(world, workers):
    "Order, ranks and resume are those of the loader."
    source = Counting([40])
    start = lambda: [Loader(source, 2, seed=3, rank=r, world=world, workers=workers) for r in range(world)]
    ranks, n = start(), source.num_rows
    drawn = {}
    while ranks[0].position < 2*n: drawn |= {b.place+i: int(r) for b in map(next, ranks) for i, r in enumerate(b.extras['twice']/2)}
    for e in (0, 1): assert sorted(drawn[p] for p in range(e*n, (e+1)*n)) == list(range(n))
    again = start()
    for loader in again:
        loader.load_state_dict(ranks[0].state_dict())
        assert source.readers[-1][1:] == (1, workers > 0)
    for _ in range(3):
        for a, b in zip(ranks, again): same(next(a), next(b))
    for loader in ranks+again: loader.close()
    assert all(own.closed for own, *_ in source.readers)
    assert torch.cat([b.rows for b in in_order(source, 7)]).tolist() == list(range(n)) and not source.decoded

# --- order

def test_permutation_stays_what_it_is():
    assert [permutation(n, 0).tolist() for n in (0, 1, 2, 3)] == [[], [0], [1, 0], [1, 2, 0]]
    assert permutation(10, 1337, 0).tolist() == [8, 7, 5, 4, 0, 6, 9, 2, 1, 3]
    assert hash_json(permutation(100_000, 1, 2, 3).tolist()) == '7246f1995882913676b3c5fbb9b75f4d'

def test_permutation_is_a_good_one():
    n = 20_000
    p, q = permutation(n, 1, 0), permutation(n, 1, 1)
    assert (np.sort(p) == np.arange(n)).all() and not (p == q).all()
    assert abs(np.corrcoef(np.arange(n), p)[0, 1]) < .03 and abs(np.corrcoef(p, q)[0, 1]) < .03
    counts = np.zeros((8, 8))
    for seed in range(4000): counts[np.arange(8), permutation(8, seed)] += 1
    assert abs(counts/500 - 1).max() < .2 # 4000 tries, 500 expected in each cell: 4.7 standard deviations

@settings(max_examples=150, deadline=None)
@given(chunks, st.integers(1, 7), st.integers(0, 9), st.booleans(), st.data())
def test_order_covers_every_epoch_exactly(chunk_rows, window, seed, shuffle, data):
    order, n = Order(np.array(chunk_rows), seed, window, shuffle), sum(chunk_rows)
    offsets = np.cumsum([0, *chunk_rows])
    def rows(start, count):
        out = []
        for chunks, index in order.parts(start, count):
            all_rows = np.concatenate([np.arange(offsets[c], offsets[c+1]) for c in chunks])
            out += all_rows[index].tolist()
        return out
    stream = rows(0, 3*n)
    for e in range(3): assert sorted(stream[e*n:(e+1)*n]) == list(range(n))
    if not shuffle: assert stream[:n] == list(range(n))
    start = data.draw(st.integers(0, 2*n))
    assert rows(start, n) == stream[start:start+n]
    split = data.draw(st.integers(0, n))
    assert rows(start, split) + rows(start+split, n-split) == stream[start:start+n]

# --- growth

def rows_in(order, start, count):
    "Row numbers of the cache."
    offsets, out = np.cumsum([0, *order.chunk_rows]), []
    for chunks, index in order.parts(start, count): out += np.concatenate([np.arange(offsets[c], offsets[c+1]) for c in chunks])[index].tolist()
    return out

@st.composite
def histories(draw):
    "Sizes of chunks, and a history of them; the first of them have rows."
    sizes = draw(st.lists(st.integers(0, 8), min_size=1, max_size=9))
    sizes[0] += 1
    counts = sorted(draw(st.lists(st.integers(1, len(sizes)), min_size=1, max_size=5, unique=True)))
    rows, history = np.cumsum([0, *sizes]), [[0, counts[0]]]
    for n in counts[1:]:
        position, ends = history[-1][0], end_of_epochs(rows, history, 99)
        history.append([draw(st.one_of(st.integers(position+1, position+2*int(rows[n])), st.sampled_from([e for e in ends if e > position][:2]))), n])
    return sizes[:counts[-1]], history

def end_of_epochs(rows, history, epochs=8):
    "Walks through the positions one epoch after the other."
    ends, start, events, n = [], 0, history[1:], history[0][1]
    for _ in range(epochs):
        while events and events[0][0] <= start+rows[n]: n = events.pop(0)[1]
        start += int(rows[n])
        ends.append(start)
    return ends

@settings(max_examples=300, deadline=None)
@given(histories(), st.integers(1, 7), st.integers(0, 9), st.booleans())
def test_growth_covers_every_epoch_exactly(grown, window, seed, shuffle):
    sizes, history = grown
    rows = np.cumsum([0, *sizes])
    order, ends = Order(sizes, seed, window, shuffle, history), end_of_epochs(rows, history)
    stream, start, n = rows_in(order, 0, ends[-1]), 0, history[0][1]
    for e, end in enumerate(ends): # exactly once, and of each row that is there
        assert sorted(stream[start:end]) == list(range(end-start))
        n = max(c for p, c in history if p <= end)
        assert end-start == rows[n] and order.end_of(e+1) == end
        start = end
    for k in range(1, len(history)): # what was consumed before it grew is what it would have been
        before = Order(sizes[:history[k-1][1]], seed, window, shuffle, history[:k])
        assert stream[:history[k][0]] == rows_in(before, 0, ends[-1])[:history[k][0]]
    for at in (0, ends[-1]//3, ends[-1]//2): # any stretch can be asked for at once
        assert rows_in(Order(sizes, seed, window, shuffle, history), at, ends[-1]-at) == stream[at:]
    for chunks, _ in order.parts(0, ends[-1]): assert len(chunks) <= order.window

def test_growth_stays_what_it_is():
    order = Order([30, 50, 40, 20, 60, 10, 70], 5, 2, True, [[0, 3], [100, 5], [170, 6], [900, 7]])
    assert hash_json(rows_in(order, 0, 2000)) == 'fd4ea62276fa64ef4d4366800ef67662'
    plain = Order([30, 50, 40], 5, 2)
    assert hash_json(rows_in(plain, 0, 500)) == '8764752727abf6675548b1995614ee61' and rows_in(order, 0, 100) == rows_in(plain, 0, 100)

def test_new_rows_are_mixed_with_the_old_rest():
    order = Order([500]*12, 3, 4, True, [[0, 6], [1000, 12]])
    rest = np.array(rows_in(order, 1000, 5000))
    new = [(rest[i:i+1000] >= 3000).mean() for i in range(0, 5000, 1000)]
    assert (rest >= 3000).mean() == .6 and min(new) > .2 and max(new) < 1 # whole chunks are drawn: 2 to 4 of 4 in a window
    one = np.array(rows_in(Order([500]*12, 3, 12, True, [[0, 6], [1000, 12]]), 1000, 5000)) # one window: of all rows alike
    assert all(abs((one[i:i+1000] >= 3000).mean()-.6) < .06 for i in range(0, 5000, 1000)) # 4 standard deviations

def test_without_shuffling_new_rows_come_last():
    order = Order([3, 4, 2, 5], 0, 1, False, [[0, 2], [5, 3], [9, 4]])
    assert rows_in(order, 0, 28) == 2*list(range(14))

def test_many_growths_cost_little():
    n = 400
    order = Order([50]*n, 1, 8, True, [[0, 4]]+[[i*20, 4+i] for i in range(1, n-4)])
    began = time.process_time()
    assert sorted(rows_in(order, 0, 50*(n-1))) == list(range(50*(n-1))) and time.process_time()-began < 20
    assert Order([5, 5], 1, 2, True, [[0, 1], [3, 2]]).at(10**15)[1] <= 10**15

@settings(max_examples=100, deadline=None)
@given(st.integers(1, 10**9), st.sampled_from([.1, .25, .5, 1, 1.5, 2, 3, 10.]), st.sampled_from([.1, .33, .5, .8, 1.]), st.sampled_from([1, 8, 48, 512]))
def test_end_of_epochs_without_growth_is_what_it_was(rows, epochs, fraction, rows_per_step):
    from llmlab.config import Trainer
    from llmlab.trainer.optim import total_steps
    want = total_steps(Trainer(batch_size=rows_per_step, epochs=epochs, epoch_dataset_fraction=fraction), rows, 1)
    assert max(1, Order([rows], 0, 1).end_of(epochs, fraction)//rows_per_step) == want

def test_fractions_of_a_cache_that_grew():
    order = Order([100, 60], 0, 1, True, [[0, 1], [130, 2]]) # epoch 1 has 160 rows, from 100 to 260
    assert [order.end_of(e, .5) for e in (1, 2, 3, 4, 5)] == [50, 100, 180, 260, 340]

# --- the loader

@settings(max_examples=60, deadline=None)
@given(chunks, st.integers(1, 4), st.integers(1, 4), st.integers(1, 3), st.integers(1, 3), st.integers(0, 5))
def test_division_of_work_does_not_show(documents, batch_rows, world, accumulation, window, seed):
    cache, steps = InMemory(documents), 4
    N = batch_rows*world*accumulation
    whole = Loader(cache, N, seed=seed, workers=0, window=window)
    ranks = [Loader(cache, batch_rows, seed=seed, rank=r, world=world, workers=0, window=window) for r in range(world)]
    for _ in range(steps):
        together = [r for _ in range(accumulation) for rank in ranks for r in rows_of(rank, 1)]
        assert together == rows_of(whole, 1)
    assert len({rank.position for rank in ranks} | {whole.position}) == 1

@settings(max_examples=60, deadline=None)
@given(chunks, st.integers(1, 5), st.integers(1, 4), st.booleans())
def test_every_row_once_an_epoch(documents, batch_rows, window, shuffle):
    cache = InMemory(documents)
    loader = Loader(cache, batch_rows, seed=3, workers=0, window=window, shuffle=shuffle)
    stream = rows_of(loader, -(-2*cache.num_rows//batch_rows))
    n = cache.num_rows
    assert sorted(stream[:n]) == sorted(stream[n:2*n]) == list(range(n))
    if shuffle and n > 12: assert stream[:n] != stream[n:2*n]

def test_weights_of_an_epoch_are_the_targets_of_the_cache():
    for strategy in ('best_fit', 'concat'):
        cache = InMemory([5, 9, 2], strategy=strategy)
        assert sum(next(loader).num_targets for loader in [Loader(cache, 1, seed=0, workers=0)] for _ in range(cache.num_rows)) == cache.num_targets
        assert sum(int(b.weights.sum()) for b in in_order(cache, 4)) == cache.num_targets

@pytest.mark.parametrize('workers', [0, 1, 3])
def test_resume_at_every_index(workers):
    cache, n = InMemory([6, 3, 8, 4], seq_len=15), 30
    whole = Loader(cache, 3, seed=5, workers=0, window=2)
    states, batches = [], []
    for _ in range(n):
        states.append(json.loads(json.dumps(whole.state_dict())))
        batches.append(next(whole))
    live = Loader(cache, 3, seed=5, workers=workers, window=2)
    for b, s in zip(batches, states):
        assert live.state_dict() == s
        same(next(live), b)
    for i in range(0, n, 1 if workers == 0 else 3):
        resumed = Loader(cache, 3, seed=5, workers=workers)
        resumed.load_state_dict(states[i])
        for b in batches[i:i+4]: same(next(resumed), b)
        resumed.close()
    live.load_state_dict(states[2]) # backwards, with a thread already ahead
    same(next(live), batches[2])
    live.close()

def test_resume_with_other_ranks_and_rows():
    cache = InMemory([9, 9, 9])
    stream = rows_of(Loader(cache, 1, seed=2, workers=0), 60)
    loader = Loader(cache, 5, seed=2)
    assert rows_of(loader, 2) == stream[:10]
    state = loader.state_dict()
    ranks = [Loader(cache, 2, seed=2, rank=r, world=3) for r in range(3)]
    for rank in ranks: rank.load_state_dict(state)
    assert [r for rank in ranks for r in rows_of(rank, 1)] == stream[10:16]

def test_resume_far_away_is_as_quick_as_at_the_start():
    cache = InMemory([20]*30)
    loader = Loader(cache, 2, seed=0, workers=0, window=3)
    loader.load_state_dict(loader.state_dict() | {'position': 10**15})
    cache.decoded.clear()
    next(loader)
    assert len(cache.decoded) <= 6 and loader.position == 10**15+2

@pytest.mark.parametrize('fraction', [.1, .33, .8, 1])
def test_fraction_only_measures_the_epoch(fraction):
    cache = InMemory([10, 12, 9])
    loader = Loader(cache, 1, seed=1, workers=0, fraction=fraction)
    assert loader.rows_per_epoch == int(cache.num_rows*fraction)
    assert rows_of(loader, 40) == rows_of(Loader(cache, 1, seed=1, workers=0), 40)

def test_one_window_is_decoded_once_and_only_one_is_held():
    cache = InMemory([5, 5, 5, 5])
    loader = Loader(cache, 2, seed=1, workers=0)
    rows_of(loader, 3*cache.num_rows)
    assert sorted(cache.decoded) == [0, 1, 2, 3]
    cache.decoded.clear()
    loader = Loader(cache, 2, seed=1, workers=0, window=1)
    rows_of(loader, cache.num_rows//2)
    assert sorted(cache.decoded) == [0, 1, 2, 3]

def test_a_second_buffer_only_where_there_is_a_second_window():
    cache = InMemory([5, 5, 5, 5])
    for window, buffers in ((4, 1), (9, 1), (2, 2), (1, 2)):
        loader = Loader(cache, 2, seed=1, window=window)
        cache.decoded.clear()
        rows_of(loader, 2*cache.num_rows)
        assert sum(b is not None for b in loader._reader._buffers) == buffers and all(len(b) <= sum(sorted(np.diff(cache.offsets))[-window:]) for b in loader._reader._buffers if b is not None)
        if buffers == 1: assert sorted(cache.decoded) == [0, 1, 2, 3]
        loader.close()

def test_the_next_window_is_decoded_while_this_one_is_drawn_from():
    "Every decoding takes a while, but no batch waits for one after the first."
    cache = InMemory([20]*6)
    chunk, slow = cache.chunk, threading.Event()
    def waits(i, into=None):
        if cache.decoded: slow.wait(60) # all but the first wait to be allowed
        return chunk(i, into)
    cache.chunk = waits
    order = Order(np.diff(cache.offsets), 1, 1)
    reader = Reader(cache, order, ahead=True)
    ends = [order.at(0)[2]]
    for _ in range(11): ends.append(order.at(ends[-1])[2])
    first = reader.batch(0, ends[0]-1)
    assert not cache.decoded[1:] and reader._next
    slow.set()
    for end in ends[:-1]: # at each border, the window behind it is there
        reader._next.result(60)
        done = len(cache.decoded)
        cache.chunk = None # nobody may decode now
        reader.ahead, got = False, reader.batch(end-1, 2).rows.tolist()
        assert len(got) == 2 and len(cache.decoded) == done
        cache.chunk, reader.ahead = chunk, True
        reader._next = reader._pool.submit(reader._load, reader._end)
    reader.close()

@settings(max_examples=40, deadline=None)
@given(chunks, st.integers(1, 9), st.integers(1, 3), st.booleans(), st.data())
def test_any_jump_finds_its_window(documents, batch_rows, window, ahead, data):
    cache = InMemory(documents)
    order = Order(np.diff(cache.offsets), 2, window)
    reader, stream = Reader(cache, order, ahead=ahead), rows_in(order, 0, 3*cache.num_rows+batch_rows)
    for _ in range(12):
        at = data.draw(st.integers(0, 3*cache.num_rows))
        assert reader.batch(at, batch_rows).rows.tolist() == stream[at:at+batch_rows]
    reader.close()

@settings(max_examples=40, deadline=None)
@given(chunks, st.integers(1, 9), st.one_of(st.none(), st.integers(0, 30)))
def test_in_order(documents, batch_rows, limit):
    cache = InMemory(documents)
    n = cache.num_rows if limit is None else min(limit, cache.num_rows)
    sizes = [len(b.tokens) for b in in_order(cache, batch_rows, limit)]
    assert sum(sizes) == n and all(s == batch_rows for s in sizes[:-1])
    assert [r for b in in_order(cache, batch_rows, limit) for r in b.rows.tolist()] == list(range(n))

@pytest.mark.parametrize('workers', [0, 1, 2])
def test_from_disk(tmp_path, workers):
    corpus = open_corpus(config.Data(name='stories', max_documents=200, validation_fraction=.1))
    tokenizer = build_tokenizer(config.Tokenizer(kind='byte'), corpus)
    cache = build_cache(corpus, tokenizer, config.Packing(seq_len=48, chunk_rows=100, folder=str(tmp_path)))
    stored = np.concatenate([cache.chunk(i).tokens for i in range(len(cache.chunks))])
    loader, seen = Loader(cache, 7, seed=1, workers=workers, window=3), []
    for _ in range(2*cache.num_rows//7):
        b = next(loader)
        seen += b.rows.tolist()
        assert (b.tokens.numpy() == stored[b.rows.numpy(), :-1]).all() and (b.targets.numpy() == stored[b.rows.numpy(), 1:]).all()
    assert sorted(seen[:cache.num_rows]) == list(range(cache.num_rows))
    assert seen == rows_of(Loader(cache, 1, seed=1, workers=0, window=3), len(seen))
    loader.close()

# --- a cache that grows

def go_on(cache, state, batch_rows, world=1, shuffle=True, workers=0, seed=4):
    "A new process of each rank."
    ranks = [Loader(cache, batch_rows, seed=seed, rank=r, world=world, workers=workers, shuffle=shuffle, window=3) for r in range(world)]
    for rank in ranks: rank.load_state_dict(json.loads(json.dumps(state))) if state else None
    return ranks

@settings(max_examples=80, deadline=None)
@given(st.lists(st.integers(1, 7), min_size=2, max_size=7), st.booleans(), st.data())
def test_train_kill_grow_resume(documents, shuffle, data):
    "Sittings with other ranks and rows, on a cache that may have grown in between: every row of an epoch is given out exactly once, and the order is that of a loader that never stopped."
    whole = InMemory(documents)
    n, state, stream, grown = data.draw(st.integers(1, len(documents))), None, [], []
    for _ in range(data.draw(st.integers(1, 6))):
        cache, world = whole.head(n), data.draw(st.integers(1, 3))
        ranks = go_on(cache, state, data.draw(st.integers(1, 4)), world, shuffle)
        if state and n > state['cache']['total_chunks']:
            grown.append(n)
            assert all(r.grown == (state['cache']['total_sequences'], cache.num_rows) for r in ranks)
        else: assert all(r.grown is None for r in ranks)
        for _ in range(data.draw(st.integers(0, 9))): stream += [row for rank in ranks for row in rows_of(rank, 1)]
        assert all(r.state_dict() == ranks[0].state_dict() for r in ranks) and ranks[0].position == len(stream)
        state, n = ranks[0].state_dict(), data.draw(st.integers(n, len(documents)))
    last = ranks[0]
    assert stream == rows_in(Order(np.diff(whole.offsets), 4, 3, shuffle, state['history']), 0, len(stream))
    stream += rows_of(last, -(-(last.end_of(20)-len(stream))//last.batch_rows)) if last.world == 1 else []
    start = 0
    for e in range(1, 20):
        end = last.end_of(e)
        if end > len(stream): break
        assert sorted(stream[start:end]) == list(range(end-start))
        start = end

@pytest.mark.parametrize('world', [1, 2, 4])
@pytest.mark.parametrize('workers', [0, 1, 2])
def test_nothing_is_delivered_twice(world, workers):
    "Three sittings within one epoch, the cache larger in each; every rank in its own loader, with its own threads."
    whole, state, seen = InMemory([60, 50, 70, 40, 30, 80]), None, []
    for chunks, batches in ((2, 4), (4, 5), (6, None)):
        cache = whole.head(chunks)
        ranks = go_on(cache, state, 2, world, workers=workers)
        end = len(seen)+batches*2*world if batches else ranks[0].end_of(1)
        while len(seen) < end: seen += [row for rank in ranks for row in rows_of(rank, 1)]
        state = ranks[-1].state_dict()
        for rank in ranks: rank.close()
    assert np.bincount(seen[:end]).tolist() == [1]*whole.num_rows and end == whole.num_rows

def test_state_of_a_cache_that_grew():
    whole = InMemory([9, 8, 7, 6])
    first = Loader(whole.head(1), 2, seed=1, workers=0)
    rows_of(first, 3)
    state = first.state_dict()
    assert state['history'] == [[0, 1]] and first.end_of(1) == first.rows_per_epoch == whole.offsets[1]
    old = {k: v for k, v in state.items() if k != 'history'} # a checkpoint of before there was growth
    for s in (state, old):
        second = Loader(whole.head(2), 2, seed=1, workers=0)
        second.load_state_dict(s)
        assert second.state_dict()['history'] == [[0, 1], [6, 2]] and second.grown == (whole.offsets[1], whole.offsets[2]) and second.end_of(1) == whole.offsets[2]
    third = Loader(whole, 2, seed=1, workers=0) # grown again before a row was taken: one growth
    third.load_state_dict(second.state_dict())
    assert third.state_dict()['history'] == [[0, 1], [6, 4]] and third.grown == (whole.offsets[2], whole.offsets[4])
    third.load_state_dict(third.state_dict())
    assert third.grown is None
    fresh = Loader(whole, 2, seed=1, workers=0) # grown before anything was taken: as if it had always been there
    fresh.load_state_dict(Loader(whole.head(2), 2, seed=1).state_dict())
    assert fresh.state_dict() == Loader(whole, 2, seed=1).state_dict() and fresh.grown

def test_a_run_that_ended_with_its_data_goes_on():
    whole = InMemory([9, 8, 7])
    loader = Loader(whole.head(2), 1, seed=1, workers=0)
    seen = rows_of(loader, loader.end_of(1))
    more = Loader(whole, 1, seed=1, workers=0)
    more.load_state_dict(loader.state_dict())
    assert sorted(rows_of(more, more.end_of(1)-len(seen))) == list(range(whole.offsets[2], whole.offsets[3]))

def test_a_loader_uses_only_the_chunks_of_its_history():
    whole = InMemory([9, 8, 7])
    cache = whole.head(2)
    loader = Loader(cache, 1, seed=1, workers=0)
    cache.hold(whole.packed, whole.seq_len) # it grew, and nobody told the loader
    rows = rows_of(loader, 3*loader.rows_per_epoch)
    assert max(rows) < whole.offsets[2] and loader.state_dict()['cache'] == whole.head(2).info() and loader.state_dict()['history'] == [[0, 2]]

# --- refusals, threads

def test_refusals():
    cache = InMemory([4, 4])
    state = Loader(cache, 2, seed=1, workers=0).state_dict()
    class Other(InMemory):
        def info(self): return super().info() | dict(tokenizer='u')
    for other, field in ((InMemory([4, 4], seq_len=8), 'sequence_length is 8, it was 7'), (Other([4, 4]), "tokenizer is 'u', it was 't'"), (cache.head(1), r'shrank from \d+ to \d+ sequences'),
                         (InMemory([4, 4], seed=9), 'content of its first 2 chunks'), (InMemory([4, 5, 6], seed=9), 'content of its first 2 chunks')):
        with pytest.raises(CacheError, match=field): Loader(other, 2, seed=1).load_state_dict(state)
    with pytest.raises(CacheError, match='run.seed=1'): Loader(cache, 2, seed=2).load_state_dict(state)
    with pytest.raises(CacheError, match='has no rows'): Loader(InMemory([0]), 2, seed=2)
    assert list(in_order(InMemory([0]), 2)) == []

def loader_threads(): return [t for t in threading.enumerate() if t.name.startswith('loader')]

def gone(deadline=5.):
    end = time.monotonic()+deadline
    while loader_threads() and time.monotonic() < end: gc.collect(); time.sleep(.01)
    return not loader_threads()

def test_threads_end():
    assert gone()
    loader = Loader(InMemory([9]), 2, seed=1)
    next(loader)
    assert loader_threads()
    loader.close()
    assert gone()
    next(loader)              # goes on
    assert loader.position == 4
    del loader                # nobody called close
    assert gone()

@pytest.mark.parametrize('workers', [0, 1, 2])
def test_error_comes_up_where_the_batch_was_due_and_nothing_is_skipped(workers):
    cache = InMemory([9]*5)
    want = rows_of(Loader(cache, 2, seed=1, workers=0, window=1), cache.num_rows)
    loader, chunk = Loader(cache, 2, seed=1, workers=workers, window=1), cache.chunk
    got = rows_of(loader, 1)
    def broken(i, into=None): raise DamagedChunk('packed_chunk_000001.pt', 'is missing')
    cache.chunk = broken
    raised = 0
    while len(got) < len(want): # the windows that are in memory already come whole
        try: got += rows_of(loader, 1)
        except DamagedChunk:
            raised += 1
            if raised == 3: cache.chunk = chunk
            position = loader.position
            assert position == len(got)
    assert raised == 3 and got == want
    loader.close()

class Simulated:
    "A stream that does its work late: an event is done when somebody waits for it."
    def __init__(self): self.log = []
    def record_event(self):
        n, log = len(self.log), self.log
        log.append(('copy', n))
        class Event:
            def synchronize(self): log.append(('wait', n))
        return Event()

def test_a_pinned_buffer_is_filled_again_only_after_its_copy_is_done(monkeypatch):
    stream, t = Simulated(), Transport('cpu')
    t._copies = stream
    monkeypatch.setattr(torch.cuda, 'stream', lambda s: contextlib.nullcontext())
    filled = []
    def fills(buffer, batch, pinned=True):
        out = fill(buffer, batch, pinned=False)
        filled.append(out.tokens.data_ptr())
        stream.log.append(('fill', len(filled)-1))
        return out
    monkeypatch.setattr(llmlab.packing.loader, 'fill', fills)
    loader = Loader(InMemory([9]), 2, seed=1, workers=0)
    for i in range(6):
        b = next(loader)
        there, arrival = t.send(b)
        same(there, b)
        assert there.place == b.place and arrival is not None
    assert len(set(filled)) == 2 and filled == 3*filled[:2]
    assert [w for w, _ in stream.log] == ['fill', 'copy']*2 + ['wait', 'fill', 'copy']*4
    copies = [n for w, n in stream.log if w == 'copy']
    assert [n for w, n in stream.log if w == 'wait'] == copies[:4] # always that of two batches before

@pytest.mark.gpu
def test_pinned_buffers_on_a_gpu():
    "The stream of the copies is held up, so that a buffer that is filled too early would be seen."
    cache = InMemory([9, 9, 9], seq_len=1023, longest=900)
    want = [next(loader) for loader in [Loader(cache, 8, seed=1, workers=0)] for _ in range(12)]
    t, got = Transport('cuda'), []
    for w in want:
        with torch.cuda.stream(t._copies): torch.cuda._sleep(20_000_000)
        there, arrival = t.send(w)
        got.append(t.receive(there, arrival))
        torch.cuda._sleep(1_000_000)
    assert all(buffer.tokens.is_pinned() for buffer, _ in t._buffers) and len(t._buffers) == 2
    for g, w in zip(got, want): same(g.to('cpu'), w)

@pytest.mark.gpu
def test_on_a_gpu():
    cache = InMemory([9, 9, 9], seq_len=63, longest=200)
    want = [next(loader) for loader in [Loader(cache, 4, seed=1, workers=0)] for _ in range(50)]
    for workers, prefetch in ((1, True), (1, False), (0, True)):
        loader = Loader(cache, 4, seed=1, workers=workers, device='cuda', device_prefetch=prefetch)
        for w in want:
            b = next(loader)
            assert b.tokens.is_cuda and b.weights.is_cuda and not b.rows.is_cuda
            torch.cuda._sleep(100_000) # the stream is busy: the copy of the next batch must not disturb this one
            same(b.to('cpu'), w)
        loader.close()
