"Models of Hugging Face behind our faces: leaks, losses, text, adapters, and the way back to their own folders."
import json
import pytest, torch
from torch.testing import assert_close
from llmlab.config import Optim, Tokenizer as TokenizerSettings
from llmlab.data.tokenizer import train_tokenizer
from llmlab.files import CheckpointError, ConfigError, LlmlabError
from llmlab.models.lora import frozen_weights, weights_hash
from llmlab.models.pretrained import HFCausal, Pretrained, PretrainedShape, add_peft, as_pretrained, build_pretrained, fit_vocabulary, from_shape, leak, merge_peft, open_pretrained, places, plain_head, save_pretrained
from llmlab.packing.loader import Batch
from llmlab.trainer.loop import fit
from llmlab.trainer.optim import build_optimizer

transformers, peft = pytest.importorskip('transformers'), pytest.importorskip('peft')
transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()
V = 262
small = dict(vocab_size=V, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
             bos_token_id=257, eos_token_id=258, pad_token_id=256)
KINDS = {
    'llama': lambda: transformers.LlamaConfig(**small),
    'qwen2': lambda: transformers.Qwen2Config(**small, tie_word_embeddings=True),
    'qwen3': lambda: transformers.Qwen3Config(**small, head_dim=8),
    'gpt2': lambda: transformers.GPT2Config(vocab_size=V, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=257, eos_token_id=258),
    'mistral': lambda: transformers.MistralConfig(**small, sliding_window=6),
    'gemma2': lambda: transformers.Gemma2Config(**small, head_dim=8, final_logit_softcapping=2., sliding_window=6),
    'phi': lambda: transformers.PhiConfig(**{k: v for k, v in small.items() if k != 'num_key_value_heads'}), # its head has a bias
    'cohere': lambda: transformers.CohereConfig(**small, logit_scale=.25),
}
hf = HFCausal()


def save(name, folder):
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(KINDS[name]())
    for p in model.parameters(): p.data += torch.randn_like(p)*.05 # biases too
    model.save_pretrained(folder/name)
    train_tokenizer([], TokenizerSettings(kind='byte')).save(folder/name) # ours, beside it
    return folder/name


def rows(n=2, length=24, seed=0): return torch.randint(V, (n, length), generator=torch.Generator().manual_seed(seed))
def plain(row, first=1):
    weights = (torch.arange(row.shape[1]-1) >= first-1).float().expand(len(row), -1).clone()
    return Batch(row[:, :-1], row[:, 1:], weights, torch.zeros_like(row[:, 1:]), one_document=True)
def packed(row, borders=(7, 8, 15), padding=3): # a document of one token among them
    document = torch.zeros_like(row)
    for b in borders: document[:, b:] += 1
    if padding: document[:, -padding:] = -1
    weights = ((document[:, 1:] == document[:, :-1]) & (document[:, 1:] >= 0)).float()
    return Batch(row[:, :-1], row[:, 1:], weights, document[:, :-1])


@pytest.mark.parametrize('backend', ['eager', 'sdpa'])
@pytest.mark.parametrize('name', KINDS)
def test_packed_documents_do_not_leak(name, backend, tmp_path):
    if (name, backend) == ('gemma2', 'sdpa'): pytest.skip('transformers has no sdpa for gemma2')
    network, row = open_pretrained(save(name, tmp_path), backend=backend), rows(1)
    assert network.model.config._attn_implementation == backend
    assert leak(network) == 0
    batch = packed(row)
    with torch.no_grad(): before = network(batch.tokens, document=batch.document)
    for which in (0, 1, 2, 3):
        edited = torch.where(batch.document == which, (batch.tokens+1) % V, batch.tokens)
        with torch.no_grad(): after = network(edited, document=batch.document)
        assert torch.equal(after[batch.document != which], before[batch.document != which])
        assert not torch.equal(after[batch.document == which], before[batch.document == which])
        alone = network(batch.tokens[batch.document == which][None])
        assert_close(alone[0], before[batch.document == which], atol=1e-5, rtol=1e-4)


