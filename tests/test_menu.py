"The menu: what it knows, what it answers, and a walk through a real terminal."
import io, os, re, shutil, subprocess, sys
from pathlib import Path
import pexpect, pytest
from conftest import command, root
from llmlab import cli, tiny
from llmlab.config import load_config, presets
from llmlab.files import append_json, write_json
from llmlab.launch import menu as page
from llmlab.launch.menu import Chosen, choices, choices_table, greeting, longer, menu, numbers, offers, rough_memory, suggest_name

OMP = '1'


def pretend(folder:Path, name:str, state:str='stopped', step:int|None=20, total:int=40, **status)->Path:
    "A run folder as training leaves it, without the training."
    from llmlab.trainer.checkpoint import save_checkpoint
    path = folder/name
    if step is not None:
        save_checkpoint(path/'checkpoints'/f'step-{step:08d}', dict(global_step=step, model_state_dict={}, model_config={}, optimizer_state_dict={}, scheduler_state_dict={},
                        scaler_state_dict={}, train_config={}, best_val_loss=None, architecture='ar', cache_info={}))
        append_json(path/'metrics.jsonl', {'step': step, 'train/loss': 2.5, 'val/loss': 2.25})
    tiny.config(f'run.folder={folder}', f'packing.folder={folder}/../cache').save(path/'config.yaml')
    write_json(path/'status.json', {'state': state, 'step': step or 0, 'total_steps': total, 'host': os.uname().nodename, 'pid': 2**22+1} | status)
    return path


def talk(folder:Path, *answers:str)->tuple[Chosen|None, str]:
    "What comes out of the menu with these answers, and what it said; after the last answer nobody answers any more."
    rest, said = iter(answers), []
    def ask(question):
        said.append(question)
        try: return next(rest)
        except StopIteration: raise EOFError() from None
    return menu(ask, said.append, folder), '\n'.join(s for s in said if isinstance(s, str))


def number_of(folder:Path, name:str)->str: return str(1+[c.name for c in choices(folder)].index(name))


@pytest.fixture
def runs(tmp_path, monkeypatch):
    "A folder with a run of each sort, and no counting of memory."
    monkeypatch.setattr(page, 'check_step_memory', lambda config: page.Finding('memory', 'ok', 'enough'))
    monkeypatch.chdir(tmp_path)
    for name, more in dict(stopped={}, done=dict(state='done', step=40), running=dict(state='running', pid=os.getpid()), killed=dict(state='running'), fresh=dict(state='running', step=None)).items():
        pretend(tmp_path/'runs', name, **more)
    return Path('runs')


def test_choices(runs):
    found = {c.name: c for c in choices(runs)}
    assert {n: c.state for n, c in found.items()} == dict(stopped='stopped', done='done', running='running', killed='killed', fresh='killed')
    assert (found['stopped'].step, found['stopped'].total, found['stopped'].train_loss, found['stopped'].val_loss, found['stopped'].family) == (20, 40, 2.5, 2.25, 'ar')
    assert found['fresh'].step is None
    assert choices_table(list(found.values())).row_count == 5


@pytest.mark.parametrize('file,content', [('config.yaml', 'model: {size: huge}'), ('config.yaml', '\0'), ('status.json', '{'), ('status.json', '[]'), ('metrics.jsonl', 'x\n{}\n'), ('checkpoints/step-00000020/meta.json', ' '*9)])
def test_a_broken_run_is_shown_and_not_chosen(tmp_path, file, content):
    path = pretend(tmp_path, 'bad')
    pretend(tmp_path, 'good')
    old = (path/file).stat().st_size if (path/file).exists() else 0
    (path/file).write_text(content.ljust(old) if file.endswith('meta.json') else content)
    bad = next(c for c in choices(tmp_path) if c.name == 'bad')
    assert bad.state == 'broken' and bad.problem
    chosen, said = talk(tmp_path, number_of(tmp_path, 'bad'), 'q')
    assert chosen is None and 'bad cannot be read' in said


def test_a_cut_checkpoint_is_passed_over(runs):
    shutil.copytree(runs/'stopped'/'checkpoints'/'step-00000020', runs/'stopped'/'checkpoints'/'step-00000030')
    (runs/'stopped'/'checkpoints'/'step-00000030'/'training.pt').write_bytes(b'')
    assert next(c for c in choices(runs) if c.name == 'stopped').step == 20


