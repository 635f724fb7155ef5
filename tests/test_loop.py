"The loop: the same gradient however it is cut, the same bits after a stop, signals, numbers that are not."
import math, os, signal, subprocess, sys, threading, time
from functools import partial
from pathlib import Path
import pytest, torch
from hypothesis import given, settings, strategies as st
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.testing import assert_close
from llmlab.config import Optim
from llmlab.files import ConfigError, LlmlabError, read_jsonl
from llmlab.models.objective import LossSum
from llmlab.packing.loader import Batch
from llmlab.trainer import loop
from llmlab.trainer.checkpoint import TrainState, capture, checkpointer, latest, load_checkpoint, restore
from llmlab.trainer.loop import Groups, Limit, Watch, Window, accumulate, every, fit, group_of, parse_limit, patience, stop_signals
from llmlab.trainer.machine import Machine
from llmlab.trainer.optim import build_optimizer, rate_at
from llmlab.trainer.tracking import Files, Stopped, Tracker

root = Path(__file__).resolve().parent.parent


class Count:
    "Next-token loss over the targets that count; draws from its generator, as masked objectives do."
    noise = 0.
    def loss(self, network, batch, generator):
        logits = network(batch.tokens)
        keep = batch.weights if not self.noise else batch.weights*(1+self.noise*torch.rand(batch.weights.shape, generator=generator))
        nats = nn.functional.cross_entropy(logits.flatten(0, 1).float(), batch.targets.flatten(), reduction='none')
        right = ((logits.argmax(-1) == batch.targets)*batch.weights).sum()
        return LossSum((nats*keep.flatten()).sum(), batch.num_targets, {'accuracy': (right, batch.num_targets)})


class Noisy(Count): noise = .5


class Loader:
    "An endless source whose place is one number."
    def __init__(self, B=4, T=8, V=13): self.B, self.T, self.V, self.place = B, T, V, 0
    def __iter__(self):
        while True:
            g = torch.Generator().manual_seed(self.place)
            self.place += 1
            text = (1+2*torch.randint(2, (self.B, self.T+1), generator=g)).cumsum(1) % self.V
            yield Batch(text[:, :-1], text[:, 1:], (torch.rand(self.B, self.T, generator=g) > .3).float(), torch.zeros(self.B, self.T, dtype=torch.int64))
    def state_dict(self): return {'place': self.place}
    def load_state_dict(self, state): self.place = state['place']


class Net(nn.Module):
    def __init__(self, V=13, D=8):
        super().__init__()
        self.embed, self.blocks, self.head = nn.Embedding(V, D), nn.ModuleList([nn.Sequential(nn.RMSNorm(D), nn.Linear(D, D), nn.Tanh(), nn.Dropout(.1)) for _ in range(2)]), nn.Linear(D, V)
    def forward(self, tokens):
        x = self.embed(tokens)
        for b in self.blocks: x = x + b(x)
        return self.head(x)


