"Chains of jobs: the scripts, the records, and a real Slurm of one node, where one can be had."
import contextlib, json, os, re, shutil, subprocess, time
from pathlib import Path
import pytest
from safetensors.torch import load_file
from conftest import command, root
from llmlab.config import Slurm, load_config
from llmlab.files import ConfigError, LlmlabError, read_jsonl, write_json
from llmlab.launch import slurm
from llmlab.recipes import prepare

unlike = {'train/tokens_per_sec', 'train/memory_gb', 'train/mfu', 'train/data_wait', 'time', 'seconds'} # what no two runs share


def config(*overrides:str): return load_config('tiny_test', overrides)


# ---- scripts

@pytest.mark.parametrize('settings, there, not_there', [
    (['slurm.gpus_per_node=0'], ['srun env --ignore-signal=USR1 llmlab_train --resume runs/r --stop-after @$until'], ['gpus', 'torchrun', 'partition']),
    (['slurm.gpus_per_node=8', 'slurm.partition=gpu', 'slurm.cpus_per_task=6', 'slurm.mem=400G'],
     ['#SBATCH --gpus-per-node=8', '#SBATCH --nodes=1', '#SBATCH --ntasks-per-node=1', '#SBATCH --partition=gpu', '#SBATCH --cpus-per-task=48', '#SBATCH --mem=400G', 'export OMP_NUM_THREADS=6',
      'torchrun --standalone --no-python --nproc_per_node=8 llmlab_train --resume runs/r'], ['rdzv']),
    (['slurm.gpus_per_node=8', 'slurm.nodes=4'],
     ['#SBATCH --nodes=4', '#SBATCH --ntasks-per-node=1', 'host=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)', 'port=$((20000 + SLURM_JOB_ID % 12000))',
      'torchrun --no-python --nnodes=4 --nproc_per_node=8 --rdzv-backend=c10d --rdzv-endpoint="$host:$port" --rdzv-id="$SLURM_JOB_ID" llmlab_train --resume runs/r'], ['standalone']),
    (['slurm.gpus_per_node=0', 'slurm.tasks_per_node=2', 'chain.epochs_per_job=2'], ['--nproc_per_node=2', '--stop-after @6epochs,@$until'], ['gpus']),
], ids=['1', '1x8', '4x8', '2 on a CPU'])
def test_script(settings, there, not_there, tmp_path):
    text = slurm.script_of(config(*settings), Path('runs/r'), 3)
    for part in [*there, '#SBATCH --signal=USR1@120', '#SBATCH --time=04:00:00', 'llmlab_slurm begin runs/r 3', 'llmlab_slurm end runs/r 3 $code']: assert part in text, text
    for part in not_there: assert part not in text, text
    assert subprocess.run(['bash', '-n'], input=text, text=True, capture_output=True).stderr == ''
    lines = text.splitlines()
    assert lines[0] == '#!/bin/bash' and all(line.startswith('#SBATCH --') for line in lines[1:lines.index('')]), 'sbatch reads the lines before the first command only'


@pytest.mark.parametrize('value', ['a; touch pwned', '$(touch pwned)', '`touch pwned`', "a' ; touch pwned; '", 'a # b', '| touch pwned', '--wrap=touch pwned', '../x', 'é'])
def test_a_value_stays_a_value(value, tmp_path, monkeypatch):
    "Whatever is in a setting, in the name of a folder or of a run: the script is as it would be, and runs nothing of it."
    strange = tmp_path/value.replace('/', '_')
    strange.mkdir(); monkeypatch.chdir(strange)
    cfg = config('slurm.gpus_per_node=0')
    cfg.slurm.extra = {'comment': value}
    text = slurm.script_of(cfg, Path('runs')/value.replace('/', '_'), 1)
    assert [line for line in text.splitlines() if '--comment=' in line] in ([f'#SBATCH --comment="{value}"'], [f'#SBATCH --comment={value}'])
    fake = tmp_path/'fake'
    fake.mkdir()
    for name in ('llmlab_slurm', 'srun'): # prints its words, one a line
        (fake/name).write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n'); (fake/name).chmod(0o755)
    text = text.replace('export PATH=', 'x=')
    done = subprocess.run(['bash'], input=text, text=True, capture_output=True, env=os.environ | {'PATH': f'{fake}:{os.environ["PATH"]}'})
    assert done.returncode == 0 and done.stderr == '' and not list(tmp_path.rglob('pwned'))
    assert f'runs/{value.replace("/", "_")}' in done.stdout.splitlines()


