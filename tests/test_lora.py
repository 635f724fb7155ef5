"LoRA: for every family the base stays, adapters learn, merge and resume; a wrong base is refused; PEFT reads ours and we read PEFT's."
import json, re
from functools import partial
import pytest, torch
from hypothesis import given, settings, strategies as st
from safetensors.torch import load_file
from torch.testing import assert_close
from llmlab import tiny
from llmlab.config import Tokenizer
from llmlab.data.corpora import open_corpus
from llmlab.data.tokenizer import build_tokenizer
from llmlab.eval.evaluate import batches_of, evaluate, load_whole, open_model, samples, text_rows
from llmlab.files import CheckpointError, ConfigError, LlmlabError, read_json
from llmlab.models.lora import (LoRALinear, TARGETS, add_lora, drift, from_peft, frozen_weights, lora_again, merge_lora, own_weights, target_names, to_peft,
                                trainable_table, weights_hash, without_lora)
from llmlab.models.transformer import Shape, build
from llmlab.models.zoo import build_model, from_llama, to_llama
from llmlab.trainer.checkpoint import TrainState, capture, checkpointer, latest, load_checkpoint, load_weights, restore, save_checkpoint, start_from
from llmlab.trainer.loop import Limit, accumulate, fit
from llmlab.trainer.machine import Machine
from llmlab.trainer.optim import Ema, build_optimizer
from llmlab.trainer.tracking import Stopped

pytestmark = pytest.mark.usefixtures('one_thread')
exact = dict(rtol=0, atol=0)
tokenizer = build_tokenizer(Tokenizer(kind='byte'), open_corpus(tiny.config('data.max_documents=30').data))
batches = list(batches_of(text_rows(tiny.documents(), tokenizer, 64), 4))
tokens = torch.arange(40).view(2, 20)
FAMILIES = {
    'ar': [], 'untied': ['model.tie_embeddings=false'], 'other parts': ['model.position=learned', 'model.norm=layernorm', 'model.mlp=gelu', 'model.token_mix=conv3'],
    'infini': ['model.attention=infini', 'model.infini.segment_len=16'], 'infini delta': ['model.attention=infini', 'model.infini.segment_len=16', 'model.infini.rule=delta'],
    'local': ['model.attention=local', 'model.infini.segment_len=16'], 'recomputed': ['trainer.gradient_checkpointing=full'],
    'diffusion': ['model.architecture=diffusion'], 'sdd': ['model.architecture=sdd'], 'swap': ['model.architecture=sdd', 'model.sdd.process=swap'],
}


def gen(seed=0): return torch.Generator().manual_seed(seed)

def made(family='ar', *more):
    "Config, network (with an opinion) and objective of a family."
    cfg = tiny.config(*FAMILIES[family], *more)
    network, objective = build_model(cfg, tokenizer.vocab_size, special=tokenizer.special)
    with torch.no_grad():
        for p in network.parameters():
            if p.ndim == 2: p.mul_(3)
    return cfg, network, objective

def spoken(network, seed=1, size=.05):
    "Adapters as training leaves them: B is not zero."
    with torch.no_grad():
        for name in network.adapter['modules']: network.get_submodule(name).lora_B.normal_(0, size, generator=gen(seed))
    return network

def said(network, objective):
    with torch.no_grad(): return objective.nll(network.eval(), batches[0], gen(), 1).nats


@pytest.mark.parametrize('family', FAMILIES)
def test_the_base_stays_and_adapters_learn(family):
    cfg, network, objective = made(family)
    before, weights = said(network, objective), {k: t.clone() for k, t in network.state_dict().items()}
    counts = add_lora(network, r=3, alpha=6, seed=2)
    assert_close(said(network, objective), before, **exact) # B = 0
    assert network.adapter['base']['hash'] == weights_hash(weights) == weights_hash(frozen_weights(network))
    assert counts['trainable'] == sum(p.numel() for p in network.parameters() if p.requires_grad) == sum(r['trainable'] for r in trainable_table(network))
    assert counts['all'] == sum(r['all'] for r in trainable_table(network))
    optimizer = build_optimizer(network, cfg.optim)
    assert cfg.optim.name == 'muon' and [type(p).__name__ for p in optimizer.parts] == ['AdamW'] # thin matrices are no matter of Muon's
    assert len(optimizer.parameters) == 2*counts['adapters']
    losses = []
    for batch in batches[:6]*2:
        losses.append(accumulate(objective.loss, network.train(), [batch], generator=gen())[1].item()/batch.num_targets)
        grads = {name: p.grad for name, p in network.named_parameters()}
        assert all((g is not None) == ('lora_' in name) for name, g in grads.items())
        assert all(g.abs().sum() > 0 for name, g in grads.items() if name.endswith('lora_B'))
        if len(losses) > 1: assert all(g.abs().sum() > 0 for name, g in grads.items() if name.endswith('lora_A'))
        optimizer.step(); optimizer.zero_grad()
    for name, t in weights.items(): assert_close(network.state_dict()[name], t, **exact) # bit for bit
    assert sum(losses[6:]) < sum(losses[:6])