def net(seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Net()


@given(cuts=st.lists(st.integers(1, 7), max_size=4, unique=True), seed=st.integers(0, 50))
@settings(max_examples=30, deadline=None)
def test_the_gradient_does_not_depend_on_the_cut(cuts, seed):
    loader = Loader(B=8)
    loader.place = seed
    whole = next(iter(loader))
    whole.weights[seed % 8] = 0 # a row without targets
    whole.num_targets = int(whole.weights.sum())
    edges = [0, *sorted(cuts), 8]
    pieces = [Batch(*(t[a:b] for t in (whole.tokens, whole.targets, whole.weights, whole.document))) for a, b in zip(edges, edges[1:])]
    a, b = net().double().eval(), net().double().eval()
    one, sums = accumulate(Count().loss, a, [whole])
    many, parts = accumulate(Count().loss, b, pieces)
    for p, q in zip(a.parameters(), b.parameters()): assert_close(p.grad, q.grad, rtol=1e-10, atol=1e-12) # float64
    assert_close(sums.sum(), parts.sum(), rtol=1e-5, atol=0) # the sums are float32
    assert one[0].parts['accuracy'][0] == sum(m.parts['accuracy'][0] for m in many)


def test_a_step_without_targets_moves_nothing_by_gradient():
    network, batch = net(), next(iter(Loader()))
    batch.weights[:] = 0
    batch.num_targets = 0
    accumulate(Count().loss, network, [batch])
    assert all((p.grad == 0).all() for p in network.parameters())


class Memory:
    "A listener that remembers."
    def __init__(self): self.records = {}
    def log(self, metrics, step): self.records[step] = {k: v for k, v in metrics.items() if k not in ('train/tokens_per_sec', 'train/data_wait', 'train/memory_gb', 'train/mfu')}
    def finish(self, state, error): pass


def run(folder, name, steps, memory, limit=None, accumulation=2, total=20, resume=False):
    "One sitting with fresh objects, as a new process has them."
    torch.manual_seed(999 if resume else 3) # a resumed process starts with another global state
    optim = Optim(name=name, lr=.02, warmup_steps=3)
    network = net(seed=5 if resume else 0)
    things = dict(network=network, optimizer=build_optimizer(network, optim), generators={'objective': torch.Generator().manual_seed(8)}, loader=Loader())
    state = restore(load_checkpoint(latest(folder)), **things) if resume else TrainState()
    validated = []
    def validate(state):
        network.eval()
        with torch.no_grad(): loss = Count().loss(network, next(iter(Loader(B=2))), None).sum.item()/16
        validated.append(state.validated(loss))
        return {'val/loss': loss}
    fit(network, Noisy(), things['loader'], things['optimizer'], total_steps=total, rate=lambda s: rate_at(s, total, optim), accumulation=accumulation, state=state,
        generator=things['generators']['objective'], hooks=[every(7, validate)], save=checkpointer(folder, partial(capture, **things), keep_last=2), save_every=6, log_every=4,
        tracker=Tracker([memory]), limit=limit)
    return network


@pytest.mark.parametrize('name', ['adamw', 'muon'])
@pytest.mark.parametrize('stops', [[7], [1, 6, 8], [14], [4, 10]], ids=str)
def test_stop_and_resume_is_bit_exact(tmp_path, name, stops):
    "20 steps in one go, or in sittings with fresh objects: every logged number and every weight, bit for bit. The stops fall between, on and around log lines, validations and saves."
    straight, cut = Memory(), Memory()
    whole = run(tmp_path/'a', name, 20, straight)
    for i, steps in enumerate(stops):
        with pytest.raises(Stopped) as e: run(tmp_path/'b', name, 20, cut, limit=Limit(steps=steps), resume=i > 0)
        assert e.value.checkpoint == latest(tmp_path/'b')
    parts = run(tmp_path/'b', name, 20, cut, resume=True)
    assert cut.records == straight.records and list(straight.records) == [4, 7, 8, 12, 14, 16, 20]
    for p, q in zip(whole.parameters(), parts.parameters()): assert_close(p, q, rtol=0, atol=0)
    a, b = (load_checkpoint(latest(tmp_path/x)) for x in 'ab')
    for x, y in zip(a['optimizer_state_dict']['parts'], b['optimizer_state_dict']['parts'], strict=True): assert_close(x['state'], y['state'], rtol=0, atol=0)
    assert {k: v for k, v in a['train_state'].items() if k != 'seconds'} == {k: v for k, v in b['train_state'].items() if k != 'seconds'}
    assert a['loader_state'] == b['loader_state'] == {'place': 40}


def test_a_crash_after_a_checkpoint_is_repeated_exactly(tmp_path):
    "The process dies with steps done and logged since the last checkpoint (at 14, a best validation): they are done again, with the same numbers."
    straight, cut = Memory(), Memory()
    whole = run(tmp_path/'a', 'adamw', 20, straight)
    class Dies(Memory):
        def log(self, metrics, step):
            cut.log(metrics, step)
            if step == 16: raise KeyboardInterrupt # what a tracker lets through
    with pytest.raises(KeyboardInterrupt): run(tmp_path/'b', 'adamw', 20, Dies())
    assert latest(tmp_path/'b').name == 'step-00000014' and 16 in cut.records
    again = run(tmp_path/'b', 'adamw', 20, cut, resume=True)
    assert cut.records == straight.records
    for p, q in zip(whole.parameters(), again.parameters()): assert_close(p, q, rtol=0, atol=0)


def test_hooks_run_on_their_steps_and_last():
    seen, network = [], net()
    fit(network, Count(), Loader(), build_optimizer(network, Optim()), total_steps=11, hooks=[every(4, lambda s: seen.append(s.global_step)), every(5, lambda s: seen.append(-s.global_step))])
    assert seen == [4, -5, 8, -10, 11, -11]


def test_one_record_a_step(tmp_path):
    network = net()
    with Tracker([Files(tmp_path)]) as tracker:
        state = fit(network, Count(), Loader(), build_optimizer(network, Optim()), total_steps=10, log_every=5, hooks=[every(5, lambda s: {'val/loss': 1.})], tracker=tracker, flops_per_token=1e3)
    records = read_jsonl(tmp_path/'metrics.jsonl')
    assert [r['step'] for r in records] == [5, 10]
    assert set(records[1]) == {'step', 'time', 'val/loss'} | {f'train/{k}' for k in ('loss', 'accuracy', 'perplexity', 'lr', 'tokens_per_sec', 'data_wait', 'grad_norm', 'mfu', 'memory_gb')}
    assert (state.tokens, state.rows) == (10*4*8, 40) and state.seconds > 0


def test_the_clock_counts_training_and_waiting_apart_but_no_hooks_and_no_saving(monkeypatch):
    "A clock that only sleeping moves: no measurement."
    now = [0.]
    def sleep(seconds): now[0] += seconds
    monkeypatch.setattr(loop.time, 'perf_counter', lambda: now[0])
    class Slow(Count):
        def loss(self, network, batch, generator):
            sleep(2)
            return super().loss(network, batch, generator)
    class Waits(Loader):
        def __iter__(self):
            for batch in super().__iter__():
                sleep(1)
                yield batch
    speeds, waits = [], []
    class Speed(Memory):
        def log(self, metrics, step): sleep(1000); speeds.append(metrics.get('train/tokens_per_sec')); waits.append(metrics.get('train/data_wait'))
    network = net()
    state = fit(network, Slow(), Waits(), build_optimizer(network, Optim()), total_steps=12, log_every=3, hooks=[every(2, lambda s: sleep(50) or {'val/loss': 1.})], save=lambda s: sleep(100), save_every=4,
                tracker=Tracker([Speed()]))
    assert state.seconds == 12*3 and [s for s in speeds if s] == [32/3]*4
    assert [w for w in waits if w is not None] == pytest.approx([1/3]*4)

    from llmlab.trainer.tracking import progress_line
    line = lambda wait: progress_line(3, 12, {'train/loss': 2., 'train/data_wait': wait})
    assert line(1/3).endswith('33% waiting for data') and 'waiting' not in line(.01)


def test_the_logged_loss_is_the_mean_over_all_targets():
    network, memory, batches = net().eval(), Memory(), Loader()
    frozen = build_optimizer(network, Optim(lr=1e-30, weight_decay=0))
    fit(network, Count(), batches, frozen, total_steps=3, accumulation=2, log_every=3, tracker=Tracker([memory]))
    network.train() # dropout draws, so compare with a network that has none
    for m in network.modules():
        if isinstance(m, nn.Dropout): m.p = 0.
    memory = Memory()
    fit(network, Count(), Loader(), frozen, total_steps=3, accumulation=2, log_every=3, tracker=Tracker([memory]))
    source = iter(Loader())
    given = [Count().loss(network, next(source), None) for _ in range(6)]
    assert memory.records[3]['train/loss'] == pytest.approx(sum(g.sum.item() for g in given)/sum(g.count for g in given), rel=1e-6)


class Poisoned(Count):
    def __init__(self, at): self.at, self.calls = at, 0
    def loss(self, network, batch, generator):
        self.calls += 1
        loss = super().loss(network, batch, generator)
        return loss._replace(sum=loss.sum*math.nan) if self.calls == self.at else loss


@pytest.mark.parametrize('lag', [0, 2])
@pytest.mark.parametrize('name', ['adamw', 'muon'])
def test_not_a_number_stops_before_the_step(tmp_path, monkeypatch, lag, name):
    "With a lag, as on a GPU: the host hears of it later, but the weights are those from before."
    monkeypatch.setattr(loop, '_lag', lambda *_: lag)
    clean, bad = net(), net()
    torch.manual_seed(0)
    fit(clean, Count(), Loader(), build_optimizer(clean, Optim(name=name)), total_steps=4, accumulation=2)
    torch.manual_seed(0)
    with pytest.raises(LlmlabError, match=r'step 5 did not happen: the loss of micro-batch 2 of 2 is nan. The weights are those of step 4') as e:
        fit(bad, Poisoned(at=10), Loader(), build_optimizer(bad, Optim(name=name)), total_steps=50, accumulation=2, folder=tmp_path)
    for p, q in zip(clean.parameters(), bad.parameters()): assert_close(p, q, rtol=1e-6 if lag else 0, atol=1e-7 if lag else 0) # a skippable step multiplies in another order
    kept = load_file(tmp_path/'bad-batch-step-00000005.safetensors')
    loader = Loader(); loader.place = 9
    assert_close(kept['1.tokens'], next(iter(loader)).tokens) and 'optim.lr' in str(e.value)


@pytest.mark.parametrize('lag', [0, 2])
def test_no_checkpoint_of_a_bad_step(tmp_path, monkeypatch, lag):
    monkeypatch.setattr(loop, '_lag', lambda *_: lag)
    saved, network = [], net()
    with pytest.raises(LlmlabError): fit(network, Poisoned(at=6), Loader(), build_optimizer(network, Optim()), total_steps=50, save=lambda s: saved.append(s.global_step), save_every=2)
    assert saved == [2, 4]


def test_fp16_skips_and_gives_up():
    machine = Machine(dtype=torch.float16)
    network, memory = net(), Memory()
    scaler = machine.scaler()
    state = fit(network, Count(), Loader(), build_optimizer(network, Optim(lr=.01)), total_steps=30, machine=machine, scaler=scaler, log_every=30, tracker=Tracker([memory]))
    assert state.global_step == 30 and memory.records[30]['train/loss'] < 2.6 and scaler.state_dict()['scale'] > 1
    network = net()
    network.head.bias.register_hook(lambda grad: torch.full_like(grad, math.inf))
    before = [p.detach().clone() for p in network.parameters()]
    with pytest.raises(LlmlabError, match='20 steps in a row'): fit(network, Count(), Loader(), build_optimizer(network, Optim()), total_steps=30, machine=machine)
    for p, q in zip(network.parameters(), before): assert_close(p.detach(), q, rtol=0, atol=0)


def test_batches_that_end_and_memory_that_ends():
    network = net()
    one = next(iter(Loader()))
    with pytest.raises(LlmlabError, match='ran out'): fit(network, Count(), [one], build_optimizer(network, Optim()), total_steps=2)
    class Huge(Count):
        def loss(self, network, batch, generator): return torch.empty(2**55, dtype=torch.uint8)
    with pytest.raises(LlmlabError, match='Halve trainer.batch_size'): fit(network, Huge(), Loader(), build_optimizer(network, Optim()), total_steps=2)


child = '''
import sys, time
from functools import partial
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from test_loop import *
torch.set_num_threads(1)
folder, network = Path(sys.argv[1]), net()
class Slow(Count):
    def loss(self, network, batch, generator):
        time.sleep(.02)
        return super().loss(network, batch, generator)
def slow_save(state):
    if sys.argv[3:] == ['slow']: print('saving', flush=True); time.sleep(30)
    return save(state)
optimizer, loader = build_optimizer(network, Optim()), Loader()
save = checkpointer(folder, partial(capture, network=network, optimizer=optimizer, loader=loader))
class Say(Memory):
    def log(self, metrics, step): print(step, flush=True)
try: fit(network, Slow(), loader, optimizer, total_steps=10**6, save=slow_save, save_every=10**6, log_every=1, tracker=Tracker([Say()]))
except Stopped as e:
    print(e.reason, e.step, e.checkpoint.name)
    assert load_checkpoint(e.checkpoint)['global_step'] == e.step == loader.place
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    sys.exit(75)
'''


def hear_ctrl_c(): signal.signal(signal.SIGINT, signal.SIG_DFL) # a shell that runs the check in the background makes it deaf to it


@pytest.mark.parametrize('name', ['SIGINT', 'SIGTERM', 'SIGUSR1'])
def test_a_signal_finishes_the_step_and_saves(tmp_path, name):
    p = subprocess.Popen([sys.executable, '-c', child, str(tmp_path), str(root/'tests')], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | {'PYTHONPATH': str(root)}, preexec_fn=hear_ctrl_c)
    for _ in range(3): p.stdout.readline()
    p.send_signal(getattr(signal, name))
    out, err = p.communicate(timeout=60)
    assert p.returncode == 75, err
    assert out.split('\n')[-2].startswith(name)


def test_a_second_ctrl_c_quits_at_once_and_leaves_nothing_half(tmp_path):
    p = subprocess.Popen([sys.executable, '-c', child, str(tmp_path), str(root/'tests'), 'slow'], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | {'PYTHONPATH': str(root)}, preexec_fn=hear_ctrl_c)
    p.stdout.readline()
    p.send_signal(signal.SIGINT)
    while p.stdout.readline().strip() != 'saving': pass
    p.send_signal(signal.SIGINT)
    out, err = p.communicate(timeout=20)
    # 1 where tabulate is installed: torch imports it when Python ends, to print the times of its compiler, and at the `exec` of its named tuples Python forgets that it was interrupted
    assert 'KeyboardInterrupt' in err and p.returncode in (-signal.SIGINT, 1) and not list(tmp_path.iterdir())


def test_in_a_thread_no_handler_is_touched():
    before, result = signal.getsignal(signal.SIGINT), []
    def work():
        network = net()
        result.append(fit(network, Count(), Loader(), build_optimizer(network, Optim()), total_steps=3).global_step)
        with stop_signals() as request: result.append(request.reason)
    t = threading.Thread(target=work); t.start(); t.join()
    assert result == [3, None] and signal.getsignal(signal.SIGINT) is before


def test_handlers_come_back_after_an_error():
    before = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
    with pytest.raises(ZeroDivisionError):
        with stop_signals(): 1/0
    assert {s: signal.getsignal(s) for s in before} == before


def test_limits():
    network = net()
    begun = time.monotonic()
    with pytest.raises(Stopped, match='limit of 0 seconds'):
        fit(network, Count(), Loader(), build_optimizer(network, Optim()), total_steps=10**6, limit=Limit(seconds=.2))
    assert time.monotonic()-begun < 20
    with pytest.raises(Stopped) as e: fit(network, Count(), Loader(), build_optimizer(network, Optim()), total_steps=10**6, limit=Limit(seconds=100, start=begun-100))
    assert e.value.step == 1
    assert fit(network, Count(), Loader(), build_optimizer(network, Optim()), total_steps=4, limit=Limit(steps=4)).global_step == 4 # done is not stopped
    assert parse_limit('1.5h') == Limit(seconds=5400.) and parse_limit('10 steps') == Limit(steps=10) and parse_limit('02:00') == Limit(seconds=120)
    for bad in ('', 'x', '5d', '1:x', '1.5'):
        with pytest.raises(ConfigError): parse_limit(bad)


@given(st.lists(st.tuples(st.floats(-1e6, 1e6), st.integers(1, 1000)), min_size=1, max_size=30), st.integers(0, 30))
@settings(max_examples=50, deadline=None)
def test_a_window_survives_being_saved(sums, at):
    import json
    straight, cut = Window(), Window()
    for i, (total, count) in enumerate(sums):
        straight.add('loss', torch.tensor(total), count)
        if i == at: cut = Window(json.loads(json.dumps(cut.state())))
        cut.add('loss', torch.tensor(total), torch.tensor(count))
    assert straight.means() == cut.means() and straight.means() == {}


@pytest.mark.parametrize('dtype', [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.proof)])
def test_compiled_or_not_it_learns_the_same(dtype):
    from shutil import which
    if not which('g++'): pytest.skip('no C++ compiler')
    losses = []
    for compiled in (False, True):
        network, memory = net(), Memory()
        for m in network.modules():
            if isinstance(m, nn.Dropout): m.p = 0.
        fit(network, Count(), Loader(), build_optimizer(network, Optim(lr=.01)), total_steps=6, log_every=3, machine=Machine(dtype=dtype, compile=compiled), tracker=Tracker([memory]))
        losses.append([r['train/loss'] for r in memory.records.values()])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4 if dtype == torch.float32 else 2e-2) # fusing rounds less often


