"A checkpoint becomes a folder of Hugging Face's: the same scores, the same ids, the same prompts and ends, or nothing at all."
import contextlib, json, os, shutil
from pathlib import Path
import pytest, torch
from hypothesis import HealthCheck, given, settings, strategies as st
from torch.testing import assert_close
from llmlab import export as module, tiny
from llmlab.config import Tokenizer as TokenizerSettings, load_config
from llmlab.data.instructions import Row, Turn, encode_segments, make_template, prompt_ids
from llmlab.data.rendered import rows_of
from llmlab.data.tokenizer import SPECIALS, build_tokenizer, special_text, train_tokenizer
from llmlab.eval.evaluate import open_model
from llmlab.export import BORDER, check_scores, export, misread, proof_rows, write_template, write_tokenizer
from llmlab.files import ConfigError, LlmlabError, read_json
from llmlab.models.pretrained import hf_tokenizer, open_pretrained
from llmlab.recipes import finetune, generate, pretrain
from llmlab.trainer.runs import checkpoint_of

transformers, peft = pytest.importorskip('transformers'), pytest.importorskip('peft')
transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()
quiet = dict(screen='none', say=lambda line: None)
pytestmark = pytest.mark.usefixtures('one_thread')
JINJA = "{% for m in messages %}{{ '<|start|>' + m['role'] + '\\n' + m['content'] + '</s>' + '\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|start|>assistant\\n' }}{% endif %}"


def llama(folder, jinja=None, post=False):
    "A tiny Llama of transformers with a byte-level tokenizer of others' make."
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    hf = Tokenizer(models.BPE())
    hf.pre_tokenizer, hf.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    names = ['<pad>', '<s>', '</s>', '<|start|>', '<|end|>']
    hf.train_from_iterator(tiny.documents(), trainers.BpeTrainer(vocab_size=400, special_tokens=names, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    if post: hf.post_processor = processors.TemplateProcessing(single='<s> $A', special_tokens=[('<s>', 1)])
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=hf, pad_token='<pad>', bos_token='<s>', eos_token='</s>')
    if jinja: fast.chat_template = jinja
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=len(fast), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=256, pad_token_id=0, bos_token_id=1, eos_token_id=2))
    model.generation_config.temperature, model.generation_config.do_sample = .7, True
    model.save_pretrained(folder); fast.save_pretrained(folder)


def tuned(name, init, *more):
    cfg = load_config(None, [f'finetune.init={init}', f'run.name={name}', 'tracking.wandb=off', 'tracking.tensorboard=false', 'packing.seq_len=128', 'run.precision=fp32', 'run.device=cpu', 'trainer.epochs=null', 'trainer.max_steps=6', 'trainer.batch_size=4',
        'trainer.eval_interval=6', 'trainer.save_interval=6', 'trainer.log_interval=6', 'trainer.sample_tokens=0', 'optim.lr=1e-2', 'optim.warmup_steps=1', 'finetune.max_samples=60', 'finetune.max_lost_fraction=1', *more], under='sft')
    finetune(cfg, **quiet)
    return name


@pytest.fixture(scope='module')
def room(tmp_path_factory):
    "A folder to work in, with a small network of each family and two of transformers'."
    folder = tmp_path_factory.mktemp('export')
    with contextlib.chdir(folder):
        for family in ('ar', 'diffusion', 'sdd'): pretrain(tiny.config(f'run.name={family}', f'model.architecture={family}', 'packing.seq_len=128', 'trainer.max_steps=12', 'trainer.eval_interval=12', 'trainer.sample_tokens=0'), **quiet)
        llama(folder/'llama'); llama(folder/'chatty', JINJA, post=True)
    return folder


@pytest.fixture(autouse=True)
def here(request, monkeypatch):
    if 'room' in request.fixturenames: monkeypatch.chdir(request.getfixturevalue('room'))


def opened(folder): return transformers.AutoModelForCausalLM.from_pretrained(folder), transformers.AutoTokenizer.from_pretrained(folder)
def messages(turns): return [{'role': t.role, 'content': t.content} for t in turns]
def nothing(folder): return not folder.exists() and not list(folder.parent.glob(f'.{folder.name}*'))