@pytest.mark.parametrize('family', FAMILIES)
def test_merged_it_says_the_same(family):
    _, network, objective = made(family)
    add_lora(network, r=3)
    spoken(network)
    plain = merge_lora(network)
    assert not hasattr(plain, 'adapter') and all(p.requires_grad for p in plain.parameters()) and not any(isinstance(m, LoRALinear) for m in plain.modules())
    assert plain.state_dict().keys() == made(family)[1].state_dict().keys()
    with torch.no_grad(): assert_close(plain.eval()(tokens), network.eval()(tokens), rtol=0, atol=1e-5)
    assert_close(said(plain, objective), said(network, objective), rtol=1e-4, atol=1e-3) # sums of 60 losses, some from draws of hidden tokens
    both = network.double(), merge_lora(network.double())
    with torch.no_grad(): assert_close(both[1](tokens), both[0](tokens), rtol=0, atol=1e-12)
    assert network.adapter and isinstance(network.blocks[0].attention.qkv, LoRALinear) # the one with adapters is as it was


@given(r=st.integers(1, 9), alpha=st.floats(.1, 64), targets=st.sampled_from([*TARGETS, 'qkv', 'out,down', 'mlp.up, attention.qkv']), seed=st.integers(0, 9))
@settings(max_examples=25, deadline=None)
def test_any_rank_and_any_targets(r, alpha, targets, seed):
    shape = Shape(vocab_size=50, seq_len=24, d_model=24, num_layers=2, num_heads=4, num_kv_heads=2, d_ff=40)
    network = build(shape, seed=seed)
    with torch.no_grad(): before = network(tokens)
    add_lora(network, r=r, alpha=alpha, targets=targets, seed=seed)
    assert {name.split('.', 2)[2] for name in network.adapter['modules']} == set(target_names(targets))
    assert {n for n, m in network.named_modules() if isinstance(m, LoRALinear)} == set(network.adapter['modules'])
    json.dumps(network.adapter)
    exactly = spoken(network, seed).double()
    with torch.no_grad():
        assert_close(merge_lora(exactly)(tokens), exactly(tokens), rtol=0, atol=1e-12)
        assert_close(without_lora(exactly)(tokens).float(), before, rtol=1e-4, atol=1e-5)
    again = build(shape, seed=seed)
    lora_again(again, json.loads(json.dumps(network.adapter)))
    assert_close(own_weights(again)[f'{network.adapter["modules"][0]}.lora_A'], own_weights(network)[f'{network.adapter["modules"][0]}.lora_A'].float(), **exact)


def test_a_merge_that_drifts_is_refused():
    network = made()[1]
    add_lora(network, r=2)
    spoken(network, size=.5)
    with pytest.raises(LlmlabError, match='differs by'): merge_lora(network.bfloat16(), tolerance=1e-5)
    merge_lora(network.float())
    with pytest.raises(ConfigError, match='nothing to merge'): merge_lora(made()[1])


def test_what_is_trained_beside_the_adapters(tmp_path):
    _, network, _ = made('infini')
    counts = add_lora(network, r=2, train=['memory.gate'])
    learn = {name.rpartition('.')[2] for name, p in network.named_parameters() if p.requires_grad}
    assert learn == {'lora_A', 'lora_B', 'gate'} and len(own_weights(network)) == 2*counts['adapters']+2
    with torch.no_grad(): network.blocks[0].attention.memory.gate.fill_(.5)
    path = save_checkpoint(tmp_path/'one', capture(TrainState(1), network=network, optimizer=build_optimizer(network, tiny.config().optim)))
    other = made('infini')[1]
    lora_again(other, network.adapter)
    load_weights(other, load_checkpoint(path))
    assert_close(other.state_dict(), network.state_dict(), **exact)
    assert_close(merge_lora(other).blocks[0].attention.memory.gate, network.blocks[0].attention.memory.gate)
    with pytest.raises(ConfigError, match='memory.gate learned'): to_peft(network, tmp_path/'peft')