@pytest.mark.parametrize('extra, says', [({'a b': 1}, 'no option of sbatch'), ({'--qos': 'x'}, 'no option of sbatch'), ({'qos\n': 'x'}, 'no option of sbatch'), ({'q': 'x'}, 'long name'), ({'comment': 'a\nb'}, 'one line'),
    ({'comment': 'a"b'}, 'double quotes'), ({'comment': 'a\\'}, 'backslashes'), ({'comment': ''}, 'one line'), ({'comment': ['a']}, 'one line'), ({'array': '1-3'}, '--array'), ({'ntasks_per_node': 4}, 'slurm.tasks_per_node')])
def test_a_wrong_option_is_refused(extra, says):
    with pytest.raises(ConfigError, match=says): slurm.further(extra)


def test_a_folder_that_is_a_pattern_is_refused(tmp_path, monkeypatch):
    (tmp_path/'100%j').mkdir(); monkeypatch.chdir(tmp_path/'100%j')
    with pytest.raises(ConfigError, match='as a pattern'): slurm.script_of(config(), Path('runs/r'), 1)


def test_options_of_every_kind():
    assert slurm.further({'exclusive': True, 'requeue': False, 'qos': None, 'gpu_bind': 'none', 'nice': 100}) == ['#SBATCH --exclusive', '#SBATCH --gpu-bind=none', '#SBATCH --nice=100']
    with pytest.raises(ConfigError, match='no time would be left'): slurm.asks(Slurm(time='00:02:00'), 'r', 'log')


@pytest.mark.parametrize('settings, says', [(['slurm.gpus_per_node=3', 'trainer.batch_size=32', 'parallel.strategy=none'], 'on each. 3 processes were started'), (['slurm.gpus_per_node=3', 'trainer.batch_size=32'], '3 ranks cannot divide'),
    (['slurm.gpus_per_node=4', 'trainer.batch_size=32', 'parallel.strategy=hsdp', 'parallel.shard_size=3'], 'groups of 3')])
def test_ranks_that_do_not_fit_are_refused(settings, says):
    with pytest.raises(ConfigError, match=says): slurm.settle(config(*settings))
    with pytest.raises(ConfigError, match=says): slurm.dry_run(config(*settings))


@pytest.mark.parametrize('setup, name', [('export WANDB_API_KEY=s3cr', 'WANDB_API_KEY'), ('module load cuda\nHF_TOKEN="s3cr" ; x', 'HF_TOKEN'), ('hf_token=s3cr', 'hf_token'), ('export A=1 AWS_SECRET_ACCESS_KEY=s3cr', 'AWS_SECRET_ACCESS_KEY'),
    ('declare -x db_password=s3cr', 'db_password'), ('hf auth login --token s3cr', '--token'), ('x --api-key=s3cr', '--api-key')])
def test_a_secret_is_refused_and_not_shown(setup, name):
    cfg = config()
    cfg.slurm.setup = setup
    with pytest.raises(ConfigError, match=f'setup sets {name},') as refused: slurm.settle(cfg)
    assert 's3cr' not in str(refused.value) and 'source ~/.keys' in str(refused.value)


@pytest.mark.parametrize('setup', [None, 'export TOKENIZERS_PARALLELISM=false HF_TOKEN_PATH=~/.t', 'source ~/.keys # my token', 'test "$HF_TOKEN" || exit 1', 'unset WANDB_API_KEY', 'max_tokens_here=3'])
def test_what_is_no_secret_is_let_through(setup):
    cfg = config()
    cfg.slurm.setup = setup
    slurm.settle(cfg)