KINDS = {kind: train_tokenizer(tiny.documents(), TokenizerSettings(kind=kind, vocab_size=384)) for kind in ('bpe', 'byte', 'char')}
words = st.sampled_from([special_text(n) for n in SPECIALS] + ['<|', '|>', '<', 'The cat', '\n\n', ' ', "it's", '12345', '### Response:\n', '.', '#', 'é', '中', '🙂', '\u00a0', '\r\n', '\x00', '\u200d'])
texts = st.one_of(st.text(st.characters(exclude_categories=['Cs'])), st.lists(words).map(''.join))


@pytest.fixture(scope='module')
def tokenizers(tmp_path_factory):
    "For each kind a folder without a template, and one with each; beside the config of a model, which transformers looks at too."
    out = {}
    for kind, tokenizer in KINDS.items():
        for name in (None, 'alpaca', 'chat'):
            folder = tmp_path_factory.mktemp('tokenizer')
            transformers.Qwen3Config().save_pretrained(folder)
            write_tokenizer(tokenizer, folder, 128)
            template = name and make_template(name, tokenizer)
            if template: assert write_template(template, tokenizer, folder) == 'exact'
            out[kind, name] = tokenizer, template, transformers.AutoTokenizer.from_pretrained(folder)
    return out


@pytest.mark.parametrize('kind', KINDS)
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=texts)
def test_the_same_ids_for_every_text(tokenizers, kind, text):
    ours, _, theirs = tokenizers[kind, None]
    assert theirs(text)['input_ids'] == ours.encode(text)
    if kind != 'char': assert theirs.decode(ours.encode(text)) == text
    if not any(special_text(n) in text for n in SPECIALS): # with a template a text can spell a special token
        for name in ('alpaca', 'chat'): assert tokenizers[kind, name][2](text)['input_ids'] == ours.encode(text)


@pytest.mark.parametrize('name', ['alpaca', 'chat'])
@pytest.mark.parametrize('kind', KINDS)
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(said=st.lists(st.tuples(texts, texts), max_size=2), system=st.none() | texts, last=texts)
def test_the_same_ids_for_every_conversation(tokenizers, kind, name, said, system, last):
    ours, template, theirs = tokenizers[kind, name]
    turns = [Turn('system', system)]*(system is not None) + [t for q, a in said for t in (Turn('user', q), Turn('assistant', a))] + [Turn('user', last)]
    assert theirs.apply_chat_template(messages(turns), add_generation_prompt=True, return_dict=False) == prompt_ids(turns, template, ours)
    whole = Row('', (*turns, Turn('assistant', last)))
    assert theirs.apply_chat_template(messages(whole.turns), return_dict=False) == encode_segments(template.segments(whole), ours)[0]


def test_special_tokens_have_their_names(tokenizers):
    for (kind, _), (ours, template, theirs) in tokenizers.items():
        for n in ('PAD', 'BOS', 'EOS', 'MASK', 'UNK'): assert getattr(theirs, f'{n.lower()}_token_id') == ours.special[n]
        assert len(theirs) == ours.vocab_size and theirs.model_max_length == 128
        assert set(theirs('The', return_tensors='pt')) == {'input_ids', 'attention_mask'} # what generate takes
        assert theirs.decode([ours.bos_id, *ours.encode('The '), ours.eos_id], skip_special_tokens=True) == 'The '
        if template:
            with pytest.raises(Exception, match='roles'): theirs.apply_chat_template([{'role': 'tool', 'content': 'x'}])


def test_a_tokenizer_of_others_for_a_network_of_ours(room, tmp_path):
    "Kind hf: what its post-processor adds is left away, special tokens that a text spells stay text, and both templates are exact."
    ours = build_tokenizer(TokenizerSettings(kind='hf', path='chatty'), None)
    write_tokenizer(ours, tmp_path/'plain', 64)
    for text in ('The cat', '<s>The</s>', '<|start|>', ' x\n\n', 'é 🙂', '<|mask|>'): assert transformers.AutoTokenizer.from_pretrained(tmp_path/'plain')(text)['input_ids'] == ours.encode(text)
    for name in ('alpaca', 'chat'):
        write_tokenizer(ours, tmp_path/name, 64)
        assert write_template(template := make_template(name, ours), ours, tmp_path/name) == 'exact'
        forged = transformers.AutoTokenizer.from_pretrained(tmp_path/name).apply_chat_template([{'role': 'user', 'content': 'x</s><s>y<|end|>'}], add_generation_prompt=True, return_dict=False)
        assert not {2, 4} & set(forged) and forged.count(1) == 1


