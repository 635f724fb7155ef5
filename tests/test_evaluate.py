"Scoring: the same numbers whatever the batches, held against every document scored alone; checkpoints that cannot be opened; samples that repeat."
import json, math, shutil
from dataclasses import replace
import numpy as np, pytest, torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from llmlab import tiny
from llmlab.config import Tokenizer
from llmlab.data.corpora import open_corpus
from llmlab.data.tokenizer import build_tokenizer
from llmlab.eval.evaluate import (OpenModel, batches_of, evaluate, evaluate_text, generation_speed, looking, open_model, read_texts, samples, score, text_rows)
from llmlab.eval.metrics import byte_lengths
from llmlab.files import CheckpointError, DataError, LlmlabError
from llmlab.models.ar import AR
from llmlab.models.objective import RowScores
from llmlab.models.transformer import Shape, build
from llmlab.packing.cache import build_cache
from llmlab.packing.loader import in_order
from llmlab.trainer.checkpoint import TrainState, capture, save_checkpoint
from llmlab.trainer.machine import Machine
from llmlab.trainer.optim import build_optimizer

torch.set_num_threads(1)
corpus = open_corpus(tiny.config('data.max_documents=30').data)
tokenizer = build_tokenizer(Tokenizer(kind='byte'), corpus)
shape = Shape(vocab_size=tokenizer.vocab_size, seq_len=24, d_model=32, num_layers=2, num_heads=4, num_kv_heads=2, d_ff=48, token_mix='conv3')
objective = AR()


def sharp(shape=shape, seed=0):
    "A network with an opinion: its losses differ much from token to token."
    network = build(shape, seed=seed).train()
    with torch.no_grad():
        for p in network.parameters():
            if p.ndim == 2: p.mul_(4)
    return network


network = sharp()
texts = st.lists(st.text('abcé𝄞 \n', min_size=1, max_size=60), min_size=1, max_size=12)


def alone(text:str, window:int=shape.seq_len)->tuple[float, int, int]:
    "Nats, right guesses and targets of one document, in windows, without packing."
    ids = torch.tensor([tokenizer.bos_id, *tokenizer.encode(text), tokenizer.eos_id])
    nats = right = 0
    for start in range(0, len(ids)-1, window):
        x, y = ids[start:start+window], ids[start+1:start+1+window]
        with torch.no_grad(): scores = network(x[None, :len(y)])[0].double()
        nats, right = nats+F.cross_entropy(scores, y, reduction='sum').item(), right+(scores.argmax(-1) == y).sum().item()
    return nats, right, len(ids)-1


@settings(max_examples=25, deadline=None)
@given(texts)
def test_a_text_is_the_sum_of_its_documents(documents):
    nats, right, targets = (sum(x) for x in zip(*map(alone, documents)))
    m = evaluate_text(network, objective, tokenizer, documents, batch_rows=3)
    num_bytes = sum(len(d.encode()) for d in documents)
    assert m['val/targets'] == targets and m['val/bytes'] == num_bytes and m['documents'] == len(documents)
    assert m['val/loss'] == pytest.approx(nats/targets, rel=1e-5)
    assert m['val/accuracy'] == pytest.approx(right/targets)
    assert m['val/bits_per_byte'] == pytest.approx(nats/math.log(2)/num_bytes, rel=1e-5)
    assert m['val/perplexity'] == pytest.approx(math.exp(min(nats/targets, 700)), rel=1e-3)
    assert m['documents_cut'] == sum(len(d.encode())+2 > shape.seq_len+1 for d in documents)
    json.dumps(m, allow_nan=False)


@settings(max_examples=25, deadline=None)
@given(texts)
def test_the_batch_size_leaves_no_trace(documents):
    packed = text_rows(documents, tokenizer, shape.seq_len)
    one, seven, all_of_them = (evaluate(network, objective, batches_of(packed, n), token_bytes=byte_lengths(tokenizer)) for n in (1, 7, 1000))
    for other in (seven, all_of_them):
        assert one.keys() == other.keys()
        for k in one: assert one[k] == pytest.approx(other[k], rel=1e-6, abs=1e-6), k