def test_resume(runs):
    chosen, said = talk(runs, number_of(runs, 'stopped'), '')
    assert chosen == Chosen(resume='stopped') and 'llmlab_train --resume stopped' in said and 'cached rows' in said
    assert talk(runs, number_of(runs, 'stopped'), 'n', 'q')[0] is None
    assert talk(runs, number_of(runs, 'fresh'), 'y')[0] == Chosen(resume='fresh')


def test_a_running_run_is_left_alone(runs):
    chosen, said = talk(runs, number_of(runs, 'running'), 'q')
    assert chosen is None and 'running is running' in said
    chosen, said = talk(runs, 'x', number_of(runs, 'running'), 'q')
    assert 'Stop it first' in said and 'y/N' not in said and (runs/'running').is_dir()


def test_a_run_that_is_done_is_trained_longer(runs):
    chosen, said = talk(runs, number_of(runs, 'done'), '30', 'x', '80', '')
    assert chosen == Chosen(resume='done', overrides=('trainer.max_steps=80',)) and said.count('is no length beyond 40') == 2
    assert talk(runs, number_of(runs, 'done'), '2epochs', 'y')[0].overrides == ('trainer.epochs=2',)
    assert talk(runs, number_of(runs, 'done'), '', '')[0] is None


@pytest.mark.parametrize('answer', ['0', '6', '-1', '1.5', 'yes', '²', 'new'])
def test_a_wrong_answer_is_asked_again_in_a_line(runs, answer):
    chosen, said = talk(runs, answer, 'q')
    assert chosen is None and f'{answer!r} is not a choice.' in said


@pytest.mark.parametrize('answers', [[], [''], ['q'], ['Q'], ['n'], ['n', 'q', ''], ['n', '2'], ['x', ''], ['x', 'q', 'q'], ['n', '2', 'one'], ['x', '1']])
def test_leaving_changes_nothing(runs, answers):
    before = sorted(str(p) for p in Path('.').rglob('*'))
    assert talk(runs, *answers)[0] is None
    assert sorted(str(p) for p in Path('.').rglob('*')) == before


def test_new_run(runs):
    chosen, said = talk(runs, 'n', '99', 'no_such', 'tiny_test', 'a b', 'done', 'mine', '')
    assert chosen == Chosen('tiny_test', ('run.name=mine',)) and chosen.command in said
    assert 'There is no number 99' in said and "no preset of that name" in said and 'done is taken' in said and 'no blanks' in said
    assert talk(runs, 'n', '', '', '')[0].config == 'quickstart'


def test_new_run_from_a_file_and_elsewhere(runs, tmp_path):
    (tmp_path/'mine.yaml').write_text('base: tiny_test\ntrainer: {max_steps: 7}\n')
    assert talk(runs, 'n', 'mine.yaml', '', 'y')[0] == Chosen('mine.yaml', ('run.name=117K_Stories_64',))
    assert talk(tmp_path/'others', 'n', 'mine.yaml', 'one', 'y')[0].overrides == (f'run.folder={tmp_path/"others"}', 'run.name=one')
    (tmp_path/'bad.yaml').write_text('trainer: {bach_size: 7}\n')
    assert 'trainer.batch_size' in talk(runs, 'n', 'bad.yaml', 'q', 'q')[1]
    assert 'llmlab_finetune' in talk(runs, 'n', 'sft', 'q')[1]


def test_a_preset_that_needs_a_text_asks_for_it(runs, tmp_path):
    (tmp_path/'book.txt').write_text('Once upon a time. '*1000)
    chosen, said = talk(runs, 'n', 'shakespeare_char', 'nowhere.txt', 'book.txt', '', 'y')
    assert chosen.overrides == ('data.path=book.txt', 'run.name=493K_book_64') and 'nowhere.txt does not exist' in said
    assert 'from 0.1 MB of text' in said
    assert talk(runs, 'n', 'shakespeare_char', '', 'q')[0] is None


def test_a_text_of_the_hub_says_so(runs, monkeypatch):
    monkeypatch.setenv('HF_HUB_OFFLINE', '1')
    chosen, said = talk(runs, 'n', 'tinystories', '', 'n', 'q')
    assert chosen is None and 'needs the network' in said and 'WARNING: data.name is tinystories, and HF_HUB_OFFLINE=1' in said