@pytest.mark.parametrize('bad,words', [(dict(r=0), 'r is 0'), (dict(alpha=0.), 'alpha is 0'), (dict(dropout=1.), 'dropout is 1'), (dict(train=['gates']), "'gates' in its name")])
def test_wrong_settings(bad, words):
    network = made()[1]
    with pytest.raises(ConfigError, match=words): add_lora(network, **bad)
    assert not getattr(network, 'adapter', None) and all(p.requires_grad for p in network.parameters()) # nothing was touched


def test_refusals():
    for targets in ('', 'all_linear', 'qkv,head', 'lm_head', 'norm1'):
        with pytest.raises(ConfigError, match='no matrix of a block'): add_lora(made()[1], targets=targets)
    network = made('recomputed')[1]
    with pytest.raises(ConfigError, match='gradient_checkpointing'): add_lora(network, dropout=.1)
    add_lora(network)
    with pytest.raises(ConfigError, match='adapters already'): add_lora(network)


def test_recomputed_the_gradients_are_the_same():
    grads = []
    for family in ('ar', 'recomputed'):
        _, network, objective = made(family)
        add_lora(network, r=3)
        accumulate(objective.loss, spoken(network).train(), [batches[0]], generator=gen())
        grads.append({name: p.grad for name, p in network.named_parameters() if p.requires_grad})
    assert_close(*grads, **exact)


def test_bf16_products():
    _, network, objective = made()
    add_lora(network, r=3)
    spoken(network).train()
    sums = [accumulate(objective.loss, network, [batches[0]], Machine(dtype=dtype), generator=gen())[1].item() for dtype in (torch.float32, torch.bfloat16)]
    assert abs(sums[1]/sums[0]-1) < .02 and sums[0] != sums[1]
    assert all(p.dtype == p.grad.dtype == torch.float32 for p in network.parameters() if p.requires_grad)


def test_dropout_only_in_training():
    network = made()[1]
    add_lora(network, r=4, dropout=.5)
    spoken(network)
    with torch.no_grad():
        assert_close(network.eval()(tokens), network.eval()(tokens), **exact)
        assert (network.train()(tokens)-network(tokens)).abs().max() > 1e-3


# checkpoints

class Cycle:
    "The batches again and again; its place is one number."
    def __init__(self): self.at = 0
    def __iter__(self): return self
    def __next__(self):
        self.at += 1
        return batches[(self.at-1) % len(batches)]
    def state_dict(self): return {'at': self.at}
    def load_state_dict(self, state): self.at = state['at']

def sitting(folder, base, family, limit=None, ema=None, dropout=0., total=12):
    "One sitting with fresh objects; goes on from the newest checkpoint."
    path = latest(folder) if folder.is_dir() else None
    torch.manual_seed(999 if path else 3)
    cfg, network, objective = made(family)
    with torch.no_grad():
        for p in network.parameters(): p.add_(7. if path else 1.) # other first weights: all must come from the base
    assert start_from(network, load_whole(base)) == []
    add_lora(network, r=3, dropout=dropout, seed=8 if path else 2, base=base)
    optimizer, loader, generator = build_optimizer(network, cfg.optim), Cycle(), gen(5)
    average = Ema(network, ema) if ema else None
    parts = dict(network=network, optimizer=optimizer, loader=loader, generators={'objective': generator}, ema=average)
    state = restore(load_checkpoint(path), **parts) if path else TrainState()
    tokenizer.save(folder.parent/'tok')
    save = checkpointer(folder, partial(capture, **parts, model_config=network.shape.to_dict(), train_config=cfg.to_dict(), architecture=objective.name), 2, [folder.parent/'tok'/'tokenizer.json'])
    try: fit(network, objective, loader, optimizer, total_steps=total, generator=generator, ema=average, state=state, save=save, save_every=4, limit=limit)
    except Stopped: pass
    return network, average

