"The bench of the samplers: who takes part, what text costs under each, the rule of equal quality. No time is asserted."
import itertools, json
import pytest, torch
from hypothesis import given, settings, strategies as st
from llmlab import tiny
from llmlab.config import Diffusion as DiffusionSettings, SDD as SDDSettings
from llmlab.data.corpora import open_corpus
from llmlab.data.tokenizer import build_tokenizer
from llmlab.eval.evaluate import OpenModel, text_rows
from llmlab.eval.generation import evaluations
from llmlab.eval.samplers import Contestant, bench_samplers, contestants, equal_quality, exact_nats, samplers_table, window_batch
from llmlab.files import ConfigError
from llmlab.models.ar import AR
from llmlab.models.diffusion import Diffusion
from llmlab.models.sdd import SDD
from llmlab.models.transformer import Shape, build
from llmlab.models.zoo import make_objective

pytestmark = pytest.mark.usefixtures('one_thread')
SPECIAL = {'PAD': 7, 'BOS': 8, 'EOS': 4, 'MASK': 9, 'UNK': 5, 'IGNORE': 6} # 0 to 6 can be predicted


def opinions(objective, vocab_size=10, seq_len=24, **k):
    "An untrained network whose guesses are far from even."
    net = build(Shape(**dict(vocab_size=vocab_size, seq_len=seq_len, d_model=16, num_layers=2, num_heads=2, num_kv_heads=2, d_ff=24) | k), seed=0)
    with torch.no_grad():
        for p in net.parameters():
            if p.ndim == 2: p.mul_(3.)
        if extras := objective.extras(net.shape):
            net.extras = extras
            for p in extras.parameters(): p.normal_(0, .3, generator=torch.Generator().manual_seed(5))
    return net.eval()

def opened(objective, tokenizer=None, **k): return OpenModel(opinions(objective, **k), objective, tokenizer, {'path': 'toy'})
def diffusion(**k): return Diffusion(DiffusionSettings(**k), SPECIAL)
def sdd(**k): return SDD(SDDSettings(**{'k': 3} | k), DiffusionSettings(), SPECIAL)


points = st.lists(st.tuples(st.integers(1, 64), st.floats(0, 5), st.floats(1, 1e4)), min_size=1, max_size=8)

@given(points, st.floats(0, .5))
def test_equal_quality(found, within):
    "It is a measured point, good enough, and nobody good enough is cheaper."
    rows = [dict(name=str(i), evaluations=n, exact_nats=nats, tokens_per_sec=speed) for i, (n, nats, speed) in enumerate(found)]
    e = equal_quality(rows, within)
    best, reference = rows[int(e['name'])], rows[int(e['reference'])]
    assert reference is next(r for r in rows if r['evaluations'] == max(r['evaluations'] for r in rows))
    assert best['exact_nats'] <= reference['exact_nats']+within and e['evaluations'] == best['evaluations'] <= reference['evaluations']
    assert not [r for r in rows if r['exact_nats'] <= reference['exact_nats']+within and (r['evaluations'], -r['tokens_per_sec']) < (best['evaluations'], -best['tokens_per_sec'])]
    assert e['speed'] == best['tokens_per_sec']/reference['tokens_per_sec']


def test_who_takes_part():
    names = lambda model, **k: [c.name for c in contestants(model, 20, **k)[0]]
    plain = names(opened(diffusion()), steps=(16, 4))
    assert plain == ['random, 16 steps', 'random, 4 steps', 'surest first, 16 steps', 'surest first, 4 steps', 'threshold 0.9', 'threshold 0.7', 'lowest entropy, 16 steps',
        'entropy bound 0.1', 'entropy bound 0.5', 'blocks of 16', *(f'blocks of 16, cache renewed every {n}' for n in (1, 4, 8))]
    mixed, why = contestants(opened(diffusion(), token_mix='conv3'), 20)
    assert not any('cache' in c.name for c in mixed) and 'conv3' in why[0]
    believing, why = contestants(opened(sdd(belief='alt')), 20, (16, 4))
    assert not any('cache' in c.name for c in believing) and 'sdd reads the whole canvas' in why[0]
    assert {c.objective.settings.belief for c in believing} == {'none', 'alt', 'carry'}
    assert all(c.name.endswith(f'belief {c.objective.settings.belief}') and c.order.endswith(f'belief {c.objective.settings.belief}') for c in believing)
    blocks, why = contestants(opened(diffusion(block=4)), 20, (20, 10, 5))
    assert [c.name for c in blocks if c.order == 'random'] == [f'random, {n} steps a block{more}' for more in ('', ', reading everything') for n in (4, 2, 1)] and 'exact cache' in why[0]
    for found in (mixed, believing, blocks): assert len({c.name for c in found}) == len(found)


def test_settings_of_training_do_not_show():
    mine, plain = (contestants(opened(diffusion(sampler=s)), 20)[0] for s in (dict(order='margin', remask=.5, steps=3), {}))
    assert [c.objective.sampler for c in mine] == [c.objective.sampler for c in plain]


