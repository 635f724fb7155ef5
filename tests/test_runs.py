"Run folders and plots."
import json, os, re, signal, sys
from concurrent.futures import ThreadPoolExecutor
import pytest
from hypothesis import given, settings, strategies as st
from llmlab import tiny
from llmlab.config import Run
from llmlab.files import ConfigError, DataError, LlmlabError, append_json, read_json, write_json, write_whole
from llmlab.trainer import plots
from llmlab.trainer.checkpoint import save_checkpoint
from llmlab.trainer.compare import compare
from llmlab.trainer.plots import PICTURES, draw_comparison, moving_mean, plot_run, upper_limit
from llmlab.trainer.report import report, thin, training_log, write_log, write_report
from llmlab.trainer.runs import (card, card_table, count_weights, create, delete, delete_runs, elapsed, environment, find_run, find_runs, list_runs, look_at, names_of,
                                 next_commands, results_of, runs_table)
from llmlab.trainer.tracking import Files, Tracker, read_status, write_status

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
    def die(folder):
        (folder/'environment.json').write_text('{}')
        os.kill(os.getpid(), signal.SIGKILL)
    child = os.fork()
    if not child: create(Run(folder=str(tmp_path), name='one'), {}, die)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -9
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
    write_status(tmp_path/'dead', 'running', step=3)
    write_json(tmp_path/'dead'/'status.json', read_status(tmp_path/'dead') | {'pid': 2**22+1}) # above the highest of Linux
    assert {r.name: r.state for r in list_runs(tmp_path)} == {'new': 'new', 'done': 'done', 'dead': 'killed'}
    assert find_run('last', tmp_path).name == 'dead' and find_run(str(tmp_path/'new')).name == 'new'
    assert runs_table(list_runs(tmp_path)).row_count == 3
    with pytest.raises(LlmlabError, match='Is it one of done'): find_run('doen', tmp_path)
    delete(tmp_path/'dead')
    write_status(tmp_path/'new', 'running')
    with pytest.raises(LlmlabError, match='Stop it first'): delete(tmp_path/'new')


def make_run(folder, name, tokenizer='same', steps=60, bits=True, nasty='', **settings):
    "A run with curves, samples and a small checkpoint, as a training leaves it, without training."
    import torch
    run = folder/name
    tiny.config(*(f'{k.replace("__", ".")}={v}' for k, v in settings.items())).save(run/'config.yaml')
    write_whole(run/'environment.json', json.dumps({'started': '2026-01-31 12:00:00 +0000', 'command': ['llmlab_train', nasty or 'x'], 'versions': {'torch': '2'}, 'machine': {'processor': 'cpu', 'cores': 2, 'threads': 1}}))
    with Tracker([Files(run, total_steps=steps)]) as tracker:
        for step in range(10, steps+1, 10):
            tracker.log({'train/loss': 4-step/50, 'train/tokens_per_sec': 100.} | ({'val/loss': 4.1-step/50} | ({'val/bits_per_byte': 2-step/50} if bits else {}) if step % 20 == 0 else {}), step)
            if step % 20 == 0: tracker.samples([{'prompt': f'The bear{nasty}', 'text': f' {name} at {step}{nasty}'}], step)
    save_checkpoint(run/'checkpoints'/f'step-{steps:08d}', dict(global_step=steps, model_state_dict={'a': torch.ones(3, 4), 'b': torch.ones(5)}, model_config={}, optimizer_state_dict={}, scheduler_state_dict={}, scaler_state_dict={},
        train_config={}, best_val_loss=2., val_loss=2., architecture='ar', cache_info={'tokenizer': tokenizer, 'corpus': 'c'}, train_state={'tokens': 100*steps, 'global_step': steps}))
    return run


