"Tracking: every step once, in every listener, after any number of kills; and no listener can end a run."
import csv, json, os, re, subprocess, sys, types
from pathlib import Path
import pytest, torch, yaml
from hypothesis import HealthCheck, given, settings, strategies as st
from llmlab.config import Tracking
from llmlab.files import LlmlabError, append_json, read_jsonl
from llmlab.trainer import tracking
from llmlab.trainer.tracking import (Files, Screen, Stopped, Tracker, clock_time, is_running, open_tracker, progress_line, read_metrics, read_status, wandb_mode)

files_only = Tracking(tensorboard=False, wandb='off')


def table(folder): # metrics.csv as records without empty cells
    with open(folder/'metrics.csv', newline='') as f: return [{k: v for k, v in r.items() if v != ''} for r in csv.DictReader(f)]


@given(plan=st.lists(st.tuples(st.integers(1, 12), st.integers(0, 11)), min_size=1, max_size=5), every=st.integers(1, 3), val=st.integers(2, 5))
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_each_step_once_after_any_kills(tmp_path_factory, plan, every, val):
    "Sittings of some steps, each killed with a torn line, each going on from some earlier checkpoint: the files are those of a run in one go."
    folder, step, resume = tmp_path_factory.mktemp('run'), 0, None
    for steps, back in plan:
        files = Files(folder, resume, beat=1e9)
        for step in range((resume or 0)+1, (resume or 0)+steps+1):
            if step % every == 0: files.log({'train/loss': 10-step/8} | ({'val/loss': 10-step/4} if step % val == 0 else {}), step)
            if step % val == 0: files.samples([{'text': str(step)}], step)
        with open(folder/'metrics.jsonl', 'a') as f: f.write('{"step": 99, "train/lo')
        resume = max(0, step-back)
    Files(folder, resume, beat=1e9)
    records = read_jsonl(folder/'metrics.jsonl')
    assert [r['step'] for r in records] == [s for s in range(1, resume+1) if s % every == 0]
    assert all(r['train/loss'] == 10-r['step']/8 and ('val/loss' in r) == (r['step'] % val == 0) for r in records)
    assert [{k: float(v) for k, v in r.items()} for r in table(folder)] == [{k: float(v) for k, v in r.items()} for r in records]
    assert len(list((folder/'samples').glob('*'))) == resume//val


def test_the_csv_grows_columns_and_mends_a_torn_line(tmp_path):
    files = Files(tmp_path)
    files.log({'train/loss': 2.}, 1)
    with open(tmp_path/'metrics.csv', 'a') as f: f.write('2,17')
    files = Files(tmp_path, resume_step=1)
    files.log({'train/loss': torch.tensor(1.5), 'val/loss': float('nan')}, 2)
    files.log({'train/loss': 1.}, 3)
    assert [r['step'] for r in table(tmp_path)] == ['1', '2', '3']
    assert list(read_metrics(tmp_path)) == ['train/loss'] and read_jsonl(tmp_path/'metrics.jsonl')[1]['val/loss'] is None


def test_status_tells_how_it_ended(tmp_path):
    for error, state in ((None, 'done'), (Stopped('SIGTERM', 3), 'stopped'), (KeyboardInterrupt(), 'stopped'), (ValueError('x'), 'failed')):
        tracker = open_tracker(tmp_path, files_only, 'r', total_steps=5)
        assert is_running(tmp_path)
        try:
            with tracker:
                tracker.log({'train/loss': 1.}, 3)
                if error: raise error
        except BaseException as e: assert e is error
        status = read_status(tmp_path)
        assert (status['state'], status['step'], status['loss'], status['total_steps']) == (state, 3, 1., 5)
        assert not is_running(tmp_path)


def test_how_to_go_on_is_said_in_the_words_of_the_run(tmp_path):
    "Of a fine-tuning it is `finetune` that goes on; a notebook shows these lines and no traceback."
    for config, recipe in ((None, 'pretrain'), ({'finetune': {'init': None}}, 'pretrain'), ({'finetune': {'init': 'base'}}, 'finetune')):
        with pytest.raises(Stopped) as caught, open_tracker(tmp_path, files_only, 'r', config=config): raise Stopped('SIGINT', 3, Path('runs/r/checkpoints/step-00000003'))
        assert caught.value._render_traceback_()[1:] == ["    cfg, folder = resume_settings('runs/r')", f'    {recipe}(cfg, resume=folder)']
    assert Stopped('limit of 3 steps', 3)._render_traceback_() == ['Stopped: limit of 3 steps after step 3. Nothing was saved.']


def test_a_full_disk_ends_the_run_a_broken_listener_does_not(tmp_path, monkeypatch):
    class Broken:
        def log(self, metrics, step): raise OSError('no network')
        def finish(self, state, error): raise AssertionError('left out already')
    said = []
    tracker = Tracker([Files(tmp_path), Broken()], say=said.append)
    for step in (1, 2): tracker.log({'train/loss': 1.}, step)
    tracker.finish()
    assert len(said) == 1 and 'no network' in said[0]
    def full(*_): raise LlmlabError('the disk is full')
    monkeypatch.setattr(tracking, 'append_json', full)
    with pytest.raises(LlmlabError, match='disk is full'): tracker.log({'train/loss': 1.}, 3)


