"Statistics of generated text: against plain counting, in any order and any batches; a judge that reads long rows in windows; counting passes."
import json, math
from collections import Counter
import numpy as np, pytest, torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from llmlab import tiny
from llmlab.config import Tokenizer
from llmlab.data.corpora import open_corpus
from llmlab.data.tokenizer import build_tokenizer
from llmlab.eval.evaluate import OpenModel
from llmlab.eval.generation import (REAL, Written, distinct, evaluations, judge_rows, ngrams, plot_frontier, real_windows, repeated, row_statistics, self_bleu, stutter, sweep, write_rows)
from llmlab.files import ConfigError, DataError
from llmlab.models.ar import AR
from llmlab.models.transformer import Shape, build
from llmlab.packing.packer import framed, pack

torch.set_num_threads(1)
corpus = open_corpus(tiny.config('data.max_documents=30').data)
tokenizer = build_tokenizer(Tokenizer(kind='byte'), corpus)
shape = Shape(vocab_size=tokenizer.vocab_size, seq_len=12, d_model=32, num_layers=2, num_heads=4, num_kv_heads=2, d_ff=48, token_mix='conv3')
network = build(shape, seed=1)
with torch.no_grad():
    for p in network.parameters():
        if p.ndim == 2: p.mul_(4)
judge = OpenModel(network, AR(), tokenizer, {'path': 'judge'})
rows_of = lambda top, most=12: st.lists(st.lists(st.integers(0, top), max_size=most), max_size=8)


def plain_bleu(rows:list[list[int]])->float:
    "Self-BLEU by the book: each row against all others."
    out = []
    for i, row in enumerate(rows):
        others, logs = rows[:i]+rows[i+1:], []
        for n in range(1, min(4, len(row))+1):
            mine, most = ngrams(row, n), Counter()
            for o in others: most |= ngrams(o, n)
            logs.append(math.log(max((mine & most).total(), .1)/mine.total()))
        nearest = min((abs(len(o)-len(row)), len(o)) for o in others)[1]
        out.append(math.exp(sum(logs)/len(logs))*min(1, math.exp(1-nearest/len(row))))
    return sum(out)/len(out)


@settings(max_examples=60, deadline=None)
@given(rows_of(3))
def test_self_bleu_by_the_book(rows):
    full = [r for r in rows if r]
    if len(full) < 2: assert self_bleu(rows) is None
    else: assert self_bleu(rows) == pytest.approx(plain_bleu(full), abs=1e-9)


def test_self_bleu_is_that_of_sacrebleu():
    import sacrebleu
    g = np.random.default_rng(0)
    rows = [g.integers(0, 5, g.integers(4, 20)).tolist() for _ in range(9)]
    say = [' '.join(map(str, r)) for r in rows]
    one = lambda i: sacrebleu.sentence_bleu(say[i], say[:i]+say[i+1:], smooth_method='floor', smooth_value=.1, tokenize='none').score/100
    assert self_bleu(rows) == pytest.approx(np.mean([one(i) for i in range(9)]), abs=1e-6)


def test_self_bleu_looks_at_a_bounded_number():
    rows = [[i, i+1, i+2, i+3, i+4] for i in range(0, 50, 5)]
    assert self_bleu(rows+rows, most=10) == self_bleu(rows) < .1 < self_bleu(rows+rows, most=20) == 1


@settings(max_examples=60, deadline=None)
@given(rows_of(5), st.randoms())
def test_order_and_names_do_not_matter(rows, random):
    s = row_statistics(rows)
    assert json.dumps(s, allow_nan=False)
    other = [[100-t for t in r] for r in rows]
    random.shuffle(other)
    again = row_statistics(other)
    for k, v in s.items():
        assert again[k] == pytest.approx(v, abs=1e-9) if v is not None else again[k] is None, k
    for k in ('gen/distinct1', 'gen/distinct2', 'gen/rep1', 'gen/rep4', 'gen/self_bleu4'): assert s[k] is None or 0 <= s[k] <= 1+1e-12
    tokens = sum(map(len, rows))
    if tokens:
        assert s['gen/entropy'] <= math.log(max(map(len, rows)))+1e-9 and s['gen/entropy_pooled'] <= math.log(min(tokens, 6))+1e-9
        assert s['gen/entropy'] <= s['gen/entropy_pooled']*max(1, len(rows))+1e-9
    assert s['gen/tokens_per_row'] == (tokens/len(rows) if rows else None)