@pytest.fixture(scope='module')
def family(tmp_path_factory):
    "Runs that differ in what matters: a, b; c with another tokenizer; d like c without bits per byte; nasty with signs of HTML, terminals and mathematics everywhere."
    folder = tmp_path_factory.mktemp('family')
    make_run(folder, 'a', optim__lr=1e-3)
    make_run(folder, 'b', optim__lr=2e-3, steps=80)
    make_run(folder, 'c', tokenizer='other')
    make_run(folder, 'd', tokenizer='third', bits=False)
    make_run(folder, '_<b>$x_$', nasty='</p><script>alert(1)</script>\x1b[31m&"\'')
    return folder


def text_of(shown, width=100):
    from rich.console import Console
    console = Console(width=width, color_system=None, force_terminal=False, force_jupyter=False)
    with console.capture() as capture: console.print(shown)
    return capture.get()


def test_compare(family):
    c = compare(*(family/n for n in 'ab'))
    assert c.settings == {'optim.lr': (1e-3, 2e-3)} and c.notes == []
    assert c.metrics['val/loss, best'] == pytest.approx((2.9, 2.5)) and c.metrics['train/loss, last'] == pytest.approx((2.8, 2.4))
    assert c.steps == [60, 60] and c.samples == {'The bear': (' a at 60', ' b at 60')} # the last step that both have
    assert [r['parameters'] for r in c.results] == [17, 17] and [r['tokens'] for r in c.results] == [6000, 8000]
    for width in (80, 120):
        shown = text_of(c, width)
        assert max(map(len, shown.splitlines())) <= width and 'optim.lr' in shown and 'The bear a at 60' in shown
    assert 'model.' not in text_of(c) # equal settings are left out
    with pytest.raises(LlmlabError, match='two or more'): compare(family/'a')
    assert text_of(compare(*(family/n for n in 'abcd')), 80).count('The bear') == 4 # below each other


def test_tokenizers_that_differ_are_not_compared(family):
    c = compare(family/'a', family/'c')
    assert c.notes[0].startswith('The tokenizers differ') and 'Compare bits per byte' in c.notes[0]
    assert list(c.metrics)[0] == 'val/bits_per_byte, best' and 'val/loss, best, per own token' in c.metrics
    assert plots._curve_names(c)[1] == 'val/bits_per_byte' and len(plots.comparison_figure(c).axes) == 2
    apart = compare(family/'c', family/'d')
    assert 'No number here can be compared' in apart.notes[0]
    fig = plots.comparison_figure(apart)
    assert len(fig.axes) == 2 and [len(ax.lines) for ax in fig.axes] == [2, 2] # a panel for each run
    assert not fig.axes[0].get_shared_y_axes().joined(*fig.axes)


def test_one_picture_of_several_runs(family, tmp_path):
    c = compare(family/'a', family/'b')
    png = draw_comparison(c)
    assert png[:4] == b'\x89PNG' and png == draw_comparison(c)
    assert [len(ax.lines) for ax in plots.comparison_figure(c).axes] in ([4], [4, 4]) # train and val of both
    draw_comparison(compare(family/'a', family/'_<b>$x_$')) # a name is no formula
    for n in 'xy': tiny.config().save(tmp_path/n/'config.yaml')
    with pytest.raises(DataError, match='nothing was logged'): draw_comparison(compare(tmp_path/'x', tmp_path/'y'))


def test_card(family):
    found = card(family/'a')
    assert found['run'][0] == 'a: done, step 60 of 60' and found['sample at step 60'] == ['The bear a at 60']
    assert any('17 parameters' in line for line in found['results']) and 'best, newest' in found['checkpoints'][0]
    assert 'optim.lr: 0.001  (default 0.0003)' in found['settings']
    shown = text_of(card_table(family/'_<b>$x_$'), 80)
    assert '\x1b' not in shown and 'llmlab_generate --run' in shown and max(map(len, shown.splitlines())) <= 80
    assert next_commands(family/'a')[-1] == f'llmlab_runs report {family/"a"}'