def whole(folder, family):
    "A base as a run leaves it."
    cfg, network, objective = made(family)
    tokenizer.save(folder/'tok')
    return save_checkpoint(folder/'base'/'checkpoints'/'step-00000005', capture(TrainState(5), network=network, optimizer=build_optimizer(network, cfg.optim), model_config=network.shape.to_dict(),
        train_config=cfg.to_dict(), architecture=objective.name), [folder/'tok'/'tokenizer.json'])


@pytest.mark.parametrize('family,ema,dropout', [('ar', None, .2), ('untied', .9, .1), ('infini', .9, 0.), ('diffusion', None, 0.), ('sdd', .9, .1), ('swap', None, 0.)])
def test_stopped_and_gone_on_it_is_the_same_run(tmp_path, family, ema, dropout):
    base = whole(tmp_path, family)
    go = partial(sitting, base=base, family=family, ema=ema, dropout=dropout)
    straight, average = go(tmp_path/'a'/'checkpoints')
    for steps in (3, 5): go(tmp_path/'b'/'checkpoints', limit=Limit(steps=steps))
    parts, average_of_parts = go(tmp_path/'b'/'checkpoints')
    assert_close(parts.state_dict(), straight.state_dict(), **exact)
    if ema: assert_close(average_of_parts.state_dict(), average.state_dict(), **exact)
    a, b = (load_checkpoint(latest(tmp_path/x/'checkpoints')) for x in 'ab')
    assert a['global_step'] == b['global_step'] == 12
    assert_close(a['optimizer_state_dict']['parts'][0]['state'], b['optimizer_state_dict']['parts'][0]['state'], **exact)
    saved = load_file(latest(tmp_path/'a'/'checkpoints')/'model.safetensors')
    assert saved and all('.lora_' in name for name in saved)
    size = lambda path: sum(p.stat().st_size for p in path.iterdir() if p.suffix != '.json')
    assert size(latest(tmp_path/'a'/'checkpoints')) < .4*size(base)
    model = open_model(latest(tmp_path/'b'/'checkpoints'))
    with torch.no_grad():
        if ema: # what is opened is the average
            with average.applied(straight): expected = straight.eval()(tokens)
        else: expected = straight.eval()(tokens)
        assert_close(model.network(tokens), expected, **exact)
    assert model.info['adapter']['base']['path'] == str(base)
    merged = open_model(latest(tmp_path/'b'/'checkpoints'), merge=True)
    assert not hasattr(merged.network, 'adapter')
    with torch.no_grad(): assert_close(merged.network(tokens), expected, rtol=0, atol=1e-5)
    assert samples(*model[:3], ['The '], max_new_tokens=4, temperature=0.)


def test_a_whole_checkpoint_is_as_before(tmp_path):
    base = whole(tmp_path, 'ar')
    meta = read_json(base/'meta.json', CheckpointError)
    assert 'adapter' not in meta and meta['format_version'] == 1
    assert load_file(base/'model.safetensors').keys() == made()[1].state_dict().keys()


def adapters(folder, base, family='ar', seed=1, step=6, **k):
    "Adapters as a run leaves them."
    model = open_model(base, merge=True)
    add_lora(model.network, r=2, base=base, seed=seed, **k)
    spoken(model.network, seed)
    cfg = tiny.config(*FAMILIES[family])
    return save_checkpoint(folder/'checkpoints'/f'step-{step:08d}', capture(TrainState(step), network=model.network, optimizer=build_optimizer(model.network, cfg.optim), model_config=model.network.shape.to_dict(),
        train_config=cfg.to_dict(), architecture=model.objective.name), [base/'tokenizer.json']), model.network


def test_a_wrong_base_is_refused(tmp_path):
    base = whole(tmp_path, 'ar')
    path, network = adapters(tmp_path/'tuned', base)
    other = open_model(base).network
    with torch.no_grad(): other.norm.weight[3] += 1e-6 # one bit or two
    add_lora(other, r=2)
    with pytest.raises(CheckpointError, match='trained on another base'): load_weights(other, load_checkpoint(path))
    state = load_checkpoint(base)
    state['model_state_dict']['norm.weight'][3] += 1e-6
    save_checkpoint(base, state, [path/'tokenizer.json'])
    for merge in (False, True):
        with pytest.raises(CheckpointError, match=re.escape(str(base))): open_model(path, merge=merge)