def test_what_cannot_be_opened_is_said_and_left_out(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'wandb', None) # as if it were not installed
    said = []
    tracker = open_tracker(tmp_path, Tracking(tensorboard=False, wandb='offline'), 'r', ids={'wandb': 'abc'}, say=said.append)
    assert len(said) == 1 and said[0].startswith('W&B is left out') and tracker.ids() == {'wandb': 'abc'}


def test_wandb_mode(monkeypatch, tmp_path):
    for name in ('WANDB_MODE', 'WANDB_API_KEY', 'WANDB_BASE_URL', 'NETRC'): monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv('HOME', str(tmp_path))
    assert wandb_mode('auto') == 'offline'
    (tmp_path/'.netrc').write_text('machine api.wandb.ai login user password ' + 'x'*40)
    assert wandb_mode('auto') == 'online' and wandb_mode('off') == 'disabled' and wandb_mode('offline') == 'offline'
    (tmp_path/'.netrc').write_text('this is { not a netrc')
    assert wandb_mode('auto') == 'offline'
    monkeypatch.setenv('WANDB_API_KEY', 'x'*40)
    assert wandb_mode('auto') == 'online'
    monkeypatch.setenv('WANDB_MODE', 'offline')
    assert wandb_mode('auto') == 'offline' and wandb_mode('online') == 'online'


