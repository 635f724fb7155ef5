"Masked diffusion and SDD: bounds proved by adding up all texts, samplers, caches, conversions, resume."
import math
from itertools import combinations, permutations, product
from pathlib import Path
import numpy as np, pytest, torch, torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from torch.testing import assert_close
from llmlab import tiny
from llmlab.config import SDD as SDDSettings, Diffusion as DiffusionSettings
from llmlab.files import CheckpointError, ConfigError
from llmlab.models.ar import AR, shortlist
from llmlab.models.diffusion import Canvas, Diffusion, PlainReader, canvas_of, hide_by_time, hide_for_score, hidden_share, never, row_keys, times, uniform, vectors
from llmlab.models.sdd import SDD
from llmlab.models.transformer import Shape, build
from llmlab.packing.loader import Batch

SPECIAL = {'PAD': 7, 'BOS': 8, 'EOS': 4, 'MASK': 9, 'UNK': 5, 'IGNORE': 6} # 0 to 6 can be predicted
WORDS, L = 7, 3


pytestmark = pytest.mark.usefixtures('one_thread')


def gen(seed=0): return torch.Generator().manual_seed(seed)
def diffusion(seed=0, **k): return Diffusion(DiffusionSettings(**k), SPECIAL, seed)
def sdd(d=None, **k): return SDD(SDDSettings(**{'feedback_prob': 1., 'feedback_warmup_steps': 0, 'k': 3} | k), DiffusionSettings(**(d or {})), SPECIAL)

def network(objective=None, sharp=3., seed=0, **k):
    "An untrained network whose guesses are far from even, and whose beliefs matter."
    net = build(Shape(**{**dict(vocab_size=10, seq_len=24, d_model=16, num_layers=2, num_heads=2, num_kv_heads=2, d_ff=24), **k}), seed=seed)
    with torch.no_grad():
        for p in net.parameters():
            if p.ndim == 2: p.mul_(sharp)
        if objective and (extras := objective.extras(net.shape)):
            net.extras = extras
            for p in extras.parameters(): p.normal_(0, .3, generator=gen(5))
    return net.eval()

def rows_of(tokens:torch.Tensor, weights=None, document=None, **k)->Batch:
    tokens = torch.as_tensor(tokens)
    w = torch.ones(len(tokens), tokens.shape[1]-1) if weights is None else weights
    return Batch(tokens[:, :-1], tokens[:, 1:], w, torch.zeros_like(tokens[:, 1:]) if document is None else document, **k)

def language()->Batch:
    "Every text of three words, behind BOS."
    return rows_of([[SPECIAL['BOS'], *x] for x in product(range(WORDS), repeat=L)], one_document=True)

@torch.no_grad()
def costs(net, hidden:tuple[int, ...], objective=None)->torch.Tensor: # [R, L]: -log p of each hidden word of each text
    c = canvas_of(language())
    where = torch.zeros_like(c.hideable)
    where[:, [1+i for i in hidden]] = True
    z = c.tokens.masked_fill(where, SPECIAL['MASK'])
    p = net(z, causal=False).index_fill(-1, never(SPECIAL, z), -torch.inf).log_softmax(-1)
    return torch.where(where, -p.gather(2, c.tokens[..., None].clamp(max=9))[..., 0], 0.)[:, 1:]


# 1. Enumerations

def subsets(): return [s for n in range(1, L+1) for s in combinations(range(L), n)]

def test_the_bound_in_three_forms_and_what_it_bounds():
    net = network()
    each = {s: costs(net, s).sum(1) for s in subsets()}
    by_count = sum(each[s]*(1/math.comb(L, len(s)))/len(s) for s in subsets()) # n even in 1..L, weight L/n
    t = (torch.arange(4000).double()+.5)/4000
    by_time = sum(each[s].double()*((t**len(s)*(1-t)**(L-len(s)))/t).mean() for s in subsets()) # integral of dt/t
    assert_close(by_count.double(), by_time, rtol=1e-5, atol=1e-5)
    for schedule in ('cosine', 'poly'): # the bound does not know the schedule
        m, w = hidden_share(t, schedule)
        assert_close(by_count.double(), sum(each[s].double()*(m**len(s)*(1-m)**(L-len(s))*w).mean() for s in subsets()), rtol=1e-4, atol=1e-4)
    orders = list(permutations(range(L)))
    p = sum(torch.exp(-sum(costs(net, tuple(o[i:]))[:, o[i]] for i in range(L))) for o in orders)/len(orders) # written in random order
    assert_close(p.sum(), torch.tensor(1.), rtol=1e-5, atol=0)
    assert (by_count >= -p.log()-1e-5).all() and (by_count > -p.log()+1e-3).any()
    scores = diffusion().nll(net, language(), draws=300) # the estimator
    assert ((scores.nats-by_count).abs() < 5*scores.variance.sqrt()+.02).all() and scores.count.eq(L).all()