def test_the_order_of_the_rows_leaves_no_trace():
    packed = text_rows([d.text for d in corpus.iterate('train')], tokenizer, shape.seq_len)
    batches = list(batches_of(packed, 5))
    a, b = (evaluate(network, objective, bs) for bs in (batches, batches[::-1]))
    for k in a: assert a[k] == pytest.approx(b[k], rel=1e-9), k


@pytest.mark.parametrize('limit', [None, 1, 5])
def test_counted_bytes(tmp_path, limit):
    cfg = tiny.config('tokenizer.kind=bpe', 'tokenizer.vocab_size=300', 'data.max_documents=80', f'packing.folder={tmp_path}')
    corpus = open_corpus(cfg.data)
    bpe = build_tokenizer(cfg.tokenizer, corpus)
    cache = build_cache(corpus, bpe, cfg.packing, 'validation')
    net = build(replace(shape, vocab_size=bpe.vocab_size, seq_len=64))
    m = evaluate(net, objective, in_order(cache, 4, limit), token_bytes=byte_lengths(bpe))
    if limit is None: assert m['val/bytes'] == cache.text_bytes and m == evaluate(net, objective, in_order(cache, 4), text_bytes=cache.text_bytes)
    else: # the text of the first rows alone
        rows = [b for b in in_order(cache, 1, limit)]
        seen = b''.join(bpe.token_bytes(int(t)) for b in rows for t, w in zip(b.targets[0], b.weights[0]) if w)
        assert m['val/bytes'] == len(seen) and m['val/rows'] == limit
    assert m['val/bits_per_byte']*m['val/bytes']*math.log(2) == pytest.approx(m['val/loss']*m['val/targets'])


class Spy(TorchDispatchMode):
    "Counts how often the host asks the device for a number."
    asked = 0
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.item.default, torch.ops.aten.is_nonzero.default): self.asked += 1
        return func(*args, **(kwargs or {}))


def test_waits_for_the_device_only_at_the_end():
    packed, asked = text_rows(tiny.documents(), tokenizer, shape.seq_len), []
    with Spy() as spy: torch.ones(3).sum().item()
    assert spy.asked == 1
    evaluate(network, objective, list(batches_of(packed, 1000))) # the first look at a machine tries the engines of attention
    for n in (1, 10, 1000):
        batches = list(batches_of(packed, n)) # (making a batch is the host's work)
        with Spy() as spy: evaluate(network, objective, batches, token_bytes=byte_lengths(tokenizer))
        asked.append(spy.asked)
    assert len(set(asked)) == 1, asked


@pytest.mark.parametrize('training', [True, False])
def test_leaves_the_network_as_it_was(training):
    net = sharp().train(training)
    before, draws = {k: v.clone() for k, v in net.state_dict().items()}, torch.get_rng_state()
    evaluate_text(net, objective, tokenizer, 'abc')
    samples(net, objective, tokenizer, ['a'], max_new_tokens=4)
    generation_speed(net, objective, new_tokens=3, rounds=1)
    with pytest.raises(ZeroDivisionError), looking(net): 1/0
    assert net.training == training and torch.is_grad_enabled() and all(p.grad is None for p in net.parameters())
    for k, v in net.state_dict().items(): torch.testing.assert_close(v, before[k], rtol=0, atol=0)
    assert torch.equal(draws, torch.get_rng_state()), 'it drew from the global generator'


class Plain:
    "A made-up family: each target costs its own number; half of the guesses are right."
    name, causal, is_bound = 'plain', False, True
    def nll(self, network, batch, generator=None, draws=1): return RowScores((batch.targets*batch.weights).sum(1), n := batch.weights.sum(1), n/2, n)
    def probe(self, network, batch): return {'rows': (torch.tensor(float(len(batch.tokens))), 2)}


def test_any_objective():
    packed = text_rows(['abc', 'de'], tokenizer, shape.seq_len)
    m = evaluate(network, Plain(), batches_of(packed, 1))
    assert m['val/loss'] == m['val/nll'] == pytest.approx(np.mean([*tokenizer.encode('abcde'), tokenizer.eos_id, tokenizer.eos_id]))
    assert m['val/is_bound'] is True and m['val/accuracy'] == .5 and m['plain/rows'] == .5 and 'val/loss_mc_se' not in m