def test_a_model_that_leaks_is_refused_before_it_learns(tmp_path, monkeypatch):
    "A causal model that goes by an attention mask alone: here one whose places are thrown away."
    network = open_pretrained(save('llama', tmp_path))
    stack = network.model.base_model
    forward = stack.forward
    monkeypatch.setattr(stack, 'forward', lambda position_ids=None, **k: forward(**k))
    assert leak(network) > 1e-3
    with pytest.raises(ConfigError, match='finetune.packing=none'): hf.loss(network, packed(rows(1)))
    hf.loss(network, plain(rows(1))) # a row of its own is safe


@pytest.mark.parametrize('name', KINDS)
def test_the_loss_is_that_of_transformers(name, tmp_path):
    network, row = open_pretrained(save(name, tmp_path)), rows()
    assert plain_head(network) == (name not in ('gemma2', 'phi', 'cohere'))
    batch, labels = plain(row, 9), row.masked_fill(torch.arange(24) < 9, -100)
    loss = hf.loss(network, batch)
    theirs = network.model(input_ids=row, labels=labels).loss
    assert_close(loss.sum/loss.count, theirs, atol=1e-5, rtol=1e-5)
    mine = torch.autograd.grad(loss.sum/loss.count, network.embed.weight)[0]
    assert_close(mine, torch.autograd.grad(theirs, network.embed.weight)[0], atol=1e-5, rtol=1e-4)
    scores = hf.nll(network, batch)
    assert_close((scores.nats.sum(), scores.count.tolist()), (loss.sum.detach(), [15., 15.]))
    assert_close(scores.right.sum(), loss.parts['accuracy'][0].detach())


@pytest.mark.parametrize('name', ['llama', 'gemma2'])
def test_labels_that_do_not_count_do_not_matter(name, tmp_path):
    network, batch = open_pretrained(save(name, tmp_path)), packed(rows())
    loss = hf.loss(network, batch).sum
    noise = torch.where(batch.weights == 0, torch.randint(V, batch.targets.shape), batch.targets)
    assert torch.equal(hf.loss(network, Batch(batch.tokens, noise, batch.weights, batch.document)).sum, loss)
    at = batch.weights.nonzero()[3]
    noise[tuple(at)] = (noise[tuple(at)]+1) % V
    assert not torch.equal(hf.loss(network, Batch(batch.tokens, noise, batch.weights, batch.document)).sum, loss)
    beyond = Batch(batch.tokens.masked_fill(batch.document < 0, V+5), batch.targets.masked_fill(batch.weights == 0, 0), batch.weights, batch.document)
    assert torch.equal(hf.loss(network, beyond).sum, loss) # padding that the model has no number for


def test_places_by_hand():
    document = torch.tensor([[0, 0, 1, 2, 2, 2, -1], [0]*7])
    assert places(document).tolist() == [[0, 1, 0, 0, 1, 2, 0], list(range(7))]


@pytest.mark.parametrize('name', KINDS)
def test_text_is_that_of_transformers(name, tmp_path):
    network = open_pretrained(save(name, tmp_path))
    network.model.generation_config.repetition_penalty = 5. # somebody's taste, not ours
    prompts = [r[:n].tolist() for r, n in zip(rows(3), (4, 9, 1))]
    new = hf.generate(network, prompts, max_new_tokens=16, temperature=0, stop_id=258)
    assert network.model.generation_config.repetition_penalty == 5.
    network.model.generation_config = transformers.GenerationConfig()
    for p, ids in zip(prompts, new):
        out = network.model.generate(torch.tensor([p]), attention_mask=torch.ones(1, len(p), dtype=torch.int64), do_sample=False, max_new_tokens=16, eos_token_id=258, pad_token_id=0)[0, len(p):].tolist()
        assert (out[:out.index(258)] if 258 in out else out) == ids
    drawn = [hf.generate(network, prompts, max_new_tokens=6, temperature=.8, top_k=50, top_p=.9, generator=torch.Generator().manual_seed(s)) for s in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]


def train(network, steps=5, lr=3e-3, batch=None):
    optimizer = build_optimizer(network, Optim(name='adamw', lr=lr))
    batch = batch or packed(rows(4))
    before = hf.nll(network, batch).nats.sum()/batch.num_targets
    fit(network, hf, iter(lambda: batch, None), optimizer, total_steps=steps, save_every=10**6)
    network.eval()
    return before.item(), (hf.nll(network, batch).nats.sum()/batch.num_targets).item()