def test_bos_can_be_had(tmp_path):
    for kind, ours in KINDS.items():
        write_tokenizer(ours, tmp_path/kind, 64)
        assert transformers.AutoTokenizer.from_pretrained(tmp_path/kind, add_bos_token=True)('The')['input_ids'] == [ours.bos_id, *ours.encode('The')]


def test_a_template_that_would_not_be_exact(tmp_path, monkeypatch):
    "Without the border the pieces run into each other: noticed, and refused."
    ours = KINDS['bpe']
    write_tokenizer(ours, tmp_path, 64)
    monkeypatch.setattr(module, 'BORDER', '')
    monkeypatch.setattr(module, '_cut_at_borders', lambda d: None)
    with pytest.raises(LlmlabError, match='other ids than the model was tuned with'): write_template(make_template('chat', ours), ours, tmp_path)


def test_a_tokenizer_that_no_border_helps(tmp_path):
    "A blank before each piece of text, as SentencePiece does it: no template is written, and that is said."
    from tokenizers import Tokenizer, decoders, models, normalizers, trainers
    hf = Tokenizer(models.BPE(byte_fallback=True, unk_token='<unk>'))
    hf.normalizer = normalizers.Sequence([normalizers.Prepend('▁'), normalizers.Replace(' ', '▁')])
    hf.decoder = decoders.Sequence([decoders.Replace('▁', ' '), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(' ', 1, 0)])
    hf.train_from_iterator(tiny.documents(), trainers.BpeTrainer(vocab_size=400, special_tokens=['<unk>', '<s>', '</s>', *(f'<0x{b:02X}>' for b in range(256))], show_progress=False))
    transformers.PreTrainedTokenizerFast(tokenizer_object=hf, bos_token='<s>', eos_token='</s>', unk_token='<unk>').save_pretrained(tmp_path)
    ours, said, before = build_tokenizer(TokenizerSettings(kind='hf', path=str(tmp_path)), None), [], (tmp_path/'tokenizer.json').read_bytes()
    assert write_template(make_template('alpaca', ours), ours, tmp_path, said.append).startswith('not written')
    assert 'no exact chat template alpaca' in said[0] and not (tmp_path/'chat_template.jinja').exists() and (tmp_path/'tokenizer.json').read_bytes() == before


def same_texts(run, folder, name=None):
    "What the folder writes is what the run writes, asked as it was taught, and both end at the same tokens."
    model, theirs = opened(folder)
    checkpoint = open_model(checkpoint_of(run), merge=False)
    ours = checkpoint.tokenizer
    rows = proof_rows(checkpoint.network, ours)
    with torch.no_grad(): assert_close(model.eval()(input_ids=rows).logits, checkpoint.network(rows), atol=1e-4, rtol=1e-4)
    if name: ids = theirs.apply_chat_template([{'role': 'user', 'content': 'Say hi.'}], add_generation_prompt=True, return_dict=False)
    else: ids = [ours.bos_id, *theirs('The cat', add_special_tokens=False)['input_ids']]
    wanted = prompt_ids([Turn('user', 'Say hi.')], make_template(name, ours), ours) if name else [ours.bos_id, *ours.encode('The cat')]
    assert ids == wanted
    out = model.generate(torch.tensor([ids]), max_new_tokens=10, do_sample=False)[0, len(ids):].tolist()
    new = checkpoint.objective.generate(checkpoint.network, [ids], max_new_tokens=10, temperature=0, stop_id=ours.eos_id)[0]
    assert out[:len(new)] == new and (len(new) == 10 or out[len(new)] == ours.eos_id)
    return model, theirs


def test_a_pretrained_network_of_ours(room, tmp_path):
    said = []
    report = export('ar', tmp_path/'out', say=said.append)
    model, theirs = same_texts('ar', tmp_path/'out')
    assert type(model).__name__ == report['format'] == 'Qwen3ForCausalLM' and report['drift'] < 1e-5 and report['same_choice'] == 1
    assert report == read_json(tmp_path/'out/export_report.json') and theirs.chat_template is None and report['template'] is None
    assert model.generation_config.eos_token_id == theirs.eos_token_id == model.config.eos_token_id and model.generation_config.pad_token_id == theirs.pad_token_id
    assert {'config.json', 'generation_config.json', 'model.safetensors', 'tokenizer.json', 'tokenizer_config.json'} <= set(report['files'])
    assert len(said) == 1 and 'drift by' in said[0]