@pytest.fixture(scope='module')
def tiny_cache(tmp_path_factory):
    from llmlab import tiny
    from llmlab.data.corpora import open_corpus
    from llmlab.data.tokenizer import build_tokenizer
    from llmlab.packing.cache import build_cache
    folder = tmp_path_factory.mktemp('cache')
    config = tiny.config(f'packing.folder={folder}', 'data.max_documents=120')
    corpus = open_corpus(config.data)
    tokenizer = build_tokenizer(config.tokenizer, corpus)
    return build_cache(corpus, tokenizer, config.packing, 'train'), tokenizer.vocab_size


@pytest.mark.parametrize('name, dtype', [('muon', torch.float32), ('adamw', torch.bfloat16)])
def test_a_transformer_on_the_real_loader_resumes_exactly(tmp_path, tiny_cache, name, dtype):
    from llmlab.models.ar import AR
    from llmlab.models.transformer import Shape, build
    from llmlab.packing.loader import Loader as RealLoader
    cache, vocab_size = tiny_cache
    shape = Shape(vocab_size=vocab_size, seq_len=64, d_model=32, num_layers=2, num_heads=2, num_kv_heads=1, d_ff=64)
    def sitting(folder, memory, limit=None, seed=0):
        network = build(shape, seed=seed)
        things = dict(network=network, optimizer=build_optimizer(network, Optim(name=name, lr=.01)), loader=RealLoader(cache, 4, seed=1))
        path = latest(folder)
        state = restore(load_checkpoint(path), **things) if path else TrainState()
        try: fit(network, AR(), things['loader'], things['optimizer'], total_steps=20, rate=lambda s: rate_at(s, 20, Optim()), accumulation=2, state=state, machine=Machine(dtype=dtype),
                 save=checkpointer(folder, partial(capture, **things)), save_every=5, log_every=3, tracker=Tracker([memory]), limit=limit)
        finally: things['loader'].close()
        return network
    straight, cut = Memory(), Memory()
    whole = sitting(tmp_path/'a', straight)
    with pytest.raises(Stopped): sitting(tmp_path/'b', cut, Limit(steps=7))
    parts = sitting(tmp_path/'b', cut, seed=9)
    assert cut.records == straight.records and straight.records[20]['train/loss'] < straight.records[3]['train/loss']
    for p, q in zip(whole.parameters(), parts.parameters()): assert_close(p, q, rtol=0, atol=0)