@pytest.mark.parametrize('settings', [{}, {'masks': 'count'}, {'schedule': 'cosine'}, {'schedule': 'poly', 'power': .5}], ids=str)
def test_the_loss_is_the_bound_on_average(settings):
    net, one = network(), language()
    wanted = sum(costs(net, s).sum(1)*(1/math.comb(L, len(s)))/len(s) for s in subsets())[137]
    many = rows_of(torch.cat((one.tokens, one.targets[:, -1:]), 1)[137:138].expand(20_000, -1), one_document=True, place=0)
    with torch.no_grad(): loss = diffusion(**settings).loss(net, many)
    assert loss.count == L*20_000
    assert_close(loss.sum/20_000, wanted, rtol=.03, atol=0)


@pytest.mark.parametrize('order', ['left', 'random', 'prob', 'margin', 'entropy'])
@pytest.mark.parametrize('steps', [None, 2, 1])
def test_exact_likelihoods_add_up_to_one(order, steps):
    o = diffusion()
    nats = o.exact_nll(network(), language(), steps, order)
    assert_close(nats.neg().exp().sum(), torch.tensor(1.), rtol=1e-5, atol=0)


@pytest.mark.parametrize('belief', ['none', 'alt', 'carry'])
@pytest.mark.parametrize('readin', ['mix', 'slots'])
@pytest.mark.parametrize('steps', [None, 2])
def test_exact_likelihoods_with_a_belief_add_up_to_one(belief, readin, steps):
    o = sdd(readin=readin)
    net = network(o)
    nats = o.exact_nll(net, language(), steps, 'prob', belief)
    assert_close(nats.neg().exp().sum(), torch.tensor(1.), rtol=1e-5, atol=0)
    if belief == 'carry': assert not torch.allclose(nats, o.exact_nll(net, language(), steps, 'prob', 'none'), atol=1e-3)


@pytest.mark.parametrize('belief', ['none', 'alt', 'carry'])
def test_the_bound_along_a_path_is_a_bound(belief):
    "All ways in which three words can appear in two steps: their mean probability is that of the sampler, their mean cost the bound."
    o, batch, T = sdd(), language(), 2
    net, c = network(o), canvas_of(batch)
    p, bound = 0., 0.
    for steps in product((1, 2), repeat=L): # the step at which each word appears; 2 comes first
        read, when = o.reader(net, c, belief), torch.tensor([0, *steps])
        log_p, cost = 0., 0.
        for i in (2, 1):
            hidden = (when >= 0)[None] & (when <= i)[None] & c.hideable
            with torch.no_grad(): logits = read(c.tokens.masked_fill(hidden, SPECIAL['MASK']), hidden)
            each = torch.zeros(c.tokens.shape).masked_scatter(hidden, -logits.log_softmax(-1).gather(1, c.tokens[hidden][:, None])[:, 0])
            log_p, cost = log_p-(each*(when == i)).sum(1), cost+each.sum(1)/i
        p, bound = p+log_p.exp()/T**L, bound+cost/T**L
    assert_close(p.sum(), torch.tensor(1.), rtol=1e-5, atol=0)
    assert (bound >= -p.log()-1e-5).all()
    path = torch.stack([o.path_nll(net, Batch(batch.tokens, batch.targets, batch.weights, batch.document, torch.arange(len(batch.tokens))+1000*i, True), T, belief) for i in range(150)])
    assert_close(path.mean(0).mean(), bound.mean(), rtol=.02, atol=0)


def test_a_belief_on_the_same_canvas_keeps_the_bound():
    o, batch = sdd(), language()
    net = network(o)
    plain, deep = (o.nll(net, batch, draws=64, refine=r).nats for r in (0, 1))
    assert not torch.allclose(plain, deep, atol=1e-2)
    assert deep.neg().exp().sum() <= 1+1e-3 # a bound above -log p: the texts' masses cannot exceed one


# 2. Zeros in the read-in, or no candidates: masked diffusion, bit for bit