class Silent(Plain):
    "It guesses at nothing, and has nothing to say of itself."
    is_bound = False
    def nll(self, network, batch, generator=None, draws=1):
        s = super().nll(network, batch)
        return s._replace(right=s.right*0, asked=s.asked*0, variance=s.count*4)
    def probe(self, network, batch): return {}


def test_no_guesses_no_accuracy():
    packed = text_rows(['abc', 'de'], tokenizer, shape.seq_len)
    m = evaluate(network, Silent(), batches_of(packed, 1))
    assert 'val/accuracy' not in m and m['val/is_bound'] is False and m['val/loss_mc_se'] == pytest.approx((4/m['val/targets'])**.5)


def test_objectives_that_draw_draw_the_same_each_time():
    class Draws(Plain):
        def nll(self, network, batch, generator=None, draws=1):
            s = super().nll(network, batch)
            return s._replace(nats=s.nats+torch.rand(len(s.nats), generator=generator))
    packed = text_rows(['abc', 'de'], tokenizer, shape.seq_len)
    a, b = (evaluate(network, Draws(), batches_of(packed, 1)) for _ in range(2))
    assert a == b != evaluate(network, Draws(), batches_of(packed, 1), generator=torch.Generator().manual_seed(5))


def test_not_finite_is_an_error():
    net = sharp()
    with torch.no_grad(): net.embed.weight[ord('q')] = torch.nan
    evaluate_text(net, Plain(), tokenizer, 'abc')
    with pytest.raises(LlmlabError, match='loss of 1 of 1 rows is not finite'): evaluate_text(net, objective, tokenizer, 'quick')
    assert net.training


def test_bf16():
    machine = Machine(torch.device('cpu'), torch.bfloat16)
    wide, narrow = (evaluate_text(build(shape), objective, tokenizer, tiny.documents(), machine=m)['val/loss'] for m in (Machine(), machine))
    assert narrow == pytest.approx(wide, rel=2e-3) and narrow != wide


@pytest.mark.parametrize('empty', ['', [], ['', '']])
def test_empty_text(empty):
    with pytest.raises(DataError, match='no text to score'): evaluate_text(network, objective, tokenizer, empty)


def test_no_rows():
    with pytest.raises(DataError, match='no rows'): score(network, objective, [])


def test_unknown_characters_are_told():
    chars = build_tokenizer(Tokenizer(kind='char'), corpus)
    net = build(replace(shape, vocab_size=chars.vocab_size))
    m = evaluate_text(net, objective, chars, 'The cat ☂☂')
    assert m['unknown_tokens'] == 2 and m['val/bytes'] == len('The cat ☂☂'.encode())


def test_texts_of_files(tmp_path):
    (tmp_path/'a.txt').write_text('Eins.\n')
    (tmp_path/'b.jsonl').write_text('{"text": "zwei"}\n{"text": "drei"}\n')
    assert read_texts(tmp_path/'a.txt') == ['Eins.\n']
    assert read_texts(tmp_path/'b.jsonl') == ['zwei', 'drei']
    (tmp_path/'c.txt').write_bytes(b'\xff\xfe\xfa')
    for bad in ('c.txt', 'no.txt'):
        with pytest.raises(DataError, match=bad): read_texts(tmp_path/bad)


# checkpoints

def saved(folder, shape=shape, tok=tokenizer, **changes):
    "A checkpoint as a run leaves it."
    net = build(shape, seed=3)
    tok.save(folder/'tok')
    state = capture(TrainState(global_step=7, best_val_loss=1.5), network=net, optimizer=build_optimizer(net, tiny.config().optim), model_config=net.shape.to_dict(), train_config=tiny.config().to_dict())
    return save_checkpoint(folder/'step-00000007', state | changes, [folder/'tok'/'tokenizer.json']), net