def test_a_problem_turns_the_default_to_no(runs, monkeypatch):
    monkeypatch.setattr(page, 'check_step_memory', lambda config: page.Finding('memory', 'problem', 'a step needs 900 GB', 'Take a smaller model.'))
    chosen, said = talk(runs, 'n', 'tiny_test', '', '', 'q')
    assert chosen is None and 'PROBLEM: a step needs 900 GB. Take a smaller model.' in said and '[y/N]' in said


def test_delete(runs):
    a, b = sorted(number_of(runs, n) for n in ('killed', 'stopped'))
    chosen, said = talk(runs, 'x', '1-9', f'{a},{b}', 'perhaps', '', 'q')
    assert 'Nothing was deleted' in said and "'1-9' is not a choice" in said and (runs/'killed').is_dir()
    chosen, said = talk(runs, 'x', f'{a} {b}', 'y', 'q')
    assert {c.name for c in choices(runs)} == {'done', 'running', 'fresh'} and 'these 2' in said and ' kB' in said


def test_many_runs_fit_the_screen(tmp_path, monkeypatch):
    monkeypatch.setattr(page, 'choices', lambda folder: [page.Choice(tmp_path/str(n), 'done') for n in range(40)])
    chosen, said = talk(tmp_path, '16', 'q')
    assert '25 older' in said and "'16' is not a choice" in said


def test_names():
    assert suggest_name(load_config('415m')) == '415M_FineWeb_512' and suggest_name(load_config('415m'), {'415M_FineWeb_512'}) == '415M_FineWeb_512-v2'
    assert suggest_name(load_config('small', ['model.architecture=sdd', 'data.name=hub', 'data.path=some/Set of texts'])) == '25M_Set-of-texts_512_sdd'
    assert suggest_name(load_config('415m', ['model.num_layers=2'])) != '415M_FineWeb_512'


def test_offers_and_their_memory(tmp_path):
    found = offers(tmp_path)
    assert {o.preset for o in found} == set(presets())-{'sft', 'sft_lora'} and all(o.about for o in found)
    from llmlab.trainer.memory import estimate
    for o in found:
        if o.preset == 'quickstart': assert .5 < rough_memory(o.config, o.parameters)/estimate(o.config, device='cuda').peak < 2


def test_small_words():
    assert numbers('3,1-2', 3) == [1, 2, 3] and longer('2,000', 40) == 'trainer.max_steps=2000'
    for wrong in ('', '4', '0', '2-1', '1-', '-'):
        with pytest.raises(ValueError): numbers(wrong, 3)
    assert 'memory' in greeting() and len(greeting()) < 80


class Keyboard(io.StringIO):
    def isatty(self): return True


@pytest.mark.parametrize('terminal,words,rank,term,asked', [
    (True, [], None, 'xterm', True), (True, ['--offline'], None, 'xterm', True), (False, [], None, 'xterm', False), (True, ['optim.lr=1'], None, 'xterm', False),
    (True, ['--config', 'small'], None, 'xterm', False), (True, ['--resume'], None, 'xterm', False), (True, [], '0', 'xterm', False), (True, [], None, 'dumb', False)])
def test_when_the_door_asks(monkeypatch, terminal, words, rank, term, asked):
    happened = []
    monkeypatch.setattr(page, 'open_menu', lambda: happened.append('asked'))
    monkeypatch.setattr(cli, '_run_or_resume', lambda *a: happened.append('trained'))
    monkeypatch.setattr(sys, 'stdin', Keyboard() if terminal else io.StringIO())
    monkeypatch.setattr(sys, 'stdout', Keyboard())
    for k in ('HF_HUB_OFFLINE', 'HF_DATASETS_OFFLINE', 'TRANSFORMERS_OFFLINE', 'WANDB_MODE'): monkeypatch.setenv(k, os.environ.get(k, '0')) # --offline sets them for good
    monkeypatch.setenv('TERM', term)
    monkeypatch.setenv('RANK', rank) if rank else monkeypatch.delenv('RANK', raising=False)
    cli.train(words)
    assert happened == ['asked' if asked else 'trained']