# ---- records, without Slurm

nowhere = {'PATH': '/nowhere'} # no program of Slurm is found


def chain(folder:Path, *events, jobs:int=4, **rules)->Path:
    "A run whose chain has these records: ('began', link, step), ('ended', link, step, code)."
    write_json(folder/'slurm'/'chain.json', dict(door='train', mode='afterany', patience=2, until_done=False, jobs=[str(100+i) for i in range(1, jobs+1)]) | rules)
    slurm.note(folder, 'submitted')
    for event, link, step, *code in events: slurm.note(folder, event, link=link, job=str(100+link), step=step, **({'code': code[0]} if code else {}))
    return folder


@pytest.fixture
def no_slurm(monkeypatch): monkeypatch.setattr(slurm, '_ask', lambda *words: None)


def checkpoint(run:Path, step:int)->None:
    (run/'checkpoints'/f'step-{step:08d}').mkdir(parents=True)
    (run/'checkpoints'/f'step-{step:08d}'/'complete.json').touch()


def test_two_links_without_progress_end_the_chain(tmp_path, no_slurm, capsys):
    run = chain(tmp_path/'r')
    assert slurm.begin(run, 1)
    checkpoint(run, 20)
    assert slurm.end(run, 1, 1) == 1 # crashed, but left a checkpoint: this one does not count
    assert slurm.begin(run, 2) and slurm.end(run, 2, 139) == 139
    assert slurm.begin(run, 3) and slurm.end(run, 3, 1) == 1
    assert not slurm.begin(run, 4) and slurm.end(run, 4, 0) == 1
    slurm.log_of(run, 3).write_text('Loading\n\nConfigError: the disk is on fire\n')
    said = slurm.status(run)
    for part in ('2 links in a row (2, 3: exit code 139, exit code 1)', 'of step 20', 'the disk is on fire', '0 -> 20', '20 -> 20'): assert part in said, said


def test_a_link_that_was_killed_is_counted_by_the_next(tmp_path, no_slurm):
    run = chain(tmp_path/'r')
    for link in (1, 2):
        assert slurm.begin(run, link) # and then nothing: the node fell over
        write_json(run/'status.json', {'state': 'running', 'time': time.time(), 'pid': os.getpid(), 'host': 'other'})
    assert not slurm.begin(run, 3) and slurm.end(run, 3, 0) == 1
    assert [s.code for s in slurm.read_chain(run).sittings] == [None, None, 1]
    assert 'killed' in slurm.status(run) and json.loads((run/'status.json').read_text())['state'] == 'failed'


def test_a_run_that_is_done_is_left_alone(tmp_path, no_slurm):
    run = chain(tmp_path/'r', ('began', 1, 0), ('ended', 1, 40, 0))
    write_json(run/'status.json', {'state': 'done', 'time': time.time(), 'total_steps': 40})
    assert not slurm.begin(run, 2) and slurm.end(run, 2, 0) == 0
    assert 'the run is done' in slurm.status(run)


def test_a_run_that_somebody_trains_elsewhere_is_left_alone(tmp_path, no_slurm):
    run = chain(tmp_path/'r', ('began', 1, 0), ('ended', 1, 40, 75))
    alive = {'state': 'running', 'time': time.time(), 'pid': 1, 'host': 'other'}
    write_json(run/'status.json', alive)
    assert not slurm.begin(run, 2) and slurm.end(run, 2, 0) == 1
    assert json.loads((run/'status.json').read_text()) == alive and 'somebody else trains this run' in slurm.status(run) and not slurm.read_chain(run).stopped