def test_muon_splits_of_the_transformer():
    from llmlab.models.transformer import Shape, build
    from llmlab.trainer.optim import muon_splits, sort_parameters
    network = build(Shape(vocab_size=50, seq_len=16, d_model=32, num_layers=2, num_heads=4, num_kv_heads=2, d_ff=48, tie_embeddings=False))
    hidden = dict(sort_parameters(network, muon=True)['hidden'])
    splits = {n: rows for n, p in hidden.items() for q, rows in muon_splits(network).items() if p is q}
    fused = [rows for n, rows in splits.items() if 'qkv' in n]
    assert fused == [(32, 16, 16)]*2 and all(sum(rows) == len(hidden[n]) for n, rows in splits.items())
    assert not any('embed' in n or 'head' in n for n in hidden) and len(hidden) == 2*4


# --- batches without targets

class Some(Loader):
    "Of every three batches the first ones have no target, as many as `empty` says."
    def __init__(self, empty=1, **kw): super().__init__(**kw); self.empty = empty
    def __iter__(self):
        for b in super().__iter__():
            keep = float((self.place-1) % 3 >= self.empty)
            yield Batch(b.tokens, b.targets, b.weights*keep, b.document, rows=torch.arange(len(b.tokens))+1000*self.place)


class Mean(Count):
    "An objective that takes a mean on the way, as plain cross-entropy does: 0/0 where there is no target."
    def loss(self, network, batch, generator):
        loss = super().loss(network, batch, generator)
        return loss._replace(sum=loss.sum/batch.weights.sum()*batch.num_targets)


