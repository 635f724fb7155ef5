"""What the estimate of memory must hold to, without a GPU: what is counted is what happens, depth and rows are straight lines, and advice saves."""
import math
import pytest, torch
from torch.testing import assert_close
from llmlab.config import load_config
from llmlab.files import ConfigError
from llmlab.models.transformer import Shape, build
from llmlab.models.zoo import build_model
from llmlab.trainer.memory import Estimate, Heap, Saver, check_memory, estimate, explain_oom, free_memory, reach, savers, walk
from llmlab.trainer.optim import NarrowAdamW, build_optimizer


def tiny(*more): return load_config('tiny_test', ['optim.name=adamw', *more]) # (Muon takes many small operations)
def small_steps(*more, rows=4, dtype=torch.float32, gpu=False, micro=1): return walk(tiny(*more), 384, rows, micro, dtype, gpu)


def test_what_is_counted_is_what_is_there():
    "The living tensors of a real step, against the ledger."
    import gc
    cfg = tiny()
    network, objective = build_model(cfg, 384)
    optimizer = build_optimizer(network, cfg.optim)
    ledger = small_steps()
    parts = ledger.peaks['step'][1]
    weights = sum(p.numel()*4 for p in network.parameters())
    assert weights <= parts['weights'] < weights*1.01
    assert weights <= parts['gradients'] < weights*1.01
    network.train()
    for p in network.parameters(): p.grad = torch.zeros_like(p)
    optimizer.step()
    states = sum(t.numel()*t.element_size() for part in optimizer.parts for s in part.state.values() for t in s.values())
    assert states <= parts['optimizer'] < states*1.02