@pytest.mark.parametrize('readin', ['mix', 'slots'])
def test_sdd_begins_as_masked_diffusion(readin):
    o, plain = sdd(readin=readin), diffusion()
    net = network()
    net.extras = o.extras(net.shape)
    batch = rows_of(torch.randint(WORDS, (6, 20), generator=gen()), place=12)
    assert torch.equal(o.loss(net, batch).sum, plain.loss(net, batch).sum) and o.loss(net, batch).parts['belief'][0] == 1
    c = canvas_of(batch)
    z = c.tokens.masked_fill(c.hideable, SPECIAL['MASK'])
    read, other = o.reader(net, c, 'carry'), plain.reader(net, c)
    with torch.no_grad():
        for _ in range(3): assert torch.equal(read(z, c.hideable), other(z, c.hideable))
    moved = network(sdd(readin=readin))
    assert torch.equal(sdd(readin=readin, k=0).loss(moved, batch).sum, plain.loss(moved, batch).sum)
    assert not torch.equal(sdd(readin=readin).loss(moved, batch).sum, plain.loss(moved, batch).sum)


def test_the_read_in_learns():
    o = sdd()
    net = network()
    net.extras = o.extras(net.shape)
    o.loss(net, rows_of(torch.randint(WORDS, (6, 20), generator=gen()), place=12)).sum.backward()
    assert all(p.grad.abs().max() > 0 for p in net.extras.parameters())


# 3. What samplers may not do

SAMPLERS = [dict(), dict(steps=3), dict(order='prob'), dict(order='drawn', steps=5), dict(order='margin', steps=4), dict(order='entropy', position_temperature=2.), dict(order='left', steps=5), dict(commit='threshold', threshold=.3),
    dict(order='prob', commit='entropy_bound', gamma=1.), dict(steps=6, remask=.7), dict(order='prob', steps=6, remask=1., remask_schedule='cap'), dict(order='prob', steps=5, remask=.5, remask_schedule='conf'),
    dict(block=4), dict(block=3, order='prob', steps=2), dict(block=4, cache='dual', order='prob', refresh=2)]

def refused(family, sampler):
    "Blocks of the model are the blocks of the writing; a belief is about all tokens."
    o = sdd() if family == 'sdd' else diffusion(block=4)
    with pytest.raises(ConfigError): o.with_sampler(**sampler).generate(network(o), [[8]], max_new_tokens=4, temperature=1., generator=gen())

@pytest.mark.parametrize('sampler', SAMPLERS, ids=str)
@pytest.mark.parametrize('family', ['diffusion', 'shift', 'blocks', 'sdd'])
def test_samplers_write_everything_and_keep_what_is_given(sampler, family):
    if family == 'blocks' and 'block' in sampler or family == 'sdd' and 'cache' in sampler: return refused(family, sampler)
    o = {'diffusion': diffusion, 'shift': lambda **k: diffusion(shift=True, **k), 'blocks': lambda **k: diffusion(block=4, **k), 'sdd': lambda **k: sdd(d=k)}[family](sampler=sampler)
    net = network(o)
    g = gen(3)
    rows = [torch.randint(WORDS, (n,), generator=g).tolist() for n in (19, 7, 12)]
    hidden = [(torch.rand(len(r), generator=g) < p).tolist() for r, p in zip(rows, (.7, .5, 1.))]
    for h in hidden: h[0] = False
    before = [list(r) for r in rows]
    out = o.fill(net, rows, hidden, temperature=1., generator=gen(4))
    assert rows == before and [len(r) for r in out] == [19, 7, 12]
    for r, h, new in zip(rows, hidden, out):
        assert [t for t, x in zip(new, h) if not x] == [t for t, x in zip(r, h) if not x]
        assert not set(new) & {SPECIAL['MASK'], SPECIAL['PAD'], SPECIAL['BOS']}
    new = o.generate(net, [[8], [8, 1, 2, 3]], max_new_tokens=11, temperature=1., generator=gen(4))
    assert [len(r) for r in new] == [11, 11] and not set(sum(new, [])) & {SPECIAL['MASK'], SPECIAL['PAD'], SPECIAL['BOS']}
    assert new == o.generate(net, [[8], [8, 1, 2, 3]], max_new_tokens=11, temperature=1., generator=gen(4))


def test_texts_longer_than_a_row_and_stops():
    o = diffusion(sampler=dict(order='prob'))
    net = network(o)
    new = o.generate(net, [[8], [8]+[1]*30], max_new_tokens=70, temperature=1., generator=gen())
    assert [len(r) for r in new] == [70, 70]
    stop = new[0][5]
    again = o.generate(net, [[8], [8]+[1]*30], max_new_tokens=70, temperature=1., generator=gen(), stop_id=stop)
    assert all(stop not in r for r in again) and len(again[0]) < 70
    assert o.generate(net, [], max_new_tokens=5, temperature=0) == [] and o.generate(net, [[8]], max_new_tokens=0, temperature=0) == [[]]
    for bad, says in (([[]], 'prompt 0 has no tokens'),):
        with pytest.raises(ConfigError, match=says): o.generate(net, bad, max_new_tokens=5, temperature=0)
    with pytest.raises(ConfigError, match='give a generator'): diffusion().generate(net, [[8]], max_new_tokens=5, temperature=0)
    with pytest.raises(ConfigError, match='marks of what is hidden'): o.fill(net, [[8, 1]], [[False]], temperature=0)
    with pytest.raises(ConfigError, match='depends on what is drawn'): diffusion().exact_nll(net, language(), order='drawn')
    with pytest.raises(ConfigError, match='first token'): diffusion(shift=True, sampler=dict(order='prob')).fill(net, [[8, 1]], [[True, False]], temperature=0)