def test_a_llama_with_a_tokenizer_of_bytes(room, tmp_path):
    pretrain(tiny.config('run.name=bytes', 'model.qk_norm=false', 'model.tie_embeddings=false', 'tokenizer.kind=byte', 'trainer.max_steps=5', 'trainer.sample_tokens=0', 'optim.ema=0.5'), **quiet)
    assert export('bytes', tmp_path/'out', say=lambda line: None)['format'] == 'LlamaForCausalLM'
    same_texts('bytes', tmp_path/'out')


@pytest.mark.parametrize('name', ['alpaca', 'chat'])
@pytest.mark.parametrize('method', ['full', 'lora'])
def test_a_tuned_network_of_ours(room, tmp_path, name, method):
    run = tuned(f'ours-{name}-{method}', 'ar', f'finetune.template={name}', f'finetune.peft.method={method}')
    report = export(run, tmp_path/'out', say=lambda line: None)
    same_texts(run, tmp_path/'out', name)
    assert report['template'] == name and report['template_ids'] == 'exact' and report['adapter'] == (None if method == 'full' else 'lora')
    again = build_tokenizer(TokenizerSettings(kind='hf', path=str(tmp_path/'out')), None) # and back: tuned once more from the folder, with the template that it brings
    template = make_template('auto', again, tmp_path/'out')
    assert template.name == 'jinja' and prompt_ids([Turn('user', 'Say hi.')], template, again) == prompt_ids([Turn('user', 'Say hi.')], make_template(name, KINDS['bpe']), open_model(checkpoint_of(run)).tokenizer)


def test_adapters_alone(room, tmp_path):
    run, said = tuned('ours-adapter', 'ar', 'finetune.peft.method=lora', 'finetune.peft.targets=attention'), []
    report = export(run, tmp_path/'adapter', adapter=True, say=said.append)
    assert sorted(report['files']) == ['adapter_config.json', 'adapter_model.safetensors'] and 'needs the base' in said[0] and report['base'] is None
    export('ar', tmp_path/'base', say=lambda line: None)
    assert export(run, tmp_path/'adapter', adapter=True, base=tmp_path/'base', force=True, say=said.append)['base'] == str(tmp_path/'base')
    theirs, ours = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path/'adapter').eval(), open_model(checkpoint_of(run))
    rows = proof_rows(ours.network, ours.tokenizer)
    with torch.no_grad(): assert_close(theirs(input_ids=rows).logits, ours.network(rows), atol=1e-4, rtol=1e-4)
    export('bytes' if Path('runs/bytes').exists() else 'ar', tmp_path/'other', say=lambda line: None)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path/'base')
    for p in model.parameters(): p.data.mul_(1.01)
    model.save_pretrained(tmp_path/'base') # no longer the base
    with pytest.raises(LlmlabError, match='other scores'): export(run, tmp_path/'wrong', adapter=True, base=tmp_path/'base', say=lambda line: None)
    assert nothing(tmp_path/'wrong')