def test_broken_runs_are_lines(tmp_path):
    for n, (file, content) in enumerate([('status.json', '{'), ('status.json', '[]'), ('status.json', '{"state": "running"}'), ('status.json', '{"step": "x"}'), ('environment.json', '3'),
                                         ('metrics.jsonl', '{"step": 1, "train/loss": "x"}\n'), ('metrics.jsonl', 'x\nx\n'), ('metrics.jsonl', '{"train/loss": 1}\n'), ('status.json', b'\xff\xfe')]):
        write_whole(tmp_path/f'r{n}'/'config.yaml', '')
        write_whole(tmp_path/f'r{n}'/file, content)
    runs = list_runs(tmp_path)
    assert len(runs) == 9 and {r.state for r in runs} == {'broken'} and all(r.problem for r in runs)
    assert text_of(runs, 120).count(' is broken: ') == 9 and runs._repr_html_().count('<tr>') == 10
    for r in runs:
        assert 'problem' in card(r.path) and r._repr_html_() and text_of(card_table(r.path))
        for make in (results_of, report, training_log, lambda p: compare(p, tmp_path/'r0')):
            with pytest.raises(LlmlabError): make(r.path)
    assert len(delete_runs(['r*'], tmp_path, yes=True, say=lambda line: None)) == 9 and list_runs(tmp_path) == []


def test_order_and_size(family):
    assert [r.name for r in list_runs(family, 'val_loss')][0] == 'b' and [r.name for r in list_runs(family, 'name')][1:] == ['a', 'b', 'c', 'd']
    assert [r.name for r in list_runs(family, 'step')][-1] == 'b' and len(list_runs(family, 'started')) == 5
    with pytest.raises(ConfigError, match='cannot be sorted'): list_runs(family, 'size')
    here = look_at(family/'a')
    assert here.size == sum(p.stat().st_size for p in (family/'a').rglob('*') if p.is_file())
    assert type(list_runs(family)[:2]) is type(list_runs(family)) and '&lt;b&gt;' in list_runs(family)._repr_html_()
    for width in (80, 120): assert max(map(len, text_of(list_runs(family), width).splitlines())) <= width
    assert count_weights(family/'a'/'checkpoints'/'step-00000060') == 17


def test_delete_asks_and_is_all_or_nothing(tmp_path):
    def begin_again():
        for name in ('tiny-1', 'tiny-2', 'other'): tiny.config().save(tmp_path/name/'config.yaml'); write_status(tmp_path/name, 'done', step=1)
    left = lambda: {r.name for r in list_runs(tmp_path)}
    begin_again()
    write_status(tmp_path/'tiny-2', 'running')
    for names in (['tiny-*'], ['tiny-1', 'nobody'], ['tiny-1', 'nobody-*'], [], ['tiny-1', 'tiny-2']):
        with pytest.raises(LlmlabError): delete_runs(names, tmp_path, yes=True)
        assert len(left()) == 3
    begin_again()
    with pytest.raises(LlmlabError, match=r"delete 'tiny-\*' --yes --folder"): delete_runs(['tiny-*'], tmp_path) # nobody to ask: it does not wait
    for answer in ('', 'n', 'no', 'x'): assert delete_runs(['tiny-*'], tmp_path, ask=lambda q: answer, say=lambda line: None) == []
    assert len(left()) == 3
    asked = []
    delete_runs(['tiny-*', 'tiny-1'], tmp_path, ask=lambda q: asked.append(q) or 'y', say=lambda line: None)
    assert left() == {'other'} and re.match(r'Delete tiny-1, tiny-2: 2 runs with 0 checkpoints, [\d.]+ kB\? This cannot be undone', asked[0])
    os.symlink(tmp_path/'other', tmp_path/'link')
    with pytest.raises(LlmlabError, match='is a link to'): delete_runs(['link'], tmp_path, yes=True)
    assert [p.name for p in find_runs(['other', str(tmp_path/'other'), 'oth*'], tmp_path)] == ['other']