def learned(loader, steps, accumulation=1, objective=Mean(), **kw):
    network, memory = net().eval(), Memory()
    network.train = lambda mode=True: network # (no dropout: it would draw for the batches that are left out as well)
    state = fit(network, objective, loader, build_optimizer(network, Optim(lr=.02)), total_steps=steps, accumulation=accumulation, log_every=4, tracker=Tracker([memory]), **kw)
    return network, state, memory.records


def test_a_batch_without_targets_is_left_out_and_counted():
    "Taken alone it would make no step; together with others it counts for nothing. Plain cross-entropy gives nan for it."
    empty = next(iter(Some()))
    assert empty.num_targets == 0 and Mean().loss(net(), empty, None).sum.isnan()
    class Only(Some): # the same batches, without those that have no target
        def __iter__(self): return (b for b in super(Only, self).__iter__() if b.num_targets)
    a, state, log = learned(Some(), 8)
    b, other, bare = learned(Only(), 8)
    for p, q in zip(a.parameters(), b.parameters()): assert_close(p, q, rtol=0, atol=0)
    assert state.global_step == 8 and (state.rows, state.tokens) == (12*4, 8*4*8) and other.rows == 8*4 # 12 batches were taken, 4 of them empty
    assert [log[s].pop('train/empty_batches') for s in (4, 8)] == [2, 2] and log == bare
    _, state, log = learned(Some(), 4, accumulation=3) # in each step one of three
    assert state.rows == 48 and log[4]['train/empty_batches'] == 4 and math.isfinite(log[4]['train/loss'])