def test_tensorboard_hides_the_abandoned_steps(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    settings = Tracking(tensorboard=True, wandb='off')
    with open_tracker(tmp_path, settings, 'r') as tracker:
        for step in (1, 2, 3): tracker.log({'train/loss': float(step)}, step)
        tracker.samples([{'prompt': 'a', 'text': 'b'}], 3)
    with open_tracker(tmp_path, settings, 'r', resume_step=1) as tracker: tracker.log({'train/loss': 20., 'val/loss': float('inf')}, 2)
    events = EventAccumulator(str(tmp_path/'tensorboard'), size_guidance={'scalars': 0}).Reload()
    assert [(e.step, e.value) for e in events.Scalars('train/loss')] == [(1, 1.), (2, 20.)]
    assert events.Tags()['scalars'] == ['train/loss']


class Recorded:
    "W&B as it is called: its offline files cannot be read back."
    def __init__(self): self.logged, self.config, self.steps = [], None, {}
    def init(self, config=None, **how):
        self.config = config
        return types.SimpleNamespace(id='abc', log=self.logged.append, finish=lambda exit_code: None, define_metric=lambda glob, step_metric: self.steps.update({glob: step_metric}))
    def Settings(self, **how): return None
    def Table(self, columns, data): return [dict(zip(columns, row)) for row in data]
    def panels(self):
        "Name -> [(step, value)], as W&B draws them."
        out = {}
        for record in self.logged:
            for name, value in record.items():
                if name != self.steps['*']: out.setdefault(name, []).append((record[self.steps['*']], value))
        return out


def test_tensorboard_and_wandb_show_the_same(tmp_path, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    wandb = Recorded()
    monkeypatch.setitem(sys.modules, 'wandb', wandb)
    config = {'run': {'name': 'r'}, 'optim': {'lr': 1e-3, 'betas': [.9, .95]}, 'data': {'path': None, 'text_column': 'a: b'}}
    samples = [{'prompt': 'Once', 'text': ' **upon**\n\n<b>a</b> # time'}, {'prompt': '', 'text': 'x\n    y'}]
    with open_tracker(tmp_path, Tracking(tensorboard=True, wandb='offline'), 'r', config=config) as tracker:
        tracker.log({'train/loss': torch.tensor(2.5), 'train/lr': 1e-3, 'train/mfu': None}, 10)
        tracker.samples(samples, 15)
        tracker.log({'train/loss': float('nan'), 'val/loss': 2.25, 'val/perplexity': float('inf')}, 20)
    events = EventAccumulator(str(tmp_path/'tensorboard'), size_guidance={'scalars': 0, 'tensors': 0}).Reload()
    curves = wandb.panels()
    tables = curves.pop('samples')
    assert {name: [(e.step, pytest.approx(e.value)) for e in events.Scalars(name)] for name in events.Tags()['scalars']} == curves
    assert sorted(curves) == ['train/loss', 'train/lr', 'val/loss']
    assert sorted(events.Tags()['tensors']) == ['config/text_summary', 'samples/text_summary']
    texts = {name: [(e.step, e.tensor_proto.string_val[0].decode()) for e in events.Tensors(f'{name}/text_summary')] for name in ('config', 'samples')}
    plain = lambda text: '\n'.join(line.removeprefix('    ') for line in text.splitlines()) # all of it is indented, so Markdown changes nothing
    (step, text), = texts['samples']
    assert [(step, [plain(part) for part in text.split('\n\n---\n\n')])] == [(s, [t['prompt']+t['text'] for t in table]) for s, table in tables]
    (step, text), = texts['config']
    assert all(line.startswith('    ') for line in text.splitlines()) and yaml.safe_load(plain(text)) == wandb.config == config


def test_a_long_run_in_a_notebook_stays_light(tmp_path, monkeypatch):
    "A hundred thousand log lines: a small output, drawn no more than once a second, and none of the printed lines."
    import IPython.display
    drawn = []
    monkeypatch.setattr(IPython.display, 'display', lambda bundle, raw, display_id: drawn.append(bundle) or types.SimpleNamespace(update=lambda bundle, raw: drawn.append(bundle)))
    clock = iter(range(10**7))
    monkeypatch.setattr(tracking.time, 'monotonic', lambda: next(clock)/1000) # a millisecond passes each time it is looked at
    screen = Screen(10**5, 'notebook', before={'train/loss': [(0, 9.)]})
    for step in range(1, 10**5+1): screen.log({'train/loss': 3+5/step, 'train/tokens_per_sec': 1e5} | ({'val/loss': 3.1} if step % 100 == 0 else {}), step)
    screen.samples([{'prompt': '</script><b>', 'text': '\x1b[31m"&' * 10**4}]*9, 10**5)
    screen.finish('failed', ValueError('<i>it broke</i>'))
    assert 10 < len(drawn) <= next(clock)/1000+2 and all(len(d['text/html']) < 60_000 for d in drawn)
    last = drawn[-1]
    assert last['text/plain'].startswith('Failed after step 100,000 of 100,000') and 'ValueError: <i>it broke</i>' in last['text/plain']
    assert not re.search(r'<script|</script|<i>|\x1b', last['text/html']) and '&lt;i&gt;it broke' in last['text/html']


def test_the_real_wandb_offline_goes_on_with_its_run(tmp_path):
    "In a process of its own: wandb starts a service and hooks into the exit."
    code = '''
import sys
from llmlab.config import Tracking
from llmlab.trainer.tracking import open_tracker
ids = {}
for resume in (None, 2):
    with open_tracker(sys.argv[1], Tracking(tensorboard=False, wandb='offline'), 'ar-tiny-v1', ids=ids, resume_step=resume, config={'lr': 1}, say=lambda s: sys.exit(s)) as tracker:
        for step in (1, 2, 3): tracker.log({'train/loss': 1/step}, step)
        tracker.samples([{'prompt': 'a', 'text': 'b'}], 3)
        assert not ids or tracker.ids() == ids
        ids = dict(tracker.ids())
print(ids['wandb'])
'''
    done = subprocess.run([sys.executable, '-c', code, str(tmp_path)], capture_output=True, text=True, timeout=200, env=os.environ | {'PYTHONPATH': str(Path(__file__).parent.parent)})
    assert done.returncode == 0, done.stderr
    name = done.stdout.split()[-1]
    runs = sorted((tmp_path/'wandb').glob(f'offline-run-*-{name}'))
    assert runs and all(next(r.glob('run-*.wandb')).stat().st_size for r in runs)


def test_the_line_on_the_screen(capsys):
    line = progress_line(770, 26235, {'train/loss': 5.583, 'train/tokens_per_sec': 106212.4, 'train/mfu': .407, 'train/memory_gb': 12.34}, 4*3600+23*60)
    assert line == 'Step   770/26,235 ( 2.9%) | Loss: 5.583 | 106,212 tok/s | ETA: 04:23h | 41% of peak | 12.3 GB'
    assert [progress_line(s, 26235, {}).split('(')[0] for s in (1, 9999, 10000, 26235)] == ['Step     1/26,235 ', 'Step 9,999/26,235 ', 'Step 10,000/26,235 ', 'Step 26,235/26,235 ']
    assert [progress_line(s, 100, {}) for s in (5, 100)] == ['Step   5/100 ( 5.0%)', 'Step 100/100 (100.0%)']
    assert clock_time(61) == '01:01m'
    screen = Screen(100, 'plain')
    for step in (10, 20): screen.log({'train/loss': 2.}, step)
    screen.log({'val/loss': 1.9, 'val/perplexity': None}, 20)
    screen.samples([{'prompt': 'Once', 'text': ' more'}], 20); screen.finish()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4 and 'ETA' not in lines[0] and 'ETA' in lines[1] and lines[2] == 'Step 20 validation | loss: 1.9' and lines[3].endswith('Once more')


def test_the_terminal_bar_draws_and_lets_go(capsys):
    screen = Screen(100, 'terminal')
    screen.log({'train/loss': 2., 'train/tokens_per_sec': 5.}, 50)
    screen.finish()
    assert 'Loss: 2.000' in capsys.readouterr().out
