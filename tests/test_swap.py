"The first SDD: the process as it was, its disguise, its two samplers, its bound."
import math
from itertools import combinations
import pytest, torch
from hypothesis import given, settings, strategies as st
from torch.testing import assert_close
from llmlab.config import SDD, Swap
from llmlab.files import ConfigError
from llmlab.models.diffusion import canvas_of, uniform
from llmlab.models.swap import RowNoise, SwapSDD, View, add_noise, bound_weight, clean_state, denoise_step, hidden_share, k_at, noise_level, posterior_sampler, shown, time_of
from llmlab.models.transformer import Shape, build
from llmlab.packing.loader import Batch

SPECIAL = {'PAD': 34, 'BOS': 35, 'EOS': 36, 'MASK': 37, 'UNK': 38, 'IGNORE': 39}
RULES = [Swap(schedule=s, swap_rule=r) for s in ('cosine', 'linear') for r in ('probability', 'flat')]


pytestmark = pytest.mark.usefixtures('one_thread')


def gen(seed=0): return torch.Generator().manual_seed(seed)
def family(k=4, rows_per_step=1, swap=None, **more): return SwapSDD(SDD(process='swap', k=k, swap=swap or {}, **more), SPECIAL, rows_per_step)
def network(seed=1, objective=None, **k):
    net = build(Shape(**{**dict(vocab_size=40, seq_len=16, d_model=32, num_layers=2, num_heads=4, num_kv_heads=2, d_ff=48), **k}), seed=seed)
    for p in net.parameters(): p.data.mul_(4 if p.ndim == 2 else 1) # livelier than first weights
    net.extras = (objective or family()).extras(net.shape, seed)
    return net
def batch(B=3, T=16, seed=0, rows=None):
    g = gen(seed)
    x = torch.randint(34, (B, T+1), generator=g)
    document = torch.rand(B, T+1, generator=g).lt(.2).long().cumsum(1)
    document[0, T-3:], x[0, T-3:] = -1, SPECIAL['PAD']
    weights = ((document[:, 1:] == document[:, :-1]) & (document[:, 1:] >= 0)).float()
    return Batch(x[:, :-1], x[:, 1:], weights, document[:, :-1], rows=rows)


# The process

def test_noise_on_average():
    t = (torch.arange(200000, dtype=torch.float64)+.5)/200000
    assert noise_level(t).square().mean().item() == pytest.approx(3/2-4/math.pi, abs=1e-9)
    assert noise_level(torch.tensor([0., 1.])).tolist() == pytest.approx([0, 1])
    assert noise_level(torch.tensor([1e-4], dtype=torch.float64)).item() == pytest.approx(1-math.cos(math.pi*5e-5), rel=1e-6)


@pytest.mark.parametrize('swap', RULES, ids=str)
def test_times_and_weights(swap):
    t = torch.linspace(.01, 1, 500, dtype=torch.float64)
    m = hidden_share(t, swap)
    assert_close(time_of(m, swap), t)
    h = 1e-6
    assert_close(bound_weight(t[:-1], swap), (hidden_share(t[:-1]+h, swap)-hidden_share(t[:-1]-h, swap))/(2*h*m[:-1]), rtol=1e-6, atol=0)
    assert time_of(torch.tensor([1.]), swap).item() == pytest.approx(1, abs=1e-3) # also where the flat rule never hides all
    assert time_of(torch.tensor([0.]), swap).item() == 0


@pytest.mark.parametrize('floor', ['vocab', 'k'])
@settings(max_examples=20, deadline=None)
@given(k=st.integers(1, 9), n=st.floats(0, 1), seed=st.integers(0, 99))
def test_states_to_the_digit(floor, k, n, seed):
    swap, V, tau = Swap(prob_floor=floor), 500, .01
    f, x = 1/V if floor == 'vocab' else 1/k, torch.randint(V, (4, 30), generator=gen(seed))
    clean = clean_state(x, k, V, tau, gen(seed))
    assert (clean.indices[..., 0] == x).all() and clean.probs.shape == (4, 30, k)
    assert_close(clean.probs.sum(-1), torch.ones(4, 30))
    lost = torch.rand(4, 30, generator=gen(seed+1)) < .5
    noisy = add_noise(clean, torch.full((4,), n), V, swap, lost, gen(seed+2))
    survivor = (1-n)*(1-tau*(k-1)) + n*f
    assert_close(noisy.probs[..., 0], torch.where(lost, torch.tensor(f), torch.tensor(survivor, dtype=torch.float32)))
    assert (noisy.indices[..., 0] == x)[~lost].all()
    other, kept = noisy.probs[..., 1:], (1-n)*tau + n*f
    assert (((other-f).abs() < 1e-6) | ((other-kept).abs() < 1e-6)).all()
    assert noisy.indices.min() >= 0 and noisy.indices.max() < V


