"Sizes, presets, and weights to Hugging Face's Llama and Qwen3 and back."
import json, typing
import pytest, torch
from pathlib import Path
from types import SimpleNamespace
from torch.testing import assert_close
from llmlab import recipes
from llmlab.config import FAMILIES, Model, load_config
from llmlab.files import CheckpointError, ConfigError, DataError, LlmlabError
from llmlab.models.layers import rotation
from llmlab.models.transformer import Shape, build, count_parameters, flops_per_token
from llmlab.trainer.runs import next_commands
from llmlab.models.zoo import OBJECTIVES, SIZES, build_model, from_llama, llama_kind, make_objective, shape_of, to_llama


pytestmark = pytest.mark.usefixtures('one_thread')


presets = sorted(p.stem for p in (Path(__file__).parent.parent/'llmlab/configs').glob('*.yaml'))
base = dict(vocab_size=60, seq_len=32, d_model=48, num_layers=3, num_heads=6, num_kv_heads=2, d_ff=80, qk_norm=False)


@pytest.mark.parametrize('name', SIZES)
def test_sizes(name):
    size = SIZES[name]
    net = build(shape_of(Model(size=name), size['vocab_size'], 1024), device='meta')
    count = sum(p.numel() for p in net.parameters())
    assert count == count_parameters(net.shape)
    documented = {'small': 25e6, 'medium': 50e6, 'large': 125e6, 'xl': 300e6, '415m': 415e6}
    if name in documented: assert abs(count/documented[name]-1) < .03
    assert net.shape.head_size % 8 == 0 # what fused kernels ask for
    # work is about six operations a parameter, and attention
    assert abs(flops_per_token(net.shape, 1)/(6*count)-1) < .02


def test_the_config_knows_the_same_sizes_and_families():
    assert set(typing.get_args(Model.model_fields['size'].annotation)) == set(SIZES)
    known, any_name = typing.get_args(Model.model_fields['architecture'].annotation)
    assert any_name is str and list(typing.get_args(known)) == FAMILIES == list(OBJECTIVES)


@pytest.mark.parametrize('preset', presets)
def test_presets_are_built(preset):
    cfg = load_config(preset, [])
    vocab_size = cfg.tokenizer.vocab_size if cfg.tokenizer.kind in ('bpe', 'hf') else 300
    network, objective = build_model(cfg, vocab_size, device='meta')
    assert network.shape.seq_len == cfg.packing.seq_len and objective.name == cfg.model.architecture
    if preset in SIZES: assert cfg.tokenizer.vocab_size == SIZES[preset]['vocab_size']


MINE = '''
from llmlab.models.ar import AR
from llmlab.models.zoo import add_family
class Mine(AR):
    name = 'mine'
    def __init__(self, ahead=2): self.ahead = ahead
add_family('mine', lambda model, special, seed, rows: Mine(**model.own))
'''

@pytest.fixture
def mine(tmp_path):
    "A file with a family, which nobody knows before and after."
    (tmp_path/'mine.py').write_text(MINE)
    yield tmp_path/'mine.py'
    OBJECTIVES.pop('mine', None)
    if 'mine' in FAMILIES: FAMILIES.remove('mine')


def test_a_family_of_ones_own(mine, monkeypatch):
    settings = lambda *o: load_config('tiny_test', ['model.architecture=mine', f'model.file={mine}', *o])
    own = settings('model.own.ahead=3').model
    with pytest.raises(ConfigError, match='not known here.*LLMLAB_FAMILY'): make_objective(own, {}) # settings that come with a checkpoint run nothing
    assert build_model(settings('model.own.ahead=3'), 300, 'meta')[1].ahead == 3
    with pytest.raises(ConfigError, match='cannot be built from model.own'): build_model(settings('model.own.behind=3'), 300, 'meta')
    OBJECTIVES.pop('mine'); FAMILIES.remove('mine')
    mine.write_text(MINE+'#')
    monkeypatch.setenv('LLMLAB_FAMILY', str(mine))
    assert make_objective(own, {}).name == 'mine'


