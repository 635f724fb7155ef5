"Two arms side by side; and every flag of the old guide, as a present setting that does what it says."
import json, re
from pathlib import Path
import pytest, torch
from conftest import root
from llmlab import tiny
from llmlab.config import load_config, presets
from llmlab.files import CacheError, ConfigError, LlmlabError
from llmlab.models.zoo import build_model
from llmlab.recipes import check_gates, prepare, pretrain
from llmlab.trainer.checkpoint import TrainState, find_checkpoint, load_checkpoint
from llmlab.trainer.optim import build_optimizer
from llmlab.trainer.tracking import Stopped
from llmlab.workflow import Arm, Comparison, arms_of, compare_baseline, devices_of, train_arms

pytestmark = pytest.mark.usefixtures('one_thread')
small = ['model.attention=infini', 'model.infini.segment_len=16', 'trainer.max_steps=10', 'trainer.eval_interval=10', 'trainer.save_interval=5']
quiet = dict(screen='none', say=lambda line: None)

@pytest.fixture(autouse=True)
def in_a_folder(tmp_path, monkeypatch): monkeypatch.chdir(tmp_path)

# --- the comparison

def test_the_arms_differ_in_attention_alone():
    a, b = arms_of(tiny.config(*small)).values()
    differ = {f'{s}.{k}' for s, section in a.to_dict().items() for k, v in section.items() if b.to_dict()[s][k] != v}
    assert differ == {'model.attention'} and b.model.attention == 'full'
    networks = [build_model(c, 400)[0] for c in (a, b)]
    with_memory, without = (dict(n.named_parameters()) for n in networks)
    assert {n for n in with_memory if n not in without} == {f'blocks.{i}.attention.memory.gate' for i in range(2)}
    for name, p in without.items(): torch.testing.assert_close(p, with_memory[name], rtol=0, atol=0) # the same first weights
    with pytest.raises(ConfigError, match='this config has full'): arms_of(tiny.config())

def test_both_arms_see_the_same_rows_and_the_table_is_made():
    said = []
    c = compare_baseline(tiny.config('run.name=c', *small), asking=dict(lengths=[64], samples=2, tasks=['short']), say=said.append)
    positions = [load_checkpoint(find_checkpoint(c.folder/n))['loader_state'] for n in ('infini', 'baseline')]
    assert positions[0] == positions[1]
    assert re.search(r'\| validation loss \| \d\.\d+ ± [\d.]+ \| \d\.\d+', c.table()) and 'memory off' in c.table()
    stored = json.loads((c.folder/'comparison.json').read_text())
    assert set(stored) == {'infini', 'baseline'} and stored['infini']['val/loss'] == c.results['infini']['val/loss'] and (c.folder/'comparison.png').read_bytes()[:4] == b'\x89PNG'
    assert [line for line in said if line.startswith('[infini] ')] and [line for line in said if line.startswith('[baseline] ')]
    with pytest.raises(LlmlabError, match='is there already'): compare_baseline(tiny.config('run.name=c', *small))

def test_an_arm_that_fails_is_named_and_the_other_is_not_begun(tmp_path):
    bad = tiny.config('data.name=stories', 'data.max_documents=1', 'run.folder=x', 'run.name=infini', *small)
    good = tiny.config('run.folder=x', 'run.name=baseline')
    with pytest.raises(LlmlabError, match='the arm infini ended with exit code 1'):
        train_arms([Arm('infini', bad, tmp_path/'x/infini'), Arm('baseline', good, tmp_path/'x/baseline')], False, lambda line: None)
    assert not (tmp_path/'x/baseline').exists()

def test_a_stopped_comparison_goes_on():
    cfg = tiny.config('run.name=c', *small)
    with pytest.raises(Stopped): compare_baseline(cfg, more=['--stop-after', '4'], say=lambda line: None)
    c = compare_baseline(cfg, resume=Path('runs/c'), asking=dict(lengths=[64], samples=2, tasks=['short']), say=lambda line: None)
    assert all(load_checkpoint(find_checkpoint(c.folder/n))['global_step'] == 10 for n in ('infini', 'baseline'))

def test_two_devices_only_where_there_are_two(monkeypatch):
    cfg = tiny.config('run.device=auto', *small)
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 1)
    assert devices_of(cfg) is None
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 2)
    assert devices_of(cfg) == ['cuda:0', 'cuda:1'] and devices_of(tiny.config(*small)) is None # (tiny_test says cpu)

