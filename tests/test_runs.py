"Run folders and plots."
import subprocess, sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
import pytest
from hypothesis import given, settings, strategies as st
from llmlab import tiny
from llmlab.config import Run
from llmlab.files import ConfigError, DataError, LlmlabError, append_json
from llmlab.trainer.plots import PICTURES, moving_mean, plot_run, upper_limit
from llmlab.trainer.runs import compare, create, delete, environment, find_run, list_runs, look_at, mask_secrets, names_of, runs_table, show
from llmlab.trainer.tracking import write_status

names = {'architecture': 'ar', 'dataset': 'stories', 'size': 'tiny'}
begin = lambda folder: tiny.config().save(folder/'config.yaml')


def test_runs_that_start_together_get_folders_of_their_own(tmp_path):
    with ThreadPoolExecutor(8) as pool: made = list(pool.map(lambda _: create(Run(folder=str(tmp_path)), names, begin), range(24)))
    assert len(set(made)) == 24 and {p.name for p in made} == {f'ar-stories-tiny-v{n}' for n in range(1, 25)}


def test_names(tmp_path):
    assert names_of(tiny.config('data.name=files', 'data.path=my/notes.txt'))['dataset'] == 'notes'
    assert create(Run(folder=str(tmp_path), name='../../{dataset}'), names | {'dataset': 'owner/name'}, begin).parent == tmp_path
    for bad in ('{oops}', '{0}', '{', '...'):
        with pytest.raises(ConfigError): create(Run(folder=str(tmp_path), name=bad), names, begin)
    create(Run(folder=str(tmp_path), name='one'), names, begin)
    with pytest.raises(ConfigError, match='there already'): create(Run(folder=str(tmp_path), name='one'), names, begin)


def test_a_run_killed_before_it_has_settings_takes_no_name(tmp_path):
    code = f'''
import os, signal
from llmlab.config import Run
from llmlab.trainer.runs import create
def begin(folder):
    (folder/'environment.json').write_text('{{}}')
    os.kill(os.getpid(), signal.SIGKILL)
create(Run(folder={str(tmp_path)!r}, name='one'), {{}}, begin)'''
    assert subprocess.run([sys.executable, '-c', code], env={'PYTHONPATH': str(Path(__file__).parent.parent)}).returncode == -9
    assert not (tmp_path/'one').exists() and len(list(tmp_path.iterdir())) == 1 and not list_runs(tmp_path)
    (tmp_path/'one').mkdir()
    assert list_runs(create(Run(folder=str(tmp_path), name='one'), {}, begin).parent)[0].name == 'one'
    assert [p.name for p in tmp_path.iterdir()] == ['one'] # what the first one left is swept away


def test_environment_has_no_secrets(monkeypatch):
    monkeypatch.setenv('WANDB_API_KEY', 'sesame')
    monkeypatch.setattr(sys, 'argv', ['/usr/bin/llmlab_train', '--hf-token=sesame', 'tracking.api_key=sesame', '--password', 'sesame', 'optim.lr=1'])
    env = environment()
    assert 'sesame' not in str(env)
    assert env['command'] == ['llmlab_train', '--hf-token=***', 'tracking.api_key=***', '--password', '***', 'optim.lr=1']
    assert env['versions']['torch'] and env['machine']['cores']


def test_states(tmp_path):
    for name in ('new', 'done', 'dead'): tiny.config().save(tmp_path/name/'config.yaml')
    write_status(tmp_path/'done', 'done', step=5, total_steps=5)
    gone = subprocess.Popen([sys.executable, '-c', f'from llmlab.trainer.tracking import write_status; write_status({str(tmp_path/"dead")!r}, "running", step=3)'],
                            env={'PYTHONPATH': str(Path(__file__).parent.parent)})
    gone.wait()
    assert {r.name: r.state for r in list_runs(tmp_path)} == {'new': 'new', 'done': 'done', 'dead': 'killed'}
    assert find_run('last', tmp_path).name == 'dead' and find_run(str(tmp_path/'new')).name == 'new'
    assert runs_table(list_runs(tmp_path)).row_count == 3
    with pytest.raises(LlmlabError, match='Is it one of done'): find_run('doen', tmp_path)
    delete(tmp_path/'dead')
    write_status(tmp_path/'new', 'running')
    with pytest.raises(LlmlabError, match='Stop it first'): delete(tmp_path/'new')


def test_compare_and_show(tmp_path):
    for name, lr in (('a', 1e-3), ('b', 2e-3)):
        tiny.config(f'optim.lr={lr}').save(tmp_path/name/'config.yaml')
        for step, loss in ((10, 3.), (20, 1+100*lr), (30, 2.)): append_json(tmp_path/name/'metrics.jsonl', {'step': step, 'train/loss': loss, 'val/loss': loss})
    found = compare(tmp_path/'a', tmp_path/'b')
    assert found['settings'] == {'optim.lr': (1e-3, 2e-3)}
    assert found['metrics'] == {'train/loss': (2., 2.), 'val/loss': (1.1, 1.2)} # the last, the best
    assert show(tmp_path/'a')['train/loss'] == 2. and look_at(tmp_path/'b').val_loss == 1.2


@given(values=st.lists(st.floats(-10, 10), min_size=1, max_size=50), window=st.integers(1, 60))
@settings(max_examples=60, deadline=None)
def test_moving_mean_and_limit(values, window):
    means = moving_mean(values, window)
    for i, m in enumerate(means):
        part = values[max(0, i+1-window):i+1]
        assert m == pytest.approx(sum(part)/len(part), abs=1e-9)
    assert upper_limit(values) >= max(values[len(values)//10:]) - 1e-9


def test_plots(tmp_path):
    from matplotlib.image import imread
    run = tmp_path/'r'
    with pytest.raises(DataError): plot_run(run)
    append_json(run/'metrics.jsonl', {'step': 1, 'train/loss': None, 'val/loss': 2.})
    assert [p.name for p in plot_run(run)] == ['loss.png']
    for s in range(2, 300): append_json(run/'metrics.jsonl', {'step': s, 'train/loss': 2/s, 'train/lr': 0., 'train/tokens_per_sec': 5., 'train/memory_gb': 1.})
    files = plot_run(run)
    assert [p.stem for p in files] == [p.file for p in PICTURES]
    for f in files:
        pixels = imread(f)
        assert pixels.shape[0] > 300 and pixels[..., :3].std() > .02 # something is drawn
