"Packing keeps every token, once, in order; whatever the lengths."
import numpy as np, pytest
from hypothesis import given, settings, strategies as st
from llmlab.packing.packer import STRATEGIES, best_fit, cut, framed, pack

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

@settings(max_examples=200, deadline=None)
@given(lengths, row_tokens)
def test_best_fit_cuts_no_document_that_fits(lengths, row_tokens):
    p = pack(documents_of(lengths), row_tokens)
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

@pytest.mark.parametrize('seq_len', [256, 512, 2048])
def test_rows_near_the_lower_bound(seq_len):
    rng = np.random.default_rng(seq_len)
    lengths = rng.lognormal(np.log(620), 1.01, 10_000).astype(int)+2
    _, _, length = cut(lengths, seq_len+1)
    bound = -(-length.sum()//(seq_len+1))
    assert best_fit(length, seq_len+1).max()+1 <= bound*1.002

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