# --- gates and presets

@pytest.mark.parametrize('name', ['infini_cpu', 'infini_gpu', 'tiny_test'])
def test_presets_in_which_the_memory_is_used(name):
    cfg = load_config(name, small[:2] if name == 'tiny_test' else [])
    assert cfg.model.attention == 'infini' and cfg.packing.seq_len/cfg.model.infini.segment_len >= 4
    steps = cfg.trainer.max_steps or cfg.trainer.max_tokens//(cfg.packing.seq_len*cfg.trainer.batch_size*cfg.trainer.gradient_accumulation_steps)
    said = []
    far = check_gates(cfg, TrainState(full_steps=steps, lengths=[[0, steps]]), said.append)
    assert name == 'tiny_test' and said or far >= 4 and not said, (far, said)

def test_gates_have_a_group_with_a_number_for_decay():
    cfg = tiny.config(*small, 'model.infini.gate_lr=0.03')
    network, _ = build_model(cfg, 400)
    groups = [g for g in build_optimizer(network, cfg.optim).param_groups if g.get('name') == 'gates']
    assert [(len(g['params']), g['initial_lr'], g['weight_decay']) for g in groups] == [(2, .03, 0.)]
    said = []
    assert load_config('tiny_test', [*small, 'model.infini.gate_weight_decay=null'], said.append).model.infini.gate_weight_decay == 0. and any('is read as 0.0' in s for s in said)
    with pytest.raises(ConfigError, match='gate_weight_decay'): load_config('tiny_test', [*small, 'model.infini.gate_weight_decay=-1'])

@pytest.mark.parametrize('family', ['diffusion', 'sdd'])
def test_families_that_look_both_ways_refuse(family):
    with pytest.raises(ConfigError, match=f'looks back only, and {family} looks both ways'): load_config('tiny_test', [*small, f'model.architecture={family}'])