@settings(max_examples=40, deadline=None)
@given(rows_of(2))
def test_plain_counting(rows):
    for n in (1, 2, 3):
        grams = [tuple(r[i:i+n]) for r in rows for i in range(len(r)-n+1)]
        assert distinct(rows, n) == (len(set(grams))/len(grams) if grams else None)
        again = sum(tuple(r[i:i+n]) in [tuple(r[j:j+n]) for j in range(i)] for r in rows for i in range(len(r)-n+1))
        assert repeated(rows, n) == (again/len(grams) if grams else None)
    pairs = [(r[i], r[i+1]) for r in rows for i in range(len(r)-1)]
    assert stutter(rows) == (sum(a == b for a, b in pairs)/len(pairs) if pairs else None)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=12), st.sampled_from(['best_fit', 'concat']), st.integers(1, 9), st.integers(1, 3), st.integers(1, 30))
def test_windows_are_pieces_of_documents(lengths, strategy, length, prompt, num_rows):
    documents = [framed(np.arange(10+100*i, 10+100*i+n).astype(np.uint16), 1, 2) for i, n in enumerate(lengths)]
    packed = pack(documents, 13, strategy, 0)
    try: windows = real_windows([packed], num_rows, length, 2, prompt)
    except DataError: assert max(lengths) < prompt; return
    assert 0 < len(windows) <= num_rows
    for w in windows:
        assert prompt < len(w) <= prompt+length and 2 not in w and 0 not in w
        assert any(w == d[i:i+len(w)].tolist() for d in documents for i in range(len(d)))
        if len(w) < prompt+length: # it ends where the document or the row does
            assert any(w == d[i:i+len(w)].tolist() and (i+len(w) == len(d)-1 or len(w) <= 13) for d in documents for i in range(len(d)))


def test_windows_are_spread_and_no_more_is_read_than_needed():
    packed = pack([framed(np.full(5, 10+i, np.uint16), 1, 2) for i in range(40)], 8, 'best_fit', 0)
    def chunks():
        yield packed
        raise AssertionError('a second chunk was read')
    windows = real_windows(chunks(), 4, 3, 2)
    assert [w[1] for w in windows] == [10, 20, 30, 40]


def by_hand(prompt:list[int], row:list[int])->float:
    "Nats of a row, in windows of 12 side by side, one token at a time."
    ids, total = [*prompt, *row], 0.
    for i in range(len(prompt), len(ids)):
        start = (i-1)//shape.seq_len*shape.seq_len
        with torch.no_grad(): scores = network(torch.tensor([ids[start:i]]))[0, -1].double()
        total += F.cross_entropy(scores, torch.tensor(ids[i])).item()
    return total


@settings(max_examples=20, deadline=None)
@given(st.lists(st.tuples(st.lists(st.integers(0, 255), min_size=1, max_size=30), st.lists(st.integers(0, 255), max_size=40)), min_size=1, max_size=5), st.integers(1, 7))
def test_the_judge_adds_up(pairs, batch_rows):
    prompts, rows = zip(*pairs)
    found = judge_rows(judge, prompts, rows, tokenizer, batch_rows=batch_rows)
    tokens = sum(map(len, rows))
    if not tokens: assert found == {'gen/judge_nats': None, 'gen/judge_nats_per_byte': None}; return
    expected = sum(by_hand(p, r) for p, r in pairs)/tokens
    assert found['gen/judge_nats'] == pytest.approx(expected, rel=1e-4) == found['gen/judge_nats_per_byte'] # a token is a byte here