def test_other_settings_are_refused(tmp_path):
    base = whole(tmp_path, 'ar')
    path, _ = adapters(tmp_path/'tuned', base)
    there = load_checkpoint(path)
    for k, words in ((dict(r=3), 'r is 2 there and 3 here'), (dict(r=2, alpha=1.), 'alpha is'), (dict(r=2, targets='mlp'), 'targets is'), (dict(r=2, train=['norm']), 'train is')):
        network = open_model(base).network
        add_lora(network, **k)
        with pytest.raises(CheckpointError, match=words): load_weights(network, there)
    network = open_model(base).network
    for wrong in (lambda: load_weights(network, there), lambda: start_from(network, there)):
        with pytest.raises(CheckpointError, match='holds adapters alone'): wrong()
    add_lora(network, r=2)
    with pytest.raises(CheckpointError, match='holds a whole network'): load_weights(network, load_checkpoint(base))
    there['model_state_dict'].popitem()
    with pytest.raises(CheckpointError, match='adapters do not fit'): load_weights(network, there)


def test_a_base_that_moved(tmp_path):
    runs = tmp_path/'runs'
    base = whole(runs, 'ar')
    path, network = adapters(runs/'tuned', base)
    with torch.no_grad(): expected = network.eval()(tokens)
    runs.rename(tmp_path/'elsewhere') # all runs together: found again
    path, base = (tmp_path/'elsewhere'/p.relative_to(runs) for p in (path, base))
    with torch.no_grad(): assert_close(open_model(path).network(tokens), expected, **exact)
    base.parents[1].rename(tmp_path/'away')
    with pytest.raises(CheckpointError, match='their base is not there'): open_model(path)
    for place in (tmp_path/'away', tmp_path/'away'/'checkpoints'/'step-00000005'):
        with torch.no_grad(): assert_close(open_model(path, base=place).network(tokens), expected, **exact)
    with pytest.raises(CheckpointError, match='not there'): open_model(path, base=tmp_path/'nowhere')


def test_adapters_on_adapters(tmp_path):
    base = whole(tmp_path, 'ar')
    first, _ = adapters(tmp_path/'first', base)
    second, network = adapters(tmp_path/'second', first, seed=2)
    with torch.no_grad():
        assert_close(open_model(second).network(tokens), network.eval()(tokens), **exact)
        assert_close(open_model(second, merge=True).network(tokens), network(tokens), rtol=0, atol=1e-5)
    assert (load_whole(second)['model_state_dict']['blocks.0.mlp.up.weight']-load_whole(first)['model_state_dict']['blocks.0.mlp.up.weight']).abs().max() > 1e-3


def test_a_family_that_its_base_was_not(tmp_path):
    "SDD from an autoregressive base: what the base did not have learns as a whole, and is saved."
    base = whole(tmp_path, 'ar')
    cfg, network, objective = made('sdd')
    stayed = start_from(network, load_whole(base))
    assert stayed
    add_lora(network, r=2, train=['extras.'], base=base)
    spoken(network)
    assert set(stayed) <= set(own_weights(network))
    optimizer = build_optimizer(network, cfg.optim)
    accumulate(objective.loss, network.train(), [batches[0]], generator=gen())
    optimizer.step()
    path = save_checkpoint(tmp_path/'tuned'/'checkpoints'/'step-00000001', capture(TrainState(1), network=network, optimizer=optimizer, model_config=network.shape.to_dict(), train_config=cfg.to_dict(),
        architecture='sdd'), [base/'tokenizer.json'])
    model = open_model(path)
    assert_close(model.network.state_dict(), network.state_dict(), **exact)
    assert evaluate(*model[:2], batches[:2])['val/loss'] == evaluate(network, objective, batches[:2])['val/loss']


def test_the_average_of_a_base_is_the_base(tmp_path):
    cfg, network, objective = made()
    ema = Ema(network, .5)
    with torch.no_grad(): network.norm.weight.add_(.1)
    ema.update()
    tokenizer.save(tmp_path/'tok')
    base = save_checkpoint(tmp_path/'base'/'checkpoints'/'step-00000001', capture(TrainState(1), network=network, optimizer=build_optimizer(network, cfg.optim), ema=ema, model_config=network.shape.to_dict(),
        train_config=cfg.to_dict()), [tmp_path/'tok'/'tokenizer.json'])
    path, tuned = adapters(tmp_path/'tuned', base)
    assert_close(tuned.norm.weight, ema.shadow['norm.weight'], **exact)
    with torch.no_grad(): assert_close(open_model(path).network(tokens), tuned.eval()(tokens), **exact)