def test_the_family_of_the_tutorial_is_a_file(tmp_path, monkeypatch):
    "The cells that the tutorial marks, one after the other, are a file that settings can name."
    book = json.loads((Path(__file__).parent.parent/'nbs/tutorials/add_family.ipynb').read_text())
    cells = [''.join(c['source']) for c in book['cells'] if c['cell_type'] == 'code']
    (tmp_path/'ahead.py').write_text('\n\n'.join(c for c in cells if c.startswith('# ahead.py')))
    (tmp_path/'ahead.yaml').write_text('base: tiny_test\nmodel: {architecture: ahead, file: ahead.py, own: {ahead: 3}}\n')
    folders = [f'run.folder={tmp_path}/runs', f'packing.folder={tmp_path}/cache']
    quiet = dict(screen='none', say=lambda line: None)
    try:
        cfg = load_config(tmp_path/'ahead.yaml', [*folders, 'run.name=a', 'trainer.max_steps=2', 'data.max_documents=200', 'tokenizer.vocab_size=300', 'run.threads=1', 'trainer.sample_tokens=4', 'tracking.tensorboard=false', 'tracking.wandb=off'])
        assert recipes.pretrain(cfg, **quiet).state.global_step == 2
        OBJECTIVES.pop('ahead'); FAMILIES.remove('ahead') # another day
        (tmp_path/'ahead.py').write_text((tmp_path/'ahead.py').read_text()+'\n')
        more = ['trainer.max_steps=3', f'model.file={tmp_path}/ahead.py']
        with pytest.raises(ConfigError, match=r'name a Python file(.|\n)*model.file=.*ahead.py'): recipes.resume_settings('a', more[:1], tmp_path/'runs') # who names a run has not named its file
        cfg, folder = recipes.resume_settings('a', more, tmp_path/'runs')
        assert recipes.pretrain(cfg, resume=folder, **quiet).state.global_step == 3
        assert recipes.resume_settings('a', [], tmp_path/'runs')[0].model.file == f'{tmp_path}/ahead.py' # it was named in this session
        assert next_commands(folder)[0].startswith(f'LLMLAB_FAMILY={tmp_path}/ahead.py llmlab_generate')
        (network, objective, _, _), _ = recipes.open_trained('a', runs=tmp_path/'runs')
        assert objective.ahead == 3 and len(network.extras) == 2
        OBJECTIVES.pop('ahead'); FAMILIES.remove('ahead')
        with pytest.raises(CheckpointError, match=r"family 'ahead'(.|\n)*LLMLAB_FAMILY=.*ahead.py"): recipes.open_trained('a', runs=tmp_path/'runs') # its settings name the file, and nothing runs it
        (tmp_path/'again.py').write_text((tmp_path/'ahead.py').read_text())
        monkeypatch.setenv('LLMLAB_FAMILY', str(tmp_path/'again.py'))
        assert recipes.open_trained('a', runs=tmp_path/'runs')[0].objective.name == 'ahead'
        assert recipes.resume_settings('a', [], tmp_path/'runs')[0].model.file == f'{tmp_path}/again.py' # the one that was named
    finally:
        OBJECTIVES.pop('ahead', None)
        if 'ahead' in FAMILIES: FAMILIES.remove('ahead')


def test_a_run_that_was_sent_runs_nothing(tmp_path, monkeypatch):
    "Its settings name files beside them: resuming, the menu's checks, the doctor and lists read them as names."
    from llmlab.launch import doctor, menu
    from llmlab.trainer.runs import card
    monkeypatch.chdir(tmp_path)
    sent = tmp_path/'runs'/'sent'
    sent.mkdir(parents=True)
    for own, key in (("model: {architecture: mine, file: evil.py}", 'model.file'), ("data: {name: file, file: evil.py}", 'data.file')):
        (sent/'config.yaml').write_text(own)
        (sent/'evil.py').write_text(f"open({str(tmp_path/'ran')!r}, 'w')\ndef documents(): return []\n")
        with pytest.raises(ConfigError, match=rf'name a Python file(.|\n)*{key}=.*evil.py'): recipes.resume_settings('sent')
        shown, answers = [], iter(['1', 'n', 'q'])
        assert menu.menu(lambda q: shown.append(q) or next(answers), shown.append) is None
        assert any('evil.py' in str(s) for s in shown), shown
        doctor.check_run(sent), doctor.check_cache(doctor.plan_of(None, runs=['sent'])), card(sent)
        assert not (tmp_path/'ran').exists()
    told = load_config('tiny_test', ['data.name=file', f'data.file={sent/"evil.py"}']).to_dict() # and scoring it
    with pytest.raises(DataError, match='came with it and would run'): recipes.held_out(SimpleNamespace(info={'train_config': told, 'path': sent/'checkpoints'/'step-00000001'}))
    assert not (tmp_path/'ran').exists()


