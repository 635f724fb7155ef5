"The stack: causality, documents, caches, seeds, compiling, recomputing, counting."
import itertools
import pytest, torch
from hypothesis import given, settings, strategies as st
from torch.testing import assert_close
from llmlab.files import ConfigError
from llmlab.models.attention import naive, visible
from llmlab.models.transformer import Shape, build, count_parameters, flops_per_token


pytestmark = pytest.mark.usefixtures('one_thread')


base = dict(vocab_size=40, seq_len=24, d_model=32, num_layers=2, num_heads=4, num_kv_heads=2, d_ff=48)
kinds = {
    'default': {}, 'llama': dict(qk_norm=False, num_kv_heads=4), 'conv': dict(token_mix='conv3'), 'untied': dict(tie_embeddings=False, num_kv_heads=1),
    'old': dict(norm='layernorm', mlp='gelu', position='learned', qk_norm=False), 'bare': dict(mlp='relu2', position='none'),
}
def shape(kind='default', **k): return Shape(**{**base, **kinds[kind], **k})
def network(kind='default', backend='auto', **k):
    net = build(shape(kind, **k), backend, seed=1)
    if (mix := net.blocks[0].mix) is not None: mix.weight.data += torch.randn(mix.weight.shape, generator=gen(5))
    return net.requires_grad_(True)
def gen(seed=0): return torch.Generator().manual_seed(seed)
def tokens(B=2, T=24, seed=0): return torch.randint(base['vocab_size'], (B, T), generator=gen(seed))
every = pytest.mark.parametrize('kind', kinds)


@every
def test_counts(kind):
    s = shape(kind)
    assert count_parameters(s) == sum(p.numel() for p in build(s, device='meta').parameters())


@every
def test_flops_are_those_that_torch_counts(kind):
    from torch.utils.flop_counter import FlopCounterMode
    s = shape(kind, seq_len=20)
    net = build(s, 'naive', device='meta')
    with FlopCounterMode(display=False) as forward: y = net(torch.zeros(3, 20, dtype=torch.int64, device='meta'))
    with FlopCounterMode(display=False) as backward: y.sum().backward()
    assert 3*forward.get_total_flops() == forward.get_total_flops()+backward.get_total_flops() == flops_per_token(s)*60


@every
def test_nobody_looks_ahead(kind):
    net, x = network(kind), tokens()
    with torch.no_grad():
        y = net(x)
        for t in (1, 7, 23):
            z = x.clone()
            z[:, t:] = tokens(seed=9)[:, t:]
            assert torch.equal(net(z)[:, :t], y[:, :t])


@every
@pytest.mark.parametrize('causal', [True, False])
@pytest.mark.parametrize('backend', ['naive', 'sdpa', 'blocks'])
def test_a_document_is_read_as_if_alone(kind, causal, backend):
    net, x = network(kind, backend), tokens()
    document = torch.tensor([[0]*5+[1]*8+[2]+[3]*6+[-1]*4, [0]*20+[1]*4])
    with torch.no_grad():
        y = net(x, document=document, causal=causal)
        assert y.isfinite().all()
        for b, row in enumerate(document):
            for d in row.unique():
                if d < 0: continue
                part = row == d
                assert_close(y[b, part][None], net(x[b, part][None], causal=causal), rtol=1e-4, atol=1e-5)


def test_one_document_and_padding():
    net, x = network('conv'), tokens()
    document = torch.tensor([[0]*24, [0]*15+[-1]*9])
    with torch.no_grad():
        for causal in (True, False):
            a, b = (net(x, document=document, causal=causal, one_document=one) for one in (True, False))
            assert_close(a[document >= 0], b[document >= 0], rtol=1e-4, atol=1e-5)
            z = x.clone()
            z[1, 15:] = 0 # what padding holds reaches nobody
            assert_close(net(z, document=document, causal=causal, one_document=True)[document >= 0], a[document >= 0], rtol=1e-4, atol=1e-5)


