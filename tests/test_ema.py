"The average of the weights: by hand, swapped in and out, resumed to the bit, refused where it does not belong; and starting from another run."
import math, os, shutil
from functools import partial
import pytest, torch
from hypothesis import given, settings, strategies as st
from safetensors.torch import load_file
from torch import nn
from torch.testing import assert_close
from llmlab.config import Optim
from llmlab.files import CheckpointError, LlmlabError, read_json
from llmlab.models.objective import LossSum
from llmlab.packing.loader import Batch
from llmlab.trainer.checkpoint import (TrainState, averaged_weights, capture, check_files, checkpointer, latest, load_checkpoint, load_weights, restore, save_checkpoint,
                                       start_from)
from llmlab.trainer.loop import Limit, every, fit
from llmlab.trainer.machine import Machine
from llmlab.trainer.optim import Ema, build_optimizer, rate_at
from llmlab.trainer.tracking import Stopped, Tracker

exact = dict(rtol=0, atol=0)


class Net(nn.Module):
    "A tied weight, a frozen one, a buffer, dropout, and room for a family's extras."
    def __init__(self, V=13, D=8, extras=None, frozen=True):
        super().__init__()
        self.embed, self.mix, self.drop, self.head, self.extras = nn.Embedding(V, D), nn.Linear(D, D), nn.Dropout(.1), nn.Linear(D, V, bias=False), extras
        self.head.weight = self.embed.weight
        self.mix.bias.requires_grad_(not frozen)
        self.register_buffer('seen', torch.zeros(1))
    def forward(self, tokens): return self.head(self.drop(self.mix(self.embed(tokens)).tanh()))


def net(seed=0, **kw):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Net(**kw)


class Count:
    "Next-token loss with noise from its generator."
    def loss(self, network, batch, generator):
        logits = network(batch.tokens)
        keep = batch.weights*(1+.5*torch.rand(batch.weights.shape, generator=generator))
        nats = nn.functional.cross_entropy(logits.flatten(0, 1).float(), batch.targets.flatten(), reduction='none')
        return LossSum((nats*keep.flatten()).sum(), batch.num_targets, {})


class Loader:
    "An endless source whose place is one number."
    def __init__(self): self.place = 0
    def __iter__(self):
        while True:
            g = torch.Generator().manual_seed(self.place)
            self.place += 1
            text = (1+2*torch.randint(2, (4, 9), generator=g)).cumsum(1) % 13
            yield Batch(text[:, :-1], text[:, 1:], torch.ones(4, 8), torch.zeros(4, 8, dtype=torch.int64))
    def state_dict(self): return {'place': self.place}
    def load_state_dict(self, state): self.place = state['place']


