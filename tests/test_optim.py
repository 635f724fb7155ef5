"Optimizers and schedules: against torch's own, at the edges, and saved and loaded."
import io, math
import pytest, torch
from hypothesis import given, settings, strategies as st
from torch import nn
from torch.testing import assert_close
from llmlab.config import Optim, Trainer
from llmlab.files import CheckpointError, ConfigError
from llmlab.trainer.optim import JointOptimizer, Muon, build_optimizer, clip_gradients, muon_splits, orthogonalise, rate_along, rate_at, sort_parameters, total_steps


class Block(nn.Module):
    muon_splits = {'qkv.weight': (8, 4, 4)}
    def __init__(self):
        super().__init__()
        self.norm, self.qkv, self.out, self.mix = nn.RMSNorm(8), nn.Linear(8, 16, bias=False), nn.Linear(16, 8), nn.Conv1d(8, 8, 3, groups=8)
    def forward(self, x): return x + self.out(self.qkv(self.norm(x))).tanh()


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.blocks, self.head = nn.Embedding(17, 8), nn.ModuleList([Block(), Block()]), nn.Linear(8, 17, bias=False)
    def forward(self, tokens):
        x = self.embed(tokens)
        for b in self.blocks: x = b(x)
        return self.head(x)


def net():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Net()