def test_log_is_strict_json_and_reads_back(family, tmp_path):
    path = write_log(family/'a', tmp_path/'log.json')
    log = json.loads(path.read_text(), parse_constant=lambda word: pytest.fail(word))
    assert log == training_log(family/'a') == read_json(path)
    about = log['metadata']
    assert (about['name'], about['state'], about['architecture'], about['parameters'], about['steps'], about['tokenizer']) == ('a', 'done', 'ar', 17, 60, 'same')
    assert about['config']['optim']['lr'] == 1e-3 and about['environment']['versions'] == {'torch': '2'} and about['checkpoints'][0]['val/loss'] == 2.
    assert [r['step'] for r in log['training_data']] == [*range(10, 61, 10)] and log['training_data'][1]['val/loss'] == pytest.approx(3.7)
    write_whole(tmp_path/'odd'/'config.yaml', 'a: .nan\nslurm: {setup: export SECRET_OF_MINE=1}\n')
    write_whole(tmp_path/'odd'/'metrics.jsonl', '{"step": 1, "train/loss": NaN}\n')
    assert read_json(write_log(tmp_path/'odd'))['training_data'] == [{'step': 1, 'train/loss': None}]
    assert 'SECRET_OF_MINE' not in (tmp_path/'odd'/'training_log.json').read_text()+report(tmp_path/'odd')+report(tmp_path/'odd', family/'a')


def test_reports_hold_everything_and_run_nothing(family, tmp_path):
    from html.parser import HTMLParser
    class Look(HTMLParser):
        def __init__(self): super().__init__(); self.open, self.tags, self.links, self.ids = [], set(), [], []
        def handle_starttag(self, tag, attrs):
            self.tags.add(tag); self.links += [v for k, v in attrs if k in ('src', 'href', 'xlink:href')]; self.ids += [v for k, v in attrs if k == 'id']
            assert not [k for k, _ in attrs if k.startswith('on')]
            if tag not in ('meta', 'img', 'br', 'link'): self.open.append(tag)
        def handle_startendtag(self, tag, attrs): self.handle_starttag(tag, attrs); self.open and self.open[-1] == tag and self.open.pop()
        def handle_endtag(self, tag): assert self.open.pop() == tag
    for paths in ([family/'_<b>$x_$'], [family/n for n in ('a', '_<b>$x_$', 'c')]):
        look, page = Look(), report(*paths)
        look.feed(page)
        assert not look.open and not look.tags & {'script', 'link', 'iframe', 'b$x_$'} and len(look.ids) == len(set(look.ids)) and look.ids
        assert all(link.startswith('#') and link[1:] in look.ids for link in look.links) and '\x1b' not in page
        assert "default-src 'none'" in page and 'prefers-color-scheme:dark' in page and 'currentColor' in page and len(page) < 300_000
        assert '&lt;script&gt;alert(1)' in page and 'The bear' in page
    assert write_report([family/'a'], tmp_path/'r.html').read_text() == report(family/'a')
    assert write_report([family/'a', family/'b']).name == 'a+b.html' and (family/'a'/'report.html').exists() is False
    with pytest.raises(LlmlabError): report()


@given(n=st.integers(0, 2000), most=st.integers(3, 400))
@settings(max_examples=40, deadline=None)
def test_thin_keeps_ends_and_order(n, most):
    curve = [(i, float(i % 7)) for i in range(n)]
    short = thin(curve, most)
    assert len(short) == min(n, most) and short[:1] == curve[:1] and short[-1:] == curve[-1:]
    assert [s for s, _ in short] == sorted({s for s, _ in short}) and all(0 <= v <= 6 for _, v in short)


def test_pauses_are_no_work():
    lines = [{'step': 10*i, 'time': 30.*i + (86_400 if i > 3 else 0)} for i in range(1, 7)]
    assert elapsed(lines)[-1] == pytest.approx(180) and elapsed(lines[:1]) == [0.]
    assert elapsed([{'step': 1, 'time': 5.}, {'step': 2, 'time': 4.}, {'step': 3, 'time': 5.}])[-1] <= 3 # a clock that was set back


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