@pytest.mark.parametrize('mode, codes', [('afterany', (75, 1)), ('afterok', (0, 1))])
def test_exit_codes(mode, codes, tmp_path, no_slurm):
    "torchrun says 1 whatever happened; the run knows. afterok goes on after a 0 alone."
    run = chain(tmp_path/'r', mode=mode)
    assert slurm.begin(run, 1)
    write_json(run/'status.json', {'state': 'stopped', 'time': time.time()+1})
    checkpoint(run, 5)
    assert slurm.end(run, 1, 1) == codes[0] and slurm.read_chain(run).sittings[0].code == 75
    assert slurm.begin(run, 2)
    write_json(run/'status.json', {'state': 'failed', 'time': time.time()+1})
    checkpoint(run, 6)
    assert slurm.end(run, 2, 1) == codes[1]
    assert bool(slurm.read_chain(run).stopped) == (mode == 'afterok')


def answers(monkeypatch, taken:int)->list[tuple]:
    "A Slurm that takes so many jobs, then refuses. What it was told is in the list."
    told = []
    def ask(*words):
        told.append(words)
        jobs = sum(w[0] == 'sbatch' for w in told)
        refused = words[0] == 'sbatch' and jobs > taken
        return subprocess.CompletedProcess(words, int(refused), '' if refused or words[0] != 'sbatch' else f'{900+jobs}\n', 'invalid partition' if refused else '')
    monkeypatch.setattr(slurm, '_ask', ask)
    monkeypatch.setattr(slurm, 'need_slurm', lambda: None)
    return told


def everything(folder:Path)->dict: return {p.relative_to(folder): p.read_bytes() if p.is_file() else None for p in folder.rglob('*')}


@pytest.mark.parametrize('by_hand', [False, True], ids=['a chain', 'begun by hand'])
@pytest.mark.parametrize('settings, says', [(['slurm.time=00:01:00'], 'no time would be left'), (['slurm.gpus_per_node=3'], '3 ranks cannot divide'), (['slurm.setup=HF_TOKEN=x'], 'sets HF_TOKEN'), (['slurm.extra={q: x}'], 'long name'),
    (['slurm.partition=nope', 'chain.total_jobs=3', 'chain.mode=afterok'], 'invalid partition')])
def test_a_refused_submission_changes_nothing(settings, says, by_hand, tmp_path, monkeypatch):
    run = tmp_path/'r'
    config('slurm.gpus_per_node=0', 'trainer.batch_size=32').save(run/'config.yaml')
    write_json(run/'status.json', {'state': 'done', 'time': time.time(), 'total_steps': 40})
    if not by_hand:
        chain(run, ('began', 1, 0), ('ended', 1, 0, 1), ('began', 2, 0), ('ended', 2, 0, 1))
        slurm.note(run, 'stopped', why='the disk is on fire')
    before, told = everything(run), answers(monkeypatch, taken=1)
    with pytest.raises(LlmlabError, match=says): slurm.resubmit('r', settings, tmp_path, say=lambda line: None)
    assert everything(run) == before
    assert [w for w in told if w[0] == 'scancel'] == ([('scancel', '--quiet', '901')] if 'slurm.partition=nope' in settings else [])
    answers(monkeypatch, taken=2)
    slurm.resubmit('r', ['chain.total_jobs=2'], tmp_path, say=lambda line: None)
    now = slurm.read_chain(run)
    assert now.jobs[-2:] == ['901', '902'] and not now.stopped and not now.done and load_config(run/'config.yaml').chain.total_jobs == 2 and slurm.stuck(now) is None