@given(decay=st.floats(.05, .9999), steps=st.integers(1, 40), seed=st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_it_is_the_average_by_hand(decay, steps, seed):
    "Against the plain recurrence in float64; and its weights are a convex combination, so a constant stays what it is."
    g = torch.Generator().manual_seed(seed)
    p = nn.Linear(3, 2)
    nn.init.ones_(p.bias)
    ema, hand = Ema(p, decay), p.weight.detach().double().clone()
    for n in range(1, steps+1):
        with torch.no_grad(): p.weight.copy_(torch.randn(2, 3, generator=g))
        d = min(decay, (1+n)/(10+n))
        hand = d*hand+(1-d)*p.weight.detach().double()
        ema.update()
    assert_close(ema.shadow['weight'].double(), hand, rtol=1e-5, atol=1e-6)
    assert_close(ema.shadow['bias'], torch.ones(2), **exact)
    assert ema.updates == steps


def test_it_knows_the_trainable_parameters_once_and_in_fp32():
    network = net().to(torch.bfloat16)
    ema = Ema(network, .9)
    assert set(ema.shadow) == {'embed.weight', 'mix.weight'} and all(t.dtype == torch.float32 for t in ema.shadow.values())
    with torch.no_grad(): network.mix.weight.add_(1.)
    before = network.mix.weight.detach().clone()
    ema.update()
    assert set(Ema(torch.compile(network), .9).shadow) == set(ema.shadow)
    with ema.applied(network): assert_close(network.mix.weight.detach(), ema.shadow['mix.weight'].bfloat16(), **exact)
    assert_close(network.mix.weight.detach(), before, **exact)
    for p in ema.shadow.values(): assert not p.requires_grad


def test_a_swap_gives_every_bit_back_also_after_an_error():
    network = net()
    with torch.no_grad(): network.mix.weight[0, :4] = torch.tensor([math.nan, -0., math.inf, 1e-40]) # what arithmetic would not give back
    ema = Ema(network, .9)
    with torch.no_grad():
        for t in ema.shadow.values(): t.fill_(.5)
    bits = lambda: {k: t.clone().contiguous().view(torch.uint8) for k, t in network.state_dict().items()}
    before, places = bits(), [p.data_ptr() for p in network.parameters()]
    with pytest.raises(ZeroDivisionError):
        with ema.applied(network):
            assert (network.head.weight == .5).all() and (network.embed.weight == .5).all() and network.head.weight is network.embed.weight
            for wrong in (ema.update, ema.state_dict, ema.applied(network).__enter__):
                with pytest.raises(AssertionError): wrong()
            1/0
    assert all(torch.equal(a, b) for a, b in zip(before.values(), bits().values(), strict=True)) and places == [p.data_ptr() for p in network.parameters()]
    ema.update()
    other = net(seed=1) # the average can be put into another network of the same names
    with ema.applied(other): assert_close(other.mix.weight.detach(), ema.shadow['mix.weight'], equal_nan=True, **exact)
    with pytest.raises(AssertionError):
        with ema.applied(nn.Linear(2, 2)): pass
    assert not ema.swapped


def sitting(folder, records, limit=None, total=20, decay=.95, optim=Optim(lr=.02, warmup_steps=3), kill_at=None):
    "One sitting with fresh objects, as a new process has them; goes on from the newest checkpoint. Validates with the average."
    path = latest(folder) if folder.is_dir() else None
    torch.manual_seed(999 if path else 3)
    network = net(seed=5 if path else 0)
    ema = Ema(network, decay) if decay else None
    things = dict(network=network, optimizer=build_optimizer(network, optim), generators={'objective': torch.Generator().manual_seed(8)}, loader=Loader(), ema=ema)
    state = restore(load_checkpoint(path), **things) if path else TrainState()
    def validate(state):
        if state.global_step == kill_at: raise KeyboardInterrupt
        network.eval()
        with ema.applied(network), torch.no_grad(): loss = Count().loss(network, next(iter(Loader())), torch.Generator().manual_seed(0)).sum.item()
        records[state.global_step] = loss
        return {'val/loss': loss}
    fit(network, Count(), things['loader'], things['optimizer'], total_steps=total, rate=lambda s: rate_at(s, total, optim), accumulation=2, state=state,
        generator=things['generators']['objective'], ema=ema, hooks=[every(3, validate)] if ema else [], save=checkpointer(folder, partial(capture, **things), keep_last=3), save_every=5,
        tracker=Tracker([]), limit=limit)
    return network, ema


@pytest.mark.parametrize('name', ['adamw', 'muon'])
@pytest.mark.parametrize('stops', [[7], [1, 6, 8], [5, 10]], ids=str)
def test_stop_and_resume_gives_the_same_average(tmp_path, name, stops):
    optim, straight, cut = Optim(name=name, lr=.02, warmup_steps=3), {}, {}
    whole, average = sitting(tmp_path/'a', straight, optim=optim)
    for steps in stops:
        with pytest.raises(Stopped): sitting(tmp_path/'b', cut, Limit(steps=steps), optim=optim)
    parts, again = sitting(tmp_path/'b', cut, optim=optim)
    assert cut == straight and list(straight) == [3, 6, 9, 12, 15, 18, 20] and again.updates == average.updates == 20
    assert_close(again.shadow, average.shadow, **exact)
    assert_close(parts.state_dict(), whole.state_dict(), **exact)
    a, b = (load_checkpoint(latest(tmp_path/x)) for x in 'ab')
    assert_close(a['ema_state_dict']['weights'], b['ema_state_dict']['weights'], **exact)


def test_a_kill_after_a_checkpoint_is_repeated_with_the_same_average(tmp_path):
    straight, cut = {}, {}
    _, average = sitting(tmp_path/'a', straight)
    with pytest.raises(KeyboardInterrupt): sitting(tmp_path/'b', cut, kill_at=12)
    assert latest(tmp_path/'b').name == 'step-00000010' # two steps and two updates are lost and done again
    _, again = sitting(tmp_path/'b', cut)
    assert cut == straight
    assert_close(again.shadow, average.shadow, **exact)


def test_the_average_changes_nothing_else(tmp_path):
    "Weights, optimizer and files of a run are those of a run without it."
    with_it, _ = sitting(tmp_path/'a', {})
    without, _ = sitting(tmp_path/'b', {}, decay=None)
    assert_close(with_it.state_dict(), without.state_dict(), **exact)
    a, b = (latest(tmp_path/x) for x in 'ab')
    assert {p.name for p in a.iterdir()}-{p.name for p in b.iterdir()} == {'ema.safetensors'} and not (b/'ema.safetensors').exists()
    assert (a/'model.safetensors').read_bytes() == (b/'model.safetensors').read_bytes()
    assert 'ema' not in read_json(b/'meta.json') and 'ema_state_dict' not in read_json(b/'meta.json') and read_json(a/'meta.json')['ema'] == {'decay': .95, 'updates': 20}
    assert load_checkpoint(b)['ema_state_dict'] is None and load_checkpoint(b, training=False)['ema_state_dict'] is None
    assert set(load_file(a/'ema.safetensors')) == {'embed.weight', 'mix.weight'}
    light = load_checkpoint(a, training=False)
    assert light['ema_state_dict']['updates'] == 20 and 'optimizer_state_dict' not in light


def test_an_average_on_one_side_only_is_refused_before_anything_moves(tmp_path):
    for name, decay in (('with', .95), ('without', None)): sitting(tmp_path/name, {}, total=5, decay=decay)
    for name, ema, says in (('with', False, 'optim.ema is null: the average would be lost. Go on with optim.ema=0.95'), ('without', True, 'Go on with optim.ema=null')):
        network = net(seed=7)
        before = {k: t.clone() for k, t in network.state_dict().items()}
        with pytest.raises(CheckpointError, match=says): restore(load_checkpoint(latest(tmp_path/name)), network=network, optimizer=build_optimizer(network, Optim()), ema=Ema(network, .9) if ema else None)
        assert_close(network.state_dict(), before, **exact)
    loaded = load_checkpoint(latest(tmp_path/'with'))
    network = net(seed=7)
    ema = Ema(network, .5)
    restore(loaded, network=network, optimizer=build_optimizer(network, Optim()), ema=ema)
    assert ema.decay == .5 and ema.updates == 5 # the setting is the config's, the rest the checkpoint's
    for wrong, differs in ((net(frozen=False), 'mix.bias'), (net(D=4), 'embed.weight, mix.weight')):
        with pytest.raises(CheckpointError, match=f'averaged weights are of another model: {differs} differ'): Ema(wrong, .9).load_state_dict(loaded['ema_state_dict'])


@pytest.mark.parametrize('how', ['cut', 'flip', 'gone'])
def test_a_damaged_average_is_found(tmp_path, how):
    sitting(tmp_path, {}, total=10)
    newest = latest(tmp_path)
    path = newest/'ema.safetensors'
    data = bytearray(path.read_bytes())
    if how == 'cut': os.truncate(path, 100)
    elif how == 'gone': path.unlink()
    else: data[-1] ^= 1; path.write_bytes(data)
    assert check_files(newest)
    for training in (True, False):
        with pytest.raises(CheckpointError, match='ema.safetensors.*step-00000005: use that'): load_checkpoint(newest, training)


def test_averaged_weights_fill_every_name(tmp_path):
    network, ema = sitting(tmp_path, {}, total=10)
    loaded, fresh = load_checkpoint(latest(tmp_path), training=False), net(seed=4)
    weights = averaged_weights(loaded)
    assert weights.keys() == loaded['model_state_dict'].keys()
    load_weights(fresh, loaded, averaged=True)
    assert fresh.head.weight is fresh.embed.weight
    with ema.applied(network): assert_close(fresh.state_dict(), network.state_dict(), **exact)
    load_weights(fresh, loaded)
    assert_close(fresh.state_dict(), network.state_dict(), **exact)
    state = capture(TrainState(10), network=network, optimizer=build_optimizer(network, Optim()), ema=ema) # not from a file: tied names are two tensors with one memory
    assert_close(averaged_weights(state), weights, **exact)
    with pytest.raises(CheckpointError, match='step 10 has no averaged weights'): load_weights(fresh, loaded | {'ema_state_dict': None}, averaged=True)


def test_steps_that_the_scaler_skips_are_no_updates():
    network = net()
    for p in network.parameters(): p.requires_grad_(True)
    ema, skipped = Ema(network, .9), []
    scaler = torch.amp.GradScaler('cpu', init_scale=2.**24, growth_interval=10**6) # overflows at first, and halves until it does not
    machine = Machine(dtype=torch.float16)
    class Watched(Count):
        def loss(self, network, batch, generator):
            skipped.append(ema.updates)
            return super().loss(network, batch, generator)
    state = fit(network, Watched(), Loader(), build_optimizer(network, Optim()), total_steps=20, machine=machine, scaler=scaler, ema=ema, generator=torch.Generator().manual_seed(0))
    missed = round(24-math.log2(scaler.get_scale()))
    assert state.global_step == 20 and 0 < missed < 20 and ema.updates == 20-missed and skipped[:missed] == [0]*missed


def test_a_step_that_is_not_finite_is_no_update():
    network = net()
    ema = Ema(network, .9)
    class Breaks(Count):
        calls = 0
        def loss(self, network, batch, generator):
            self.calls += 1
            given = super().loss(network, batch, generator)
            return given._replace(sum=given.sum*(math.nan if self.calls == 4 else 1.))
    with pytest.raises(LlmlabError, match='step 4 did not happen'):
        fit(network, Breaks(), Loader(), build_optimizer(network, Optim()), total_steps=9, ema=ema, generator=torch.Generator().manual_seed(0))
    assert ema.updates == 3 and all(t.isfinite().all() for t in ema.shadow.values())


def saved(folder, network, ema=None):
    return load_checkpoint(save_checkpoint(folder, capture(TrainState(5), network=network, optimizer=build_optimizer(network, Optim()), ema=ema)), training=False)


def test_start_from_another_family(tmp_path):
    plain, rich = net(seed=1), net(seed=2, extras=nn.Linear(3, 3))
    target = net(seed=3, extras=nn.Linear(3, 3))
    extras = {k: t.clone() for k, t in target.extras.state_dict().items()}
    assert start_from(target, saved(tmp_path/'plain', plain)) == ['extras.weight', 'extras.bias'] # it has more
    assert_close(target.extras.state_dict(), extras, **exact)
    assert_close({k: t for k, t in target.state_dict().items() if not k.startswith('extras.')}, plain.state_dict(), **exact)
    less = net(seed=3)
    assert start_from(less, saved(tmp_path/'rich', rich)) == [] # it has less
    assert_close(less.state_dict(), {k: t for k, t in rich.state_dict().items() if not k.startswith('extras.')}, **exact)
    assert start_from(target, saved(tmp_path/'rich', rich)) == [] # both have them: they come along
    assert_close(target.state_dict(), rich.state_dict(), **exact)
    assert start_from(torch.compile(net(seed=3)), saved(tmp_path/'rich', rich)) == []


def test_start_from_takes_the_average_where_there_is_one(tmp_path):
    network = net(seed=1)
    ema = Ema(network, .9)
    with torch.no_grad(): network.mix.weight.add_(1.)
    ema.update()
    target = net(seed=3)
    start_from(target, saved(tmp_path/'x', network, ema))
    assert_close(target.mix.weight.detach(), ema.shadow['mix.weight'], **exact)
    assert_close(target.head.weight.detach(), ema.shadow['embed.weight'], **exact)
    assert_close(target.mix.bias.detach(), network.mix.bias.detach(), **exact) # frozen there: as it is


def test_start_from_refuses_what_does_not_match(tmp_path):
    plain = saved(tmp_path/'plain', net())
    rich = saved(tmp_path/'rich', net(extras=nn.Linear(3, 3)))
    for checkpoint, target, says in ((plain, net(D=4), 'size mismatch for embed.weight'), (plain, nn.Linear(2, 2), 'Missing key.*weight'),
                                     (rich, net(extras=nn.Linear(4, 3)), 'size mismatch for extras.weight')):
        with pytest.raises(CheckpointError, match=f'(?s)do not fit this model.*{says}'): start_from(target, checkpoint)
    with pytest.raises(CheckpointError, match='Unexpected key.*extras.weight'): start_from(net(), rich, fresh=())
    other = net(extras=nn.Linear(3, 3))
    with pytest.raises(CheckpointError, match='Missing key.*extras'): start_from(other, plain, fresh=('elsewhere.',))