def test_compiled_networks_are_saved_under_their_own_names():
    network = made()[1]
    add_lora(network, r=2)
    parts = dict(network=torch.compile(network), optimizer=build_optimizer(network, tiny.config().optim))
    state = capture(TrainState(1), **parts)
    assert state['adapter'] is network.adapter and state['model_state_dict'].keys() == own_weights(network).keys()
    load_weights(parts['network'], state)
    assert drift(merge_lora(parts['network']), network) < 1e-5


# PEFT

llama = Shape(vocab_size=60, seq_len=32, d_model=32, num_layers=2, num_heads=4, num_kv_heads=2, d_ff=48, qk_norm=False)

@pytest.mark.parametrize('tied', (True, False))
@pytest.mark.parametrize('targets', ('all-linear', 'attention', 'down,qkv'))
def test_peft_reads_ours(tmp_path, targets, tied):
    peft = pytest.importorskip('peft')
    ours = build(Shape(**llama.to_dict() | {'tie_embeddings': tied}), seed=1)
    add_lora(ours, r=3, alpha=5, targets=targets)
    spoken(ours, size=.3)
    to_llama(without_lora(ours)).save_pretrained(tmp_path/'base')
    to_peft(ours, tmp_path/'adapter', base=str(tmp_path/'base'))
    theirs = peft.PeftModel.from_pretrained(to_llama(without_lora(ours)), tmp_path/'adapter').eval()
    auto = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path/'adapter').eval() # the base is found by its path
    with torch.no_grad():
        assert_close(theirs(input_ids=tokens).logits, ours.eval()(tokens), rtol=1e-4, atol=1e-5)
        assert_close(auto(input_ids=tokens).logits, ours(tokens), rtol=1e-4, atol=1e-5)
        assert (theirs(input_ids=tokens).logits-without_lora(ours)(tokens)).abs().max() > .01
        assert_close(theirs.merge_and_unload()(input_ids=tokens).logits, to_llama(merge_lora(ours))(input_ids=tokens).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('settings', [dict(target_modules=['q_proj', 'v_proj']), dict(target_modules='all-linear'), dict(target_modules=['o_proj', 'gate_proj'], use_rslora=True)], ids=str)
def test_we_read_pefts(tmp_path, settings):
    peft = pytest.importorskip('peft')
    base = build(llama, seed=1)
    theirs = peft.get_peft_model(to_llama(base), peft.LoraConfig(r=4, lora_alpha=6, task_type='CAUSAL_LM', **settings)).eval()
    with torch.no_grad():
        for i, (name, p) in enumerate(theirs.named_parameters()):
            if 'lora_B' in name: p.normal_(0, .3, generator=gen(i))
    theirs.save_pretrained(tmp_path/'adapter')
    ours = from_llama(to_llama(base))
    from_peft(ours, tmp_path/'adapter')
    with torch.no_grad():
        assert_close(ours.eval()(tokens), theirs(input_ids=tokens).logits, rtol=1e-4, atol=1e-5)
        assert_close(merge_lora(ours)(tokens), ours(tokens), rtol=0, atol=1e-5)
        to_peft(ours, tmp_path/'back')
        assert_close(peft.PeftModel.from_pretrained(to_llama(base), tmp_path/'back').eval()(input_ids=tokens).logits, ours(tokens), rtol=1e-4, atol=1e-5)


def test_pefts_other_kinds_are_refused(tmp_path):
    peft = pytest.importorskip('peft')
    for i, (settings, words) in enumerate(((dict(use_dora=True), 'use_dora'), (dict(modules_to_save=['lm_head']), 'modules_to_save'), (dict(rank_pattern={'q_proj': 2}), 'rank_pattern'))):
        theirs = peft.get_peft_model(to_llama(build(llama)), peft.LoraConfig(r=4, target_modules=['q_proj'], **settings))
        theirs.save_pretrained(tmp_path/str(i))
        with pytest.raises(ConfigError, match=words): from_peft(build(llama), tmp_path/str(i))
    with pytest.raises(ConfigError, match='adapter_config.json'): from_peft(build(llama), tmp_path/'nothing')