@pytest.mark.parametrize('rule', ['linear', 'delta'])
def test_a_thousand_tokens_one_by_one_are_those_of_the_whole_row(rule):
    network, _ = build_model(tiny.config(*small, f'model.infini.rule={rule}', 'model.infini.gate_init=0.5'), 400)
    tokens = torch.randint(400, (1, 1000), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        whole, cache, sizes = network.hidden(tokens), network.new_cache(1, 0), set()
        for i in range(1000):
            torch.testing.assert_close(network.hidden(tokens[:, i:i+1], cache=cache)[:, 0], whole[:, i], rtol=1e-3, atol=1e-4)
            sizes.add(sum(x.nbytes for s in cache.states for x in s.values()))
    assert len(sizes) == 1 # from the first token to the last

def test_the_logs_say_what_the_memory_does():
    from llmlab.trainer.tracking import read_metrics
    r = pretrain(tiny.config(*small, 'run.name=m'), **quiet)
    curves = read_metrics(r.folder)
    names = {f'ar/{k}_{i:02}' for i in range(2) for k in ('gate', 'gate_min', 'gate_max', 'read', 'state', 'denominator')} | {'ar/memory_gain'} | {f'ar/gate_{i:02}_{h:02}' for i in range(2) for h in range(4)}
    assert names <= set(curves) and all(0 <= curves[f'ar/gate_{i:02}'][-1][1] <= 1 and curves[f'ar/read_{i:02}'][-1][1] > 0 for i in range(2))
    assert (r.folder/'plots'/'gates.png').stat().st_size > 5000
    assert not {k for k in read_metrics(pretrain(tiny.config('run.name=full', 'trainer.max_steps=10', 'trainer.eval_interval=10'), **quiet).folder) if k.startswith('ar/')}

# --- the flags of the old guide

def test_raw_data_is_the_path_that_is_used(tmp_path):
    (tmp_path/'mine.txt').write_text('A text of my own. '*400)
    data = prepare(tiny.config('data.name=files', f'data.path={tmp_path/"mine.txt"}', 'data.max_documents=null', 'data.validation_fraction=0'), say=lambda line: None)
    assert data.corpus.name == 'mine' and data.train.text_bytes == 18*400

def test_preprocessed_data_is_found_and_reused_and_forced(tmp_path):
    words = ['packing.folder=prepared']
    made = prepare(tiny.config(*words), say=lambda line: None).train
    times = lambda: {p: p.stat().st_mtime_ns for p in made.path.glob('*.pt')}
    before = times()
    prepare(tiny.config(*words), say=lambda line: None)
    assert times() == before and str(made.path).startswith('prepared/')
    prepare(tiny.config(*words), force=True, say=lambda line: None)
    assert times() != before

def test_the_baseline_by_one_switch():
    network, _ = build_model(tiny.config(*small, 'model.attention=full'), 400)
    assert not [n for n in network.state_dict() if 'memory' in n] and network.shape.attention == 'full'

def test_a_named_gpu_that_is_not_there_is_said():
    if torch.cuda.is_available(): pytest.skip('there is a GPU')
    with pytest.raises(ConfigError, match='run.device is cuda:3, but torch finds no cuda'): pretrain(tiny.config('run.device=cuda:3'), **quiet)

def test_tensorboard_goes_where_the_run_is():
    r = pretrain(tiny.config(*small, 'run.folder=elsewhere', 'run.name=t', 'tracking.tensorboard=true'), **quiet)
    assert list(Path('elsewhere/t/tensorboard').glob('events*')) and r.folder == Path('elsewhere/t')

def test_no_gpu_dataloader(monkeypatch):
    from llmlab import cli, recipes
    seen = []
    monkeypatch.setattr(recipes, 'pretrain', lambda cfg, **k: seen.append(cfg.loader.device_prefetch))
    for words in (['--no-gpu-dataloader'], []): cli.train(['--config', 'tiny_test', *words])
    assert seen == [False, True]

def test_fused_and_other_optimizers_agree():
    outs = []
    for fused in ('true', 'false'):
        r = pretrain(tiny.config(*small, f'run.name=f-{fused}', f'optim.fused={fused}', 'optim.name=adamw', 'optim.lr=1e-3'), **quiet)
        outs.append(load_checkpoint(find_checkpoint(r.folder))['model_state_dict'])
    for name in outs[0]: torch.testing.assert_close(outs[0][name], outs[1][name], rtol=1e-3, atol=1e-4)

def test_flash_attention_is_switched_off_by_naming_another():
    cfg, said = tiny.config(*small, 'model.backend=sdpa'), []
    build_model(cfg, 400, say=said.append)
    assert said == ['Attention: sdpa (as set).']

def test_offline_is_told_to_the_libraries(monkeypatch):
    import os
    from llmlab import cli, recipes
    for name in ('HF_HUB_OFFLINE', 'HF_DATASETS_OFFLINE', 'TRANSFORMERS_OFFLINE', 'WANDB_MODE'): monkeypatch.setenv(name, ''); monkeypatch.delenv(name) # as it was before, afterwards
    seen = []
    monkeypatch.setattr(recipes, 'pretrain', lambda cfg, **k: seen.append(os.environ.get('HF_HUB_OFFLINE')))
    cli.train(['--config', 'tiny_test', '--offline'])
    assert seen == ['1']

def test_nothing_of_anybody_else_is_patched():
    for path in (root/'llmlab').rglob('*.py'):
        source = path.read_text()
        patches = re.findall(r'^\s*((?:torch|transformers|datasets|flash_attn)[\w.]*\.\w+) = ', source, re.M)
        assert not [x for x in patches if not x.startswith(('torch.backends.', 'torch.utils.deterministic.'))], path # (those are torch's own switches)
        assert 'filterwarnings' not in source and 'PYTHONWARNINGS' not in source, path

def test_the_table_of_flags_is_complete():
    page = json.loads((root/'nbs'/'81_workflow.ipynb').read_text())
    text = '\n'.join(''.join(c['source']) for c in page['cells'])
    old = ['--raw-data', '--preprocessed-data', '--config-file', '--output-dir', '--disable-infini-attn', '--gpu', '--run-both-models', '--tensorboard-dir', '--no-gpu-dataloader',
           '--force-preprocess', '--verbose', '--offline-mode', '--enable-fused-adam', '--disable-flash-attn', '--help']
    tests = Path(__file__).read_text() + (root/'tests'/'test_doors.py').read_text()
    for flag in old:
        row = re.search(rf'^\| `{flag}[^|]*\|[^|]*\|(.*)\|$', text, re.M)
        assert row, flag
        for name in re.findall(r'test_\w+', row[1]): assert f'def {name}(' in tests, name
        assert re.findall(r'test_\w+', row[1]), flag