def test_the_door_without_slurm(llmlab, tmp_path):
    words = ['--config', 'tiny_test', 'run.name=r', 'slurm.gpus_per_node=0', 'chain.total_jobs=3', 'chain.epochs_per_job=1', 'trainer.max_steps=null']
    done = llmlab('llmlab_slurm', '--dry-run', '--array', 'run.seed=1,2', *words, **nowhere)
    assert done.returncode == 0 and done.stdout.count('#!/bin/bash') == 6 and not list(tmp_path.iterdir()), done.stderr
    for part in ('3 jobs of 1 epochs: one run of 3 epochs', '--dependency=afterany:JOB_OF_LINK_2', 'runs/r-seed-2/slurm/link-03.sh'): assert part in done.stdout
    assert subprocess.run(['bash', '-n'], input=done.stdout, text=True).returncode == 0
    done = llmlab('llmlab_slurm', *words, **nowhere)
    assert done.returncode == 1 and 'no sbatch here' in done.stderr and '--dry-run' in done.stderr and not list(tmp_path.iterdir())
    done = llmlab('llmlab_slurm', '--dry-run', '--prepare', '--array', '4', *words, **nowhere)
    assert done.returncode == 0 and '#SBATCH --array=0-3' in done.stdout and 'llmlab_prepare --config cache/slurm/prepare-1/config.yaml' in done.stdout and not list(tmp_path.iterdir()), done.stderr


@pytest.mark.parametrize('words, says', [(['stauts'], 'say submit'), (['begin', 'r', 'x'], 'is no number'), (['cancel'], 'takes the name of a run'), (['status', 'r'], "no run 'r'"), (['submit', 'r'], 'takes no names'), (['--array', 'run.seed', '--dry-run'], 'run.seed=1,2,3')])
def test_wrong_words(llmlab, words, says):
    done = llmlab('llmlab_slurm', *words, **nowhere)
    assert done.returncode == 1 and says in done.stderr and 'Traceback' not in done.stderr, done.stderr


# ---- a real Slurm

@pytest.fixture(scope='module')
def cluster(tmp_path_factory):
    "A Slurm of ours: one that runs already (as .ci/run starts it), or one that is started for these tests and ended after them. Other people's are left alone."
    if shutil.which('scontrol') and re.search(r'ClusterName *= *llmlab\n', subprocess.run(['scontrol', 'show', 'config'], capture_output=True, text=True).stdout):
        yield None
        return
    folder, script = tmp_path_factory.mktemp('slurm'), root/'tests'/'slurm_up.sh'
    done = subprocess.run(['bash', script, folder], capture_output=True, text=True)
    if done.returncode: pytest.skip(f'no Slurm here, and none can be started: {(done.stdout or done.stderr).strip()}')
    os.environ['SLURM_CONF'] = str(folder/'slurm.conf')
    yield folder
    del os.environ['SLURM_CONF']
    subprocess.run(['bash', script, '--down', folder], check=True)


@pytest.fixture(scope='module')
def site(cluster, tmp_path_factory)->Path:
    "A folder to submit from: the commands of this environment, a cache, and a run that nobody interrupted."
    folder = tmp_path_factory.mktemp('site')
    (folder/'bin').mkdir()
    for door in ('train', 'finetune', 'slurm', 'prepare'):
        *python, code = command(f'llmlab_{door}')
        (folder/'bin'/f'llmlab_{door}').write_text(f"#!/bin/sh\nexec {' '.join(python)} '{code}' \"$@\"\n")
        (folder/'bin'/f'llmlab_{door}').chmod(0o755)
    (folder/'c.yaml').write_text(f'''base: tiny_test
trainer: {{max_steps: null, save_interval: 1000, eval_interval: 25, log_interval: 4}}
loader: {{workers: 1}}
slurm:
  gpus_per_node: 0
  time: "00:10:00"
  signal_seconds: 5
  setup: export PATH={folder}/bin:"$PATH" PYTHONPATH={root} OMP_NUM_THREADS=1
''')
    with contextlib.chdir(folder): prepare(load_config('c.yaml'), say=lambda line: None)
    return folder


def do(door:str, *words:str, cwd:Path)->subprocess.CompletedProcess:
    return subprocess.run(command(door, *words), cwd=cwd, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=300, env=os.environ | {'PYTHONPATH': str(root), 'OMP_NUM_THREADS': '1'})


def through_the_door(site:Path, *words:str)->None:
    done = do('llmlab_slurm', *words, cwd=site)
    assert done.returncode == 0, done.stderr


