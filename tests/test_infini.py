"Infini-attention: the tests of its specification (spec_NN), the mistakes of public versions of it (bug_NN), documents, rows that go on."
import copy, io, math
import pytest, torch, torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from torch.testing import assert_close
from llmlab.files import ConfigError
from llmlab.models.attention import ENGINES, naive, visible, why_not
from llmlab.models.infini import (FEATURE_MAPS, GATES, Memory, MemorySettings, elu1, exclusive_prefix, local_attention, memory_off, memory_read,
                                  plan_segments, recall, reset_rows, segment_sums, sequential, state_bytes, stream_local)
from llmlab.models.layers import rotate, rotation

pytestmark = pytest.mark.usefixtures('one_thread')
rules, windows = pytest.mark.parametrize('rule', ['linear', 'delta']), pytest.mark.parametrize('window', ['block', 'xl'])
exact = dict(rtol=0, atol=1e-12)


def gen(seed=0): return torch.Generator().manual_seed(seed)
def heads(T, B=2, H=4, Hk=2, D=6, seed=0, dtype=torch.float64):
    g = gen(seed)
    return [torch.randn(B, h, T, D, generator=g, dtype=torch.float64).to(dtype) for h in (H, Hk, Hk, H, Hk)] # q, k, v, qr, kr

def make(s, H=4, Hk=2, D=6, gate=None, dtype=torch.float64):
    memory = Memory(H, Hk, D, s).to(dtype)
    with torch.no_grad(): memory.gate.copy_(torch.linspace(-1, 1, H) if gate is None else torch.as_tensor(gate).expand(H))
    return memory

