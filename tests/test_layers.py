"Layers: the functions that keep less for the backward pass equal the formulas, in every format."
import pytest, torch, torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from torch.testing import assert_close
from llmlab.models.layers import MLP, Conv3, Norm, compute_dtype, positions_of, rms_norm, rotate, rotation, swiglu


pytestmark = pytest.mark.usefixtures('one_thread')


def gen(seed=0): return torch.Generator().manual_seed(seed)
def grads(f, *xs):
    xs = [x.detach().clone().requires_grad_() for x in xs]
    y = f(*xs)
    return y.detach(), torch.autograd.grad(y, xs, torch.linspace(-1, 1, y.numel()).view_as(y).to(y.dtype))


plain_rms = lambda x, w: F.rms_norm(x, w.shape, w, 1e-6)
def plain_rotate(x):
    cos, sin = (c[..., :x.shape[-1]//2]*s for c, s in zip(rotation(torch.arange(x.shape[2])[None], x.shape[2], x.shape[-1], dtype=x.dtype), (1, -1)))
    a, b = x.chunk(2, -1)
    return torch.cat((a*cos-b*sin, b*cos+a*sin), -1)
our_rotate = lambda x: rotate(x, *rotation(torch.arange(x.shape[2])[None], x.shape[2], x.shape[-1], dtype=x.dtype))
plain_swiglu = lambda x: F.silu(x.chunk(2, -1)[0])*x.chunk(2, -1)[1]


@pytest.mark.parametrize('dtype', [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_equal_to_the_formulas(dtype):
    g = gen()
    x, w = torch.randn(3, 4, 6, 16, generator=g).to(dtype), torch.rand(16, generator=g).to(dtype)+.5
    for ours, plain, args in ((rms_norm, plain_rms, (x, w)), (our_rotate, plain_rotate, (x,)), (swiglu, plain_swiglu, (x,))):
        (y, gs), (wanted, wgs) = grads(ours, *args), grads(plain, *(a.double() for a in args))
        # one rounding of the result and of a few terms on the way
        tol = dict(rtol=1e-9, atol=1e-9) if dtype == torch.float64 else dict(rtol=8*torch.finfo(dtype).eps, atol=8*torch.finfo(dtype).eps*wanted.abs().max().item())
        assert y.dtype == dtype
        assert_close(y.double(), wanted, **tol)
        for a, b in zip(gs, wgs): assert_close(a.double(), b, rtol=tol['rtol'], atol=max(tol['atol'], tol['rtol']*b.abs().max().item()))


def test_autocast_gives_the_format_of_the_products():
    with torch.autocast('cpu', torch.bfloat16):
        assert compute_dtype(torch.ones(1)) == torch.bfloat16
        for kind in ('rmsnorm', 'layernorm'): assert Norm(8, kind)(torch.ones(2, 8)).dtype == torch.bfloat16
        assert MLP(8, 16)(torch.ones(2, 8)).dtype == torch.bfloat16
        x = torch.randn(2, 8, requires_grad=True)
        Norm(8)(x).float().sum().backward()
        assert x.grad.dtype == torch.float32


def test_rms_norm_of_zero_is_zero():
    y, (dx, dw) = grads(rms_norm, torch.zeros(2, 4), torch.ones(4))
    assert y.eq(0).all() and dx.isfinite().all() and dw.eq(0).all()


rows = st.lists(st.lists(st.integers(1, 5), min_size=1, max_size=4), min_size=1, max_size=3)

@settings(max_examples=60, deadline=None)
@given(rows, st.integers(0, 3))
def test_positions_restart_with_each_document(lengths, padding):
    T = max(map(sum, lengths))+padding
    document = torch.full((len(lengths), T), -1)
    wanted = torch.zeros(len(lengths), T, dtype=torch.int64)
    for b, row in enumerate(lengths):
        start = 0
        for n, size in enumerate([*row, T-sum(row)]):
            if n < len(row): document[b, start:start+size] = n
            wanted[b, start:start+size] = torch.arange(size)
            start += size
    assert torch.equal(positions_of(document), wanted)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 40), st.integers(0, 40), st.integers(0, 40))
def test_rotation_depends_on_the_distance(i, j, shift):
    q, k = torch.randn(2, 1, 1, 1, 16, generator=gen(i*41+j), dtype=torch.float64)
    at = lambda p: rotation(torch.tensor([[p]]), 128, 16, dtype=torch.float64)
    score = lambda a, b: (rotate(q, *at(a))*rotate(k, *at(b))).sum()
    # the table is made of fp32 angles; at positions up to 80 they are right to about 80 * 2^-24
    assert_close(score(i, j), score(i+shift, j+shift), rtol=0, atol=3e-4)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 4), min_size=1, max_size=4), st.booleans(), st.integers(0, 99))
def test_convolution_sees_its_document_only(lengths, causal, seed):
    g, T = gen(seed), sum(lengths)
    document = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))[None]
    mix, x = Conv3(3), torch.randn(1, T, 3, generator=g)
    mix.weight.data = torch.randn(3, 1, 3, generator=g)
    alone = torch.cat([mix(part, causal=causal) for part in x.split(lengths, 1)], 1)
    assert_close(mix(x, positions_of(document), causal), alone)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 6), st.integers(1, 6), st.integers(0, 99))
def test_convolution_goes_on(first, second, seed):
    g = gen(seed)
    mix, x = Conv3(2), torch.randn(2, first+second, 2, generator=g)
    mix.weight.data = torch.randn(2, 1, 3, generator=g)
    before = torch.cat((torch.zeros(2, 2, 2), x[:, :first]), 1)
    assert_close(torch.cat((mix(x[:, :first]), mix(x[:, first:], tail=before[:, -2:])), 1), mix(x))