def test_what_is_no_family(mine):
    settings = load_config('tiny_test', ['model.architecture=mine', f'model.file={mine}'])
    for text, said in (("add_family('mine', lambda *a: object())", 'lacks name, causal'), ("add_family('mine', lambda *a: AR())", "name 'ar'"), ("add_family('his', AR)", "adds no family 'mine'"),
                       ("add_family('m-1', AR)", 'letters, digits and _'), ("add_family('sdd', AR)", 'another name'), ('1/0', r'mine.py raised an error(.|\n)*ZeroDivisionError')):
        OBJECTIVES.pop('mine', None)
        mine.write_text(f'from llmlab.models.zoo import AR, add_family\n{text}')
        with pytest.raises(LlmlabError, match=said): build_model(settings, 300, 'meta')
    OBJECTIVES.pop('his'); FAMILIES.remove('his')
    mine.unlink()
    with pytest.raises(ConfigError, match='cannot be read'): build_model(settings, 300, 'meta')
    with pytest.raises(ConfigError, match="should be 'ar'.*model.file"): load_config('tiny_test', ['model.architecture=mein'])


def test_overrides():
    s = shape_of(Model(size='small', d_model=192, num_heads=3, num_layers=2, norm='layernorm', position='learned', tie_embeddings=False), 100, 64)
    assert (s.d_model, s.num_heads, s.num_kv_heads, s.num_layers, s.d_ff) == (192, 3, 3, 2, 512)
    assert (s.norm, s.position, s.tie_embeddings, s.vocab_size, s.seq_len) == ('layernorm', 'learned', False, 100, 64)
    assert shape_of(Model(size='415m'), 100, 64).num_kv_heads == 6 and shape_of(Model(size='415m', num_heads=6), 100, 64).num_kv_heads == 6
    with pytest.raises(ConfigError, match='num_heads 6 is not a multiple of num_kv_heads 4'): shape_of(Model(size='small', num_kv_heads=4), 100, 64)


def test_the_seed_and_recomputing_come_from_the_config():
    a, b = (build_model(load_config('tiny_test', [f'run.seed={s}', 'trainer.gradient_checkpointing=full']), 300)[0] for s in (1, 2))
    assert a.recompute == 'full' and not torch.equal(a.embed.weight, b.embed.weight)


def with_an_opinion(**other):
    "A network whose norms are not all one, and whose scores are far apart."
    net = build(Shape(**{**base, **other}), seed=3)
    for p in net.parameters(): p.data.mul_(3. if p.ndim == 2 else 1).add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())), alpha=.02 if p.ndim == 2 else .3)
    return net


others = [{}, dict(tie_embeddings=False), dict(num_kv_heads=6, rope_theta=500000.), dict(num_kv_heads=1, norm_eps=1e-5), dict(norm_eps=.1)] # (the last: an eps in the wrong place would show)


@pytest.mark.parametrize('qk_norm', [False, True])
@pytest.mark.parametrize('other', others, ids=str)
def test_llama_gives_the_same_scores(other, qk_norm):
    net = with_an_opinion(**other, qk_norm=qk_norm)
    tokens = torch.randint(60, (2, 32), generator=torch.Generator().manual_seed(0))
    llama = to_llama(net)
    with torch.no_grad():
        wanted = net(tokens)
        assert wanted.std() > .1
        assert type(llama).__name__ == ('Qwen3ForCausalLM' if qk_norm else 'LlamaForCausalLM')
        assert_close(llama(input_ids=tokens).logits, wanted, atol=1e-5*wanted.abs().max().item(), rtol=0)
        back = from_llama(llama)
        assert torch.equal(back(tokens), wanted)
    assert back.shape == net.shape and sum(p.numel() for p in llama.parameters()) == count_parameters(net.shape)