@pytest.mark.parametrize('rule', ['probability', 'flat'])
@pytest.mark.parametrize('n', [.1, .5, .9])
def test_how_often_the_truth_is_lost(rule, n):
    x, V, k = torch.zeros(400, 250, dtype=torch.int64), 500, 4
    swap = Swap(swap_rule=rule)
    noisy = add_noise(clean_state(x, k, V, generator=gen(1)), torch.full((400,), n), V, swap, generator=gen(2))
    swapped = (noisy.probs-1/V).abs() < 1e-7
    rho = .01/.97
    want = [n*n, n*(1-rho*(1-n))] if rule == 'probability' else [.95*n]*2
    for got, p in zip((swapped[..., 0], swapped[..., 1]), want): assert abs(got.double().mean().item()-p) < 5*(p*(1-p)/x.numel())**.5
    assert (noisy.indices[..., 0][~swapped[..., 0]] == 0).all() # where it was not lost it is there
    wrong = noisy.indices[..., 0][swapped[..., 0]]
    assert abs((wrong == 0).double().mean().item()-1/V) < 5*(1/V/len(wrong))**.5 # lost means any token, the true one as well


def test_nothing_at_time_0_all_at_time_1():
    x, V = torch.randint(500, (3, 40), generator=gen()), 500
    clean = clean_state(x, 4, V, generator=gen(1))
    for a, b in zip(add_noise(clean, torch.zeros(3), V, Swap(), generator=gen(2)), clean): assert_close(a, b)
    assert_close(add_noise(clean, torch.ones(3), V, Swap(), generator=gen(2)).probs, torch.full((3, 40, 4), 1/V))


@settings(max_examples=20, deadline=None)
@given(k=st.integers(1, 9), t=st.floats(0, .98), seed=st.integers(0, 99))
def test_the_flag_that_gives_the_truth_away(k, t, seed):
    "D1: the highest probability of a position is above tau exactly where its truth survived."
    V, swap, x = 500, Swap(), torch.randint(500, (2, 50), generator=gen(seed))
    t = torch.full((2,), t)
    state = add_noise(clean_state(x, k, V, generator=gen(seed)), noise_level(t), V, swap, generator=gen(seed+1))
    says = state.probs.amax(-1) > swap.clean_temp
    assert (state.indices[..., 0] == x)[says].all()
    assert (~says == ((state.probs[..., 0]-1/V).abs() < 1e-6)).all()
    hidden = torch.rand(2, 50, generator=gen(seed+2)) < .5
    assert ((shown(x, hidden, t, k, V, swap, gen(seed+3)).probs.amax(-1) > swap.clean_temp) == ~hidden).all()


def test_companions_know_nothing():
    "What stands beside the truth, and what stands for it when it is lost, does not depend on it."
    hidden = torch.ones(2, 30, dtype=torch.bool)
    a, b = (shown(torch.full((2, 30), v), hidden, torch.tensor([.3, .8]), 4, 500, Swap(), gen(5)) for v in (7, 400))
    for i, j in zip(a, b): assert_close(i, j)


def test_noise_of_a_row_is_its_own():
    "From keys: the same wherever the row stands, other numbers at each call; tokens of a large vocabulary stay inside of it."
    keys = torch.tensor([3, 8, 5])
    a, b = RowNoise(keys, 7), RowNoise(keys.flip(0), 7)
    first = a((3, 4, 2))
    assert_close(first, b((3, 4, 2)).flip(0), rtol=0, atol=0)
    assert (a((3, 4, 2)) != first).all()
    assert_close(first, uniform(keys, 8, 8).view(3, 4, 2), rtol=0, atol=0)
    class Highest(RowNoise):
        def __call__(self, shape): return torch.full(shape, 1-2**-24)
    assert clean_state(torch.zeros(1, 2, dtype=torch.int64), 3, 2**15+1, generator=Highest(keys, 0)).indices.max() == 2**15