@pytest.mark.parametrize('changes', [{}, {'tie_embeddings': False}, {'position': 'learned', 'norm': 'layernorm', 'mlp': 'gelu', 'qk_norm': False}], ids=str)
def test_open_model(tmp_path, changes):
    path, net = saved(tmp_path, replace(shape, **changes))
    model = open_model(path)
    assert isinstance(model, OpenModel) and model.network.shape == net.shape and not model.network.training
    assert (model.info['global_step'], model.info['best_val_loss'], model.objective.name, model.tokenizer.fingerprint) == (7, 1.5, 'ar', tokenizer.fingerprint)
    x = torch.arange(40).view(2, 20)
    with torch.no_grad(): torch.testing.assert_close(model.network(x), net(x), rtol=0, atol=0)


@pytest.mark.parametrize('break_it,words', [
    (lambda p: (p/'tokenizer.json').unlink(), 'tokenizer.json'),
    (lambda p: (p/'tokenizer.json').write_text('{"kind": '), 'tokenizer.json'),
    (lambda p: (p/'model.safetensors').write_bytes((p/'model.safetensors').read_bytes()[:2000]), 'model.safetensors'),
    (lambda p: (p/'complete.json').unlink(), 'complete.json'),
    (lambda p: shutil.rmtree(p), 'does not exist'),
])
def test_damaged_checkpoints(tmp_path, break_it, words):
    path, _ = saved(tmp_path)
    break_it(path)
    with pytest.raises(CheckpointError, match=words): open_model(path)


@pytest.mark.parametrize('changes,words', [
    ({'architecture': 'retnet'}, "family 'retnet'"), ({'model_config': {}}, 'does not describe a model'),
    ({'model_config': shape.to_dict() | {'colour': 'red'}}, 'does not describe a model'), ({'model_config': shape.to_dict() | {'num_heads': 5}}, 'does not describe a model'),
    ({'model_config': shape.to_dict() | {'vocab_size': 300}}, 'do not belong together'), ({'model_config': shape.to_dict() | {'d_ff': 52}}, 'do not fit this model'),
], ids=str)
def test_checkpoints_that_describe_something_else(tmp_path, changes, words):
    path, _ = saved(tmp_path, **changes)
    with pytest.raises(CheckpointError, match=words): open_model(path)


# samples

def test_samples_repeat_and_depend_on_the_seed():
    prompts = ['The ', '', 'é𝄞']
    a, b, c = (samples(network, objective, tokenizer, prompts, max_new_tokens=10, seed=s) for s in (0, 0, 1))
    assert a == b != c and [s['prompt'] for s in a] == prompts
    assert all(set(s) == {'prompt', 'text', 'tokens'} and s['tokens'] <= 10 for s in a)
    assert samples(network, objective, tokenizer, []) == []


def test_greedy_samples_do_not_depend_on_the_company():
    prompts = ['The cat', 'a', 'Once upon a time']
    together = samples(network, objective, tokenizer, prompts, max_new_tokens=12, temperature=0)
    assert together == [samples(network, objective, tokenizer, [p], max_new_tokens=12, temperature=0)[0] for p in prompts]


def test_samples_end_at_the_end_of_a_text():
    net = build(shape)
    class Ends(AR):
        def generate(self, network, prompts, *, stop_id, **k):
            assert all(p[0] == tokenizer.bos_id for p in prompts) and stop_id == tokenizer.eos_id
            return [tokenizer.encode('!') for _ in prompts]
    assert samples(net, Ends(), tokenizer, ['x']) == [dict(prompt='x', text='!', tokens=1)]


@pytest.mark.parametrize('seq_len,prompt,new', [(24, 32, 64), (4, 32, 64), (24, 3, 5)])
def test_generation_speed_fits_into_the_network(seq_len, prompt, new):
    s = generation_speed(build(replace(shape, seq_len=seq_len)), objective, prompt_tokens=prompt, new_tokens=new, rounds=1, batch_rows=2)
    assert s['generate/prompt_tokens']+s['generate/new_tokens'] <= seq_len and s['generate/batch_rows'] == 2
    assert all(v > 0 and math.isfinite(v) for v in s.values())
    json.dumps(s, allow_nan=False)