def test_what_the_backward_pass_keeps():
    "Bytes of the saved tensors of a real forward pass, against the activations of the ledger after it."
    cfg = tiny('model.num_layers=4')
    network, objective = build_model(cfg, 384)
    from llmlab.packing.loader import Batch
    rows, T = 4, cfg.packing.seq_len
    batch = Batch(torch.zeros(rows, T, dtype=torch.int64), torch.zeros(rows, T, dtype=torch.int64), torch.ones(rows, T), torch.arange(2).repeat_interleave(T//2).expand(rows, T))
    kept, own = {}, {p.untyped_storage().data_ptr() for p in network.parameters()}
    def note(t):
        if (s := t.untyped_storage()).data_ptr() not in own: kept[s.data_ptr()] = s.nbytes()
        return t
    network.train()
    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t): loss = objective.loss(network, batch)
    real, ledger = sum(kept.values()), small_steps('model.num_layers=4')
    backward = ledger.peaks['backward'][1]
    assert .9 < (backward['activations']+backward.get('head', 0))/real < 1.25 # at its peak some are gone already


@pytest.mark.parametrize('more,gpu', [([], False), ([], True), (['model.architecture=diffusion'], True), (['model.architecture=sdd'], True), (['model.architecture=sdd'], False),
                                     (['model.attention=infini', 'model.infini.segment_len=16'], True), (['model.attention=local', 'model.infini.segment_len=16'], True)])
def test_families_and_attentions(more, gpu):
    found = [small_steps(*more, f'trainer.gradient_checkpointing={how}', gpu=gpu, dtype=torch.bfloat16, rows=2).peaks['forward'][1]['activations'] for how in ('none', 'selective', 'full')]
    assert found[0] > found[1] > found[2]


@pytest.mark.parametrize('how', ['none', 'selective', 'full'])
def test_depth_is_a_straight_line(how):
    of = lambda layers: small_steps(f'model.num_layers={layers}', f'trainer.gradient_checkpointing={how}', gpu=True, dtype=torch.bfloat16).peaks['forward'][1]['activations']
    two, three, six = of(2), of(3), of(6)
    assert abs(two+4*(three-two)-six) <= .002*six # (blocks of 512 bytes)


def test_every_nth_block():
    of = lambda how: small_steps(f'trainer.gradient_checkpointing={how}', 'model.num_layers=4').peaks['forward'][1]['activations']
    none, two, full = of('none'), of(2), of('full')
    assert full < two < none and abs(two-(none+full)/2) < .1*none


def test_rows_in_proportion():
    a, b = (estimate(tiny(f'trainer.batch_size={rows}', 'packing.seq_len=256'), device='cuda') for rows in (8, 32))
    assert abs(a.at(32).peak/b.peak-1) < .05
    assert b.at(8).rows == 8 and a.most_rows(10**8) == 0 and a.most_rows(4*10**9) > 8


def test_states_in_bf16_and_an_average():
    for name in ('adamw', 'muon'):
        wide, narrow = (small_steps(f'optim.name={name}', f'optim.state_dtype={d}').peaks['step'][1]['optimizer'] for d in ('fp32', 'bf16'))
        assert .49 < narrow/wide < .56 # (step counts, and blocks of 64 bytes, are a part of a tiny model)
    with_average = small_steps('optim.ema=0.99').peaks['step'][1]
    assert with_average['average'] == with_average['weights']


def test_the_gradients_of_earlier_micro_batches_stay():
    one, two = (small_steps(micro=n).peaks['forward'] for n in (1, 2))
    assert two[1].get('gradients', 0) > .9*two[1]['weights'] and not one[1].get('gradients')


def test_many_ranks():
    more = ('trainer.batch_size=8', 'trainer.gradient_accumulation_steps=4', 'model.d_model=128', 'model.num_layers=6')
    alone, copies = estimate(tiny(*more), world=1), estimate(tiny(*more, 'parallel.strategy=ddp'), world=4)
    divided = estimate(tiny(*more, 'parallel.strategy=fsdp'), world=4)
    halves = estimate(tiny(*more, 'parallel.strategy=hsdp', 'parallel.shard_size=2'), world=4)
    assert copies.phases['step']['weights'] == alone.phases['step']['weights']
    for k in ('weights', 'gradients', 'optimizer'): assert divided.phases['step'][k]*3.9 < alone.phases['step'][k] < halves.phases['step'][k]*2.1
    assert divided.phases['backward']['gathered'] > 0 and 'gathered' not in copies.phases['backward']


def test_it_says_what_is_not_counted():
    with pytest.raises(ConfigError, match='fine-tuning'): estimate(tiny('finetune.init=somewhere'))
    assert 'batch_size' in explain_oom(tiny('finetune.init=somewhere'))
    assert 'hidden at once' in ' '.join(estimate(tiny('model.architecture=diffusion')).assumed)


def test_savers_save_what_they_say():
    cfg = tiny('trainer.batch_size=64', 'packing.seq_len=256')
    e = estimate(cfg)
    found = savers(cfg, e)
    assert len(found) == 3 and all(s.saved > e.peak/50 for s in found)
    changed = estimate(load_config('tiny_test', ['optim.name=adamw', 'trainer.batch_size=64', 'packing.seq_len=256', *found[0].change.split()]))
    assert changed.peak == e.peak-found[0].saved
    text = explain_oom(cfg)
    assert all(s.change in text for s in found) and 'activations' in text


def test_check_says_everything():
    lines = []
    check_memory(tiny(), 'cpu', lines.append)
    said = '\n'.join(lines)
    for word in ('weights', 'framework', 'Here:', '141 GB', 'Assumed:', 'batch_size'): assert word in said, word


def heard(*more, device='cpu', **k):
    lines = []
    check_memory(tiny(*more), device, lines.append, **k)
    return '\n'.join(lines)

@pytest.fixture
def alone(monkeypatch):
    for name in ('RANK', 'WORLD_SIZE', 'LOCAL_WORLD_SIZE'): monkeypatch.delenv(name, raising=False)
    return monkeypatch


def test_a_gpu_that_is_not_here(alone):
    alone.setattr(torch.cuda, 'is_available', lambda: False)
    assert free_memory('cuda') == 0
    said = heard(device='cuda')
    assert 'no GPU is seen' in said and 'on cuda' in said and '141 GB' in said


def test_a_divided_model_without_torchrun(alone):
    said = heard('parallel.strategy=fsdp', 'slurm.nodes=2', 'slurm.gpus_per_node=4')
    assert 'Of 8 ranks, as slurm.nodes and slurm.gpus_per_node say' in said and 'gathered' in said
    assert 'one of 2 ranks' in heard('parallel.strategy=hsdp', 'slurm.nodes=1', 'slurm.tasks_per_node=2')
    assert 'This is one process' in heard('parallel.strategy=fsdp') and 'process' not in heard()
    for more in (('parallel.strategy=hsdp', 'parallel.shard_size=3'), ('parallel.strategy=hsdp', 'parallel.shard_size=3', 'slurm.nodes=4')):
        with pytest.raises(ConfigError, match='groups of 3'): heard(*more)
    with pytest.raises(ConfigError, match='equally'): heard('parallel.strategy=fsdp', 'slurm.nodes=3')
    with pytest.raises(ConfigError, match='none'): heard('parallel.strategy=none', world=2)


def test_ranks_share_the_memory_of_a_machine(alone):
    from llmlab.trainer import memory
    more = int(estimate(tiny(), device='cpu', world=4).peak/.95)+1-memory.resident()
    alone.setattr(memory, 'free_memory', lambda device='cpu': more) # with what the process has: just enough for one
    assert 'it fits' in heard(world=4)
    alone.setenv('LOCAL_WORLD_SIZE', '4')
    said = heard(world=4)
    assert 'each of the 4 ranks on this machine' in said and 'does NOT fit' in said


def test_copies_keep_the_memory_of_their_gradients():
    "DDP's own memory of gradients stays; those of earlier micro-batches are beside it."
    one, two = (estimate(tiny(f'trainer.gradient_accumulation_steps={n}'), world=2) for n in (2, 4))
    assert all(parts['gradients'] >= 4*one.parameters for parts in one.phases.values())
    assert two.phases['forward']['gradients'] >= 8*two.parameters and two.phases['step']['gradients'] < 5*two.parameters


def test_fewer_rows_on_many_ranks():
    "Ranks divide the micro-batches first: half as many rows in a micro-batch may change nothing."
    cfg = tiny('trainer.batch_size=512', 'packing.seq_len=256')
    first = savers(cfg, estimate(cfg, world=8), world=8, most=1)[0]
    assert first.change == 'trainer.batch_size=32 trainer.gradient_accumulation_steps=16'
    assert 'trainer.batch_size=2 trainer.gradient_accumulation_steps=16' in explain_oom(tiny('trainer.batch_size=32', 'finetune.init=x'), world=8)
    assert 'batch_size' not in explain_oom(tiny('trainer.batch_size=1', 'finetune.init=x'))


def test_advice_without_a_remedy(monkeypatch):
    from llmlab.trainer import memory
    monkeypatch.setattr(memory, 'savers', lambda *a, **k: [])
    assert 'What would help' not in (said := explain_oom(tiny())) and 'No single setting' in said


def test_recomputing_that_recomputes_nothing(alone):
    from llmlab.trainer import memory
    assert 'none is recomputed' in heard('trainer.gradient_checkpointing=3', 'model.num_layers=2')
    for how in ('none', 2, 'selective', 'full'): memory._warn_idle_recompute(tiny(f'trainer.gradient_checkpointing={how}', 'model.num_layers=2'), pytest.fail)


def test_a_heap_against_a_list_of_bytes():
    "No two living blocks overlap, whatever comes and goes."
    import random
    r, heap, living = random.Random(0), Heap(), {}
    for key in range(2000):
        if living and r.random() < .5: heap.free(gone := r.choice(list(living))); del living[gone]
        heap.alloc(key, size := r.randrange(1, 5000))
        living[key] = size
        spans = sorted(heap.used[k] for k in living)
        assert all(a+n <= b for (a, n), (b, _) in zip(spans, spans[1:]))
    assert heap.peak >= sum(living.values())
    assert reach([(0, 10), (0, None)], times=5) == 10


def test_fake_steps_leave_no_trace():
    "Tables of angles are real again afterwards, engines as they were."
    from llmlab.models.attention import ENGINES
    small_steps(gpu=True)
    small_steps()
    assert 'fused' not in ENGINES
    network, objective = build_model(tiny(), 384)
    assert network(torch.zeros(1, 64, dtype=torch.int64)).isfinite().all()


# recomputing, and states in bf16: what the pages do not show

def shaped(**k): return Shape(**(dict(vocab_size=50, seq_len=32, d_model=32, num_layers=3, num_heads=4, num_kv_heads=2, d_ff=64) | k))

@pytest.mark.parametrize('kind', [dict(), dict(attention='infini', segment_len=8), dict(attention='local', segment_len=8), dict(token_mix='conv3', mlp='gelu', norm='layernorm')])
@pytest.mark.parametrize('how', ['selective', 2])
def test_recomputed_gradients_are_the_same_bits(kind, how):
    def grads(recompute, backend='auto'):
        net = build(shaped(**kind), backend, seed=1)
        net.recompute = recompute
        y = net(torch.arange(64).view(2, 32) % 50, document=torch.tensor([[0]*12+[1]*20]*2))
        y.square().mean().backward()
        return [p.grad for p in net.parameters()]
    assert all(map(torch.equal, grads('none'), grads(how)))


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
@pytest.mark.parametrize('family', ['diffusion', 'sdd'])
def test_recomputed_losses_of_the_other_families(family, dtype):
    "Also where a pass without gradient goes before, so that autocast would know the weights already."
    from llmlab.packing.loader import Batch
    def grads(how):
        network, objective = build_model(tiny(f'model.architecture={family}', f'trainer.gradient_checkpointing={how}', 'model.sdd.feedback_prob=1', 'model.sdd.feedback_warmup_steps=1'), 384)
        g = torch.Generator().manual_seed(0)
        row = torch.randint(300, (4, 65), generator=g)
        batch = Batch(row[:, :-1], row[:, 1:], torch.ones(4, 64), torch.zeros(4, 64, dtype=torch.int64), one_document=True, place=3000)
        with torch.autocast('cpu', dtype, enabled=dtype != torch.float32): loss = objective.loss(network.train(), batch)
        loss.sum.backward()
        return [p.grad for p in network.parameters() if p.grad is not None]
    assert all(map(torch.equal, grads('none'), grads('selective')))


def test_recomputing_compiled():
    net, x = build(shaped(), seed=1), torch.arange(64).view(2, 32) % 50
    net.recompute = 'selective'
    torch._dynamo.reset()
    compiled = torch.compile(net, fullgraph=True, backend='aot_eager')
    grads = [torch.autograd.grad(f(x).square().mean(), list(net.parameters())) for f in (net, compiled)]
    for a, b in zip(*grads): assert_close(a, b, rtol=1e-3, atol=1e-6)
    torch._dynamo.reset()


def learn(make, steps=150, seed=0):
    "A small regression, to a loss that only a second moment in good order reaches."
    g = torch.Generator().manual_seed(seed)
    w = torch.nn.Parameter(torch.zeros(64, 32))
    x, true = torch.randn(256, 64, generator=g), torch.randn(64, 32, generator=g)
    y, optimizer = x@true, make([w])
    for step in range(steps):
        i = torch.randint(256, (32,), generator=g)
        loss = (x[i]@w-y[i]).square().mean()
        loss.backward()
        optimizer.step(); optimizer.zero_grad()
    with torch.no_grad(): return (x@w-y).square().mean().item()

def test_bf16_states_learn_as_fp32_states_do():
    settings = dict(lr=.05, betas=(.9, .999))
    wide = [learn(lambda p: torch.optim.AdamW(p, weight_decay=0., **settings), seed=s) for s in range(3)]
    narrow = [learn(lambda p: NarrowAdamW(p, **settings), seed=s) for s in range(3)]
    assert abs(math.log(sum(narrow)/sum(wide))) < .1, (wide, narrow)


def test_one_step_is_adamw():
    "In fp32 arithmetic, from nothing: the first move is torch's own, bit for bit; later ones differ by the rounding of the moments."
    a, b = (torch.nn.Parameter(torch.linspace(-1, 1, 1000).view(50, 20)) for _ in range(2))
    ours, torchs = NarrowAdamW([a], .1, weight_decay=.1), torch.optim.AdamW([b], .1, (.9, .95), weight_decay=.1, fused=True)
    for step in range(3):
        for p in (a, b): p.grad = torch.randn(50, 20, generator=torch.Generator().manual_seed(step))
        ours.step(); torchs.step()
        if not step: assert torch.equal(a, b)
    assert_close(a, b, rtol=0, atol=.1*2/128*3) # a step is at most about .1, each moment is off by a 128th at most


def test_bf16_states_can_skip():
    p = torch.nn.Parameter(torch.ones(300, 10))
    optimizer = NarrowAdamW([p], .1, weight_decay=.1)
    p.grad = torch.ones(300, 10)
    optimizer.step()
    before, moments = p.detach().clone(), {k: t.clone() for k, t in optimizer.state[p].items() if k != 'step'}
    optimizer.found_inf, p.grad = torch.ones(()), torch.full((300, 10), float('nan'))
    optimizer.step()
    assert torch.equal(p.detach(), before) and all(torch.equal(optimizer.state[p][k], t) for k, t in moments.items())
