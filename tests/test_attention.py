"Attention: every engine equals the reference, forward and backward; documents do not touch; nothing is ever not a number."
import sys, types
import pytest, torch
from hypothesis import given, settings, strategies as st
from torch.testing import assert_close
from llmlab.files import ConfigError
from llmlab.models import attention
from llmlab.models.attention import BLOCK, ENGINES, attend, attend_cached, backend_for, choose_backend, naive, segments, visible, why_not


pytestmark = pytest.mark.usefixtures('one_thread')


def gen(seed=0): return torch.Generator().manual_seed(seed)
def heads(B, H, T, D, g, dtype=torch.float32): return torch.randn(B, H, T, D, generator=g).to(dtype)

def packed(B, T, g): # rows of some documents, some with padding behind them
    cuts = torch.rand(B, T, generator=g).lt(.1).long().cumsum(1)
    padding = torch.arange(T)[None] >= torch.randint(T//2, T+1, (B, 1), generator=g)
    return cuts.masked_fill(padding, -1)

def both(backend, q, k, v, up, **kw):
    qkv = [x.detach().requires_grad_() for x in (q, k, v)]
    out = attend(*qkv, backend=backend, **kw)
    return out.detach(), torch.autograd.grad(out, qkv, up)


here = [b for b in ENGINES if b != 'naive' and not why_not(b, 'cpu', torch.float32)]

def test_what_works_on_a_cpu(): assert {'sdpa', 'blocks'} <= set(here) and 'flash' not in here


@pytest.mark.parametrize('T', [1, 7, BLOCK, 2*BLOCK+5])
@pytest.mark.parametrize('backend', here)
def test_engines_equal_the_reference(backend, T):
    g = gen(T)
    for H, Hk in ((4, 4), (4, 2), (4, 1)):
        q, k, v, up = heads(3, H, T, 8, g), heads(3, Hk, T, 8, g), heads(3, Hk, T, 8, g), heads(3, H, T, 8, g)
        for causal in (True, False):
            for document in (None, packed(3, T, g)):
                (out, gs), (wanted, wgs) = (both(b, q, k, v, up, causal=causal, document=document) for b in (backend, 'naive'))
                assert_close(out, wanted, rtol=1e-4, atol=1e-5)
                for a, b in zip(gs, wgs): assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('backend', here)
def test_bf16_is_as_near_as_bf16_can_be(backend):
    g = gen()
    q, k, v, up = (heads(2, 4, 200, 16, g, torch.bfloat16) for _ in range(4))
    document = packed(2, 200, g)
    (out, gs), (wanted, wgs) = both(backend, q, k, v, up, document=document), both('naive', *(x.double() for x in (q, k, v, up)), document=document)
    for a, b in ((out, wanted), *zip(gs, wgs)):
        assert a.dtype == torch.bfloat16
        assert (a.double()-b).norm() < 1e-2*b.norm() # eps of bf16 is 0.8e-2; rounded scores, weights and result


@pytest.mark.parametrize('backend', ['naive', *here])
def test_strided_views_serve(backend):
    "Heads as they come from the product of queries, keys and values: a transposed part of a larger tensor."
    g = gen()
    qkv = torch.randn(2, 40, 8, 8, generator=g)
    q, k, v = (x.transpose(1, 2) for x in qkv.split((4, 2, 2), 2))
    assert_close(attend(q, k, v, backend=backend), naive(*(x.contiguous() for x in (q, k, v)), visible(40)))


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=5), st.integers(0, 20), st.booleans(), st.sampled_from(here), st.integers(0, 99))
def test_documents_do_not_touch(lengths, padding, causal, backend, seed):
    g, T = gen(seed), sum(lengths)+padding
    document = torch.cat([torch.full((n,), i) for i, n in enumerate(lengths)] + [torch.full((padding,), -1)])[None]
    q, k, v = heads(1, 2, T, 4, g), heads(1, 1, T, 4, g), heads(1, 1, T, 4, g)
    out = attend(q, k, v, causal=causal, document=document, backend=backend)
    assert out.isfinite().all()
    start = 0
    for n in lengths:
        part = slice(start, start+n)
        assert_close(out[:, :, part], naive(*(x[:, :, part] for x in (q, k, v)), visible(n, causal)), rtol=1e-4, atol=1e-5)
        start += n
    if padding: # what padding holds reaches nobody else
        k2, v2 = k.clone(), v.clone()
        k2[:, :, -padding:], v2[:, :, -padding:] = 7., -9.
        assert torch.equal(out[:, :, :-padding], attend(q, k2, v2, causal=causal, document=document, backend=backend)[:, :, :-padding])


def test_huge_scores_stay_numbers():
    q = torch.full((1, 1, 6, 4), 1e4)
    document = torch.tensor([[0, 0, 1, 1, -1, -1]])
    for backend in ('naive', *here): assert attend(q, -q, q, document=document, backend=backend).isfinite().all()