def test_without_isolation_documents_see_each_other():
    x, document = tokens(), torch.tensor([[0]*9+[1]*11+[-1]*4]*2)
    apart, together = network(), network(isolate_documents=False)
    with torch.no_grad():
        assert_close(together(x, document=document), together(x))
        assert (apart(x, document=document)[:, 9:20]-together(x, document=document)[:, 9:20]).abs().max() > 1e-3
        both = together(x, document=document, causal=False)
        assert_close(both[:, :20], together(x[:, :20], causal=False), rtol=1e-4, atol=1e-5) # padding stays outside


@every
@settings(max_examples=12, deadline=None)
@given(st.lists(st.lists(st.integers(1, 5), min_size=2, max_size=2), min_size=1, max_size=4), st.integers(0, 99))
def test_a_cache_changes_nothing(kind, pieces, seed):
    "Two rows that come in ragged pieces: the scores are those of the whole rows."
    net, x = network(kind), tokens(2, 24, seed)
    cache, read = net.new_cache(2, 24), [0, 0]
    with torch.no_grad():
        whole = net(x)
        for counts in pieces:
            T = max(counts)
            document = torch.tensor([[0]*n+[-1]*(T-n) for n in counts])
            part = torch.tensor([[*x[b, read[b]:read[b]+n].tolist(), *[3]*(T-n)] for b, n in enumerate(counts)])
            y = net(part, document=document, cache=cache)
            assert y.isfinite().all()
            for b, n in enumerate(counts):
                assert_close(y[b, :n], whole[b, read[b]:read[b]+n], rtol=1e-4, atol=1e-5)
                read[b] += n
            assert cache.lengths.tolist() == read


def test_the_whole_stack_against_a_plain_one():
    "Everything written out once more, for the default kind."
    import torch.nn.functional as F
    net, x = network(), tokens()
    s, h = net.shape, net.embed(x)
    angle = torch.arange(24)[:, None]*s.rope_theta**(-torch.arange(0, 8, 2)/8)
    def turn(z):
        a, b = z[..., :4], z[..., 4:]
        return torch.cat((a*angle.cos()-b*angle.sin(), b*angle.cos()+a*angle.sin()), -1)
    norm = lambda z, w: z*(z.square().mean(-1, keepdim=True)+1e-6).rsqrt()*w
    for block in net.blocks:
        a, m = block.attention, block.mlp
        q, k, v = (z.view(2, 24, -1, 8).transpose(1, 2) for z in (norm(h, block.norm1.weight)@a.qkv.weight.T).split((32, 16, 16), -1))
        y = naive(turn(norm(q, a.q_norm.weight)), turn(norm(k, a.k_norm.weight)), v, visible(24))
        h = h + y.transpose(1, 2).reshape(2, 24, 32)@a.out.weight.T
        gate, up = (norm(h, block.norm2.weight)@m.up.weight.T).chunk(2, -1)
        h = h + (F.silu(gate)*up)@m.down.weight.T
    wanted = norm(h, net.norm.weight)@net.embed.weight.T
    got = net(x)
    assert_close(got, wanted, rtol=1e-4, atol=1e-5)
    up = torch.randn(got.shape, generator=gen())
    for a, b in zip(*(torch.autograd.grad(y, list(net.parameters()), up) for y in (got, wanted))): assert_close(a, b, rtol=1e-3, atol=1e-4)


@every
def test_bf16_is_near(kind):
    net, x = network(kind), tokens()
    wanted = net(x)
    with torch.autocast('cpu', torch.bfloat16): got = net(x)
    assert (got-wanted).norm() < .02*wanted.norm() # eps of bf16 is .008
    assert network(kind).to(torch.bfloat16)(x).dtype == torch.bfloat16


def test_the_stream_stays_fp32():
    net, seen = network(), []
    net.blocks[1].register_forward_pre_hook(lambda m, args: seen.append(args[0].dtype))
    with torch.autocast('cpu', torch.bfloat16): net(tokens())
    assert seen == [torch.float32]