def frozen_hash(network): return weights_hash({k: v for k, v in frozen_weights(network).items()})


@pytest.mark.parametrize('name', ['llama', 'qwen2', 'gpt2'])
@pytest.mark.parametrize('method', ['full', 'lora', 'dora'])
def test_trained_saved_and_read_again(name, method, tmp_path):
    "The whole way: our loop, the adapters alone, merged, a folder, and AutoModelForCausalLM writes the same tokens."
    folder = save(name, tmp_path)
    network = open_pretrained(folder, seq_len=32)
    if method != 'full': add_peft(network, method=method, r=4, alpha=8, base=folder, seed=3)
    frozen = frozen_hash(network) if method != 'full' else None
    first, last = train(network, lr=3e-3 if method == 'full' else 1e-2)
    assert last < first-.03
    if method != 'full':
        assert frozen == frozen_hash(network)
        merged, row = merge_peft(network), rows()
        with torch.no_grad(): assert_close(merged(row), network(row), atol=1e-5, rtol=0)
    report = save_pretrained(network, folder, tmp_path/'out')
    assert report['drift'] == 0 and (report['merged_adapters'] > 0) == (method != 'full')
    theirs, tokenizer = transformers.AutoModelForCausalLM.from_pretrained(tmp_path/'out'), transformers.AutoTokenizer.from_pretrained(tmp_path/'out')
    assert tokenizer.encode('Grüße', add_special_tokens=False) == list('Grüße'.encode()) and theirs.generation_config.eos_token_id == 258
    prompts = [r[:n].tolist() for r, n in zip(rows(2, seed=5), (4, 9))]
    for p, ids in zip(prompts, hf.generate(network, prompts, max_new_tokens=12, temperature=0)):
        out = theirs.generate(torch.tensor([p]), attention_mask=torch.ones(1, len(p), dtype=torch.int64), do_sample=False, max_new_tokens=12, eos_token_id=None, pad_token_id=0)
        assert out[0, len(p):].tolist() == ids


@pytest.mark.parametrize('name', KINDS)
def test_built_again_from_json(name, tmp_path):
    network = open_pretrained(save(name, tmp_path), seq_len=48)
    again = build_pretrained(json.loads(json.dumps(network.shape.to_dict())))
    assert again.shape == network.shape and type(again.model) is type(network.model) and again.shape.seq_len == 48
    again.load_state_dict(network.state_dict())
    with torch.no_grad(): assert torch.equal(again(rows()), network(rows()))
    one, two, other = (from_shape(network.shape, seed=s).embed.weight for s in (0, 0, 1))
    assert torch.equal(one, two) and not torch.equal(one, other)
    assert str(tmp_path) not in json.dumps(network.shape.to_dict())


def test_adapters_alone_in_a_checkpoint(tmp_path):
    from llmlab.trainer.checkpoint import TrainState, capture, load_checkpoint, load_weights, save_checkpoint
    folder = save('llama', tmp_path)
    network = open_pretrained(folder)
    add_peft(network, r=4, alpha=8, base=folder)
    train(network)
    optimizer = build_optimizer(network, Optim(name='adamw'))
    save_checkpoint(tmp_path/'step-1', capture(TrainState(), network=network, optimizer=optimizer, model_config=network.shape.to_dict(), architecture='hf'))
    state = load_checkpoint(tmp_path/'step-1')
    assert state['model_state_dict'] and all('.lora_' in k for k in state['model_state_dict'])
    again = build_pretrained(state['model_config'], state['adapter'])
    load_weights(again, state)
    with torch.no_grad(): assert torch.equal(again(rows()), network(rows()))