@pytest.mark.parametrize('qk_norm', [False, True])
@pytest.mark.parametrize('other', others, ids=str)
def test_in_fp64_nothing_is_left_but_rounding(other, qk_norm):
    "Theirs compute norms and angles in fp32 whatever the format; made as wide as ours, the two agree to 1e-10."
    net = with_an_opinion(**other, qk_norm=qk_norm).double()
    tokens = torch.randint(60, (2, 32), generator=torch.Generator().manual_seed(0))
    llama, s = to_llama(net), net.shape
    class Wide(torch.nn.Module):
        def __init__(self, norm):
            super().__init__()
            self.weight, self.eps = norm.weight, norm.variance_epsilon
        def forward(self, x): return self.weight*(x*torch.rsqrt(x.pow(2).mean(-1, keepdim=True)+self.eps))
    for name, module in list(llama.named_modules()):
        if type(module).__name__.endswith('RMSNorm'): llama.set_submodule(name, Wide(module))
    def angles(x, position_ids):
        cos, sin = rotation(position_ids, s.seq_len, s.head_size, s.rope_theta, torch.float64)
        return cos[:, 0], torch.cat((sin[:, 0, :, s.head_size//2:],)*2, -1)
    llama.model.rotary_emb.forward = angles
    with torch.no_grad(): assert_close(llama(input_ids=tokens).logits, net(tokens), atol=1e-10, rtol=0)


@pytest.mark.parametrize('qk_norm', [False, True])
def test_llama_of_a_preset(qk_norm):
    "The size small, as it is."
    net = build(shape_of(Model(size='small', qk_norm=qk_norm), 1000, 128), seed=0)
    tokens = torch.randint(1000, (1, 128), generator=torch.Generator().manual_seed(0))
    with torch.no_grad(): assert_close(to_llama(net)(input_ids=tokens).logits, net(tokens), atol=1e-4, rtol=0)


@pytest.mark.parametrize('qk_norm', [False, True])
def test_llama_learns_the_same(qk_norm):
    "Same loss, same gradients: the fused matrices are theirs stacked."
    import torch.nn.functional as F
    from llmlab.models.ar import AR
    from llmlab.packing.loader import Batch
    net, tokens = build(Shape(**{**base, 'qk_norm': qk_norm}), seed=3), torch.randint(60, (2, 33), generator=torch.Generator().manual_seed(0))
    llama = to_llama(net)
    batch = Batch(tokens[:, :-1], tokens[:, 1:], torch.ones(2, 32), torch.zeros(2, 32, dtype=torch.int64), one_document=True)
    loss = AR().loss(net, batch).sum
    theirs = F.cross_entropy(llama(input_ids=batch.tokens).logits.flatten(0, 1), batch.targets.flatten(), reduction='sum')
    assert_close(loss, theirs, rtol=1e-5, atol=0)
    loss.backward(); theirs.backward()
    at = llama.model.layers[1]
    assert_close(net.blocks[1].attention.qkv.weight.grad, torch.cat([getattr(at.self_attn, f'{x}_proj').weight.grad for x in 'qkv']), rtol=1e-3, atol=1e-4)
    assert_close(net.blocks[1].mlp.up.weight.grad, torch.cat([at.mlp.gate_proj.weight.grad, at.mlp.up_proj.weight.grad]), rtol=1e-3, atol=1e-4)
    assert_close(net.embed.weight.grad, llama.model.embed_tokens.weight.grad, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize('setting', [dict(norm='layernorm'), dict(mlp='gelu'), dict(position='learned'), dict(token_mix='conv3'), dict(attention='infini', segment_len=8), dict(attention='local', segment_len=8)], ids=str)
def test_what_cannot_go_there_is_refused_by_name(setting):
    name, value = next(iter(setting.items()))
    with pytest.raises(ConfigError, match=f'{name} is {value}'): llama_kind(Shape(**{**base, **setting}))
    with pytest.raises(ConfigError, match='neither a Llama nor a Qwen3'): to_llama(build(Shape(**{**base, **setting}), device='meta'))


def test_what_is_no_llama():
    with pytest.raises(ConfigError) as e: to_llama(build(Shape(**{**base, 'norm': 'layernorm', 'token_mix': 'conv3'})))
    assert all(w in str(e.value) for w in ('norm is layernorm', 'token_mix is conv3'))
    from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM, Qwen3Config, Qwen3ForCausalLM
    tiny = dict(vocab_size=20, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2)
    odd = dict(head_dim=16, attention_bias=True, rope_parameters={'rope_type': 'linear', 'rope_theta': 1e4, 'factor': 2.})
    for made in (LlamaForCausalLM(LlamaConfig(**tiny, **odd)), Qwen3ForCausalLM(Qwen3Config(**tiny, **odd))):
        with pytest.raises(ConfigError) as e: from_llama(made)
        assert all(w in str(e.value) for w in ('rope_type linear', 'attention_bias', 'head_dim 16'))
    with pytest.raises(ConfigError, match='a sliding window'): from_llama(Qwen3ForCausalLM(Qwen3Config(**tiny, head_dim=8, use_sliding_window=True, sliding_window=4, max_window_layers=1)))
    with pytest.raises(ConfigError, match='model_type mistral'): from_llama(MistralForCausalLM(MistralConfig(**tiny)))


@pytest.mark.parametrize('words', [['model.architecture=diffusion'], ['model.architecture=sdd'], ['model.architecture=sdd', 'model.sdd.process=swap']], ids=str)
def test_the_seed_of_the_run_is_that_of_the_masks(words):
    assert [build_model(load_config('tiny_test', [*words, f'run.seed={s}']), 300, device='meta')[1].seed for s in (1, 2)] == [1, 2]