def test_as_many_steps_as_asked_for():
    for steps in (1, 3, 8):
        for order in ('random', 'prob'):
            o = diffusion(sampler=dict(order=order, steps=steps))
            writer = o.writer(network(o))
            writer.generate([[8], [8, 1, 2]], max_new_tokens=16, generator=gen())
            assert writer.evaluations == steps if order == 'prob' else writer.evaluations <= steps


def test_random_order_is_even():
    "Each token is as likely to be written in the first of four steps as any other."
    o, first = diffusion(sampler=dict(steps=4)), torch.zeros(8)
    net = network(o)
    def watch(z, hidden, read):
        nonlocal first
        if not seen: first += (~hidden[:, 1:]).float().sum(0)
        seen.append(1)
    for i in range(10):
        seen = []
        o.generate(net, [[8]]*200, max_new_tokens=8, temperature=1., generator=gen(i), watch=watch)
    assert (first/2000-.25).abs().max() < .04


# 4. One token a block is an autoregressive model

@pytest.mark.parametrize('masks', ['bernoulli', 'count'])
def test_blocks_of_one_are_autoregressive(masks):
    net = network(isolate_documents=True)
    g = gen()
    tokens = torch.randint(WORDS, (4, 21), generator=g)
    document = (torch.arange(20) >= 11).long().expand(4, -1).clone()
    weights = torch.ones(4, 20); weights[:, 10] = 0 # the target there begins the second document
    batch = rows_of(tokens, weights, document, place=3)
    with torch.no_grad(): # columns that diffusion never predicts, far from every vector
        p = net(batch.tokens, document=document).index_fill(-1, never(SPECIAL, tokens), -torch.inf).log_softmax(-1)
    wanted = (-p.gather(2, batch.targets[..., None])[..., 0]*weights).sum(1)
    one = diffusion(block=1, shift=True, masks=masks)
    assert_close(one.nll(net, batch).nats, wanted, rtol=1e-5, atol=1e-4)
    assert_close(one.exact_nll(net, batch), wanted, rtol=1e-5, atol=1e-4)
    if masks == 'count': assert_close(one.loss(net, batch).sum, wanted.sum(), rtol=1e-5, atol=1e-3) # the first step's loss is AR's
    wrong = diffusion(block=1, shift=False, masks=masks).nll(net, batch).nats
    assert (wrong.sum()-wanted.sum()).abs() > 1.


def test_one_block_for_the_row_is_masked_diffusion():
    net = network(position='none') # the halves of a row stand at the same places
    batch = rows_of(torch.randint(WORDS, (4, 21), generator=gen()), place=3)
    with torch.no_grad(): a, b = (vectors(net, batch.tokens.masked_fill(batch.tokens > 3, 9), Canvas(batch.tokens, batch.tokens > 3, None), block) for block in (None, 64))
    assert_close(a, b, rtol=1e-5, atol=1e-5)


# 5, 6. Batches and caches

@pytest.mark.parametrize('k', [dict(), dict(block=4), dict(block=4, shift=True), dict(sampler=dict(order='prob', block=4)), dict(sampler=dict(order='prob', block=4, cache='dual', refresh=3)), 'sdd'], ids=str)
def test_greedy_writing_does_not_depend_on_the_batch(k):
    o = sdd(d=dict(sampler=dict(order='prob')), belief='carry') if k == 'sdd' else diffusion(**{'sampler': dict(order='prob')} | k)
    net = network(o)
    prompts = [[8], [8, 1, 2, 3, 1, 2], [8, 3, 3]]
    together = o.generate(net, prompts, max_new_tokens=9, temperature=0)
    assert together == [o.generate(net, [p], max_new_tokens=9, temperature=0)[0] for p in prompts]


@pytest.mark.parametrize('shift', [False, True])
def test_dual_cache_that_is_always_fresh_is_no_cache(shift):
    net = network()
    make = lambda **k: diffusion(shift=shift, sampler=dict(order='prob', block=5, **k)).generate(net, [[8], [8, 1, 2, 3]], max_new_tokens=17, temperature=0)
    assert make(cache='dual', refresh=1) == make()