def submit(site:Path, name:str, *settings:str)->Path:
    "The same, without starting another Python."
    with contextlib.chdir(site): return site/slurm.submit(load_config('c.yaml', [f'run.name={name}', *settings]), say=lambda line: None)


@pytest.fixture(scope='module')
def submitted(site)->Path:
    "Most of what the tests look at, queued at once; and the run that nobody interrupts, beside it."
    submit(site, 'five', 'chain.total_jobs=5', 'chain.epochs_per_job=0.1')
    submit(site, 'crash', 'chain.total_jobs=4', 'data.name=files', 'data.path=missing.txt')
    submit(site, 'short', 'trainer.epochs=0.5', 'slurm.time=00:01:00', 'slurm.signal_seconds=58')
    done = do('llmlab_train', '--config', 'c.yaml', 'run.name=straight', 'trainer.epochs=0.5', cwd=site)
    assert done.returncode == 0, done.stderr
    return site


def await_(what, seconds:float=240.):
    "Wait until `what()` is true, and give it."
    until = time.monotonic()+seconds
    while time.monotonic() < until:
        if found := what(): return found
        time.sleep(.2)
    raise AssertionError(f'not within {seconds:.0f} seconds')


def over(run:Path, links:int)->list[slurm.Sitting]|None:
    "The sittings of a chain, when so many have ended."
    ended = [s for s in slurm.read_chain(run).sittings if s.ended is not None]
    return ended if len(ended) >= links else None


def same_run(a:Path, b:Path)->None:
    "What was logged, and the bytes of the last weights."
    lines = [[{k: v for k, v in r.items() if k not in unlike} for r in read_jsonl(run/'metrics.jsonl')] for run in (a, b)]
    assert lines[0] == lines[1]
    last = [sorted((run/'checkpoints').glob('step-*'))[-1] for run in (a, b)]
    assert last[0].name == last[1].name and (last[0]/'model.safetensors').read_bytes() == (last[1]/'model.safetensors').read_bytes()


def test_a_job_that_crashes_twice_stops_the_chain(submitted):
    run = submitted/'runs'/'crash'
    sittings = await_(lambda: over(run, 2))
    assert [(s.code, s.progress) for s in sittings] == [(1, False), (1, False)]
    await_(lambda: slurm.read_chain(run).stopped)
    await_(lambda: set(slurm.states(slurm.read_chain(run).jobs[2:]).values()) <= {'CANCELLED'})
    said = do('llmlab_slurm', 'status', 'crash', cwd=submitted).stdout
    for part in ('2 links in a row (1, 2: exit code 1, exit code 1) left no new checkpoint', 'missing.txt', 'CANCELLED'): assert part in said, said


def test_a_job_at_its_limit_hands_over_and_more_jobs_go_on(submitted):
    run = submitted/'runs'/'short'
    first, = await_(lambda: over(run, 1))
    assert first.code == 75 and first.last > 0 and 'the time is up' in slurm.log_of(run, 1).read_text()
    await_(lambda: set(slurm.states(slurm.read_chain(run).jobs).values()) <= {'FAILED'}) # Slurm's word for 75
    assert 'no link is left' in do('llmlab_slurm', 'status', 'short', cwd=submitted).stdout
    through_the_door(submitted, 'submit', '--resume', 'short', 'slurm.time=00:10:00', 'slurm.signal_seconds=5')
    second = await_(lambda: over(run, 2))[1]
    assert (second.first, second.code) == (first.last, 0)
    same_run(run, submitted/'runs'/'straight')


