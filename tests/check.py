"""The whole check: `make test`. With --write: put modules, notebooks and README in step instead of complaining.

Steps: modules and notebooks in step; notebooks clean; README in step; the notebooks run; the tests pass.
"""
import json, os, re, shutil, subprocess, sys, tempfile, time
from pathlib import Path

root = Path(__file__).resolve().parent.parent
tools = Path(sys.executable).parent
quiet = dict(WANDB_MODE='offline', WANDB_SILENT='true', TOKENIZERS_PARALLELISM='false', HF_HUB_OFFLINE='1', HF_DATASETS_DISABLE_PROGRESS_BARS='1',
             TRANSFORMERS_VERBOSITY='error', MPLBACKEND='agg', JUPYTER_PLATFORM_DIRS='1')
env = os.environ | quiet


def run(*command:str, cwd:Path=root, **extra:str)->int:
    "Run one of this environment's programs with its output shown; gives its exit code."
    return subprocess.run([str(tools/command[0]), *command[1:]], cwd=cwd, env=env | extra).returncode


def notebooks(folder:Path)->list[Path]:
    return sorted(p for p in (folder/'nbs').rglob('*.ipynb') if '.ipynb_checkpoints' not in p.parts)


def fresh_copy(to:Path)->Path:
    "The notebooks alone, exported and cleaned anew: what the tree should look like."
    for name in ('settings.ini', 'pyproject.toml', '_quarto.yml'): shutil.copy(root/name, to/name)
    shutil.copytree(root/'nbs', to/'nbs', symlinks=True, ignore=shutil.ignore_patterns('.ipynb_checkpoints', 'runs', 'cache'))
    (to/'llmlab').mkdir()
    for command in ('nbdev_export', 'nbdev_clean'):
        done = subprocess.run([str(tools/command)], cwd=to, env={k: v for k, v in env.items() if k != 'IN_TEST'}, capture_output=True, text=True)
        if done.returncode: sys.exit(f'{command} failed:\n{done.stdout}{done.stderr}')
    return to


def modules(folder:Path)->dict[str, str]:
    return {str(p.relative_to(folder)): p.read_text() for p in sorted((folder/'llmlab').rglob('*.py'))}


def readme(folder:Path)->str:
    "README.md as index.ipynb says it: its text and code, with links that work from the project's root."
    out = []
    for cell in json.loads((folder/'nbs'/'index.ipynb').read_text())['cells']:
        src = ''.join(cell['source']).strip()
        if not src or src.startswith('#| hide'): continue
        out.append(re.sub(r'\]\((?!https?:|#)([^)]+\.ipynb)', r'](nbs/\1', src) if cell['cell_type'] == 'markdown' else f'```python\n{src}\n```')
    return '\n\n'.join(out) + '\n'


def in_step(want:Path)->list[str]:
    "What differs between the tree and the fresh copy, each with what to do."
    have, should = modules(root), modules(want)
    notebook_of = {name: (re.search(r'File to edit: (\S+?)\.?$', text, re.M) or ['', '?'])[1].replace('../', '') for name, text in should.items()}
    bad = [f'{name} is not what {notebook_of[name]} exports: edit the notebook, not the module' for name in should if name in have and have[name] != should[name] and 'File to edit' in should[name]]
    bad += [f'{name} is out of date' for name in should if name in have and have[name] != should[name] and 'File to edit' not in should[name]]
    bad += [f'{name} is missing' for name in should if name not in have]
    bad += [f'{name} has no notebook: delete it, or write its page' for name in have if name not in should]
    bad += [f'{p.relative_to(root)} is not clean' for p in notebooks(root) if p.read_text() != (want/p.relative_to(root)).read_text()]
    if (root/'README.md').read_text() != readme(want): bad.append('README.md is not what nbs/index.ipynb says')
    return bad


def write(want:Path)->None:
    "Put the tree in step with the notebooks."
    new = modules(want)
    for name in modules(root):
        if name not in new: (root/name).unlink(); print('deleted', name)
    for name, text in new.items():
        (root/name).parent.mkdir(parents=True, exist_ok=True)
        if not (root/name).exists() or (root/name).read_text() != text: (root/name).write_text(text); print('wrote', name)
    for p in notebooks(want):
        if (root/p.relative_to(want)).read_text() != p.read_text(): shutil.copy(p, root/p.relative_to(want)); print('cleaned', p.relative_to(want))
    (root/'README.md').write_text(readme(want))


def step(name:str, ok:bool, since:float)->None:
    print(f'== {name}: {"ok" if ok else "FAILED"} ({time.time()-since:.0f} s)', flush=True)
    if not ok: sys.exit(1)


def main()->None:
    start = time.time()
    with tempfile.TemporaryDirectory() as tmp:
        want = fresh_copy(Path(tmp))
        if '--write' in sys.argv: return write(want)
        bad = in_step(want)
        for line in bad: print('  ', line)
        if bad: print('   `make export` writes modules and README from the notebooks, and cleans them.')
    step('notebooks, modules and README are in step', not bad, start)
    since = time.time()
    step('the notebooks run', run('nbdev_test', '--n_workers', '2', OMP_NUM_THREADS='1', PYTHONPATH=str(root)) == 0, since)
    since = time.time()
    step('the tests pass', run('pytest', '-n', '3', '--dist', 'worksteal', OMP_NUM_THREADS='1') == 0, since) # three on two cores: some tests wait for a browser or a job; a module stays together, and is set up once
    print(f'== all is well ({time.time()-start:.0f} s)')


if __name__ == '__main__': main()