def test_another_tokenizer_is_read_as_text():
    letters = build_tokenizer(Tokenizer(kind='char'), corpus)
    texts = ['The cat saw a ball.', 'Once there was']
    a = judge_rows(judge, [[letters.bos_id]]*2, [letters.encode(t) for t in texts], letters)
    b = judge_rows(judge, [[tokenizer.bos_id]]*2, [tokenizer.encode(t) for t in texts], tokenizer)
    assert a == pytest.approx(b)
    special = judge_rows(judge, [[letters.bos_id]], [[letters.eos_id]], letters) # text without a letter
    assert special['gen/judge_nats'] is None


class Twice(AR):
    "Asks the network twice for every row that it writes, all tokens at once: as a sampler of two rounds."
    name, causal, is_bound = 'twice', False, True
    def generate(self, network, prompts, *, max_new_tokens, temperature=1., top_k=None, top_p=None, stop_id=None, generator=None):
        for _ in range(2): h = network(torch.tensor([p[:1]*max_new_tokens for p in prompts]))
        new = torch.multinomial((h[:, -1].float()/max(temperature, .01)).softmax(-1), max_new_tokens, True, generator=generator).tolist()
        return [r[:r.index(stop_id)] if stop_id in r else r for r in new]


def test_passes_are_counted_and_the_hook_goes():
    before = len(network._forward_hooks)
    out = write_rows(network, Twice(), [[1], [2], [3]], max_new_tokens=8, batch_rows=2)
    assert (out.nfe, out.costs()['gen/tokens_per_evaluation']) == (2, 4)
    assert write_rows(network, AR(), [[1], [2], [3]], max_new_tokens=8, batch_rows=2).nfe == 8
    def fails():
        with evaluations(network): raise ValueError
    with pytest.raises(ValueError): fails()
    assert len(network._forward_hooks) == before
    network.train()
    try:
        with pytest.raises(ConfigError): write_rows(network, AR(), [[1]], max_new_tokens=4, temperature=-1)
        assert network.training and len(network._forward_hooks) == before
    finally: network.eval()


def test_nothing_written_has_a_price_all_the_same():
    assert Written([[1]], [[]], 0, .5).costs() == {'gen/nfe': 0, 'gen/tokens_per_sec': 0, 'gen/tokens_per_evaluation': None}


@pytest.mark.parametrize('objective', [AR(), Twice()])
def test_a_sweep_of_any_family(objective):
    windows = [[tokenizer.bos_id, *tokenizer.encode(d.text)[:8]] for d, _ in zip(corpus.iterate('train'), range(6))]
    points = sweep(network, objective, tokenizer, windows, max_new_tokens=8, temperatures=(0.5, 1.), judge=judge, batch_rows=4)
    assert json.dumps(points, allow_nan=False) and [p['temperature'] for p in points] == [.5, 1., None]
    assert points == [p | {k: q[k] for k in ('gen/tokens_per_sec',) if k in q} for p, q in
                      zip(sweep(network, objective, tokenizer, windows, max_new_tokens=8, temperatures=(0.5, 1.), judge=judge, batch_rows=4), points)] # the same again
    real = points[-1]
    assert real['name'] == REAL and 'gen/nfe' not in real and real['gen/rows'] == 6
    assert real['gen/judge_nats'] == pytest.approx(judge_rows(judge, [w[:1] for w in windows], [w[1:] for w in windows], tokenizer)['gen/judge_nats'])
    png = plot_frontier({'one': points, 'two': points[1:]}, 'both')
    assert png[:4] == b'\x89PNG' and png == plot_frontier({'one': points, 'two': points[1:]}, 'both')


def test_a_judge_that_knows_a_bound_is_refused():
    with pytest.raises(ConfigError, match='only a bound'): judge_rows(judge._replace(objective=Twice()), [[1]], [[2]], tokenizer)