def test_a_signal_hands_over_and_cancel_saves(site):
    run = submit(site, 'long', 'trainer.max_steps=100000', 'trainer.save_interval=10', 'trainer.eval_interval=100000', 'chain.total_jobs=3')
    await_(lambda: slurm.newest_step(run) >= 10)
    subprocess.run(['scancel', '--signal=USR1', slurm.read_chain(run).jobs[0]], check=True)
    first, = await_(lambda: over(run, 1))
    assert first.code == 75 and first.last >= 10 and 'SIGUSR1' in slurm.log_of(run, 1).read_text()
    await_(lambda: slurm.newest_step(run) > first.last)
    done = do('llmlab_slurm', 'cancel', 'long', cwd=site)
    assert done.returncode == 0 and f'step-{slurm.newest_step(run):08d}' in done.stdout, done.stderr
    second = await_(lambda: over(run, 2))[1]
    assert second.first == first.last and second.code == 75 and second.last == slurm.newest_step(run) # SIGTERM saves too
    assert 'cancelled' in do('llmlab_slurm', 'status', 'long', cwd=site).stdout
    steps = [r['step'] for r in read_jsonl(run/'metrics.jsonl')]
    assert steps == sorted(set(steps)), 'no step was logged twice'


def test_five_jobs_are_one_run(submitted):
    run = submitted/'runs'/'five'
    sittings = await_(lambda: over(run, 5))
    assert [(s.link, s.code) for s in sittings] == [(1, 75), (2, 75), (3, 75), (4, 75), (5, 0)]
    assert all(a.last == b.first for a, b in zip(sittings, sittings[1:]))
    same_run(run, submitted/'runs'/'straight')
    said = do('llmlab_slurm', 'status', cwd=submitted).stdout
    assert f'five: checkpoint of step {sittings[-1].last} of {sittings[-1].last}, done' in said, said


@pytest.mark.parametrize('links', [1, pytest.param(2, marks=pytest.mark.proof)])
def test_torchrun_within_a_job(submitted, links):
    "Two processes: the exit code 75 does not get through torchrun, and is known all the same. The losses are those of one process."
    run = submit(submitted, f'two-{links}', 'slurm.tasks_per_node=2', f'chain.total_jobs={links}', 'chain.epochs_per_job=0.05', 'trainer.epochs=0.5')
    sittings = await_(lambda: over(run, links))
    assert [s.code for s in sittings] == [75]*links, slurm.status(run)
    assert all(s.progress for s in sittings) and [s.first for s in sittings[1:]] == [s.last for s in sittings[:-1]]
    logged, alone = ({r['step']: r['train/loss'] for r in read_jsonl(run/'metrics.jsonl') if 'train/loss' in r} for run in (run, submitted/'runs'/'straight'))
    assert logged and all(abs(loss-alone[step]) < 1e-3 for step, loss in logged.items()) # Muon multiplies in bf16, which makes more of the rounding of the sums


@pytest.mark.proof
def test_the_rendezvous_of_two_nodes(llmlab, tmp_path, monkeypatch):
    "The script for two machines, on one: a stand-in for srun starts its command twice, as on two hosts. The two torchruns meet, and train one model."
    monkeypatch.chdir(tmp_path)
    write_json(tmp_path/'runs'/'r'/'slurm'/'chain.json', dict(door='train', mode='afterany', patience=2, until_done=False, jobs=['4242']))
    cfg = config('run.name=r', 'trainer.max_steps=6', 'slurm.nodes=2', 'slurm.gpus_per_node=1')
    cfg.save(tmp_path/'runs'/'r'/'config.yaml')
    (tmp_path/'bin').mkdir()
    for door in ('train', 'slurm'):
        *python, code = command(f'llmlab_{door}')
        (tmp_path/'bin'/f'llmlab_{door}').write_text(f"#!/bin/sh\nexec {' '.join(python)} '{code}' \"$@\"\n")
    (tmp_path/'bin'/'srun').write_text('#!/bin/bash\nwhile [[ $1 == --* ]]; do shift; done\n"$@" & a=$!\n"$@" & b=$!\nwait $a && wait $b\n')
    (tmp_path/'bin'/'scontrol').write_text('#!/bin/sh\nhostname\n')
    for p in (tmp_path/'bin').iterdir(): p.chmod(0o755)
    text = slurm.script_of(cfg, Path('runs/r'), 1).replace('export PATH=', f'export PATH={tmp_path}/bin:')
    done = subprocess.run(['bash'], input=text, text=True, capture_output=True, timeout=300,
                          env=os.environ | {'SLURM_JOB_ID': '4242', 'SLURM_JOB_NODELIST': 'x', 'PYTHONPATH': str(root), 'OMP_NUM_THREADS': '1'})
    assert done.returncode == 0 and 'the run is done' in done.stdout and '2 ranks' in done.stdout, done.stdout+done.stderr