def test_a_batch_with_a_place():
    "The place of a batch decides its noise: in one batch or in two, on any rank."
    o = family()
    net, b = network(objective=o), batch(4)
    b.place = 100
    halves = [Batch(*(getattr(b, n)[i:i+2] for n in ('tokens', 'targets', 'weights', 'document')), place=100+i) for i in (0, 2)]
    whole, parts = o.loss(net, b), [o.loss(net, h) for h in halves]
    assert_close(whole.sum, sum(p.sum for p in parts))
    assert_close(whole.parts['nelbo'][0], sum(p.parts['nelbo'][0] for p in parts))
    b.place = 104
    assert o.loss(net, b).sum != whole.sum
    assert SwapSDD(o.settings, SPECIAL, seed=1).loss(net, halves[0]).sum != parts[0].sum


def test_number_of_candidates():
    s = SDD(k=6, k_schedule=[1, 2, 4, 8], k_warmup_steps=10)
    assert [k_at(s, step) for step in (0, 9, 10, 29, 30, 10**9)] == [1, 1, 2, 4, 8, 8]
    assert k_at(s) == k_at(SDD(k=6), 3) == 6
    assert k_at(SDD(k=6, k_schedule=[1, 2], fixed_k=4), 0) == 4
    o, b = family(k=6, rows_per_step=8, k_schedule=[1, 5], k_warmup_steps=10), batch()
    net = network(objective=o)
    for place, k in ((None, 6), (0, 1), (79, 1), (80, 5), (10**6, 5)):
        b.place = place
        total, count = o.loss(net, b, gen()).parts['k']
        assert total/count == k


@pytest.mark.parametrize('bad', [dict(k=0), dict(k_schedule=[2, 0]), dict(fixed_k=0), dict(k=8, swap=dict(clean_temp=.2))])
def test_settings_without_sense(bad):
    with pytest.raises(ConfigError): family(**bad)


# The loss

@pytest.mark.parametrize('swap', RULES+[Swap(two_step=True), Swap(prob_floor='k')], ids=str)
def test_the_loss_learns(swap):
    o = family(swap=swap.model_dump())
    net, b = network(objective=o), batch()
    loss = o.loss(net, b, gen())
    assert loss.count == b.num_targets and loss.sum.isfinite()
    loss.sum.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.abs().sum() > 0 for p in net.extras.parameters())
    again = o.loss(net, b, gen())
    assert_close(loss.sum, again.sum, rtol=0, atol=0)
    assert {'accuracy', 'accuracy_corrupted', 'k'} <= loss.parts.keys()


def test_what_cannot_be_lost_is_not_scored():
    o = family()
    net, b = network(objective=o), batch()
    assert int(canvas_of(b).hideable.sum()) == b.num_targets
    b.weights = torch.zeros_like(b.weights)
    b.num_targets = 0
    loss, scores = o.loss(net, b, gen()), o.nll(net, b, draws=2)
    assert loss.sum == 0 and loss.parts['nelbo'][0] == 0
    assert scores.nats.tolist() == scores.count.tolist() == scores.asked.tolist() == [0]*3


def test_documents_do_not_see_each_other():
    o, T = family(), 16
    net = network(objective=o)
    x, document = torch.randint(34, (1, T), generator=gen(1)), torch.tensor([[0]*8+[1]*8])
    y = x.clone()
    y[:, 8:] = (y[:, 8:]+1) % 34
    t = torch.tensor([.4])
    read = lambda x: o.reading.vectors(net, View(shown(x, torch.zeros_like(x, dtype=torch.bool), t, 4, 40, Swap(), gen()), t, document))
    a, b = read(x), read(y)
    assert_close(a[:, :8], b[:, :8])
    assert (a[:, 8:]-b[:, 8:]).abs().max() > 1e-3