def test_mistakes():
    for objective in (AR(), make_objective(tiny.config('model.architecture=sdd', 'model.sdd.process=swap').model, SPECIAL)):
        with pytest.raises(ConfigError, match='no samplers to choose from'): contestants(opened(AR())._replace(objective=objective), 20)
    with pytest.raises(ConfigError, match='1 or more'): contestants(opened(diffusion()), 20, (8, 0))
    for k in (dict(tokens=25), dict(tokens=0), dict(rows=0), dict(rounds=0), dict(prompt_tokens=0)):
        with pytest.raises(ConfigError, match='writes up to'): bench_samplers(opened(diffusion()), [], **{'tokens': 8} | k)


windows = [[8, 1, 2, 3, 0, 5, 6, 1, 2, 3, 3, 0], [8, 0, 1, 1], [8, 2, 6, 3, 3, 3, 1, 0]]

@pytest.mark.parametrize('objective', [diffusion(), diffusion(block=4), sdd(belief='carry')], ids=['plain', 'blocks', 'sdd'])
@pytest.mark.parametrize('order,steps', [('random', 5), ('prob', 3), ('entropy', None)])
def test_the_price_is_that_of_the_family(objective, order, steps):
    model, batch = opened(objective), window_batch(windows)
    with torch.no_grad(): ours = exact_nats(model.network, Contestant('c', 'c', objective.with_sampler(order=order, steps=steps)), batch)
    theirs = objective.exact_nll(model.network, batch, steps, order)
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize('options', [dict(commit='threshold', threshold=.4), dict(order='entropy', commit='entropy_bound', gamma=.5), dict(order='margin', block=2), dict(order='margin', block=2, cache='dual', refresh=2)], ids=str)
def test_prices_of_all_texts_add_up_to_one(options):
    "What the family's own exact score does not cover: adaptive numbers, blocks from the left, and an approximate cache."
    objective = diffusion()
    model, texts = opened(objective), [[8, *t] for t in itertools.product(range(7), repeat=3)]
    with torch.no_grad(): nats = exact_nats(model.network, Contestant('c', 'c', objective.with_sampler(**options)), window_batch(texts))
    torch.testing.assert_close(nats.neg().exp().sum(), torch.tensor(1.), atol=1e-4, rtol=0)


@settings(deadline=None, max_examples=20)
@given(st.lists(st.integers(2, 12), min_size=1, max_size=4), st.integers(1, 2), st.booleans())
def test_windows_do_not_see_each_other(lengths, prompt_tokens, cached):
    "A row costs the same beside others and alone; only what follows the prompt is paid for."
    texts = [[8, *[(7*i+j) % 7 for j in range(n)]] for i, n in enumerate(lengths)]
    batch = window_batch(texts, prompt_tokens)
    assert batch.weights.sum(1).tolist() == [n+1-prompt_tokens for n in lengths] and batch.num_targets == sum(n+1-prompt_tokens for n in lengths)
    objective = diffusion(sampler=dict(order='left', block=4, **({'cache': 'dual', 'refresh': 1} if cached else {})))
    model = opened(objective)
    with torch.no_grad():
        together = exact_nats(model.network, c := Contestant('c', 'c', objective), batch)
        alone = torch.cat([exact_nats(model.network, c, window_batch([t], prompt_tokens)) for t in texts])
    torch.testing.assert_close(together, alone, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize('words', [(), ('model.diffusion.block=4',), ('model.architecture=sdd',)], ids=['plain', 'blocks', 'sdd'])
def test_the_bench_runs(words):
    cfg = tiny.config('data.max_documents=40', 'tokenizer.kind=byte', 'model.architecture=diffusion', *words)
    tokenizer = build_tokenizer(cfg.tokenizer, open_corpus(cfg.data))
    rows = text_rows(tiny.documents()[:10], tokenizer, 24)
    model = opened(make_objective(cfg.model, tokenizer.special), tokenizer, vocab_size=tokenizer.vocab_size)
    judge = opened(AR(), tokenizer, vocab_size=tokenizer.vocab_size)
    with evaluations(model.network) as calls: result = bench_samplers(model, [rows], judge=judge, rows=5, tokens=12, steps=(12, 3), rounds=2, batch_rows=3, clock=lambda: float(len(calls)))
    json.dumps(result, allow_nan=False)
    text = samplers_table(result)
    assert {r['name'] for r in result['rows']} == {c.name for c in contestants(model, 12, (12, 3))[0]} and all(f"| {r['name']} |" in text for r in result['rows'])
    assert '| real text |' in text and all(why in text for why in result['left_out'])
    for r in result['rows']:
        assert r['tokens_per_evaluation'] == pytest.approx(12/r['evaluations']) and r['exact_nats'] > 0 and r['judge_nats'] is not None
        assert r['equal_quality']['evaluations'] <= max(x['evaluations'] for x in result['rows'] if x['order'] == r['order'])
        assert r['passes'] >= r['evaluations'] and (r['passes'] == r['evaluations'] or model.objective.name == 'diffusion' and model.objective.settings.block and 'everything' not in r['name'])
        if r['name'] == r['equal_quality']['reference']: assert r['ratio'] == r['low'] == r['high'] == 1.
    alone = bench_samplers(model, [rows], rows=5, tokens=12, steps=(12,), rounds=1, batch_rows=3)
    assert alone['real']['judge_nats'] is None and alone['about']['judge'] == 'none' and samplers_table(alone)