def test_seeds():
    a, b, c = build(shape(), seed=1), build(shape(), seed=1), build(shape(), seed=2)
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters()))
    assert not torch.equal(a.embed.weight, c.embed.weight)
    torch.manual_seed(0); state = torch.get_rng_state()
    build(shape(), seed=1)
    assert torch.equal(torch.get_rng_state(), state) # nothing is drawn from the global generator


def test_first_weights():
    net = build(shape(d_model=128, num_layers=8, d_ff=256, vocab_size=500), seed=0)
    for name, p in net.named_parameters():
        if p.ndim < 2: assert p.eq(1).all()
        else: assert abs(p.std().item()/(.02/4 if name.endswith(('out.weight', 'down.weight')) else .02)-1) < .05, name
    with torch.no_grad(): assert net(tokens()).std() < .5 # nearly equal scores: a loss of log V at the start


@every
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_recomputing_gives_the_same_bits(kind, dtype):
    def grads(recompute):
        net = network(kind)
        net.recompute = recompute
        with torch.autocast('cpu', dtype, enabled=dtype != torch.float32): y = net(tokens(), document=torch.tensor([[0]*10+[1]*14]*2))
        y.float().square().mean().backward()
        return [p.grad for p in net.parameters()]
    assert all(map(torch.equal, grads('none'), grads('full')))


def test_recomputing_saves_memory():
    "Fewer bytes are kept for the backward pass."
    def kept(recompute):
        net, sizes = network(num_layers=6), {}
        net.recompute = recompute
        def pack(t):
            sizes[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t): y = net(tokens()) # y keeps it alive
        return sum(sizes.values())
    assert kept('full') < kept('none')/2


@pytest.mark.parametrize('kind', ['default', 'conv', 'old'])
def test_one_graph(kind):
    "torch.compile takes the network whole, forward and backward."
    net, x = network(kind), tokens()
    document = torch.tensor([[0]*10+[1]*10+[-1]*4]*2)
    for k in (dict(), dict(causal=False, document=document))[:1 if kind == 'old' else 2]:
        torch._dynamo.reset()
        compiled = torch.compile(net, fullgraph=True, backend='eager')
        assert_close(compiled(x, **k), net(x, **k), rtol=1e-4, atol=1e-5)
    compiled = torch.compile(net, fullgraph=True, backend='aot_eager')
    grads = [torch.autograd.grad(f(x, document=document).square().mean(), list(net.parameters())) for f in (net, compiled)]
    for a, b in zip(*grads): assert_close(a, b, rtol=1e-3, atol=1e-6)
    torch._dynamo.reset()


def test_embeds_delta():
    net, x = network(), tokens()
    assert torch.equal(net(x, embeds_delta=torch.zeros(2, 24, 32)), net(x))
    assert not torch.equal(net(x, embeds_delta=torch.ones(2, 24, 32)), net(x))
    assert_close(net.head(net.hidden(x)), net(x))


def test_nonsense_is_refused_whole():
    with pytest.raises(ConfigError) as e: Shape(**{**base, 'd_ff': 0, 'norm': 'batchnorm', 'mlp': 'maxout'})
    assert all(w in str(e.value) for w in ('d_ff is 0', "norm is 'batchnorm'", "mlp is 'maxout'"))
    with pytest.raises(ConfigError, match='channels cannot be turned in pairs'): shape(d_model=12, num_heads=4, num_kv_heads=4)
    shape(d_model=12, num_heads=4, num_kv_heads=4, position='none')
    with pytest.raises(ConfigError, match='there are auto, naive'): build(shape(), backend='magic')


def test_what_an_optimizer_is_told():
    "Row splits of the fused matrices; the convolution is no matrix."
    net = network('conv')
    assert net.blocks[0].attention.muon_splits == {'qkv.weight': (32, 16, 16)} and net.blocks[0].mlp.muon_splits == {'up.weight': (48, 48)}
    assert {p.ndim for n, p in net.named_parameters() if 'mix' in n} == {3}


def test_shapes_are_plain_data():
    import json
    for kind in kinds: assert Shape.from_dict(json.loads(json.dumps(shape(kind).to_dict()))) == shape(kind)