def test_order_of_tokens_is_seen():
    "Not a bag of words (D6): exchanging two given tokens changes what stands at a third."
    o = family()
    net, t = network(objective=o), torch.tensor([.3])
    x = torch.arange(10)[None]
    y = x.clone()
    y[0, 3], y[0, 6] = 6, 3
    read = lambda x: o.reading.vectors(net, View(shown(x, torch.zeros_like(x, dtype=torch.bool), t, 1, 40, Swap(), gen()), t, torch.zeros_like(x)))
    assert (read(x)-read(y))[0, 8].abs().max() > 1e-4


def test_half_precision():
    "Under autocast the loss, the bound and the samplers stay near those in full."
    o = family(swap=dict(sampler='posterior', steps=3))
    net, b = network(objective=o), batch()
    full, scores = o.loss(net, b, gen()), o.nll(net, b)
    with torch.autocast('cpu', torch.bfloat16):
        half, again = o.loss(net, b, gen()), o.nll(net, b)
        assert len(o.generate(net, [[35]], max_new_tokens=5, generator=gen())[0]) == 5
    half.sum.backward()
    assert_close(half.sum, full.sum, rtol=.02, atol=0)
    assert_close(again.nats, scores.nats, rtol=.02, atol=0)


# The bound

def test_the_bound_of_a_network_that_knows_nothing():
    "Every token costs log(V - 3), so both forms of the bound have a value known to the digit: the weights must sum to 1 for each token."
    o = family()
    net, b = network(objective=o), batch()
    net.norm.weight.data.zero_() # all scores are 0
    each = math.log(40-3) # PAD, MASK and BOS cannot be chosen
    scores = o.nll(net, b, draws=5)
    assert_close(scores.nats, scores.count*each)
    assert_close(scores.variance, torch.zeros(3), atol=1e-6, rtol=0)
    g = gen(3)
    found = torch.tensor([float(o.loss(net, b, g).parts['nelbo'][0])/b.num_targets for _ in range(400)])
    assert abs(found.mean()-each) < 4*found.std()/20


def test_the_same_noise_for_a_row():
    o = family()
    net = network(objective=o)
    b = batch(rows=torch.tensor([5, 9, 2]))
    one, two = o.nll(net, b, draws=3), o.nll(net, b, draws=3)
    assert_close(one, two, rtol=0, atol=0)
    turned = Batch(*(a.flip(0) for a in (b.tokens, b.targets, b.weights, b.document)), rows=b.rows.flip(0))
    assert_close(o.nll(net, turned, draws=3).nats.flip(0), one.nats)
    other = batch(rows=torch.tensor([4, 8, 1]))
    assert (o.nll(net, other, draws=3).nats != one.nats).any()
    assert o.nll(net, b).variance is None
    assert (one.right <= one.asked).all() and one.variance.shape == (3,)


def test_the_bound_holds_in_expectation_over_orders():
    "Against all 7 ways to lose some of 3 tokens: (1/L) sum over c of (L/c) times the mean loss of c lost tokens."
    o = family(k=1) # no companions: a state has no other randomness than the tokens of noise
    net = network(objective=o, vocab_size=40)
    with torch.no_grad(): net.extras.mix.weight.mul_(.5)
    x = torch.tensor([[35, 4, 8, 3]])
    b = Batch(x[:, :-1], x[:, 1:], torch.ones(1, 3), torch.zeros(1, 3, dtype=torch.int64), rows=torch.tensor([0]))
    def cost(lost, g):
        hidden = torch.tensor([[False, *(i in lost for i in range(3))]])
        t = time_of(torch.tensor([len(lost)/3]), Swap())
        p = o.reading.logits(net, View(shown(x, hidden, t, 1, 40, Swap(), g), t, torch.zeros_like(x))).log_softmax(-1)
        return -p[0].gather(1, x[0][:, None])[hidden[0]].sum().item()
    with torch.no_grad():
        exact = sum(sum(cost(s, gen(r)) for r in range(40))/40/math.comb(3, c)/c for c in (1, 2, 3) for s in combinations(range(3), c))
    scores = o.nll(net, b, draws=600)
    assert abs(scores.nats.item()-exact) < 5*scores.variance.item()**.5 + .02 # .02: the noise tokens of `exact` are drawn as well


# Writing

@pytest.mark.parametrize('sampler', ['original', 'posterior'])
@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 99), steps=st.integers(1, 6), k=st.integers(1, 5), temperature=st.sampled_from([0., .7, 1.]),
       top_p=st.sampled_from([None, .5]), top_k=st.sampled_from([None, 2]))
