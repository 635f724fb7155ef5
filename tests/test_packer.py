"Packing keeps every token, once, in order; whatever the lengths."
import time
from functools import reduce
from operator import add
import numpy as np, pytest
from hypothesis import given, settings, strategies as st
from llmlab.packing.packer import FITS, STRATEGIES, best_fit, cut, document_lengths, first_fit, framed, pack, packing_report

lengths = st.lists(st.integers(2, 60), max_size=60)
row_tokens = st.integers(2, 24)

def documents_of(lengths, dtype=np.uint32):
    "Documents whose tokens are all different, so that each one can be recognised."
    at = np.cumsum([0, *lengths])
    return [np.arange(a, b, dtype=dtype)+1 for a, b in zip(at, at[1:])]

def targets_of(p):
    "(document, place of the target in it, input token, target token) of everything there is to learn."
    out = []
    for r in range(p.num_rows):
        at = 0
        for s in range(p.row_spans[r], p.row_spans[r+1]):
            span = p.tokens[r, at:at+p.length[s]].tolist()
            out += [(int(p.document[s]), int(p.start[s])+i+1, x, y) for i, (x, y) in enumerate(zip(span, span[1:]))]
            at += p.length[s]
        assert at <= p.tokens.shape[1]
        assert (p.tokens[r, at:] == p.pad_id).all()
    return sorted(out)

@pytest.mark.parametrize('strategy', STRATEGIES)
@settings(max_examples=200, deadline=None)
@given(lengths, row_tokens)
def test_every_target_exactly_once(strategy, lengths, row_tokens):
    docs = documents_of(lengths)
    p = pack(docs, row_tokens, strategy)
    want = [(d, i+1, int(a), int(b)) for d, x in enumerate(docs) for i, (a, b) in enumerate(zip(x, x[1:]))]
    assert targets_of(p) == want
    assert p.num_targets == len(want) == sum(lengths)-len(lengths)
    assert p.row_spans[0] == 0 and p.row_spans[-1] == len(p.length) and (np.diff(p.row_spans) > 0).all()
    assert p.num_tokens == (p.tokens != 0).sum()

@pytest.mark.parametrize('strategy', FITS)
@settings(max_examples=200, deadline=None)
@given(lengths, row_tokens)
def test_no_document_that_fits_is_cut(strategy, lengths, row_tokens):
    p = pack(documents_of(lengths), row_tokens, strategy)
    pieces = np.bincount(p.document, minlength=len(lengths))
    for n, k in zip(lengths, pieces): assert k == (1 if n <= row_tokens else -(-(n-1)//(row_tokens-1)))
    first = p.document[p.row_spans[:-1]]
    assert (np.diff(first) >= 0).all()  # rows in the order of the corpus

def plain_best_fit_rows(length, row_tokens):
    "The textbook: number of rows, searching all of them."
    space = []
    for n in sorted(length, reverse=True):
        fits = [s for s in space if s >= n]
        if fits: space.remove(min(fits)); space.append(min(fits)-n)
        else: space.append(row_tokens-n)
    return len(space)

@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(1, 30), max_size=80), st.integers(30, 40))
def test_bitmap_is_the_textbook(length, row_tokens):
    row = best_fit(np.array(length, np.int64), row_tokens)
    assert row.max(initial=-1)+1 == plain_best_fit_rows(length, row_tokens)
    assert np.bincount(row, np.array(length), minlength=1).max(initial=0) <= row_tokens

@settings(max_examples=300, deadline=None)
@given(st.lists(st.integers(1, 30), max_size=80), st.integers(30, 40))
def test_first_fit_is_the_textbook(length, row_tokens):
    "Piece by piece the row that a search from the front finds."
    space, want = [], []
    for n in length:
        r = next((r for r, s in enumerate(space) if s >= n), len(space))
        if r == len(space): space.append(row_tokens)
        space[r] -= n
        want.append(r)
    assert first_fit(np.array(length, np.int64), row_tokens).tolist() == want