def learn(network, optimizer, steps, seed=0):
    g = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        tokens = torch.randint(17, (4, 9), generator=g)
        nn.functional.cross_entropy(network(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten()).backward()
        optimizer.step(); optimizer.zero_grad()


def test_every_parameter_has_one_place():
    n = net()
    n.blocks[0].norm.weight.requires_grad_(False)
    sorts = sort_parameters(n, muon=True)
    names = [name for pairs in sorts.values() for name, _ in pairs]
    assert len(names) == len(set(names)) == len(list(n.parameters()))-1
    assert {name for name, _ in sorts['hidden']} == {f'blocks.{i}.{m}.weight' for i in (0, 1) for m in ('qkv', 'out')}
    assert {name for name, _ in sorts['decay']} == {'embed.weight', 'head.weight', 'blocks.0.mix.weight', 'blocks.1.mix.weight'}
    assert [g['weight_decay'] for g in build_optimizer(n, Optim(weight_decay=.3)).param_groups] == [.3, 0.]
    for p in n.parameters(): p.requires_grad_(False)
    with pytest.raises(ConfigError, match='no trainable parameter'): build_optimizer(n, Optim())


@pytest.mark.parametrize('shape', [(6, 10), (10, 6), (8, 8), (300, 260)])
def test_muon_is_torchs_muon(shape):
    "The same update to the rounding of bf16: each number of the update has an error of at most 2 ulp (2^-7 relative) of the largest."
    ours, torchs = (nn.Parameter(torch.ones(shape)) for _ in range(2))
    a, b = Muon([ours], lr=.1, weight_decay=.1), torch.optim.Muon([torchs], lr=.1, weight_decay=.1, momentum=.95, adjust_lr_fn='match_rms_adamw')
    for i in range(3):
        ours.grad = torch.randn(shape, generator=torch.Generator().manual_seed(i))
        torchs.grad = ours.grad.clone()
        a.step(); b.step()
    step = .1*.2*math.sqrt(max(shape))*3
    assert_close(ours, torchs, rtol=0, atol=step*2**-7)


@given(rows=st.integers(1, 40), columns=st.integers(1, 40), batch=st.integers(1, 4), seed=st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_orthogonalise_keeps_the_singular_vectors(rows, columns, batch, seed):
    M = torch.randn(batch, rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    out = orthogonalise(M, torch.float64)
    assert out.shape == M.shape
    a, b, c = 3.4445, -4.7750, 2.0315 # the polynomial on each singular value, by hand
    for one, got in zip(M, out):
        U, S, V = torch.linalg.svd(one, full_matrices=False)
        S = S/S.norm()
        for _ in range(5): S = a*S+b*S**3+c*S**5
        assert_close(got, U@S.diag()@V, rtol=1e-6, atol=1e-8)


def test_splits_and_stacks_change_nothing_but_the_grouping():
    n, m = net(), net()
    whole = Muon([p for _, p in sort_parameters(n, True)['hidden']], lr=.1, splits=muon_splits(n), dtype=torch.float64)
    parts = [(p, s, nn.Parameter(p.detach()[s:s+r].clone())) for p in (b.qkv.weight for b in m.blocks) for s, r in ((0, 8), (8, 4), (12, 4))]
    alone = [Muon([q], lr=.1, dtype=torch.float64) for _, _, q in parts] + [Muon([b.out.weight], lr=.1, dtype=torch.float64) for b in m.blocks]
    for step in range(3):
        for i, (_, p) in enumerate(sort_parameters(n, True)['hidden']): p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(10*step+i))
        for p, q in zip(m.parameters(), n.parameters()): p.grad = q.grad
        for p, s, q in parts: q.grad = p.grad[s:s+len(q)]
        whole.step()
        for o in alone: o.step()
    for p, s, q in parts:
        twin = dict(n.named_parameters())[next(k for k, v in m.named_parameters() if v is p)]
        assert_close(twin[s:s+len(q)], q, rtol=1e-6, atol=1e-7)
    for a, b in zip(n.blocks, m.blocks): assert_close(a.out.weight, b.out.weight, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize('name', ['adamw', 'muon'])
def test_save_and_load_in_the_middle(name):
    settings = Optim(name=name, lr=.01)
    straight, first = net(), net()
    optimizer = build_optimizer(straight, settings)
    learn(straight, optimizer, 5)
    a = build_optimizer(first, settings)
    learn(first, a, 5)
    file = io.BytesIO()
    torch.save(a.state_dict(), file)
    second = net()
    second.load_state_dict(first.state_dict())
    b = build_optimizer(second, settings)
    b.load_state_dict(torch.load(io.BytesIO(file.getvalue()), weights_only=True))
    learn(straight, optimizer, 5, seed=1); learn(second, b, 5, seed=1)
    for p, q in zip(straight.parameters(), second.parameters()): assert_close(p, q, rtol=0, atol=0)


@pytest.mark.parametrize('name', ['adamw', 'muon'])
def test_a_skipped_step_leaves_no_trace(name):
    n, m = net(), net()
    a, b = (build_optimizer(x, Optim(name=name, lr=.01)) for x in (n, m))
    assert a.can_skip
    learn(n, a, 3); learn(m, b, 3)
    for p in a.parameters: p.grad = torch.full_like(p, float('nan'))
    a.step(skip=torch.ones(()))
    a.zero_grad()
    for p, q in zip(n.parameters(), m.parameters()): assert_close(p, q, rtol=0, atol=0)
    learn(n, a, 1, seed=5); learn(m, b, 1, seed=5)
    for p, q in zip(n.parameters(), m.parameters()): assert_close(p, q, rtol=0, atol=0)
    for p, q in zip(a.parameters, b.parameters): p.grad, q.grad = torch.ones_like(p), torch.ones_like(p)
    a.step(skip=torch.zeros(())); b.step()
    for p, q in zip(n.parameters(), m.parameters()): assert_close(p, q, rtol=1e-6, atol=1e-7)


def test_another_model_or_optimizer_is_refused():
    n = net()
    state = build_optimizer(n, Optim()).state_dict()
    with pytest.raises(CheckpointError, match='AdamW with 14 tensors'): build_optimizer(n, Optim(name='muon')).load_state_dict(state)
    with pytest.raises(CheckpointError): build_optimizer(nn.Linear(3, 3), Optim()).load_state_dict(state)


def test_the_config_wins_over_saved_settings():
    n = net()
    old = build_optimizer(n, Optim(lr=.01, weight_decay=.5))
    learn(n, old, 2)
    new = build_optimizer(n, Optim(lr=.03, weight_decay=.1))
    new.load_state_dict(old.state_dict())
    assert new.set_rate(.5) == .015
    assert [g['weight_decay'] for g in new.param_groups] == [.1, 0.]


schedules = st.builds(Optim, schedule=st.sampled_from(['cosine', 'linear', 'constant', 'wsd']), warmup_ratio=st.floats(0, 1), min_lr_ratio=st.floats(0, 1),
                      warmup_steps=st.none() | st.integers(0, 50), decay_ratio=st.floats(0, 1))


@given(optim=schedules, total=st.integers(1, 300))
@settings(max_examples=200, deadline=None)
def test_rates_stay_in_bounds_rise_and_then_fall(optim, total):
    rates = [rate_at(s, total, optim) for s in range(total)]
    assert all(0 <= r <= 1+1e-12 for r in rates)
    assert rates[0] > 0 or optim.min_lr_ratio == 0
    warm = optim.warmup_steps if optim.warmup_steps is not None else round(optim.warmup_ratio*total)
    rise, fall = rates[:warm], rates[warm:]
    assert rise == sorted(rise) and fall == sorted(fall, reverse=True)
    assert rate_at(10*total+1000, total, optim) == pytest.approx(1. if optim.schedule == 'constant' else optim.min_lr_ratio, abs=1e-9)


@given(batch=st.integers(1, 9), accumulation=st.integers(1, 16), rows=st.integers(1, 500), epochs=st.floats(.01, 5), fraction=st.floats(.01, 1))
@settings(max_examples=100, deadline=None)
def test_an_epoch_sees_no_row_twice(batch, accumulation, rows, epochs, fraction):
    trainer = Trainer(batch_size=batch, gradient_accumulation_steps=accumulation, epochs=epochs, epoch_dataset_fraction=fraction)
    steps, per_step = total_steps(trainer, rows, 64), batch*accumulation
    wanted = math.ceil(epochs*max(1, int(rows*fraction)))
    assert steps == 1 or steps*per_step <= wanted < (steps+1)*per_step
    assert steps > 1 or wanted < 2*per_step
    as_tokens = Trainer(batch_size=batch, gradient_accumulation_steps=accumulation, max_tokens=steps*per_step*64)
    assert total_steps(as_tokens, rows, 64) == steps


@given(data=st.data(), warm=st.integers(0, 30), schedule=st.sampled_from(['cosine', 'linear', 'constant', 'wsd']))
@settings(max_examples=100, deadline=None)
def test_the_rate_never_jumps_when_a_run_grows_longer(data, warm, schedule):
    lengths = [[0, data.draw(st.integers(50, 200))]]
    for _ in range(data.draw(st.integers(1, 3))):
        since = data.draw(st.integers(lengths[-1][0], lengths[-1][1]))
        lengths.append([since, data.draw(st.integers(lengths[-1][1], 400))])
    optim = Optim(schedule=schedule, warmup_steps=warm)
    rates = [rate_along(s, lengths, optim, warm) for s in range(lengths[-1][1])]
    steepest = max(abs(rate_at(s+1, n, optim, warm)-rate_at(s, n, optim, warm)) for _, n in lengths for s in range(lengths[-1][1]))
    assert all(0 <= r <= 1+1e-9 for r in rates)
    if warm: assert max(abs(a-b) for a, b in zip(rates, rates[1:])) <= steepest+(1+steepest)*sum(1 for _ in lengths[1:])/warm+1e-9
    at = lengths[1][0]
    assert rates[:at] == [rate_at(s, lengths[0][1], optim, warm) for s in range(at)] # what was done is as it was
    if warm and len(lengths) == 2 and at < len(rates): assert rates[at] == rate_at(at, lengths[0][1], optim, warm)


def test_clipping_is_of_the_whole_gradient():
    p, q, idle = (nn.Parameter(torch.zeros(3)) for _ in range(3))
    p.grad, q.grad = torch.tensor([3., 0, 0]), torch.tensor([0, 4., 0])
    assert clip_gradients([p, q, idle], 2.5).item() == 5.
    assert_close(torch.cat([p.grad, q.grad]).norm(), torch.tensor(2.5), rtol=1e-5, atol=0)
    assert clip_gradients(iter([p, q]), 100.).item() == pytest.approx(2.5)


def own(n, path, **settings):
    n.get_submodule(path).own_optim = settings
    return n


@pytest.mark.parametrize('name', ['adamw', 'muon'])
def test_modules_with_settings_of_their_own(name):
    "Each parameter is in one group; own groups come last, are named, are AdamW's, and follow the schedule."
    n = own(own(own(net(), 'blocks.1', lr=.1), 'blocks.1.norm', weight_decay=0., lr=2), 'blocks.0.mix', weight_decay=.7)
    optimizer = build_optimizer(n, Optim(name=name, lr=.01, weight_decay=.3))
    assert {id(p) for p in n.parameters()} == {id(p) for p in optimizer.parameters} and len(optimizer.parameters) == len(list(n.parameters()))
    groups = {g['name']: g for g in optimizer.param_groups if 'name' in g}
    assert list(groups) == ['blocks.0.mix', 'blocks.1.norm', 'blocks.1.decay', 'blocks.1.plain'] and optimizer.param_groups[-4:] == list(groups.values())
    assert [(g['lr'], g['weight_decay']) for g in groups.values()] == [(.01, .7), (.02, 0.), (pytest.approx(.001), .3), (pytest.approx(.001), 0.)]
    assert set(groups['blocks.1.decay']['param_names']) == {'blocks.1.qkv.weight', 'blocks.1.out.weight', 'blocks.1.mix.weight'}
    assert groups['blocks.0.mix']['param_names'] == ['blocks.0.mix.weight', 'blocks.0.mix.bias'] # its own decay is for all of it
    assert all(any(g is h for h in optimizer.parts[-1].param_groups) for g in groups.values()) and isinstance(optimizer.parts[-1], torch.optim.AdamW)
    assert optimizer.set_rate(.5) == .005 and [g['lr'] for g in groups.values()] == pytest.approx([.005, .01, .0005, .0005])


def test_own_settings_are_what_adamw_does_with_them():
    "A step of each tensor against torch's AdamW on that tensor alone, at the rate and decay that were asked for."
    n, m = own(net(), 'blocks.0.out', lr=.1, weight_decay=0.), net()
    optimizer = build_optimizer(n, Optim(lr=.01, weight_decay=.3))
    alone = torch.optim.AdamW([{'params': [p], 'lr': .001 if '0.out' in k else .01, 'weight_decay': .3 if p.ndim >= 2 and '0.out' not in k else 0.} for k, p in m.named_parameters()],
                              betas=Optim().betas, eps=Optim().eps, fused=True)
    learn(n, optimizer, 4); learn(m, alone, 4)
    for p, q in zip(n.parameters(), m.parameters()): assert_close(p, q, rtol=0, atol=0)


def test_without_own_settings_the_groups_are_as_ever():
    for name in ('adamw', 'muon'):
        assert all('name' not in g for g in build_optimizer(net(), Optim(name=name)).param_groups)


def test_extras_are_never_muons():
    n = net()
    n.extras = nn.ModuleList([Block()])
    hidden = {k for k, _ in sort_parameters(n, muon=True)['hidden']}
    assert hidden == {f'blocks.{i}.{m}.weight' for i in (0, 1) for m in ('qkv', 'out')}
    build_optimizer(n, Optim(name='muon')) # and splits of a matrix that Muon does not have do no harm


def test_frozen_modules_and_networks_that_are_all_their_own():
    n = own(net(), 'blocks.0', lr=.5)
    for p in n.blocks[0].parameters(): p.requires_grad_(False)
    assert all('name' not in g for g in build_optimizer(n, Optim()).param_groups)
    n = net()
    n.own_optim = {'lr': 1., 'weight_decay': 0.}
    assert [len(g['params']) for g in build_optimizer(n, Optim(name='muon')).param_groups] == [len(list(n.parameters()))]


@pytest.mark.parametrize('bad', [{'weight_decay': None}, {'lr': None}, {'lr': -1.}, {'rate': .1}, {'lr': '0.1'}])
def test_own_settings_that_make_no_sense(bad):
    with pytest.raises(AssertionError, match=r'blocks.0.out.own_optim is \{'): build_optimizer(own(net(), 'blocks.0.out', **bad), Optim())


@pytest.mark.parametrize('name', ['adamw', 'muon'])
def test_own_settings_saved_and_loaded(name):
    settings = Optim(name=name, lr=.01)
    n = own(net(), 'blocks.0.out', lr=.1)
    a = build_optimizer(n, settings)
    learn(n, a, 5)
    file = io.BytesIO()
    torch.save(a.state_dict(), file)
    m = own(net(), 'blocks.0.out', lr=.2) # another multiplier in the resumed run: the config wins
    m.load_state_dict(n.state_dict())
    b = build_optimizer(m, settings)
    b.load_state_dict(torch.load(io.BytesIO(file.getvalue()), weights_only=True))
    assert {g['name']: g['lr'] for g in b.param_groups if 'name' in g} == {'blocks.0.out.decay': .002, 'blocks.0.out.plain': .002}
    with pytest.raises(CheckpointError, match='in 4 groups'): build_optimizer(net(), settings).load_state_dict(a.state_dict())