def test_the_base_is_known_again(tmp_path):
    folder = save('llama', tmp_path)
    network = open_pretrained(folder)
    add_peft(network, r=2, base=folder)
    record = json.loads(json.dumps(network.adapter))
    build_pretrained(network.shape.to_dict(), record)
    (tmp_path/'moved').mkdir()
    for f in folder.iterdir(): f.rename(tmp_path/'moved'/f.name)
    with pytest.raises(ConfigError, match='config.json|does not exist'): build_pretrained(network.shape.to_dict(), record)
    assert build_pretrained(network.shape.to_dict(), record, base=tmp_path/'moved').adapter['base']['hash'] == record['base']['hash']
    from safetensors.torch import load_file, save_file
    weights = load_file(tmp_path/'moved'/'model.safetensors')
    weights['model.norm.weight'] += 1e-3
    save_file(weights, tmp_path/'moved'/'model.safetensors', metadata={'format': 'pt'})
    with pytest.raises(CheckpointError, match='not the model that the adapters were trained on'): build_pretrained(network.shape.to_dict(), record, base=tmp_path/'moved')


def test_adapters_begin_the_same_from_a_seed(tmp_path):
    folder = save('llama', tmp_path)
    def first(seed):
        network = open_pretrained(folder)
        state = torch.get_rng_state()
        add_peft(network, r=2, seed=seed)
        assert torch.equal(state, torch.get_rng_state()) # the run's own numbers are not drawn from
        return network.get_submodule('model.model.layers.0.self_attn.q_proj').lora_A.default.weight
    assert torch.equal(first(0), first(0)) and not torch.equal(first(0), first(1))


def test_a_merge_that_changes_the_scores_is_refused(tmp_path):
    network = open_pretrained(save('llama', tmp_path))
    add_peft(network, r=2)
    train(network)
    with pytest.raises(LlmlabError, match='differs by'): merge_peft(network, tolerance=0.)
    with pytest.raises(ConfigError, match='nothing to merge'): merge_peft(open_pretrained(tmp_path/'llama'))


def test_what_cannot_be_opened_says_why(tmp_path):
    folder = save('llama', tmp_path)
    config = json.loads((folder/'config.json').read_text())
    (folder/'config.json').write_text(json.dumps(config | {'model_type': 'mine', 'auto_map': {'AutoModelForCausalLM': 'evil.Model', 'AutoConfig': 'evil.Config'}}))
    (folder/'evil.py').write_text('raise SystemExit("it ran")')
    with pytest.raises(ConfigError, match='Only models that transformers itself knows'): open_pretrained(folder)
    (folder/'config.json').write_text(json.dumps(config))
    (folder/'model.safetensors').rename(folder/'w')
    torch.save({}, folder/'pytorch_model.bin') # pickles are not read
    with pytest.raises(ConfigError, match='safetensors'): open_pretrained(folder)
    with pytest.raises(ConfigError, match='kind of model'): open_pretrained(folder, kind='speech')
    (folder/'config.json').unlink()
    (folder/'adapter_config.json').write_text('{}')
    with pytest.raises(ConfigError, match='an adapter alone'): open_pretrained(folder)


def test_vocabulary_grows_for_the_end_of_text(tmp_path):
    small_ = dict(small) | {'vocab_size': 256, 'bos_token_id': None, 'eos_token_id': None, 'pad_token_id': None}
    for tie in (False, True):
        torch.manual_seed(0)
        transformers.LlamaForCausalLM(transformers.LlamaConfig(**small_, tie_word_embeddings=tie)).save_pretrained(tmp_path/str(tie))
        network, said = open_pretrained(tmp_path/str(tie)), []
        bytes_ = train_tokenizer([], TokenizerSettings(kind='byte'))
        grown = fit_vocabulary(network, bytes_, said.append)
        assert len(said) == 1 and 'from 256 to 259' in said[0]
        assert network.shape.vocab_size == len(network.head_weight) == network.model.config.vocab_size == 259
        assert (network.head_weight is network.embed.weight) == tie
        assert_close(network.embed.weight[258], network.embed.weight[:256].mean(0))
        again = build_pretrained(network.shape.to_dict())
        again.load_state_dict(network.state_dict())
        add_peft(network, r=2, train=grown, base=tmp_path/str(tie)) # its new rows must learn, though all else is frozen
        learn = {n for n, p in network.named_parameters() if p.requires_grad and '.lora_' not in n}
        assert learn == set(grown) and len(grown) == 2-tie
        row = torch.randint(256, (1, 12))
        row[:, -1] = 258
        train(network, batch=plain(row))
        reborn = build_pretrained(network.shape.to_dict(), network.adapter)
        reborn.load_state_dict({n: t for n, t in network.state_dict().items() if '.lora_' in n or 'embed' in n or 'lm_head' in n}, strict=False)
        with torch.no_grad(): assert torch.equal(reborn(row), network(row))
        with torch.no_grad(): assert_close(merge_peft(reborn)(row), network(row), atol=1e-5, rtol=1e-5)