def packed(B, T, seed, rate=.15): # rows of documents that begin anywhere, some with padding behind them or before
    g = gen(seed)
    document = torch.rand(B, T, generator=g).lt(rate).long().cumsum(1)
    place = torch.arange(T)[None]
    document = document.masked_fill(place >= torch.randint(T//2, T+1, (B, 1), generator=g), -1)
    return document.masked_fill(place < torch.randint(0, 4, (B, 1), generator=g), -1)

def real(document): return (document >= 0)[:, None, :, None]
def still(x, places): return x # no rotation
def turn(x, places): # rotation in the format of x
    angle = places[..., None].to(x.dtype)*10000.**(-torch.arange(0, x.shape[-1], 2, dtype=x.dtype)/x.shape[-1])
    both = lambda y: torch.cat((y, y), -1).unsqueeze(1)
    return x*both(angle.cos()) + torch.cat((-x[..., x.shape[-1]//2:], x[..., :x.shape[-1]//2]), -1)*both(angle.sin())

def streamed(memory, q, k, v, pieces, rotation=still, state=None):
    state, out, at = {} if state is None else state, [], 0
    for t in pieces:
        here = slice(at, at+t)
        out.append(memory.stream(q[:, :, here], k[:, :, here], v[:, :, here], rotation, state, q[:, :, here].shape[2]))
        at += t
    return torch.cat(out, 2), state


# The tests of the specification

def forms(s, T=23, document=None, seed=0):
    "Values and gradients of the parallel form and of the plain loop."
    x, memory = [y.requires_grad_() for y in heads(T, seed=seed)], make(s)
    up = torch.randn(2, 4, T, 6, generator=gen(seed+1), dtype=torch.float64)
    if document is not None: up = up*real(document)
    for out in (memory(*x, document=document), sequential(*x, memory.g, s, document)):
        yield [out if document is None else out*real(document), *torch.autograd.grad(out, (*x, memory.gate), up, materialize_grads=True)]

variants = [{}, {'window': 'xl'}, {'decay': .7}, {'decay': 0.}, {'bptt_segments': 1}, {'bptt_segments': 2, 'window': 'xl'}, {'bptt_segments': 3, 'decay': .9}, {'first_segment': 'scale'},
            {'first_segment': 'scale', 'window': 'xl', 'gate': 'tanh'}, {'feature_map': 'relu'}, {'feature_map': 'softmax', 'gate': 'hard_sigmoid'},
            {'feature_map': 'hedgehog', 'window': 'xl'}, {'gate': 'tanh_abs'}, {'recompute': True}]

@rules
@pytest.mark.parametrize('more', variants, ids=str)
def test_spec_01_parallel_equals_the_loop_in_value_and_gradient(rule, more):
    s = MemorySettings(4, rule, **more)
    for T in (23, 24, 3): # a remainder, none, less than a segment
        for a, b in zip(*forms(s, T)): assert_close(a, b, **exact)
    for a, b in zip(*forms(s, document=packed(2, 23, 5))): assert_close(a, b, **exact)


def dense(q, k, v, s, document): # [B, H, T, T]: every pair by itself
    N, T, phi = s.segment_len, q.shape[2], FEATURE_MAPS[s.feature_map]
    back = torch.arange(T)[:, None]//N - torch.arange(T)[None]//N
    same = (document[:, :, None] == document[:, None, :]) & (document >= 0)[:, None]
    weights = phi(q)@phi(k).repeat_interleave(q.shape[1]//k.shape[1], 1).mT*((back >= s.lag) & same)[:, None]*(1. if s.decay is None else s.decay)**(back-s.lag).clamp(min=0)
    total = weights.sum(-1, keepdim=True)
    return torch.where(total > 0, weights/total, 0), total > 0

@windows
@pytest.mark.parametrize('decay', [None, .5])
@pytest.mark.parametrize('documents', [False, True])
def test_spec_02_linear_read_equals_every_pair_under_a_block_mask(window, decay, documents):
    s = MemorySettings(4, window=window, decay=decay)
    for seed in range(5):
        q, k, v, *_ = heads(23, seed=seed)
        document = packed(2, 23, seed) if documents else torch.zeros(2, 23, dtype=torch.int64)
        weights, has = dense(q, k, v, s, document)
        plan = plan_segments(q, s, document if documents else None)
        got, mine = recall(q, k, v, plan, s)[:, :, :23], plan.has.expand(-1, -1, -1, 4, 1).flatten(2, 3)[:, :, :23]
        assert torch.equal(mine.expand(2, 4, 23, 1), has)
        assert_close(got*has, weights@v.repeat_interleave(2, 1), **exact)


@rules
@windows
def test_spec_03_outputs_before_a_change_keep_their_bits(rule, window):
    for document, more in ((None, {}), (packed(2, 18, 3), {}), (None, {'decay': .9}), (None, {'bptt_segments': 2})):
        s = MemorySettings(4, rule, window=window, **more)
        memory, x, noise = make(s, dtype=torch.float32), heads(18, dtype=torch.float32), heads(18, seed=1, dtype=torch.float32)
        for backend in ('naive', 'sdpa', 'blocks'):
            out = memory(*x, document=document, backend=backend)
            for t in range(18):
                other = [torch.cat((a[:, :, :t], 1000*b[:, :, t:]), 2) for a, b in zip(x, noise)]
                assert torch.equal(memory(*other, document=document, backend=backend)[:, :, :t], out[:, :, :t]), (t, backend)


@rules
def test_spec_04_less_than_a_segment_is_plain_attention(rule):
    for T in (1, 7, 8):
        x = heads(T)
        plain = F.scaled_dot_product_attention(x[3], x[4], x[2], is_causal=True, enable_gqa=True)
        assert_close(make(MemorySettings(8, rule))(*x), plain, **exact)
        scaled = make(MemorySettings(8, rule, first_segment='scale'))
        assert_close(scaled(*x), plain*(1-scaled.g.view(1, 4, 1, 1)), **exact)


@rules
@windows
def test_spec_05_a_shut_gate_is_local_and_an_open_one_is_the_memory(rule, window):
    s, x = MemorySettings(4, rule, gate='hard_sigmoid', window=window), heads(18)
    assert torch.equal(make(s, gate=-5.)(*x), local_attention(*x[3:], x[2], segment_len=4, window=window))
    begin = 4*s.lag
    assert_close(make(s, gate=5.)(*x)[:, :, begin:], recall(*x[:3], plan_segments(x[0], s), s)[:, :, begin:18], **exact)


@rules
@windows
def test_spec_06_padding_changes_nothing(rule, window):
    s, x = MemorySettings(4, rule, window=window), heads(14)
    memory, junk = make(s), heads(14, seed=9)
    out, (_, state) = memory(*x), streamed(memory, *x[:3], [14])
    for n in (1, 3, 8, 13):
        padded = [torch.cat((a, 50*b[:, :, :n]), 2) for a, b in zip(x, junk)]
        document = F.pad(torch.zeros(2, 14, dtype=torch.int64), (0, n), value=-1)
        assert_close(memory(*padded, document=document)[:, :, :14], out, **exact)
        assert_close(memory(*padded)[:, :, :14], out, **exact) # padding behind the only document needs no mask
        other = {}
        memory.stream(*(y for y in padded[:3]), still, other, torch.tensor([14, 14]))
        for name in state.keys()-{'k', 'v'}: assert_close(other[name], state[name], **exact)
    for n in (4, 12): # in front: whole segments, or the borders lie elsewhere
        padded = [torch.cat((50*b[:, :, :n], a), 2) for a, b in zip(x, junk)]
        document = F.pad(torch.zeros(2, 14, dtype=torch.int64), (n, 0), value=-1)
        assert_close(memory(*padded, document=document)[:, :, n:], out, **exact)
    for n in (1, 3): # in front, anywhere: as the loop says
        padded = [torch.cat((50*b[:, :, :n], a), 2) for a, b in zip(x, junk)]
        document = F.pad(torch.zeros(2, 14, dtype=torch.int64), (n, 0), value=-1)
        assert_close(memory(*padded, document=document)[:, :, n:], sequential(*padded, memory.g, s, document)[:, :, n:], **exact)


def reads(rule, values, N=3, T=None, **more): # what one head reads, with keys that are all alike, and a value for each segment
    v = torch.tensor(values, dtype=torch.float64).repeat_interleave(N)[None, None, :, None].expand(1, 1, -1, 4)
    q = torch.full_like(v, .3)
    s = MemorySettings(N, rule, **more)
    return recall(q, q, v, plan_segments(q, s), s)[0, 0, ::N, 0]

def test_spec_07_constant_values():
    assert_close(reads('linear', [3.]*8), torch.tensor([0.]+[3.]*7, dtype=torch.float64), **exact)
    assert_close(reads('delta', [3.]*8), torch.tensor([0., 3.]+[1.5]*6, dtype=torch.float64), **exact)


def test_spec_08_delta_with_constant_keys():
    values = [2., -1., 5., 3., 7., -4., 1.]
    golden = lambda n: values[0] if n == 1 else sum((j-1)*values[j-1] for j in range(2, n+1))/(n*(n-1))
    assert_close(reads('delta', values)[1:], torch.tensor([golden(n) for n in range(1, 7)], dtype=torch.float64), **exact)
    assert_close(reads('linear', values)[1:], torch.tensor([sum(values[:n])/n for n in range(1, 7)], dtype=torch.float64), **exact)


@pytest.mark.parametrize('feature_map', FEATURE_MAPS)
def test_spec_09_a_linear_read_lies_between_the_values(feature_map):
    s = MemorySettings(4, feature_map=feature_map, eps=1e-30)
    for seed in range(5):
        q, k, v, *_ = heads(40, B=1, H=2, Hk=2, seed=seed)
        read = recall(3*q, 3*k, v, plan_segments(q, s), s)
        for t in range(4, 40):
            past = v[:, :, :t//4*4]
            assert (read[:, :, t] >= past.amin(2)-1e-9).all() and (read[:, :, t] <= past.amax(2)+1e-9).all()


def test_spec_10_a_read_does_not_depend_on_the_scale_of_the_state():
    q, k, v, *_ = heads(20)
    M, z = segment_sums(elu1(k), v)
    pq = elu1(q[:, ::2])
    for c in (1e-3, 7., 1e6): assert_close(memory_read(pq, c*M, c*z), memory_read(pq, M, z))


@rules
@windows
@pytest.mark.parametrize('more', [{}, {'decay': .8}, {'first_segment': 'scale'}, {'feature_map': 'hedgehog'}], ids=str)
def test_spec_11_pieces_of_any_length_equal_the_whole(rule, window, more):
    N, T = 5, 47
    s = MemorySettings(N, rule, window=window, **more)
    q, k, v, *_ = heads(T)
    memory, places = make(s), torch.arange(T)[None]
    whole = memory(q, k, v, turn(q, places), turn(k, places))
    states = []
    for piece in (1, 7, N, 3*N, T):
        out, state = streamed(memory, q, k, v, [piece]*(T//piece)+[T % piece]*(T % piece > 0), turn)
        assert_close(out, whole, rtol=0, atol=1e-11) # places in the window and in the row: other angles, rounded otherwise
        states.append(state)
    for state in states[1:]:
        seen = T % N + (N if window == 'xl' else 0) # slots beyond hold what is left of older tokens
        for name, x in state.items(): assert_close(x[:, :, :seen] if name in 'kv' else x, states[0][name][:, :, :seen] if name in 'kv' else states[0][name], **exact)


@rules
def test_spec_12_state_is_float32_and_finite_after_2000_segments(rule):
    s, T = MemorySettings(2, rule), 4000
    q, k, v, qr, kr = heads(T, B=1, dtype=torch.bfloat16)
    memory = make(s, dtype=torch.float32)
    memory.watch = True
    with torch.no_grad(), torch.autocast('cpu', torch.bfloat16):
        out = memory(q, 4*k, 10*v, qr, kr)
        pieces, state = streamed(memory, q, 4*k, 10*v, [1000]*3+[999, 1])
        assert {name: state[name].dtype for name in ('M', 'z', 'dM', 'dz')} == dict.fromkeys(('M', 'z', 'dM', 'dz'), torch.float32)
        assert out.dtype == pieces.dtype == torch.bfloat16 and out.isfinite().all() and pieces.isfinite().all()
        assert all(x.isfinite().all() for x in state.values())
        assert memory.stats['state'].dtype == torch.float32
    wide = recall(*(x.double() for x in (q, 4*k, 10*v)), plan_segments(q.double(), s), s)
    assert_close(recall(q, 4*k, 10*v, plan_segments(q, s), s).double(), wide, rtol=0, atol=2e-3*wide.abs().max().item()) # sums of 4,000 in float32
    doubles = {}
    make(s).stream(*(x[:, :, :9].double() for x in (q, k, v)), still, doubles, 9)
    assert doubles['M'].dtype == torch.float64


def test_spec_13_query_heads_read_the_memory_of_their_group():
    s, (q, k, v, *_) = MemorySettings(4), heads(12, B=1, H=8, Hk=2)
    v = torch.stack((torch.zeros_like(v[:, 0]), torch.ones_like(v[:, 1])), 1) # memory 0 holds zeros, memory 1 ones
    read = recall(q, k, v, plan_segments(q, s), s)[0, :, 4:, 0]
    assert_close(read.mean(1), torch.tensor([0.]*4+[1.]*4, dtype=torch.float64))


def test_spec_14_the_gate_is_all_there_is_to_save():
    memory = Memory(4, 2, 6, MemorySettings(4), gate_init=.125)
    assert list(memory.state_dict()) == ['gate'] == [n for n, _ in memory.named_parameters()] and not list(memory.buffers())
    assert memory.gate.dtype == torch.float32 and memory.gate.shape == (4,) and (memory.gate == .125).all()
    with torch.no_grad(): memory.gate.copy_(torch.randn(4, generator=gen()))
    kept, file = memory.gate.clone(), io.BytesIO()
    torch.save(memory.state_dict(), file); file.seek(0)
    other = Memory(4, 2, 6, MemorySettings(4))
    other.load_state_dict(torch.load(file))
    assert torch.equal(other.gate, kept)
    for dtype in (torch.bfloat16, torch.float16): assert torch.equal(other.to(dtype).gate, kept) and other.gate.dtype == torch.float32
    other.reset_parameters()
    assert (other.gate == 0).all()


@rules
def test_spec_15_the_third_segment_teaches_the_first_what_to_write(rule):
    x = [y.requires_grad_() for y in heads(12)]
    out = make(MemorySettings(4, rule))(*x)
    gq, gk, gv = torch.autograd.grad(out[:, :, 8:].square().sum(), x[:3])
    assert (gk[:, :, :4].abs().amax((0, 3)) > 0).all() and (gv[:, :, :4].abs().amax((0, 3)) > 0).all() and not gq[:, :, :8].any()


@rules
@windows
@pytest.mark.parametrize('backend', ['naive', 'sdpa', 'blocks'])
def test_spec_16_documents_at_borders_equal_separate_rows(rule, window, backend):
    s, x = MemorySettings(4, rule, window=window), heads(30)
    memory, document = make(s), torch.tensor([[0]*12 + [1]*4 + [2]*10 + [-1]*4]).expand(2, 30)
    out = memory(*x, document=document, backend=backend)
    for a, b in ((0, 12), (12, 16), (16, 26)): assert_close(out[:, :, a:b], memory(*(y[:, :, a:b] for y in x), backend=backend), **exact)
    assert out.isfinite().all()


@rules
@windows
def test_spec_17_knocked_out_changes_what_comes_after_the_first_segment(rule, window):
    s, x = MemorySettings(4, rule, window=window), heads(18)
    network = torch.nn.ModuleList([make(s), make(s)])
    with pytest.raises(RuntimeError), memory_off(network): # it is put back, whatever happens
        out = network[1](*x)
        raise RuntimeError
    whole = network[1](*x)
    assert torch.equal(out, local_attention(*x[3:], x[2], segment_len=4, window=window))
    assert torch.equal(out[:, :, :4*s.lag], whole[:, :, :4*s.lag]) and (out != whole)[:, :, 4*s.lag:].any(-1).all()
    state = {}
    network[0].on = False
    network[0].stream(*(y[:, :, :9] for y in x[:3]), still, state, 9)
    network[0].on = True # what was read meanwhile was written all the same
    assert_close(network[0].stream(*(y[:, :, 9:] for y in x[:3]), still, state, 9), network[0](*x[:3], *x[:2])[:, :, 9:], **exact)


# The mistakes of public versions

@rules
def test_bug_01_no_transpose_after_the_split_of_heads(rule):
    "Future tokens leak, or tokens are cut off from each other: each output depends on exactly what it should."
    x = [y.requires_grad_() for y in heads(10, B=1)]
    out = make(MemorySettings(4, rule))(*x)
    i, j = torch.arange(10)[:, None], torch.arange(10)[None]
    for t in range(10):
        for h in range(4):
            gv, = torch.autograd.grad(out[0, h, t].sum(), x[2], retain_graph=True)
            moved = gv[0].abs().amax(-1) > 0 # [Hk, T]
            assert torch.equal(moved[h//2], ((i//4 > j//4) | (i//4 == j//4) & (j <= i))[t]) and not moved[1-h//2].any()


@rules
def test_bug_02_rotated_keys_in_memory(rule):
    x, other = heads(12), heads(12, seed=1)
    memory = make(MemorySettings(4, rule, gate='hard_sigmoid'), gate=5.)
    assert torch.equal(memory(*x)[:, :, 4:], memory(*x[:3], *other[3:])[:, :, 4:])
    places = torch.arange(12)[None]
    out, _ = streamed(memory, *x[:3], [5, 1, 6], turn)
    assert_close(out[:, :, 4:], memory(*x)[:, :, 4:], **exact)


@rules
def test_bug_03_written_before_it_is_read(rule):
    x, other = heads(12), heads(12, seed=1)
    memory = make(MemorySettings(4, rule, gate='hard_sigmoid'), gate=5.)
    changed = [x[0], *(torch.cat((a[:, :, :8], b[:, :, 8:]), 2) for a, b in zip(x[1:], other[1:]))] # the last segment's keys and values
    assert torch.equal(memory(*changed)[:, :, 4:], memory(*x)[:, :, 4:])


def test_bug_04_cumsum_minus_x_leaves_a_rest_of_the_future():
    x = torch.randn(1, 1, 6, 3, 3, generator=gen())
    big = x.clone()
    big[:, :, 2] += 1e7
    assert torch.equal(exclusive_prefix(big)[:, :, :3], exclusive_prefix(x)[:, :, :3])
    assert not torch.equal((big.cumsum(2)-big)[:, :, :3], (x.cumsum(2)-x)[:, :, :3]) # the mistake


@rules
def test_bug_05_memory_cut_off_from_the_gradient(rule):
    def taught(n): # segments that the last of six teaches
        x = [y.requires_grad_() for y in heads(24)]
        out = make(MemorySettings(4, rule, bptt_segments=n))(*x)
        gk, gv = torch.autograd.grad(out[:, :, 20:].sum(), (x[1], x[2]))
        return [bool(g.any()) for g in gv.unflatten(2, (6, 4)).unbind(2)]
    assert taught(None) == [True]*6
    assert taught(1) == [False]*4 + [True]*2 # even the shortest leaves the segment before
    assert taught(3) == [False]*3 + [True]*3 and taught(2) == [False]*4 + [True]*2 and taught(5) == [True]*6


def test_bug_06_query_heads_tiled_over_memories():
    "Heads 0-3 belong to memory 0 in every path, as they do in attention."
    s, (q, k, v, *_) = MemorySettings(4), heads(13, B=1, H=8, Hk=2)
    memory = make(s, H=8, gate=0.)
    whole = memory(q, k, v, q, k)
    for h in range(8):
        one = (q[:, h:h+1], k[:, h//4:h//4+1], v[:, h//4:h//4+1])
        assert_close(make(s, H=1, Hk=1, gate=0.)(*one, *one[:2]), whole[:, h:h+1], **exact)
    assert_close(streamed(memory, q, k, v, [1]*6+[7])[0], whole, **exact)


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_bug_07_half_precision_state_stalls_or_overflows(dtype):
    memory, T = make(MemorySettings(64), H=1, Hk=1, dtype=torch.float32), 64*1100
    k = torch.full((1, 1, T, 6), 2., dtype=dtype)
    state = {}
    for x in k.split(64*275, 2): memory.stream(x, x, x, still, state, x.shape[2])
    assert_close(state['z'], torch.full((1, 1, 6), 3.*T)) # bf16 would stop at a half, fp16 at infinity
    assert_close(memory_read(torch.ones(1, 1, 1, 6), state['M'], state['z']), torch.full((1, 1, 1, 6), 2.))


def test_bug_08_elu_plus_one_cancels_or_the_one_is_forgotten():
    x = torch.linspace(-20, 20, 4001, dtype=torch.float64)
    truth = torch.where(x > 0, x+1, x.exp())
    assert_close(elu1(x), truth)
    for dtype, most in ((torch.bfloat16, .01), (torch.float16, .002), (torch.float32, 1e-6)):
        near = x.abs() < 9 # exp(-9) is still a number in fp16
        low = x.to(dtype)
        wanted = torch.where(low.double() > 0, low.double()+1, low.double().exp())
        assert ((elu1(low).double()-wanted)/wanted)[near].abs().max() < most
    assert (F.elu(torch.tensor(-7.).bfloat16())+1).item() == 0 < elu1(torch.tensor(-7.).bfloat16()).item() # the mistake
    assert (elu1(x) > 0).all() and elu1(torch.zeros(1)).item() == 1
    grad = torch.autograd.grad(elu1(x.requires_grad_()).sum(), x)[0]
    assert_close(grad, torch.where(x > 0, 1, x.exp()).detach())


@rules
@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float32])
def test_bug_09_an_epsilon_that_is_zero(rule, dtype):
    "Queries and keys whose features vanish together: 0/0, unless the denominator is held up in float32."
    q, k, v, qr, kr = heads(12, dtype=dtype)
    x = [y.requires_grad_() for y in (q-110, k-110, v)]
    memory = make(MemorySettings(4, rule), dtype=torch.float32)
    out = memory(*x, qr, kr)
    assert out.isfinite().all() and all(g.isfinite().all() for g in torch.autograd.grad(out.float().sum(), (*x, memory.gate)))
    assert streamed(memory, *(y.detach() for y in x), [1, 5, 1, 1, 4])[0].isfinite().all()


@rules
def test_bug_10_padding_zeroes_the_key_and_not_its_features(rule):
    "phi(0) is 1: a padded key of zero would be counted."
    s, (q, k, v, *_) = MemorySettings(4, rule), heads(12)
    document = torch.tensor([[0]*6 + [-1]*6]*2)
    zeroed = [y*real(document) for y in (q, k, v)]
    memory, state, more = make(s), {}, {}
    memory.stream(*zeroed, still, state, torch.tensor([6, 6]))
    memory.stream(*(y[:, :, :6] for y in zeroed), still, more, 6)
    for name in ('M', 'z', 'dM', 'dz', 'length'): assert_close(state[name], more[name], **exact)
    for name, at in (('z', slice(4)), ('dz', slice(4, 6))): assert_close(state[name], elu1(k[:, :, at]).sum(2), **exact)
    memory.stream(*(y[:, :, 6:7] for y in zeroed), still, state, 0) # a row that has ended, while others go on
    assert_close(state['dz'], elu1(k[:, :, 4:6]).sum(2), **exact)
    front = torch.tensor([[-1]*3 + [0]*9]*2)
    zeroed = [y*real(front) for y in (q, k, v)]
    plan = plan_segments(q, s, front)
    read = recall(*zeroed, plan, s)[:, :, 4:8]
    alone = memory_read(elu1(q[:, :, 4:8]), *(x.repeat_interleave(2, 1) for x in segment_sums(elu1(k[:, :, 3:4]), v[:, :, 3:4])))
    assert_close(read, alone, **exact) # one real token in the first segment


def test_bug_11_gate_inverted_saturated_shared_or_cast():
    x = heads(12)
    out = lambda gate: make(MemorySettings(4), gate=gate)(*x)
    s = MemorySettings(4)
    assert_close(out(40.)[:, :, 4:], recall(*x[:3], plan_segments(x[0], s), s)[:, :, 4:], **exact) # large: memory
    assert_close(out(-40.), local_attention(*x[3:], x[2], segment_len=4), **exact)                    # small: local
    one = out([0., 0., 3., 0.])
    assert torch.equal((one != out(0.)).any(-1).any(0)[:, 4:], torch.tensor([0, 0, 1, 0]).bool()[:, None].expand(4, 8)) # a gate for each head
    memory = Memory(4, 2, 6, s).double()
    assert (memory.g == .5).all()
    grad, = torch.autograd.grad(memory(*x)[:, :, 4:].square().sum(), memory.gate)
    assert (grad != 0).all()


@rules
def test_bug_12_memory_shared_between_rows_or_kept_between_batches(rule):
    s, x, other = MemorySettings(4, rule), heads(18), heads(18, seed=1)
    memory = make(s)
    out = memory(*x)
    memory(*other)
    assert torch.equal(memory(*x), out)
    mixed = [torch.stack((a[0], b[1])) for a, b in zip(x, other)]
    assert_close(memory(*mixed)[0], out[0], **exact)
    (_, one), (_, two) = streamed(memory, *x[:3], [7, 1]), streamed(memory, *mixed[:3], [7, 1])
    for name in one: assert_close(one[name][0], two[name][0], **exact)


@rules
@windows
@pytest.mark.parametrize('first_segment', ['local', 'scale'])
def test_bug_13_the_first_segment_differs_between_training_and_generation(rule, window, first_segment):
    s, (q, k, v, *_) = MemorySettings(4, rule, window=window, first_segment=first_segment), heads(11)
    for on in (True, False):
        memory = make(s)
        memory.on = on
        for T in (3, 4, 5, 11):
            x = [y[:, :, :T] for y in (q, k, v)]
            for pieces in ([1]*T, [T]): assert_close(streamed(memory, *x, pieces)[0], memory(*x, *x[:2]), **exact)


def test_bug_14_of_a_long_prompt_only_the_last_segment_is_read():
    s, x = MemorySettings(8), heads(41)
    memory, other = make(s), [y.clone() for y in x]
    for y, n in zip(other, heads(41, seed=1)): y[:, :, :32] = n[:, :, :32]
    a, b = (streamed(memory, *y[:3], [40, 1])[0] for y in (x, other))
    assert (a != b)[:, :, 32:].any(-1).all() # prompt and first new token


@rules
def test_bug_15_generation_sees_across_a_border_and_training_does_not(rule):
    s, (q, k, v, *_) = MemorySettings(4, rule), heads(14)
    memory = make(s)
    with memory_off(memory):
        for pieces in ([1]*14, [6, 1, 7], [5]*2+[4]): assert_close(streamed(memory, q, k, v, pieces)[0], local_attention(q, k, v, segment_len=4), **exact)
        other = [torch.cat((n[:, :, :8], y[:, :, 8:]), 2) for y, n in zip((q, k, v), heads(14, seed=1))]
        assert_close(streamed(memory, *other, [1]*14)[0][:, :, 8:], streamed(memory, q, k, v, [1]*14)[0][:, :, 8:], **exact)


@rules
@windows
def test_bug_16_memory_saved_with_the_weights_or_never_reset(rule, window):
    memory, (q, k, v, *_) = make(MemorySettings(4, rule, window=window)), heads(13, B=3)
    before = copy.deepcopy(memory.state_dict())
    _, state = streamed(memory, q, k, v, [13])
    assert list(memory.state_dict()) == ['gate'] and torch.equal(memory.gate, before['gate'])
    reset_rows(state, torch.tensor([1]))
    assert state['length'].tolist() == [13, 0, 13]
    out, _ = streamed(memory, q, k, v, [9, 1], state=state)
    assert_close(out[1], memory(q, k, v, q, k)[1, :, :10], **exact)                       # begins anew
    twice = [torch.cat((y, y[:, :, :10]), 2) for y in (q, k, v)]
    assert_close(out[[0, 2]], memory(*twice, *twice[:2])[[0, 2], :, 13:], **exact)    # go on


@rules
def test_bug_17_z_begins_with_ones(rule):
    assert reads(rule, [3., 5.])[1].item() == pytest.approx(3., abs=1e-12)
    state = {}
    memory = make(MemorySettings(4, rule))
    q, k, v, *_ = heads(3)
    memory.stream(q, k, v, still, state, 3)
    assert not state['M'].any() and not state['z'].any() # nothing is committed yet
    assert_close(state['dz'], elu1(k).sum(2), **exact)


def test_bug_18_a_short_first_segment():
    "The remainder comes last. Where a document begins late in a segment, delta overshoots as its formula says; linear gives the mean."
    for rule in ('linear', 'delta'):
        s, x = MemorySettings(4, rule), heads(15)
        memory = make(s)
        assert_close(memory(*(y[:, :, :12] for y in x)), memory(*x)[:, :, :12], **exact) # what comes behind moves no border
        n1, (v1, v2) = 1, (3., 5.)
        v = torch.tensor([0.]*3 + [v1] + [v2]*4 + [0.]*4, dtype=torch.float64)[None, None, :, None].expand(1, 1, -1, 4)
        q, document = torch.full_like(v, .3), torch.tensor([[-1]*3 + [0]*9])
        read = recall(q, q, v, plan_segments(q, s, document), s)[0, 0, 8, 0].item()
        golden = (n1*v1 + 4*v2)/5 if rule == 'linear' else (n1*v1 + 4*(v2-v1))/5
        assert read == pytest.approx(golden, abs=1e-12)


@rules
def test_bug_19_tests_of_shapes_alone(rule):
    "The numbers of the paper's equations, with nothing but Python's floats: 2 heads on 1 memory, segments of 2, 5 tokens, 2 channels."
    q, k, v, qr, kr = heads(5, B=1, H=2, Hk=1, D=2, seed=3)
    memory = make(MemorySettings(2, rule), H=2, Hk=1, D=2, gate=[.4, -.8])
    out = memory(q, k, v, qr, kr)[0]
    phi = lambda x: [c+1 if c > 0 else math.exp(c) for c in x]
    dot = lambda a, b: sum(i*j for i, j in zip(a, b))
    Q, K, V, QR, KR = (y[0].tolist() for y in (q, k, v, qr, kr))
    K, V, KR = K[0], V[0], KR[0]
    M, z = [[0., 0.], [0., 0.]], [0., 0.]
    reading = lambda f: [dot(f, [M[0][c], M[1][c]])/dot(f, z) for c in (0, 1)] if any(z) else [0., 0.]
    for begin in (0, 2, 4):
        tokens = range(begin, min(begin+2, 5))
        for h, beta in ((0, .4), (1, -.8)):
            for t in tokens:
                e = [math.exp(dot(QR[h][t], KR[j])/2**.5) for j in range(begin, t+1)]
                local = [sum(w*V[begin+i][c] for i, w in enumerate(e))/sum(e) for c in (0, 1)]
                gate = 1/(1+math.exp(-beta)) if begin else 0.
                mixed = [gate*r + (1-gate)*l for r, l in zip(reading(phi(Q[h][t])), local)]
                assert out[h, t].tolist() == pytest.approx(mixed, abs=1e-6) # the gates are float32 numbers
        adds = []
        for t in tokens:
            f, known = phi(K[t]), reading(phi(K[t])) if rule == 'delta' else [0., 0.]
            adds.append((f, [V[t][c]-known[c] for c in (0, 1)]))
        for f, new in adds:
            for a in (0, 1):
                z[a] += f[a]
                for c in (0, 1): M[a][c] += f[a]*new[c]


# Documents anywhere

@settings(max_examples=60, deadline=None)
@given(st.data())
def test_documents_anywhere_equal_the_loop_and_separate_rows(data):
    N, T = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 30))
    rule, window, decay = data.draw(st.sampled_from(['linear', 'delta'])), data.draw(st.sampled_from(['block', 'xl'])), data.draw(st.sampled_from([None, .6]))
    s, seed = MemorySettings(N, rule, window=window, decay=decay), data.draw(st.integers(0, 99))
    x, memory, document = heads(T, seed=seed), make(s), packed(2, T, seed, data.draw(st.sampled_from([.05, .2, .5])))
    out = memory(*x, document=document)
    assert out.isfinite().all()
    assert_close(out*real(document), sequential(*x, memory.g, s, document)*real(document), **exact)
    for b in range(2):
        for d in document[b].unique().tolist():
            at = (document[b] == d).nonzero().flatten()
            if d < 0 or at[0] % N: continue # begins on the grid: its borders are those that it has alone
            alone = memory(*(y[b:b+1, :, at] for y in x))
            assert_close(out[b:b+1, :, at], alone, **exact)


def test_a_document_of_one_segment_never_feels_a_memory():
    x, s = heads(12), MemorySettings(4)
    document = torch.arange(3).repeat_interleave(4).expand(2, 12)
    assert torch.equal(make(s)(*x, document=document), local_attention(*x[3:], x[2], segment_len=4, document=document))


# Local attention

@pytest.mark.parametrize('backend', [b for b in ENGINES if not why_not(b, 'cpu', torch.float32)])
def test_local_attention_on_every_engine(backend):
    for T in (5, 16, 23):
        for document in (None, packed(2, T, T)):
            q, k, v = heads(T, dtype=torch.float32)[:3]
            back = torch.arange(T)[:, None]//8 == torch.arange(T)[None]//8
            wanted = naive(q, k, v, visible(T, True, document) & back)
            got = local_attention(q, k, v, segment_len=8, document=document, backend=backend)
            assert_close(got, wanted, rtol=1e-4, atol=1e-5)


def test_xl_window_is_the_segment_and_the_one_before():
    for T in (5, 16, 23, 40):
        for document in (None, packed(2, T, T)):
            q, k, v = heads(T)[:3]
            back = torch.arange(T)[:, None]//8 - torch.arange(T)[None]//8
            assert_close(local_attention(q, k, v, segment_len=8, window='xl', document=document), naive(q, k, v, visible(T, True, document) & (back < 2)), **exact)


@windows
def test_local_attention_streams(window):
    q, k, v = heads(29)[:3]
    whole = local_attention(q, k, v, segment_len=4, window=window)
    for pieces in ([1]*29, [29], [3, 1, 1, 9, 8, 1, 6]):
        state, out, at = {}, [], 0
        for t in pieces:
            out.append(stream_local(*(y[:, :, at:at+t] for y in (q, k, v)), still, state, torch.tensor([t, t]), segment_len=4, window=window))
            at += t
        assert_close(torch.cat(out, 2), whole, **exact)


# Rows that go on

@settings(max_examples=60, deadline=None)
@given(st.data())
def test_rows_of_different_lengths_stream_as_they_would_alone(data):
    N, B, T = data.draw(st.integers(1, 6)), 3, 30
    s = MemorySettings(N, data.draw(st.sampled_from(['linear', 'delta'])), window=data.draw(st.sampled_from(['block', 'xl'])), decay=data.draw(st.sampled_from([None, .7])))
    x, memory = heads(T, B=B)[:3], make(s)
    places = torch.arange(T)[None]
    whole, state, at = memory(*x, *(turn(y, places) for y in x[:2])), {}, [0]*B
    while max(at) < T:
        t = data.draw(st.integers(1, min(9, T-max(at))))
        counts = [data.draw(st.integers(0, t)) for _ in range(B)] if data.draw(st.booleans()) else [t]*B
        piece = [torch.stack([F.pad(y[b, :, at[b]:at[b]+counts[b]], (0, 0, 0, t-counts[b]), value=7.) for b in range(B)]) for y in x]
        out = memory.stream(*piece, turn, state, torch.tensor(counts))
        assert out.isfinite().all()
        for b in range(B):
            assert_close(out[b, :, :counts[b]], whole[b, :, at[b]:at[b]+counts[b]], rtol=0, atol=1e-11)
            at[b] += counts[b]
        if t == 0 or not any(counts) and data.draw(st.booleans()): break
    assert state['length'].tolist() == at


@rules
@windows
def test_ten_thousand_tokens_in_a_state_of_one_size(rule, window):
    s, T = MemorySettings(64, rule, window=window), 10_000
    q, k, v, qr, kr = heads(T, B=1, H=2, Hk=1, D=8, dtype=torch.float32)
    memory, state, sizes = make(s, H=2, Hk=1, D=8, dtype=torch.float32), {}, set()
    with torch.no_grad():
        whole, out, at = memory(q, k, v, q, k), [], 0
        while at < T:
            t = 1 if at % 1000 < 150 else min(425, T-at) # some of it token by token, the rest in longer pieces
            out.append(memory.stream(*(y[:, :, at:at+t] for y in (q, k, v)), still, state, t))
            sizes.add(sum(x.nbytes for x in state.values()))
            at += t
    assert sizes == {state_bytes(s, 1, 8)}
    assert_close(torch.cat(out, 2), whole, rtol=0, atol=2e-4) # float32, sums in another order


@rules
def test_a_state_is_copied_branched_and_saved(rule):
    memory, x = make(MemorySettings(4, rule, window='xl')), heads(20)[:3]
    _, state = streamed(memory, *x, [11])
    go_on = lambda state: streamed(memory, *(y[:, :, 11:] for y in x), [1, 1, 7], state=state)[0]
    file = io.BytesIO()
    torch.save(state, file); file.seek(0)
    branch, deep, saved = dict(state), copy.deepcopy(state), torch.load(file)
    out = go_on(state)
    for other in (branch, deep, saved): assert torch.equal(go_on(other), out)


@windows
def test_streams_with_our_rotation_and_in_bf16(window):
    "As the stack does it: angles from the table, places in the window only; bf16 products, the cache in float32 on a CPU."
    s, T = MemorySettings(8, window=window), 60
    q, k, v, *_ = heads(T, dtype=torch.float32, D=8)
    memory = make(s, D=8, dtype=torch.float32)
    turned = lambda x, places: rotate(x, *rotation(places, 64, 8, 10000., x.dtype))
    for dtype, most in ((torch.float32, 1e-5), (torch.bfloat16, .05)):
        x = [y.to(dtype) for y in (q, k, v)]
        with torch.no_grad(), torch.autocast('cpu', torch.bfloat16, enabled=dtype == torch.bfloat16):
            whole = memory(*x, *(turned(y, torch.arange(T)[None]) for y in x[:2]))
            for pieces in ([1]*T, [33, 1, 26]):
                out, state = streamed(memory, *x, pieces, turned)
                assert out.dtype == dtype and (out.float()-whole.float()).abs().max() < most
                assert state['k'].dtype == torch.float32


# The rest

def test_settings_say_all_that_is_wrong():
    with pytest.raises(ConfigError, match='rule.*segment_len.*decay.*bptt_segments.*eps'): MemorySettings(0, 'x', decay=-1., bptt_segments=0, eps=0.)
    for gate in GATES: assert Memory(2, 1, 4, MemorySettings(4, gate=gate)).g.shape == (2,)


@rules
def test_recompute_changes_no_bit(rule):
    def grads(recompute):
        x, memory = [y.requires_grad_() for y in heads(18)], make(MemorySettings(4, rule, recompute=recompute))
        return torch.autograd.grad(memory(*x).square().sum(), (*x, memory.gate))
    assert all(map(torch.equal, grads(True), grads(False)))


@rules
@windows
def test_a_plan_for_all_layers_changes_no_bit(rule, window):
    s, x, document = MemorySettings(4, rule, window=window), heads(18), packed(2, 18, 0)
    memory = make(s)
    for backend in ('naive', 'sdpa', 'blocks'):
        plan = plan_segments(x[3], s, document, backend)
        assert torch.equal(memory(*x, plan=plan, backend=backend), memory(*x, document=document, backend=backend))


@rules
def test_what_is_watched(rule):
    s, x, document = MemorySettings(4, rule), heads(18), packed(2, 18, 1, .05)
    memory = make(s)
    memory(*x)
    assert memory.stats == {}
    memory.watch = True
    memory(*x, document=document)
    stats = memory.stats
    assert {n: tuple(y.shape) for n, y in stats.items()} == {'gate': (4,), 'read': (4,), 'denominator': (), 'state': (2,)}
    assert all(y.isfinite().all() and not y.requires_grad for y in stats.values()) and stats['denominator'] > 0
    read, local = recall(*x[:3], plan_segments(x[0], s, document), s)[:, :, :18], local_attention(*x[3:], x[2], segment_len=4, document=document)
    has = plan_segments(x[0], s, document).has.flatten(2, 3)[:, :, :18].expand(2, 4, 18, 1)
    for h in range(4): assert_close(stats['read'][h], (read[:, h]*has[:, h]).norm()/(local[:, h]*has[:, h]).norm())


@rules
@windows
def test_on_the_meta_device(rule, window):
    memory = Memory(4, 2, 6, MemorySettings(4, rule, window=window)).to('meta')
    x = [y.to('meta') for y in heads(18, dtype=torch.float32)]
    assert memory(*x).shape == (2, 4, 18, 6)
