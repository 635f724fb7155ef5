"The leak probe: examples that share a row know nothing of each other, in every family, attention and engine; and what is no target changes nothing."
import dataclasses
import numpy as np, pytest, torch
from torch.testing import assert_close
from llmlab.config import Diffusion as DiffusionSettings, SDD as SDDSettings
from llmlab.models.ar import AR
from llmlab.models.attention import ENGINES, why_not
from llmlab.models.diffusion import Diffusion, canvas_of
from llmlab.models.sdd import SDD
from llmlab.models.transformer import Shape, build, positions_of
from llmlab.models.zoo import add_extras, own_special
from llmlab.packing.loader import in_order
from llmlab.packing.rows import Rows
from llmlab.trainer.loop import accumulate

pytestmark = pytest.mark.usefixtures('one_thread')
V, T = 60, 47
engines = [name for name in ENGINES if not why_not(name, 'cpu', torch.float32, 2, 1, 16)]


def examples(n=9, seed=0):
    "Short and long examples, whose second half is to be learned."
    g = np.random.default_rng(seed)
    lengths = g.integers(6, 22, n)
    at = np.arange(T+1)
    masks = (at >= lengths[:, None]//2) & (at < lengths[:, None])
    return dict(tokens=g.integers(1, 50, (n, T+1)), masks=masks, lengths=lengths, seq_len=T)

def packed(**change): return next(in_order(Rows.of(**examples() | change), 99))

def family(name, **shape):
    "A network with weights that are far from nothing, and its objective."
    special = own_special(V)
    objective = {'ar': lambda: AR(), 'diffusion': lambda: Diffusion(DiffusionSettings(), special), 'block': lambda: Diffusion(DiffusionSettings(block=8), special),
        'mix': lambda: SDD(SDDSettings(k=4, readin='mix'), DiffusionSettings(), special), 'slots': lambda: SDD(SDDSettings(k=4, readin='slots'), DiffusionSettings(), special)}[name]()
    backend = shape.pop('backend', 'naive')
    network = add_extras(build(Shape(vocab_size=V, seq_len=T, d_model=32, num_layers=2, num_heads=2, num_kv_heads=1, d_ff=64, **shape), backend), objective)
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in network.parameters(): p.add_(.2*torch.randn(p.shape, generator=g))
    return network.eval(), objective

def edited(batch, row, number):
    "The batch with other tokens in one document, as inputs and as targets."
    whole = torch.cat([batch.tokens, batch.targets[:, -1:]], 1)
    document = torch.cat([batch.document, batch.document[:, -1:]], 1)
    whole[row] = torch.where(document[row] == number, (whole[row]+7) % 50, whole[row])
    return dataclasses.replace(batch, tokens=whole[:, :-1].contiguous(), targets=whole[:, 1:].contiguous())

def probe(scores, batch):
    "Edit each document of each row in turn: its own scores change, those of no other do. Gives the rows that were looked at."
    before, looked = scores(batch), 0
    for row in range(len(batch.tokens)):
        for number in range(int(batch.document[row].max())+1):
            after, mine = scores(edited(batch, row, number)), batch.document[row] == number
            others = torch.ones_like(batch.document, dtype=torch.bool) & (batch.document >= 0)
            others[row] &= ~mine
            assert_close(after[others], before[others], rtol=0, atol=0)
            assert not after[row, mine].equal(before[row, mine])
            looked += int(batch.document[row].max()) > 0
    return looked


def test_the_rows_that_are_probed_hold_several_examples():
    assert packed().document.max() >= 2 and len(engines) >= 3


@pytest.mark.parametrize('backend', engines)
def test_full_attention_looking_back(backend):
    network, _ = family('ar', backend=backend)
    with torch.no_grad(): assert probe(lambda b: network(b.tokens, document=b.document, one_document=b.one_document), packed()) > 3


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA device')
@pytest.mark.parametrize('backend', ENGINES)
def test_full_attention_on_a_gpu(backend):
    "The kernels of a GPU; what lies in another document's tokens changes no tile of this one's."
    if why := why_not(backend, 'cuda', torch.bfloat16, 2, 1, 64): pytest.skip(why)
    network = build(Shape(vocab_size=V, seq_len=T, d_model=128, num_layers=2, num_heads=2, num_kv_heads=1, d_ff=64), backend).to('cuda', torch.bfloat16).eval()
    with torch.no_grad(): assert probe(lambda b: network(b.tokens.cuda(), document=b.document.cuda(), one_document=b.one_document).cpu(), packed()) > 3


@pytest.mark.parametrize('backend', engines)
@pytest.mark.parametrize('attention', ['local', 'xl', 'infini'])
def test_segments_and_memories(attention, backend):
    network, _ = family('ar', backend=backend, attention=attention, segment_len=8)
    with torch.no_grad(): assert probe(lambda b: network(b.tokens, document=b.document, one_document=b.one_document), packed()) > 3


@pytest.mark.parametrize('name', ['ar', 'diffusion', 'mix', 'slots'])
def test_the_probe_finds_a_leak(name):
    "A network that does not stop at the edges, and a batch that does not know them."
    network, objective = family(name, isolate_documents=False)
    scores = (lambda b: network(b.tokens, document=b.document)) if name == 'ar' else (lambda b: readings(network, objective, b))
    with torch.no_grad(), pytest.raises(AssertionError, match='not equal'): probe(scores, packed())
    network, objective = family(name)
    blind = lambda b: dataclasses.replace(b, document=b.document.clamp(max=0)) # all examples of a row are one document
    with torch.no_grad(), pytest.raises(AssertionError, match='not equal'): probe(lambda b: scores(blind(b)), packed())


@pytest.mark.parametrize('rule', ['linear', 'delta'])
def test_every_rule_of_memory(rule):
    network, _ = family('ar', attention='infini', segment_len=4, memory_rule=rule, memory_decay=.9, window='xl')
    with torch.no_grad(): assert probe(lambda b: network(b.tokens, document=b.document), packed()) > 3


@pytest.mark.parametrize('position, token_mix', [('learned', 'none'), ('none', 'none'), ('rope', 'conv3')])
def test_other_positions_and_mixing(position, token_mix):
    network, _ = family('ar', position=position, token_mix=token_mix)
    with torch.no_grad(): assert probe(lambda b: network(b.tokens, document=b.document), packed()) > 3


def readings(network, objective, batch):
    "The vectors that a family of diffusion makes of a batch, answers hidden by a fixed pattern, with the belief of a first look where it has one."
    canvas = canvas_of(batch)
    place = torch.arange(T+1) if canvas.document is None else positions_of(canvas.document)
    hidden = canvas.hideable & (place % 3 > 0)
    z = canvas.tokens.masked_fill(hidden, objective.mask_id)
    if objective.name == 'sdd':
        reader = objective.reader(network, canvas, belief='refine')
        reader.think(z)
        return network.hidden(z, document=canvas.document, causal=False, embeds_delta=network.extras(reader.state.only(hidden), network, z, canvas.document))[:, :T]
    from llmlab.models.diffusion import vectors
    return vectors(network, z, canvas, objective.settings.block, objective.shift)[:, :T]


@pytest.mark.parametrize('backend', engines)
@pytest.mark.parametrize('name', ['diffusion', 'block', 'mix', 'slots'])
def test_families_that_look_both_ways(name, backend):
    network, objective = family(name, backend=backend)
    with torch.no_grad(): assert probe(lambda b: readings(network, objective, b), packed()) > 3


@pytest.mark.parametrize('name', ['ar', 'diffusion', 'block', 'mix', 'slots'])
def test_an_example_in_company_costs_what_it_costs_alone(name):
    "The loss of packed rows is that of the same examples in rows of their own, where nothing is drawn."
    network, objective = family(name)
    def of_each(batch):
        "What becomes of every example, by its tokens."
        vectors = network(batch.tokens, document=batch.document) if name == 'ar' else readings(network, objective, batch)
        out = {}
        for row in range(len(batch.tokens)):
            for number in range(int(batch.document[row].max())+1):
                mine = batch.document[row] == number
                out[tuple(batch.tokens[row, mine].tolist())[:5]] = vectors[row, mine] # (five tokens are enough to know it again)
        return out
    with torch.no_grad(): together, alone = of_each(packed()), of_each(packed(packing='none'))
    assert together.keys() == alone.keys() and len(together) == 9
    for k, x in together.items(): assert_close(x, alone[k][:len(x)], rtol=1e-4, atol=1e-5) # (where a row is full, its last token is no input)
    if name == 'ar': assert_close(*(objective.nll(network, packed(packing=p)).nats.sum() for p in ('isolated', 'none')), rtol=1e-5, atol=0)


@pytest.mark.parametrize('name', ['ar', 'diffusion', 'block', 'mix', 'slots'])
def test_m11_what_is_no_target_changes_nothing(name):
    "Randomised where the weight is 0, targets leave loss and gradient as they were; one that counts, changed, does not."
    network, objective = family(name)
    batch = dataclasses.replace(packed(), place=0)
    def learned(b):
        network.zero_grad()
        accumulate(objective.loss, network, [b], generator=torch.Generator().manual_seed(0))
        loss = objective.loss(network, b, torch.Generator().manual_seed(0)).sum.detach()
        return loss, [p.grad.clone() for p in network.parameters() if p.grad is not None]
    loss, grads = learned(batch)
    rubbish = torch.where(batch.weights > 0, batch.targets, torch.randint(0, 50, batch.targets.shape, generator=torch.Generator().manual_seed(3)))
    assert not rubbish.equal(batch.targets)
    same, same_grads = learned(dataclasses.replace(batch, targets=rubbish))
    assert_close(same, loss, rtol=0, atol=0)
    for a, b in zip(same_grads, grads, strict=True): assert_close(a, b, rtol=0, atol=0)
    row, t = (batch.weights > 0).nonzero()[3].tolist()
    targets, tokens = batch.targets.clone(), batch.tokens.clone()
    targets[row, t] = (targets[row, t]+1) % 50
    if name != 'ar': tokens[row, t+1] = targets[row, t] # they read a target where it is an input
    assert learned(dataclasses.replace(batch, targets=targets, tokens=tokens))[0] != loss


@pytest.mark.parametrize('name', ['diffusion', 'block', 'mix', 'slots'])
def test_only_answers_are_hidden(name):
    network, objective = family(name)
    batch = packed()
    canvas = canvas_of(batch)
    assert_close(canvas.hideable[:, 1:], batch.weights > 0)
    assert not canvas.hideable[:, 0].any() and objective.loss(network, dataclasses.replace(batch, place=0), None).sum > 0


def test_the_probe_of_labels_finds_a_loss_without_weights():
    network, objective = family('ar')
    batch, everywhere = packed(), lambda b: dataclasses.replace(b, weights=torch.ones_like(b.weights))
    rubbish = dataclasses.replace(batch, targets=torch.where(batch.weights > 0, batch.targets, (batch.targets+1) % 50))
    assert objective.loss(network, everywhere(batch)).sum != objective.loss(network, everywhere(rubbish)).sum
    assert objective.loss(network, batch).sum == objective.loss(network, rubbish).sum