@pytest.mark.proof
def test_slurm_itself_signals_before_the_time_limit(site):
    run = submit(site, 'real', 'trainer.max_steps=1000000', 'slurm.time=00:01:00', 'slurm.signal_seconds=20', 'chain.total_jobs=2')
    sittings = await_(lambda: over(run, 2), 400)
    assert [s.code for s in sittings] == [75, 75] and sittings[1].first == sittings[0].last < sittings[1].last
    assert all(any(why in slurm.log_of(run, n).read_text() for why in ('SIGUSR1', 'the time is up')) for n in (1, 2))


@pytest.mark.proof
def test_tasks_prepare_one_cache_and_each_value_has_a_run(site, tmp_path):
    through_the_door(site, '--prepare', '--array', '3', '--config', 'c.yaml', 'packing.folder=other')
    logs = await_(lambda: len(found := [p.read_text() for p in (site/'other'/'slurm'/'prepare-1').glob('task-*.log')]) == 3 and all('tokens in' in text for text in found) and found)
    assert len({text.splitlines()[-1] for text in logs}) == 1, logs
    through_the_door(site, '--array', 'run.seed=1,2', '--config', 'c.yaml', 'run.name=s', 'trainer.max_steps=3')
    for seed in (1, 2): await_(lambda: over(site/'runs'/f's-seed-{seed}', 1))
    a, b = (load_file(next((site/'runs'/f's-seed-{seed}'/'checkpoints').glob('step-*'))/'model.safetensors') for seed in (1, 2))
    assert any(not a[k].equal(b[k]) for k in a)


@pytest.mark.proof
def test_until_it_is_done(site):
    "Each job queues the next one; every one of them stops after a step."
    with contextlib.chdir(site):
        cfg = load_config('c.yaml', ['run.name=on', 'trainer.max_steps=3', 'slurm.time=00:01:00', 'slurm.signal_seconds=58'])
        run = site/slurm.submit(cfg, until_done=True, say=lambda line: None)
    await_(lambda: slurm.read_chain(run).done)
    await_(lambda: not {'PENDING', 'RUNNING', 'COMPLETING'} & set(slurm.states(slurm.read_chain(run).jobs).values()))
    sittings = slurm.read_chain(run).sittings
    assert [s.code for s in sittings] == [75]*(len(sittings)-1)+[0] and len(sittings) > 1, slurm.status(run)
    through_the_door(site, 'submit', '--resume', 'on', 'trainer.max_steps=5', 'slurm.signal_seconds=5') # a run that is done, made longer
    assert await_(lambda: over(run, len(sittings)+1))[-1].last == 5


@pytest.mark.proof
def test_a_chain_of_fine_tuning(submitted):
    settings = ['run.name=tuned', 'run.device=cpu', 'run.precision=fp32', 'tracking.tensorboard=false', 'finetune.init=runs/straight', 'packing.seq_len=256', 'finetune.max_samples=60', 'trainer.sample_tokens=0',
                'chain.total_jobs=2', 'chain.epochs_per_job=1', 'slurm.gpus_per_node=0', 'slurm.signal_seconds=5', 'slurm.setup='+load_config(submitted/'c.yaml').slurm.setup]
    with contextlib.chdir(submitted): run = submitted/slurm.submit(load_config({}, settings, under='sft'), 'finetune', say=lambda line: None)
    sittings = await_(lambda: over(run, 2))
    assert [s.code for s in sittings] == [75, 0] and sittings[0].last*2 == sittings[1].last, slurm.status(run)
    assert 'warm-up takes' in slurm.log_of(run, 1).read_text()