def test_given_tokens_stay(sampler, seed, steps, k, temperature, top_p, top_k):
    o = family(k=k).with_sampler(sampler=sampler, steps=steps)
    net, g = network(objective=o), gen(seed)
    rows = [torch.randint(40, (n,), generator=g).tolist() for n in (17, 3, 9)]
    hidden = [(torch.rand(len(r), generator=g) < .5).tolist() for r in rows]
    kept = [list(r) for r in rows]
    out = o.fill(net, rows, hidden, temperature=temperature, top_p=top_p, top_k=top_k, generator=g)
    assert rows == kept and list(map(len, out)) == [17, 3, 9]
    for row, new, hide in zip(rows, out, hidden):
        assert [a for a, h in zip(new, hide) if not h] == [a for a, h in zip(row, hide) if not h]
        assert not {a for a, h in zip(new, hide) if h} & {SPECIAL[n] for n in ('PAD', 'MASK', 'BOS')}


@pytest.mark.parametrize('sampler', ['original', 'posterior'])
def test_writing_on(sampler):
    o = family().with_sampler(sampler=sampler, steps=3)
    net = network(objective=o)
    write = lambda prompts, n, **k: o.generate(net, prompts, max_new_tokens=n, **({'generator': gen(3)} | k))
    assert list(map(len, write([[35], list(range(30))], 40))) == [40, 40] # past the canvas of 17
    assert write([[35]], 0) == [[]] and write([], 5) == []
    assert write([[35]], 12) == write([[35]], 12)
    if sampler == 'posterior': assert write([[35]], 12) != write([[35]], 12, generator=gen(4)) # the original may write the same from any noise
    assert write([[35]], 12, temperature=0, generator=None) == write([[35]], 12, temperature=0, generator=None)
    whole = write([[35]], 12)[0]
    assert write([[35]], 12, stop_id=whole[4])[0] == whole[:whole.index(whole[4])]
    with pytest.raises(ConfigError, match='prompt 1'): write([[1], []], 3)
    with pytest.raises(ConfigError, match='generator'): write([[1]], 3, generator=None)


def test_samplers_settings():
    o = family(k=3, rows_per_step=7, k_schedule=[2])
    new = o.with_sampler(steps=5, sampler='posterior')
    assert (new.settings.swap.steps, new.settings.swap.sampler, new.settings.k, new.rows_per_step) == (5, 'posterior', 3, 7)
    assert o.settings.swap.sampler == 'original'
    for bad in (dict(order='prob'), dict(steps=0), dict(sampler='best'), dict(clean_temp=.1)):
        with pytest.raises(ConfigError, match=next(iter(bad))): o.with_sampler(**bad)


def test_marginals_are_not_normalised():
    logits = torch.randn(2, 3, 40, generator=gen())
    state = denoise_step(logits, 4, .8)
    p, i = (logits/.8).softmax(-1).topk(4)
    assert_close(state, type(state)(p, i))
    assert (state.probs.sum(-1) < 1).all()
    few = denoise_step(logits, 4, top_k=2)
    assert (few.probs[..., 2:] == 0).all()
    assert_close(few.probs.sum(-1), torch.ones(2, 3))
    one = denoise_step(logits, 4, top_p=1e-9) # the smallest set is one token (D9)
    assert (one.probs[..., 0] == 1).all() and (one.probs[..., 1:] == 0).all()




def test_the_posterior_commits_the_right_share():
    "With `steps` equal steps of time the share still hidden at time t is m(t)/m(1)."
    seen = []
    def denoise(state, t):
        seen.append((t[0].item(), (state.probs[..., 0] == 1/500).float().mean().item()))
        return torch.zeros(*state.probs.shape[:2], 500)
    posterior_sampler(denoise, torch.zeros(50, 400, dtype=torch.int64), torch.ones(50, 400, dtype=torch.bool), 2, 500, Swap(steps=6), generator=gen())
    assert seen[0] == (1., 1.) and len(seen) == 6
    for t, share in seen: assert abs(share-hidden_share(torch.tensor(t), Swap()).item()) < .015 # 4 standard errors of 20000 positions