def test_without_a_terminal_nobody_is_asked(tmp_path):
    (tmp_path/'cache').touch() # where the cache would be: the run stops there, which is far enough
    env = os.environ | {'PYTHONPATH': str(root), 'OMP_NUM_THREADS': OMP, 'TERM': 'xterm'}
    done = subprocess.run(command('llmlab_train'), cwd=tmp_path, capture_output=True, text=True, stdin=subprocess.DEVNULL, env=env, timeout=300)
    assert 'leave' not in done.stdout and done.returncode == 1 and 'Traceback' not in done.stderr, (done.stdout, done.stderr)


@pytest.fixture(scope='module')
def place(tmp_path_factory):
    "A folder with a run that is done with, and settings of a run that takes some seconds."
    place = tmp_path_factory.mktemp('walk')
    pretend(place/'runs', 'old')
    (place/'mine.yaml').write_text('base: tiny_test\ntrainer: {max_steps: 120, log_interval: 5, eval_interval: 120, save_interval: 120, sample_tokens: 0}\n')
    return place


def sit_down(place:Path)->pexpect.spawn:
    "`llmlab_train` without a word, in a terminal."
    env = os.environ | {'PYTHONPATH': str(root), 'OMP_NUM_THREADS': OMP, 'TERM': 'xterm-256color'}
    env.pop('RANK', None)
    return pexpect.spawn(*(lambda c: (c[0], c[1:]))(command('llmlab_train')), cwd=str(place), env=env, dimensions=(40, 160), encoding='utf-8', timeout=120)


def answers(terminal:pexpect.spawn, *pairs:tuple[str, str])->None:
    for question, answer in pairs:
        terminal.expect(question)
        terminal.sendline(answer)


def get_up(terminal:pexpect.spawn)->tuple[int, str]: # exit code; what stood on the screen since the last question, without colours
    terminal.expect(pexpect.EOF)
    terminal.close()
    return terminal.exitstatus, re.sub(r'\x1b\[[0-9;?]*[a-zA-Z]', '', terminal.before)


progress = r'Step +\d+/120 \( *\d+\.\d%\) \| Loss: \d+\.\d{3} \| [\d,]+ tok/s \| ETA: \d\d:\d\d[mh]' # as the README shows it


def test_a_walk_through_the_terminal(place):
    t = sit_down(place)
    for question, answer in (('leave. > ', 'x'), ('Delete which', '1'), (r'\[y/N\]', 'n'), ('leave. > ', 'x'), ('Delete which', '1'), (r'\[y/N\]', 'y'),
                             ('leave. > ', 'n'), ('Which', 'mine.yaml'), ('Name of the run', 'walk'), (r'\[Y/n\]', '')): answers(t, (question, answer))
    assert not (place/'runs'/'old').exists()
    t.expect(r'Step +\d+/120 ')
    t.sendintr()
    code, said = get_up(t)
    assert code == 75 and '--resume' in said, said

    t = sit_down(place)
    t.expect(r'walk +ar +\d+/120 .*stopped')
    answers(t, ('leave. > ', '1'), (r'complete: [\d,]+ rows', ''))
    code, said = get_up(t)
    assert code == 0 and 'going on after step' in said and re.search(progress, said) and '120 of 120' in said, said

    t = sit_down(place)
    t.expect(r'walk +ar +120/120 .*done')
    t.expect('leave. > ')
    t.sendeof()
    code, said = get_up(t)
    assert code == 0 and 'Nothing was started.' in said
    assert [p.name for p in (place/'runs').iterdir()] == ['walk']


def test_what_is_typed_stays_text(runs):
    "A name that YAML would read as a number; a number that is none; settings that do not go; a folder with colours in its name."
    chosen, _ = talk(runs, 'n', 'tiny_test', '007', 'y')
    assert load_config(chosen.config, chosen.overrides).run.name == '007'
    assert talk(runs, '²', 'n', '²', 'q')[1].count("'²'") == 2
    Path('no.yaml').write_text('model: {d_model: 65, num_heads: 4}\n')
    assert 'd_model' in talk(runs, 'n', 'no.yaml', 'q')[1]
    (runs/'stopped').rename(runs/'\x1b[31mred')
    assert '\x1b' not in talk(runs, number_of(runs, '\x1b[31mred'), 'n', 'x', number_of(runs, '\x1b[31mred'), 'n')[1]