def test_too_many_batches_without_targets_end_the_run():
    with pytest.raises(LlmlabError, match=r'20 batches in a row have no target to learn from \(the last one has the rows 20000, 20001, 20002, 20003\)'): learned(Some(empty=3), 5)
    with pytest.raises(LlmlabError, match='20 batches in a row'): learned(Some(empty=3), 5, accumulation=7)
    learned(Some(empty=2), 30) # never more than two in a row


# --- groups that should learn

class Adapted(nn.Module):
    "A frozen layer, its adapter (B is zero at first, so A has no gradient in the first step), and a tower behind a gate."
    def __init__(self, gate=1., V=13, D=8):
        super().__init__()
        self.embed, self.base, self.head = nn.Embedding(V, D), nn.Linear(D, D), nn.Linear(D, V)
        self.lora_A, self.lora_B, self.tower, self.gate = nn.Parameter(torch.randn(2, D)), nn.Parameter(torch.zeros(D, 2)), nn.Linear(D, D), gate
        self.layers = nn.ModuleList([nn.Module()])
        self.layers[0].lora_A, self.layers[0].lora_B = self.lora_A, self.lora_B
        del self.lora_A, self.lora_B
        for part in (self.embed, self.base, self.head): part.requires_grad_(False)
    def forward(self, tokens):
        x, layer = self.embed(tokens), self.layers[0]
        return self.head(torch.tanh(self.base(x) + x@layer.lora_A.T@layer.lora_B.T + self.gate*self.tower(x)))


