"The measures, and the bigram model, against slow and plain versions of themselves."
import math
from collections import Counter
from fractions import Fraction
import numpy as np, pytest
from hypothesis import given, settings, strategies as st
from llmlab.eval.metrics import baselines, bits_per_byte, byte_lengths, count_pairs, discounts, fit_bigram, mean, pairs, perplexity, smooth, standard_error
from llmlab import tiny
from llmlab.data.corpora import open_corpus
from llmlab.data.tokenizer import build_tokenizer
from llmlab.files import DataError
from llmlab.packing.cache import build_cache
from llmlab.packing.loader import in_order
from llmlab.packing.packer import STRATEGIES, pack

V = 9
document = st.lists(st.integers(0, V-1), min_size=2, max_size=40)
corpus = st.lists(document, max_size=25)


def packed(documents, row_tokens=8, strategy='best_fit'): return pack([np.array(d, np.uint16) for d in documents], row_tokens, strategy)
def neighbours(documents): return Counter((x, y) for d in documents for x, y in zip(d, d[1:]))


@pytest.mark.parametrize('strategy', STRATEGIES)
@settings(max_examples=150, deadline=None)
@given(corpus, st.integers(2, 12))
def test_pairs_are_the_neighbours_in_documents(strategy, documents, row_tokens):
    p = packed(documents, row_tokens, strategy)
    assert Counter(zip(*(x.tolist() for x in pairs(p)))) == neighbours(documents)
    for rows in (0, 1, p.num_rows//2, p.num_rows+3):
        head = p.tokens[:rows]
        context, target = pairs(p, rows)
        spans = p.length[:p.row_spans[len(head)]]
        assert len(context) == len(target) == spans.sum()-len(spans)


@settings(max_examples=100, deadline=None)
@given(st.lists(corpus, max_size=6))
def test_counting_in_chunks(chunks):
    pair, count = count_pairs(map(packed, chunks), V)
    want = sum((neighbours(c) for c in chunks), Counter())
    assert dict(zip(pair.tolist(), count.tolist())) == {x*V+y: n for (x, y), n in want.items()}
    assert (np.diff(pair) > 0).all()


def slow_bigram(counts:Counter, V:int):
    "Modified Kneser-Ney as the paper writes it, one probability at a time."
    def D(values):
        n = Counter(values)
        if not all(n[k] for k in (1, 2, 3, 4)): return lambda c: 0 if c == 0 else .5
        Y = n[1]/(n[1]+2*n[2])
        return lambda c: 0 if c == 0 else min(max((k := min(c, 3))-(k+1)*Y*n[k+1]/n[k], .1), k)
    d, contexts = D(counts.values()), Counter(y for x, y in counts)
    d1 = D(contexts.values())
    spare = sum(d1(c) for c in contexts.values())
    def lower(y): return (contexts[y]-d1(contexts[y])+spare/V)/sum(contexts.values())
    def p(x, y):
        after = {w: c for (u, w), c in counts.items() if u == x}
        if not after: return lower(y)
        return (after.get(y, 0)-d(after.get(y, 0))+sum(map(d, after.values()))*lower(y))/sum(after.values())
    return p


@settings(max_examples=60, deadline=None)
@given(corpus.filter(len), st.randoms(use_true_random=False))
def test_bigram_is_the_textbook_and_a_distribution(documents, random):
    documents = documents*random.randint(1, 2) + [[random.choice((0, 1, 2)) for _ in range(60)]] # many counts, sometimes enough for the formula
    model = fit_bigram(*count_pairs([packed(documents)], V), V)
    context, target = np.repeat(np.arange(V), V), np.tile(np.arange(V), V)
    p = np.exp(-model.nats(context, target)).reshape(V, V)
    slow = slow_bigram(neighbours(documents), V)
    np.testing.assert_allclose(p, [[slow(x, y) for y in range(V)] for x in range(V)], rtol=1e-9)
    np.testing.assert_allclose(p.sum(1), 1, rtol=1e-9)
    assert (p > 0).all()


def test_discounts_where_the_formula_applies():
    counts = np.repeat([1, 2, 3, 4, 9], [400, 150, 80, 50, 30])
    y = Fraction(400, 400+300)
    want = [0, 1-2*y*Fraction(150, 400), 2-3*y*Fraction(80, 150), 3-4*y*Fraction(50, 80)]
    np.testing.assert_allclose(discounts(counts), [float(x) for x in want])


@settings(max_examples=50, deadline=None)
@given(corpus, corpus.filter(len), st.integers(0, 12), st.integers(1, 4))
def test_the_loss_does_not_depend_on_the_chunks(train, validation, rows, chunk):
    train = [[0, 1, 2], *train]
    p = packed(validation)
    whole = [pairs(p, rows)] if rows else [pairs(p)]
    if not len(whole[0][0]): return
    want = baselines([packed(train)], [p], V, rows or None)
    model = fit_bigram(*count_pairs([packed(train)], V), V)
    assert want['bigram'] == pytest.approx(model.nats(*whole[0]).mean())
    assert want['targets'] == len(whole[0][0])
    cuts = []
    for a in range(0, p.num_rows, chunk): # the same rows in smaller chunks
        s, e = p.row_spans[a], p.row_spans[min(a+chunk, p.num_rows)]
        cuts.append(type(p)(p.tokens[a:a+chunk], p.row_spans[a:a+chunk+1]-s, p.length[s:e], p.document[s:e], p.start[s:e], p.pad_id))
    got = baselines([packed([d]) for d in train], cuts, V, rows or None)
    assert got['bigram'] == pytest.approx(want['bigram']) and got['unigram'] == pytest.approx(want['unigram'])


def test_a_known_source():
    "A Markov chain of known entropy: the bigram comes close to it from above, the unigram stays away."
    rng = np.random.default_rng(0)
    table = rng.dirichlet(np.full(20, .2), 20)
    def tell(n):
        out, x = [0], 0
        for u in rng.random(n): out.append(x := int(np.searchsorted(table[x].cumsum(), u).clip(max=19)))
        return out
    train, validation = ([tell(500) for _ in range(n)] for n in (200, 40))
    losses = baselines([packed(train, 129)], [packed(validation, 129)], 20)
    chain = pairs(packed(validation, 129))
    truth = -np.log(table[chain]).mean()
    assert truth < losses['bigram'] < truth+.005
    assert losses['unigram'] > truth+.5


@pytest.mark.parametrize('strategy', STRATEGIES)
@pytest.mark.parametrize('rows', [None, 1, 10, 10_000])
def test_the_targets_are_those_of_the_loader(strategy, rows, tmp_path):
    "The bigram is scored on what the network is scored on: the same inputs, targets and weights."
    cfg = tiny.config('tokenizer.kind=byte', 'data.max_documents=60', 'packing.chunk_rows=8', f'packing.strategy={strategy}', f'packing.folder={tmp_path}')
    corpus = open_corpus(cfg.data)
    tokenizer = build_tokenizer(cfg.tokenizer, corpus)
    train, cache = (build_cache(corpus, tokenizer, cfg.packing, split) for split in ('train', 'validation'))
    def chunks(c): return map(c.chunk, range(len(c.chunks)))
    seen = Counter()
    for b in in_order(cache, 3, rows):
        scored = b.weights > 0
        seen.update(zip(b.tokens[scored].tolist(), b.targets[scored].tolist()))
    losses = baselines(chunks(train), chunks(cache), tokenizer.vocab_size, rows)
    assert losses['targets'] == sum(seen.values())
    model = fit_bigram(*count_pairs(chunks(train), tokenizer.vocab_size), tokenizer.vocab_size)
    context, target = np.array(list(seen.elements())).T
    assert losses['bigram'] == pytest.approx(model.nats(context, target).mean())
    if rows is None: # all targets: every byte of the text once, and an end for each document
        lengths = byte_lengths(tokenizer)
        assert lengths[target].sum() == cache.text_bytes


def test_large_vocabulary():
    for dtype, high in ((np.uint16, 65_535), (np.uint32, 250_000)):
        p = pack([np.array([high-1, high]*20, dtype)], 9)
        assert baselines([p], [p], high+1)['bigram'] < .5


def test_mistakes():
    p = packed([[0, 1, 2]])
    with pytest.raises(DataError, match='nothing to count'): baselines([], [p], V)
    with pytest.raises(DataError, match='nothing was scored'): baselines([p], [], V)
    with pytest.raises(DataError): mean(0, 0)


@given(st.lists(st.tuples(st.floats(0, 1e3), st.integers(1, 500)), min_size=2, max_size=50))
def test_standard_error_does_not_depend_on_the_order(rows):
    nats, counts = map(np.array, zip(*rows))
    assert standard_error(nats, counts) == pytest.approx(standard_error(nats[::-1], counts[::-1]))
    assert standard_error(np.tile(nats, 2), np.tile(counts, 2)) <= standard_error(nats, counts)+1e-9


def test_numbers_json_can_write():
    assert all(math.isfinite(perplexity(x)) for x in (0., 5., 1e9, math.inf))
    assert bits_per_byte(8*math.log(2)*10, 10) == pytest.approx(8)


@given(st.lists(st.integers(0, 30), min_size=2, max_size=50).filter(any))
def test_smooth_is_a_distribution(counts):
    p = smooth(np.array(counts))
    assert (p > 0).all() and p.sum() == pytest.approx(1)