# The kernels for GPUs, with the reference in their place: what is tested is how the rows are cut into segments and put back.
def in_line(q, k, v, starts, ends, most_q, most_k, causal):
    assert starts.dtype == torch.int32 and starts[0] == 0 and starts[-1] == len(q) and (starts.diff() > 0).all() and starts.diff().max() <= most_q
    part = lambda x, a, b: x[a:b].transpose(0, 1)[None]
    return torch.cat([naive(part(q, a, b), part(k, a, b), part(v, a, b), visible(int(b-a), causal))[0].transpose(0, 1) for a, b in zip(starts, starts[1:])])

@pytest.fixture(params=['varlen', 'flash'])
def kernel(request, monkeypatch):
    if request.param == 'varlen':
        module = types.ModuleType('torch.nn.attention.varlen')
        def varlen_attn(q, k, v, a, b, m, n, *, window_size=(-1, -1), enable_gqa=False):
            assert enable_gqa == (q.shape[1] != k.shape[1])
            return in_line(q, k, v, a, b, m, n, window_size == (-1, 0))
        module.varlen_attn = varlen_attn
    else:
        module = types.ModuleType('flash_attn')
        module.flash_attn_varlen_func = in_line_flash
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return request.param

def in_line_flash(q, k, v, a, b, m, n, causal=False): return in_line(q, k, v, a, b, m, n, causal)

def test_segments(kernel):
    g = gen()
    q, k, v, up = heads(3, 4, 30, 8, g), heads(3, 2, 30, 8, g), heads(3, 2, 30, 8, g), heads(3, 4, 30, 8, g)
    for causal in (True, False):
        for document in (None, packed(3, 30, g)):
            (out, gs), (wanted, wgs) = (both(b, q, k, v, up, causal=causal, document=document) for b in (kernel, 'naive'))
            assert_close(out, wanted)
            for a, b in zip(gs, wgs): assert_close(a, b)


def test_neighbouring_rows_are_apart():
    "The last document of a row and the first of the next may have the same number."
    document = torch.tensor([[0, 1, 1], [1, 1, 1], [-1, -1, -1]])
    assert segments(3, 3, True, document, document.float()).tolist() == [0, 1, 3, 6, 9]


@pytest.mark.filterwarnings('ignore')
def test_flex_forward():
    g = gen()
    q, k, v = heads(2, 4, 40, 16, g), heads(2, 2, 40, 16, g), heads(2, 2, 40, 16, g)
    from torch.nn.attention.flex_attention import flex_attention
    for causal in (True, False):
        for document in (None, packed(2, 40, g)):
            plan = attention._flex_plan(2, 40, causal, document, q)
            assert_close(flex_attention(q, k, v, block_mask=plan, enable_gqa=True), naive(q, k, v, visible(40, causal, document)), rtol=1e-4, atol=1e-5)


class TestChoice:
    def test_auto(self):
        assert choose_backend(num_tokens=64) == 'blocks' and choose_backend(num_tokens=5000) == 'sdpa'
        said = []
        choose_backend(say=said.append)
        assert said == ['Attention: blocks (the fastest that works on cpu).']

    def test_forced_and_impossible(self):
        for backend in ('flex', 'varlen', 'flash'):
            with pytest.raises(ConfigError, match=f'model.backend is {backend}, but it does not work on cpu'): choose_backend(backend)

    def test_a_wrong_engine_is_passed_over(self, monkeypatch):
        monkeypatch.setitem(ENGINES, 'blocks', ENGINES['blocks']._replace(run=lambda q, k, v, causal, plan: naive(q, k, v)))
        backend_for.cache_clear(); why_not.cache_clear()
        said = []
        try: assert choose_backend(say=said.append) == 'sdpa'
        finally: backend_for.cache_clear(); why_not.cache_clear()
        assert said == ['Attention: sdpa (the fastest that works on cpu; not blocks: its result is not that of the reference).']

    def test_a_wrong_gradient_is_found(self, monkeypatch):
        run = lambda q, k, v, causal, plan: naive(q, k.detach()*2-k, v, plan)
        monkeypatch.setitem(ENGINES, 'odd', attention.Engine(attention._seen, run))
        assert why_not('odd', 'cpu', torch.float32) == 'its gradient is not that of the reference'

    def test_every_format(self):
        for dtype in (torch.float64, torch.float32, torch.bfloat16):
            for backend in ('naive', 'sdpa', 'blocks'): assert not why_not(backend, 'cpu', dtype)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(0, 6), min_size=1, max_size=4), st.integers(1, 5), st.integers(0, 99))
def test_cache_of_rows_of_any_length(lengths, new, seed):
    g, B, S = gen(seed), len(lengths), max(lengths)+new
    q, k, v = heads(B, 4, S, 8, g), heads(B, 2, S, 8, g), heads(B, 2, S, 8, g)
    take = torch.tensor(lengths)[:, None] + torch.arange(new)
    out = attend_cached(torch.stack([q[b, :, t] for b, t in enumerate(take)]), k, v, take)
    whole = naive(q, k, v, visible(S))
    assert_close(out, torch.stack([whole[b, :, t] for b, t in enumerate(take)]), rtol=1e-4, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_engines_of_a_gpu(dtype):
    if not torch.cuda.is_available(): pytest.skip('no GPU')
    found = {b: why_not(b, 'cuda', dtype) for b in ENGINES}
    assert not found['sdpa'] and not found['naive'], found
    print(found, choose_backend('auto', 'cuda', dtype))