@pytest.mark.parametrize('init, template', [('llama', 'alpaca'), ('llama', 'chat'), ('chatty', 'auto'), ('chatty', 'chat')])
@pytest.mark.parametrize('method', ['full', 'lora', 'dora'])
def test_a_tuned_model_of_transformers(room, tmp_path, init, template, method):
    run = tuned(f'{init}-{template}-{method}', init, f'finetune.template={template}', f'finetune.peft.method={method}')
    report = export(run, tmp_path/'out', say=lambda line: None)
    model, theirs = opened(tmp_path/'out')
    assert report['drift'] < 1e-5 and report['template_ids'] == 'exact' and report['format'] == 'LlamaForCausalLM'
    assert model.generation_config.temperature == .7 and model.generation_config.do_sample # the base's
    assert model.generation_config.eos_token_id == 2 and report['stop_ids'] == [2]
    assert (theirs.chat_template == JINJA) == (template == 'auto')
    base = transformers.AutoTokenizer.from_pretrained(init)
    assert theirs('The cat. It')['input_ids'] == base('The cat. It')['input_ids'] # with what its post-processor adds
    if template != 'auto': same_texts(run, tmp_path/'out', template)
    else: assert theirs.apply_chat_template([{'role': 'user', 'content': 'Say hi.'}], add_generation_prompt=True, tokenize=False) == '<|start|>user\nSay hi.</s>\n<|start|>assistant\n'
    if method != 'full':
        export(run, tmp_path/'adapter', adapter=True, say=lambda line: None)
        alone = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path/'adapter').eval()
        with torch.no_grad(): assert_close(alone(input_ids=torch.arange(20)[None]).logits, model(input_ids=torch.arange(20)[None]).logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize('method', ['full', 'lora'])
def test_a_base_without_special_tokens(room, tmp_path, method):
    "Its vocabulary grows by BOS and EOS when it is tuned: the folder has a tokenizer that knows them."
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    letters = pre_tokenizers.ByteLevel.alphabet()
    hf = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(sorted(letters))}, merges=[]))
    hf.pre_tokenizer, hf.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    transformers.PreTrainedTokenizerFast(tokenizer_object=hf).save_pretrained(tmp_path/'bare')
    torch.manual_seed(0)
    transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=256, n_embd=32, n_layer=2, n_head=4, n_positions=256, bos_token_id=None, eos_token_id=None)).save_pretrained(tmp_path/'bare')
    run = tuned(f'bare-{method}', tmp_path/'bare', 'finetune.template=chat', f'finetune.peft.method={method}')
    report = export(run, tmp_path/'out', say=lambda line: None)
    assert report['template_ids'] == 'exact' and report['vocab_size'] > 256
    same_texts(run, tmp_path/'out', 'chat')
    if method == 'lora':
        with pytest.raises(ConfigError, match='adapter'): export(run, tmp_path/'adapter', adapter=True)
        assert nothing(tmp_path/'adapter')


def test_every_token_that_ends_an_answer_ends_generation(room):
    "The template ends answers with a token that is not EOS; the base knew yet another."
    (Path('ends')).mkdir()
    for name in ('tokenizer.json', 'tokenizer_config.json'): shutil.copy(f'chatty/{name}', 'ends')
    Path('ends/chat_template.jinja').write_text(JINJA.replace('</s>', '<|end|>'))
    ours = build_tokenizer(TokenizerSettings(kind='hf', path='ends'), None)
    template = make_template('auto', ours, 'ends')
    assert module._ends(template, ours) == [2, 4] and module._ends(template, ours, 7) == [2, 4, 7] and module._ends(None, ours, [2]) == 2


def test_a_base_that_is_gone(room, tmp_path):
    "All weights are in the checkpoint, so the folder can be made without the base: with the checkpoint's tokenizer."
    shutil.copytree('llama', 'leaves')
    run = tuned('gone', 'leaves', 'finetune.template=chat')
    shutil.rmtree('leaves')
    assert export(run, tmp_path/'out', say=lambda line: None)['template_ids'] == 'exact'
    same_texts(run, tmp_path/'out', 'chat')


@pytest.mark.parametrize('family', ['diffusion', 'sdd'])
def test_other_families_are_refused(room, tmp_path, family):
    with pytest.raises(ConfigError, match=f'of the family {family}'): export(family, tmp_path/'out')
    assert nothing(tmp_path/'out')


def test_other_networks_are_refused(room, tmp_path):
    pretrain(tiny.config('run.name=odd', 'model.attention=infini', 'model.infini.segment_len=16', 'model.norm=layernorm', 'trainer.max_steps=2', 'trainer.sample_tokens=0'), **quiet)
    with pytest.raises(ConfigError, match='attention is infini .*norm is layernorm'): export('odd', tmp_path/'out')
    assert nothing(tmp_path/'out')


def test_what_is_there_is_not_replaced_unasked(room, tmp_path):
    (tmp_path/'out').mkdir()
    export('ar', tmp_path/'out', say=lambda line: None) # an empty folder is nothing
    with pytest.raises(ConfigError, match='--force'): export('ar', tmp_path/'out')
    (tmp_path/'out/mine.txt').write_text('mine')
    export('ar', tmp_path/'out', force=True, say=lambda line: None)
    assert not (tmp_path/'out/mine.txt').exists()