@pytest.mark.parametrize('shift', [False, True])
@settings(max_examples=15, deadline=None)
@given(block=st.integers(1, 6), lengths=st.lists(st.integers(1, 9), min_size=1, max_size=3), seed=st.integers(0, 99))
def test_the_cache_of_blocks_is_exact(shift, block, lengths, seed):
    o = diffusion(block=block, shift=shift, sampler=dict(order='prob'))
    net, g = network(o), gen(seed)
    prompts = [[8, *torch.randint(WORDS, (n-1,), generator=g).tolist()] for n in lengths]
    cached = o.generate(net, prompts, max_new_tokens=9, temperature=0)
    o.writer = lambda network: type(writer)(network, lambda canvas: o.reader(network, canvas), writer.sampler, writer.special, writer.settings, writer.shift)
    writer = Diffusion.writer(o, net)
    assert cached == o.generate(net, prompts, max_new_tokens=9, temperature=0)


# 7. Padding, documents, prompts

def test_padding_is_not_seen():
    g = gen()
    tokens = torch.randint(WORDS, (3, 21), generator=g)
    document = torch.where(torch.arange(20) < 13, 0, -1).expand(3, -1)
    weights = (torch.arange(20) < 12).float().expand(3, -1)
    for o in (diffusion(), sdd(), sdd(readin='slots')):
        net = network(o)
        other = tokens.clone(); other[:, 13:] = torch.randint(WORDS, (3, 8), generator=g)
        a, b = (o.nll(net, rows_of(t, weights, document), draws=4).nats for t in (tokens, other))
        assert_close(a, b, rtol=0, atol=0)
        short = o.exact_nll(net, rows_of(tokens[:, :13]), order='left')
        assert_close(o.exact_nll(net, rows_of(tokens, weights, document), order='left'), short, rtol=1e-4, atol=1e-4)


def test_a_document_is_scored_as_if_alone():
    o, tokens = diffusion(), torch.randint(WORDS, (1, 21), generator=gen())
    net = network(o)
    document, weights = (torch.arange(20) >= 8).long()[None], torch.ones(1, 20)
    weights[0, 7] = 0
    packed = o.exact_nll(net, rows_of(tokens, weights, document), order='left')
    alone = o.exact_nll(net, rows_of(tokens[:, :8]), order='left') + o.exact_nll(net, rows_of(tokens[:, 8:]), order='left')
    assert_close(packed, alone, rtol=1e-4, atol=1e-4)


def test_prompts_are_never_hidden():
    weights = (torch.arange(20) >= 9).float().expand(5, -1)
    c = canvas_of(rows_of(torch.randint(WORDS, (5, 21), generator=gen()), weights))
    for place in range(30):
        hidden, _ = hide_by_time(c, place*5+torch.arange(5), DiffusionSettings())
        assert not hidden[:, :10].any()
    for draw in range(8): assert not hide_for_score(c, torch.arange(5), draw, 8)[0][:, :10].any()


# 8, 9. top-p, positions

@given(st.integers(2, 12), st.floats(.01, 1.), st.integers(0, 999))
def test_top_p_keeps_the_smallest_set(V, p, seed):
    logits = torch.randn(1, V, generator=gen(seed))*2
    q, ids = shortlist(logits, top_p=p)
    best = logits.softmax(-1).sort(descending=True).values[0]
    kept = int((q > 0).sum())
    assert kept == 1 or best[:kept-1].sum() < p+1e-6
    assert best[:kept].sum() > p-1e-6


def test_positions_matter():
    net, x = network(), torch.randint(WORDS, (1, 12), generator=gen())
    order = torch.randperm(12, generator=gen(1))
    with torch.no_grad(): a, b = net(x, causal=False)[:, order], net(x[:, order], causal=False)
    assert (a-b).abs().max() > .01


# 10. Training resumes exactly; other weights to begin with

FAMILIES = {'diffusion': ['model.architecture=diffusion'], 'blocks': ['model.architecture=diffusion', 'model.diffusion.block=8', 'model.diffusion.masks=count'],
            'sdd': ['model.architecture=sdd', 'model.sdd.feedback_warmup_steps=0', 'model.sdd.k_schedule=[1, 4]', 'model.sdd.k_warmup_steps=5'],
            'sdd, all of it': ['model.architecture=sdd', 'model.sdd.readin=slots', 'model.sdd.feedback_prob=1', 'model.sdd.feedback_warmup_steps=0', 'model.sdd.consistency=.3', 'model.sdd.belief_dropout=.2', 'model.sdd.ignore_weight=.1', 'optim.ema=.9'],
            'swap': ['model.architecture=sdd', 'model.sdd.process=swap']}

