"Several ranks: the same losses as one, together in everything, and an end that says whose it was."
import json, os, re, signal, subprocess, sys, time
from pathlib import Path
import pytest, torch
from torch.testing import assert_close
from llmlab.eval.evaluate import open_model
from llmlab.files import read_jsonl
from llmlab.trainer.checkpoint import find_checkpoint, load_checkpoint

HERE = Path(__file__).parent
ENV = os.environ | {'OMP_NUM_THREADS': '1'}


def torchrun(ranks, *words, folder=None, **kw):
    "A job of several processes; `words` are a program and its arguments."
    return subprocess.Popen([sys.executable, '-m', 'torch.distributed.run', f'--nproc_per_node={ranks}', '--no-python', *words], cwd=folder, env=ENV, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, **kw)


def train(folder, *words, ranks=1):
    door = [sys.executable, '-c', 'from llmlab.cli import train; train()', *words]
    return torchrun(ranks, *door, folder=folder) if ranks > 1 else subprocess.Popen(door, cwd=folder, env=ENV, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def finished(job, code=0):
    out, err = job.communicate(timeout=240)
    assert job.returncode == code, (job.returncode, out[-3000:], err[-3000:])
    return out, err


MEMORY = {'more': ['model.attention=infini', 'model.infini.segment_len=16']}
BELIEF = {'more': ['model.sdd.feedback_warmup_steps=0', 'model.sdd.feedback_prob=.6']}
CASES = {f'{family}-{strategy}': dict(strategy=strategy, optim=optim, family=family, **more) for family, strategy, optim, more in [
    ('ar', 'ddp', 'adamw', {}), ('ar', 'fsdp', 'adamw', {'recompute': 'selective', 'ema': True} | MEMORY), ('ar', 'hsdp', 'muon', {}), ('diffusion', 'fsdp', 'muon', {}), ('sdd', 'ddp', 'adamw', BELIEF), ('sdd', 'fsdp', 'adamw', BELIEF)]}


@pytest.fixture(scope='module')
def alone(tmp_path_factory):
    "What one process learns."
    folder = tmp_path_factory.mktemp('alone')
    cases = {name: case | {'strategy': 'none'} for name, case in CASES.items()}
    finished(subprocess.Popen([sys.executable, HERE/'ranks.py', json.dumps(cases), folder], env=ENV, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE))
    return folder


@pytest.mark.parametrize('ranks', [2, 4])
def test_ranks_learn_what_one_process_learns(ranks, alone, tmp_path):
    cases = {name: case for name, case in CASES.items() if (case['strategy'] != 'hsdp' if ranks == 2 else name.startswith('ar'))}
    broken = {f'broken-{s}': dict(strategy=s, optim='adamw', family='ar', broken_on=1) for s in ('ddp', 'fsdp')}
    finished(torchrun(ranks, sys.executable, HERE/'ranks.py', json.dumps(cases | broken), tmp_path))
    for name in broken: # one rank saw it, and all refuse the step in the same words
        texts = {(tmp_path/f'{name}-{rank}.txt').read_text() for rank in range(ranks)}
        assert len(texts) == 1 and 'rank 1: step 3 did not happen: the loss of micro-batch 1 of' in texts.pop()
    for name in cases:
        one, many = (torch.tensor(json.loads((folder/f'{name}-{n}.json').read_text())) for folder, n in ((alone, 1), (tmp_path, ranks)))
        assert len(one) == 20 and one[-1, 0] < one[0, 0]-.3
        assert_close(many, one, rtol=1e-5, atol=1e-5, msg=lambda text: f'{name}: {text}')
        one, many = (torch.load(folder/f'{name}-{n}.pt', weights_only=True) for folder, n in ((alone, 1), (tmp_path, ranks)))
        assert_close(many, one, rtol=1e-3, atol=2e-5, msg=lambda text: f'{name}: {text}')


def losses(folder): return {r['step']: r['train/loss'] for r in read_jsonl(folder/'metrics.jsonl') if 'train/loss' in r}
def said(out): return re.findall(r'Step +(\d+)/40 .* Loss: ([\d.]+)', out)


def test_a_divided_run_prints_the_losses_of_one_process_and_goes_on_on_one_rank(tmp_path):
    out, _ = finished(train(tmp_path, '--config', 'tiny_test', 'run.name=one', 'trainer.save_interval=10'))
    many, err = finished(train(tmp_path, '--config', 'tiny_test', 'run.name=two', 'parallel.strategy=fsdp', 'trainer.save_interval=10', ranks=2))
    assert said(out) == said(many) and len(said(out)) == 8, (said(out), said(many))
    assert many.count('validation loss') == out.count('validation loss') # one rank speaks
    one, two = (load_checkpoint(find_checkpoint(tmp_path/'runs'/name)) for name in ('one', 'two'))
    assert_close(two['model_state_dict'], one['model_state_dict'], rtol=1e-3, atol=1e-4)
    assert two['loader_state']['position'] == one['loader_state']['position'] and two['train_state']['tokens'] == one['train_state']['tokens']
    # killed in the middle, and resumed on one rank
    job = train(tmp_path, '--config', 'tiny_test', 'run.name=cut', 'parallel.strategy=fsdp', 'trainer.save_interval=10', 'trainer.max_steps=40', ranks=2)
    until(lambda: (tmp_path/'runs/cut/checkpoints/step-00000010').is_dir(), job)
    kill_tree(job)
    step = int(find_checkpoint(tmp_path/'runs/cut').name[5:])
    assert 10 <= step < 40
    finished(train(tmp_path, '--resume', 'cut', 'parallel.strategy=auto'))
    a, b = losses(tmp_path/'runs/one'), losses(tmp_path/'runs/cut')
    assert a.keys() == b.keys()
    assert_close(torch.tensor(list(b.values())), torch.tensor(list(a.values())), rtol=1e-4, atol=1e-4)


def until(true, job, seconds=120):
    "Wait for something that a job does."
    end = time.monotonic()+seconds
    while not true():
        assert job.poll() is None, job.communicate()
        assert time.monotonic() < end, 'it did not happen'
        time.sleep(.02)


def ranks_of(job):
    "Process ids of the ranks, by rank."
    out = {}
    for p in Path('/proc').glob('[0-9]*'):
        try: env, parent = (p/'environ').read_bytes(), int((p/'stat').read_text().rpartition(')')[2].split()[1])
        except (OSError, ValueError): continue
        if parent == job.pid and (m := re.search(rb'\0RANK=(\d+)\0', b'\0'+env)): out[int(m[1])] = int(p.name)
    return out


def kill_tree(job):
    "As a power cut does it."
    for pid in (job.pid, *ranks_of(job).values()): os.kill(pid, signal.SIGKILL)
    job.communicate()


LONG = ['--config', 'tiny_test', 'trainer.max_steps=20000', 'trainer.save_interval=5', 'trainer.eval_interval=20000']


@pytest.mark.parametrize('strategy', ['fsdp', pytest.param('ddp', marks=pytest.mark.proof)])
def test_the_death_of_a_rank_ends_the_job_and_is_named(strategy, tmp_path):
    job = train(tmp_path, *LONG, f'parallel.strategy={strategy}', 'run.name=dies', ranks=2)
    until(lambda: (tmp_path/'runs/dies/checkpoints/step-00000010').is_dir(), job)
    began = time.monotonic()
    os.kill(ranks_of(job)[1], signal.SIGKILL)
    out, err = job.communicate(timeout=60)
    assert job.returncode not in (0, 75) and time.monotonic()-began < 60
    assert 'rank 1 of 2 has died' in err and 'mistake in llmlab' not in err, err[-4000:]
    found = find_checkpoint(tmp_path/'runs/dies')
    assert open_model(found).network is not None and load_checkpoint(found)['global_step'] >= 5


def test_a_signal_to_one_rank_stops_all_after_the_same_step(tmp_path):
    job = train(tmp_path, *LONG, 'parallel.strategy=ddp', 'run.name=told', ranks=2)
    until(lambda: (tmp_path/'runs/told/checkpoints/step-00000005').is_dir(), job)
    os.kill(ranks_of(job)[1], signal.SIGUSR1)
    out, err = job.communicate(timeout=60)
    assert 'another rank was asked to stop' in out+err and err.count('exitcode') and re.search(r'exitcode *: 75', err), err[-3000:]
    assert json.loads((tmp_path/'runs/told/status.json').read_text())['state'] == 'stopped'
    assert f'checkpoint {find_checkpoint(tmp_path/"runs/told").name}' in err or find_checkpoint(tmp_path/'runs/told').name in err, err


def test_a_mistake_is_said_once(tmp_path):
    (tmp_path/'runs/taken').mkdir(parents=True)
    (tmp_path/'runs/taken/config.yaml').write_text('run: {name: taken}\n')
    _, err = finished(train(tmp_path, '--config', 'tiny_test', 'run.name=taken', ranks=2), 1)
    assert err.count('the run runs/taken is there already') == 1, err


@pytest.mark.proof
def test_ranks_call_a_divided_network_equally_often(tmp_path):
    "Where they did not they waited for each other: a short last batch of validation, and passes of SDD after a resume with other batches."
    finished(train(tmp_path, '--config', 'tiny_test', 'run.name=memory', 'parallel.strategy=fsdp', 'parallel.timeout_minutes=0.5', 'model.attention=infini', 'model.infini.segment_len=16', 'data.validation_fraction=0.5',
                   'trainer.eval_rows=75', 'trainer.max_steps=2', 'trainer.eval_interval=2', 'trainer.sample_tokens=0', ranks=2))
    sdd = ['--config', 'tiny_test', 'run.name=sdd', 'model.architecture=sdd', 'parallel.strategy=fsdp', 'parallel.timeout_minutes=0.5', 'trainer.max_steps=12', 'trainer.eval_interval=6', 'trainer.eval_rows=61',
           'trainer.sample_tokens=0', 'model.sdd.feedback_warmup_steps=0', 'model.sdd.feedback_prob=0.5']
    finished(train(tmp_path, *sdd, '--stop-after', '3', ranks=2), 1) # torchrun has 1 for every end but 0
    finished(train(tmp_path, '--resume', 'sdd', 'trainer.batch_size=16', ranks=2))