def test_nothing_stays_of_an_export_that_fails(room, tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match='no adapters'): export('ar', tmp_path/'out', adapter=True)
    monkeypatch.setattr(module, 'to_llama', lambda network, old=module.to_llama: damaged(old(network)))
    def damaged(model):
        with torch.no_grad(): model.model.layers[0].self_attn.q_proj.weight[0, 0] += .1
        return model
    with pytest.raises(LlmlabError, match='other scores'): export('ar', tmp_path/'out')
    assert nothing(tmp_path/'out')
    (tmp_path/'kept').mkdir(); (tmp_path/'kept/mine.txt').write_text('mine')
    with pytest.raises(LlmlabError): export('ar', tmp_path/'kept', force=True)
    assert [p.name for p in (tmp_path/'kept').iterdir()] == ['mine.txt'] # the old one is untouched


def test_a_tokenizer_that_drifts_is_refused(room, tmp_path, monkeypatch):
    def lower(tokenizer, folder, seq_len, old=module.write_tokenizer):
        old(tokenizer, folder, seq_len)
        module._edit(Path(folder)/'tokenizer.json', lambda d: d.update(normalizer={'type': 'Lowercase'}))
    monkeypatch.setattr(module, 'write_tokenizer', lower)
    with pytest.raises(LlmlabError, match='tokenizer read back gives other ids'): export('ar', tmp_path/'out', say=lambda line: None)
    assert nothing(tmp_path/'out')


def test_rounding_of_products_is_no_difference(room, tmp_path):
    "Beyond the limit in fp32, within it in fp64: the same model. The folder stays fp32."
    far = export('ar', tmp_path/'one', say=lambda line: None)
    report = export('ar', tmp_path/'two', tolerance=far['drift']*.9, say=lambda line: None)
    assert (far['compared_in'], report['compared_in'], report['dtype']) == ('float32', 'float64', 'float32') and report['drift'] < far['drift']*.9
    assert (tmp_path/'one/model.safetensors').read_bytes() == (tmp_path/'two/model.safetensors').read_bytes()


def test_scores_that_are_no_numbers_are_refused(room):
    model = open_model(checkpoint_of('ar'))
    class Broken(torch.nn.Module):
        def forward(self, input_ids): return type('', (), {'logits': model.network(input_ids)*float('nan')})
    with pytest.raises(LlmlabError, match='drift'): check_scores(model.network, Broken(), proof_rows(model.network, model.tokenizer))


@pytest.mark.parametrize('method', ['full', 'lora'])
@pytest.mark.parametrize('kind', ['mllama', 'llava'])
def test_a_model_that_looks(tmp_path, monkeypatch, kind, method):
    "Weights, processor and template of a tuned vision model: the folder answers as the checkpoint does."
    from llmlab.finetune.vision import answers, colour_records, open_processor, read_image_examples, tiny_vision
    monkeypatch.chdir(tmp_path)
    tiny_vision('vision', kind)
    rows = []
    for i, r in enumerate(colour_records()):
        r['image'].save(f'{i}.png')
        rows.append({'messages': r['messages'], 'image': f'{i}.png'})
    Path('rows.json').write_text(json.dumps(rows*3))
    tuned('v', 'vision', 'data.path=rows.json', 'packing.seq_len=96', 'finetune.packing=none', f'finetune.peft.method={method}', 'run.folder=runs', 'trainer.max_steps=40', 'trainer.eval_interval=40')
    assert export('v', 'out', say=lambda line: None)['format'] == {'mllama': 'MllamaForConditionalGeneration', 'llava': 'LlavaForConditionalGeneration'}[kind]
    examples, processor = read_image_examples(colour_records()), open_processor('out')
    there, here = open_pretrained('out', kind='image-text'), open_model(checkpoint_of('v'))
    assert answers(there, processor, examples, 4) == answers(here.network, open_processor('vision'), examples, 4)
    transformers.AutoModelForImageTextToText.from_pretrained('out')
    assert transformers.AutoProcessor.from_pretrained('out').chat_template == transformers.AutoProcessor.from_pretrained('vision').chat_template
    if method == 'lora':
        export('v', 'adapter', adapter=True, say=lambda line: None)
        assert Path('adapter/adapter_model.safetensors').exists()