def adapted(gate=1., steps=3, check_groups=True, prepare=lambda network: None, **kw):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = Adapted(gate)
    before = {n: p.clone() for n, p in network.named_parameters()}
    optimizer = build_optimizer(network, Optim(lr=.01, weight_decay=0))
    prepare(network)
    try: fit(network, Count(), Loader(), optimizer, total_steps=steps, check_groups=check_groups, **kw)
    except LlmlabError as e: return str(e), [n for n, p in network.named_parameters() if not p.equal(before[n])]
    return '', [n for n, p in network.named_parameters() if not p.equal(before[n])]


def test_every_group_that_should_train_has_a_gradient_and_no_frozen_one_has():
    assert adapted() == ('', ['tower.weight', 'tower.bias', 'layers.0.lora_A', 'layers.0.lora_B'])
    said, moved = adapted(gate=0.)
    assert said.startswith('after 1 step these groups should train, but have no gradient: tower (2 tensors: tower.weight, ...)') and not moved # before the weights saw it
    assert adapted(gate=0., check_groups=False)[0] == '' # not asked for: not looked at
    assert 'after 2 steps' in adapted(gate=0., check_groups=2)[0]
    def late(network): network.base.requires_grad_(True)
    assert adapted(prepare=late)[0].startswith('base should train, but the optimizer does not have them')
    def stale(network): network.base.weight.grad = torch.ones_like(network.base.weight)
    assert 'base is frozen, but base.weight has a gradient' in adapted(prepare=stale)[0]
    def opens(network): network.gate = .5
    assert adapted(gate=0., check_groups=2, hooks=[every(1, lambda state: None)], prepare=opens)[0] == ''