def test_a_foreign_tokenizer_comes_back_as_it_was(tmp_path):
    "Special tokens that we invented for it, past the end of the model, do not go out with it."
    from llmlab.data.tokenizer import build_tokenizer
    from llmlab.models.pretrained import hf_tokenizer
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from tokenizers.trainers import BpeTrainer
    t = Tokenizer(models.BPE())
    t.pre_tokenizer, t.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    t.train_from_iterator(['the owl saw the fox'], BpeTrainer(vocab_size=270, show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), special_tokens=['<s>', '</s>']))
    t.post_processor = processors.TemplateProcessing(single='<s> $A', special_tokens=[('<s>', 0)])
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_object=t, bos_token='<s>', eos_token='</s>')
    theirs.save_pretrained(tmp_path)
    ours = build_tokenizer(TokenizerSettings(kind='hf', path=str(tmp_path)), None)
    assert ours.vocab_size > len(theirs)
    back = hf_tokenizer(ours, len(theirs))
    assert len(back) == len(theirs) and (back.bos_token, back.eos_token, back.pad_token) == ('<s>', '</s>', None)
    assert back.encode('the owl') == theirs.encode('the owl') and back.get_vocab() == theirs.get_vocab()


@pytest.mark.parametrize('kind', ['byte', 'char', 'bpe'])
def test_a_network_of_ours_as_a_llama(kind, tmp_path):
    "Out of the house: transformers alone gives the same ids, scores and words."
    from llmlab.models.ar import AR
    from llmlab.models.transformer import Shape, build
    from llmlab.models.zoo import to_llama
    text = 'the owl saw the fox. The fox laughed.'
    ours = train_tokenizer([text]*4, TokenizerSettings(kind=kind, vocab_size=280))
    ours.save(tmp_path/'checkpoint')
    network = build(Shape(ours.vocab_size, 64, 32, 2, 4, 2, 64, qk_norm=False), seed=1)
    assert save_pretrained(as_pretrained(to_llama(network)), tmp_path/'checkpoint', tmp_path/'out')['drift'] == 0
    theirs, tokenizer = transformers.AutoModelForCausalLM.from_pretrained(tmp_path/'out'), transformers.AutoTokenizer.from_pretrained(tmp_path/'out')
    ids = tokenizer(text, add_special_tokens=False, return_tensors='pt')
    assert ids['input_ids'][0].tolist() == ours.encode(text) and tokenizer.decode(ids['input_ids'][0]) == text
    assert (theirs.generation_config.eos_token_id, theirs.generation_config.pad_token_id) == (ours.eos_id, ours.pad_id)
    with torch.no_grad(): assert_close(theirs(ids['input_ids']).logits, network(ids['input_ids']), atol=1e-5, rtol=1e-5)
    out = theirs.generate(ids['input_ids'], attention_mask=ids['attention_mask'], do_sample=False, max_new_tokens=10)[0, ids['input_ids'].shape[1]:].tolist()
    new = AR().generate(network, [ours.encode(text)], max_new_tokens=10, temperature=0, stop_id=ours.eos_id)[0]
    assert out[:len(new)] == new and out[len(new):] in ([], [ours.eos_id])


def test_memory_can_be_saved_by_computing_again(tmp_path):
    network = open_pretrained(save('llama', tmp_path))
    add_peft(network, r=2)
    batch, found = packed(rows(2)), []
    for how in ('none', 'full', 'none'):
        network.recompute = how
        assert any(getattr(m, 'gradient_checkpointing', False) for m in network.modules()) == (how == 'full')
        network.train().zero_grad()
        hf.loss(network, batch).sum.backward()
        found.append(network.get_submodule('model.model.layers.0.self_attn.q_proj').lora_B.default.weight.grad.clone())
    assert torch.equal(found[0], found[1]) and torch.equal(found[1], found[2])