def train(folder:Path, *more:str, resume=None, steps=None, say=lambda line: None):
    from llmlab.recipes import pretrain, resume_settings
    from llmlab.trainer.loop import Limit
    from llmlab.trainer.tracking import Stopped
    here = [f'run.folder={folder/"runs"}', f'packing.folder={folder/"cache"}', 'trainer.max_steps=14', 'trainer.eval_interval=7', 'trainer.save_interval=50', 'trainer.log_interval=2', 'trainer.sample_tokens=6', 'trainer.eval_rows=8', 'run.threads=1']
    if resume: cfg, path = resume_settings(resume, [], folder/'runs')
    else: cfg, path = tiny.config(*here, *more), None
    try: return pretrain(cfg, resume=path, limit=Limit(steps=steps), screen='none', say=say)
    except Stopped as e: return e


@pytest.mark.parametrize('family', FAMILIES)
def test_training_resumes_exactly(family, tmp_path):
    from safetensors.torch import load_file
    from llmlab.files import read_jsonl
    words = [*FAMILIES[family], 'trainer.gradient_accumulation_steps=2']
    train(tmp_path, *words, 'run.name=straight')
    train(tmp_path, *words, 'run.name=broken', steps=5)
    train(tmp_path, resume='broken', steps=4)
    train(tmp_path, resume='broken')
    unlike = {'train/tokens_per_sec', 'train/memory_gb', 'train/mfu', 'train/data_wait', 'time', 'seconds'}
    a, b = (tmp_path/'runs'/n for n in ('straight', 'broken'))
    records = [[{k: v for k, v in r.items() if k not in unlike} for r in read_jsonl(x/'metrics.jsonl')] for x in (a, b)]
    assert records[0] == records[1]
    for file in ('model.safetensors', *(['ema.safetensors'] if 'optim.ema=.9' in words else [])):
        x, y = (load_file(sorted((n/'checkpoints').glob('step-*'))[-1]/file) for n in (a, b))
        assert x.keys() == y.keys()
        for k in x: assert_close(x[k], y[k], rtol=0, atol=0)
    names = set().union(*records[0])
    assert {'train/loss', 'train/accuracy', 'train/lr', 'train/grad_norm', 'val/loss', 'val/nll', 'val/perplexity', 'val/bits_per_byte', 'val/is_bound', 'val/accuracy'} <= names
    if family.startswith('sdd'): assert {'train/k', 'sdd/carry_gap', 'sdd/feedback_gain'} <= names
    if family == 'sdd': assert [k for r in records[0] if (k := r.get('train/k'))] == [1., 1., 2.5, 4., 4., 4., 4.]
    if family == 'sdd, all of it': assert {'train/consistency', 'train/ignore_acc'} <= names


def test_other_weights_to_begin_with(tmp_path):
    from llmlab.recipes import build as parts_of, evaluate, generate, open_trained, settle_shift
    quiet = lambda line: None
    train(tmp_path, 'run.name=ar', 'model.qk_norm=false'); train(tmp_path, 'run.name=md', 'model.architecture=diffusion')
    def begun(*words):
        cfg = settle_shift(tiny.config(f'run.folder={tmp_path/"runs"}', f'packing.folder={tmp_path/"cache"}', 'run.threads=1', *words), quiet)
        parts = parts_of(cfg, quiet)
        batch = next(parts.loader)
        parts.loader.close()
        return parts, batch
    def loss(parts, batch): return parts.objective.loss(parts.network, batch).sum.item()
    ar, _ = open_trained('ar', runs=tmp_path/'runs'); md, _ = open_trained('md', runs=tmp_path/'runs')
    # diffusion -> sdd: the very same first loss, belief or not
    parts, batch = begun('model.architecture=sdd', 'model.init=md', 'model.sdd.feedback_prob=1', 'model.sdd.feedback_warmup_steps=0')
    md.objective.seed = 1337
    assert loss(parts, batch) == loss(type('', (), {'network': md.network, 'objective': md.objective}), batch)
    # ar -> diffusion: with blocks of one the first loss is AR's, without MASK, PAD and BOS in its softmax
    parts, batch = begun('model.architecture=diffusion', 'model.init=ar', 'model.diffusion.block=1', 'model.diffusion.masks=count', 'model.qk_norm=false')
    assert parts.objective.shift
    with torch.no_grad():
        p = ar.network(batch.tokens, document=batch.document).index_fill(-1, never(ar.tokenizer.special, batch.tokens), -torch.inf).log_softmax(-1)
        wanted = -p.gather(2, batch.targets[..., None])[..., 0][batch.weights > 0].sum().item()
    assert loss(parts, batch) == pytest.approx(wanted, rel=1e-4)
    parts.objective.shift = False
    assert loss(parts, batch) > 1.5*wanted # the wrong shift is a wrong model
    with pytest.raises(CheckpointError, match='tokenizer.path='): begun('model.architecture=diffusion', 'model.init=ar', 'tokenizer.vocab_size=300')
    with pytest.raises(CheckpointError, match='do not fit'): begun('model.architecture=diffusion', 'model.init=ar', 'model.d_model=32')