@pytest.mark.parametrize('seq_len', [256, 512, 2048])
def test_rows_near_the_lower_bound(seq_len):
    rng = np.random.default_rng(seq_len)
    lengths = rng.lognormal(np.log(620), 1.01, 10_000).astype(int)+2
    _, _, length = cut(lengths, seq_len+1)
    bound = -(-length.sum()//(seq_len+1))
    best, first = (fit(length, seq_len+1).max()+1 for fit in (best_fit, first_fit))
    assert bound <= best <= bound*1.002 and best <= first <= bound*1.015

def test_a_plan_is_not_quadratic():
    "Four times the pieces take about four times as long; a search of the rows would take sixteen times as long."
    rng = np.random.default_rng(0)
    _, _, length = cut(rng.lognormal(np.log(620), 1.01, 120_000).astype(int)+2, 513)
    def seconds(fit, n):
        t = time.process_time()
        fit(length[:n], 513)
        return time.process_time()-t
    for fit in FITS.values():
        few, many = (min(seconds(fit, n) for _ in range(3)) for n in (50_000, 200_000))
        assert many < 9*few, (fit.__name__, few, many)

# --- what packing did to the documents

def naive_report(p):
    "The same counts, token by token."
    T1, pieces, seen = p.tokens.shape[1], {}, {}
    tokens = targets = from_start = looked_back = 0
    for r in range(p.num_rows):
        for s in range(*p.row_spans[r:r+2]):
            d, start, n = int(p.document[s]), int(p.start[s]), int(p.length[s])
            pieces.setdefault(d, []).append(set(range(start, start+n)))
            for i in range(n):
                tokens += 1
                if i:
                    targets += 1
                    looked_back += i
                    from_start += start == 0
    whole = {d: set().union(*x) for d, x in pieces.items()}
    slots = sum(len(w)-1 + -(-(len(w)-1)//(T1-1)) for w in whole.values())
    return dict(row_tokens=T1, rows=p.num_rows, fewest=-(-slots//T1), tokens=tokens, targets=targets, documents=len(whole),
        too_long=sum(len(w) > T1 for w in whole.values()), cut=sum(len(w) <= T1 and w not in pieces[d] for d, w in whole.items()),
        from_start=from_start, looked_back=looked_back)

@pytest.mark.parametrize('strategy', STRATEGIES)
@settings(max_examples=200, deadline=None)
@given(lengths, row_tokens)
def test_report_is_the_naive_count(strategy, lengths, row_tokens):
    p = pack(documents_of(lengths), row_tokens, strategy)
    r = packing_report(p)
    assert vars(r) == naive_report(p)
    assert document_lengths(p).tolist() == lengths
    assert r.fewest <= r.rows and r.fill == p.fill and r.padding == p.tokens.size-p.num_tokens
    assert 0 <= r.cut_share <= 1 and 0 <= r.from_start_share <= 1 and r.context <= row_tokens
    if strategy in FITS: assert r.cut == 0

@settings(max_examples=100, deadline=None)
@given(st.lists(lengths, min_size=1, max_size=5), row_tokens)
def test_reports_add_up(chunks, row_tokens):
    reports = [packing_report(pack(documents_of(c), row_tokens)) for c in chunks]
    total = reduce(add, reports)
    for k in vars(total):
        if k != 'row_tokens': assert getattr(total, k) == sum(getattr(r, k) for r in reports)
    assert total.documents == sum(map(len, chunks))

def test_concat_cuts_what_fits_and_best_fit_sees_more_starts():
    docs = [np.zeros(n, np.uint16) for n in np.random.default_rng(5).lognormal(np.log(620), 1.01, 2000).astype(int)+2]
    best, first, stream = (packing_report(pack(docs, 513, s)) for s in STRATEGIES)
    assert best.cut == first.cut == 0 and stream.cut_share > .45
    assert best.from_start == first.from_start > 1.7*stream.from_start
    assert best.rows <= first.rows and stream.rows <= first.rows

def test_deterministic_and_typed():
    docs = documents_of([5, 9, 30, 2, 2, 7], np.uint16)
    for s in STRATEGIES:
        a, b = pack(docs, 8, s, pad_id=9), pack(docs, 8, s, pad_id=9)
        assert a.tokens.dtype == np.uint16 and a.tokens.tobytes() == b.tokens.tobytes()
        for name in ('row_spans', 'length', 'document', 'start'): assert (getattr(a, name) == getattr(b, name)).all()

@pytest.mark.parametrize('strategy', STRATEGIES)
def test_nothing_and_one_huge_document(strategy):
    none = pack([], 8, strategy)
    assert none.num_rows == none.num_tokens == none.num_targets == 0 and none.fill == 0
    one = pack([np.arange(1_000_000, dtype=np.uint32)], 65, strategy)
    assert one.num_targets == 999_999 and one.num_rows == -(-999_999//64) and one.fill > .999

def test_frame():
    assert framed(np.array([3], np.uint16), 0, 1).tolist() == [0, 3, 1]