def test_groups_of_a_resumed_run_are_not_looked_at_again():
    network = Adapted(0.)
    state = fit(network, Count(), Loader(), build_optimizer(network, Optim()), total_steps=2)
    fit(network, Count(), Loader(), build_optimizer(network, Optim()), total_steps=4, state=state, check_groups=True)


def test_names_of_groups():
    assert [group_of(n) for n in ('embed.weight', 'blocks.10.attention.out.lora_B', 'base_model.model.model.layers.3.mlp.up_proj.lora_magnitude_vector.default.weight', 'lora_A', 'gate', 'blocks.0.mlp.up.base.weight')] == \
        ['embed', 'blocks.attention.out', 'base_model.model.model.layers.mlp.up_proj', 'lora_A', 'gate', 'blocks.mlp.up.base']


# --- early stopping

losses = {2: 3., 4: 2., 6: 2.5, 8: 1.9, 10: 2.2, 12: 1.9, 14: 2.1, 16: 1., 18: 1.1, 20: 1.2} # by step: the best is at 8, until 16


def patient(folder, memory, stale, limit=None, resume=False, total=20, said=None):
    "One sitting with fresh objects."
    torch.manual_seed(999 if resume else 3)
    network = net(seed=5 if resume else 0)
    things = dict(network=network, optimizer=build_optimizer(network, Optim(lr=.02)), generators={'objective': torch.Generator().manual_seed(8)}, loader=Loader())
    state = restore(load_checkpoint(latest(folder)), **things) if resume else TrainState()
    def validate(state): state.validated(losses[state.global_step]); return {'val/loss': losses[state.global_step]}
    state = fit(network, Noisy(), things['loader'], things['optimizer'], total_steps=total, state=state, generator=things['generators']['objective'], hooks=[every(2, validate)],
        save=checkpointer(folder, partial(capture, **things), keep_last=2), save_every=5, log_every=3, tracker=Tracker([memory], say=(said if said is not None else []).append), limit=limit, enough=patience(stale, 2))
    return network, state


@pytest.mark.parametrize('stale, ends, best', [(1, 6, 4), (2, 12, 8), (3, 14, 8), (4, 20, 16), (None, 20, 16)], ids=str)
def test_a_run_that_gets_no_better_ends_well(tmp_path, stale, ends, best):
    said = []
    _, state = patient(tmp_path, Memory(), stale, said=said)
    assert (state.global_step, state.best_step) == (ends, best)
    assert latest(tmp_path).name == f'step-{ends:08d}' and load_checkpoint(latest(tmp_path))['val_loss'] == losses[ends] # with a checkpoint of its last step
    if ends == 20: assert not said
    else: assert said == [f'Training ends with step {ends} of 20: no better validation loss than {losses[best]:.4f} (step {best}) in {stale} validation{"s"*(stale > 1)}, as trainer.patience asks.']


@pytest.mark.parametrize('stops', [[11], [12], [1, 8, 3], [6, 4, 1]], ids=str)
def test_early_stopping_resumes_exactly(tmp_path, stops):
    "Stopped by a limit before, on and after a validation that counts: the run ends at the same step, with the same bits."
    straight, cut = Memory(), Memory()
    whole, state = patient(tmp_path/'a', straight, 3)
    for i, steps in enumerate(stops):
        with pytest.raises(Stopped): patient(tmp_path/'b', cut, 3, Limit(steps=steps), resume=i > 0)
    parts, again = patient(tmp_path/'b', cut, 3, resume=True)
    assert again.global_step == state.global_step == 14 and cut.records == straight.records
    for p, q in zip(whole.parameters(), parts.parameters()): assert_close(p, q, rtol=0, atol=0)
    assert latest(tmp_path/'a').name == latest(tmp_path/'b').name


def test_a_run_that_has_ended_is_over_at_once_and_goes_on_with_more_patience(tmp_path):
    memory, said = Memory(), []
    patient(tmp_path/'a', Memory(), 2)
    _, state = patient(tmp_path/'a', memory, 2, resume=True, said=said)
    assert state.global_step == 12 and not memory.records and len(said) == 1
    more, straight = Memory(), Memory()
    network, state = patient(tmp_path/'a', more, 4, resume=True)
    whole, _ = patient(tmp_path/'b', straight, 4)
    assert state.global_step == 20
    for p, q in zip(whole.parameters(), network.parameters()): assert_close(p, q, rtol=0, atol=0)