# 11, 12. Times, ids

@pytest.mark.parametrize('world, rows, micro', [(1, 32, 1), (4, 8, 1), (2, 4, 4)])
def test_times_are_spread_over_ranks_and_micro_batches(world, rows, micro):
    for step in (0, 7, 10**9):
        t = torch.cat([times((step*micro+m)*world*rows + r*rows + torch.arange(rows)) for m in range(micro) for r in range(world)]).sort().values
        assert len(t) == 32 and t.min() > 0 and t.max() <= 1
        assert torch.cat((t[:1], t.diff(), 1-t[-1:])).max() < 2.7/32 # drawn ones leave gaps of about 4/32


def test_masks_do_not_depend_on_the_batch():
    c = canvas_of(rows_of(torch.randint(WORDS, (6, 21), generator=gen())))
    whole, _ = hide_by_time(c, 40+torch.arange(6), DiffusionSettings())
    half = Canvas(c.tokens[3:], c.hideable[3:], None)
    assert torch.equal(whole[3:], hide_by_time(half, 43+torch.arange(3), DiffusionSettings())[0])
    later = hide_by_time(c, 40+torch.arange(6), DiffusionSettings(), later=.2)[0]
    assert (later | ~whole).all() and later.sum() > whole.sum() # the same tokens, and more
    assert not torch.equal(whole, hide_by_time(c, 40+torch.arange(6), DiffusionSettings(), seed=1)[0])


def test_special_tokens_are_no_words():
    from llmlab.data.tokenizer import train_tokenizer
    for kind in ('bpe', 'byte', 'char'):
        t = train_tokenizer(tiny.documents(), tiny.config(f'tokenizer.kind={kind}').tokenizer)
        ids = set(t.encode('<|mask|><|ignore|><|pad|> !"#$%')) 
        assert not ids & {t.mask_id, t.ignore_id, t.pad_id, t.bos_id} and len(set(t.special.values())) == len(t.special)
    with pytest.raises(ConfigError, match='no MASK token'): Diffusion(DiffusionSettings(), {'EOS': 1})


# Infilling through the recipes

def test_infilling(tmp_path):
    from llmlab.recipes import fill
    train(tmp_path, 'run.name=md', 'model.architecture=diffusion'); train(tmp_path, 'run.name=ar')
    text = 'The fox saw a <fill:2> stone. It <fill:3>'
    found, = fill('md', [text], runs=tmp_path/'runs')
    assert found['text'].startswith('The fox saw a ') and ' stone. It ' in found['text'] and 0 < found['nats'] < 9
    assert fill('md', [text], runs=tmp_path/'runs') == [found] != fill('md', [text], runs=tmp_path/'runs', seed=1)
    with pytest.raises(ConfigError, match='cannot fill a gap'): fill('ar', [text], runs=tmp_path/'runs')
    with pytest.raises(ConfigError, match='<fill:5>'): fill('md', ['no gap'], runs=tmp_path/'runs')
    with pytest.raises(ConfigError, match='too long'): fill('md', ['<fill:900>'], runs=tmp_path/'runs')


@pytest.mark.parametrize('family', ['diffusion', 'sdd'])
def test_the_network_alone_is_compiled(family, monkeypatch):
    "Here without generating code: the graphs are run as they are."
    from llmlab.config import Optim
    from llmlab.eval.evaluate import looking
    from llmlab.trainer.loop import fit
    from llmlab.trainer.machine import Machine
    from llmlab.trainer.optim import build_optimizer
    o, weights, graphs = diffusion() if family == 'diffusion' else sdd(k=4), [], []
    def backend(graph, inputs): graphs.append(graph); return graph.forward
    monkeypatch.setattr(torch.nn.Module, 'compile', lambda self: setattr(self, '_compiled_call_impl', torch.compile(self._call_impl, backend=backend, dynamic=False)))
    for compiled in (False, True):
        net = network()
        net.extras = o.extras(net.shape)
        batches = (rows_of(torch.randint(WORDS, (4, 25), generator=gen(i)), place=4*i, one_document=True) for i in range(4))
        fit(net, o, batches, build_optimizer(net, Optim(lr=.01)), total_steps=4, log_every=4, machine=Machine(compile=compiled))
        with looking(net):
            num = len(graphs)
            o.generate(net, [[8]], max_new_tokens=5, temperature=1., generator=gen())
            assert len(graphs) == num and (num > 0) == compiled # what is written is not compiled
        weights.append(net.state_dict())
    for a, b in zip(*(w.values() for w in weights)): assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_exact_likelihood_by_the_evaluator(tmp_path):
    from llmlab.recipes import evaluate
    train(tmp_path, 'run.name=sdd', 'model.architecture=sdd'); train(tmp_path, 'run.name=swap', 'model.architecture=sdd', 'model.sdd.process=swap')
    a, b = (evaluate('sdd', metrics=['exact'], rows=8, sampler=s, runs=tmp_path/'runs') for s in ({'order': 'prob', 'steps': 4}, {'order': 'left', 'belief': 'carry'}))
    assert a['val/nll_exact_of'] == 'order prob, 4 steps, belief alt' and b['val/nll_exact_of'] == 'order left, one a token steps, belief carry'
    assert a['val/nll_exact'] > 0 and a['val/nll_exact'] != b['val/nll_exact'] and 'val/loss' not in a
    with pytest.raises(ConfigError, match='no exact likelihood'): evaluate('swap', metrics=['exact'], runs=tmp_path/'runs')


@pytest.mark.parametrize('sampler', [dict(order='prob'), dict(order='prob', steps=2), dict(order='margin', steps=2), dict(commit='threshold', threshold=.4), dict(order='left', steps=2), dict(order='entropy', commit='entropy_bound', gamma=.8)], ids=str)
def test_what_is_written_has_the_likelihood_that_is_said(sampler):
    "Many texts of three words, written at temperature 1, against the exact probability of each."
    from llmlab.models.diffusion import Dials, Unveiler, write
    from llmlab.config import Sampler
    o = diffusion(sampler=sampler)
    net, c, s = network(o, sharp=5.), canvas_of(language()), Sampler(**sampler)
    unveil = Unveiler(o.reader(net, c), s, Dials(), o.mask_id, torch.zeros(c.tokens.shape), truth=c.tokens)
    with torch.no_grad(): write(unveil.read, c.tokens.masked_fill(c.hideable, o.mask_id), c.hideable, unveil)
    p = unveil.nats.neg().exp()
    assert_close(p.sum(), torch.tensor(1.), rtol=1e-5, atol=0)
    rows = torch.tensor(o.generate(net, [[8]]*20_000, max_new_tokens=L, temperature=1., generator=gen(1)))
    seen = torch.bincount((rows*torch.tensor([WORDS**2, WORDS, 1])).sum(1), minlength=WORDS**L)/20_000
    assert (seen-p).abs().sum()/2 < .08 # about .05 is chance: 343 texts, 20,000 draws


@pytest.mark.parametrize('words, says', [
    (['model.architecture=diffusion', 'model.position=learned'], 'no place for the last token'), (['model.architecture=sdd', 'model.diffusion.block=4'], 'writes whole rows'),
    (['model.architecture=diffusion', 'model.diffusion.block=4', 'model.token_mix=conv3'], 'look over the edges'), (['model.diffusion.block=4'], 'has no use with model.architecture ar'),
    (['model.architecture=diffusion', 'model.diffusion.block=4', 'model.diffusion.sampler.block=4'], 'already is the block'), (['model.architecture=sdd', 'model.sdd.process=swap', 'model.sdd.consistency=1'], 'process swap'),
    (['model.architecture=diffusion', 'model.diffusion.sampler.cache=dual'], 'needs a block'), (['model.architecture=sdd', 'model.diffusion.sampler.cache=dual', 'model.diffusion.sampler.block=4'], 'reads them all'),
    (['model.architecture=diffusion', 'model.diffusion.masks=count', 'model.diffusion.schedule=cosine'], 'schedule loglinear'), (['model.architecture=sdd', 'model.sdd.k_schedule=[]'], 'list of numbers'),
    (['model.architecture=sdd', 'model.sdd.feedback=pair', 'model.sdd.belief=carry'], 'carried in training'), (['model.architecture=sdd', 'model.sdd.process=swap', 'model.diffusion.sampler.steps=3'], 'model.sdd.swap'),
    (['model.architecture=diffusion', 'model.diffusion.sampler.remask=.5', 'model.diffusion.sampler.commit=threshold'], 'needs commit schedule')], ids=str)
def test_settings_that_do_not_go_together(words, says):
    with pytest.raises(ConfigError, match=says): tiny.config(*words)
